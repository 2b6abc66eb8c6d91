"""Write a training row of metrics.jsonl every `log_every` steps. Losses of steps leave the device only here."""

import math
from collections.abc import Iterator

import torch

from llm.record import metrics
from llm.schedule import lr_at
from llm.training.events import Notice, Step
from llm.training.live import LiveRun
from llm.training.refused import NotFinite, refused_in_a_row

READ_EVERY = 50  # steps after which losses are read, if no training row asks for them sooner


UNWRITTEN = "metrics.jsonl could not be written"


def read_losses(run: LiveRun) -> None:
    """Copy the losses of the steps since the last call from the device, and wait for it."""
    if not run.unread:
        return
    progress = run.progress
    # rounding can make the loss of a vocabulary of one token negative
    losses = [max(loss, 0.0) for loss in torch.stack([step.loss for step in run.unread]).tolist()]
    refused = torch.stack([step.refused for step in run.unread]).tolist()
    for step, loss, is_refused in zip(run.unread, losses, refused, strict=True):
        if is_refused:
            progress.losses.append(None)
            progress.refused.append(step.step)
        else:
            progress.losses.append(loss)
            progress.interval_loss += loss
            progress.interval_steps += 1
    run.unread.clear()


def check_losses(run: LiveRun) -> None:
    """Raise NotFinite if the batches of the last IN_A_ROW steps or more were all refused."""
    if batches := refused_in_a_row(run.progress):
        raise NotFinite("loss or gradient is not a finite number", batches)


def log_step(run: LiveRun, step: Step) -> Iterator[Notice]:
    """Record the mean loss and the speed of the steps since the previous row."""
    progress = run.progress
    seconds_before, tokens_before = run.row_began
    run.restart_pace()
    first = step.step - len(progress.losses) + 1
    refused = [number for number, loss in enumerate(progress.losses, first) if loss is None]
    spikes = mark_spikes(run, first)
    trained = [loss for loss in progress.losses if loss is not None]
    progress.losses = []

    speed = None
    if not any(number in progress.skipped for number in refused):  # a skipped step takes no time
        speed = (progress.tokens - tokens_before) / (run.row_began[0] - seconds_before)
    marks = {name: steps for name, steps in (("refused", refused), ("spikes", spikes)) if steps}
    run.record.add(
        step=step.step,
        split="train",
        loss=math.fsum(trained) / len(trained) if trained else None,
        lr=lr_at(step.step, run.parts.config),
        grad_norm=step.grad_norm.item(),
        tokens=progress.tokens,
        seconds=round(run.seconds, 3),
        tokens_per_second=None if speed is None else round(speed, 1),
        matmul_utilisation=None if speed is None else round(run.matmul_utilisation(speed), 4),
        data_seconds=round(run.parts.data_seconds, 4),
        **marks,
    )
    run.parts.data_seconds = 0.0
    yield from write_rows(run)
    if refused:
        named = ", ".join(map(str, refused))
        yield Notice(f"no update at step {named}: loss or gradient is not a finite number")


def mark_spikes(run: LiveRun, first: int) -> list[int]:
    """Return the steps with a loss spike among those since the last row. The first of them is step `first`."""
    progress, spikes = run.progress, []
    for number, loss in enumerate(progress.losses, first):
        if loss is None:
            continue
        if metrics.is_spike(loss, progress.recent):
            spikes.append(number)
        progress.recent = [*progress.recent[1 - metrics.SPIKE_HISTORY :], loss]
    return spikes


def write_rows(run: LiveRun) -> Iterator[Notice]:
    """Write the pending rows. If the disk is full, yield a notice; they are written with the next rows."""
    try:
        with run.bookkeeping():
            run.record.catch_up()
        run.settle(UNWRITTEN)
    except OSError as error:
        yield from run.complain(UNWRITTEN, error)
