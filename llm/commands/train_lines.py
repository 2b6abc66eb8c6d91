"""The lines that `train` prints on stdout before the first step and after the last."""

import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm.commands.bars import print_best_effort
from llm.commands.flags import flag, warn

if TYPE_CHECKING:
    from pathlib import Path

    from llm.plan.forecast import Forecast
    from llm.plan.prediction.loss import Prediction
    from llm.training.live import LiveRun

REASONS = {"max_time": "max_time is used up", "patience": "no improvement within patience"}


def print_start(run: "LiveRun", kept_bytes: int, was_chosen: bool) -> None:
    """Print the device, the model, the data, the steps, and what the run will need.

    `kept_bytes`: of memory that the choice of the run leaves. `was_chosen`: for --time, whose lines have named the
    device, the model, the text and the steps.
    """
    from llm.machine.device import describe_device
    from llm.plan.forecast import outline
    from llm.schedule import warmup_warning

    config = run.parts.config
    warning = warmup_warning(config)
    if warning:
        warn(warning)
    if was_chosen:
        print_best_effort(validation_words(run))
    else:
        print_best_effort(f"training on {describe_device(run.parts.device, run.parts.dtype)}")
        print_best_effort(start_lines(run))
    if config.teacher:
        whose = "the teacher predicts" if len(config.teacher) == 1 else "the teachers predict, on average"
        print_best_effort(f"{config.teacher_share:.0%} of each target is what {whose}: {', '.join(config.teacher)}")
    if run.fine_tuning_line:
        print_best_effort(run.fine_tuning_line)
    print_best_effort(outline(config, len(run.parts.data.train), kept_bytes))


def start_lines(run: "LiveRun") -> str:
    """Return three lines: the model, the data, the steps."""
    from llm.plan.forecast import counted

    parts = run.parts
    config = parts.config
    parameters = sum(p.numel() for p in parts.model.parameters())
    train_tokens = len(parts.data.train)
    begin = f"resuming from step {run.progress.step}" if run.progress.step else "starting"
    windows = counted(config.windows_per_step, "window")
    processes = parts.world.size
    if processes > 1:
        share, micro_batches = config.share(processes)
        windows += f" ({processes} processes x {micro_batches} micro-batches x {min(share, config.batch_size)})"
    epochs = config.max_steps * config.tokens_per_step / train_tokens
    return (
        f"{parameters / 1e6:.2f} M parameters, vocabulary {config.model.vocab_size:,}\n"
        f"{train_tokens:,} training tokens ({parts.data.source}); {validation_words(run)}\n"
        f"{begin}: {config.max_steps:,} steps of {windows} x {config.model.block_size} tokens, "
        f"{epochs:.1f} times the text"
    )


def validation_words(run: "LiveRun") -> str:
    """Return how many tokens of the validation split an evaluation predicts."""
    predicted = len(run.parts.data.val) - 1  # all of them except the first
    limit = run.parts.config.eval_tokens
    return f"validation on {f'all {predicted:,}' if predicted <= limit else f'{limit:,} of {predicted:,}'} tokens"


def print_end(run: "LiveRun", forecast: "Forecast", predicted: "Prediction | str") -> None:
    """Print the result of the run, the accuracy of its forecasts, and the next command.

    `predicted`: its loss, or why there is no prediction.
    """
    if run.reason == "interrupted":
        print_best_effort(
            f"saved step {run.progress.step} in {run.out_dir}; continue with: {resume_command(run)}",
        )
        return
    print_best_effort("\n".join(end_lines(run)))
    accuracy = None if run.reason == "patience" else forecast.ended(run.progress.seconds)
    if accuracy:
        print_best_effort(accuracy)
    if not isinstance(predicted, str) and (reached := last_bits(run)) is not None:
        print_best_effort(f"predicted {predicted}, reached {reached:.2f}")
    print_best_effort(f"saved {run.out_dir / 'model.pt'}")


def end_lines(run: "LiveRun") -> Iterator[str]:
    """Yield the losses and what they mean, the speed, the files, and the next command."""
    from llm.record.metrics import best, read_record
    from llm.record.verdicts import landmarks, overfits
    from llm.storage.checkpoint import folder_name

    progress = run.progress
    config = run.parts.config
    rows = read_record(run.out_dir)
    if run.reason in REASONS:
        yield f"stopped at step {progress.step}: {REASONS[run.reason]}"
    lowest = best(rows)
    assert lowest is not None  # a run that ends has been evaluated
    bits = "" if lowest["bits_per_byte"] is None else f" ({lowest['bits_per_byte']:.3f} bits per byte)"
    average = " by the average of the weights, which best.pt holds" if progress.best_weights == "ema" else ""
    last = "not finite" if progress.last_loss is None else f"{progress.last_loss:.4f}"
    yield (
        f"best val {lowest['loss']:.4f}{bits} at step {lowest['step']}{average}, "
        f"last val {last} at step {progress.step}"
    )
    passed = landmarks(lowest["loss"], config.model.vocab_size)
    if passed:
        yield passed
    overfitting = overfits(rows, config)
    if overfitting:
        yield overfitting

    tokens_per_second = progress.tokens / (progress.seconds - progress.bookkeeping - progress.predicting)
    yield (
        f"{tokens_per_second:,.0f} tokens/s: {run.matmul_utilisation(tokens_per_second):.1%} of the "
        f"{run.matrix_rate / 1e9:,.0f} GFLOP/s that matrix products reach here"
    )
    share = progress.bookkeeping / progress.seconds
    teachers = f"; the teachers: {progress.predicting:.0f} s" if progress.predicting else ""
    yield f"evaluation, samples, pictures, saving: {share:.1%} of {progress.seconds:.0f} s{teachers}"
    yield f"in {run.out_dir}: loss_curve.png, samples.txt, metrics.jsonl, best.pt, {folder_name(progress.step)}/"
    weights = " --weights best" if overfitting else ""
    if run.parts.tokenizer is None:  # nobody can read its samples
        yield f"next: losscurve report {shlex.quote(str(run.out_dir))}"
    else:
        yield f"next: losscurve sample {flag('out_dir', run.out_dir)}{weights}"


def last_bits(run: "LiveRun") -> float | None:
    """Return bits per byte of the last evaluation of the weights, None if it is not finite."""
    from llm.record.metrics import read_record

    found: float | None = [row["bits_per_byte"] for row in read_record(run.out_dir) if row["split"] == "val"][-1]
    return found


def resume_command(run: "LiveRun") -> str:
    """Return the command that resumes a run, with as many processes if they all ran on this machine."""
    world = run.parts.world
    command = f"losscurve train {flag('out_dir', run.out_dir)} --resume"
    all_here = os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)
    return f"{command} --nproc {world.size}" if world.size > 1 and all_here else command


def last_saved(out_dir: "Path") -> str:
    """Return a phrase that names the newest checkpoint of a run."""
    from llm.storage.checkpoint import saved_steps

    steps = saved_steps(out_dir)
    return f"the last saved step is {steps[-1]}" if steps else "no checkpoint was saved"
