"""Learning rate and momentum as pure functions of the step: warm-up from 0 to the peak, then down to the floor.

The schedule "wsd" (warm-up, stable, decay: Hu et al. 2024) stays at the peak in between. Its cool-down is linear, by
default over 40 % of the steps; Hägele et al. 2024 measured that it then does as well as a cosine.
"""

import math

from llm.config import TrainConfig

FIRST_MOMENTUM = 0.85  # of Muon
MOMENTUM_WARMUP = 300  # steps


def lr_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of update `step`, counted from 0. From `max_steps` on, it stays at its last value."""
    step = min(step, config.max_steps)
    if step < config.warmup:
        return config.max_lr * (step / config.warmup)
    if config.schedule == "constant":
        return config.max_lr
    start = decay_start(config)
    t = max(step - start, 0) / max(config.max_steps - start, 1)  # 0 at the peak, 1 at the end
    if config.schedule in ("linear", "wsd"):
        return config.final_lr * t + config.max_lr * (1 - t)
    return config.final_lr + 0.5 * (config.max_lr - config.final_lr) * (1 + math.cos(math.pi * t))


def muon_momentum_at(step: int, config: TrainConfig) -> float:
    """Return Muon's momentum in update `step`: from 0.85 up to `muon_momentum` in 300 steps, or 10 % of fewer.

    The first gradients change fast, so that old ones would mislead. A `muon_momentum` below 0.85 has no warm-up.
    """
    warmup = min(MOMENTUM_WARMUP, config.max_steps // 10)
    if step >= warmup or config.muon_momentum < FIRST_MOMENTUM:
        return config.muon_momentum
    return FIRST_MOMENTUM + (config.muon_momentum - FIRST_MOMENTUM) * (step / warmup)


def decay_start(config: TrainConfig) -> int:
    """Return the last step at the peak: the end of the warm-up, or with wsd the start of its cool-down."""
    if config.schedule == "constant":
        return config.max_steps
    if config.schedule == "wsd":
        return max(config.warmup, config.max_steps - max(1, round(config.cooldown * config.max_steps)))
    return config.warmup


def format_lr(lr: float) -> str:
    """Return seven characters: five decimals as the chapter prints them, or "2.0e-06" where those would be 0.00000."""
    return f"{lr:.5f}" if lr == 0 or lr >= 1e-5 else f"{lr:.1e}"


def warmup_warning(config: TrainConfig) -> str | None:
    """Return a warning if the warm-up is outside the usual 1–5 % of the steps (rounded outwards), else None."""
    low, high = config.max_steps // 100, math.ceil(config.max_steps / 20)
    if low <= config.warmup <= high:
        return None
    share = 100 * config.warmup / config.max_steps
    why = "the first updates may be too large" if config.warmup < low else "long warm-up wastes steps"
    return (
        f"a warm-up of {config.warmup:,} of {config.max_steps:,} steps is {share:.3g} %, "
        f"outside the usual 1–5 % ({why}); inside would be --warmup_steps {low} to {high}"
    )
