"""A file of JSON lines that grows with a run: rows are appended all or none, cut back on resume, read while it grows.

Each row is an object with a `step` (completed updates). A last line without a line break counts only if it is complete:
its writer was stopped there, or is still writing.
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

Parse = Callable[[bytes], Row]  # raises ValueError with the cause for a damaged line


class Lines:
    """The rows of a run, appended to `path`. With `writes` false, as on all ranks but 0, rows are ignored.

    Rows that a full disk refused wait in memory for the next call.
    """

    def __init__(self, path: Path, parse: Parse, writes: bool = True) -> None:
        self.path = path
        self.parse = parse
        self.writes = writes
        self.added = 0  # rows, written or waiting
        self._written = 0  # rows
        self._waiting = b""

    def add(self, **row: Any) -> None:
        """Add a row, which `catch_up` writes. NaN and infinities become null: JSON does not have them."""
        if not self.writes:
            return
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._waiting += json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.added += 1

    def catch_up(self) -> None:
        """Write the waiting rows, all or none. Raises: OSError."""
        if self._waiting:
            storage.append(self.path, self._waiting)
            self._waiting = b""
            self._written = self.added

    def flush(self, rows: int) -> None:
        """Flush the first `rows` rows to the disk. The saving thread calls this while training adds the next rows.

        Raises: OSError, also if some of these rows are still waiting.
        """
        if self._written < rows:
            raise OSError(errno.ENOSPC, "the rows of the run could not be written", str(self.path))
        if self.path.exists():
            storage.flush(self.path)

    def cut(self, step: int) -> None:
        """Drop the rows of steps beyond `step`, after writing those that wait.

        Raises: OSError; UserError that names a damaged line.
        """
        self.catch_up()
        if self.writes:
            cut(self.path, self.parse, step)


def cut(path: Path, parse: Parse, step: int) -> None:
    """Drop the rows of steps beyond `step` and an incomplete last line. The file is replaced completely or not at all.

    An absent file stays absent. Raises: UserError that names a damaged line.
    """
    if path.exists():
        storage.write_bytes(path, b"".join(line + b"\n" for line, row in read(path, parse) if row["step"] <= step))


def read(path: Path, parse: Parse) -> Iterator[tuple[bytes, Row]]:
    """Yield (the line without its line break, its row) for each line.

    Raises: OSError if the file cannot be read; UserError that names the first damaged line.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            if number == len(lines):  # no line break after it, so its writer was interrupted
                return
            raise UserError(f"{path}: line {number} is damaged ({error}); repair or remove that line") from None
        yield line, row


def parse_object(line: bytes) -> Row:
    """Return the object in a line; NaN and infinities, which other programs write, become None.

    Raises: ValueError for a line that is not JSON, not an object, or has no step.
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
