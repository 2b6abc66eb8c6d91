"""A run's record, `metrics.jsonl`: one row a line, written as training goes, readable while it goes.

A row holds `step` (updates done), `split` ("train" or "val") and, where they apply, `loss` (nats per token),
`bits_per_byte` (val), `lr`, `grad_norm`, `tokens` (trained on so far), `seconds` (trained for so far) and
`tokens_per_second`. Everything that shows a run (the picture, the page, a tracker) is a view of these rows.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import Failure, UserError
from llm.storage import write_bytes

NAME = "metrics.jsonl"
NUMBERS = ("loss", "bits_per_byte", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second")

Row = dict[str, Any]


def append(run_dir: Path, **row: Any) -> None:
    """Add a row to the record of `run_dir`. A number that is not finite is written as null: JSON has no NaN.

    The row is one write of one line, in the hands of the system when this returns. Raises Failure if it
    cannot be written.
    """
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    line = json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path = run_dir / NAME
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(None, "the disk is full")
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}); make room, then go on with --resume") from None


def cut(run_dir: Path, step: int) -> None:
    """Drop the rows of steps beyond `step`, and a torn last line, so that a run resumed at `step` can go on.

    `cut(run_dir, -1)` empties the record. The file is replaced whole or not at all. Raises UserError as
    `read_record` does, except that a record that is not there stays so.
    """
    path = run_dir / NAME
    if path.exists():
        write_bytes(path, b"".join(line + b"\n" for line, row in _lines(path) if row["step"] <= step))


def read_record(run_dir: Path) -> list[Row]:
    """The rows of a run, each with every key (None where the row has nothing).

    A last line without its line break is left out unless it is whole: its writer was stopped there, or is
    still writing. Raises UserError naming the folder if there is no record, or the line that is damaged.
    """
    return [row for _, row in _lines(run_dir / NAME)]


def _lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line of a record, without its line break, and its row."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent}: no run here (no {NAME}); give the --out_dir of a training run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except ValueError as error:
            if number == len(lines):  # no line break after it: torn
                return
            raise UserError(f"{path}: line {number} is damaged ({error}); repair or remove that line") from None
        yield line, row


def _parse(line: bytes) -> Row:
    """The row in a line; raises ValueError saying what is wrong. NaN, which others write, becomes None."""
    try:
        row = json.loads(line.decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    step, split = row.get("step"), row.get("split")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError("no step")
    if split not in ("train", "val"):
        raise ValueError("split is neither train nor val")
    for key in NUMBERS:
        value = row.setdefault(key, None)
        if value is not None and (type(value) not in (int, float) or not abs(value) < 1e30):
            raise ValueError(f"{key} is not a number")
    return row


def losses(rows: list[Row], split: str) -> list[tuple[int, float]]:
    """(step, loss) of each row of a split that has a loss."""
    return [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]


def best(rows: list[Row]) -> Row | None:
    """The row of the lowest validation loss, the first of equals; None before any evaluation."""
    evaluations = [row for row in rows if row["split"] == "val" and row["loss"] is not None]
    return min(evaluations, key=lambda row: float(row["loss"]), default=None)


def overfits_since(rows: list[Row]) -> int | None:
    """The step of the lowest validation loss, if the run overfits from there on; else None.

    It does if there are at least 2 later evaluations, the last of them is above the lowest by at least
    0.01 nats and 1 %, and the training loss went on falling: its mean over the last interval between
    evaluations is below its mean over the interval before the lowest. (If both rise, the run diverges.)
    Without training rows to compare, validation alone decides.
    """
    low = best(rows)
    if low is None:
        return None
    later = [(step, loss) for step, loss in losses(rows, "val") if step > low["step"]]
    if len(later) < 2 or later[-1][1] < low["loss"] + max(0.01, 0.01 * low["loss"]):
        return None
    interval = later[0][0] - low["step"]
    then, now = (_mean_before(end, interval, losses(rows, "train")) for end in (low["step"], later[-1][0]))
    diverges = then is not None and now is not None and now >= then
    return None if diverges else int(low["step"])


def _mean_before(end: int, interval: int, points: list[tuple[int, float]]) -> float | None:
    """The mean loss of the points of steps in (end - interval, end], None if there are none."""
    inside = [loss for step, loss in points if end - interval < step <= end]
    return math.fsum(inside) / len(inside) if inside else None
