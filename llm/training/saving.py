"""Decide when a checkpoint is due, and write it while training continues."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llm import storage
from llm.training.events import Notice, Saved
from llm.training.live import LiveRun
from llm.training.recording import read_losses, write_rows
from llm.training.refused import NotFinite
from llm.training.saver import not_finite
from llm.training.state import facts_of, tensors_of, weights_of, write_state

UNSAVED = "the checkpoint could not be saved"


def save_is_due(run: LiveRun, evaluated: bool) -> bool:
    """Return whether to save now: a new best evaluation, or `save_every` steps or seconds since the last time."""
    config, progress = run.parts.config, run.progress
    every = config.save_every or config.eval_every
    if isinstance(every, float):
        is_due = run.parts.world.any(time.perf_counter() - run.saved_at >= every)
    else:
        is_due = progress.step % every == 0
    return is_due or (evaluated and progress.stale == 0)


def save(run: LiveRun, wait: bool = False) -> Iterator[Saved | Notice]:
    """Copy the state and let a thread write it while training continues: a checkpoint, and the weights as `model.pt`
    (and as `best.pt` if they are the best). With `wait`, return when all is on the disk.

    Raises NotFinite, and saves nothing, if a tensor holds a number that is not finite.
    """
    parts, progress = run.parts, run.progress
    if broken := next(filter(None, parts.world.gather(not_finite(tensors_of(parts)))), None):
        raise NotFinite(f"{broken} holds a number that is not finite")
    yield from saved(run, wait=True)
    parts.world.gather(None)  # the other ranks wait for rank 0's disk here, without a timeout
    read_losses(run)
    yield from write_rows(run)
    with run.bookkeeping():
        run.saved_at = time.perf_counter()
        copies = run.saver.copy(tensors_of(parts), parts.world.leads)
        progress.seconds = run.seconds
        if not parts.world.leads:
            return
        weights = best = weights_of(parts.model, copies["model"])
        if progress.best_weights == "ema":
            best = weights_of(parts.model, copies["ema"])
        best_step = None if progress.best_loss is None else progress.best_step
        write = partial(
            write_state,
            run.out_dir,
            run.record,
            run.record.added,
            progress.step,
            weights,
            best if best_step == progress.step else None,
            copies,
            facts_of(parts, progress),
            parts.config.keep,
            best_step,
        )
        run.saver.start(progress.step, write)
    yield from saved(run, wait)


def saved(run: LiveRun, wait: bool = False) -> Iterator[Saved | Notice]:
    """Yield the result of the save in progress if it has ended; with `wait`, wait for its end."""
    with run.bookkeeping():
        result = run.saver.finished(wait)
    if result is None:
        return
    run.progress.seconds = run.seconds
    step, outcome = result
    if isinstance(outcome, Path):
        run.unsaved = None
        run.settle(UNSAVED)
        yield Saved(step, outcome)
        yield from map(Notice, storage.limits())
    else:
        run.unsaved = f"step {step} ({outcome.strerror or outcome})"
        run.failed_saves += 1
        yield from run.complain(UNSAVED, outcome)
