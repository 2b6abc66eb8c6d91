"""A run as its files show it, finished or not, and the runs that repeat one setting with other seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llm import storage
from llm.config import TrainConfig, from_settings, read_toml
from llm.config.differences import resolved_settings
from llm.errors import UserError, no_run
from llm.record.metrics import NAME, read_record, with_lower_loss
from llm.record.runs import Origin, origins
from llm.start.run_data import places_of
from llm.storage.lines import Row
from llm.tokens.token_files import files_of, read_meta

Axis = Literal["step", "tokens", "seconds"]
Unit = Literal["loss", "bits_per_byte"]

# settings that do not make another setting of a run: its seed, its places, and what is recorded when. What the text
# and the tokenizer are, the hashes of the token files say.
REPEATED = {
    *("seed", "text", "tokenizer", "data_dir", "out_dir", "eval_every", "log_every", "save_every", "keep"),
    *("max_time", "patience", "sample_prompt", "sample_tokens"),
}
MACHINE = ("platform", "machine", "processors", "processes", "threads", "cuda")  # of env.json


class ValidationText(NamedTuple):
    """The validation text, as the meta.json of its token files describes it."""

    source: tuple[str, float]  # SHA-256 of the whole text, and the fraction held out
    tokens: int


@dataclass(frozen=True)
class RecordedRun:
    """The settings, evaluations and data of a run. Losses in nats per token."""

    path: Path
    config: TrainConfig
    evaluations: list[dict[str, Any]]  # rows with a finite validation loss, that of the average where it is lower
    not_finite: int | None  # the step of the first evaluation whose loss was not finite
    hashes: dict[str, str]  # SHA-256 of the token files, by name; empty if unknown
    machine: tuple[Any, ...]
    text: ValidationText | None  # None if the data folder is not there, or has no meta.json
    val_tokens: int | None  # of the validation split; None if the data folder is not there
    origins: Sequence[Origin] = ()  # of a fork, and of the run that it was forked from, and so on

    @property
    def validation_hashes(self) -> dict[str, str]:
        """The hashes of the files of the validation split."""
        return {name: digest for name, digest in self.hashes.items() if name.startswith("val")}

    @property
    def evaluates_all(self) -> bool:
        """Whether an evaluation predicts the whole validation split, as far as its size is known."""
        return self.val_tokens is not None and self.val_tokens - 1 <= self.config.eval_tokens

    @property
    def identity(self) -> str:
        """The settings that repetitions have in common: its own, and those that it had before it was forked."""
        past = [(fork.step, fork.run if fork.before is None else _compared(fork.before)) for fork in self.origins]
        changed = [(step, before) for step, before in past if before]
        text = sorted(self.hashes.items()) or self.config.text
        return repr((_compared(resolved_settings(self.config)), changed, text))

    def shared_with(self, other: "RecordedRun") -> int:
        """Return the step up to which two runs are one, as one is a fork of the other, or both are of a third; else 0.

        A fork has copies of the rows before it, with their times, which no other training has.
        """
        last = 0
        for ours, theirs in zip(self.evaluations, other.evaluations, strict=False):
            if any(ours[name] != theirs[name] for name in ("step", "loss", "seconds")):
                break
            last = ours["step"]
        forks = [fork.step for fork in (*self.origins, *other.origins) if fork.step >= last]
        return min(forks, default=0) if last else 0

    def points(self, axis: Axis, unit: Unit, since: int = 0) -> list[tuple[float, float]]:
        """Return (place on the axis, loss) of each evaluation that has both, from the step `since` on."""
        rows = [row for row in self.evaluations if row["step"] >= since]
        return [(row[axis], row[unit]) for row in rows if row[axis] is not None and row[unit] is not None]

    def at(self, axis: Axis, place: float, unit: Unit) -> float:
        """Return the loss at a place within the evaluations, on a straight line between the two around it."""
        places, losses = zip(*self.points(axis, unit), strict=True)
        return float(np.interp(place, places, losses))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only, one for each seed."""

    name: str  # A, B, …
    runs: Sequence[RecordedRun]

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return [run.config.seed for run in self.runs]

    @property
    def forked_at(self) -> int | None:
        """The step at which its runs were forked from others; None if they are no forks."""
        return self.runs[0].origins[0].step if self.runs[0].origins else None

    def end(self, axis: Axis, unit: Unit) -> float | None:
        """Return the last place on the axis that all its runs have reached; None before an evaluation after step 0."""
        ends = [max((place for place, _ in run.points(axis, unit)), default=0.0) for run in self.runs]
        return min(ends) or None

    def losses(self, axis: Axis, place: float, unit: Unit) -> list[float]:
        """Return the loss of each run at a place."""
        return [run.at(axis, place, unit) for run in self.runs]


def read_run(path: Path, data_dir: str | None = None) -> RecordedRun:
    """Return the run in the folder `path`, up to its last whole row; `data_dir`: its token files, if they have moved.

    Raises:
        UserError: there is no run, or its settings or its record are damaged.
    """
    if not (path / "config.toml").is_file():
        raise no_run(path, "config.toml")
    config = from_settings(read_toml(str(path / "config.toml")))
    has_record = (path / NAME).exists()  # a run that has just begun has none
    return recorded_run(path, config, read_record(path) if has_record else [], data_dir)


def recorded_run(path: Path, config: TrainConfig, rows: Sequence[Row], data_dir: str | None = None) -> RecordedRun:
    """Return the run in the folder `path` whose settings and record are `config` and `rows`; `data_dir`: as above."""
    rows = [row for row in rows if row["split"] == "val"]
    facts = storage.read_facts(path / "env.json")  # {} if it is lost: what cannot be compared without it is said
    hashes = facts.get("data")
    hashes = hashes if isinstance(hashes, dict) else {}
    places = [*([Path(data_dir)] if data_dir else []), *places_of(config.data_dir or "data", path, config)]
    text = _find_text(places, hashes)
    return RecordedRun(
        path,
        config,
        evaluations=[with_lower_loss(row) for row in rows if row["loss"] is not None],
        not_finite=next((row["step"] for row in rows if row["loss"] is None), None),
        hashes=hashes,
        machine=(config.device, *(facts.get(name) for name in MACHINE)),
        text=text,
        val_tokens=text.tokens if text else _tokens_of_others(places),
        origins=origins(facts),
    )


def _compared(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in settings.items() if name not in REPEATED)


def _tokens_of_others(places: Sequence[Path]) -> int | None:
    """Return the validation tokens of the first folder whose token files have no meta.json, as nanoGPT's."""
    files = (folder / "val.bin" for folder in places if not (folder / "meta.json").exists())
    return next((file.stat().st_size // 2 for file in files if file.is_file()), None)


def _find_text(places: Sequence[Path], hashes: dict[str, str]) -> ValidationText | None:
    """Return what the meta.json in one of some folders says of the validation split with these hashes, if any does."""
    for folder in places:
        try:
            meta = read_meta(folder)
            files = [(file, facts) for file, facts in files_of(folder, "val", meta) if facts is not None]
            if meta and files and all(hashes.get(file.name) == facts["sha256"] for file, facts in files):
                source = meta["source"]["sha256"], meta["settings"]["val_fraction"]
                return ValidationText(source, sum(facts["tokens"] for _, facts in files))
        except (UserError, KeyError, TypeError):  # no meta.json of ours
            continue
    return None


def group_runs(runs: Sequence[RecordedRun]) -> tuple[list[Group], list[str]]:
    """Return the settings of the runs, in the order in which they come, and what is to be said of repeated runs.

    Of several runs with the same settings and seed, the first counts: the others tell nothing new.

    Raises:
        UserError: there are more settings than letters to name them.
    """
    settings: dict[str, dict[int, RecordedRun]] = {}
    notes = []
    for run in runs:
        by_seed = settings.setdefault(run.identity, {})
        first = by_seed.setdefault(run.config.seed, run)
        if first is not run:
            notes.append(f"{run.path}: left out, as it repeats {first.path} with the same seed{_apart(first, run)}")
    if len(settings) > 26:
        raise UserError(f"{len(settings)} settings are too many for one comparison; give at most 26")
    return [Group(chr(ord("A") + i), list(found.values())) for i, found in enumerate(settings.values())], notes


def _apart(first: RecordedRun, second: RecordedRun) -> str:
    """Return how far the losses of two runs are apart that should be equal."""
    losses = dict(first.points("step", "loss"))
    apart = [abs(loss - losses[step]) for step, loss in second.points("step", "loss") if step in losses]
    return f"; their validation losses differ by {max(apart):.2g} at most" if apart else ""
