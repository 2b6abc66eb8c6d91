"""The tokens of a data folder, and the batch of a step.

Shapes: `B` windows of a batch, `T` tokens of a window (the block size).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens.remedies import prepare_command
from llm.tokens.token_files import Tokens, has_tokens, open_split, read_meta, settle, vocabulary_of

EPOCH_STREAM = np.array([0, 0, 0, 1], dtype=np.uint64)  # a counter that the draws of a step do not reach
ROUNDS = 10  # as NIST's FF1 has; with 4, some orders of a few windows are clearly more frequent than others


@dataclass(frozen=True)
class TokenData:
    """The token streams of both splits of a data folder, memory-mapped."""

    folder: Path
    train: Tokens
    val: Tokens
    vocab_size: int  # exclusive upper bound of token ids
    foreign: bool  # there is no meta.json: ids are characters if nanoGPT's meta.pkl says so, else GPT-2's tokens
    source: str  # name of the text, for display
    hashes: dict[str, str]  # SHA-256 by file name


@dataclass(frozen=True)
class Batch:
    """The windows of one step: x and y (B, T) int64, y shifted by one token; seeds (B,) int32 for dropout."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.int32]


def batch_at(
    tokens: Tokens,
    seed: int,
    step: int,
    windows: int,
    block_size: int,
    rows: slice = slice(None),
    order: Literal["replacement", "epochs"] = "replacement",
) -> Batch:
    """Return the batch of `step`, or only its `rows`.

    The batch is a pure function of the arguments, so a checkpoint needs no loader state. `order` is how its windows
    are drawn: with replacement, as in the chapter, or each once in an epoch (`epoch_starts`). The draw is the raw
    stream of Philox (Salmon et al. 2011), which NumPy never changes, reduced by remainder: the bias is below
    len(tokens) / 2**64.
    """
    starts = starts_at(len(tokens), seed, step, windows, block_size, rows, order)
    seeds = (_raw(seed, step, 2 * windows)[windows:][rows] >> np.uint64(33)).astype(np.int32)
    ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    return Batch(x=ids[:, :-1], y=ids[:, 1:], seeds=seeds)


def starts_at(
    count: int,
    seed: int,
    step: int,
    windows: int,
    block_size: int,
    rows: slice = slice(None),
    order: Literal["replacement", "epochs"] = "replacement",
) -> npt.NDArray[np.int64]:
    """Return where the windows of `step` start in a text of `count` tokens, or only its `rows`; see `batch_at`."""
    if order == "epochs":
        taken = range(windows)[rows]
        return epoch_starts(count, block_size, seed, step * windows + taken.start, len(taken))
    return (_raw(seed, step, windows)[rows] % np.uint64(count - block_size)).astype(np.int64)


def _raw(seed: int, step: int, number: int) -> npt.NDArray[np.uint64]:
    philox = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    return np.asarray(philox.random_raw(number), dtype=np.uint64)


# ---- epochs


def epoch_starts(count: int, block_size: int, seed: int, first: int, number: int) -> npt.NDArray[np.int64]:
    """Return the starts of `number` windows in a text of `count` tokens, from window `first` of the run on.

    An epoch cuts the text into windows at an offset of its own, and visits each window once, in an order of its own.
    Both are functions of (seed, epoch). Every epoch has as many windows as fit at any offset below `block_size`, so a
    window's epoch is a division. The offset reaches to where the last window ends with the text, so that no token is
    left out for good.
    """
    per_epoch = max(1, count // block_size - 1)
    offsets = count - per_epoch * block_size
    found = []
    while number > 0:
        epoch, position = divmod(first, per_epoch)
        taken = min(number, per_epoch - position)
        key = np.array([seed, epoch], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=EPOCH_STREAM).random_raw(1 + ROUNDS)
        places = permuted(np.arange(position, position + taken, dtype=np.uint64), per_epoch, raw[1:])
        found.append(int(raw[0]) % offsets + block_size * places.astype(np.int64))
        first += taken
        number -= taken
    return np.concatenate(found)


def permuted(indices: npt.NDArray[np.uint64], size: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return where the permutation of `keys` takes each of `indices`, all below `size`, which is at most 2**40.

    A Feistel network permutes the cells of the smallest table of `size` cells or more. A result of `size` or more goes
    through it again until it is below ("cycle walking", Black and Rogaway 2002): nothing is stored.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    found = _feistel(indices, rows, columns, keys)
    while (outside := found >= size).any():
        found[outside] = _feistel(found[outside], rows, columns, keys)
    return found


def _feistel(
    cells: npt.NDArray[np.uint64], rows: int, columns: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    row, column = np.divmod(cells, np.uint64(columns))
    for first, second in keys.reshape(-1, 2):
        row = (row + _mixed(column + first)) % np.uint64(rows)
        column = (column + _mixed(row + second)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014), without its lowest bit: what is added to it cannot overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def open_data(folder: Path, block_size: int, vocab_size: int | None = None) -> TokenData:
    """Open and check the token files of `folder`; ids must be below `vocab_size` if it is given.

    A file is scanned in full when it is first used, and again when its size or modification time has changed.

    Raises:
        UserError: names the file that is missing, truncated, shorter than a window, or not as its
            `meta.json` describes it.
    """
    if storage.unfinished(folder):
        with storage.locked(folder, "this data folder"):
            settle(folder)
    if not has_tokens(folder):
        command = prepare_command({"text": ()}, folder)
        raise UserError(f"{folder / 'train.bin'}: no such file; create it with: {command}")
    meta = read_meta(folder)
    limit = vocabulary_of(folder, meta, vocab_size)
    train, train_hashes = open_split(folder, "train", meta, block_size, limit)
    val, val_hashes = open_split(folder, "val", meta, block_size, limit)
    return TokenData(
        folder=folder,
        train=train,
        val=val,
        vocab_size=limit,
        foreign=meta is None,
        source=str(meta["source"]["name"]) if meta else "unknown text",
        hashes=train_hashes | val_hashes,
    )
