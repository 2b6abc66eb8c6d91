"""The live page's server: on loopback, for who has the token, of the run folders it was started with.

Every request needs the token (once in the address, then in a cookie), a Host that is this server's and, where the
browser names one, an Origin that is too. A run is asked for by its number; no path comes from a request.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm.config import TrainConfig, from_settings
from llm.errors import Failure, UserError
from llm.page.follow import RECENT, Follower, names_of, schedule_points
from llm.page.playground import Playground, Question, question
from llm.schedule import lr_at, warmup_warning

LOOK_EVERY = 1.0  # seconds
BODY = 2**18  # bytes of a request, at most
KNOBS = ("warmup_steps", "max_lr", "min_lr", "max_steps", "schedule")
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
FILES = {"/page.js": "text/javascript", "/page.css": "text/css"}


class Guard:
    """Lets through only who may ask; every other request is answered with 403."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"losscurve-{port}"
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        response: ASGIApp = self.app
        if not self._from_here(headers):
            response = Response("refused: not from this page\n", 403)
        elif self._is_token(asked_token(scope)) and scope["path"] == "/" and scope["method"] == "GET":
            response = RedirectResponse("/", 303)  # the token leaves the address bar and the history
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        elif not self._is_token(self._cookie_token(headers)):
            response = Response("refused: open the address that losscurve watch printed\n", 403)
        await response(scope, receive, send_with_headers)

    def _from_here(self, headers: dict[str, str]) -> bool:
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "none")
        return (
            headers.get("host") in self.hosts
            and (origin is None or origin in {f"http://{host}" for host in self.hosts})
            and site in ("same-origin", "none")
        )

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _cookie_token(self, headers: dict[str, str]) -> str:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return str(morsel.value) if morsel else ""


def asked_token(scope: Scope) -> str:
    """The token in the address, if there is one."""
    return str(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0])


class Page:
    """The run folders that are followed, and what the page's addresses answer."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.runs = [Follower(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
        self.playground = Playground()
        self.playing = asyncio.Lock()
        self.looking = asyncio.Lock()
        self.looked_at = -LOOK_EVERY

    async def look(self) -> None:
        """Read what is new in every folder, at most once a second; in a thread, since the first is long."""
        async with self.looking:
            if time.monotonic() - self.looked_at < 0.9 * LOOK_EVERY:
                return
            for run in self.runs:
                await run_in_threadpool(run.look)
            self.looked_at = time.monotonic()

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.changes(), media_type="text/event-stream")

    async def changes(self) -> AsyncIterator[str]:
        """Server-sent events: of each run all there is, then what is new, once a second."""
        seen: list[Seen] = [Seen() for _ in self.runs]
        yield f"retry: 1000\nevent: hello\ndata: {json.dumps({'runs': len(self.runs)})}\n\n"
        quiet = 0
        while True:
            await self.look()
            told = [news(number, run, seen[number]) for number, run in enumerate(self.runs)]
            for message in told:
                if message:
                    yield f"event: run\ndata: {json.dumps(message, allow_nan=False)}\n\n"
            quiet = 0 if any(told) else quiet + 1
            if quiet >= 15:  # so that either side notices when the other is gone
                quiet = 0
                yield ": here\n\n"
            await asyncio.sleep(LOOK_EVERY)

    async def schedule(self, request: Request) -> Response:
        try:
            return JSONResponse(schedule_answer(dict(request.query_params)))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    async def next(self, request: Request) -> Response:
        return await self.answered(request, stream=False)

    async def stream(self, request: Request) -> Response:
        return await self.answered(request, stream=True)

    async def answered(self, request: Request, stream: bool) -> Response:
        """The playground's answer, or the one line that says why there is none."""
        try:
            run, asked = self.runs[request.path_params["run"]], question(await body_of(request))
            if stream:
                return StreamingResponse(self.tokens(run, asked), media_type="text/event-stream")
            async with self.playing:
                return JSONResponse(await run_in_threadpool(self.playground.next, run.path, asked))
        except IndexError:
            return JSONResponse({"error": "no such run"}, 404)
        except ERRORS as error:
            return JSONResponse({"error": one_line(error)}, 400)

    async def tokens(self, run: Follower, asked: Question) -> AsyncIterator[str]:
        """Server-sent events, one for each token."""
        async with self.playing:
            try:
                tokens = self.playground.stream(run.path, asked)
                while (token := await run_in_threadpool(next, tokens, None)) is not None:
                    yield f"data: {json.dumps(token)}\n\n"
                yield "event: done\ndata: {}\n\n"
            except ERRORS as error:
                yield f"event: failed\ndata: {json.dumps({'error': one_line(error)})}\n\n"

    async def file(self, request: Request) -> Response:
        name = request.url.path
        text = resources.files("llm.page").joinpath(name[1:]).read_bytes()
        return Response(text, media_type=FILES[name])

    async def html(self, request: Request) -> Response:
        return Response(resources.files("llm.page").joinpath("page.html").read_bytes(), media_type="text/html")

    async def plotly(self, request: Request) -> Response:
        return Response(plotly_script().read_bytes(), media_type="text/javascript")


ERRORS = (UserError, Failure, OSError, RuntimeError, MemoryError)  # what a run folder that changes can cause


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]


async def body_of(request: Request) -> bytes:
    """A request's body. Raises UserError where it is too long to be one of the page's."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise UserError(f"the request is longer than {BODY:,} bytes")
    return body


class Seen:
    """What one viewer knows of a run."""

    def __init__(self) -> None:
        self.generation, self.count, self.slow_version, self.appended = -1, 0, -1, 0


def news(number: int, run: Follower, seen: Seen) -> dict[str, Any] | None:
    """What a viewer does not know yet of run `number`; None if that is nothing.

    `all`: the curves anew; `more`: rows to append to them. After `RECENT` appended rows come the curves anew, so that
    a page left open does not grow.
    """
    message: dict[str, Any] = {}
    new = run.count - seen.count
    if run.generation != seen.generation or new + seen.appended > RECENT:
        message["all"] = run.fast()
        seen.appended = 0
    elif new:
        message["more"] = run.newest(new)
        seen.appended += new
    if run.slow_version != seen.slow_version:
        message["slow"] = run.slow()
    seen.generation, seen.count, seen.slow_version = run.generation, run.count, run.slow_version
    return {"run": number, "pace": run.pace(), **message} if message else None


def schedule_answer(given: dict[str, str]) -> dict[str, Any]:
    """The learning rate that flags give: a curve, a small table, the usual warning. Raises UserError."""
    config = from_settings({name: given[name][:40] for name in KNOBS if given.get(name)})
    rows = sorted({0, config.warmup // 2, config.warmup, *(round(i * config.max_steps / 8) for i in range(1, 9))})
    return {
        "curve": schedule_points(config),
        "table": [[step, lr_at(step, config)] for step in rows],
        "warning": warmup_warning(config),
        "flags": flags_of(config),
    }


def flags_of(config: TrainConfig) -> str:
    """The flags of `train` that give this schedule."""
    return (
        f"--warmup_steps {config.warmup} --max_lr {config.max_lr!r} --min_lr {config.final_lr!r} "
        f"--max_steps {config.max_steps} --schedule {config.schedule}"
    )


def plotly_script() -> Any:
    """Plotly's own packaged script. Raises UserError where the package is not installed."""
    try:
        script = resources.files("plotly") / "package_data" / "plotly.min.js"
    except ModuleNotFoundError:
        script = None
    if script is None or not script.is_file():
        raise UserError('the page needs plotly; pip install "losscurve[dashboard]"')
    return script


def app(paths: Sequence[Path], token: str, port: int) -> ASGIApp:
    """The page's application for the run folders `paths`, on 127.0.0.1:`port`."""
    page = Page(paths)
    routes = [
        Route("/", page.html),
        *(Route(name, page.file) for name in FILES),
        Route("/plotly.js", page.plotly),
        Route("/events", page.events),
        Route("/schedule", page.schedule),
        Route("/runs/{run:int}/next", page.next, methods=["POST"]),
        Route("/runs/{run:int}/stream", page.stream, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token, port)
