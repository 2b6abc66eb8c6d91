"""Access control of the live page: only who has the printed address, and only from this machine.

The address contains a random token: http://127.0.0.1:PORT/TOKEN/. It is not a cookie, because browsers would send a
cookie to every other server on this machine, and not a header, because a link cannot carry one.
"""

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)  # unsafe-inline: plotly sets styles of its own
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Answer every request with 403 unless its path begins with the token and its Host is this server.

    If a browser sends an Origin, that must be this server too. So no other site, and no other host name that resolves
    to this machine, reaches the server through a browser.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        root = scope["path"].partition("/")[2].partition("/")[0]
        app: ASGIApp = self.app
        if headers.get(b"host") not in self.hosts:
            app = Response("refused: the Host header is not this server\n", 403)
        elif headers.get(b"origin") not in {None, *(f"http://{host}" for host in self.hosts)}:
            app = Response("refused: the Origin header is another site\n", 403)
        elif not hmac.compare_digest(root.encode(), self.token.encode()):
            app = Response("refused: open the whole address that losscurve watch printed\n", 403)
        await app({**scope, "root_path": f"/{root}"}, receive, send_with_headers)
