"""Evaluate a model on fixed windows of tokens: nats per token and bits per byte.

B windows, T block_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm.arch import Model
from llm.loss import linear_cross_entropy
from llm.machine.world import ALONE, World
from llm.tokens.token_files import Tokens

WINDOW_TOKENS = 2048  # tokens per forward pass: the chapter's batch; more is no faster on a CPU


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token
    bits_per_byte: float | None  # None where the bytes of the tokens are not known
    tokens: int  # predicted
    bytes: int | None = None  # of these tokens


def windows(count: int, block_size: int, limit: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return (starts of the full windows, length of the last partial one) that predict `count` - 1 tokens.

    Every token after the first is predicted exactly once. If these are more than `limit` tokens, return
    limit // block_size full windows (at least one) instead, evenly spread.
    """
    full, partial = divmod(count - 1, block_size)
    if count - 1 <= limit or full == 0:
        return np.arange(full, dtype=np.int64) * block_size, partial
    chosen = max(1, limit // block_size)
    return np.arange(chosen, dtype=np.int64) * full // chosen * block_size, 0


def evaluate(
    model: Model,
    tokens: Tokens,
    block_size: int,
    limit: int,
    token_bytes: npt.NDArray[np.int64] | None = None,
    world: World = ALONE,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return the mean loss of `model` over fixed windows of `tokens`, at most `limit` tokens of them.

    With a `stride` the windows slide over all tokens instead (`sliding_windows`), so that every token but the first
    ones is predicted from at least block_size - stride tokens before it.

    token_bytes (V,): length of each token in UTF-8 bytes; bits per byte divides by the bytes of exactly the
    tokens that were predicted. The model keeps its mode, training or evaluation. The batches are distributed over
    the processes and their sums are added in a fixed order, so the result does not depend on the number of processes.
    `progress` is called with the number of batches that are done, and of all.
    """
    device = next(model.parameters()).device
    batches = _batches(len(tokens), block_size, limit)
    if stride is not None:
        batches = sliding_windows(len(tokens), block_size, stride)
    sums = torch.zeros(len(batches), 3, dtype=torch.float64)  # of each batch: nats, tokens, bytes
    training = model.training
    model.eval()
    with torch.no_grad():
        for deal in range(0, len(batches), world.size):
            mine = deal + world.rank
            starts, length, new = batches[min(mine, len(batches) - 1)]  # each rank runs every pass: sharded weights
            ids = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
            x, y = torch.from_numpy(ids[:, :-1]).to(device), torch.from_numpy(ids[:, 1:]).to(device)
            if new == length:
                loss = model(x, y)[1]
            else:
                loss = linear_cross_entropy(model.hidden(x)[:, -new:], model.lm_head.weight, y[:, -new:])
            if mine < len(batches):
                size = 0 if token_bytes is None else int(token_bytes[ids[:, -new:]].sum())
                count = len(starts) * new
                sums[mine] = torch.tensor([loss.item() * count, count, size], dtype=torch.float64)
            if progress is not None:
                progress(min(deal + world.size, len(batches)), len(batches))
    model.train(training)
    nats, predicted, total = (math.fsum(column) for column in world.sum(sums).T.tolist())
    nats = max(nats, 0.0) + 0.0  # rounding can make the loss of a certain model negative; NaN stays NaN
    bits = nats / math.log(2) / total if total else None
    return Evaluation(nats / predicted, bits, int(predicted), int(total) if total else None)


Batches = list[tuple[npt.NDArray[np.int64], int, int]]  # (starts (B,), length, tokens of each at its end that count)


def _batches(count: int, block_size: int, limit: int) -> Batches:
    """Return the windows to evaluate, of which all tokens count; the last may be shorter."""
    starts, partial = windows(count, block_size, limit)
    at_once = max(1, WINDOW_TOKENS // block_size)
    found = [(starts[first : first + at_once], block_size, block_size) for first in range(0, len(starts), at_once)]
    return [*found, (np.array([count - partial - 1]), partial, partial)] if partial else found


def sliding_windows(count: int, block_size: int, stride: int) -> Batches:
    """Return windows that start every `stride` tokens and predict `count` - 1 tokens, each counted exactly once.

    Of every window but the first, only the tokens count that no window before has predicted. The last is shorter.
    """
    first = min(block_size, count - 1)
    full, rest = divmod(count - 1 - first, stride)
    starts = np.arange(1, full + 1, dtype=np.int64) * stride
    at_once = max(1, WINDOW_TOKENS // block_size)
    found = [(np.zeros(1, dtype=np.int64), first, first)]
    found += [(starts[i : i + at_once], block_size, stride) for i in range(0, full, at_once)]
    if rest:
        start = (full + 1) * stride
        found.append((np.array([start]), count - 1 - start, rest))
    return found
