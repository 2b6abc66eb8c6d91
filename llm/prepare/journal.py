"""The journal of a long preparation: which shards are finished, so that it resumes after a kill.

During a preparation its files are in `.partial/` of the data folder, and `.partial.json` lists the finished shards and
where in the text the next one begins. Nothing there is trusted: a shard counts only if its SHA-256 matches.
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError
from llm.tokens.saved_tokenizer import hash_content, load_tokenizer
from llm.tokens.token_files import SPLITS, shard_name
from llm.tokens.tokenizer import Tokenizer

NAME = ".partial.json"


Key = dict[str, Any]  # text and settings: a preparation resumes only one with the same key


# split, tokens, bytes (of text), max_id, sha256, next (character and token where the next shard begins)
Shard = dict[str, Any]


SHARD_FIELDS = ("split", "tokens", "bytes", "max_id", "sha256", "next")


@dataclass
class Journal:
    """The finished shards of both splits, in their order."""

    folder: Path | None  # where the journal is written; None for a text too small for a journal
    key: Key
    tokenizer: Tokenizer
    shards: list[Shard]

    def shards_of(self, split: str) -> list[Shard]:
        """Return the finished shards of one split."""
        return [shard for shard in self.shards if shard["split"] == split]

    def add(self, shard: Shard) -> None:
        """Record a finished shard, in memory and on disk."""
        self.shards.append(shard)
        self.write()

    def write(self) -> None:
        """Write the journal, if it has a folder."""
        if self.folder:
            facts = {"key": self.key, "tokenizer": hash_content(self.tokenizer.to_json()), "shards": self.shards}
            storage.write_json(self.folder / NAME, facts)


def read_tokenizer(folder: Path, key: Key) -> Tokenizer | None:
    """Return the tokenizer of an interrupted preparation with the same `key`; training it may have taken minutes."""
    try:
        facts = storage.read_json(folder / NAME)
        tokenizer = load_tokenizer(folder / storage.KEPT / "tokenizer.json")
        return tokenizer if _matches(facts, key, tokenizer) else None
    except (UserError, KeyError, TypeError):  # there is no journal, or it is damaged
        return None


def read_finished_shards(folder: Path, key: Key, tokenizer: Tokenizer) -> list[Shard] | None:
    """Return the shards that an interrupted preparation finished, up to the first that is missing or damaged.

    None if there is no preparation with the same `key` and `tokenizer`.
    """
    try:
        facts = storage.read_json(folder / NAME)
        if not _matches(facts, key, tokenizer):
            return None
        shards = [_check_shard(shard) for shard in facts["shards"]]
    except (UserError, KeyError, TypeError):
        return None
    intact = []
    numbers = {split: itertools.count() for split in SPLITS}
    for shard in shards:
        split = shard["split"]
        path = folder / storage.KEPT / shard_name(split, next(numbers[split]))
        if not path.is_file() or storage.sha256(path) != shard["sha256"]:
            break
        intact.append(shard)
    return intact


def discard(folder: Path) -> bool:
    """Remove the files of an interrupted preparation, and return whether it had a journal."""
    journal = folder / NAME
    had_journal = journal.exists()
    journal.unlink(missing_ok=True)
    if (folder / storage.KEPT).exists():
        shutil.rmtree(folder / storage.KEPT)
    return had_journal


def count_bytes(folder: Path) -> int:
    """Return the bytes on disk of an interrupted preparation of `folder`."""
    partial = folder / storage.KEPT
    if not partial.is_dir():
        return 0
    return sum(path.stat().st_size for path in partial.iterdir())


def _matches(facts: Any, key: Key, tokenizer: Tokenizer) -> bool:
    key_as_read = json.loads(json.dumps(key))  # a tuple becomes a list
    is_same_tokenizer = facts["tokenizer"] == hash_content(tokenizer.to_json())
    return bool(facts["key"] == key_as_read and is_same_tokenizer)


def _check_shard(shard: Any) -> Shard:
    """Return the fields of a shard in a journal. Raises KeyError or TypeError if it has others."""
    numbers = [shard["tokens"], shard["bytes"], shard["max_id"], *shard["next"]]
    are_counts = all(type(number) is int and number >= 0 for number in numbers)
    if shard["split"] not in SPLITS or len(numbers) != 5 or not are_counts:
        raise TypeError(shard)
    return {field: shard[field] for field in SHARD_FIELDS}
