"""The loss that a run for a given time should end with. Every figure of it stands in the table below.

`python -m benchmarks.minutes.fit` prints the table from the runs of benchmarks/minutes/runs.csv.
"""

import math
from dataclasses import dataclass

# ---- the table, as fitted on 2026-11-29 to 68 runs on 4 texts (tiny Shakespeare, the King James Bible, German
# quotations, Russian epigrams)

SHARE = 0.8112  # of the text's cross-entropy under counts, in bits per byte, after FLOPS
FLOPS = 1e13
POWER = -0.0326  # of the FLOPs, that the share falls with
# Largest error of a run, as a ratio, predicted by a fit without the runs on its text. For the German text it is 0.19
# bits per byte, so a range is shown and no single number.
ERROR = 1.111
MEASURED = {  # lowest and highest of these runs
    "train_bytes": (1003854, 3963970),
    "cross_entropy": (1.381, 2.567),
    "flops": (2.481e12, 3.718e14),
    "steps": (861, 3439),
}

# ---- the prediction

# Times above or below what was measured, within which there is a prediction. Not more: a run of 594 steps on a fifth
# text, manual pages in Russian, reached 1.60 bits per byte, where the fit to three texts gave 1.36.
BEYOND = 1.2
WORDS = {  # for a message
    "train_bytes": "a training text of {} bytes",
    "cross_entropy": "a text of {} bits per byte by counts",
    "flops": "a run of {} FLOPs",
    "steps": "a run of {} steps",
}

# settings that may be given: the measured runs had other values of them, or they change nothing in the losses
OPEN = frozenset(
    (
        *("text", "text_limit", "text_field", "val_fraction", "data_dir", "out_dir", "seed"),
        *("max_time", "eval_every", "eval_tokens", "log_every", "save_every", "keep"),
        *("sample_prompt", "sample_tokens", "dtype", "device", "compile"),
        *("block_size", "n_layer", "n_embd", "teacher"),
    )
)


@dataclass(frozen=True)
class Prediction:
    """Bits per byte of the validation split at the end of a run."""

    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.lowest:.2f} to {self.highest:.2f} bits per byte"


def predict(properties: dict[str, float]) -> Prediction | str:
    """Return the prediction for a run with these `properties`, by the names of MEASURED, or why there is none."""
    for name, (lowest, highest) in MEASURED.items():
        value = properties[name]
        if not lowest / BEYOND <= value <= highest * BEYOND:
            words = WORDS[name].format(_rounded(value))
            return f"{words} is far from those that were measured ({_rounded(lowest)} to {_rounded(highest)})"
    bits = properties["cross_entropy"] * SHARE * math.exp(POWER * math.log(properties["flops"] / FLOPS))
    return Prediction(bits / ERROR, bits * ERROR)


def _rounded(number: float) -> str:
    """Return three digits of a number: '0.3', '3,960,000', and from ten thousand million on '2.48e+12'."""
    return f"{float(f'{number:.3g}'):,.10g}"
