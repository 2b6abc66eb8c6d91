"""Is this normal? Where the validation losses of a preset's runs lay, over several seeds on the same data.

The bands ship with the package, in `reference/PRESET.json`: the validation losses of each seed at each evaluation,
made by `benchmarks/bands.py`. A run is compared only where everything that shapes its curve is as in the band: the
settings but for those in `FREE`, and the SHA-256 sums of its token files.
"""

import json
import math
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig, from_settings, read_toml, to_settings
from llm.errors import UserError
from llm.record.metrics import losses
from llm.storage.lines import Row

# what may differ: the seed, names and places, where it ran, how often it is looked at, when it stops
FREE = {
    *("seed", "text", "tokenizer", "val_fraction", "data_dir", "out_dir", "dtype", "device", "compile"),
    *("parallel", "activation_checkpointing", "cpu_offload"),
    *("max_time", "patience", "eval_every", "log_every", "save_every", "keep", "sample_prompt", "sample_tokens"),
}


# two-sided 95 % of Student's t, by the number of runs; beyond the table the last, which is wider than need be
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Band:
    """Where one more run is expected, with a probability of at least 95 % at each step."""

    preset: str
    runs: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]  # validation loss, nats per token
    half: tuple[float, ...]  # half the width

    def at(self, step: int) -> tuple[float, float] | None:
        """Lower and upper end at `step`, None where no evaluation of the band was."""
        if step not in self.steps:
            return None
        i = self.steps.index(step)
        return self.mean[i] - self.half[i], self.mean[i] + self.half[i]


def band_from(facts: dict[str, Any]) -> Band:
    """The band of a reference file: {"preset", "steps", "val": {seed: losses}}.

    The prediction interval of one more normal value: t s √(1 + 1/n) around the mean of n. The standard deviation s
    of so few runs is itself uncertain, so that of an evaluation is the root mean square over it and its neighbours.
    """
    runs = list(facts["val"].values())
    columns = list(zip(*runs, strict=True))
    variances = [statistics.variance(column) for column in columns]
    smooth = [statistics.fmean(variances[max(0, i - 1) : i + 2]) for i in range(len(variances))]
    factor = STUDENT.get(len(runs), STUDENT[max(STUDENT)]) * math.sqrt(1 + 1 / len(runs))
    return Band(
        facts["preset"],
        len(runs),
        tuple(facts["steps"]),
        tuple(statistics.fmean(column) for column in columns),
        tuple(factor * math.sqrt(v) for v in smooth),
    )


def shaping(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape a run's curve, defaults resolved."""
    settings = to_settings(config) | {"warmup_steps": config.warmup, "min_lr": config.final_lr}
    return {name: value for name, value in settings.items() if name not in FREE}


def band_of(config: TrainConfig, data: Any) -> Band | None:
    """The band for runs of these settings on data of these hashes ({"train.bin": SHA-256, …}), None if none ships."""
    for file in resources.files("llm.record").joinpath("reference").iterdir():
        if file.name.endswith(".json"):
            facts = json.loads(file.read_text(encoding="utf-8"))
            if facts["settings"] == shaping(config) and facts["data"] == data:
                return band_from(facts)
    return None


def band_of_run(run_dir: Path) -> Band | None:
    """The band for the run in `run_dir`, None also where its settings or env.json cannot be read."""
    try:
        config, env = from_settings(read_toml(str(run_dir / "config.toml"))), storage.read_json(run_dir / "env.json")
    except UserError:
        return None
    return band_of(config, env.get("data")) if isinstance(env, dict) else None


def normal(rows: list[Row], band: Band | None) -> str | None:
    """Whether the run lies where runs of its settings lie, at the last evaluation that the band has too.

    One evaluation in twenty of a usual run is outside by chance; so the one before must be outside as well.
    """
    if band is None:
        return None
    seen = [(step, loss, ends) for step, loss in losses(rows, "val") if (ends := band.at(step)) is not None]
    inside = [low <= loss <= high for _, loss, (low, high) in seen]
    if not seen:
        return None
    step, loss, (low, high) = seen[-1]
    where = f"{low:.3f} to {high:.3f} (95 % of {band.preset} runs on this text, from {band.runs} seeds)"
    if inside[-1]:
        return f"as usual: validation loss {loss:.3f} at step {step}, where {where} is expected"
    if inside[-2:-1] == [True]:
        return None
    word = "above" if loss > high else "below"
    return (
        f"not as usual: validation loss {loss:.3f} at step {step} is {word} {where}; the settings are the same, so "
        "look at the precision (--dtype float32), the versions in env.json, and losscurve verify"
    )
