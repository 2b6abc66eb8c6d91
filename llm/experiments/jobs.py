"""Train the runs of a try up to a part of their steps, one after the other or several at once, in other processes."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from llm.config import TrainConfig
from llm.errors import Failure, UserError
from llm.experiments.outcome import read_run, step_at
from llm.machine.processors import cores
from llm.plan.proposal import Measure, short_probe
from llm.plan.timing import Pace
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage import checkpoint
from llm.train import train
from llm.training.live import Deadline

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """Train a run up to `share` of its steps. It is resumed if it has a checkpoint, else it starts."""

    config: TrainConfig
    given: frozenset[str]  # names of the settings that the user gave
    share: float  # 1: to its end
    seconds: float | None = None  # the time of the whole run, to which its steps are fitted
    most_steps: int = 10**9  # then

    @property
    def run_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def is_done(self) -> bool:
        """Whether the run is there already, with a checkpoint at the end of its share or later."""
        steps = checkpoint.saved_steps(self.run_dir)
        run = read_run(self.run_dir)
        return bool(steps and run and (steps[-1] >= step_at(run.config, self.share) or run.is_complete))


def train_job(job: Job, stop: Stop) -> str:
    """Train the run of a job, and save it. Return "", or why it cannot go on.

    Raises UserError for a bad request, Failure if the run could not be saved, which ends the try: the disk is full.
    """
    if checkpoint.saved_steps(job.run_dir):
        opened = resume_run(job.run_dir, {})
    else:
        opened = new_run(job.config, overwrite=True, given=job.given)  # what is there was not saved yet
    try:
        with opened as run:
            run.stop = lambda: stop() or run.progress.step >= step_at(run.parts.config, job.share)
            if job.seconds is not None:
                run.deadline = Deadline(time.perf_counter() + job.seconds - run.seconds, job.most_steps)
            for _ in train(run):
                pass
    except Failure as error:
        return str(error)
    if run.unsaved:
        raise Failure(
            f"{job.run_dir}: the last save failed: {run.unsaved}; free some disk space, and the same command goes on"
        )
    return ""


def train_jobs(
    jobs: Sequence[Job], processes: int, stop: Stop, is_unwanted: Callable[[Job], bool]
) -> Iterator[tuple[Job, str]]:
    """Train the runs of all jobs; yield each that ended, with "" or the reason why it cannot go on.

    If `stop` returns true, the runs in progress save and end, and no more begin. A run does not begin if `is_unwanted`
    says so when its turn comes. With several processes, each has a part of the cores.

    Raises UserError for a bad request, Failure if the system killed a process.
    """
    if processes == 1:
        for job in jobs:
            if stop():
                return
            if not is_unwanted(job):
                yield job, train_job(job, stop)
        return
    waiting = list(reversed(jobs))
    if not waiting:
        return
    with other_processes(min(processes, len(jobs)), of=processes) as idle:
        busy: dict[Connection, Job] = {}
        has_told = False
        while busy or (waiting and not stop()):
            waiting = [job for job in waiting if not is_unwanted(job)]
            while idle and waiting and not stop():
                connection = idle.pop()
                busy[connection] = waiting.pop()
                ask(connection, (train_job, busy[connection]))
            if stop() and not has_told:
                has_told = True
                for connection in busy:
                    ask(connection, None)
            ready = wait(list(busy), timeout=0.2)
            for connection in [connection for connection in busy if connection in ready]:
                yield busy.pop(connection), answer(connection)
                idle.append(connection)


@contextlib.contextmanager
def slowest_pace(processes: int) -> Iterator[Measure]:
    """Yield a measurement of a config's pace while so many processes train it at once: that of the slowest of them."""
    with other_processes(processes, of=processes) as others:

        def measure(config: TrainConfig, seconds: float) -> Pace:
            for connection in others:
                ask(connection, (_pace, (config, seconds)))
            paces: list[Pace] = [answer(connection) for connection in others]
            return dataclasses.replace(max(paces, key=lambda pace: pace.step), others=0.0)  # they are each other's work

        yield measure


def _pace(asked: tuple[TrainConfig, float], stop: Stop) -> Pace:
    return short_probe(*asked)


@contextlib.contextmanager
def other_processes(count: int, of: int) -> Iterator[list[Connection]]:
    """Start `count` processes, each with the cores of one of `of`, and yield a connection to each.

    A process takes (function, argument) from its connection and answers with the result. It ends with the block, and
    also when this process dies: then its connection closes, and it saves the run that it trains.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(cores(share_of=of)))
    if sys.platform == "linux":  # each is forked from a process that has loaded PyTorch and computed nothing
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:  # Metal does not survive a fork
        context = multiprocessing.get_context("spawn")
    connections, started = [], []
    try:
        with _signals_held():
            for _ in range(count):
                ours, theirs = context.Pipe()
                connections.append(ours)
                process = context.Process(target=_serve, args=(theirs,))
                process.start()
                started.append(process)
                theirs.close()
        for connection in connections:
            answer(connection)  # it has loaded what it needs
        yield list(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in started:
            process.join()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back Ctrl-C and the like during the block. Processes that begin in it never get them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ask(connection: Connection, task: Any) -> None:
    """Send a task, (function, argument), or None to end; if the process was killed, `answer` says so."""
    with contextlib.suppress(OSError):
        connection.send(task)


def answer(connection: Connection) -> Any:
    """Return the answer of another process. Raises what it raised, or Failure if it was killed."""
    try:
        found, error = connection.recv()
    except (EOFError, OSError):
        raise Failure(
            "a process of the try was killed, perhaps for its memory; the same command goes on, with fewer --jobs"
        ) from None
    if error is not None:
        raise error
    return found


# ---- in the other processes


def _serve(connection: Connection) -> None:
    """Do what comes through the connection, one after the other, until it says None or closes.

    While a task is in progress, nothing else can come: then the run that it trains saves and ends.
    """
    reply: tuple[Any, Exception | None] = (None, None)  # it has loaded what it needs
    while True:
        try:
            connection.send(reply)
            task = connection.recv()
        except (EOFError, OSError):  # the first process died
            return
        if task is None:
            return
        function, argument = task
        try:
            reply = function(argument, lambda: bool(wait([connection], timeout=0))), None
        except (UserError, Failure, OSError) as error:
            reply = None, error
