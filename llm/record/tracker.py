"""What a tracker is, and what it is shown of a row and of the settings."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llm.config import TrainConfig, to_settings
from llm.record import metrics
from llm.storage.lines import Row

Say = Callable[[str], None]


class Tracker(Protocol):
    """What shows a run. Anything it raises ends the view, and only that."""

    where: str  # in words, how to look at it

    def row(self, row: Row) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


Start = Callable[[Path, TrainConfig, Row], Tracker]  # run folder, settings, first validation row


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that trackers show them under; what an evaluation shares with the training
    row of its step is shown once.
    """
    split = row["split"]
    keys = ("loss", "bits_per_byte") if split == "val" else metrics.NUMBERS
    named = {f"{key}/{split}" if key in ("loss", "bits_per_byte") else key: row.get(key) for key in keys}
    named |= {key: len(row[key]) for key in ("refused", "spikes") if isinstance(row.get(key), list)}
    return {key: value for key, value in named.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def hyperparameters(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain values."""
    return {key: " ".join(v) if isinstance(v, tuple) else v for key, v in to_settings(config).items()}
