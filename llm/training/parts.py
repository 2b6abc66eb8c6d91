"""The objects that a training step uses (model, optimizer, data, device), and the micro-batches of a step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.arch import Model
from llm.config import GPTConfig, TrainConfig
from llm.config.counts import training_flops_per_token
from llm.data import TokenData, batch_at
from llm.loss import Taught
from llm.machine.device import onto
from llm.machine.world import ALONE, World
from llm.muon import Muon
from llm.tokens.tokenizer import Tokenizer
from llm.training.averaging import Average


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass: B windows of T tokens, on the device."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, x shifted by one token
    seeds: Tensor  # (B,) int32, for the dropout masks
    parts: float  # windows of this process in the step / windows of this micro-batch
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
    teachers: Sequence[Model] = ()  # that the model learns from, in evaluation mode, if the settings name any
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
            yield MicroBatch(x, y, seeds, count / len(x), first + len(x) == count)

    @property
    def teacher_shapes(self) -> list[GPTConfig]:
        """The shapes of the teachers."""
        return [teacher.config for teacher in self.teachers]

    def taught(self, x: Tensor) -> Taught | None:
        """Return what the teachers predict of the windows x (B, T), None without any."""
        if not self.teachers:
            return None
        with torch.no_grad():
            hidden = [teacher.hidden(x) for teacher in self.teachers]
        heads = [teacher.lm_head.weight.detach() for teacher in self.teachers]
        return Taught(hidden, heads, self.config.teacher_share)

    def flops_per_token(self) -> float:
        """Return the floating-point operations of a step for one token, with the forward passes of the teachers."""
        return training_flops_per_token(self.model.config, self.teacher_shapes)
