"""Train the runs of a try up to a part of their steps, one after the other or several at once."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import Failure
from llm.experiments.progress import read_run, step_at
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage import checkpoint
from llm.train import train
from llm.training.live import Deadline

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """Train a run up to `share` of its steps. It is resumed if it has a saved state, else it starts."""

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
        """Whether the run is there already, with a state saved at the end of its share or later."""
        steps = checkpoint.saved_steps(self.run_dir)
        run = read_run(self.run_dir)
        return bool(steps and run and (steps[-1] >= step_at(run.config, self.share) or run.is_complete))


def train_job(job: Job, stop: Stop) -> str:
    """Train the run of a job, and save it. Return "", or why it cannot go on. Raises UserError for a bad request."""
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
        if run.unsaved:
            return f"the last save failed: {run.unsaved}"
    except Failure as error:
        return str(error)
    return ""


def train_jobs(jobs: Sequence[Job], processes: int, stop: Stop) -> Iterator[tuple[Job, str]]:
    """Train the runs of all jobs; yield each that ended, with "" or the reason why it cannot go on.

    If `stop` returns true, the runs in progress save and end, and no more begin. With several processes, each has a
    part of the cores. Raises UserError for a bad request, Failure if the system killed a process.
    """
    if processes == 1:
        for job in jobs:
            if stop():
                return
            yield job, train_job(job, stop)
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)  # closing it tells the processes to stop, and so does our death
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(reader,)) as pool, writer:
        with _signals_held():
            waiting = {pool.submit(_work, job): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            if stop() and not writer.closed:
                writer.close()
                waiting = {future: job for future, job in waiting.items() if not future.cancel()}
            for future in ended & waiting.keys():
                yield waiting.pop(future), _result(future)


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


def _result(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        raise Failure(
            "a process of the try was killed, perhaps for its memory; the same command goes on, with fewer --jobs"
        ) from None


# ---- in the other processes

_stopping = threading.Event()
_working = threading.Lock()


def _begin(reader: Connection) -> None:
    threading.Thread(target=_wait_for_end, args=(reader,), daemon=True).start()


def _wait_for_end(reader: Connection) -> None:
    """Stop the job when the first process says so or dies; end this process if it died, after the job has saved."""
    with contextlib.suppress(EOFError, OSError):
        reader.recv_bytes()
    _stopping.set()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with _working:
        os._exit(1)


def _work(job: Job) -> str:
    with _working:
        return "" if _stopping.is_set() else train_job(job, _stopping.is_set)
