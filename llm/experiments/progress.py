"""The runs of a try as their files show them. This module does not import torch, since the page uses it too."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.config import TrainConfig, from_settings, read_toml
from llm.experiments.trials import Try
from llm.record.metrics import NAME, best, read_record
from llm.record.runs import run_state
from llm.storage.lines import Row

Losses = dict[str, list[float]]  # of each setting: the lowest validation loss of each seed, nats per token


@dataclass(frozen=True)
class TriedRun:
    """Settings and record of a run, finished or not."""

    config: TrainConfig
    rows: list[Row]

    @property
    def is_complete(self) -> bool:
        """Whether it has ended, at its last step or before, by one of its limits."""
        return run_state(self.rows, self.config)[0] in ("done", "stopped")

    def lowest(self, share: float = 1) -> Row | None:
        """Return the evaluation with the lowest validation loss within `share` of the steps; None if there is none."""
        limit = step_at(self.config, share)
        return best([row for row in self.rows if row["step"] <= limit])

    def has_come_to(self, share: float) -> bool:
        """Whether its record goes to the last evaluation within `share` of its steps, or it is complete."""
        newest = max((row["step"] for row in self.rows), default=0)
        return newest >= step_at(self.config, share) or self.is_complete


Runs = dict[str, list[TriedRun]]  # of each setting, in the order of the seeds, without those that are not there yet


def step_at(config: TrainConfig, share: float) -> int:
    """Return the step of the last evaluation within `share` of the steps; 0 if there is none."""
    if share >= 1:
        return config.max_steps
    return int(share * config.max_steps / config.eval_every) * config.eval_every


def read_run(run_dir: Path) -> TriedRun | None:
    """Return the run in a folder, None if there is none yet. Raises UserError if it is damaged."""
    if not (run_dir / "config.toml").is_file() or not (run_dir / NAME).is_file():
        return None
    return TriedRun(from_settings(read_toml(str(run_dir / "config.toml"))), read_record(run_dir))


def read_runs(tried: Try) -> Runs:
    """Return the runs of a try. Raises UserError if one is damaged."""
    found = {}
    for setting in tried.settings:
        runs = [read_run(tried.run_dir(setting, seed)) for seed in tried.seeds]
        found[setting.name] = [run for run in runs if run is not None]
    return found


def losses_at(runs: Runs, share: float, seeds: int) -> Losses:
    """Return the losses within `share` of the steps of each setting of which all `seeds` runs have come that far."""
    found: Losses = {}
    for name, known in runs.items():
        rows = [run.lowest(share) for run in known if run.has_come_to(share)]
        losses = [float(row["loss"]) for row in rows if row is not None]
        if len(losses) == seeds:
            found[name] = losses
    return found


def best_first(known: Losses) -> Sequence[str]:
    """Return the names of settings by the mean of their losses."""
    return sorted(known, key=lambda name: statistics.fmean(known[name]))
