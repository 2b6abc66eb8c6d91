"""`train --time`: choose the run before it starts, say why, and end it in time."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm.commands.flags import request_from
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.config import TrainConfig
    from llm.machine.world import World
    from llm.plan.autopilot import Choice

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
    """Prepare the text, choose the run for `--time`, print why, and return it. Raises UserError."""
    from llm.commands.bars import print_best_effort, progress_bar
    from llm.plan.autopilot import choose_new_run
    from llm.plan.choice_lines import choice_lines

    if world.started:
        raise UserError("--time works with one process; start it without torchrun")
    with progress_bar("tokenizing") as progress:
        choice = choose_new_run(request_from(args, lambda line: None), args.overwrite, say, progress)
    for line in choice_lines(choice):
        print_best_effort(line)
    return choice
