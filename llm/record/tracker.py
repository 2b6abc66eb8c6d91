"""The interface of a tracker, and which numbers and settings of a run it gets."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llm.config import TrainConfig, to_settings
from llm.record import metrics
from llm.storage.lines import Row

Say = Callable[[str], None]


class Tracker(Protocol):
    """A program that shows a run. An exception from it ends its view of the run, never the training."""

    where: str  # how to look at the run, in words

    def row(self, row: Row) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


Start = Callable[[Path, TrainConfig, Row], Tracker]  # run folder, settings, first validation row


def scalars(row: Row) -> dict[str, float]:
    """Return the finite numbers of a row by the names that trackers show.

    A validation row gives only its losses: the training row of the same step has the other numbers.
    """
    split = row["split"]
    keys = ("loss", "bits_per_byte", "val_loss_ema") if split == "val" else metrics.NUMBERS
    named = {f"{key}/{split}" if key in ("loss", "bits_per_byte") else key: row.get(key) for key in keys}
    named |= {key: len(row[key]) for key in ("refused", "spikes") if isinstance(row.get(key), list)}
    return {key: value for key, value in named.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def hyperparameters(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain values; a list of texts becomes one string."""
    return {key: " ".join(value) if isinstance(value, tuple) else value for key, value in to_settings(config).items()}
