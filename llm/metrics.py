"""A run's record, `metrics.jsonl`: one row a line, written as training goes, readable while it goes.

A row holds `step` (batches done), `split` ("train" or "val") and, where they apply, `loss` (nats per token),
`bits_per_byte` (val), `lr`, `grad_norm`, `tokens` (in those batches), `seconds` (trained for so far),
`tokens_per_second`, `mfu` (model FLOP utilisation: the share of the matrix rate measured on this machine) and
`data_seconds` (that making the batches took, since the training row before);
only where there are any, `refused` (steps whose batch gave a number that is not finite, and made no update) and
`spikes` (steps whose loss leapt). Everything that shows a run (the picture, the page, a tracker) is a view of
these rows.
"""

import errno
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError

NAME = "metrics.jsonl"
SPIKE_HISTORY = 50  # steps that a leap of the loss is judged by
NUMBERS = ("loss", "bits_per_byte", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "mfu", "data_seconds")

Row = dict[str, Any]


class Record:
    """Writes the record of `run_dir`, or does nothing where another process does. Rows that a full disk refused wait,
    and go with the next.
    """

    def __init__(self, run_dir: Path, writes: bool = True) -> None:
        self.path, self.writes, self._waiting = run_dir / NAME, writes, b""
        self.added = self._written = 0  # rows

    def add(self, **row: Any) -> None:
        """A row to be written. A number that is not finite becomes null: JSON has no NaN."""
        if not self.writes:
            return
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._waiting += json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.added += 1

    def catch_up(self) -> None:
        """Write the rows that wait, all or none. Raises OSError."""
        if self._waiting:
            storage.append(self.path, self._waiting)
            self._waiting, self._written = b"", self.added

    def flush(self, rows: int) -> None:
        """Put the first `rows` rows added on the disk. Raises OSError, also if some of them still wait. The thread that
        saves calls it, while the next rows are added.
        """
        if self._written < rows:
            raise OSError(errno.ENOSPC, "its record could not be written", str(self.path))
        storage.flush(self.path)

    def cut(self, step: int) -> None:
        """Drop the rows of steps beyond `step`, as `cut` does, and those that wait."""
        self.catch_up()
        if self.writes:
            cut(self.path.parent, step)


def cut(run_dir: Path, step: int) -> None:
    """Drop the rows of steps beyond `step`, and a torn last line, so that a run resumed at `step` can go on.

    `cut(run_dir, -1)` empties the record. The file is replaced whole or not at all. Raises UserError as
    `read_record` does, except that a record that is not there stays so.
    """
    path = run_dir / NAME
    if path.exists():
        storage.write_bytes(path, b"".join(line + b"\n" for line, row in _lines(path) if row["step"] <= step))


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
        raise UserError(f"{path.parent}: no run here (no {NAME}); give the folder of a training run") from None
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


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether a step's loss leaps out of those `before` it: above their median by half a nat and by
    six times their spread (1.4826 times the median distance from the median, which leaps do not move)."""
    if len(before) < SPIKE_HISTORY // 2:
        return False
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return loss - middle > max(0.5, 6 * spread)


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
