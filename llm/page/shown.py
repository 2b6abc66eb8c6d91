"""What the page is told of a run that is followed: all of it once, then what is new.

Losses are in nats per token, times in seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.config import TrainConfig, to_settings
from llm.page.follow import RECENT, Follower
from llm.page.thin import POINTS, Values, columns, evenly
from llm.record.metrics import best, overfits_since
from llm.record.plot import landmark_losses
from llm.record.runs import standing
from llm.record.verdicts import MEANINGS
from llm.schedule import lr_at
from llm.storage.lines import Row

EVALUATION = ("step", "tokens", "seconds", "loss", "bits_per_byte")


class Viewer:
    """What one viewer knows of a run."""

    def __init__(self) -> None:
        self._generation, self._count, self._version, self._appended = -1, 0, -1, 0

    def news(self, run: Follower) -> dict[str, Any] | None:
        """What the viewer does not know yet; None if that is nothing.

        `all`: the curves anew; `more`: rows to append to them; `facts`: the rest. After `RECENT` appended rows come
        the curves anew, so that a page left open does not grow.
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
        self._generation, self._count, self._version = run.generation, run.count, run.version
        return {"pace": pace(run), **message} if message else None


def curves(run: Follower) -> dict[str, Values]:
    """The training curves by name, each as its columns `thin.COLUMNS`."""
    return {key: columns(curve.rows()) for key, curve in run.curves.items()}


def pace(run: Follower) -> dict[str, float | None]:
    """Where the run is, tokens per second lately, and the seconds left (evaluations counted in)."""
    step = run.last["step"] if run.last else None
    timed = [row for row in run.recent if row[2] is not None]
    speeds = [row[5] for row in list(run.recent)[-10:] if row[5] is not None]
    left = None
    if run.config and step is not None and len(timed) > 1 and timed[-1][0] != timed[0][0]:
        per_step = (timed[-1][2] - timed[0][2]) / (timed[-1][0] - timed[0][0])  # type: ignore[operator]
        left = max(0.0, (run.config.max_steps - step) * per_step)
        if run.config.max_time is not None:
            left = max(0.0, min(left, run.config.max_time - timed[-1][2]))  # type: ignore[operator]
    return {
        "step": step,
        "seconds": run.last["seconds"] if run.last else None,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "seconds_left": left,
        "changed_at": run.changed_at or None,  # seconds since 1970
        "read": run.offset / run.size if run.behind else 1,  # share of the record
    }


def facts(run: Follower) -> dict[str, Any]:
    """All but the training curves: what changes with evaluations and settings."""
    config, low = run.config, best(run.val)
    return {
        "name": run.name,
        "there": run.there,
        "error": "; ".join(run.errors.values()),
        "settings": {key: spelled(value) for key, value in to_settings(config).items()} if config else {},
        "ended": ended(run),
        "max_steps": config.max_steps if config else None,
        "tokens_per_step": config.tokens_per_step if config else None,
        "knobs": {
            "warmup": config.warmup,
            "peak": config.max_lr,
            "floor": config.final_lr,
            "total": config.max_steps,
            "shape": config.schedule,
        }
        if config
        else None,
        "prompt": config.sample_prompt if config else None,
        "landmarks": landmarks(config.model.vocab_size) if config else [],
        "schedule": schedule_points(config) if config else [],
        "val": [[row[key] for key in EVALUATION] for row in thinned_evaluations(run.val)],
        "band": [list(run.band.steps), list(run.band.mean), list(run.band.half)] if run.band else None,
        "best": low["step"] if low else None,
        "overfits_since": overfits_since(run.rows()),
        "verdicts": run.verdicts,
        "samples": run.samples,
        "weights": run.weights,
    }


def ended(run: Follower) -> str:
    """In a word or two, that a run has ended; "" while it may go on."""
    if run.config is None or not run.there:
        return ""
    state, reason = standing(run.rows(), run.config)
    return {"done": "finished", "stopped": f"stopped by {reason}"}.get(state, "")


def spelled(value: object) -> str:
    """A setting as a flag has it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def thinned_evaluations(val: list[Row]) -> list[Row]:
    """At most about `POINTS` evaluations, the best among them."""
    if len(val) <= POINTS:
        return val
    keep, low = {id(row) for row in evenly(val, POINTS)}, best(val)
    return [row for row in val if id(row) in keep or row is low]


def landmarks(vocab_size: int) -> list[dict[str, Any]]:
    """The chapter's losses to compare with, highest first."""
    return [
        {"name": name, "loss": loss, "meaning": meaning}
        for (loss, name), meaning in zip(landmark_losses(vocab_size), MEANINGS, strict=False)
    ]


def schedule_points(config: TrainConfig) -> list[list[float]]:
    """About 200 points (step, learning rate) of a schedule, its corners among them."""
    last = config.max_steps
    steps = {0, config.warmup, last, *(round(i * last / 200) for i in range(201))}
    steps |= {round(i * config.warmup / 20) for i in range(21)}
    return [[step, lr_at(step, config)] for step in sorted(steps)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call each folder: its name, or its path where two have the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
