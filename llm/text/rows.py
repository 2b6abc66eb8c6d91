"""Texts in the rows of a file, one document a row: JSON Lines and Parquet, read from first to last.

`label` is the name of a file in messages; `field` is the JSON field or Parquet column that holds the text.
"""

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm.errors import UserError
from llm.text import compressed, recognise
from llm.text.encodings import describe_not_utf8

JSON_SUFFIXES = (".jsonl", ".ndjson")


LINE_SUFFIXES = tuple(suffix + packed for packed in ("", *compressed.SUFFIXES) for suffix in JSON_SUFFIXES)


SUFFIXES = (*LINE_SUFFIXES, ".parquet")


FIELD = "text"


# Names under which texts are often found, the likeliest first
USUAL_FIELDS = (
    "content",
    "body",
    "document",
    "article",
    "story",
    "raw_content",
    "completion",
    "output",
    "sentence",
)


LONGEST = 2**27  # bytes of a line: a line is held in memory whole


BATCH_ROWS = 256  # rows of a Parquet file in memory at once


SAMPLE = 2**24  # bytes of text from which the size of the rest is estimated


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def has_rows(path: Path) -> bool:
    """Whether the name of a file is that of a file of rows."""
    return path.name.lower().endswith(SUFFIXES)


def read_rows(path: Path, label: str, field: str = FIELD) -> Iterator[str]:
    """Return an iterator over the texts of `field`, in their order.

    Raises:
        UserError: names `label`, the line or row, and the field that does not hold a text.
    """
    if _has_lines(path):
        return (text for text, _ in _read_lines(path, label, field))
    return _read_parquet(path, label, field)


def estimate_text_bytes(path: Path, label: str, field: str = FIELD) -> int:
    """Estimate how many bytes of text (UTF-8) the rows hold, from the first SAMPLE bytes of text.

    The size of the file is not enough: it may be compressed, and rows may hold more than their text.

    Raises:
        UserError: as `read_rows` does.
    """
    if _has_lines(path):
        return _estimate_lines(path, label, field)
    return _estimate_parquet(path, label, field)


def _estimate_lines(path: Path, label: str, field: str) -> int:
    text_bytes = 0
    for text, raw in _read_lines(path, label, field):
        text_bytes += len(text.encode())
        if text_bytes >= SAMPLE:
            return text_bytes * path.stat().st_size // raw.tell()
    return text_bytes


def _estimate_parquet(path: Path, label: str, field: str) -> int:
    text_bytes = 0
    for row_count, text in enumerate(_read_parquet(path, label, field), 1):
        text_bytes += len(text.encode())
        if text_bytes >= SAMPLE:
            from pyarrow import parquet

            return text_bytes * int(parquet.read_metadata(path).num_rows) // row_count
    return text_bytes


def _has_lines(path: Path) -> bool:
    return path.name.lower().endswith(LINE_SUFFIXES)


def _read_lines(path: Path, label: str, field: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield each text with the raw file, whose position says how much was read for it."""
    with compressed.open_decompressed(path, label) as (file, raw):
        shell_name = str(path)
        recognise.check_format(file.read(recognise.HEAD), label, shell_name)
        file.seek(0)
        is_first = True
        for number in itertools.count(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise UserError(f"{label}: line {number}: longer than {LONGEST} bytes; split it into several rows")
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.isspace():
                continue
            yield _parse_line(line, f"{label}: line {number}", field, shell_name, is_first), raw
            is_first = False


def _parse_line(line: bytes, where: str, field: str, shell_name: str, is_first: bool) -> str:
    """Return the text of a JSON line; `where` names the line, and the first line gets a hint at the field."""
    example = json.dumps({field: "…"}, ensure_ascii=False)
    remedy = f"each line has to be a JSON object with a text, such as {example}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        cause = describe_not_utf8(line, error.start, shell_name)
        raise UserError(f"{where}: not UTF-8 at its byte {error.start}: {cause}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {_json_type(row)}, not an object; {remedy}")
    if field not in row:
        names = _list_names(sorted(map(str, row)))
        hint = _suggest_field(row) if is_first else ""
        raise UserError(f'{where}: no field "{field}" (its fields: {names}); {hint or remedy}')
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f'{where}: field "{field}" is {_json_type(text)}, not a text; {remedy}')
    if b"\\u" in line:  # only an escape can write half of a surrogate pair
        _check_surrogates(text, where, field)
    return text


def _check_surrogates(text: str, where: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f'{where}: field "{field}" holds a lone surrogate (U+{ord(text[error.start]):04X}), '
            "which is not a character; remove it"
        ) from None


def _list_names(names: list[str]) -> str:
    """Return the first of the names, within 80 characters."""
    return ", ".join(names[:5])[:80] or "none"


def _suggest_field(row: dict[str, Any]) -> str:
    """Return a hint at the flag for the field that is likely meant, "" if no field of `row` holds a text.

    The likely one has a usual name, else the longest text.
    """
    lengths = {name: len(value) for name, value in row.items() if isinstance(value, str)}
    if not any(lengths.values()):
        return ""
    usual = [name for name in USUAL_FIELDS if name in lengths]
    name = usual[0] if usual else max(lengths, key=lambda key: lengths[key])
    separator = "=" if name.startswith("-") else " "
    return f"name the field with the text, perhaps: --text_field{separator}{shlex.quote(name)}"


def _json_type(value: Any) -> str:
    """Return the JSON type of `value`, with its article."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read_parquet(path: Path, label: str, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{label}: Parquet needs the pyarrow package; install it with: pip install 'losscurve[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(file, label, field)
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
                for text in batch[0].to_pylist():
                    number += 1
                    if isinstance(text, bytes):  # of a writer that does not say that its bytes are text
                        try:
                            text = text.decode()
                        except UnicodeDecodeError:
                            raise UserError(f'{label}: row {number}: column "{field}" is not UTF-8') from None
                    if not isinstance(text, str):
                        raise UserError(f'{label}: row {number}: column "{field}" is {_json_type(text)}, not a text')
                    yield text
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: among others, text that is not UTF-8
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{label}: cannot be read as Parquet ({cause[:200]})") from None


def _check_column(file: Any, label: str, field: str) -> None:
    """Raise UserError if an open Parquet file has no column `field`."""
    names = file.schema_arrow.names
    if field in names:
        return
    first_batch = next(file.iter_batches(1), None)
    first_row = {} if first_batch is None else first_batch.to_pylist()[0]
    remedy = _suggest_field(first_row) or "name the column with the text with --text_field"
    raise UserError(f'{label}: no column "{field}" (its columns: {_list_names(list(map(str, names)))}); {remedy}')
