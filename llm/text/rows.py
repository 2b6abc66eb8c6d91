"""Texts that stand in the rows of a file, one in each: JSON Lines and Parquet, read from first to last."""

import json
import shlex
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

from llm.errors import UserError
from llm.text import compressed, recognise

LINES = tuple(ending + packed for packed in ("", *compressed.SUFFIXES) for ending in (".jsonl", ".ndjson"))


SUFFIXES = (*LINES, ".parquet")


FIELD = "text"


USUAL = ("content", "body", "document", "article", "story", "raw_content", "completion", "output", "sentence")


LONGEST = 2**27  # bytes of a line: it is held whole


AT_ONCE = 256  # rows of a Parquet file held together


SAMPLE = 2**24  # bytes of text by which the rest is judged


def in_rows(path: Path) -> bool:
    """Whether the name says so."""
    return path.name.lower().endswith(SUFFIXES)


def read_rows(path: Path, label: str, field: str = FIELD) -> Iterator[str]:
    """The texts of `field` in their order. Raises UserError naming `label`, the line or row, and the field that is not
    a text.
    """
    return (text for text, _ in _lines(path, label, field)) if _is_lines(path) else _parquet(path, label, field)


def text_bytes(path: Path, label: str, field: str = FIELD) -> int:
    """About how many bytes of text (UTF-8) the rows hold, judged by the first of them: they may be compressed, and hold
    more than their text. Raises UserError as `read_rows` does.
    """
    done = 0
    if _is_lines(path):
        for text, file in _lines(path, label, field):
            done += len(text.encode())
            if done >= SAMPLE:
                return done * path.stat().st_size // file.tell()
        return done
    for number, text in enumerate(_parquet(path, label, field), 1):
        done += len(text.encode())
        if done >= SAMPLE:
            from pyarrow import parquet

            return done * int(parquet.read_metadata(path).num_rows) // number
    return done


def _is_lines(path: Path) -> bool:
    return path.name.lower().endswith(LINES)


def _lines(path: Path, label: str, field: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The texts, each with the file on the disk as far as it was read for it."""
    with compressed.opened(path, label) as (file, raw):
        name = str(path)
        recognise.check_format(file.read(recognise.HEAD), label, name)
        file.seek(0)
        read = False
        for number in count(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise UserError(f"{label}: line {number}: longer than {LONGEST} bytes; break it up")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                yield _text_of(line, f"{label}: line {number}", field, name, first=not read), raw
                read = True


def _text_of(line: bytes, where: str, field: str, name: str, first: bool) -> str:
    remedy = f"each line has to be a JSON object with a text, such as {json.dumps({field: '…'}, ensure_ascii=False)}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        cause = recognise.not_utf8(line, error.start, name)
        raise UserError(f"{where}: not UTF-8 at its byte {error.start}: {cause}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {_kind(row)}, not an object; {remedy}")
    if field not in row:
        there = ", ".join(sorted(map(str, row))[:5])[:80] or "none"
        likely = _likely({key: len(value) for key, value in row.items() if isinstance(value, str)}) if first else ""
        raise UserError(f'{where}: no field "{field}" (its fields: {there}); {likely or remedy}')
    if not isinstance(text := row[field], str):
        raise UserError(f'{where}: field "{field}" is a {_kind(text)}, not a text; {remedy}')
    if b"\\u" in line:  # only an escape can make half a surrogate pair
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: field "{field}" holds a lone surrogate (U+{ord(text[error.start]):04X}), '
                "which is not a character; remove it"
            ) from None
    return text


def _likely(lengths: dict[str, int]) -> str:
    """The flag that names the field most likely meant, of those that hold texts of such lengths; "" if there are none.

    A usual name, else the longest text.
    """
    usual = [name for name in USUAL if name in lengths]
    if not lengths or not max(lengths.values()):
        return ""
    name = usual[0] if usual else max(lengths, key=lambda key: lengths[key])
    equals = "=" if name.startswith("-") else " "
    return f"name the one with the text, perhaps: --text_field{equals}{shlex.quote(name)}"


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def _parquet(path: Path, label: str, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{label}: Parquet needs pyarrow; install it with: pip install 'losscurve[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                there = ", ".join(map(str, names[:5]))[:80] or "none"
                first: dict[str, Any] = next((batch.to_pylist()[0] for batch in file.iter_batches(1)), {})
                likely = _likely({key: len(value) for key, value in first.items() if isinstance(value, str)})
                remedy = likely or "name the one with the text with --text_field"
                raise UserError(f'{label}: no column "{field}" (its columns: {there}); {remedy}')
            rows = (row for batch in file.iter_batches(AT_ONCE, columns=[field]) for row in batch[0].to_pylist())
            for number, text in enumerate(rows, 1):
                if not isinstance(text, str):
                    raise UserError(f'{label}: row {number}: column "{field}" is a {_kind(text)}, not a text')
                yield text
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8 among others
        words = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{label}: cannot be read as Parquet ({words[:200]})") from None
