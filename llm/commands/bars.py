"""Lines on stdout, and progress bars on stderr. A bar needs a terminal; CI and NO_COLOR turn it off."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from llm.commands import streams
from llm.commands.flags import warn


def shows_bars() -> bool:
    """Return whether a progress bar on stderr would be seen."""
    return sys.stderr.isatty() and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


def print_result(line: str) -> None:
    """Print a line of the command's result on stdout. Raises OSError if stdout cannot be written."""
    print(line, flush=True)


def print_best_effort(line: str) -> None:
    """Print a line about a run on stdout. If stdout cannot be written, warn once: the run must still save its files."""
    try:
        print_result(line)
    except OSError as error:
        streams.discard_stdout()
        if not isinstance(error, BrokenPipeError):  # a closed pipe means that the reader has seen enough
            warn(f"cannot write to standard output ({streams.describe(error)}); the run continues and saves its files")


@contextmanager
def progress_bar(words: str, patience: float = 0.0) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function `(done, total)` that shows the progress of what `words` name; None if nobody would see the bar.

    The bar appears with the first call after `patience` seconds.
    """
    if not shows_bars():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), "{task.percentage:3.0f}%", TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(words, total=None)
    begin = time.monotonic() + patience

    def show(done: int, total: int) -> None:
        if time.monotonic() >= begin:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


class StepBar:
    """A progress bar of a run on stderr: completed steps, tokens per second and time left.

    `print`, `warn` and `note` print a line above the bar. Without a terminal there is no bar, only the lines.
    """

    def __init__(self, total: int, done: int, tokens_per_step: int) -> None:
        self.bar: Any = None
        self.tokens_per_step = tokens_per_step
        if shows_bars():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
            self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def print(self, line: str) -> None:
        """Print a result on stdout."""
        if self.bar and sys.stdout.isatty():  # bar and stdout are on one terminal
            self._print_above(line)
        else:
            print_best_effort(line)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._print_on_stderr(f"warning: {text}")

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        self._print_on_stderr(f"note: {text}")

    def _print_on_stderr(self, line: str) -> None:
        if self.bar:
            self._print_above(line)
        else:
            print(line, file=sys.stderr)

    def _print_above(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, total: int) -> None:
        """Move the bar to `step` completed steps of `total`, which a run for a given time may change."""
        if self.bar:
            tokens_per_second = (self.bar.tasks[0].speed or 0) * self.tokens_per_step  # over the last half minute
            self.bar.update(self.task, completed=step, total=total, description=f"{tokens_per_second:,.0f} tokens/s")
