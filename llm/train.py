"""One step, and the loop around it: batch, forward, backward, step, repeat.

Read it beside the training loop in nanoGPT's train.py. Three things differ. The batch, the
learning rate and the dropout masks are functions of the step, so that a resumed run repeats nothing and skips nothing.
The device checks for NaN and infinity, so that no step waits for the one before it. Evaluating, recording, saving and
rolling back are in files of their own, and yield the events that `train` passes on.
"""

import math
from collections.abc import Iterator

import torch

from llm.machine.device import precision
from llm.optim import clip_gradients
from llm.schedule import lr_at, muon_momentum_at
from llm.training.evaluating import evaluate_run, show_at_end
from llm.training.events import Event, Step
from llm.training.keep_time import keep_time
from llm.training.live import LiveRun
from llm.training.parts import Parts
from llm.training.recording import READ_EVERY, check_losses, log_step, read_losses
from llm.training.refused import NotFinite
from llm.training.rollback import roll_back
from llm.training.saving import save, save_is_due, saved


def train_step(parts: Parts, step: int) -> Step:
    """Make update number `step`, counted from 0. A loss or gradient that is not finite makes no update."""
    optimizer, scaler = parts.optimizer, parts.scaler

    # learning rate and momentum are functions of the step
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, parts.config) * group["lr_ratio"]
        group["muon_momentum"] = muon_momentum_at(step, parts.config)  # AdamW does not read it

    # forward and backward of each micro-batch; gradients are exchanged between processes with the last one
    optimizer.zero_grad()
    loss = torch.zeros((), device=parts.device)
    for micro in parts.micro_batches(step):
        with parts.exchange(micro.is_last):
            with precision(parts.dtype, parts.device):
                micro_loss = parts.forward(micro.x, micro.y, micro.seeds, micro.taught)[1] / micro.divisor
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    parts.world.mean(loss)

    # clip
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(parts.model, parts.config.grad_clip)

    # update; if a number is not finite, the optimizer itself leaves weights and moments as they are
    refused = ~torch.isfinite(loss)
    if not scaler.is_enabled():  # with float16, the scaler handles overflow: it skips the update and lowers the scale
        refused = refused | ~torch.isfinite(grad_norm.to(parts.device))
        optimizer.found_inf = refused.float()  # type: ignore[union-attr]  # read by the fused kernel
    scaler.step(optimizer)
    scaler.update()
    if parts.average:
        parts.average.update(torch.isfinite(loss) & torch.isfinite(grad_norm.to(parts.device)))
    return Step(step + 1, loss, grad_norm, refused)


def skipped_step(parts: Parts, step: int) -> Step:
    """Return the `Step` of a batch that was refused before a rollback and is skipped now: its loss is NaN."""
    nan = torch.full((), math.nan, device=parts.device)
    return Step(step + 1, nan, nan, torch.isnan(nan))


def train(run: LiveRun) -> Iterator[Event]:
    """Train `run` to its end, and yield each `Step`, `Line`, `Saved` and `Notice` as it happens.

    Raises Failure if rolling back did not help; the last checkpoint stays as it was.
    """
    config = run.parts.config
    run.parts.model.train()
    run.restart_pace()
    try:
        if run.is_new:
            yield from evaluate_run(run)
            yield from save(run)
        while run.reason is None:
            if run.progress.step + 1 in run.progress.skipped:
                step = skipped_step(run.parts, run.progress.step)
            else:
                step = train_step(run.parts, run.progress.step)
            run.take(step)
            yield step
            yield from saved(run)  # the thread may have finished writing a checkpoint

            try:
                limit = run.limit_reached()  # the last step is always evaluated
                evaluates = limit is not None or step.step % config.eval_every == 0
                logs = evaluates or step.step % config.log_every == 0
                if logs or step.step % READ_EVERY == 0:
                    read_losses(run)
                    check_losses(run)
                if logs:
                    yield from log_step(run, step)
                if evaluates:
                    yield from evaluate_run(run)

                run.reason = limit or run.stop_requested()
                if run.reason or save_is_due(run, evaluates):
                    yield from save(run, wait=run.reason is not None)
                if run.reason is None:
                    yield from keep_time(run, evaluates)
            except NotFinite as error:  # several batches in a row, or a weight
                yield from roll_back(run, error)
        yield from show_at_end(run)
    finally:
        run.saver.close()
