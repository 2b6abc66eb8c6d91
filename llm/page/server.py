"""The live page's server: what its addresses answer, of the run folders it was started with.

A run is asked for by its number; no path comes from a request. Who may ask at all: see `guard`.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm.config import TrainConfig, from_settings
from llm.errors import Failure, UserError
from llm.page.follow import Follower
from llm.page.guard import Guard
from llm.page.playground import Playground, Question, question
from llm.page.shown import Viewer, names_of, schedule_points
from llm.schedule import lr_at, warmup_warning

LOOK_EVERY = 1.0  # seconds
BODY = 2**18  # bytes of a request, at most
KNOBS = ("warmup_steps", "max_lr", "min_lr", "max_steps", "schedule")
SCRIPTS = ("page.js", "words.js", "runs.js", "charts.js", "slider.js", "playground.js")
ERRORS = (UserError, Failure, OSError, RuntimeError, MemoryError)  # what a run folder that changes can cause


class Page:
    """The run folders that are followed, and what the page's addresses answer."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.runs = [Follower(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
        self.ended = asyncio.Event()  # set where the server is about to end
        self._playground = Playground()
        self._playing, self._looking = asyncio.Lock(), asyncio.Lock()
        self._looked_at = -LOOK_EVERY

    def app(self) -> Starlette:
        routes = [
            Route("/", self.file("page.html", "text/html")),
            Route("/page.css", self.file("page.css", "text/css")),
            *(Route(f"/{name}", self.file(name, "text/javascript")) for name in SCRIPTS),
            Route("/plotly.js", self.plotly),
            Route("/events", self.events),
            Route("/schedule", self.schedule),
            Route("/runs/{run:int}/samples/{step:int}", self.sample),
            Route("/runs/{run:int}/next", self.next, methods=["POST"]),
            Route("/runs/{run:int}/stream", self.stream, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    @staticmethod
    def file(name: str, kind: str) -> Any:
        """What answers with a file of this package."""

        def answer(request: Request) -> Response:
            return Response(resources.files("llm.page").joinpath(name).read_bytes(), media_type=kind)

        return answer

    def plotly(self, request: Request) -> Response:
        return Response(plotly_script().read_bytes(), media_type="text/javascript")

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.changes(), media_type="text/event-stream")

    async def changes(self) -> AsyncIterator[str]:
        """Server-sent events: of each run all there is, then what is new, once a second; at last that it ends."""
        viewers = [Viewer() for _ in self.runs]
        yield f"retry: 1000\nevent: hello\ndata: {json.dumps({'runs': len(self.runs)})}\n\n"
        quiet = 0
        while True:
            last = self.ended.is_set()
            await self.look()
            quiet += 1
            for number, (run, viewer) in enumerate(zip(self.runs, viewers, strict=True)):
                if message := viewer.news(run):
                    quiet = 0
                    yield f"event: run\ndata: {json.dumps({'run': number} | message, allow_nan=False)}\n\n"
            if last:
                yield "event: ended\ndata: {}\n\n"
                return
            if quiet >= 15:  # so that either side notices when the other is gone
                quiet = 0
                yield ": here\n\n"
            behind = any(run.behind for run in self.runs)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), 0.01 if behind else LOOK_EVERY)

    async def look(self) -> None:
        """Read what is new in every folder, at most once a second; in a thread, since there may be much."""
        async with self._looking:
            fresh = time.monotonic() - self._looked_at < 0.9 * LOOK_EVERY
            if fresh and not self.ended.is_set() and not any(run.behind for run in self.runs):
                return
            for run in self.runs:
                await run_in_threadpool(run.look)
            self._looked_at = time.monotonic()

    def schedule(self, request: Request) -> Response:
        try:
            return JSONResponse(schedule_answer(dict(request.query_params)))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    def sample(self, request: Request) -> Response:
        run, step = request.path_params["run"], request.path_params["step"]
        text = self.runs[run].sample(step) if run < len(self.runs) else None
        if text is None:
            return JSONResponse({"error": "no such sample any more"}, 404)
        return JSONResponse({"text": text})

    async def next(self, request: Request) -> Response:
        return await self.answered(request, stream=False)

    async def stream(self, request: Request) -> Response:
        return await self.answered(request, stream=True)

    async def answered(self, request: Request, stream: bool) -> Response:
        """The playground's answer, or the one line that says why there is none."""
        try:
            run, body = self.runs[request.path_params["run"]], await body_of(request)
            asked = await run_in_threadpool(question, body)  # the first loads torch
            if stream:
                return StreamingResponse(self.tokens(run, asked), media_type="text/event-stream")
            async with self._playing:
                return JSONResponse(await run_in_threadpool(self._playground.next, run.path, asked))
        except IndexError:
            return JSONResponse({"error": "no such run"}, 404)
        except ERRORS as error:
            return JSONResponse({"error": one_line(error)}, 400)

    async def tokens(self, run: Follower, asked: Question) -> AsyncIterator[str]:
        """Server-sent events, one for each token."""
        async with self._playing:
            try:
                tokens = self._playground.stream(run.path, asked)
                while (token := await run_in_threadpool(next, tokens, None)) is not None:
                    yield f"data: {json.dumps(token)}\n\n"
                yield "event: done\ndata: {}\n\n"
            except ERRORS as error:
                yield f"event: failed\ndata: {json.dumps({'error': one_line(error)})}\n\n"


class Server(uvicorn.Server):
    """Serves the page of run folders on 127.0.0.1:`port`; pages that are open are told when it ends."""

    def __init__(self, paths: Sequence[Path], token: str, port: int) -> None:
        self.page = Page(paths)
        super().__init__(
            uvicorn.Config(
                Guard(self.page.app(), token, port),
                log_level="critical",  # streams that are cut off are no news
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=3,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.page.ended.set()
        await super().shutdown(sockets)


async def body_of(request: Request) -> bytes:
    """A request's body. Raises UserError where it is too long to be one of the page's."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise UserError(f"the request is longer than {BODY:,} bytes")
    return body


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]


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
