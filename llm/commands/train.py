"""`train`: the main job. Flags in, the chapter's lines out."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, config_from, flag, typed_settings, warn
from llm.config import FIELDS, PRESETS, TrainConfig
from llm.errors import Failure, UserError
from llm.machine.interpreter import child_environment

if TYPE_CHECKING:
    from pathlib import Path

    from llm.machine.world import World
    from llm.training.live import LiveRun

DESCRIPTION = "Train a small GPT from scratch. With no flags: the chapter's recipe on tiny Shakespeare."


def main(argv: list[str]) -> int:
    if "RANK" not in os.environ:
        args = parsed(argv)
        settings_of(args)  # a mistake is said before torch is loaded, which takes a second, or started many times
        if args.nproc is not None:
            return several(args.nproc, args.words)
    from llm.machine.rendezvous import init_distributed

    with init_distributed() as world:
        return train_in(argv, world)


def parsed(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser("losscurve train", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out_dir from its last saved step"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out_dir")
    parser.add_argument("--explain", action="store_true", help="say, on stderr, what the record shows as it shows it")
    parser.add_argument("--watch", action="store_true", help="serve the page of losscurve watch until the run ends")
    parser.add_argument(
        "--track", action="append", default=[], metavar="tensorboard|wandb", help="follow the run there too"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine, started by torchrun; see docs/scale.md"
    )
    return parser.read(argv)


def settings_of(args: argparse.Namespace, say: Callable[[str], None] = lambda line: None) -> TrainConfig:
    """Raises UserError."""
    if args.resume and (args.preset or args.overwrite):
        raise UserError("--resume takes the settings of the run itself; leave out --preset and --overwrite")
    return config_from(args, say)


def several(nproc: int, words: list[str]) -> int:
    """Have torchrun start `nproc` processes of this command in the place of this one, with the `words` of its flags
    (`Parser.read`). Raises UserError.
    """
    cores = os.cpu_count() or 1
    if not 1 <= nproc <= 1024:
        raise UserError(f"nproc = {nproc}: expected a number of processes from 1 to 1024")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    torchrun = ("-m", "llm.commands.launch", "--standalone", f"--nproc_per_node={nproc}", "-m", "llm", "train")
    rest = [word for word in words if not word.startswith("--nproc=")]  # which torchrun would take for its own
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *torchrun, *rest], child_environment())


def train_in(argv: list[str], world: "World") -> int:
    """The run, as one of its processes sees it: the leading one talks and writes."""
    from pathlib import Path

    from llm.commands.bars import StepBar, tokenizing
    from llm.commands.bars import log as tell
    from llm.commands.look.watch import beside
    from llm.machine.device import describe_device
    from llm.plan.forecast import Forecast, outline
    from llm.record.explain import News
    from llm.record.trackers import following, starts
    from llm.run import interrupts
    from llm.schedule import warmup_warning
    from llm.start.new_run import new_run
    from llm.start.resume_run import resume_run
    from llm.train import train
    from llm.training.events import Line, Notice, Step

    with world.together():
        say = warn if world.leads else lambda line: None
        args = parsed(argv)
        config = settings_of(args, say)
        if world.started and args.nproc is not None:
            raise UserError(f"nproc = {args.nproc}: torchrun has started the processes already; leave it out")
        trackers = starts(args.track, warn) if world.leads else {}
    out_dir = Path(config.out_dir)
    # started again by torchrun's --max-restarts: this job's own run goes on, however it was begun
    left = world.first(lambda: steps_left(out_dir)) if world.restarted else None
    if left == 0:
        say(f"{out_dir}: complete before it was started again")
        return 0
    with contextlib.ExitStack() as stack:
        tell_address = stack.enter_context(beside(out_dir)) if args.watch and world.leads else None
        if args.resume or left:
            run = stack.enter_context(resume_run(out_dir, typed_settings(args), say, world))
        else:
            overwrite = args.overwrite or world.restarted
            with tokenizing() if world.leads else contextlib.nullcontext() as progress:
                run = stack.enter_context(new_run(config, overwrite, say, progress, world))
        caught = stack.enter_context(interrupts())
        run.stop = lambda: bool(caught)
        config = run.parts.config
        if not world.leads:
            for _ in train(run):
                pass
            check_saved(run)
            return exit_code(run, caught)
        if warning := warmup_warning(config):
            warn(warning)
        tell(f"training on {describe_device(run.parts.device, run.parts.dtype)}")
        tell(opening(run))
        tell(outline(config, len(run.parts.data.train)))
        if tell_address:
            tell_address()
        news, forecast = News(out_dir, config) if args.explain else None, Forecast(config)
        with (
            StepBar(config.max_steps, run.progress.step, config.tokens_per_step) as shown,
            following(trackers, out_dir, config, shown.warn, shown.note),
        ):
            for event in train(run):
                if isinstance(event, Line):
                    shown.print(str(event))
                    for line in news.at(event.step) if news else ():
                        shown.note(line)
                elif isinstance(event, Notice):
                    shown.warn(event.text)
                elif isinstance(event, Step):
                    shown.advance(event.step)
                    if said := forecast.at(event.step, run.seconds, run.progress.bookkeeping):
                        shown.note(said)
    check_saved(run)
    if run.reason == "interrupted":
        tell(f"saved step {run.progress.step} in {out_dir}; go on with: {go_on(run)}")
        return exit_code(run, caught)
    tell("\n".join(ending(run)))
    if run.reason != "patience" and (came := forecast.ended(run.progress.seconds)):
        tell(came)
    tell(f"saved {out_dir / 'model.pt'}")
    return exit_code(run, caught)


def exit_code(run: "LiveRun", caught: list[int]) -> int:
    """Of every process of a run that ended in good order; the signal may have been another process's."""
    return 128 + (caught[0] if caught else signal.SIGTERM) if run.reason == "interrupted" else 0


def steps_left(out_dir: "Path") -> int | None:
    """Of the run in `out_dir` from its newest saved state on; None where none was saved."""
    from llm.start.resume_run import check_unfinished
    from llm.storage.checkpoint import newest_state, saved_steps
    from llm.weights import run_config

    if not saved_steps(out_dir):
        return None
    config, progress = run_config(out_dir), newest_state(out_dir)[1]["progress"]
    try:
        check_unfinished(config, progress)
    except UserError:
        return 0
    return int(config.max_steps - progress["step"])


def check_saved(run: "LiveRun") -> None:
    """Raises Failure, on all processes, if the last state is not on the disk."""
    with run.parts.world.together():
        if run.unsaved:
            raise Failure(
                f"the last save failed: {run.unsaved}; {last_saved(run.out_dir)}; make room, then go on with: "
                f"{go_on(run)}"
            )


def go_on(run: "LiveRun") -> str:
    """The command that resumes a run, in as many processes where they are all on this machine."""
    world = run.parts.world
    here = world.size > 1 and os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)
    return f"losscurve train {flag('out_dir', run.out_dir)} --resume" + (f" --nproc {world.size}" if here else "")


def last_saved(out_dir: "Path") -> str:
    """The newest state of a run, in words."""
    from llm.storage.checkpoint import saved_steps

    steps = saved_steps(out_dir)
    return f"the last saved step is {steps[-1]}" if steps else "nothing was saved"


def opening(run: "LiveRun") -> str:
    """What is trained on what, in three lines."""
    parts, config = run.parts, run.parts.config
    parameters, tokens = sum(p.numel() for p in parts.model.parameters()), len(parts.data.train)
    epochs, predicted = config.max_steps * config.tokens_per_step / tokens, len(parts.data.val) - 1
    validating = f"all {predicted:,}" if predicted <= config.eval_tokens else f"{config.eval_tokens:,} of {predicted:,}"
    begin = f"going on from step {run.progress.step}" if run.progress.step else "starting"
    windows = f"{config.windows_per_step} windows"
    if (processes := parts.world.size) > 1:
        share, micro = config.share(processes)
        windows += f" ({processes} processes x {micro} micro-batches x {min(share, config.batch_size)})"
    return (
        f"{parameters / 1e6:.2f} M parameters, vocabulary {config.model.vocab_size:,}\n"
        f"{tokens:,} training tokens ({parts.data.source}); validation on {validating} tokens\n"
        f"{begin}: {config.max_steps:,} steps of {windows} x {config.model.block_size} tokens, "
        f"{epochs:.1f} times the text"
    )


def ending(run: "LiveRun") -> Iterator[str]:
    """How the run went, what it means and what to type next."""
    from llm.record.metrics import best, read_record
    from llm.record.verdicts import landmarks, overfits
    from llm.storage.checkpoint import folder_name

    progress, config, out_dir, rows = run.progress, run.parts.config, run.out_dir, read_record(run.out_dir)
    stopped = {"max_time": "max_time is used up", "patience": "no improvement within patience"}
    if run.reason in stopped:
        yield f"stopped at step {progress.step}: {stopped[run.reason]}"
    lowest = best(rows)
    assert lowest is not None  # a run that ends has been evaluated
    bits = "" if lowest["bits_per_byte"] is None else f" ({lowest['bits_per_byte']:.3f} bits per byte)"
    yield (
        f"best val {lowest['loss']:.4f}{bits} at step {lowest['step']}, "
        f"last val {progress.last_loss:.4f} at step {progress.step}"
    )
    if passed := landmarks(lowest["loss"], config.model.vocab_size):
        yield passed
    if overfitting := overfits(rows, config):
        yield overfitting
    speed = progress.tokens / (progress.seconds - progress.bookkeeping)
    share = progress.bookkeeping / progress.seconds
    rate, used = run.matrix_rate / 1e9, run.utilisation(speed)
    yield f"{speed:,.0f} tokens/s: {used:.1%} of the {rate:,.0f} GFLOP/s that matrix products reach here"
    yield f"evaluation, samples, pictures, saving: {share:.1%} of {progress.seconds:.0f} s"
    yield f"in {out_dir}: loss_curve.png, samples.txt, metrics.jsonl, best.pt, {folder_name(progress.step)}/"
    better = " --weights best" if overfitting else ""
    yield f"next: losscurve sample {flag('out_dir', out_dir)}{better}"
