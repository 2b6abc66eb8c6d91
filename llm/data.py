"""The tokens of a data folder, and the batch that belongs to a step."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens.remedies import prepare_command
from llm.tokens.token_files import SPLITS, Tokens, has_tokens, open_split, read_meta, settle, vocabulary_of


@dataclass(frozen=True)
class TokenData:
    """The two token streams of a data folder, memory-mapped."""

    folder: Path
    train: Tokens
    val: Tokens
    vocab_size: int  # what the ids stay below
    foreign: bool  # no meta.json: characters where nanoGPT's meta.pkl says so, else GPT-2's tokens
    source: str  # name of the text, for people
    hashes: dict[str, str]  # SHA-256 by file name


@dataclass(frozen=True)
class Batch:
    """Windows of one step: x and y (B, T) int64, y one token later; seeds (B,) int32 for dropout."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.int32]


def batch_at(tokens: Tokens, seed: int, step: int, windows: int, block_size: int, rows: slice = slice(None)) -> Batch:
    """The batch of `step`, or those `rows` of it: a pure function of its arguments, so that nothing need be saved.

    Windows are drawn with replacement, as in the chapter. The draw is the raw stream of Philox
    (Salmon et al. 2011), which NumPy keeps the same for good, reduced by remainder: the bias is
    below len(tokens) / 2**64.
    """
    raw = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(2 * windows)
    starts = (raw[:windows][rows] % np.uint64(len(tokens) - block_size)).astype(np.int64)
    seeds = (raw[windows:][rows] >> np.uint64(33)).astype(np.int32)
    ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    return Batch(ids[:, :-1], ids[:, 1:], seeds)


def open_data(folder: Path, block_size: int, vocab_size: int | None = None) -> TokenData:
    """Open and check the token files of `folder`; ids must be below `vocab_size` where it is given.

    Raises UserError naming the file that is missing, torn, shorter than a window, or not what its
    `meta.json` describes. Full scans happen at the first use and after a change of size or time.
    """
    if storage.unfinished(folder):
        with storage.locked(folder, "this data folder"):
            settle(folder)
    if not has_tokens(folder):
        command = prepare_command({"text": ()}, folder)
        raise UserError(f"{folder / 'train.bin'}: no such file; make it with: {command}")
    meta = read_meta(folder)
    limit = vocabulary_of(folder, meta, vocab_size)
    (train, train_hashes), (val, val_hashes) = (open_split(folder, split, meta, block_size, limit) for split in SPLITS)
    return TokenData(
        folder=folder,
        train=train,
        val=val,
        vocab_size=limit,
        foreign=meta is None,
        source=str(meta["source"]["name"]) if meta else "unknown text",
        hashes=train_hashes | val_hashes,
    )
