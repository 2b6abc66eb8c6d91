"""What the teachers of a run predict at each place of its training text (distillation, Hinton et al. 2015).

They predict once, before the first step (`llm.start.predict`). A step reads what it needs from the run folder, so that
it costs no forward pass of a teacher, and a resume needs no teacher. N tokens of the text, T of a window, K of the
vocabulary that are kept of each prediction.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm import storage
from llm.config import TrainConfig
from llm.data import starts_at
from llm.errors import UserError
from llm.loss import Taught
from llm.machine.device import onto
from llm.machine.world import World

FOLDER = "teacher-predictions"  # in the run folder, with the sum of the file
NAME = "predictions.bin"  # N - 1 rows: row i predicts token i + 1
KEPT = 256  # tokens of a prediction, the most probable ones; fewer teach less, see docs/decisions.md

Rows = npt.NDArray[Any]  # of `row_type`
Predictions = Callable[[npt.NDArray[np.int64]], Rows]  # from the starts (B,) of windows to their rows (B, T)


def row_type(vocab_size: int) -> np.dtype[Any]:
    """Return the type of what is kept of a prediction: K ids, from the most probable one on, and probabilities."""
    count = min(KEPT, vocab_size)
    return np.dtype([("ids", "<u2" if vocab_size <= 2**16 else "<u4", count), ("probabilities", "<f2", count)])


def size_of(config: TrainConfig, tokens: int) -> int:
    """Return the bytes of the predictions for a training text of so many tokens; 0 without teachers."""
    return max(0, tokens - 1) * row_type(config.model.vocab_size).itemsize if config.teacher else 0


def open_predictions(run_dir: Path, config: TrainConfig, tokens: int) -> Predictions:
    """Return the predictions in the run folder, after a check of their sum. Raises UserError."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; copy it back, or train again from the start with --overwrite")
    storage.verify_folder(folder)
    if (folder / NAME).stat().st_size != size_of(config, tokens):
        raise UserError(f"{folder / NAME}: is of another text or vocabulary; train again from the start")
    return reader(run_dir, config)


def reader(run_dir: Path, config: TrainConfig) -> Predictions:
    """Return the predictions in the run folder, which were just written."""
    return partial(_read, run_dir / FOLDER / NAME, config)


def _read(path: Path, config: TrainConfig, starts: npt.NDArray[np.int64]) -> Rows:
    kind, block_size = row_type(config.model.vocab_size), config.model.block_size
    rows = np.empty((len(starts), block_size), kind)
    for row, start in zip(rows, starts, strict=True):
        # not memory-mapped: what was read would count as memory of the process
        row[:] = np.fromfile(path, kind, block_size, offset=int(start) * kind.itemsize)
    return rows


def uniform(config: TrainConfig) -> Predictions:
    """Return predictions that know nothing: to measure what a step takes."""
    row = np.zeros((), row_type(config.model.vocab_size))
    row["ids"] = np.arange(row["ids"].size)
    row["probabilities"] = 1 / config.model.vocab_size
    return lambda starts: np.full((len(starts), config.model.block_size), row)


def rows_of(
    predictions: Predictions | None, config: TrainConfig, tokens: int, step: int, windows: slice, world: World
) -> Rows:
    """Return the rows (B, T) of some `windows` of this process's share of `step`.

    Only rank 0 has predictions, and sends the others theirs: a collective that all processes must call.
    """
    share, block_size = config.windows_per_step // world.size, config.model.block_size
    parts = None
    if predictions is not None:
        starts = starts_at(tokens, config.seed, step, config.windows_per_step, block_size, order=config.order)
        found = [predictions(of_rank[windows]) for of_rank in starts.reshape(world.size, share)]
        if world.size == 1:
            return found[0]
        parts = [torch.from_numpy(part.view(np.uint8)) for part in found]
    kind = row_type(config.model.vocab_size)
    mine = torch.empty(len(range(share)[windows]), block_size * kind.itemsize, dtype=torch.uint8)
    return world.scatter(mine, parts).numpy().view(kind)


def taught_by(rows: Rows, share: float, device: torch.device) -> Taught:
    """Return what the loss takes of rows (B, T), on the device."""
    ids, probabilities = rows["ids"].astype(np.int64), rows["probabilities"].astype(np.float32)
    return Taught(onto(device, ids), onto(device, probabilities), share)
