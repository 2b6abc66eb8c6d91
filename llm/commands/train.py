"""`train`: read the flags, train, and print the chapter's lines. `train_lines.py` has the lines before and after."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, config_from, given_settings, note, typed_settings, warn
from llm.commands.train_time import choose, read_time_config, train_all
from llm.config import FIELDS, PRESETS, TrainConfig, from_settings, resolve_settings
from llm.errors import Failure, UserError
from llm.machine.interpreter import child_environment
from llm.machine.processors import cores

if TYPE_CHECKING:
    from pathlib import Path

    from llm.commands.bars import StepBar
    from llm.machine.world import World
    from llm.plan.autopilot import Choice
    from llm.plan.forecast import Forecast
    from llm.plan.prediction.loss import Prediction
    from llm.record.explain import News
    from llm.record.tracker import Start
    from llm.training.live import Deadline, LiveRun

DESCRIPTION = "Train a small GPT from scratch. With no flags: the chapter's recipe on tiny Shakespeare."


def main(argv: list[str]) -> int:
    began = time.perf_counter()
    if "RANK" not in os.environ:  # not started by torchrun
        args = parse_flags(argv)
        read_config(args)  # report a mistake now, before torch is loaded or torchrun starts many processes
        if args.nproc is not None:
            return exec_torchrun(args.nproc, args.words)
    from llm.machine.rendezvous import init_distributed

    with init_distributed() as world:
        return run_process(argv, world, began)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError."""
    parser = Parser("losscurve train", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument(
        "--time", metavar="TIME", help="choose the run for this time (90, 10m, 2h), around the given settings"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out_dir from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out_dir")
    add_run_flags(parser)
    return parser.read(argv)


def add_run_flags(parser: Parser) -> None:
    """Add the flags that are no settings of a run, but say what goes on beside it."""
    parser.add_argument(
        "--explain", action="store_true", help="print on stderr what the record shows, while the run trains"
    )
    parser.add_argument("--watch", action="store_true", help="serve the page of losscurve watch until the run ends")
    parser.add_argument(
        "--track", action="append", default=[], metavar="tensorboard|wandb", help="show the run there too"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine, started by torchrun; see docs/scale.md"
    )


def read_config(args: argparse.Namespace, say: Callable[[str], None] = lambda line: None) -> TrainConfig:
    """Return the config that the flags give. `say` gets the notices about the preset. Raises UserError."""
    if args.resume and (args.preset or args.overwrite):
        raise UserError("--resume uses the settings of the run itself; leave out --preset and --overwrite")
    if args.time is not None:
        return read_time_config(args, say)
    if args.resume:  # the other settings are those of the run, and what is typed is checked with them
        typed = resolve_settings(typed_settings(args))
        for word in typed.get("text", ()):
            if os.path.isfile(os.path.join(word, "config.toml")):
                raise UserError(f"text = {word}: is a run; to continue it: --resume --out_dir {shlex.quote(word)}")
        return from_settings({name: value for name, value in typed.items() if name == "out_dir"})
    return config_from(args, say)


def exec_torchrun(nproc: int, words: list[str]) -> int:
    """Replace this process by torchrun, which starts `nproc` processes of this command.

    `words` are its flags, as `Parser.read` returns them. Raises UserError.
    """
    if not 1 <= nproc <= 1024:
        raise UserError(f"nproc = {nproc}: expected a number of processes from 1 to 1024")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores(share_of=nproc)))
    # the address: torchrun would connect to this machine's own name, which not every network knows
    here = ("--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={nproc}")
    torchrun = ("-m", "llm.commands.launch", *here, "-m", "llm", "train")
    flags = [word for word in words if not word.startswith("--nproc=")]  # torchrun would take --nproc as its own
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *torchrun, *flags], child_environment())


def run_process(argv: list[str], world: "World", began: float, kept_bytes: int = 0) -> int:
    """Train in this process, one of the run's, and return its exit code. Only rank 0 prints and writes files.

    `began`: when the command started, as `time.perf_counter` counts; --time counts from there. `kept_bytes`: of memory,
    from runs before this one in the same process.
    """
    from pathlib import Path

    from llm.commands.look.watch import beside
    from llm.commands.train_lines import print_end, print_start
    from llm.plan.forecast import Forecast
    from llm.record.trackers import starts
    from llm.run import interrupts
    from llm.start.run_folder import once
    from llm.train import train

    with world.together():
        say = note if world.leads else lambda line: None
        choice: Choice | None = None
        deadline: Deadline | None = None
        predicted: Prediction | str = ""
        args = parse_flags(argv)
        config = read_config(args, say)
        if world.started and args.nproc is not None:
            raise UserError(f"nproc = {args.nproc}: torchrun has already started the processes; leave --nproc out")
        trackers = starts(args.track, warn) if world.leads else {}
        if args.time is not None:
            say = once(say)
            choice = choose(args, world, say)
            config = choice.proposal.config
            deadline = choice.deadline(began)
            predicted = choice.predicted

    if choice and choice.calls_for_teachers:

        def train_part(words: list[str], more_bytes: int) -> int:
            return run_process(words, world, time.perf_counter(), kept_bytes + more_bytes)

        return train_all(args.words, choice, began, train_part)
    if choice:
        kept_bytes += choice.kept_bytes

    # torchrun --max-restarts restarted the processes: resume this job's run, however its first start began
    out_dir = Path(config.out_dir)
    left = world.first(lambda: steps_left(out_dir)) if world.restarted else None
    if left == 0:
        say(f"{out_dir}: the run was complete before torchrun restarted it")
        return 0

    with contextlib.ExitStack() as stack:
        print_address = stack.enter_context(beside(out_dir)) if args.watch and world.leads else None
        run = open_run(stack, args, config, world, resumes=args.resume or left is not None, say=say)
        caught = stack.enter_context(interrupts())
        run.stop = lambda: bool(caught)
        run.deadline = deadline
        if not world.leads:
            for _ in train(run):
                pass
            check_saved(run)
            return exit_code(run, caught)

        print_start(run, kept_bytes, was_chosen=args.time is not None)
        if print_address:
            print_address()
        forecast = Forecast(run.parts.config, kept_bytes)
        train_with_output(run, forecast, trackers, explains=args.explain)
    check_saved(run)
    print_end(run, forecast, predicted)
    return exit_code(run, caught)


def steps_left(out_dir: "Path") -> int | None:
    """Return the number of steps left after the newest checkpoint in `out_dir`; None if there is no checkpoint."""
    from llm.start.resume_run import check_unfinished
    from llm.storage.checkpoint import newest_state, saved_steps
    from llm.weights import run_config

    if not saved_steps(out_dir):
        return None
    config = run_config(out_dir)
    progress = newest_state(out_dir)[1]["progress"]
    try:
        check_unfinished(config, progress)
    except UserError:
        return 0
    return int(config.max_steps - progress["step"])


def open_run(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    config: TrainConfig,
    world: "World",
    resumes: bool,
    say: Callable[[str], None],
) -> "LiveRun":
    """Start or resume the run. It stays open, with its folder locked, until `stack` closes. Raises UserError."""
    from pathlib import Path

    from llm.commands.bars import progress_bar
    from llm.start.new_run import new_run
    from llm.start.resume_run import resume_run

    if resumes:
        return stack.enter_context(resume_run(Path(config.out_dir), typed_settings(args), say, world))
    overwrite = args.overwrite or world.restarted
    with progress_bar("preparing") if world.leads else contextlib.nullcontext() as progress:
        given = set(FIELDS) if args.time is not None else given_settings(args)  # --time has chosen every setting
        return stack.enter_context(new_run(config, overwrite, say, progress, world, given))


def train_with_output(run: "LiveRun", forecast: "Forecast", trackers: "dict[str, Start]", explains: bool) -> None:
    """Train on rank 0, with the progress bar, the trackers and, if `explains`, what the record shows."""
    from llm.commands.bars import StepBar
    from llm.record.explain import News
    from llm.record.trackers import following

    config = run.parts.config
    news = News(run.out_dir, config) if explains else None
    with (
        StepBar(config.max_steps, run.progress.step, config.tokens_per_step) as bar,
        following(trackers, run.out_dir, config, bar.warn, bar.note),
    ):
        train_and_print(run, bar, forecast, news)


def train_and_print(run: "LiveRun", bar: "StepBar", forecast: "Forecast", news: "News | None") -> None:
    """Train, and print each event as it happens."""
    from llm.train import train
    from llm.training.events import Line, Notice, Step

    for event in train(run):
        if isinstance(event, Line):
            bar.print(str(event))
            for line in news.at(event.step) if news else ():
                bar.note(line)
        elif isinstance(event, Notice):
            bar.warn(event.text)
        elif isinstance(event, Step):
            bar.advance(event.step, run.parts.config.max_steps)
            prediction = forecast.at(event.step, run.seconds, run.progress.bookkeeping)
            if prediction:
                bar.note(prediction)


def check_saved(run: "LiveRun") -> None:
    """Raise Failure, on all processes, if the last checkpoint is not on the disk."""
    from llm.commands.train_lines import last_saved, resume_command

    with run.parts.world.together():
        if run.unsaved:
            raise Failure(
                f"the last save failed: {run.unsaved}; {last_saved(run.out_dir)}; free some disk space, then continue "
                f"with: {resume_command(run)}"
            )


def exit_code(run: "LiveRun", caught: list[int]) -> int:
    """Return the exit code of a process whose run ended normally. `caught` holds the signals it received.

    Of a run that was complete when a signal came, it says so too: who stops a command stops what follows it.
    """
    if run.reason != "interrupted" and not caught:
        return 0
    return 128 + (caught[0] if caught else signal.SIGTERM)  # the signal may have been another process's
