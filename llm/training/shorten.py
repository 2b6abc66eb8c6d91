"""Shorten a run for a given time that would miss its end, as long as its learning rate is stable.

A shorter run has the same learning rate and momentum in all steps so far: they are past the warm-up, and its cool-down
has not begun. So a run that is resumed from an earlier checkpoint repeats these steps exactly.
"""

import math
import time
from collections.abc import Iterator

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.schedule import MOMENTUM_WARMUP, decay_start
from llm.training.events import Notice
from llm.training.live import LiveRun

TOLERANCE = 1.05  # of the time that is left: a run that is predicted to take no more is not shortened

UNWRITTEN = "config.toml could not be written, so the run is not shortened"


def keep_deadline(run: LiveRun) -> Iterator[Notice]:
    """Before an evaluation, lower `max_steps` if the run would miss its deadline. Yield a notice about it.

    config.toml has the new number at once, the validation row and the next checkpoint have it too.
    """
    config = run.parts.config
    if run.deadline is None or config.schedule != "wsd" or not is_stable(run.progress.step, config):
        return
    steps = shorter(config, run.progress.step, run.deadline - time.perf_counter(), seconds_of_step(run))
    if steps >= config.max_steps:
        return
    shortened = from_settings({"max_steps": steps}, config)
    try:
        storage.write_text(run.out_dir / "config.toml", write_toml(shortened))
    except OSError as error:
        yield from run.complain(UNWRITTEN, error)
        return
    run.parts.config = shortened
    run.shortened = steps
    yield Notice(
        f"slower than measured: from step {run.progress.step} on, max_steps is {steps} and no longer "
        f"{config.max_steps}, so that the run ends in time"
    )


def is_stable(step: int, config: TrainConfig) -> bool:
    """Return whether `step` is after the warm-ups of rate and momentum, and before the cool-down."""
    return max(config.warmup, min(MOMENTUM_WARMUP, config.max_steps // 10)) <= step <= decay_start(config)


def shorter(config: TrainConfig, step: int, left: float, step_seconds: float) -> int:
    """Return `max_steps`, or the steps that fit in the seconds `left` if it would miss them by more than TOLERANCE.

    The cool-down of the shorter run does not begin before `step`.
    """
    if (config.max_steps - step) * step_seconds <= TOLERANCE * left:
        return config.max_steps
    steps = max(step + int(left / step_seconds), math.ceil(step / (1 - config.cooldown)), step + 1)
    while steps < config.max_steps and decay_start(from_settings({"max_steps": steps}, config)) < step:
        steps += 1
    return min(steps, config.max_steps)


def seconds_of_step(run: LiveRun) -> float:
    """Return the mean seconds of a step so far, with its share of evaluations, samples and pictures."""
    step, every = run.progress.step, run.parts.config.eval_every
    evaluated = 1 + (step - 1) // every
    return run.stepping_seconds / step + run.progress.bookkeeping / evaluated / every
