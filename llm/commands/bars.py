"""Progress on stderr, for a person who watches: nothing where there is no terminal, or CI or NO_COLOR is set."""

import os
import sys
import time
from types import TracebackType
from typing import Any, Self


def watched() -> bool:
    """Whether somebody sees stderr move."""
    return sys.stderr.isatty() and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


class StepBar:
    """Steps done, tokens per second and time left, below the lines that `print` writes to stdout."""

    def __init__(self, total: int, done: int, tokens_per_step: int) -> None:
        self.bar: Any = None
        self.tokens_per_step, self.shown, self.first = tokens_per_step, done, done
        self.began = time.perf_counter()
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
            print(line, flush=True)

    def advance(self, step: int) -> None:
        """Show `step` completed steps."""
        if self.bar:
            speed = (step - self.first) * self.tokens_per_step / (time.perf_counter() - self.began)
            self.bar.update(self.task, completed=step, description=f"{speed:,.0f} tokens/s")
