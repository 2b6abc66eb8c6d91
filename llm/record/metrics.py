"""A run's record, `metrics.jsonl`: one row a line, written as training goes, readable while it goes.

A row holds `step` (batches done), `split` ("train" or "val") and, where they apply, `loss` (nats per token),
`bits_per_byte` (val), `lr`, `grad_norm`, `tokens` (in those batches), `seconds` (trained for so far),
`tokens_per_second`, `mfu` (model FLOP utilisation: the share of the matrix rate measured on this machine) and
`data_seconds` (that making the batches took, since the training row before);
only where there are any, `refused` (steps whose batch gave a number that is not finite, and made no update) and
`spikes` (steps whose loss leapt). Everything that shows a run (the picture, the page, a tracker) is a view of
these rows.
"""

import math
import statistics
from pathlib import Path

from llm.errors import UserError
from llm.storage import lines
from llm.storage.lines import Lines, Row, parse_object

NAME = "metrics.jsonl"


SPIKE_HISTORY = 50  # steps that a leap of the loss is judged by


NUMBERS = ("loss", "bits_per_byte", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "mfu", "data_seconds")


class Record(Lines):
    """The record of the run in `run_dir`."""

    def __init__(self, run_dir: Path, writes: bool = True) -> None:
        super().__init__(run_dir / NAME, parse_row, writes)


def cut(run_dir: Path, step: int) -> None:
    """Drop the rows of steps beyond `step` and a torn last line, so that a run resumed at `step` can go on.

    A record that is not there stays absent. Raises UserError that names a damaged line.
    """
    lines.cut(run_dir / NAME, parse_row, step)


def read_record(run_dir: Path) -> list[Row]:
    """Return the rows of a run, each with every key (None where the row has nothing).

    Raises UserError that names the folder without a record, or the line that is damaged.
    """
    path = run_dir / NAME
    try:
        return [row for _, row in lines.read(path, parse_row)]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent}: no run here (no {NAME}); give the folder of a training run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def parse_row(line: bytes) -> Row:
    """Return the row in a line. Raises ValueError that says what is wrong with it."""
    row = parse_object(line)
    if row.get("split") not in ("train", "val"):
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
