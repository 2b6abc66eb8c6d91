"""Who may ask the live page's server: who has the address that it printed, and asks from this machine.

The address begins with a token that nobody can guess, http://127.0.0.1:PORT/TOKEN/. It is no cookie, which browsers
would send to every other server on this machine too, and no header, which a link could not carry.
"""

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)  # styles: plotly sets its own
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets through only requests whose path begins with the token, whose Host is this server and, where a browser
    names one, whose Origin is too (so that no other site, nor a name that points here, reaches it by a browser).
    Every other request is answered with 403.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
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
            app = Response("refused: not the name of this server\n", 403)
        elif headers.get(b"origin") not in {None, *(f"http://{host}" for host in self.hosts)}:
            app = Response("refused: asked from another page\n", 403)
        elif not hmac.compare_digest(root.encode(), self.token.encode()):
            app = Response("refused: open the whole address that losscurve watch printed\n", 403)
        await app({**scope, "root_path": f"/{root}"}, receive, send_with_headers)
