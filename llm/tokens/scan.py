"""Scan a token file from first to last: the largest id and the SHA-256, remembered while size and time are the same."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm import storage
from llm.errors import UserError
from llm.tokens.remedies import again

SCANNED = "scanned.json"  # the results of scans, valid while size and time of a file are the same


TOKEN_FILE = re.compile(r"(?:train|val)(?:-\d{5,})?\.bin")


FACTS = {"size": int, "mtime_ns": int, "max_id": int, "sha256": str}  # known of a file, with their types


def check_ids(path: Path, tokens: npt.NDArray[Any], limit: int, described: dict[str, Any] | None) -> str:
    """Check that a file is as `described` and that its ids are below `limit`; return its SHA-256.

    The file is scanned only if its size or time differs from that of the last scan, which `scanned.json` holds.
    """
    info = path.stat()
    if described and described["mtime_ns"] == info.st_mtime_ns and described["max_id"] < limit:
        return str(described["sha256"])
    stamp = {"size": info.st_size, "mtime_ns": info.st_mtime_ns}
    known = _read_scans(path).get(path.name)
    if known is None or any(known[key] != value for key, value in stamp.items()):
        known = stamp | {"max_id": largest_id(tokens), "sha256": storage.sha256(path)}
        _remember_scan(path, known)
    if described and known["sha256"] != described["sha256"]:
        raise UserError(f"{path}: changed since it was prepared (SHA-256 differs); {again(path.parent)}")
    if known["max_id"] >= limit:
        _refuse_large_id(path, tokens, limit, known["max_id"], is_foreign=described is None)
    return str(known["sha256"])


def iterate_chunks(tokens: Any, length: int = 2**24) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield all tokens from first to last, `length` at a time: (the index of the first, the tokens)."""
    for start in range(0, len(tokens), length):
        yield start, tokens[start : start + length]


def largest_id(tokens: npt.NDArray[Any]) -> int:
    """Return the largest id of a file that is not empty."""
    return max(int(chunk.max()) for _, chunk in iterate_chunks(tokens))


def _refuse_large_id(path: Path, tokens: npt.NDArray[Any], limit: int, max_id: int, is_foreign: bool) -> None:
    """Raise UserError naming the first id that is not below `limit`, if there is one: scanned.json may be wrong."""
    for start, chunk in iterate_chunks(tokens):
        is_large = chunk >= limit
        if not is_large.any():
            continue
        place = start + int(np.argmax(is_large))
        remedy = again(path.parent)
        if is_foreign and not (path.parent / "meta.pkl").exists():
            remedy = f"give --vocab_size {max_id + 1} if its tokens are not GPT-2's, or {remedy}"
        raise UserError(f"{path}: token {place} has id {int(tokens[place])}, and the vocabulary has {limit}; {remedy}")


def _read_scans(path: Path) -> dict[str, Any]:
    """Return what is known of the files beside `path`, by name, without entries that are damaged."""
    known = {}
    for name, facts in storage.read_facts(path.with_name(SCANNED)).items():
        if TOKEN_FILE.fullmatch(name) and isinstance(facts, dict) and _has_fact_types(facts):
            known[name] = {key: facts[key] for key in FACTS}
    return known


def _has_fact_types(facts: dict[str, Any]) -> bool:
    return all(type(facts.get(key)) is kind for key, kind in FACTS.items())


def _remember_scan(path: Path, facts: dict[str, Any]) -> None:
    try:
        storage.write_json(path.with_name(SCANNED), _read_scans(path) | {path.name: facts})
    except OSError:
        return  # a read-only data folder is scanned at every start
