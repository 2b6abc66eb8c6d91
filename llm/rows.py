"""Texts that stand in the rows of a file, one in each: JSON Lines and Parquet, read from first to last."""

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

from llm.errors import UserError

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (*LINES, ".parquet")
FIELD = "text"
LONGEST = 2**27  # bytes of a line: it is held whole
AT_ONCE = 256  # rows of a Parquet file held together
SAMPLE = 2**24  # bytes of text by which the rest is judged


def in_rows(path: Path) -> bool:
    """Whether the name says so."""
    return path.name.lower().endswith(SUFFIXES)


def read_rows(path: Path, label: str) -> Iterator[str]:
    """The texts in their order. Raises UserError naming `label`, the line or row, and the field that is not a text."""
    return (text for text, _ in _lines(path, label)) if _is_lines(path) else _parquet(path, label)


def text_bytes(path: Path, label: str) -> int:
    """About how many bytes of text (UTF-8) the rows hold, judged by the first of them: they may be compressed, and hold
    more than their text. Raises UserError as `read_rows` does.
    """
    done = 0
    if _is_lines(path):
        for text, file in _lines(path, label):
            done += len(text.encode())
            if done >= SAMPLE:
                return done * path.stat().st_size // file.tell()
        return done
    for number, text in enumerate(_parquet(path, label), 1):
        done += len(text.encode())
        if done >= SAMPLE:
            from pyarrow import parquet

            return done * int(parquet.read_metadata(path).num_rows) // number
    return done


def _is_lines(path: Path) -> bool:
    return path.name.lower().endswith(LINES)


def _lines(path: Path, label: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The texts, each with the file on the disk as far as it was read for it."""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.name.lower().endswith(".gz") else raw as file:
            for number in count(1):
                line = file.readline(LONGEST + 1)
                if not line:
                    return
                if len(line) > LONGEST:
                    raise UserError(f"{label}: line {number}: longer than {LONGEST} bytes; break it up")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.isspace():
                    yield _text_of(line, f"{label}: line {number}"), raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{label}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _text_of(line: bytes, where: str) -> str:
    remedy = f'each line has to be a JSON object with a text, such as {{"{FIELD}": "…"}}'
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at its byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {_kind(row)}, not an object; {remedy}")
    if FIELD not in row:
        there = ", ".join(sorted(map(str, row))[:5])[:80] or "none"
        raise UserError(f'{where}: no field "{FIELD}" (its fields: {there}); {remedy}')
    if not isinstance(text := row[FIELD], str):
        raise UserError(f'{where}: field "{FIELD}" is a {_kind(text)}, not a text; {remedy}')
    if b"\\u" in line:  # only an escape can make half a surrogate pair
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: field "{FIELD}" holds a lone surrogate (U+{ord(text[error.start]):04X}), '
                "which is not a character; remove it"
            ) from None
    return text


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def _parquet(path: Path, label: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{label}: Parquet needs pyarrow; install it with: pip install 'losscurve[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if FIELD not in names:
                there = ", ".join(map(str, names[:5]))[:80] or "none"
                raise UserError(f'{label}: no column "{FIELD}" (its columns: {there}); rename the one with the text')
            rows = (row for batch in file.iter_batches(AT_ONCE, columns=[FIELD]) for row in batch[0].to_pylist())
            for number, text in enumerate(rows, 1):
                if not isinstance(text, str):
                    raise UserError(f'{label}: row {number}: column "{FIELD}" is a {_kind(text)}, not a text')
                yield text
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8 among others
        words = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{label}: cannot be read as Parquet ({words[:200]})") from None
