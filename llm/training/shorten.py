"""Shorten a run for a given time that would miss its end, as long as its learning rate is stable.

A shorter run has the same learning rate and momentum in all steps between the newest checkpoint and now: they are past
the warm-ups, and its cool-down has not begun. So a run that is resumed from there repeats these steps exactly.
"""

import math
import time
from collections.abc import Iterator

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.schedule import MOMENTUM_WARMUP, decay_start, lr_at
from llm.storage import checkpoint
from llm.training.events import Notice, Saved
from llm.training.live import LiveRun
from llm.training.recording import write_rows
from llm.training.saving import saved

TOLERANCE = 1.05  # of the time that is left: a run that is predicted to take no more is not shortened

UNWRITTEN = "config.toml could not be written, so the run is not shortened"


def keep_deadline(run: LiveRun) -> Iterator[Notice | Saved]:
    """After an evaluation, lower `max_steps` if the run would miss its deadline. Yield a notice about it.

    config.toml has the new number at once. A training row without a loss records from which step on it counts.
    """
    config, step = run.parts.config, run.progress.step
    if run.deadline is None or step > decay_start(config):
        return
    steps = shorter(config, step, run.deadline - time.perf_counter(), seconds_of_step(run))
    if steps >= config.max_steps:
        return
    yield from saved(run, wait=True)
    newest = max(checkpoint.saved_steps(run.out_dir), default=0)
    if newest < warmed_up(config):  # a resume would repeat steps of the warm-up
        return
    shortened = from_settings({"max_steps": steps}, config)
    try:
        storage.write_text(run.out_dir / "config.toml", write_toml(shortened))
    except OSError as error:
        yield from run.complain(UNWRITTEN, error)
        return
    run.parts.config = shortened
    facts = {"tokens": run.progress.tokens, "seconds": round(run.seconds, 3), "lr": lr_at(step, shortened)}
    run.record.add(step=step, split="train", loss=None, max_steps=steps, **facts)
    yield from write_rows(run)
    yield Notice(
        f"slower than measured: from step {step} on, max_steps is {steps} and no longer {config.max_steps}, so that "
        "the run ends in time"
    )


def warmed_up(config: TrainConfig) -> int:
    """Return the first step after the warm-ups of the learning rate and of Muon's momentum."""
    return max(config.warmup, min(MOMENTUM_WARMUP, config.max_steps // 10))


def shorter(config: TrainConfig, step: int, left: float, step_seconds: float) -> int:
    """Return `max_steps`, or the steps that fit in the seconds `left` if it would miss them by more than TOLERANCE.

    The cool-down of the shorter run does not begin before `step`.
    """
    if (config.max_steps - step) * step_seconds <= TOLERANCE * left:
        return config.max_steps
    earliest = step / max(1 - config.cooldown, 1e-9) - 2  # about where the cool-down begins at `step`
    steps = max(step + int(left / step_seconds), math.ceil(min(earliest, config.max_steps)), step + 1)
    while steps < config.max_steps and decay_start(from_settings({"max_steps": steps}, config)) < step:
        steps += 1
    return min(steps, config.max_steps)


def seconds_of_step(run: LiveRun) -> float:
    """Return the mean seconds of a step so far, with its share of evaluations, samples and pictures."""
    step, every = run.progress.step, run.parts.config.eval_every
    evaluated = 1 + (step - 1) // every
    return run.stepping_seconds / step + run.progress.bookkeeping / evaluated / every
