"""Token files: opened as one stream for each split, and checked.

A split is one file, `train.bin`, or several shards, `train-00000.bin` and on: bare little-endian token ids that
continue from file to file. `meta.json` beside them describes them. A `train.bin` and `val.bin` without it (nanoGPT's,
the chapter's) are read as uint16 ids: of the characters in nanoGPT's `meta.pkl` if it is there, else of GPT-2's
vocabulary. Files that look like any other format are refused (`llm/tokens/foreign.py`).
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens import foreign
from llm.tokens.remedies import again
from llm.tokens.scan import FACTS, TOKEN_FILE, check_ids, largest_id
from llm.tokens.sharded_stream import Shards

GPT2_VOCAB = 50257


MANY = 1000  # tokens of a text that GPT-2 would not cut into single bytes only


SPLITS = ("train", "val")


class Tokens(Protocol):
    """A stream of N ids: an array, a memory map of one file, or `Shards`."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any:
        """Return the ids at a slice, or at an array of indices of any shape."""


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05d}.bin"


def has_tokens(folder: Path) -> bool:
    """Whether `folder` holds training tokens, in one file or in shards."""
    return any((folder / name).exists() for name in ("train.bin", shard_name("train", 0)))


def token_files(folder: Path) -> list[str]:
    """Return the names of all token files in `folder`, described by its meta.json or not."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if TOKEN_FILE.fullmatch(path.name))


def settle(folder: Path) -> None:
    """Finish or undo an interrupted preparation, and remove token files that `meta.json` does not name.

    Those are left of an earlier preparation. The caller holds the folder's lock.
    """
    storage.recover(folder)
    try:
        meta = read_meta(folder)
    except UserError:  # the caller opens or replaces the folder next, and reports it then
        return
    if meta is None:
        return
    named = {path.name for split in SPLITS for path, _ in files_of(folder, split, meta)}
    for name in token_files(folder):
        if name not in named:
            (folder / name).unlink()


def files_of(folder: Path, split: str, meta: dict[str, Any] | None) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return the files of a split in their order, each with its description in `meta.json`.

    Raises:
        UserError: there are shards, but no `meta.json`.
    """
    whole = folder / f"{split}.bin"
    if meta is None:
        if not whole.exists() and (folder / shard_name(split, 0)).exists():
            raise UserError(f"{folder}: no meta.json describes its shards; {again(folder)}")
        return [(whole, None)]
    entry = meta["splits"][split]
    if "shards" in entry:
        return [(folder / shard["file"], shard) for shard in entry["shards"]]
    return [(whole, entry)]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the content of `meta.json`, None if there is none.

    Raises:
        UserError: names the field that is missing or has the wrong type.
    """
    path = folder / "meta.json"
    if not path.exists():
        return None
    meta = storage.read_json(path)
    try:
        has_right_types = _has_right_types(meta)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: field {error} is missing; {again(path.parent)}") from None
    if not has_right_types:
        raise UserError(f"{path}: a field has the wrong type; {again(path.parent)}")
    return meta  # type: ignore[no-any-return]


def _has_right_types(meta: Any) -> bool:
    """Whether the fields of a meta.json have the right types. Raises KeyError or TypeError if one is missing."""
    files = [facts for split in SPLITS for facts in _described_files(meta["splits"][split], split)]
    numbers = [meta["vocab_size"]]
    for facts in files:
        for key, kind in FACTS.items():
            if type(facts[key]) is not kind:
                return False
            if kind is int:
                numbers.append(facts[key])
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    return meta["dtype"] in ("uint16", "uint32") and isinstance(meta["source"]["name"], str)


def _described_files(entry: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return the description of each file of a split. Raises KeyError if a shard has the name of another file."""
    if "shards" not in entry:
        return [entry]
    shards = list(entry["shards"])
    names = [shard_name(split, number) for number in range(len(shards))]
    if not shards or [shard["file"] for shard in shards] != names:
        raise KeyError("file")
    return shards


def count_tokens(folder: Path, split: str, meta: dict[str, Any] | None) -> int:
    """Return the number of tokens of a split, by the sizes of its files.

    Raises:
        UserError: names a file that is missing or truncated.
    """
    dtype = dtype_of(meta)
    size = sum(_check_size(path, dtype, facts) for path, facts in files_of(folder, split, meta))
    return size // dtype.itemsize


def check_length(folder: Path, split: str, meta: dict[str, Any] | None, block_size: int) -> int:
    """Check that a split holds a window, and return its number of tokens.

    Raises:
        UserError: the split is shorter than a window.
    """
    tokens = count_tokens(folder, split, meta)
    needed = block_size + 1 if split == "train" else 2  # evaluation also takes a partial window
    if tokens < needed:
        path, _ = files_of(folder, split, meta)[0]
        remedy = "give more text"
        if split == "train" and tokens > 1:
            remedy += f" or a --block_size below {tokens}"
        if split == "val":
            remedy += ", or prepare it with a larger --val_fraction"
        raise UserError(f"{path}: {tokens} tokens, and a window needs {needed}; {remedy}")
    return tokens


def dtype_of(meta: dict[str, Any] | None) -> np.dtype[Any]:
    """Return the type of the ids in token files."""
    return np.dtype("<u4" if meta and meta["dtype"] == "uint32" else "<u2")


def vocabulary_of(folder: Path, meta: dict[str, Any] | None, given: int | None) -> int:
    """Return the exclusive upper bound of token ids: by `meta` or nanoGPT's meta.pkl, else `given`, else GPT-2's.

    Raises:
        UserError: `given` is too small, or the ids cannot be GPT-2's.
    """
    known = meta["vocab_size"] if meta else None
    source = folder / "meta.json"
    if meta is None and (alphabet := foreign.characters(folder)):
        known = alphabet.vocab_size
        source = folder / "meta.pkl"
    if known is None:
        if given is None:
            _check_can_be_gpt2(folder, meta)
        return GPT2_VOCAB if given is None else given
    if given is not None and given < known:
        raise UserError(f"vocab_size = {given} is below the {known} of {source}; leave it out")
    return int(known)


def _check_can_be_gpt2(folder: Path, meta: dict[str, Any] | None) -> None:
    """Raise UserError if all ids of a long training split are below 256."""
    path = folder / "train.bin"
    if count_tokens(folder, "train", meta) < MANY:
        return
    tokens = _open_file(path, dtype_of(meta))
    if tokens[:MANY].max() >= 256:
        return
    largest = largest_id(tokens)
    if largest < 256:
        raise UserError(
            f"{path}: the largest id is {largest}, so these are characters or bytes and not GPT-2's tokens; put "
            f"nanoGPT's meta.pkl beside it, or give --vocab_size {largest + 1} and train without samples"
        )


def open_split(
    folder: Path, split: str, meta: dict[str, Any] | None, block_size: int, limit: int
) -> tuple[Tokens, dict[str, str]]:
    """Open a split whose ids must be below `limit`: (its stream, the SHA-256 of each of its files by name).

    Raises:
        UserError: names the file that is missing, truncated, shorter than a window, or not as `meta` describes it.
    """
    listed = files_of(folder, split, meta)
    check_length(folder, split, meta, block_size)
    files = []
    hashes = {}
    for path, facts in listed:
        tokens = _open_file(path, dtype_of(meta))
        files.append(tokens)
        hashes[path.name] = check_ids(path, tokens, limit, facts)
    stream = files[0] if len(files) == 1 else Shards(files)
    return stream, hashes


def _open_file(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    except ValueError:  # among others, the file is empty
        raise UserError(f"{path}: 0 tokens; {again(path.parent)}") from None


def _check_size(path: Path, dtype: np.dtype[Any], facts: dict[str, Any] | None) -> int:
    """Return the bytes of a file. Raises UserError if it is missing, truncated, or not as large as `facts` say."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: no such file; {again(path.parent)}") from None
    if facts is None:
        foreign.check_format(path)
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes is not a whole number of {dtype.name} ids; {again(path.parent)}")
    if facts and facts["size"] != size:
        raise UserError(
            f"{path.with_name('meta.json')}: describes a {path.name} of {facts['size']} bytes, "
            f"the file has {size}; {again(path.parent)}"
        )
    return size
