"""The runs of a try as their files show them, and its outcome: the settings in order, each with losses and verdict.

This module does not import torch, since the page uses it too.
"""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config import FIELDS, TrainConfig, from_settings, read_toml, write_toml
from llm.experiments.paired import Difference, holm, looks_at_best, paired_difference, verdict
from llm.experiments.trials import Setting, Try
from llm.record.metrics import NAME, best, read_record
from llm.record.runs import run_state
from llm.storage.lines import Row
from llm.text.corpus import NAMED_TEXTS

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
        """Whether its record goes to the last evaluation within `share` of its steps, or it is complete.

        False if the only one within it is that of step 0, which does not say how well a setting trains.
        """
        place = step_at(self.config, share)
        newest = max((row["step"] for row in self.rows), default=0)
        return place > 0 and (newest >= place or self.is_complete)


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


def losses_at(tried: Try, runs: Runs, share: float = 1) -> Losses:
    """Return the losses within `share` of the steps of the settings of which the runs of all seeds have come that far.

    Those that were stopped are left out.
    """
    found: Losses = {}
    for name, known in runs.items():
        rows = [run.lowest(share) for run in known if run.has_come_to(share)]
        losses = [float(row["loss"]) for row in rows if row is not None]
        if len(losses) == len(tried.seeds) and name not in tried.stopped:
            found[name] = losses
    return found


def best_first(known: Losses) -> Sequence[str]:
    """Return the names of settings by the mean of their losses."""
    return sorted(known, key=lambda name: statistics.fmean(known[name]))


@dataclass(frozen=True)
class Outcome:
    """What came out of one setting. Losses are the lowest validation losses of its runs, in nats per token."""

    setting: Setting
    runs: Sequence[TriedRun]  # those that are there
    losses: Sequence[float] = ()  # of each seed; () if the setting was stopped, or is not finished
    difference: Difference | None = None  # from the reference; None for the reference itself
    words: str = ""
    is_reference: bool = False  # of one setting at most, with which the others are compared

    @property
    def mean(self) -> float | None:
        """The mean loss over the seeds."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def bits_per_byte(self) -> float | None:
        """The mean bits per byte over the seeds; None if the setting has no losses, or its text is unknown."""
        rows = [run.lowest() for run in self.runs]
        bits = [row["bits_per_byte"] for row in rows if row and row["bits_per_byte"] is not None]
        return statistics.fmean(bits) if self.losses and len(bits) == len(rows) else None


def outcomes(tried: Try) -> list[Outcome]:
    """Return the outcome of each setting: the finished ones, best first, then the others in their order.

    Raises UserError if a run is damaged.
    """
    runs = read_runs(tried)
    known = losses_at(tried, runs)
    ranked = best_first(known)
    by_name = {setting.name: setting for setting in tried.settings}
    # "": a search has begun no setting yet
    reference = next(iter(by_name if tried.against == "first" else ranked or by_name), "")
    differences = differences_from(reference, known, tried.against) if reference in known else {}
    found = []
    for name in ranked:
        difference = differences.get(name)
        words = verdict(difference) if difference else f"the {tried.against}" if name == reference else "not compared"
        found.append(Outcome(by_name[name], runs[name], known[name], difference, words, name == reference))
    for name in (name for name in by_name if name not in known):
        stop = tried.stopped.get(name)
        words = f"stopped at step {stop['step']:,}: {stop['words']}" if stop else "not finished"
        found.append(Outcome(by_name[name], runs[name], words=words, is_reference=name == reference))
    return found


def differences_from(reference: str, known: Losses, against: str) -> dict[str, Difference]:
    """Return the difference of each other setting from the reference, which is the "best" or the "first" of them."""
    others = [name for name in known if name != reference]
    looks = looks_at_best(len(known)) if against == "best" else 1
    found = holm([paired_difference(known[name], known[reference]) for name in others], looks)
    return dict(zip(others, found, strict=True))


def columns(tried: Try, found: Sequence[Outcome]) -> dict[str, list[str]]:
    """Return the cells of the table of a try, by title."""
    means = [outcome.mean for outcome in found]
    spreads = [statistics.stdev(outcome.losses) if len(outcome.losses) > 1 else None for outcome in found]
    return {
        "setting": [outcome.setting.name for outcome in found],
        "val loss": ["" if mean is None else f"{mean:.4f}" for mean in means],
        "± of a seed": ["" if spread is None else f"{spread:.4f}" for spread in spreads],
        "bits/byte": ["" if bits is None else f"{bits:.3f}" for bits in (outcome.bits_per_byte for outcome in found)],
        f"against the {tried.against}": [outcome.words for outcome in found],
    }


def best_toml(tried: Try, found: Sequence[Outcome], anchored: bool = False) -> str | None:
    """Return the best setting as TOML, for a run of its own, with the verdicts as comments; None if none is finished.

    Of a try for a given time it has only the settings that were asked for: the others suited the time of a run there,
    and `train --preset FILE --time T` chooses them for T. With `anchored`, what is named by its path has an absolute
    one, so that the file means the same in any folder.
    """
    if not found or not found[0].losses:
        return None
    config = tried.config(found[0].setting, tried.seeds[0])
    places: dict[str, Any] = {"out_dir": TrainConfig().out_dir}
    if anchored:
        places["text"] = tuple(word if word in NAMED_TEXTS else _absolute(word) for word in config.text)
        places["teacher"] = tuple(map(_absolute, config.teacher))
        places |= {name: _absolute(value) for name in ("data_dir", "init_from") if (value := getattr(config, name))}
    lines = [f"# {outcome.setting.name}: {outcome.words}" for outcome in found]
    title = f"# the best of {len(found)} settings; seeds of each: {len(tried.seeds)}"
    best = found[0].setting.changes
    names = {"text", *tried.given, *tried.asked.get("preset", {}), *best} if tried.seconds else FIELDS
    return "\n".join([title, *lines, write_toml(dataclasses.replace(config, **places), names)])


def _absolute(place: str) -> str:
    """Return the absolute path of a file or folder that is there; else the name as it is, such as one on the hub."""
    return os.path.abspath(place) if os.path.exists(place) else place
