"""Read and write a run's record, `metrics.jsonl`: one JSON object a line, appended during training.

Every row has `step` (completed steps) and `split` ("train" or "val"). Where they apply, it also has:

- `loss`: mean cross-entropy, in nats per token
- `bits_per_byte`: the same loss per byte of text (validation rows only)
- `lr`: learning rate of the next update
- `grad_norm`: gradient norm before clipping
- `tokens`: tokens trained on so far
- `seconds`: training time so far
- `tokens_per_second`: throughput of the steps since the previous training row
- `matmul_utilisation`: achieved FLOP/s as a share of the matrix-multiplication rate measured on this machine. It is
  not MFU, which divides by the vendor's peak.
- `data_seconds`: seconds spent on making batches since the previous training row
- `val_loss_ema`: mean cross-entropy of the average of the weights, in nats per token (validation rows of a run with
  `ema` only)
- `max_steps`: the steps of the run from here on (only where a run for a given time got other steps, in a training row
  without a loss)
- `refused`: steps without an update, because their loss or gradient was not finite (only if there are any)
- `spikes`: steps whose loss spiked (only if there are any)

The loss curve, the live page and the trackers are views of these rows. Unknown keys are ignored: older records have
`mfu` in place of `matmul_utilisation`.
"""

import math
import statistics
from pathlib import Path

from llm.errors import UserError, no_run
from llm.storage import lines
from llm.storage.lines import Lines, Row, parse_object

NAME = "metrics.jsonl"
SPIKE_HISTORY = 50  # previous steps that a spike is judged against
NUMBERS = (
    "loss",
    "bits_per_byte",
    "lr",
    "grad_norm",
    "tokens",
    "seconds",
    "tokens_per_second",
    "matmul_utilisation",
    "data_seconds",
    "val_loss_ema",
)


class Record(Lines):
    """The record of the run in `run_dir`."""

    def __init__(self, run_dir: Path, writes: bool = True) -> None:
        super().__init__(run_dir / NAME, parse_row, writes)


def read_record(run_dir: Path) -> list[Row]:
    """Return the rows of a run. Every row has all keys of NUMBERS; a missing value is None.

    Raises:
        UserError: the folder has no record, or a line is damaged; the message names it.
    """
    path = run_dir / NAME
    try:
        return [row for _, row in lines.read(path, parse_row)]
    except (FileNotFoundError, NotADirectoryError):
        raise no_run(run_dir, NAME) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def parse_row(line: bytes) -> Row:
    """Return the row that a line holds.

    Raises:
        ValueError: the line is not a row; the message names the field.
    """
    row = parse_object(line)
    if row.get("split") not in ("train", "val"):
        raise ValueError("split is neither train nor val")
    for key in NUMBERS:
        value = row.setdefault(key, None)
        if value is not None and (type(value) not in (int, float) or not abs(value) < 1e30):
            raise ValueError(f"{key} is not a number")
    return row


def is_spike(loss: float, before: list[float]) -> bool:
    """Return whether `loss` is a spike relative to the losses `before` it.

    A spike is above their median by half a nat and by six standard deviations. The standard deviation is estimated as
    1.4826 times the median absolute deviation, which earlier spikes do not inflate.
    """
    if len(before) < SPIKE_HISTORY // 2:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
    return loss - median > max(0.5, 6 * deviation)


def losses(rows: list[Row], split: str) -> list[tuple[int, float]]:
    """Return (step, loss) of each row of a split that has a loss."""
    return [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]


def best(rows: list[Row]) -> Row | None:
    """Return the row of the lowest validation loss, the first one of a tie; None before the first evaluation.

    If the average of the weights had it, `loss` and `bits_per_byte` are those of the average, and `is_average` is true.
    """
    evaluations = [with_lower_loss(row) for row in rows if row["split"] == "val" and row["loss"] is not None]
    return min(evaluations, key=lambda row: float(row["loss"]), default=None)


def with_lower_loss(row: Row) -> Row:
    """Return a validation row with the loss of the average of the weights if it is lower, and then `is_average`."""
    averaged = row.get("val_loss_ema")
    if averaged is None or averaged >= row["loss"]:
        return row
    return row | {"loss": averaged, "bits_per_byte": averaged_bits(row), "is_average": True}


def averaged_bits(row: Row) -> float | None:
    """Return the bits per byte of the average of the weights at an evaluation; None if the row lacks a number for it.

    The bytes are the same as for the weights themselves, so bits per byte are proportional to the loss.
    """
    averaged, bits, loss = row.get("val_loss_ema"), row.get("bits_per_byte"), row["loss"]
    return None if averaged is None or bits is None or not loss else bits * averaged / loss


def overfits_since(rows: list[Row]) -> int | None:
    """Return the step of the lowest validation loss if the run overfits after it, else None.

    The run overfits if all of these hold:

    - There are at least 2 later evaluations.
    - The last one is above the lowest by at least 0.01 nats and 1 %.
    - The training loss kept falling: its mean over the last evaluation interval is below its mean over the interval
      before the lowest evaluation. (If both losses rise, the run diverges.) A record without training rows passes.
    """
    lowest = best([row | {"val_loss_ema": None} for row in rows])  # the weights that the training loss is of
    if lowest is None:
        return None
    later = [(step, loss) for step, loss in losses(rows, "val") if step > lowest["step"]]
    if len(later) < 2:
        return None
    last_step, last_loss = later[-1]
    if last_loss < lowest["loss"] + max(0.01, 0.01 * lowest["loss"]):
        return None
    train = losses(rows, "train")
    interval = later[0][0] - lowest["step"]
    train_then = _mean_loss_before(lowest["step"], interval, train)
    train_now = _mean_loss_before(last_step, interval, train)
    if train_then is not None and train_now is not None and train_now >= train_then:
        return None
    return int(lowest["step"])


def _mean_loss_before(end: int, interval: int, points: list[tuple[int, float]]) -> float | None:
    """Return the mean loss over the steps in (end - interval, end], None if the points have none of them."""
    inside = [loss for step, loss in points if end - interval < step <= end]
    return math.fsum(inside) / len(inside) if inside else None
