"""A run in progress: the parts that a step uses, its progress, and the files that it writes."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm.config.counts import flops_per_token
from llm.machine.device import matrix_rate
from llm.record.metrics import Record
from llm.record.samples import Samples
from llm.storage import checkpoint
from llm.training.events import Notice, Step
from llm.training.parts import Parts
from llm.training.saver import Saver
from llm.training.state import Progress


@dataclass(frozen=True)
class Deadline:
    """When a run for a given time has to end."""

    at: float  # as `time.perf_counter` counts
    most_steps: int  # more would gain little
    latest: float = math.inf  # when it ends, as with `max_time`, wherever its schedule is


class LiveRun:
    """A run that is ready for `train`: a new one from `start.new_run`, or one resumed by `start.resume_run`.

    `train` calls `stop` after each step; if it returns true, the run saves and ends. `reason` is None while the run
    trains; afterwards it says why the run ended: "done", "max_time", "patience" or "interrupted". `unsaved` is None if
    the last save succeeded; otherwise it names the step that could not be saved, and the cause.
    """

    def __init__(
        self, parts: Parts, out_dir: Path, progress: Progress, prompt: str, fine_tuning_line: str = ""
    ) -> None:
        self.parts = parts
        self.out_dir = out_dir
        self.progress = progress
        self.prompt = prompt
        self.fine_tuning_line = fine_tuning_line  # of a new run from another program's weights
        self.stop: Callable[[], bool] = lambda: False
        self.deadline: Deadline | None = None  # of a run for a given time
        self.reason: str | None = None
        self.unsaved: str | None = None
        self.failed_saves = 0

        writes = parts.world.leads
        self.record = Record(out_dir, writes)
        self.samples = Samples(out_dir, writes)
        self.saver = Saver()
        self.unread: list[Step] = []  # steps whose losses are still on the device
        self.token_bytes = parts.tokenizer.token_bytes() if parts.tokenizer else None
        self.matrix_rate = parts.world.size * matrix_rate(parts.device, parts.dtype)  # FLOP/s of all devices

        now = time.perf_counter()
        self.saved_at = now
        self.drawn_at = now  # when the picture was drawn
        self.drawing_seconds = 0.0  # what it took
        self.picture_is_old = False  # whether an evaluation came after it
        self._began = now - progress.seconds
        self._complaints: set[str] = set()  # what cannot be written at the moment
        self.restart_pace()

    @property
    def is_new(self) -> bool:
        """Return whether nothing was saved yet. Rank 0 decides for all processes."""
        return bool(self.parts.world.first(lambda: not checkpoint.saved_steps(self.out_dir)))

    @property
    def seconds(self) -> float:
        """Return the seconds since the start of the run, including those before a resume."""
        return time.perf_counter() - self._began

    @property
    def stepping_seconds(self) -> float:
        """Return how many of these seconds were spent on training steps."""
        return self.seconds - self.progress.bookkeeping - self.progress.predicting

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """Count the time of the block as bookkeeping, not as training steps."""
        start = time.perf_counter()
        yield
        self.progress.bookkeeping += time.perf_counter() - start

    def restart_pace(self) -> None:
        """Start to measure the speed for the next training row."""
        self.row_began = (self.stepping_seconds, self.progress.tokens)

    def matmul_utilisation(self, tokens_per_second: float) -> float:
        """Return the fraction of `matrix_rate` that this many tokens per second use."""
        return tokens_per_second * flops_per_token(self.parts.model.config) / self.matrix_rate

    def take(self, step: Step) -> None:
        """Count a finished step."""
        self.progress.step = step.step
        self.progress.tokens += self.parts.config.tokens_per_step
        self.unread.append(step)

    def limit_reached(self) -> str | None:
        """Return "done" or "max_time" if this step is the last one by the settings or the deadline, else None."""
        config, deadline = self.parts.config, self.deadline
        if self.progress.step >= config.max_steps:
            return "done"
        if config.max_time is not None and self.parts.world.any(self.seconds >= config.max_time):
            return "max_time"
        if deadline is not None and time.perf_counter() >= deadline.latest:  # only of a run of one process
            return "max_time"
        return None

    def stop_requested(self) -> str | None:
        """Return "patience" or "interrupted" if the run stops before its limits, else None."""
        interrupted = self.parts.world.any(self.stop())
        patience = self.parts.config.patience
        if patience is not None and self.progress.stale >= patience:
            return "patience"
        return "interrupted" if interrupted else None

    def complain(self, what: str, error: Exception) -> list[Notice]:
        """Return a notice that `what` could not be written; once only, until `settle` resets it."""
        if what in self._complaints:
            return []
        self._complaints.add(what)
        # without its remedy, which is of the command that draws a picture
        reason = getattr(error, "strerror", None) or str(error).partition("; ")[0]
        return [Notice(f"{what} ({reason}); training goes on, and it is tried again later")]

    def settle(self, what: str) -> None:
        """Record that `what` could be written again."""
        self._complaints.discard(what)
