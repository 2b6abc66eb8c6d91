"""The live page's server: its addresses, for the run folders and tries it was started with.

A request names a run by its number, so no path comes from a request. `guard` decides which requests are answered.
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
from llm.page.comparison import FollowedTry, comparison_of, runs_of
from llm.page.follow import Follower
from llm.page.guard import Guard
from llm.page.messages import Viewer, names_of, schedule_points
from llm.page.playground import Playground, Question, parse_question
from llm.schedule import decay_start, lr_at, warmup_warning

UPDATE_EVERY = 1.0  # seconds
KEEP_ALIVE = 15  # updates without news after which a comment is sent
BODY = 2**18  # bytes of a request, at most
KNOBS = ("warmup_steps", "max_lr", "min_lr", "max_steps", "schedule", "decay_fraction")
SCRIPTS = ("page.js", "words.js", "runs.js", "charts.js", "slider.js", "playground.js")
ERRORS = (UserError, Failure, OSError, RuntimeError, MemoryError)  # what a changing run folder can cause


class Page:
    """The runs that the server follows, those of the tries among `paths` too, and the answers of its addresses."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tries = [FollowedTry(folder) for folder in paths if folder not in runs_of(folder)]
        self.runs: list[Follower] = []
        self._follow(paths)
        self.ended = asyncio.Event()  # set when the server is about to stop
        self._playground = Playground()
        self._playing = asyncio.Lock()  # one request of the playground at a time
        self._updating = asyncio.Lock()
        self._drawing = asyncio.Lock()
        self._updated_at = -UPDATE_EVERY

    def _follow(self, paths: Sequence[Path]) -> None:
        """Follow the runs of `paths` that are not followed yet: a search adds settings to its try while it goes on."""
        known = [run.path for run in self.runs]
        every = list(dict.fromkeys([*known, *(run for path in paths for run in runs_of(path))]))
        if len(every) == len(known):
            return
        names = names_of(every)
        for run, name in zip(self.runs, names, strict=False):
            run.rename(name)
        new = list(zip(every, names, strict=True))[len(known) :]
        self.runs += [Follower(path, name) for path, name in new]

    def app(self) -> Starlette:
        routes = [
            Route("/", self.file("page.html", "text/html")),
            Route("/page.css", self.file("page.css", "text/css")),
            *(Route(f"/{name}", self.file(name, "text/javascript")) for name in SCRIPTS),
            Route("/plotly.js", self.plotly),
            Route("/events", self.events),
            Route("/schedule", self.schedule),
            Route("/comparison", self.comparison),
            Route("/tries", self.try_answers),
            Route("/runs/{run:int}/samples/{step:int}", self.sample),
            Route("/runs/{run:int}/next", self.next, methods=["POST"]),
            Route("/runs/{run:int}/stream", self.stream, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    @staticmethod
    def file(name: str, kind: str) -> Any:
        """Return an endpoint that serves a file of this package."""

        def answer(request: Request) -> Response:
            return Response(resources.files("llm.page").joinpath(name).read_bytes(), media_type=kind)

        return answer

    def plotly(self, request: Request) -> Response:
        return Response(plotly_script().read_bytes(), media_type="text/javascript")

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.changes(), media_type="text/event-stream")

    async def changes(self) -> AsyncIterator[str]:
        """Yield server-sent events: everything about each run, then once a second what is new, and at last the end."""
        viewers: list[Viewer] = []
        yield f"retry: 1000\nevent: hello\ndata: {json.dumps({'runs': len(self.runs)})}\n\n"
        quiet = 0  # updates without news
        while True:
            last = self.ended.is_set()
            await self.update()
            quiet += 1
            runs = list(self.runs)
            viewers += [Viewer() for _ in runs[len(viewers) :]]
            for number, (run, viewer) in enumerate(zip(runs, viewers, strict=True)):
                if message := viewer.news(run):
                    quiet = 0
                    yield f"event: run\ndata: {json.dumps({'run': number} | message, allow_nan=False)}\n\n"
            if last:
                yield "event: ended\ndata: {}\n\n"
                return
            if quiet >= KEEP_ALIVE:  # so that each side notices if the other is gone
                quiet = 0
                yield ": here\n\n"
            behind = any(run.is_behind for run in self.runs)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), 0.01 if behind else UPDATE_EVERY)

    async def update(self) -> None:
        """Read what is new in every folder, at most once a second, in a thread, because there may be much to read."""
        async with self._updating:
            is_fresh = time.monotonic() - self._updated_at < 0.9 * UPDATE_EVERY
            if is_fresh and not self.ended.is_set() and not any(run.is_behind for run in self.runs):
                return
            with suppress(UserError):  # try.json is damaged: the table of the try says so
                await run_in_threadpool(self._follow, [followed.folder for followed in self.tries])
            for run in list(self.runs):
                await run_in_threadpool(run.update)
            self._updated_at = time.monotonic()

    def schedule(self, request: Request) -> Response:
        try:
            return JSONResponse(schedule_answer(dict(request.query_params)))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    async def comparison(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(comparison_of, [run.path for run in self.runs]))

    async def try_answers(self, request: Request) -> Response:
        async with self._drawing:  # of all pages: one draws, the others get the same
            return JSONResponse(await run_in_threadpool(lambda: [followed.answer() for followed in self.tries]))

    def sample(self, request: Request) -> Response:
        run = request.path_params["run"]
        step = request.path_params["step"]
        text = self.runs[run].sample(step) if run < len(self.runs) else None
        if text is None:
            return JSONResponse({"error": "this sample no longer exists"}, 404)
        return JSONResponse({"text": text})

    async def next(self, request: Request) -> Response:
        return await self._answer(request, stream=False)

    async def stream(self, request: Request) -> Response:
        return await self._answer(request, stream=True)

    async def _answer(self, request: Request, stream: bool) -> Response:
        """Return the playground's answer, or an error message of one line."""
        try:
            run = self.runs[request.path_params["run"]]
            body = await read_body(request)
            asked = await run_in_threadpool(parse_question, body)  # the first call loads torch
            if stream:
                return StreamingResponse(self._tokens(run, asked), media_type="text/event-stream")
            async with self._playing:
                return JSONResponse(await run_in_threadpool(self._playground.next, run.path, asked))
        except IndexError:
            return JSONResponse({"error": "no such run"}, 404)
        except ERRORS as error:
            return JSONResponse({"error": first_line(error)}, 400)

    async def _tokens(self, run: Follower, asked: Question) -> AsyncIterator[str]:
        """Yield server-sent events, one for each token."""
        async with self._playing:
            try:
                tokens = self._playground.stream(run.path, asked)
                while (token := await run_in_threadpool(next, tokens, None)) is not None:
                    yield f"data: {json.dumps(token)}\n\n"
                yield "event: done\ndata: {}\n\n"
            except ERRORS as error:
                yield f"event: failed\ndata: {json.dumps({'error': first_line(error)})}\n\n"


class Server(uvicorn.Server):
    """Serve the page of runs, tries and models on 127.0.0.1:`port`, and notify open pages when the server stops."""

    def __init__(self, paths: Sequence[Path], token: str, port: int) -> None:
        self.page = Page(paths)
        super().__init__(
            uvicorn.Config(
                Guard(self.page.app(), token, port),
                log_level="critical",  # no messages about interrupted streams
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


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        UserError: it is longer than BODY.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise UserError(f"the request is longer than {BODY:,} bytes")
    return body


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 500 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:500]


def schedule_answer(given: dict[str, str]) -> dict[str, Any]:
    """Return the learning-rate schedule of these flags: a curve, a small table, the warning about the warm-up.

    Raises:
        UserError: a setting is out of its range; the message names it.
    """
    config = from_settings({name: given[name][:40] for name in KNOBS if given.get(name)})
    eighths = (round(i * config.max_steps / 8) for i in range(1, 9))
    rows = sorted({0, config.warmup // 2, config.warmup, decay_start(config), *eighths})
    return {
        "curve": schedule_points(config),
        "table": [[step, lr_at(step, config)] for step in rows],
        "warning": warmup_warning(config),
        "flags": flags_of(config),
    }


def flags_of(config: TrainConfig) -> str:
    """Return the flags of `train` for this schedule."""
    cooldown = f" --decay_fraction {config.cooldown!r}" if config.schedule == "wsd" else ""
    return (
        f"--warmup_steps {config.warmup} --max_lr {config.max_lr!r} --min_lr {config.final_lr!r} "
        f"--max_steps {config.max_steps} --schedule {config.schedule}{cooldown}"
    )


def plotly_script() -> Any:
    """Return the script in plotly's package.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        script = resources.files("plotly") / "package_data" / "plotly.min.js"
    except ModuleNotFoundError:
        script = None
    if script is None or not script.is_file():
        raise UserError('the page needs plotly; pip install "losscurve[dashboard]"')
    return script
