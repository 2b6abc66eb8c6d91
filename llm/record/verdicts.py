"""One verdict a function: what is seen in the rows of a run, why it matters and what to try; None if it is not so."""

import math
import re
import statistics
from itertools import accumulate, pairwise

from llm.config import TrainConfig
from llm.record.metrics import SPIKE_HISTORY, best, losses, overfits_since
from llm.record.plot import landmark_losses
from llm.storage.lines import Row

MEANINGS = ("guessing", "token frequencies", "coherent text")  # of LANDMARKS
EXPLODES = 10  # times a gradient norm is above what it was


PARTS = 10  # of a record, compared by their medians


STEP = re.compile(r"step [\d,]+")  # in a line's name: which it is said of may change


STILL = 0.005  # a loss that moved by less than this share of itself stands still


def first_loss(rows: list[Row], config: TrainConfig) -> str | None:
    """Validation loss at step 0 against that of fresh weights; nothing where the run began with others.

    After ln_f a hidden state has C elements of variance 1, and the head's weights a standard deviation of 0.02, so
    logits have the variance 0.02² C. The expected cross-entropy of normal logits that know nothing is ln V plus half
    their variance: ln V + 0.0002 C. Allowed are 0.1 nats and half the logits' standard deviation beside it, since
    frequent tokens do not average out (measured, V 65 to 4,096, C 16 to 768: at most 0.16, tied heads too).
    """
    start = [loss for step, loss in losses(rows, "val") if step == 0]
    if not start or config.init_from:
        return None
    vocab_size, width = config.model.vocab_size, config.model.n_embd
    expected = math.log(vocab_size) + 0.5 * 0.02**2 * width
    off = start[0] - expected
    if abs(off) <= 0.1 + 0.5 * 0.02 * math.sqrt(width):
        return None
    if off > 0:
        why = "fresh weights are surer than they can be: look at the initialisation (std 0.02, ln_f before the head)"
    else:
        why = "nothing is learned yet: look whether targets are the next tokens, and the weights fresh"
    return (
        f"unexpected first loss: {start[0]:.2f} at step 0, where ln {vocab_size} + 0.0002 x {width} = {expected:.2f} "
        f"is expected; {why}, and --vocab_size the tokenizer's"
    )


def landmarks(loss: float, vocab_size: int) -> str:
    """Where a loss stands against the chapter's ln V, ln V / 2 and ln V / 4; "" for a vocabulary of one token."""
    stands = [
        f"{name} = {mark:.2f} ({means}) {'passed' if loss < mark else 'not reached'}"
        for name, mark, means in _marks(vocab_size)
    ]
    return f"landmarks: {'; '.join(stands)}" if stands else ""


def landmark(rows: list[Row], config: TrainConfig) -> str | None:
    """The lowest landmark that an evaluation after step 0 is below, the first such evaluation, and the next."""
    points = [(step, loss) for step, loss in losses(rows, "val") if step > 0]
    lowest = min((loss for _, loss in points), default=math.inf)
    marks = _marks(config.model.vocab_size)
    count = sum(lowest < mark for _, mark, _ in marks)
    if not count:
        return None
    name, mark, means = marks[count - 1]
    since = next(step for step, loss in points if loss < mark)
    ahead = "".join(f"; next is {name} = {mark:.2f} ({means})" for name, mark, means in marks[count : count + 1])
    return f"passed {name} at step {since}: below {mark:.2f} ({means}), at best {lowest:.2f}{ahead}"


def overfits(rows: list[Row], config: TrainConfig) -> str | None:
    """Overfitting, as `metrics.overfits_since` finds it."""
    since, low = overfits_since(rows), best(rows)
    if since is None or low is None:
        return None
    val, train = losses(rows, "val")[-1][1], losses(rows, "train")
    falls = f" to {train[-1][1]:.2f}" if train else ""
    cures = (
        "--dropout 0.2" if config.model.dropout < 0.2 else "",
        "--weight_decay 0.1" if config.weight_decay < 0.1 else "",
        "a smaller model (--n_layer, --n_embd)",
        "more text",
    )
    stops = "--patience 3 stops in time, and " if config.patience is None else ""
    return (
        f"overfits since step {since}: the validation loss rises ({low['loss']:.2f} to {val:.2f}) while the training "
        f"loss falls{falls}; try {', '.join(cure for cure in cures if cure)}; {stops}best.pt keeps step {since}"
    )


def plateau(rows: list[Row]) -> str | None:
    """Neither loss moves: the best validation loss of the last quarter of the steps (3 evaluations or more) is within
    0.5 % of the best before, and the mean training loss within 0.5 % of that of the quarter before. A loss that falls
    as a power of the steps, as healthy ones do, moves by more than 1 % in a quarter of them.
    """
    end = max((row["step"] for row in rows), default=0)
    old_val, val = (_between(losses(rows, "val"), a * end, b * end) for a, b in ((0, 0.75), (0.75, 1)))
    old_train, train = (_between(losses(rows, "train"), a * end, b * end) for a, b in ((0.5, 0.75), (0.75, 1)))
    if len(val) < 3 or not (old_val and old_train and train):
        return None
    now, before, lately, then = min(val), min(old_val), statistics.fmean(train), statistics.fmean(old_train)
    if abs(now - before) > STILL * before or abs(lately - then) > STILL * then:
        return None
    return (
        f"plateau: over the last quarter of {end:,} steps the validation loss stayed at {now:.2f} and the training "
        f"loss at {lately:.2f}, so that more such steps bring little; try another --max_lr (a third, three times), or "
        f"a larger model (--n_layer, --n_embd)"
    )


def spikes(rows: list[Row], config: TrainConfig) -> str | None:
    """Steps whose loss leapt, as `metrics.is_spike` marks them in the record."""
    steps = _marked(rows, "spikes")
    if not steps:
        return None
    more = f", {len(steps)} times in all, last at step {steps[-1]}" if len(steps) > 1 else ""
    return (
        f"spike: the loss of step {steps[0]} leapt{more}; either its text is unlike the rest (losscurve show-batch "
        f"--out_dir {config.out_dir} --step {steps[0]} prints it) or steps are too large: try {_gentler(config)}"
    )


def refused(rows: list[Row], config: TrainConfig) -> str | None:
    """Steps that made no update, since their loss or gradient was not a finite number."""
    steps = _marked(rows, "refused")
    if not steps:
        return None
    more = f" to {steps[-1]}, {len(steps)} in all" if len(steps) > 1 else ""
    return (
        f"steps without an update: {steps[0]}{more}, since loss or gradient was not a finite number; losscurve "
        f"show-batch --out_dir {config.out_dir} --step {steps[0]} prints the text; if it is no cause, try "
        f"{_gentler(config)}"
    )


def diverges(rows: list[Row], config: TrainConfig) -> str | None:
    """Learning rate probably too high: the losses are worse than guessing, or, after the warm-up, the training loss or
    the gradient norm rises.

    Worse than guessing: the median of the newest three training losses after step 0 is above ln V and above the loss at
    step 0 by half a nat (two will do, or, where there are none, evaluations; where the training loss is fine, those may
    be worse than guessing by overfitting). Rising: of ten equal parts of the training rows (4 rows or more each), the
    median loss of the last is above the lowest by 0.1 nats and by 4 standard errors, or its median gradient norm is
    more than 10 times the lowest. A loss that settles too high without rising is not told apart from a plateau.
    """
    start = [loss for step, loss in losses(rows, "val") if step == 0]
    after = [row for row in rows if row["step"] > 0 and row["loss"] is not None]
    trained = [row for row in after if row["split"] == "train"]
    newest = [row["loss"] for row in (trained if len(trained) > 1 else after)[-3:]]
    guessing = max([math.log(config.model.vocab_size), *start])
    if len(newest) > 1 and statistics.median(newest) > guessing + 0.5:
        return (
            f"learning rate probably too high: losses of {statistics.median(newest):.4g} are worse than guessing "
            f"({guessing:.2f}), and what was learned is lost; try {_gentler(config)}"
        )
    parts, norms = _parts(rows, "loss"), [statistics.median(part) for part in _parts(rows, "grad_norm")]
    if not parts or rows[-1]["step"] <= config.warmup:
        return None
    low, last = min(parts, key=statistics.median), parts[-1]
    then, now = statistics.median(low), statistics.median(last)
    if now - then > max(0.1, 4 * (_error(low) + _error(last))):
        seen = f"the training loss rises again, from {then:.2f} to {now:.2f}"
    elif norms and norms[-1] > EXPLODES * min(norms):
        seen = f"the gradient norm grew from {min(norms):.3g} to {norms[-1]:.3g}"
    else:
        return None
    return f"learning rate probably too high: {seen}, and what was learned is being lost; try {_gentler(config)}"


def too_slow(rows: list[Row], config: TrainConfig) -> str | None:
    """Learning rate probably too low: the training loss falls by nearly the same for the same sum of learning rates.

    That sum stands for the steps, so that a schedule which ends low is allowed for. Over the second half of it a
    straight line has 47 % of the fall and over the last quarter 20 % (by the medians of eighths); well-set runs had 6
    to 13 % and 2 to 7 %. Said from 25 % and 10 % on, after a tenth of the steps and twice the warm-up, unless the loss
    was ever above its start or the run began with trained weights, which are often meant to change slowly.
    """
    train = [row for row in rows if row["split"] == "train" and None not in (row["loss"], row["lr"])]
    if config.init_from or len(train) < 24 or train[-1]["step"] < max(config.max_steps / 10, 2 * config.warmup):
        return None
    steps = [0, *(row["step"] for row in train)]
    learned = list(accumulate(row["lr"] * (row["step"] - step) for row, step in zip(train, steps, strict=False)))
    eighths: list[list[float]] = [[] for _ in range(8)]
    for row, so_far in zip(train, learned, strict=True):
        eighths[max(0, math.ceil(8 * so_far / (learned[-1] or 1)) - 1)].append(row["loss"])
    if not all(eighths):
        return None
    middles, start = [statistics.median(part) for part in eighths], train[0]["loss"]
    now = middles[-1]
    fall, half, quarter = start - now, sum(middles[3:5]) / 2 - now, sum(middles[5:7]) / 2 - now
    if max(middles) > start or fall < max(0.1, 4 * _error(eighths[-1])) or half < 0.25 * fall or quarter < 0.1 * fall:
        return None
    return (
        f"learning rate probably too low: the training loss fell from {start:.2f} to {now:.2f}, and "
        f"{half / fall:.0%} of that in the later half (by summed learning rate), where about 10 % is usual; "
        f"try --max_lr {3 * config.max_lr:.2g}, or more --max_steps"
    )


def short_warmup(rows: list[Row], config: TrainConfig) -> str | None:
    """Warm-up probably too short: until twice its length, or 5 % of the steps where that is more, the training loss
    of a row is above the lowest before it by half a nat and by 6 times the rows' noise (from the median change
    between neighbours), or its gradient norm is more than 10 times the median of those before it.
    """
    until, train = max(2 * config.warmup, config.max_steps // 20), losses(rows, "train")
    changes = [abs(after - before) for (_, before), (_, after) in pairwise(train)]
    leap = max(0.5, 6 * 1.4826 * statistics.median(changes) / math.sqrt(2)) if changes else 0.0
    seen, low, norms = "", math.inf, [math.inf] * 3  # the first norms have nothing to be judged by
    for row in [row for row in rows if row["split"] == "train" and row["step"] <= until]:
        step, loss, norm, usual = row["step"], row["loss"], row["grad_norm"], statistics.median(norms)
        if loss is not None and loss > low + leap:
            seen = seen or f"the training loss leapt from {low:.2f} to {loss:.2f} by step {step}"
        if norm is not None and norm > EXPLODES * usual:
            seen = seen or f"the gradient norm leapt from {usual:.3g} to {norm:.3g} by step {step}"
        low = low if loss is None else min(low, loss)
        norms = norms if norm is None else [*norms[1 - SPIKE_HISTORY :], norm]
    longer = max(2 * config.warmup, config.max_steps // 50)
    cure = f"--warmup_steps {longer}, " if 0 < longer <= config.max_steps / 10 else ""
    return (
        f"warm-up of {config.warmup} steps probably too short: {seen}; try {cure}{_gentler(config)}" if seen else None
    )


def not_training(rows: list[Row]) -> str | None:
    """More than a quarter of the time went to other things than steps, in a run of a minute and 4 evaluations or more.
    The rows' tokens and tokens per second tell what steps took; a step done twice counts as other things.
    """
    keys = ("tokens", "seconds", "tokens_per_second")
    train = [row for row in rows if row["split"] == "train" and all(row[key] for key in keys)]
    if not train or train[-1]["seconds"] < 60 or len(losses(rows, "val")) < 4:
        return None
    stepping = _stepping(train)
    seconds = train[-1]["seconds"]
    if 1 - stepping / seconds <= 0.25:
        return None
    return (
        f"time beside the training: {1 - stepping / seconds:.0%} of {seconds:.0f} s went to evaluation, samples, "
        f"pictures and saving; try a larger --eval_every or --save_every, a smaller --eval_tokens or --sample_tokens"
    )


def waits_for_data(rows: list[Row]) -> str | None:
    """Making batches took more than a quarter of the time of the steps, over a minute of them or more.

    On a GPU, which computes meanwhile, that is about where it begins to wait for them.
    """
    train = [row for row in rows if row["split"] == "train" and row["tokens_per_second"]]
    stepping = _stepping(train)
    waiting = math.fsum(row.get("data_seconds") or 0.0 for row in train)
    if stepping < 60 or waiting <= 0.25 * stepping:
        return None
    return (
        f"waits for data: making batches took {waiting / stepping:.0%} of the {stepping:.0f} s of the steps; "
        "try a --data_dir on a disk of this machine, and less beside the training"
    )


def _stepping(train: list[Row]) -> float:
    """Seconds that the steps of training rows took, by their tokens and tokens per second."""
    tokens = [0, *(row["tokens"] for row in train)]
    return math.fsum((b - a) / row["tokens_per_second"] for (a, b), row in zip(pairwise(tokens), train, strict=True))


def _marks(vocab_size: int) -> list[tuple[str, float, str]]:
    """Name, loss and meaning of each landmark."""
    found = zip(landmark_losses(vocab_size), MEANINGS, strict=False)
    return [(name, mark, means) for (mark, name), means in found]


def _marked(rows: list[Row], mark: str) -> list[int]:
    """The steps that rows list as "spikes" or "refused"."""
    return [step for row in rows if isinstance(row.get(mark), list) for step in row[mark]]


def _gentler(config: TrainConfig) -> str:
    """The flags that make large steps smaller."""
    return f"--max_lr {config.max_lr / 3:.2g}" + ("" if 0 < config.grad_clip <= 1 else ", --grad_clip 1")


def _between(points: list[tuple[int, float]], start: float, end: float) -> list[float]:
    """The losses of the points of steps in (start, end]."""
    return [loss for step, loss in points if start < step <= end]


def _parts(rows: list[Row], key: str) -> list[list[float]]:
    """The values of `key` in the training rows after step 0, in ten consecutive parts; [] if too few for 4 in each."""
    values = [row[key] for row in rows if row["split"] == "train" and row["step"] > 0 and row[key] is not None]
    cuts = [len(values) * part // PARTS for part in range(PARTS + 1)]
    return [values[a:b] for a, b in pairwise(cuts)] if len(values) >= 4 * PARTS else []


def _error(values: list[float]) -> float:
    """The standard error of the median of normal values, by their median distance from it."""
    middle = statistics.median(values)
    return 1.2533 * 1.4826 * statistics.median(abs(x - middle) for x in values) / math.sqrt(len(values))
