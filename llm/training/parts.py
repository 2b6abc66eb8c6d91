"""What a step works on: model, optimizer, data, device; and the micro-batches of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.config import TrainConfig
from llm.data import TokenData, batch_at
from llm.machine.device import onto
from llm.machine.world import ALONE, World
from llm.model import GPT
from llm.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes. B windows of T tokens, on the device."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, one token later
    seeds: Tensor  # (B,) int32, by which dropout draws
    parts: float  # micro-batches of this size that make up this process's share of the step
    is_last: bool  # of the step


@dataclass
class Parts:
    """What a step works on.

    `forward` is the model, perhaps compiled or wrapped for many processes. `exchange(is_last)` is the context of a
    micro-batch: gradients are exchanged between processes with the last one of a step.
    """

    config: TrainConfig
    model: GPT
    forward: Callable[..., Any]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # for float16; passes everything through where it is not enabled
    data: TokenData
    tokenizer: Tokenizer | None  # None: its vocabulary cannot be had, so no samples and no bits per byte
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    exchange: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext()
    data_seconds: float = 0.0  # spent on making batches since the last training row

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this process's share of the batch of `step`, in micro-batches of `batch_size` windows or fewer."""
        config, start = self.config, time.perf_counter()
        rows = self.world.rows(config.windows_per_step)
        batch = batch_at(self.data.train, config.seed, step, config.windows_per_step, config.model.block_size, rows)
        self.data_seconds += time.perf_counter() - start
        count = len(batch.x)
        for first in range(0, count, config.batch_size):
            windows = slice(first, first + config.batch_size)
            x, y, seeds = (onto(self.device, part[windows]) for part in (batch.x, batch.y, batch.seeds))
            yield MicroBatch(x, y, seeds, count / len(x), first + len(x) == count)
