"""Find the runs below a folder, summarise each, and say what a fork came from. Reads settings and records only,
without torch.
"""

import dataclasses
import os
import re
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from llm import storage
from llm.config import TrainConfig, from_settings, read_toml
from llm.config.counts import count_parameters
from llm.errors import UserError
from llm.record.chart_style import plain
from llm.record.metrics import NAME, best, losses, read_record
from llm.storage.lines import Row

FOLDERS = 20_000  # read by one search, at most
SKIPPED = re.compile(r"\..*|(damaged-)?step-\d+.*|node_modules|__pycache__")


@dataclass(frozen=True)
class Summary:
    """The state and the results of a run; None for what its files do not contain. Losses in nats per token."""

    path: Path
    state: str  # "done", "stopped", "unfinished" or "damaged"
    reason: str = ""  # why it is not done
    step: int | None = None
    max_steps: int | None = None
    best: float | None = None  # lowest validation loss
    bits_per_byte: float | None = None  # of that evaluation
    best_step: int | None = None
    last: float | None = None  # newest validation loss
    parameters: int | None = None
    tokens_per_second: float | None = None  # median of its training rows
    written: float | None = None  # last write of its record, in seconds since 1970


def find(folder: Path) -> tuple[list[Path], bool]:
    """Return the run folders in and below `folder`, nearest first, and whether the search was complete.

    It does not follow links, and skips hidden folders and checkpoints.

    Raises:
        UserError: `folder` does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that has runs in or below it")
    found = []
    waiting = deque([folder])
    searched = 0
    while waiting and searched < FOLDERS:
        here = waiting.popleft()
        searched += 1
        try:
            with os.scandir(here) as entries:
                inside = sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in entries)
        except OSError:  # no permission, or just deleted
            continue
        if _is_run({name for name, _, is_file in inside if is_file}):
            found.append(here)
        waiting += [here / name for name, is_folder, _ in inside if is_folder and not SKIPPED.fullmatch(name)]
    return found, not waiting


def _is_run(files: set[str]) -> bool:
    """Return whether a folder with these files is a run; other programs also write a file with one of these names."""
    return len(files & {"config.toml", NAME, "env.json"}) >= 2 and bool(files & {"config.toml", NAME})


def summary(path: Path) -> Summary:
    """Return the summary of the run in `path`. If it cannot be read, its state is "damaged", with the reason."""
    known = Summary(path, "damaged")
    try:
        known = dataclasses.replace(known, written=(path / NAME).stat().st_mtime)
    except FileNotFoundError:
        pass
    except OSError as error:
        return dataclasses.replace(known, reason=f"{NAME}: {error.strerror}")
    try:
        if not (path / "config.toml").is_file():
            raise UserError("no config.toml")
        config = from_settings(read_toml(str(path / "config.toml")))
        known = dataclasses.replace(known, max_steps=config.max_steps, parameters=count_parameters(config.model))
        if not (path / NAME).is_file():
            return dataclasses.replace(known, state="unfinished", reason=f"no {NAME} yet")
        rows = read_record(path)
    except (UserError, OSError) as error:
        return dataclasses.replace(known, reason=str(error).replace(f"{path}{os.sep}", ""))
    return _with_results(known, rows, config)


def _with_results(known: Summary, rows: list[Row], config: TrainConfig) -> Summary:
    """Return the summary with what its record contains."""
    evaluations = losses(rows, "val")
    lowest = best(rows)
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
    state, reason = run_state(rows, config)
    return dataclasses.replace(
        known,
        state=state,
        reason=reason,
        step=max((row["step"] for row in rows), default=0),
        best=lowest["loss"] if lowest else None,
        bits_per_byte=lowest["bits_per_byte"] if lowest else None,
        best_step=lowest["step"] if lowest else None,
        last=evaluations[-1][1] if evaluations else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )


def run_state(rows: list[Row], config: TrainConfig) -> tuple[str, str]:
    """Return the state of a run ("done", "stopped" or "unfinished") as far as its record shows it, and the reason."""
    if max((row["step"] for row in rows), default=0) >= config.max_steps:
        return "done", ""
    seconds = max((row["seconds"] or 0.0 for row in rows), default=0.0)
    if config.max_time is not None and seconds >= config.max_time:
        return "stopped", "max_time"
    evaluations = [row for row in rows if row["split"] == "val"]
    lowest = best(rows)
    without_gain = [row for row in evaluations if lowest is None or row["step"] > lowest["step"]]
    if config.patience is not None and len(without_gain) >= config.patience:
        return "stopped", "patience"
    trained = [row for row in rows if row["split"] == "train"]
    if trained and trained[-1].get("refused") and trained[-1]["loss"] is None:
        return "unfinished", "its last losses or gradients were not finite"
    return "unfinished", "" if evaluations else "no evaluation yet"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a fork began from."""

    run: str  # name of the run folder
    step: int
    before: dict[str, Any] | None  # the run's values of the settings that the fork changed; None if not recorded

    @property
    def line(self) -> str:
        """Return what a reader of the fork's record has to know."""
        return f"forked from {self.run} at step {self.step:,}: up to there, the record is that run's"


def origins(environment: object) -> list[Origin]:
    """Return what the run with this content of env.json was forked from, then what that was forked from, and so on."""
    known: list[Origin] = []
    found = environment.get("forked_from") if isinstance(environment, dict) else None
    while isinstance(found, dict) and type(found.get("step")) is int and isinstance(found.get("run"), str):
        before = found.get("before")
        name = plain(PurePath(found["run"]).name, 60)
        known.append(Origin(name, found["step"], before if isinstance(before, dict) else None))
        found = found.get("forked_from")
    return known


def origin_of(run_dir: Path) -> Origin | None:
    """Return the origin of the run in `run_dir`; None if it is no fork, or its env.json cannot be read."""
    return next(iter(origins(storage.read_facts(run_dir / "env.json"))), None)


def origin_lines(run_dir: Path) -> list[str]:
    """Return the origin of a fork as a list of one line, to stand before its verdicts; [] for other runs."""
    origin = origin_of(run_dir)
    return [origin.line] if origin else []
