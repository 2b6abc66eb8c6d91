"""Verdicts on the losses of a run: one function each, returning one line, or None if it does not apply.

A line says what the record shows, why it matters and what to try. Its part before the colon names the verdict.
`rate_verdicts` judges the learning rate, `time_verdicts` the time.
"""

import math
import shlex
import statistics

from llm.config import TrainConfig
from llm.record.metrics import best, losses, overfits_since
from llm.record.plot import landmark_losses
from llm.storage.lines import Row

MEANINGS = ("guessing", "token frequencies", "coherent text")  # of plot.LANDMARKS
STILL = 0.005  # a loss that changed by less than this share of itself has stalled


def first_loss(rows: list[Row], config: TrainConfig) -> str | None:
    """Compare the validation loss at step 0 with that of fresh weights; None if the run started from other weights.

    After ln_f a hidden state has C elements of variance 1, and the head's weights have a standard deviation of 0.02. So
    logits have the variance 0.02² C. The expected cross-entropy of normal logits that know nothing is ln V plus half
    their variance: ln V + 0.0002 C. The tolerance is 0.1 nats plus half the logits' standard deviation, because
    frequent tokens do not average out (measured, V 65 to 4,096, C 16 to 768: at most 0.16, tied heads too). An untied
    head of a llama starts at 0, so its loss is ln V.
    """
    start = [loss for step, loss in losses(rows, "val") if step == 0]
    if not start or config.init_from:
        return None
    vocab_size = config.model.vocab_size
    width = config.model.n_embd
    is_zero = config.model.arch == "llama" and not config.model.tied_lm_head
    expected = math.log(vocab_size) + (0.0 if is_zero else 0.5 * 0.02**2 * width)
    excess = start[0] - expected
    if abs(excess) <= 0.1 + 0.5 * 0.02 * math.sqrt(width):
        return None
    if excess > 0:
        advice = "fresh weights are too confident: check the initialisation (std 0.02, ln_f before the head)"
    else:
        advice = (
            "a model cannot know this before training: check that targets are the next tokens and weights are fresh"
        )
    return (
        f"unexpected first loss: {start[0]:.2f} at step 0, "
        f"expected {expected:.2f}, from ln {vocab_size} = {math.log(vocab_size):.2f}; "
        f"{advice}, and that --vocab_size is the tokenizer's"
    )


def landmarks(loss: float, vocab_size: int) -> str:
    """Return how a loss compares with the chapter's ln V, ln V / 2 and ln V / 4; "" for a vocabulary of one token."""
    parts = [
        f"{name} = {mark:.2f} ({meaning}) {'passed' if loss < mark else 'not reached'}"
        for name, mark, meaning in _named_landmarks(vocab_size)
    ]
    return f"landmarks: {'; '.join(parts)}" if parts else ""


def landmark(rows: list[Row], config: TrainConfig) -> str | None:
    """Return the lowest landmark that an evaluation after step 0 is below, the first such evaluation, and the next."""
    points = [(step, loss) for step, loss in losses(rows, "val") if step > 0]
    lowest = min((loss for _, loss in points), default=math.inf)
    known = _named_landmarks(config.model.vocab_size)
    passed = sum(lowest < mark for _, mark, _ in known)
    if not passed:
        return None
    name, mark, meaning = known[passed - 1]
    since = next(step for step, loss in points if loss < mark)
    line = f"passed {name} at step {since}: validation loss below {mark:.2f} ({meaning}), lowest {lowest:.2f}"
    if passed < len(known):
        next_name, next_mark, next_meaning = known[passed]
        line += f"; next is {next_name} = {next_mark:.2f} ({next_meaning})"
    return line


def overfits(rows: list[Row], config: TrainConfig) -> str | None:
    """Report overfitting, as defined by `metrics.overfits_since`."""
    since = overfits_since(rows)
    lowest = best(rows)
    if since is None or lowest is None:
        return None
    evaluated = losses(rows, "val")
    loss, last_loss = dict(evaluated)[since], evaluated[-1][1]
    train = losses(rows, "train")
    train_end = f" to {train[-1][1]:.2f}" if train else ""
    remedies = ["more text"]
    if not config.init_from:  # else the shape is that of the weights
        remedies.insert(0, "a smaller model (--n_layer, --n_embd)")
    if config.weight_decay < 0.1:
        remedies.insert(0, "--weight_decay 0.1")
    if config.model.dropout < 0.2:
        remedies.insert(0, "--dropout 0.2")
    patience = "--patience 3 stops in time; " if config.patience is None else ""
    weights = "the average of the weights" if "is_average" in lowest else "the weights"
    return (
        f"overfits since step {since}: the validation loss rises ({loss:.2f} to {last_loss:.2f}) while the "
        f"training loss falls{train_end}; try {', '.join(remedies)}; {patience}best.pt has {weights} of "
        f"step {lowest['step']}"
    )


def plateau(rows: list[Row], config: TrainConfig) -> str | None:
    """Report that neither loss moves.

    Over the last quarter of the steps (3 evaluations or more), the best validation loss is within 0.5 % of the best
    before, and the mean training loss is within 0.5 % of that of the quarter before. A healthy loss falls as a power of
    the steps and moves by more than 1 % in a quarter of them.
    """
    end = max((row["step"] for row in rows), default=0)
    val = losses(rows, "val")
    train = losses(rows, "train")
    val_before = _losses_between(val, 0, 0.75 * end)
    val_now = _losses_between(val, 0.75 * end, end)
    train_before = _losses_between(train, 0.5 * end, 0.75 * end)
    train_now = _losses_between(train, 0.75 * end, end)
    if len(val_now) < 3 or not (val_before and train_before and train_now):
        return None
    if not _is_still(min(val_before), min(val_now)):
        return None
    if not _is_still(statistics.fmean(train_before), statistics.fmean(train_now)):
        return None
    rates = "--max_lr and --muon_lr" if config.optimizer == "muon" else "--max_lr"
    larger = "larger weights to start from" if config.init_from else "a larger model (--n_layer, --n_embd)"
    return (
        f"plateau: over the last quarter of {end:,} steps the validation loss stayed at {min(val_now):.2f} and the "
        f"training loss at {statistics.fmean(train_now):.2f}, so more such steps bring little; try another {rates} (a "
        f"third, three times) or {larger}"
    )


def spikes(rows: list[Row], config: TrainConfig) -> str | None:
    """Report the steps whose loss spiked, as `metrics.is_spike` marked them during training."""
    steps = _marked_steps(rows, "spikes")
    if not steps:
        return None
    more = f", {len(steps)} spikes in all, the last at step {steps[-1]}" if len(steps) > 1 else ""
    return (
        f"spike: the loss jumped at step {steps[0]}{more}; either the text of that batch is unusual "
        f"({_show_batch(config, steps[0])} prints it) or the updates are too large: try {gentler_flags(config)}"
    )


def refused(rows: list[Row], config: TrainConfig) -> str | None:
    """Report the steps that made no update, because their loss or gradient was not finite."""
    steps = _marked_steps(rows, "refused")
    if not steps:
        return None
    more = f" to {steps[-1]}, {len(steps)} in all" if len(steps) > 1 else ""
    return (
        f"steps without an update: {steps[0]}{more}, because the loss or the gradient was not finite; "
        f"{_show_batch(config, steps[0])} prints the text; if the text is not the cause, try {gentler_flags(config)}"
    )


def learning_rate_flags(config: TrainConfig, factor: float) -> str:
    """Return the flags that multiply the learning rate, Muon's too, by `factor`."""
    flags = f"--max_lr {config.max_lr * factor:.2g}"
    if config.optimizer == "muon":
        flags += f", --muon_lr {config.muon_lr * factor:.2g}"
    return flags


def gentler_flags(config: TrainConfig) -> str:
    """Return the flags that make updates smaller."""
    flags = learning_rate_flags(config, 1 / 3)
    if not 0 < config.grad_clip <= 1:
        flags += ", --grad_clip 1"
    return flags


def _show_batch(config: TrainConfig, step: int) -> str:
    return f"losscurve show-batch --out_dir {shlex.quote(config.out_dir)} --step {step}"


def _named_landmarks(vocab_size: int) -> list[tuple[str, float, str]]:
    """Return name, loss and meaning of each landmark, highest first."""
    pairs = zip(landmark_losses(vocab_size), MEANINGS, strict=False)
    return [(name, mark, meaning) for (mark, name), meaning in pairs]


def _marked_steps(rows: list[Row], mark: str) -> list[int]:
    """Return the steps that rows list as "spikes" or "refused"."""
    return [step for row in rows if isinstance(row.get(mark), list) for step in row[mark]]


def _losses_between(points: list[tuple[int, float]], start: float, end: float) -> list[float]:
    """Return the losses of the steps in (start, end]."""
    return [loss for step, loss in points if start < step <= end]


def _is_still(before: float, now: float) -> bool:
    return abs(now - before) <= STILL * before
