"""What to run in a given time: the largest shape that promises a lower loss, and as many steps as fit."""

import math
from collections.abc import Callable
from pathlib import Path

from llm import storage
from llm.config import TrainConfig, from_settings, write_toml
from llm.errors import UserError
from llm.plan.arithmetic import parameters
from llm.plan.text_size import Text
from llm.plan.timing import Pace, fits, probe, run_seconds

SHAPES = ((2, 64, 2), (4, 128, 4), (6, 192, 6), (6, 256, 8), (6, 384, 6), (8, 512, 8), (12, 768, 12))


STEP_TOKENS, STEPS = 2048, 2500  # in a batch: the chapter's, or fewer so that EPOCHS passes make about so many steps


EVALUATIONS = 10  # besides the one at the start


EPOCHS = 40  # passes over the text after which more give little (Muennighoff et al. 2023)


PATIENCE = 3  # evaluations in a row without improvement that end it: many a text is learned by heart sooner


SHARE = 0.9  # of the time given that a proposal fills


LEAST = 20  # steps


def expected_loss(blocks: float, tokens: float, text: float) -> float:
    """What `tokens` of training, drawn from `text` distinct ones, leave to learn for a model of so many parameters, in
    nats per token above the entropy of the text.

    By the law that Muennighoff et al. 2023 fitted to far larger models. Only which of two is lower is asked of it
    here: its level belongs to their texts and tokens.
    """
    fresh = min(text, tokens)
    suited = min(blocks, 0.051 * fresh)  # the parameters that so much text is compute-optimal for
    worth = fresh * (1 + 15.4 * -math.expm1(-(tokens / fresh - 1) / 15.4))  # a token read again is worth less, and
    size = suited * (1 + 5.3 * -math.expm1(-(blocks / suited - 1) / 5.3))  # so are more parameters than it suits
    return float(521 / size**0.353 + 1488 / worth**0.353)


def propose(
    config: TrainConfig, text: Text, seconds: float, measure: Callable[[TrainConfig], Pace] = probe
) -> tuple[TrainConfig, Pace]:
    """A run of `config`'s text that fits `seconds`: its shape, batch, steps and rates, and the pace measured for it.

    From the smallest on, a shape of SHAPES is measured and given as many steps as fit; the next one is taken while it
    promises an `expected_loss` at least 1 % lower. Only the parameters of the blocks count: embeddings are looked up.
    Raises UserError where not even LEAST steps of the smallest fit.
    """
    chosen, lowest = None, math.inf
    for shape in SHAPES:
        trial = shaped(config, shape, text)
        if not fits(trial):
            break
        pace = measure(trial)
        fitted = with_steps(trial, text, seconds, pace)
        if fitted.max_steps < LEAST:
            break
        tokens = fitted.max_steps * fitted.tokens_per_step
        loss = expected_loss(parameters(fitted.model)["blocks"], tokens, text.tokens)
        if loss > 0.99 * lowest:
            break
        chosen, lowest = (fitted, pace), loss
    if chosen is None:
        raise UserError(f"time = {seconds:g} s: too short for {LEAST} steps of the smallest model here; give more time")
    return chosen


def shaped(config: TrainConfig, shape: tuple[int, int, int], text: Text) -> TrainConfig:
    """`config` with a shape of SHAPES, and the batch and rate that go with it.

    The peak rate falls as 1 / width (Yang et al. 2022) through the 1e-3 that nanoGPT takes for a width of 384, and
    near the 6e-4 of Brown et al. 2020 for 768; 3e-3 at most.
    """
    layers, width, heads = shape
    tokens = min(STEP_TOKENS, EPOCHS * text.tokens // STEPS)
    settings: dict[str, float | None] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "batch_size": max(1, tokens // config.model.block_size),
        "gradient_accumulation_steps": 1,
        "max_lr": min(3e-3, float(f"{0.384 / width:.2g}")),
        "min_lr": None,
        "warmup_steps": None,
        "patience": PATIENCE,
    }
    return from_settings(settings, config)


def with_steps(config: TrainConfig, text: Text, seconds: float, pace: Pace) -> TrainConfig:
    """`config` with as many steps as fit at that pace, or EPOCHS passes over the text if those are fewer.

    Validation takes a tenth of the time at most, by `eval_tokens`.
    """
    validated = 0.1 * seconds / ((1 + EVALUATIONS) * pace.evaluated_token)
    config = from_settings({"eval_tokens": max(1, min(config.eval_tokens, int(validated)))}, config)

    def steps(count: int) -> TrainConfig:
        return from_settings({"max_steps": count, "eval_every": math.ceil(count / EVALUATIONS)}, config)

    parts = run_seconds(steps(EVALUATIONS), text, pace)
    left = SHARE * seconds - (sum(parts.values()) - parts["steps"])
    enough = max(LEAST, EPOCHS * text.tokens / config.tokens_per_step)
    return steps(max(1, int(min(left / pace.step, enough, 1e9))))


def write(config: TrainConfig, path: Path) -> None:
    """The settings as a new file that `--preset` takes. Raises UserError where it cannot be written."""
    check_new(path)
    try:
        storage.write_text(path, write_toml(config))
    except OSError as error:
        raise UserError(f"out = {path}: cannot be written ({error.strerror}); choose another place") from None


def check_new(path: Path) -> None:
    """Raises UserError if `write` would refuse the name."""
    if path.suffix != ".toml":
        raise UserError(f"out = {path}: give it the ending .toml, which --preset asks for")
    if path.exists():
        raise UserError(f"out = {path}: is there already; remove it, or choose another name")
