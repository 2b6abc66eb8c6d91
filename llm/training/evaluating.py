"""What happens every `eval_every` steps: evaluate, record, sample, draw."""

import math
import time
from collections.abc import Iterator

import torch

from llm.errors import UserError
from llm.evaluate import Evaluation, evaluate
from llm.generate import continue_text
from llm.machine.device import precision
from llm.machine.parallel import gathered
from llm.record.plot import plot_runs
from llm.schedule import lr_at
from llm.training.events import Line, Notice
from llm.training.live import LiveRun
from llm.training.parts import Parts
from llm.training.recording import write_rows

PICTURE_PACE = 50  # between two pictures is this many times what one takes, so that they take 2 % of a run at most
UNSHOWN = "samples.txt and loss_curve.png could not be written"


def evaluate_run(run: LiveRun) -> Iterator[Line | Notice]:
    """Evaluate the model on the validation split, record it, continue the prompt and draw the curve."""
    parts, progress = run.parts, run.progress
    with run.bookkeeping():
        lr = lr_at(progress.step, parts.config)
        facts = {"step": progress.step, "tokens": progress.tokens, "lr": lr}
        if progress.step == 0:
            train_loss = first_loss(parts)
            run.record.add(split="train", loss=train_loss, seconds=round(progress.predicting, 3), **facts)
        else:
            train_loss = progress.interval_loss / progress.interval_steps if progress.interval_steps else math.nan
        found = validation_loss(run)
        averaged = average_loss(run)
        note_evaluation(run, found, averaged)
        seconds = round(run.seconds, 3)
        if averaged is not None:
            facts["val_loss_ema"] = averaged
        run.record.add(split="val", loss=found.loss, bits_per_byte=found.bits_per_byte, seconds=seconds, **facts)
        sample = draw_sample(parts, run.prompt) if math.isfinite(found.loss) else ""
        if sample:
            run.samples.add(step=progress.step, val_loss=found.loss, prompt=run.prompt, text=sample)
    yield from write_rows(run)
    yield from show(run)
    yield Line(progress.step, lr, train_loss, found, seconds, run.prompt + sample if sample else "", averaged)


def first_loss(parts: Parts) -> float:
    """Return the loss of the first batch before any update, in nats per token."""
    with torch.no_grad(), precision(parts.dtype, parts.device):
        # the model itself: a compiled forward would be compiled again, for a pass without gradients
        losses = [parts.model(micro.x, micro.y, micro.seeds)[1] / micro.divisor for micro in parts.micro_batches(0)]
        return max(float(parts.world.mean(sum(losses))), 0.0)  # rounding can make it negative


def validation_loss(run: LiveRun) -> Evaluation:
    """Evaluate the model on the windows of the validation split."""
    parts, config = run.parts, run.parts.config
    with precision(parts.dtype, parts.device):
        return evaluate(
            parts.model, parts.data.val, config.model.block_size, config.eval_tokens, run.token_bytes, parts.world
        )


def average_loss(run: LiveRun) -> float | None:
    """Return the validation loss of the average of the weights, in nats per token; None if the run keeps none."""
    average = run.parts.average
    if average is None:
        return None
    with average.in_place():
        return validation_loss(run).loss


def note_evaluation(run: LiveRun, found: Evaluation, averaged: float | None = None) -> None:
    """Record whether this evaluation is the best so far, and reset the mean of the training losses.

    `averaged`: loss of the average of the weights. The lower of the two losses counts.
    """
    progress, is_finite = run.progress, math.isfinite(found.loss)
    progress.interval_loss = 0.0
    progress.interval_steps = 0
    progress.last_loss = found.loss if is_finite else None
    lower = found.loss if averaged is None else min(found.loss, averaged)
    if is_finite and (progress.best_loss is None or lower < progress.best_loss):
        progress.best_step = progress.step
        progress.best_loss = lower
        progress.best_weights = "ema" if lower < found.loss else "raw"
        progress.stale = 0
    else:
        progress.stale += 1


def draw_sample(parts: Parts, prompt: str) -> str:
    """Return a continuation of `prompt`. The run's seed gives the same draws at every evaluation."""
    config, tokenizer = parts.config, parts.tokenizer
    if tokenizer is None or config.sample_tokens == 0:
        return ""
    with precision(parts.dtype, parts.device), gathered(parts.model):
        drawn = [token for (token,) in continue_text(parts.model, tokenizer, prompt, config.sample_tokens, config.seed)]
    parts.model.train()
    return tokenizer.decode(drawn)


def show(run: LiveRun) -> Iterator[Notice]:
    """Write samples.txt, and loss_curve.png unless drawing would cost a short run too much; see `show_at_end`.

    If the disk is full, yield a notice; they are written later.
    """
    run.picture_is_old = run.progress.step > 0  # at step 0 there is no curve yet
    waited = time.perf_counter() - run.drawn_at
    yield from write_shown(run, draws=run.picture_is_old and waited >= PICTURE_PACE * run.drawing_seconds)


def show_at_end(run: LiveRun) -> Iterator[Notice]:
    """Draw the picture of the last evaluation, unless it was drawn."""
    if run.picture_is_old:
        yield from write_shown(run, draws=True)
        run.progress.seconds = run.seconds


def write_shown(run: LiveRun, draws: bool) -> Iterator[Notice]:
    """Write samples.txt and, if it `draws`, loss_curve.png."""
    if not run.parts.world.leads:
        return
    try:
        with run.bookkeeping():
            run.samples.catch_up()
            if draws:
                start = time.perf_counter()
                plot_runs([run.out_dir], run.out_dir / "loss_curve.png")
                run.drawn_at = time.perf_counter()
                run.drawing_seconds = run.drawn_at - start
                run.picture_is_old = False
        run.settle(UNSHOWN)
    except (OSError, UserError) as error:  # plot_runs raises UserError if it cannot write
        yield from run.complain(UNSHOWN, error)
