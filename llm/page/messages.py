"""The messages about a run that the server sends to the page: everything once, then what is new.

Losses are in nats per token, times in seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.config import TrainConfig, to_settings, typed_words
from llm.page.follow import RECENT, Follower
from llm.page.thin import columns
from llm.record.metrics import averaged_bits, best, overfits_since
from llm.record.plot import landmark_losses
from llm.record.points import MAX_POINTS, pick_evenly
from llm.record.runs import run_state
from llm.record.verdicts import MEANINGS
from llm.schedule import decay_start, lr_at
from llm.storage.lines import Row

EVALUATION = ("step", "tokens", "seconds", "loss", "bits_per_byte", "val_loss_ema")


class Viewer:
    """What one open page has received about a run."""

    def __init__(self) -> None:
        self._generation = -1
        self._count = 0
        self._version = -1
        self._appended = 0

    def news(self, run: Follower) -> dict[str, Any] | None:
        """Return the message with what the viewer does not have yet, None if there is nothing.

        `all` replaces the curves, `more` has rows to append to them, `facts` has the rest. After RECENT appended rows
        the curves are replaced, so that a page left open does not grow.
        """
        message: dict[str, Any] = {}
        new = run.count - self._count
        if run.generation != self._generation or new + self._appended > RECENT:
            message["all"] = curves(run)
            self._appended = 0
        elif new:
            message["more"] = columns(list(run.recent)[-new:])
            self._appended += new
        if run.version != self._version:
            message["facts"] = facts(run)
        self._generation = run.generation
        self._count = run.count
        self._version = run.version
        return {"pace": pace(run), **message} if message else None


def curves(run: Follower) -> dict[str, list[list[Any]]]:
    """Return the training curves by name, each as the columns of `thin.COLUMNS`."""
    return {key: columns(curve.rows()) for key, curve in run.curves.items()}


def pace(run: Follower) -> dict[str, float | None]:
    """Return the run's step, tokens and time, recent throughput, and the seconds left (evaluations included)."""
    speeds = [row[5] for row in list(run.recent)[-10:] if row[5] is not None]
    return {
        "step": run.last["step"] if run.last else None,
        "tokens": run.last["tokens"] if run.last else None,
        "seconds": run.last["seconds"] if run.last else None,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "seconds_left": _seconds_left(run),
        "changed_at": run.changed_at or None,  # seconds since 1970
        "read": run.offset / run.size if run.is_behind else 1,  # share of the record
    }


def _seconds_left(run: Follower) -> float | None:
    """Return the seconds left at the pace of the recent rows, None if it is unknown."""
    points = [(row[0], row[2]) for row in run.recent if row[0] is not None and row[2] is not None]
    if run.config is None or run.last is None or len(points) < 2:
        return None
    (first_step, first_seconds), (last_step, last_seconds) = points[0], points[-1]
    if last_step == first_step:
        return None
    seconds_per_step = (last_seconds - first_seconds) / (last_step - first_step)
    left = (run.config.max_steps - run.last["step"]) * seconds_per_step
    if run.config.max_time is not None:
        left = min(left, run.config.max_time - last_seconds)
    return max(0.0, float(left))


def facts(run: Follower) -> dict[str, Any]:
    """Return everything except the training curves: what changes with evaluations and settings."""
    config = run.config
    settings = to_settings(config) if config else {}
    lowest = best(run.val)
    band = run.band
    return {
        "name": run.name,
        "is_model": run.is_model,
        "has_record": run.has_record,
        "error": "; ".join(run.errors.values()),
        "settings": {name: " ".join(typed_words(name, value)) for name, value in settings.items()},
        "ended": _ended(run),
        "max_steps": config.max_steps if config else None,
        "tokens_per_step": config.tokens_per_step if config else None,
        "knobs": _schedule_knobs(config) if config else None,
        "prompt": config.sample_prompt if config else None,
        "landmarks": landmarks(config.model.vocab_size) if config else [],
        "schedule": schedule_points(config) if config else [],
        "val": [[*(row[key] for key in EVALUATION), averaged_bits(row)] for row in thin_evaluations(run.val)],
        "band": [list(band.steps), list(band.mean), list(band.half_width)] if band else None,
        "best": lowest["step"] if lowest else None,
        "lowest": [lowest["loss"], lowest["bits_per_byte"]] if lowest else None,
        "lowest_is_average": lowest is not None and "is_average" in lowest,
        "muon_ratio": config.muon_lr / config.max_lr if config and config.optimizer == "muon" else None,
        "overfits_since": overfits_since(run.rows()),
        "verdicts": run.verdicts,
        "samples": run.samples,
        "weights": run.weights,
    }


def _ended(run: Follower) -> str:
    """Return how a run ended, in one or three words; "" while it may continue."""
    if run.config is None or not run.has_record:
        return ""
    state, reason = run_state(run.rows(), run.config)
    return {"done": "finished", "stopped": f"stopped by {reason}"}.get(state, "")


def _schedule_knobs(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of the schedule by the names of the page's sliders."""
    return {
        "warmup": config.warmup,
        "peak": config.max_lr,
        "floor": config.final_lr,
        "total": config.max_steps,
        "shape": config.schedule,
        "cooldown": config.cooldown,
        "muon_lr": config.muon_lr if config.optimizer == "muon" else None,
    }


def thin_evaluations(val: list[Row]) -> list[Row]:
    """Return about MAX_POINTS evaluations at most, including the best."""
    if len(val) <= MAX_POINTS:
        return val
    kept = {id(row) for row in pick_evenly(val, MAX_POINTS)}
    lowest = best(val)
    return [row for row in val if id(row) in kept or (lowest is not None and row["step"] == lowest["step"])]


def landmarks(vocab_size: int) -> list[dict[str, Any]]:
    """Return the chapter's losses to compare with, highest first."""
    pairs = zip(landmark_losses(vocab_size), MEANINGS, strict=False)
    return [{"name": name, "loss": loss, "meaning": meaning} for (loss, name), meaning in pairs]


def schedule_points(config: TrainConfig) -> list[list[float]]:
    """Return about 200 points (step, learning rate) of a schedule, including its corners."""
    last = config.max_steps
    steps = {0, config.warmup, decay_start(config), last}
    steps |= {round(i * last / 200) for i in range(201)}
    steps |= {round(i * config.warmup / 20) for i in range(21)}
    return [[step, lr_at(step, config)] for step in sorted(steps)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own name, or its path if two have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
