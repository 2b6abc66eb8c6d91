"""Let the teachers of a new run predict each place of its training text."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm import storage
from llm.arch import Model
from llm.config import TrainConfig
from llm.evaluate import sliding_windows
from llm.loss import chunk_rows
from llm.machine.device import onto, precision
from llm.tokens.token_files import Tokens
from llm.training.predictions import Rows, row_type

Progress = Callable[[int, int], None]

LOGIT_BYTES = 16  # held at once for each logit: the sum of the teachers, and of one the logit twice and its softmax


def write_predictions(
    path: Path,
    config: TrainConfig,
    teachers: Sequence[Model],
    tokens: Tokens,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Write what the teachers predict to a file. Raises OSError.

    `progress` is called with the number of batches that are done, and of all.
    """
    with storage.writing(path) as file:
        for rows in predict(config, teachers, tokens, dtype, progress):
            file.write(rows.tobytes())


def predict(
    config: TrainConfig,
    teachers: Sequence[Model],
    tokens: Tokens,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Iterator[Rows]:
    """Yield the rows of all places of the text in their order: the mean of what the teachers predict there.

    Windows overlap by half, and of each but the first only the second half counts: so most places are predicted from
    half a window or more before them.
    """
    device, block_size = next(teachers[0].parameters()).device, config.model.block_size
    heads = [teacher.lm_head.weight.detach().to(dtype) for teacher in teachers]
    batches = sliding_windows(len(tokens), block_size, max(1, block_size // 2))
    for number, (starts, length, new) in enumerate(batches, 1):
        x = onto(device, tokens[starts[:, None] + np.arange(length)].astype(np.int64))
        with torch.no_grad(), precision(dtype, device):
            hidden = [teacher.hidden(x)[:, -new:].flatten(0, 1).to(dtype) for teacher in teachers]
        yield from _rows(hidden, heads)
        if progress is not None:
            progress(number, len(batches))


def _rows(hidden: Sequence[Tensor], heads: Sequence[Tensor]) -> Iterator[Rows]:
    """Yield the rows of the hidden states (n, C) of all teachers, whose heads are (V, C)."""
    n, vocab = len(hidden[0]), len(heads[0])
    kind = row_type(vocab)
    chunk = chunk_rows(n, vocab, LOGIT_BYTES, hidden[0].device.type == "cpu")
    for start in range(0, n, chunk):
        found = torch.zeros(min(chunk, n - start), vocab, device=hidden[0].device)
        for states, head in zip(hidden, heads, strict=True):
            found += torch.softmax((states[start : start + chunk] @ head.T).float(), 1)
        most = (found / len(heads)).topk(kind["ids"].shape[0], 1)
        rows = np.empty(len(found), kind)
        rows["ids"] = most.indices.cpu().numpy()
        rows["probabilities"] = most.values.cpu().numpy()
        yield rows
