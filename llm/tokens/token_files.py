"""Token files: opened as one stream for each split, and checked.

A split is one file, `train.bin`, or several shards, `train-00000.bin` and on: bare little-endian token ids that go on
from file to file. `meta.json` beside them says what they are. A `train.bin` and `val.bin` without it (nanoGPT's, the
chapter's) are taken for uint16 ids: of the characters in nanoGPT's `meta.pkl` where it is there, else of GPT-2's
vocabulary. What looks like anything else is refused (`llm/foreign.py`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens import foreign
from llm.tokens.remedies import again

GPT2_VOCAB = 50257


SCANNED = "scanned.json"  # what a scan of a file found, valid while its size and time are the same


MANY = 1000  # tokens of a text, which GPT-2 does not cut into single bytes only


SPLITS = ("train", "val")


TOKEN_FILE = re.compile(r"(?:train|val)(?:-\d{5,})?\.bin")


FACTS = {"size": int, "mtime_ns": int, "max_id": int, "sha256": str}  # that are known of a file


class Tokens(Protocol):
    """What everything else asks of a stream of N ids: an array, a memory map of one file, or `Shards`."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any:
        """The ids at a slice, or at an array of places of any shape."""


class Shards:
    """Memory-mapped files as one stream of N ids. A slice within one file is a view, any other a copy."""

    def __init__(self, files: Sequence[npt.NDArray[Any]]) -> None:
        self.files, self.dtype = [np.asarray(file) for file in files], files[0].dtype  # plain arrays are indexed faster
        self.starts = np.cumsum([0, *map(len, files)], dtype=np.int64)  # of each file, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Any, /) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._stretch(start, stop) if step == 1 else self[np.arange(start, stop, step)]
        places = np.asarray(key)
        if places.dtype.kind not in "iu":
            raise IndexError(f"places of tokens are whole numbers, not {places.dtype}")
        flat = places.astype(np.int64).ravel()
        flat[flat < 0] += len(self)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"a place is outside of {len(self)} tokens")
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        edges = np.searchsorted(ordered, self.starts)  # of each file's share
        found = np.empty(flat.shape, self.dtype)
        for number in np.flatnonzero(np.diff(edges)).tolist():
            share = slice(edges[number], edges[number + 1])
            found[order[share]] = self.files[number][ordered[share] - self.starts[number]]
        return found.reshape(places.shape)[()]

    def _stretch(self, start: int, stop: int) -> npt.NDArray[Any]:
        first, last = np.searchsorted(self.starts[1:-1], [start, max(start, stop - 1)], "right").tolist()
        begins = self.starts[first : last + 1].tolist()
        files = zip(self.files[first : last + 1], begins, strict=True)
        parts = [file[max(0, start - begin) : max(0, stop - begin)] for file, begin in files]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def has_tokens(folder: Path) -> bool:
    """Whether there are training tokens in `folder`, whole or in shards."""
    return any((folder / name).exists() for name in ("train.bin", shard_name("train", 0)))


def token_files(folder: Path) -> list[str]:
    """The names of all token files in `folder`, described or not."""
    return sorted(path.name for path in folder.iterdir() if TOKEN_FILE.fullmatch(path.name)) if folder.is_dir() else []


def settle(folder: Path) -> None:
    """Finish or undo an interrupted preparation, and remove token files that `meta.json` does not name: what there
    was before it. The caller holds the folder's lock."""
    storage.recover(folder)
    try:
        meta = read_meta(folder)
    except UserError:  # whoever opens or replaces the folder will say so
        return
    if meta is not None:
        named = {path.name for split in SPLITS for path, _ in files_of(folder, split, meta)}
        for name in token_files(folder):
            if name not in named:
                (folder / name).unlink()


def files_of(folder: Path, split: str, meta: dict[str, Any] | None) -> list[tuple[Path, dict[str, Any] | None]]:
    """The files of a split in their order, each with what `meta.json` says of it. Raises UserError where shards are
    there and it is not."""
    if meta is None and not (folder / f"{split}.bin").exists() and (folder / shard_name(split, 0)).exists():
        raise UserError(f"{folder}: no meta.json says what its shards are; {again(folder)}")
    entry = meta["splits"][split] if meta else None
    if entry is None or "shards" not in entry:
        return [(folder / f"{split}.bin", entry)]
    return [(folder / shard["file"], shard) for shard in entry["shards"]]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What `meta.json` says; None where there is none. Raises UserError naming the field that is not as it should."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    meta = storage.read_json(path)
    try:
        files = [facts for split in SPLITS for facts in _described(meta["splits"][split], split)]
        good = all(type(facts[key]) is kind for facts in files for key, kind in FACTS.items())
        numbers = [facts[key] for facts in files for key, kind in FACTS.items() if kind is int]
        good = good and all(type(n) is int and n >= 0 for n in (meta["vocab_size"], *numbers))
        good = good and meta["dtype"] in ("uint16", "uint32") and isinstance(meta["source"]["name"], str)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: field {error} is missing; {again(path.parent)}") from None
    if not good:
        raise UserError(f"{path}: a field has the wrong type; {again(path.parent)}")
    return meta  # type: ignore[no-any-return]


def _described(entry: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """What is said of each file of a split. Raises KeyError where a shard has a name that is not its own."""
    if "shards" not in entry:
        return [entry]
    shards = list(entry["shards"])
    if not shards or [shard["file"] for shard in shards] != [shard_name(split, n) for n in range(len(shards))]:
        raise KeyError("file")
    return shards


def count_tokens(folder: Path, split: str, meta: dict[str, Any] | None) -> int:
    """How many tokens a split has, by the sizes of its files. Raises UserError naming one that is missing."""
    dtype = dtype_of(meta)
    return sum(_size(path, dtype, facts) for path, facts in files_of(folder, split, meta)) // dtype.itemsize


def check_length(folder: Path, split: str, meta: dict[str, Any] | None, block_size: int) -> int:
    """How many tokens a split has. Raises UserError where it is shorter than a window."""
    tokens = count_tokens(folder, split, meta)
    needed = block_size + 1 if split == "train" else 2  # evaluation takes a partial window too
    if tokens < needed:
        raise UserError(
            f"{files_of(folder, split, meta)[0][0]}: {tokens} tokens, and a window needs {needed}; give more text"
            + (f" or a --block_size below {max(1, tokens)}" if tokens > 1 and split == "train" else "")
        )
    return tokens


def dtype_of(meta: dict[str, Any] | None) -> np.dtype[Any]:
    return np.dtype("<u4" if meta and meta["dtype"] == "uint32" else "<u2")


def vocabulary_of(folder: Path, meta: dict[str, Any] | None, given: int | None) -> int:
    """The exclusive upper bound of token ids: what `meta` or nanoGPT's meta.pkl says, else as `given`, else GPT-2's.

    Raises UserError where ids are taken for GPT-2's that cannot be, or fewer are given than there are.
    """
    known = meta["vocab_size"] if meta else None
    source = folder / "meta.json"
    if meta is None and (alphabet := foreign.characters(folder)):
        known, source = alphabet.vocab_size, folder / "meta.pkl"
    if known is not None:
        if given is not None and given < known:
            raise UserError(f"vocab_size = {given} is below the {known} of {source}; leave it out")
        return int(known)
    if given is not None:
        return given
    path = folder / "train.bin"
    tokens = _mapped(path, dtype_of(meta)) if count_tokens(folder, "train", meta) >= MANY else None
    if tokens is not None and tokens[:MANY].max() < 256 and (largest := _largest(tokens)) < 256:
        raise UserError(
            f"{path}: the largest id is {largest}, so these are characters or bytes and not GPT-2's tokens; put "
            f"nanoGPT's meta.pkl beside it, or give --vocab_size {largest + 1} and train without samples"
        )
    return GPT2_VOCAB


def open_split(
    folder: Path, split: str, meta: dict[str, Any] | None, block_size: int, limit: int
) -> tuple[Tokens, dict[str, str]]:
    """The stream of a split, and the SHA-256 of each of its files by name; its ids are below `limit`.

    Raises UserError naming the file that is missing, torn, shorter than a window, or not what `meta` describes.
    """
    dtype, listed = dtype_of(meta), files_of(folder, split, meta)
    check_length(folder, split, meta, block_size)
    files, hashes = [], {}
    for path, facts in listed:
        files.append(_mapped(path, dtype))
        hashes[path.name] = _check_ids(path, files[-1], limit, facts)
    return files[0] if len(files) == 1 else Shards(files), hashes


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    except ValueError:  # an empty one among others
        raise UserError(f"{path}: 0 tokens; {again(path.parent)}") from None


def _size(path: Path, dtype: np.dtype[Any], facts: dict[str, Any] | None) -> int:
    """A file's bytes. Raises UserError where it is missing or torn, or not as large as `facts` say."""
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


def _check_ids(path: Path, tokens: Tokens, limit: int, described: dict[str, Any] | None) -> str:
    """The file's SHA-256, once every id is below `limit` and the file is the one described.

    What a scan finds is kept in `scanned.json`, so that it is needed only where size or time are new.
    """
    state = path.stat()
    if described and described["mtime_ns"] == state.st_mtime_ns and described["max_id"] < limit:
        return str(described["sha256"])
    stamp = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    known = _scanned(path).get(path.name)
    if known is None or any(known[key] != value for key, value in stamp.items()):
        known = stamp | {"max_id": int(_largest(tokens)), "sha256": storage.sha256(path)}
        _remember(path, known)
    if described and known["sha256"] != described["sha256"]:
        raise UserError(f"{path}: changed since it was prepared (SHA-256 differs); {again(path.parent)}")
    for start, piece in stretches(tokens) if known["max_id"] >= limit else ():
        if (above := piece >= limit).any():
            where = start + int(np.argmax(above))
            remedy = again(path.parent)
            if described is None and not (path.parent / "meta.pkl").exists():
                remedy = (
                    f"give --vocab_size {known['max_id'] + 1} if its tokens are not GPT-2's, or {again(path.parent)}"
                )
            raise UserError(
                f"{path}: token {where} has id {int(tokens[where])}, and the vocabulary has {limit}; {remedy}"
            )
    return str(known["sha256"])


def stretches(tokens: Tokens, length: int = 2**24) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """All tokens from first to last, `length` at a time, each stretch with its start."""
    return ((start, tokens[start : start + length]) for start in range(0, len(tokens), length))


def _largest(tokens: Tokens) -> int:
    return max(int(piece.max()) for _, piece in stretches(tokens))


def _scanned(path: Path) -> dict[str, Any]:
    """What is known of the files beside `path`, by name; what is absent or not ours is scanned again."""
    try:
        found = storage.read_json(path.with_name(SCANNED))
    except UserError:
        return {}
    return {
        name: {key: facts[key] for key in FACTS}
        for name, facts in (found.items() if isinstance(found, dict) else ())
        if TOKEN_FILE.fullmatch(name) and isinstance(facts, dict)
        if all(type(facts.get(key)) is kind for key, kind in FACTS.items())
    }


def _remember(path: Path, facts: dict[str, Any]) -> None:
    try:
        storage.write_json(path.with_name(SCANNED), _scanned(path) | {path.name: facts})
    except OSError:
        return  # a read-only data folder is scanned at every start
