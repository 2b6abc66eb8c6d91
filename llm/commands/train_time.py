"""`train --time`: choose the run before it starts, say why, and end it in time."""

import argparse
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llm.commands.flags import request_from
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.config import TrainConfig
    from llm.machine.world import World
    from llm.plan.autopilot import Choice, TimedRun

Say = Callable[[str], None]


def read_time_config(args: argparse.Namespace, say: Say) -> "TrainConfig":
    """Return the provisional config of a run for `--time`. Raises UserError for flags that cannot be combined."""
    if args.resume:
        raise UserError("--time is for a new run; to continue one, leave it out, or give --resume with --max_steps")
    if args.nproc is not None:
        raise UserError(
            "--time works with one process; leave --nproc out, or write the run with: losscurve plan --time TIME --out "
            "FILE.toml"
        )
    return request_from(args, say).config


def choose(args: argparse.Namespace, world: "World", say: Say) -> "Choice":
    """Prepare the text, choose the run for `--time`, print why unless it gets teachers first, and return it.

    Raises UserError.
    """
    from llm.commands.bars import print_best_effort, progress_bar
    from llm.plan.autopilot import choose_new_run
    from llm.plan.choice_lines import choice_lines

    if world.started:
        raise UserError("--time works with one process; start it without torchrun")
    with progress_bar("tokenizing") as progress:
        choice = choose_new_run(request_from(args, lambda line: None), args.overwrite, say, progress)
    for line in () if choice.calls_for_teachers else choice_lines(choice):
        print_best_effort(line)
    return choice


def train_all(words: list[str], choice: "Choice", began: float, train: Callable[[list[str], int], int]) -> int:
    """Train the teachers for a part of the time, then the run that learns from them too; return the exit code.

    `words` are the flags of the command. `train` is what runs such flags; its second argument is the number of bytes
    that this process has kept from before. If a teacher is interrupted, the commands that go on are printed. `began`:
    when the command started, as `time.perf_counter` counts.
    """
    from llm.commands.bars import print_best_effort
    from llm.plan.arithmetic import MEASURED_SHAPE_BYTES

    *teachers, last = choice.timed_runs(overwrite="--overwrite" in words)
    print_best_effort(choice.teacher_words(teachers))
    replaced = tuple(f"--{name}=" for name in ("time", *last.settings))
    words = [word for word in words if not word.startswith(replaced)]

    def command(run: "TimedRun", seconds: float) -> list[str]:
        return [f"--time={max(1.0, seconds):.0f}", *flags_of(run.settings), *words]

    def print_rest(first: str, runs: "Sequence[TimedRun]") -> None:
        lines = " && ".join(shlex.join(["losscurve", "train", *command(run, run.seconds)]) for run in runs)
        print_best_effort(f"{first}: {lines}")

    kept = choice.kept_bytes
    for number, run in enumerate(teachers):
        try:
            code = train(command(run, run.seconds), kept)
        except KeyboardInterrupt:  # it has not begun: it is chosen and measured
            print_rest("train it and the run with", [*teachers[number:], last])
            raise
        kept += MEASURED_SHAPE_BYTES
        if code:  # the interrupted teacher has the rest of its time still
            print_rest("after that, train the run with", [*teachers[number + 1 :], last])
            return code
        print_best_effort("")
    taught = command(last, choice.seconds - (time.perf_counter() - began))
    try:
        return train(taught, kept)
    except KeyboardInterrupt:  # the run has not begun: while the teachers predict, nothing can be saved
        line = shlex.join(["losscurve", "train", *taught])
        print_best_effort(f"the teachers are trained; train the run with: {line}")
        raise


def flags_of(settings: dict[str, Any]) -> Iterator[str]:
    """Yield the flags of settings, one for each value of a list."""
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            yield f"--{name}={one}"
