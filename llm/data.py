"""Token files, and the batch that belongs to a step.

`train.bin` and `val.bin` are bare little-endian token ids; `meta.json` beside them says what they are.
Files without a `meta.json` (nanoGPT's, the chapter's) are taken for uint16 ids of GPT-2's vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError

GPT2_VOCAB = 50257
SCANNED = "scanned.json"  # what a scan of a file found, valid while its size and time are the same

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenData:
    """The two token streams of a data folder, memory-mapped."""

    folder: Path
    train: Tokens
    val: Tokens
    vocab_size: int  # what the ids stay below
    foreign: bool  # no meta.json: GPT-2's vocabulary is assumed
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
    if not (folder / "train.bin").exists() and not storage.unfinished(folder):
        raise UserError(f"{folder / 'train.bin'}: no such file; make it with: losscurve prepare --data_dir {folder}")
    if storage.unfinished(folder):
        with storage.locked(folder, "this data folder"):
            storage.recover(folder)
    meta = read_meta(folder)
    dtype = np.dtype("<u4" if meta and meta["dtype"] == "uint32" else "<u2")
    limit = meta["vocab_size"] if meta else GPT2_VOCAB
    if vocab_size is not None and meta and vocab_size < limit:
        raise UserError(f"vocab_size = {vocab_size} is below the {limit} of {folder / 'meta.json'}; leave it out")
    limit = vocab_size if vocab_size is not None and meta is None else limit
    streams, hashes = {}, {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        streams[split] = _open_tokens(path, dtype, block_size)
        hashes[path.name] = _check_ids(path, streams[split], limit, meta["splits"][split] if meta else None)
    return TokenData(
        folder=folder,
        train=streams["train"],
        val=streams["val"],
        vocab_size=limit,
        foreign=meta is None,
        source=str(meta["source"]["name"]) if meta else "unknown text",
        hashes=hashes,
    )


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What `meta.json` says; None where there is none. Raises UserError naming the field that is not as it should."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    meta = storage.read_json(path)
    try:
        splits = {s: {k: meta["splits"][s][k] for k in ("size", "mtime_ns", "max_id")} for s in ("train", "val")}
        numbers = [meta["vocab_size"], *(value for entry in splits.values() for value in entry.values())]
        hashes = [meta["splits"][s]["sha256"] for s in splits]
        good = all(type(n) is int and n >= 0 for n in numbers) and all(isinstance(h, str) for h in hashes)
        good = good and meta["dtype"] in ("uint16", "uint32") and isinstance(meta["source"]["name"], str)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: field {error} is missing; run prepare again") from None
    if not good:
        raise UserError(f"{path}: a field has the wrong type; run prepare again")
    return meta  # type: ignore[no-any-return]


def _open_tokens(path: Path, dtype: np.dtype[Any], block_size: int) -> Tokens:
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: no such file; prepare the data again") from None
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes is not a whole number of {dtype.name} ids; prepare it again")
    tokens = size // dtype.itemsize
    needed = block_size + 1 if path.name == "train.bin" else 2  # evaluation takes a partial window too
    if tokens < needed:
        raise UserError(
            f"{path}: {tokens} tokens, and a window needs {needed}; give more text"
            + (f" or a --block_size below {max(1, tokens)}" if tokens > 1 and path.name == "train.bin" else "")
        )
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None


def _check_ids(path: Path, tokens: Tokens, limit: int, described: dict[str, Any] | None) -> str:
    """The file's SHA-256, once every id is below `limit` and the file is the one described.

    What a scan finds is kept in `scanned.json`, so that it is needed only where size or time are new.
    """
    state = path.stat()
    stamp = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    if described and described["size"] != state.st_size:
        raise UserError(
            f"{path.with_name('meta.json')}: describes a {path.name} of {described['size']} bytes, "
            f"the file has {state.st_size}; prepare the data again"
        )
    if described and described["mtime_ns"] == state.st_mtime_ns and described["max_id"] < limit:
        return str(described["sha256"])
    known = _scanned(path).get(path.name)
    if known is None or any(known[key] != value for key, value in stamp.items()):
        known = stamp | {"max_id": int(_largest(tokens)), "sha256": storage.sha256(path)}
        _remember(path, known)
    if described and known["sha256"] != described["sha256"]:
        raise UserError(f"{path}: changed since it was prepared (SHA-256 differs); prepare the data again")
    for start, piece in _pieces(tokens) if known["max_id"] >= limit else ():
        if (above := piece >= limit).any():
            where = start + int(np.argmax(above))
            raise UserError(
                f"{path}: token {where} has id {int(tokens[where])}, and the vocabulary has {limit}; "
                f"prepare it again, or give a larger --vocab_size"
            )
    return str(known["sha256"])


def _pieces(tokens: Tokens, length: int = 2**24) -> Any:
    return ((start, tokens[start : start + length]) for start in range(0, len(tokens), length))


def _largest(tokens: Tokens) -> int:
    return max(int(piece.max()) for _, piece in _pieces(tokens))


def _scanned(path: Path) -> dict[str, Any]:
    """What is known of the files beside `path`, by name; what is absent or not ours is scanned again."""
    try:
        found = storage.read_json(path.with_name(SCANNED))
    except UserError:
        return {}
    kinds = {"size": int, "mtime_ns": int, "max_id": int, "sha256": str}
    return {
        name: {key: facts[key] for key in kinds}
        for name in ("train.bin", "val.bin")
        if isinstance(found, dict) and isinstance(facts := found.get(name), dict)
        if all(type(facts.get(key)) is kind for key, kind in kinds.items())
    }


def _remember(path: Path, facts: dict[str, Any]) -> None:
    try:
        storage.write_json(path.with_name(SCANNED), _scanned(path) | {path.name: facts})
    except OSError:
        return  # a read-only data folder is scanned at every start
