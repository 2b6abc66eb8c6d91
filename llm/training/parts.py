"""The objects that a training step uses (model, optimizer, data, device), and the micro-batches of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.arch import Model
from llm.config import TrainConfig
from llm.data import TokenData, batch_at
from llm.loss import Taught
from llm.machine.device import onto
from llm.machine.world import ALONE, World
from llm.muon import Muon
from llm.tokens.tokenizer import Tokenizer
from llm.training.averaging import Average
from llm.training.predictions import Predictions, rows_of, taught_by


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass: B windows of T tokens, on the device."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, x shifted by one token
    seeds: Tensor  # (B,) int32, for the dropout masks
    taught: Taught | None  # what the teachers predict of y, if the settings name any
    divisor: float  # of its loss: windows of this process in the step / windows of this micro-batch
    is_last: bool  # of the step


@dataclass
class Parts:
    """The objects that a training step uses.

    `forward` is the model, compiled or wrapped for several processes if the settings ask for it. `exchange(is_last)` is
    the context manager of a micro-batch: the last one of a step all-reduces the gradients.
    """

    config: TrainConfig
    model: Model
    forward: Callable[..., Any]
    optimizer: torch.optim.AdamW | Muon
    scaler: torch.amp.GradScaler  # for float16; disabled, it changes nothing
    data: TokenData
    tokenizer: Tokenizer | None  # None: unknown, so no samples and no bits per byte
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    exchange: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext()
    predictions: Predictions | None = None  # of the teachers, if the settings name any; only on rank 0
    average: Average | None = None  # of the weights, if the settings ask for it
    data_seconds: float = 0.0  # spent on making batches since the last training row

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this process's share of the batch of `step`, in micro-batches of `batch_size` windows or fewer."""
        config, start = self.config, time.perf_counter()
        rows = self.world.rows(config.windows_per_step)
        sizes = config.windows_per_step, config.model.block_size
        batch = batch_at(self.data.train, config.seed, step, *sizes, rows, config.order)
        self.data_seconds += time.perf_counter() - start
        count = len(batch.x)
        for first in range(0, count, config.batch_size):
            windows = slice(first, first + config.batch_size)
            x, y, seeds = (onto(self.device, part[windows]) for part in (batch.x, batch.y, batch.seeds))
            taught = self._taught(step, windows)
            yield MicroBatch(x, y, seeds, taught, count / len(x), first + len(x) == count)

    def _taught(self, step: int, windows: slice) -> Taught | None:
        """Return what the teachers predict of some windows of this process's share of the batch, None without any."""
        if not self.config.teacher:
            return None
        start = time.perf_counter()
        rows = rows_of(self.predictions, self.config, len(self.data.train), step, windows, self.world)
        taught = taught_by(rows, self.config.teacher_share, self.device)
        self.data_seconds += time.perf_counter() - start
        return taught
