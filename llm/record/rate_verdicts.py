"""Verdicts on the learning rate: too high, too low, or reached too early. One function each, as in `verdicts`."""

import math
import statistics
from itertools import accumulate, pairwise

from llm.config import TrainConfig
from llm.record.metrics import SPIKE_HISTORY, losses
from llm.record.verdicts import gentler_flags, learning_rate_flags
from llm.storage.lines import Row

EXPLODES = 10  # a gradient norm this many times its usual value has exploded
PARTS = 10  # of the training rows, compared by their medians


def diverges(rows: list[Row], config: TrainConfig) -> str | None:
    """Report a learning rate that is probably too high.

    Either the losses are worse than guessing, or, after the warm-up, the training loss or the gradient norm rises. A
    loss that settles too high without rising cannot be distinguished from a plateau.
    """
    return _worse_than_guessing(rows, config) or _rises(rows, config)


def _worse_than_guessing(rows: list[Row], config: TrainConfig) -> str | None:
    """Report losses worse than guessing.

    The median of the newest three training losses after step 0 is above ln V and above the loss at step 0 by half a
    nat. Two losses are enough. If there are fewer, evaluations are used; otherwise they are not, because overfitting
    can make the validation loss worse than guessing.
    """
    start = [loss for step, loss in losses(rows, "val") if step == 0]
    evaluated = [row for row in rows if row["step"] > 0 and row["loss"] is not None]
    trained = [row for row in evaluated if row["split"] == "train"]
    judged = trained if len(trained) > 1 else evaluated
    newest = [row["loss"] for row in judged[-3:]]
    guessing = max([math.log(config.model.vocab_size), *start])
    if len(newest) < 2 or statistics.median(newest) <= guessing + 0.5:
        return None
    return (
        f"learning rate probably too high: losses of {statistics.median(newest):.4g} are worse than guessing "
        f"({guessing:.2f}), so the model has lost what it learned; try {gentler_flags(config)}"
    )


def _rises(rows: list[Row], config: TrainConfig) -> str | None:
    """Report a rising training loss or gradient norm after the warm-up.

    The training rows are divided into ten equal parts of 4 rows or more. The median loss of the last part is above the
    lowest by 0.1 nats and by 4 standard errors, or its median gradient norm is more than 10 times the lowest.
    """
    parts = _split_into_parts(rows, "loss")
    norms = [statistics.median(part) for part in _split_into_parts(rows, "grad_norm")]
    if not parts or rows[-1]["step"] <= config.warmup:
        return None
    lowest_part = min(parts, key=statistics.median)
    last_part = parts[-1]
    lowest = statistics.median(lowest_part)
    last = statistics.median(last_part)
    if last - lowest > max(0.1, 4 * (_median_error(lowest_part) + _median_error(last_part))):
        seen = f"the training loss rises again, from {lowest:.2f} to {last:.2f}"
    elif norms and norms[-1] > EXPLODES * min(norms):
        seen = f"the gradient norm grew from {min(norms):.3g} to {norms[-1]:.3g}"
    else:
        return None
    return f"learning rate probably too high: {seen}, so the model loses what it learned; try {gentler_flags(config)}"


def too_slow(rows: list[Row], config: TrainConfig) -> str | None:
    """Report a learning rate that is probably too low: the training loss falls in a straight line.

    The loss is measured over the summed learning rate instead of over steps, so that a schedule that ends low is not
    mistaken for a low rate. In the second half of that sum a straight line has 47 % of its fall and in the last quarter
    20 % (by the medians of eighths); runs with a good rate had 6 to 13 % and 2 to 7 %. The verdict needs 25 % and
    10 %, a tenth of the steps and twice the warm-up. It does not apply if the loss was ever above its start, or if the
    run started from trained weights, which are often meant to change slowly.
    """
    train = [row for row in rows if row["split"] == "train" and None not in (row["loss"], row["lr"])]
    if config.init_from or len(train) < 24 or train[-1]["step"] < max(config.max_steps / 10, 2 * config.warmup):
        return None
    eighths = _split_by_summed_rate(train)
    if not all(eighths):
        return None
    medians = [statistics.median(part) for part in eighths]
    start = train[0]["loss"]
    end = medians[-1]
    fall = start - end
    fall_of_half = sum(medians[3:5]) / 2 - end
    fall_of_quarter = sum(medians[5:7]) / 2 - end
    if max(medians) > start or fall < max(0.1, 4 * _median_error(eighths[-1])):
        return None
    if fall_of_half < 0.25 * fall or fall_of_quarter < 0.1 * fall:
        return None
    return (
        f"learning rate probably too low: the training loss fell from {start:.2f} to {end:.2f}, and "
        f"{fall_of_half / fall:.0%} of that in the second half (by summed learning rate), where about 10 % is usual; "
        f"try {learning_rate_flags(config, 3)}, or more --max_steps"
    )


def short_warmup(rows: list[Row], config: TrainConfig) -> str | None:
    """Report a warm-up that is probably too short.

    Until twice its length, or 5 % of the steps if that is more, the training loss of a row is above the lowest before
    it by half a nat and by 6 times the noise of the rows (from the median change between neighbours), or its gradient
    norm is more than 10 times the median of those before it.
    """
    until = max(2 * config.warmup, config.max_steps // 20)
    early = [row for row in rows if row["split"] == "train" and row["step"] <= until]
    seen = _first_jump(early, _jump_threshold(losses(rows, "train")))
    if seen is None:
        return None
    longer = max(2 * config.warmup, config.max_steps // 50)
    longer_flag = f"--warmup_steps {longer}, " if 0 < longer <= config.max_steps / 10 else ""
    return f"warm-up of {config.warmup} steps probably too short: {seen}; try {longer_flag}{gentler_flags(config)}"


def _jump_threshold(points: list[tuple[int, float]]) -> float:
    """Return the rise, in nats, above which a training loss has jumped: half a nat and 6 standard deviations."""
    changes = [abs(after - before) for (_, before), (_, after) in pairwise(points)]
    if not changes:
        return 0.0
    noise = 1.4826 * statistics.median(changes) / math.sqrt(2)  # a change is the difference of two noisy losses
    return max(0.5, 6 * noise)


def _first_jump(rows: list[Row], threshold: float) -> str | None:
    """Return, in words, the first row whose loss or gradient norm jumps; None if none does."""
    lowest = math.inf
    norms = [math.inf] * 3  # the first three norms have nothing to be compared with
    for row in rows:
        step, loss, norm = row["step"], row["loss"], row["grad_norm"]
        if loss is not None:
            if loss > lowest + threshold:
                return f"the training loss jumped from {lowest:.2f} to {loss:.2f} by step {step}"
            lowest = min(lowest, loss)
        if norm is not None:
            usual = statistics.median(norms)
            if norm > EXPLODES * usual:
                return f"the gradient norm jumped from {usual:.3g} to {norm:.3g} by step {step}"
            norms = [*norms[1 - SPIKE_HISTORY :], norm]
    return None


def _split_by_summed_rate(train: list[Row]) -> list[list[float]]:
    """Return the training losses in eight parts of an equal sum of learning rates over steps."""
    steps = [0, *(row["step"] for row in train)]
    sums = list(accumulate(row["lr"] * (row["step"] - step) for row, step in zip(train, steps, strict=False)))
    total = sums[-1] or 1
    eighths: list[list[float]] = [[] for _ in range(8)]
    for row, so_far in zip(train, sums, strict=True):
        number = max(0, math.ceil(8 * so_far / total) - 1)
        eighths[number].append(row["loss"])
    return eighths


def _split_into_parts(rows: list[Row], key: str) -> list[list[float]]:
    """Return the values of `key` in the training rows after step 0 in PARTS consecutive parts of 4 or more.

    The list is empty if there are too few values.
    """
    values = [row[key] for row in rows if row["split"] == "train" and row["step"] > 0 and row[key] is not None]
    if len(values) < 4 * PARTS:
        return []
    cuts = [len(values) * part // PARTS for part in range(PARTS + 1)]
    return [values[start:end] for start, end in pairwise(cuts)]


def _median_error(values: list[float]) -> float:
    """Return the standard error of the median of normal values, from their median absolute deviation."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in values)
    return 1.2533 * deviation / math.sqrt(len(values))
