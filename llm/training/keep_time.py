"""Fit the steps of a run for a given time to its pace, as long as its learning rate is stable.

The steps were chosen from a short measurement. A run with more or fewer has the same learning rate and momentum in all
steps between the newest checkpoint and now: they are past the warm-ups, and its cool-down has not begun. So a run that
is resumed from there repeats these steps exactly.
"""

import math
import time
from collections.abc import Iterator

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.schedule import MOMENTUM_WARMUP, decay_start, lr_at
from llm.storage import checkpoint
from llm.training.events import Notice, Saved
from llm.training.live import Deadline, LiveRun
from llm.training.recording import write_rows
from llm.training.saving import save, saved

LATE, EARLY = 1.05, 0.93  # of the time that is left: a run that is predicted to take a share in between is left alone
AIM = 0.97  # the share of it that a longer run takes
WORTHWHILE = 0.99  # of the steps: the cool-down may leave no room to shorten a run to this share, and it stays as it is

UNWRITTEN = "config.toml could not be written, so the steps of the run stay as they are"


def keep_time(run: LiveRun, evaluated: bool) -> Iterator[Notice | Saved]:
    """After an evaluation, and where the cool-down begins: change `max_steps` if the run would not end at its deadline.

    config.toml has the new number at once. A training row without a loss records from which step on it counts. Yield a
    notice about it.
    """
    config, step = run.parts.config, run.progress.step
    if run.deadline is None or not warmed_up(config) <= step <= decay_start(config):
        return
    starts_cooldown = step == decay_start(config) > config.warmup
    if not evaluated and not starts_cooldown:
        return
    steps = fitting_steps(config, step, run.deadline, seconds_of_step(run))
    if steps == config.max_steps:
        return
    changed = from_settings({"max_steps": steps}, config)
    yield from saved(run, wait=True)
    stable = max(warmed_up(config), warmed_up(changed))
    if max(checkpoint.saved_steps(run.out_dir), default=0) < stable:  # a resume would repeat steps of the warm-up
        if step < stable:
            return
        yield from save(run, wait=True)
    try:
        storage.write_text(run.out_dir / "config.toml", write_toml(changed))
    except OSError as error:
        yield from run.complain(UNWRITTEN, error)
        return
    run.parts.config = changed
    facts = {"tokens": run.progress.tokens, "seconds": round(run.seconds, 3), "lr": lr_at(step, changed)}
    run.record.add(step=step, split="train", loss=None, max_steps=steps, **facts)
    yield from write_rows(run)
    pace = "slower" if steps < config.max_steps else "faster"
    yield Notice(
        f"{pace} than measured: from step {step} on, max_steps is {steps} and no longer {config.max_steps}, to "
        "fit the time"
    )


def warmed_up(config: TrainConfig) -> int:
    """Return the first step after the warm-ups of the learning rate and of Muon's momentum."""
    return max(config.warmup, min(MOMENTUM_WARMUP, config.max_steps // 10))


def fitting_steps(config: TrainConfig, step: int, deadline: Deadline, step_seconds: float) -> int:
    """Return `max_steps`, or the steps that end at the deadline if it would be missed by more than LATE or EARLY.

    The cool-down of a shorter run does not begin before `step`.
    """
    left = deadline.at - time.perf_counter()
    needed = (config.max_steps - step) * step_seconds
    if needed < EARLY * left:
        return max(config.max_steps, min(step + int(AIM * left / step_seconds), deadline.most_steps))
    if needed <= LATE * left:
        return config.max_steps
    earliest = 0.0
    if config.schedule == "wsd":
        earliest = step / max(1 - config.cooldown, 1e-9) - 2  # about where the cool-down begins at `step`
    steps = max(step + int(left / step_seconds), math.ceil(min(earliest, config.max_steps)), step + 1)
    while steps < config.max_steps and decay_start(from_settings({"max_steps": steps}, config)) < step:
        steps += 1
    return steps if steps <= WORTHWHILE * config.max_steps else config.max_steps


def seconds_of_step(run: LiveRun) -> float:
    """Return the mean seconds of a step so far, with its share of evaluations, samples and pictures."""
    step, every = run.progress.step, run.parts.config.eval_every
    evaluated = 1 + step // every  # this step too, if it is one of them
    return run.stepping_seconds / step + run.progress.bookkeeping / evaluated / every
