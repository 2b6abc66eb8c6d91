"""What is finished of a long preparation, so that after a kill it goes on from there.

While it is made, its files are in `.partial/` of the data folder, and `.partial.json` says which shards are whole and
where in the text the next one begins. Nothing there is believed: a shard counts while it has its SHA-256.
"""

import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import SPLITS, shard_name
from llm.tokens.tokenizer import Tokenizer

NAME = ".partial.json"


Key = dict[str, Any]  # text and settings: what has to be the same


Shard = dict[str, Any]  # split, tokens, bytes (of text), max_id, sha256; next: character and token of the next one


@dataclass
class Journal:
    """The finished shards of both splits, in their order. Kept in `folder`; None for a text too small for that."""

    folder: Path | None
    key: Key
    tokenizer: Tokenizer
    shards: list[Shard]

    def of(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard["split"] == split]

    def add(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.write()

    def write(self) -> None:
        if self.folder:
            facts = {"key": self.key, "tokenizer": _sum(self.tokenizer), "shards": self.shards}
            storage.write_json(self.folder / NAME, facts)


def tokenizer_of(folder: Path, key: Key) -> Tokenizer | None:
    """The tokenizer of an interrupted preparation by the same `key`: it may have taken minutes to train."""
    try:
        found = storage.read_json(folder / NAME)
        tokenizer = load_tokenizer(folder / storage.KEPT / "tokenizer.json")
        return tokenizer if found["key"] == _as_read(key) and found["tokenizer"] == _sum(tokenizer) else None
    except (UserError, KeyError, TypeError):  # none, or none of ours
        return None


def shards_of(folder: Path, key: Key, tokenizer: Tokenizer) -> list[Shard] | None:
    """The shards that an interrupted preparation by the same `key` and `tokenizer` finished, up to the first that is
    not what it was; None where there is no such preparation."""
    try:
        found = storage.read_json(folder / NAME)
        if found["key"] != _as_read(key) or found["tokenizer"] != _sum(tokenizer):
            return None
        shards = [_checked(shard) for shard in found["shards"]]
    except (UserError, KeyError, TypeError):
        return None
    counted = {split: itertools.count() for split in SPLITS}
    named = [(folder / storage.KEPT / shard_name(s["split"], next(counted[s["split"]])), s["sha256"]) for s in shards]
    whole = itertools.takewhile(lambda file: file[0].is_file() and storage.sha256(file[0]) == file[1], named)
    return shards[: len(list(whole))]


def discard(folder: Path) -> bool:
    """Remove what an interrupted preparation left; whether it had come as far as a journal."""
    there = (folder / NAME).exists()
    (folder / NAME).unlink(missing_ok=True)
    if (folder / storage.KEPT).exists():
        shutil.rmtree(folder / storage.KEPT)
    return there


def held(folder: Path) -> int:
    """Bytes on the disk that an interrupted preparation of `folder` takes."""
    partial = folder / storage.KEPT
    return sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0


def _checked(shard: Any) -> Shard:
    """Raises KeyError or TypeError for what is no entry of a journal."""
    numbers = [shard["tokens"], shard["bytes"], shard["max_id"], *shard["next"]]
    if shard["split"] not in SPLITS or len(numbers) != 5 or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(shard)
    return {key: shard[key] for key in ("split", "tokens", "bytes", "max_id", "sha256", "next")}


def _as_read(key: Key) -> Any:
    return json.loads(json.dumps(key))


def _sum(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
