"""Verdicts on the time of a run: evaluation and saving, and waiting for data. One function each, as in `verdicts`."""

import math
from itertools import pairwise

from llm.record.metrics import losses
from llm.storage.lines import Row


def not_training(rows: list[Row]) -> str | None:
    """Report that more than a quarter of the time was not spent on steps, in a run of a minute and 4 evaluations.

    The time of the steps follows from the rows' tokens and throughput. A step that is done twice counts as time outside
    the steps.
    """
    keys = ("tokens", "seconds", "tokens_per_second")
    train = [row for row in rows if row["split"] == "train" and all(row[key] for key in keys)]
    if not train or train[-1]["seconds"] < 60 or len(losses(rows, "val")) < 4:
        return None
    predicting = rows[0]["seconds"]  # of the teachers, before the first step
    seconds = train[-1]["seconds"] - predicting
    share = 1 - _stepping_seconds(train) / seconds
    if share <= 0.25:
        return None
    return (
        f"time outside the steps: {share:.0%} of {seconds:.0f} s went to evaluation, samples, plots and checkpoints; "
        f"try a larger --eval_every or --save_every, a smaller --eval_tokens or --sample_tokens"
    )


def waits_for_data(rows: list[Row]) -> str | None:
    """Report that making batches took more than a quarter of the time of the steps, over a minute of steps or more.

    A GPU computes while the next batch is made. It begins to wait for batches at about this share.
    """
    train = [row for row in rows if row["split"] == "train" and row["tokens_per_second"]]
    stepping = _stepping_seconds(train)
    waiting = math.fsum(row.get("data_seconds") or 0.0 for row in train)
    if stepping < 60 or waiting <= 0.25 * stepping:
        return None
    return (
        f"slow data loading: making batches took {waiting / stepping:.0%} of the {stepping:.0f} s of the steps; "
        "try a --data_dir on a local disk, and fewer other programs on this machine"
    )


def _stepping_seconds(train: list[Row]) -> float:
    """Return the seconds spent on the steps of training rows, from their tokens and throughput."""
    tokens = [0, *(row["tokens"] for row in train)]
    return math.fsum(
        (after - before) / row["tokens_per_second"]
        for (before, after), row in zip(pairwise(tokens), train, strict=True)
    )
