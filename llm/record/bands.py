"""Reference bands: the range in which the validation losses of a preset's runs lie.

Bands ship with the package in `reference/PRESET.json`: the validation losses at each evaluation of several seeds on the
same data. `benchmarks/bands.py` makes these files. A run is compared with a band only if everything that shapes its
curve is the same: the settings except those in FREE, and the SHA-256 sums of its token files.
"""

import json
import math
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig, from_settings, read_toml
from llm.config.differences import resolved_settings
from llm.errors import UserError
from llm.record.metrics import losses
from llm.storage.lines import Row

# settings that do not shape the curve: the seed, names and paths, the hardware, logging intervals, stopping early, and
# the average of the weights, which is evaluated beside them
FREE = {
    *("seed", "text", "tokenizer", "val_fraction", "data_dir", "out_dir", "dtype", "device", "compile"),
    *("parallel", "activation_checkpointing", "cpu_offload"),
    *("max_time", "patience", "eval_every", "log_every", "save_every", "keep", "sample_prompt", "sample_tokens", "ema"),
}

# two-sided 95 % quantile of Student's t, by the number of runs; more runs use the last one, which is conservative
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Band:
    """A prediction interval for the validation loss of one more run: at least 95 % at each step."""

    preset: str
    runs: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]  # validation loss, nats per token
    half_width: tuple[float, ...]  # nats per token

    def at(self, step: int) -> tuple[float, float] | None:
        """Return the lower and upper end at `step`, None if the band has no evaluation there."""
        if step not in self.steps:
            return None
        i = self.steps.index(step)
        return self.mean[i] - self.half_width[i], self.mean[i] + self.half_width[i]


def band_from_reference(facts: dict[str, Any]) -> Band:
    """Return the band of a reference file: {"preset", "steps", "val": {seed: losses}}.

    The half-width is that of the prediction interval for one more normal value, t s √(1 + 1/n), around the mean of n
    runs. The standard deviation s of so few runs is uncertain, so each evaluation uses the root mean square of its own
    and its neighbours' s.
    """
    runs = list(facts["val"].values())
    losses_by_step = list(zip(*runs, strict=True))
    variances = [statistics.variance(column) for column in losses_by_step]
    smooth = [statistics.fmean(variances[max(0, i - 1) : i + 2]) for i in range(len(variances))]
    factor = STUDENT.get(len(runs), STUDENT[max(STUDENT)]) * math.sqrt(1 + 1 / len(runs))
    return Band(
        preset=facts["preset"],
        runs=len(runs),
        steps=tuple(facts["steps"]),
        mean=tuple(statistics.fmean(column) for column in losses_by_step),
        half_width=tuple(factor * math.sqrt(variance) for variance in smooth),
    )


def shaping(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that shape a run's curve, with defaults resolved."""
    return {name: value for name, value in resolved_settings(config).items() if name not in FREE}


def band_of(config: TrainConfig, data: Any) -> Band | None:
    """Return the band for these settings and data hashes ({"train.bin": SHA-256, …}), None if none ships."""
    for file in resources.files("llm.record").joinpath("reference").iterdir():
        if file.name.endswith(".json"):
            facts = json.loads(file.read_text(encoding="utf-8"))
            # a setting that is newer than the reference had its default
            if shaping(from_settings(facts["settings"])) == shaping(config) and facts["data"] == data:
                return band_from_reference(facts)
    return None


def band_of_run(run_dir: Path) -> Band | None:
    """Return the band for the run in `run_dir`; None also if its config.toml or env.json cannot be read."""
    try:
        config = from_settings(read_toml(str(run_dir / "config.toml")))
    except UserError:
        return None
    return band_of(config, storage.read_facts(run_dir / "env.json").get("data"))


def band_verdict(rows: list[Row], band: Band | None) -> str | None:
    """Return whether the run is inside the band, judged at the last evaluation that the band has too.

    A normal run is outside at one evaluation in twenty by chance. So "outside" needs the last two evaluations.
    """
    if band is None:
        return None
    compared = []
    for step, loss in losses(rows, "val"):
        interval = band.at(step)
        if interval is not None:
            compared.append((step, loss, interval))
    if not compared:
        return None
    inside = [low <= loss <= high for _, loss, (low, high) in compared]
    step, loss, (low, high) = compared[-1]
    source = f"95 % of {band.preset} runs on this text, from {band.runs} seeds"
    if inside[-1]:
        return (
            f"inside the reference band: validation loss {loss:.3f} at step {step}; "
            f"the band is {low:.3f} to {high:.3f} ({source})"
        )
    if len(inside) > 1 and inside[-2]:
        return None
    side = "above" if loss > high else "below"
    return (
        f"outside the reference band: validation loss {loss:.3f} at step {step} is {side} {low:.3f} to {high:.3f} "
        f"({source}), although settings and data are the same; check the precision (--dtype float32) and the versions "
        "in env.json, and run losscurve verify"
    )
