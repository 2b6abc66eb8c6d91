"""meta.json: the description of a folder of token files, and the hashes by which a text is recognised later."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llm import storage
from llm.text.corpus import Corpus, Survey
from llm.tokens.tokenizer import Tokenizer

FORMAT = "losscurve tokens"


VERSION = 1


LISTED = 1000  # files that meta.json names; it has a hash of all of them


def build_meta(
    folder: Path,
    tokenizer: Tokenizer,
    source: Corpus,
    survey: Survey,
    splits: dict[str, dict[str, Any]],
    vocab_used: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of meta.json for the token files and the tokenizer.json of `folder`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": storage.sha256(folder / "tokenizer.json"),
        },
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "max_id": max(split["max_id"] for split in splits.values()),
        "end_of_text": tokenizer.end_of_text,
        "vocab_used": vocab_used,
        "splits": splits,
        "source": _describe_source(source, survey),
        "settings": settings,
    }


def hash_ends(survey: Survey) -> str:
    """Return the hash of where files end in a text, because an end-of-text stands there."""
    return hashlib.sha256(repr(survey.characters).encode()).hexdigest()


def hash_stamps(stamps: list[dict[str, Any]]) -> str:
    """Return the hash of the stamps of files."""
    return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()


def _describe_source(source: Corpus, survey: Survey) -> dict[str, Any]:
    stamps = source.stamps()
    return {
        "name": source.name,
        "files": stamps[:LISTED],
        "more": len(stamps[LISTED:]),
        "stamps": hash_stamps(stamps),
        "documents": survey.documents,
        "bytes": survey.bytes,
        "characters": survey.total,
        "sha256": survey.sha256,
        "ends": hash_ends(survey),
    }
