"""A file of JSON lines that grows with a run: appended whole or not at all, cut back to a step, read while it grows.

Each row is an object with a `step` (completed steps). A last line without its line break is left out unless it is
whole: its writer was stopped there, or is still writing.
"""

import errno
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError

Row = dict[str, Any]


Parse = Callable[[bytes], Row]  # raises ValueError that says what is wrong with a line


class Lines:
    """Append rows to `path`, or do nothing where another process does. Rows that a full disk refused wait for the next
    call."""

    def __init__(self, path: Path, parse: Parse, writes: bool = True) -> None:
        self.path, self.parse, self.writes = path, parse, writes
        self.added = 0  # rows, written or waiting
        self._written = 0  # rows
        self._waiting = b""

    def add(self, **row: Any) -> None:
        """Add a row, to be written by `catch_up`. A number that is not finite becomes null: JSON has no NaN."""
        if not self.writes:
            return
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._waiting += json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.added += 1

    def catch_up(self) -> None:
        """Write the rows that wait, all or none. Raises OSError."""
        if self._waiting:
            storage.append(self.path, self._waiting)
            self._waiting = b""
            self._written = self.added

    def flush(self, rows: int) -> None:
        """Flush the first `rows` rows to the disk. The thread that saves calls it while the next rows are added.

        Raises OSError, also if some of these rows still wait.
        """
        if self._written < rows:
            raise OSError(errno.ENOSPC, "its record could not be written", str(self.path))
        if self.path.exists():
            storage.flush(self.path)

    def cut(self, step: int) -> None:
        """Drop the rows of steps beyond `step`, and those that wait.

        Raises OSError, and UserError for a damaged line.
        """
        self.catch_up()
        if self.writes:
            cut(self.path, self.parse, step)


def cut(path: Path, parse: Parse, step: int) -> None:
    """Drop the rows of steps beyond `step` and a torn last line. The file is replaced whole or not at all.

    A file that is not there stays absent. Raises UserError that names a damaged line.
    """
    if path.exists():
        storage.write_bytes(path, b"".join(line + b"\n" for line, row in read(path, parse) if row["step"] <= step))


def read(path: Path, parse: Parse) -> Iterator[tuple[bytes, Row]]:
    """Yield each line, without its line break, and its row.

    Raises OSError where the file cannot be read, and UserError that names the first damaged line.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            if number == len(lines):  # no line break after it: torn
                return
            raise UserError(f"{path}: line {number} is damaged ({error}); repair or remove that line") from None
        yield line, row


def parse_object(line: bytes) -> Row:
    """Return the object in a line; NaN, which other programs write, becomes None.

    Raises ValueError for what is not JSON, not an object, or has no step.
    """
    try:
        row = json.loads(line.decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
        raise ValueError("no step")
    return row
