"""The settings for fine-tuning weights of another program, where the user gave none.

A model that was trained for long on much text is changed by little: a low rate, few passes over the text, and an end
once the validation loss no longer falls. docs/elsewhere.md has the table.
"""

import math
from collections.abc import Collection
from typing import Any

from llm.config import GPTConfig, TrainConfig, from_settings

LONGEST_WINDOW = 256  # tokens; attention over the whole context of a model of today would not fit in memory
BATCH_SIZE = 8  # windows
LR_WIDTH = 0.04  # peak learning rate times n_embd: 5e-5 for GPT-2's 768 channels, 2e-5 for TinyLlama's 2,048
EPOCHS = 3  # passes over the text, at most
LEAST_STEPS = 20
EVALUATIONS = 10
PATIENCE = 3  # evaluations without improvement


def settings(shape: GPTConfig, given: Collection[str]) -> dict[str, Any]:
    """Return the settings that do not depend on the text, without those that are `given`."""
    chosen = {
        "block_size": min(shape.block_size, LONGEST_WINDOW),
        "batch_size": BATCH_SIZE,
        "max_lr": float(f"{LR_WIDTH / shape.n_embd:.2g}"),
        "order": "epochs",
        "grad_clip": 1.0,
        "patience": PATIENCE,
    }
    return {name: value for name, value in chosen.items() if name not in given}


def with_steps(config: TrainConfig, train_tokens: int, given: Collection[str]) -> TrainConfig:
    """Return `config` with the steps of EPOCHS passes over `train_tokens`, unless steps or time are `given`."""
    chosen: dict[str, Any] = {}
    if "max_steps" not in given and "max_time" not in given:
        chosen["max_steps"] = max(LEAST_STEPS, math.ceil(EPOCHS * train_tokens / config.tokens_per_step))
    if "warmup_steps" not in given:
        chosen["warmup_steps"] = None
    steps = chosen.get("max_steps", config.max_steps)
    if "eval_every" not in given:
        chosen["eval_every"] = max(1, steps // EVALUATIONS)
    return from_settings(chosen, config)


def line(config: TrainConfig, train_tokens: int, given: Collection[str]) -> str:
    """Return one line that names the settings which were chosen here."""
    names = [*settings(config.model, given), *(name for name in ("max_steps", "eval_every") if name not in given)]
    remedy = "; a flag overrides each" if names else ""
    names = names or ["max_lr", "max_steps"]  # all are given, or chosen for a time
    values = [f"{name} {getattr(config, name, None) or getattr(config.model, name, None)}" for name in names]
    epochs = config.max_steps * config.tokens_per_step / train_tokens
    return f"fine-tuning: {', '.join(values)} ({epochs:.2g} passes over the text){remedy}"
