"""Progress on stderr, for a person who watches: nothing where there is no terminal, or CI or NO_COLOR is set."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from llm.commands import streams
from llm.commands.flags import warn


def watched() -> bool:
    """Whether somebody sees stderr move."""
    return sys.stderr.isatty() and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


def tell(line: str) -> None:
    """A line on stdout, which is what the command is for. Raises OSError where it cannot be written."""
    print(line, flush=True)


def log(line: str) -> None:
    """A line on stdout about a run. That it cannot be written is no reason to end the run, which saves its files."""
    try:
        tell(line)
    except OSError as error:
        streams.drop()
        if not isinstance(error, BrokenPipeError):  # whoever read it has seen enough
            warn(f"standard output cannot be written ({streams.reason(error)}); the run goes on and saves its files")


@contextmanager
def tokenizing() -> Iterator[Callable[[int, int], None] | None]:
    """A bar for `prepare`, from its first word of progress on; None where nobody watches."""
    if not watched():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(), "{task.percentage:3.0f}%", TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


class StepBar:
    """Steps done, tokens per second and time left, below the lines that `print` writes to stdout."""

    def __init__(self, total: int, done: int, tokens_per_step: int) -> None:
        self.bar: Any = None
        self.tokens_per_step = tokens_per_step
        if watched():
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
        """A result: on stdout, above the bar where both are one terminal."""
        if self.bar and sys.stdout.isatty():
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            log(line)

    def warn(self, text: str) -> None:
        """A warning on stderr, above the bar."""
        self._aside(f"warning: {text}")

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr, above the bar."""
        self._aside(f"note: {text}")

    def _aside(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr)

    def advance(self, step: int) -> None:
        """Show `step` completed steps."""
        if self.bar:
            speed = (self.bar.tasks[0].speed or 0) * self.tokens_per_step  # of the last half minute
            self.bar.update(self.task, completed=step, description=f"{speed:,.0f} tokens/s")
