"""Propose a run for a given time: the largest shape that promises a lower loss, and as many steps as fit."""

import math
from collections.abc import Callable
from pathlib import Path

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.config.counts import count_parameters_by_part
from llm.errors import UserError
from llm.plan.text_size import Text
from llm.plan.timing import Pace, fits, probe, run_seconds

# (n_layer, n_embd, n_head)
SHAPES = ((2, 64, 2), (4, 128, 4), (6, 192, 6), (6, 256, 8), (6, 384, 6), (8, 512, 8), (12, 768, 12))

# A step has the chapter's 2,048 tokens, or fewer if EPOCHS passes over the text would be fewer than MIN_STEPS steps.
TOKENS_PER_STEP = 2048
MIN_STEPS = 2500

EVALUATIONS = 10  # besides the one at the start

EPOCHS = 40  # passes over the text beyond which more of them gain little (Muennighoff et al. 2023)

PATIENCE = 3  # evaluations in a row without improvement that end the run: many texts overfit before EPOCHS

SHARE = 0.9  # of the given time that a proposal fills

LEAST_STEPS = 20  # of a proposal


def expected_loss(blocks: float, tokens: float, text: float) -> float:
    """Return the loss that the scaling law of Muennighoff et al. (2023) predicts, in nats per token.

    It is the part of the loss above the entropy of the text. The law was fitted to far larger models, on other texts
    and tokens, so its level means nothing here: use it only to rank two models.

    Args:
        blocks: parameters of the blocks
        tokens: tokens of training
        text: distinct tokens of the text that they are drawn from
    """
    fresh = min(text, tokens)
    optimal = min(blocks, 0.051 * fresh)  # the compute-optimal parameters for `fresh` tokens
    # a repeated token is worth less than a new one, and so is a parameter beyond the optimal ones
    effective_tokens = fresh * (1 + 15.4 * -math.expm1(-(tokens / fresh - 1) / 15.4))
    effective_size = optimal * (1 + 5.3 * -math.expm1(-(blocks / optimal - 1) / 5.3))
    return float(521 / effective_size**0.353 + 1488 / effective_tokens**0.353)


def propose(
    config: TrainConfig, text: Text, seconds: float, measure: Callable[[TrainConfig], Pace] = probe
) -> tuple[TrainConfig, Pace]:
    """Return a run on `config`'s text that fits `seconds`, and its measured pace.

    The proposal decides the shape, the batch, the steps and the learning rate. From the smallest of SHAPES on, it
    measures a shape and gives it as many steps as fit; it takes the next one while that promises an `expected_loss` at
    least 1 % lower. Only the parameters of the blocks count, because embeddings are looked up.

    Raises UserError if not even LEAST_STEPS steps of the smallest shape fit.
    """
    chosen = None
    lowest = math.inf
    for shape in SHAPES:
        trial = shaped(config, shape, text)
        if not fits(trial):
            break
        pace = measure(trial)
        fitted = with_steps(trial, text, seconds, pace)
        if fitted.max_steps < LEAST_STEPS:
            break
        tokens = fitted.max_steps * fitted.tokens_per_step
        loss = expected_loss(count_parameters_by_part(fitted.model)["blocks"], tokens, text.tokens)
        if loss > 0.99 * lowest:
            break
        chosen = fitted, pace
        lowest = loss
    if chosen is None:
        raise UserError(
            f"time = {seconds:g} s: too short for {LEAST_STEPS} steps of the smallest model here; give more time"
        )
    return chosen


def shaped(config: TrainConfig, shape: tuple[int, int, int], text: Text) -> TrainConfig:
    """Return `config` with one of SHAPES, and the batch and learning rate that go with it.

    The peak learning rate falls as 1 / width (Yang et al. 2022). It passes through the 1e-3 that nanoGPT takes for a
    width of 384, is near the 6e-4 of Brown et al. (2020) for 768, and is at most 3e-3.
    """
    n_layer, n_embd, n_head = shape
    tokens = min(TOKENS_PER_STEP, EPOCHS * text.tokens // MIN_STEPS)
    settings: dict[str, float | None] = {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "batch_size": max(1, tokens // config.model.block_size),
        "gradient_accumulation_steps": 1,
        "max_lr": min(3e-3, float(f"{0.384 / n_embd:.2g}")),
        "min_lr": None,
        "warmup_steps": None,
        "patience": PATIENCE,
    }
    return from_settings(settings, config)


def with_steps(config: TrainConfig, text: Text, seconds: float, pace: Pace) -> TrainConfig:
    """Return `config` with as many steps as fit in `seconds`, but at most EPOCHS passes over the text.

    `eval_tokens` is lowered until validation takes at most a tenth of the time.
    """
    affordable = 0.1 * seconds / ((1 + EVALUATIONS) * pace.evaluated_token)
    eval_tokens = max(1, min(config.eval_tokens, int(affordable)))
    config = from_settings({"eval_tokens": eval_tokens}, config)

    def with_max_steps(count: int) -> TrainConfig:
        return from_settings({"max_steps": count, "eval_every": math.ceil(count / EVALUATIONS)}, config)

    parts = run_seconds(with_max_steps(EVALUATIONS), text, pace)
    other_seconds = sum(parts.values()) - parts["steps"]
    affordable_steps = (SHARE * seconds - other_seconds) / pace.step
    useful_steps = max(LEAST_STEPS, EPOCHS * text.tokens / config.tokens_per_step)
    return with_max_steps(max(1, int(min(affordable_steps, useful_steps, 1e9))))


def write(config: TrainConfig, path: Path) -> None:
    """Write the settings to a new file for `--preset`. Raises UserError if it exists or cannot be written."""
    check_new(path)
    try:
        storage.write_text(path, write_toml(config))
    except OSError as error:
        raise UserError(f"out = {path}: cannot be written ({error.strerror}); choose another place") from None


def check_new(path: Path) -> None:
    """Raises UserError for a name that `write` would refuse."""
    if path.suffix != ".toml":
        raise UserError(f"out = {path}: its name does not end in .toml; give it that ending, which --preset expects")
    if path.exists():
        raise UserError(f"out = {path}: already exists; remove it, or choose another name")
