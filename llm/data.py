"""The tokens of a data folder, and the batch of a step.

Shapes: `B` windows of a batch, `T` tokens of a window (the block size).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens.remedies import prepare_command
from llm.tokens.token_files import Tokens, has_tokens, open_split, read_meta, settle, vocabulary_of


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


def batch_at(tokens: Tokens, seed: int, step: int, windows: int, block_size: int, rows: slice = slice(None)) -> Batch:
    """Return the batch of `step`, or only its `rows`.

    The batch is a pure function of the arguments, so a checkpoint needs no loader state. Windows are drawn
    with replacement, as in the chapter. The draw is the raw stream of Philox (Salmon et al. 2011), which
    NumPy never changes, reduced by remainder: the bias is below len(tokens) / 2**64.
    """
    philox = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    raw = philox.random_raw(2 * windows)
    raw_starts = raw[:windows][rows]
    raw_seeds = raw[windows:][rows]
    starts = (raw_starts % np.uint64(len(tokens) - block_size)).astype(np.int64)
    seeds = (raw_seeds >> np.uint64(33)).astype(np.int32)
    ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    return Batch(x=ids[:, :-1], y=ids[:, 1:], seeds=seeds)


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
