"""The rule of the autopilot: what a run for a given time is made of. Its figures stand in the table below.

Their sources are in docs/decisions.md, "The rule for a given time"; those for weights of another program stand in
`llm.start.fine_tuning`. `llm.plan.proposal` measures the shapes and chooses one of them.
"""

import math
from collections.abc import Sequence
from typing import Any

from llm.config import FIELDS, TrainConfig

# ---- the table

# (bytes of the training text from which a row counts, tokenizer, vocabulary)
TOKENIZERS = (
    (0, "byte", None),
    (20_000, "bpe", 512),
    (200_000, "bpe", 1024),
    (5_000_000, "bpe", 2048),
    (50_000_000, "bpe", 4096),
)
FEW_CHARACTERS = 20  # distinct ones: such a text (DNA, numbers) gets a BPE of FEW_VOCABULARY at most
FEW_VOCABULARY = 512
MANY_BYTES = 1.5  # bytes per character from which a script needs the next row of TOKENIZERS
LEAST_BYTES = 1000  # of the training text
SMALL_TEXT = 100_000  # bytes of a training text below which the autopilot says that there is little to learn from

SHAPES = (  # (n_layer, n_embd), from small to large
    *((2, 64), (3, 96), (3, 128), (4, 128), (5, 160)),
    *((6, 192), (6, 256), (8, 320), (8, 384), (10, 512)),
)
HEAD_SIZES = ((0, 32), (192, 64))  # (width from which a row counts, channels of a head)
GOOD_STEPS = 900  # the largest shape that gets so many steps is taken,
PARAMETERS_PER_TOKEN = 7  # unless its blocks have more parameters for each training token than these,
TAUGHT_PARAMETERS_PER_TOKEN = 12  # or than these with teachers

BLOCK_SIZES = ((0, 128), (120, 256))  # (seconds from which a row counts, block_size)
SMALLEST_BLOCK = 16
LEAST_WINDOWS = 20  # that fit the training split; a smaller text gets a smaller block_size
WINDOWS = ((0, 16), (256, 12))  # (block_size from which a row counts, windows in a step)
USEFUL_STEPS = 1000  # a text that MOST_EPOCHS would read in fewer steps gets fewer windows in a step

MOST_EPOCHS = 40  # more passes over the text gain little
# The repetition of a run is its passes x the parameters of its blocks for each training token.
MOST_REPETITION = 90  # beyond, a text is learned by heart
ENOUGH_STEPS = 2000  # fewer steps are never too many for this reason
WEIGHT_DECAYS = ((0, 0.1), (7, 0.3))  # (passes from which a row counts, weight decay)
DROPOUTS = ((0, 0, 0.0), (16, 60, 0.1), (30, 200, 0.2))  # (passes, or repetition, from which a row counts, dropout)
COOLDOWN = 0.6  # share of the steps, with wsd
# (seconds of a run from which a row counts, its teachers if its text is read often, their share of the time)
TEACHERS = ((0, 0, 0.0), (270, 1, 1 / 3), (1200, 3, 1 / 2), (1800, 5, 1 / 2))
SEED_STEP = 1000  # from the seed of a teacher to that of the next
TAUGHT_LONGER = 1.5  # teachers replace dropout, and so many times as many steps are useful with them
LEAST_TAUGHT_STEPS = 300  # so many steps, and
LEAST_TAUGHT_PASSES = 7  # so many passes or dropout

MUON_LR = 0.03
MUON_MAX_LR = 3e-3  # of AdamW's share of the parameters
ADAMW_MAX_LR = 3e-3  # the lower of this and ADAMW_LR_WIDTH / n_embd
ADAMW_LR_WIDTH = 0.384
FINE_TUNING = 0.3  # of these rates, for the weights of init_from

PREPARING_SHARE = 0.5  # of the time, for preparing the text; what that takes beyond this does not count
EVALUATION_SHARE = 0.05  # of the time, for evaluations, samples, pictures and checkpoints
EVALUATIONS = (2, 20)  # besides the one at the start: at least, at most
LEAST_EVAL_TOKENS = 8192
FILL = 0.95  # of the time that the plan fills
LEAST_STEPS = 20
MOST_PROBES = 4  # shapes that are measured
PROBING_SHARE = 0.1  # of the time, for these probes; one is always made
# (seconds of the run from which a row counts, seconds of one probe, about)
PROBE_SECONDS = ((0, 0.5), (60, 1.0), (240, 2.5), (600, 4.0))
STEP_GROWTH = 0.75  # the time of a step grows with its FLOPs to this power, until it is measured

# ---- the rule


def row_for(table: Sequence[tuple[Any, ...]], value: float) -> tuple[Any, ...]:
    """Return the last row of a table whose first figure is at most `value`."""
    return [row for row in table if row[0] <= value][-1]


def recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Return the `given` settings with those that do not depend on text, time and machine.

    Shape, rates and steps are provisional: they only have to be possible beside the given settings.
    """
    archs = [FIELDS[name].metadata["arch"] for name in given]
    chosen: dict[str, Any] = {
        "optimizer": "muon",
        "schedule": "wsd",
        "order": "epochs",
        "max_steps": 10**9,
        "min_lr": 0.0,
        "max_lr": max(MUON_MAX_LR, given.get("min_lr", 0.0)),
    }
    if "init_from" not in given:  # else they are those of the weights
        chosen["block_size"] = SMALLEST_BLOCK
        chosen["arch"] = "gpt2" if "gpt2" in archs and given.get("arch") != "llama" else "llama"
        chosen |= shape(SHAPES[0], given)
    return chosen | given


def tokenizer(
    text_bytes: float, bytes_per_character: float, distinct: int | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Return `tokenizer` and `vocab_size` for a training text of so many bytes, around the given ones.

    `distinct`: its distinct characters, if they are known.
    """
    row = TOKENIZERS.index(row_for(TOKENIZERS, text_bytes))
    if bytes_per_character >= MANY_BYTES:
        row = min(row + 1, len(TOKENIZERS) - 1)
    kind, size = TOKENIZERS[row][1:]
    if size and distinct is not None and distinct <= FEW_CHARACTERS:
        size = min(size, FEW_VOCABULARY)
    if "vocab_size" in given or given.get("tokenizer") == "bpe":
        kind = "bpe"
    kind = given.get("tokenizer", kind)
    if kind != "bpe":
        return {"tokenizer": kind}
    return {"tokenizer": kind, "vocab_size": given.get("vocab_size", size or TOKENIZERS[1][2])}


def shape(row: tuple[int, int], given: dict[str, Any]) -> dict[str, int]:
    """Return layers, width and heads of a row of SHAPES, around those that are `given`."""
    n_layer, width = row
    n_layer = given.get("n_layer", n_layer)
    unit = 2 * (given.get("n_head") or given.get("n_kv_head") or 1)  # RoPE needs heads of an even size
    width = given.get("n_embd", math.ceil(width / unit) * unit)
    return {"n_layer": n_layer, "n_embd": width, "n_head": given.get("n_head") or heads(width, given)}


def heads(width: int, given: dict[str, Any]) -> int:
    """Return the most heads of HEAD_SIZES or more channels that divide `width` into heads of an even size."""
    most = max(1, width // row_for(HEAD_SIZES, width)[1])
    groups = given.get("n_kv_head") or 1
    found = [count for count in range(1, width + 1) if width % (2 * count) == 0 and count % groups == 0]
    return max((count for count in found if count <= most), default=min(found, default=1))


def block_size(seconds: float, train_tokens: int) -> int:
    """Return the context length: by the time, or as long as LEAST_WINDOWS windows fit the training split."""
    size = int(row_for(BLOCK_SIZES, seconds)[1])
    while size > SMALLEST_BLOCK and LEAST_WINDOWS * size > train_tokens:
        size //= 2
    return size


def windows(block_size: int, train_tokens: int) -> int:
    """Return the windows of a step: fewer for a text that MOST_EPOCHS would read in less than USEFUL_STEPS."""
    count = int(row_for(WINDOWS, block_size)[1])
    while count > 1 and MOST_EPOCHS * train_tokens < USEFUL_STEPS * count * block_size:
        count //= 2
    return count


def batch(given: dict[str, Any], block_size: int, train_tokens: int) -> dict[str, int]:
    """Return the micro-batches of a step, around the given ones."""
    micro_batches = given.get("gradient_accumulation_steps", 1)
    size = max(1, windows(block_size, train_tokens) // micro_batches)
    return {"batch_size": given.get("batch_size", size), "gradient_accumulation_steps": micro_batches}


def rates(config: TrainConfig, given: dict[str, Any]) -> dict[str, float]:
    """Return the peak learning rates for the optimizer and the width of `config`."""
    share = FINE_TUNING if config.init_from else 1.0
    if config.optimizer == "muon":
        found = {"muon_lr": share * MUON_LR, "max_lr": share * MUON_MAX_LR}
    else:
        found = {"max_lr": share * min(ADAMW_MAX_LR, ADAMW_LR_WIDTH / config.model.n_embd)}
    found = {name: given.get(name, float(f"{value:.2g}")) for name, value in found.items()}
    return found | {"max_lr": max(found["max_lr"], given.get("min_lr", 0.0))}


def teachers(seconds: float, has_dropout: bool) -> tuple[int, float]:
    """Return how many teachers a run for a time gets if it reads its text often, and their share of the time.

    Several only if one run for the whole time would have dropout: of a longer text, they would have learned too little.
    """
    rows = [row for row in TEACHERS if has_dropout or row[1] <= 1]
    _, count, share = row_for(rows, seconds)
    return count, share


def probe_seconds(seconds: float) -> float:
    """Return what one probe takes, about, for a run of so many seconds."""
    return float(row_for(PROBE_SECONDS, seconds)[1])


def probes(seconds: float) -> int:
    """Return how many shapes may be measured for a run of so many seconds."""
    return max(1, min(MOST_PROBES, int(PROBING_SHARE * seconds / probe_seconds(seconds))))


def regularisation(passes: float, repetition: float, schedule: str, is_taught: bool) -> dict[str, float]:
    """Return weight decay, dropout, and with wsd the share of the cool-down, for so many passes and such repetition.

    A run that `is_taught` has no dropout: what its teachers predict keeps it from learning by heart.
    """
    dropouts = [dropout for least, repeated, dropout in DROPOUTS if passes >= least or repetition >= repeated]
    found = {"weight_decay": row_for(WEIGHT_DECAYS, passes)[1], "dropout": 0.0 if is_taught else dropouts[-1]}
    return found | ({"decay_fraction": COOLDOWN} if schedule == "wsd" else {})
