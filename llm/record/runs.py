"""The runs below a folder, and what each came to. Reads settings and records only; no torch."""

import dataclasses
import os
import re
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from llm.config import GPTConfig, TrainConfig, from_settings, read_toml
from llm.errors import UserError
from llm.record.metrics import NAME, best, losses, read_record
from llm.storage.lines import Row

FOLDERS = 20_000  # looked into by one search


PASSED_BY = re.compile(r"\..*|(damaged-)?step-\d+.*|node_modules|__pycache__")


@dataclass(frozen=True)
class Summary:
    """What a run came to; None for what its files do not tell. Losses in nats per token."""

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
    written: float | None = None  # when its record was last written, seconds since 1970


def find(folder: Path) -> tuple[list[Path], bool]:
    """The run folders in and below `folder`, nearest first, and whether all of it was looked through.

    Links are not followed; hidden folders and saved states are passed by. Raises UserError if `folder` is not there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that has runs in or below it")
    found, waiting, looked = [], deque([folder]), 0
    while waiting and looked < FOLDERS:
        here, looked = waiting.popleft(), looked + 1
        try:
            with os.scandir(here) as entries:
                inside = sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in entries)
        except OSError:  # not ours to read, or just gone
            continue
        files = {name for name, _, is_file in inside if is_file}
        # another program may have one of these too
        if len(files & {"config.toml", NAME, "env.json"}) >= 2 and files & {"config.toml", NAME}:
            found.append(here)
        waiting += [here / name for name, is_folder, _ in inside if is_folder and not PASSED_BY.fullmatch(name)]
    return found, not waiting


def summary(path: Path) -> Summary:
    """What the run in `path` came to. One that cannot be read is "damaged", with the reason."""
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
        known = dataclasses.replace(known, max_steps=config.max_steps, parameters=parameters(config.model))
        if not (path / NAME).is_file():
            return dataclasses.replace(known, state="unfinished", reason=f"no {NAME} yet")
        rows = read_record(path)
    except (UserError, OSError) as error:
        return dataclasses.replace(known, reason=str(error).replace(f"{path}{os.sep}", ""))
    evaluations, low = losses(rows, "val"), best(rows)
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
    state, reason = standing(rows, config)
    return dataclasses.replace(
        known,
        state=state,
        reason=reason,
        step=max((row["step"] for row in rows), default=0),
        best=low["loss"] if low else None,
        bits_per_byte=low["bits_per_byte"] if low else None,
        best_step=low["step"] if low else None,
        last=evaluations[-1][1] if evaluations else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )


def standing(rows: list[Row], config: TrainConfig) -> tuple[str, str]:
    """Whether a run is done, as far as its record tells, and if not, why."""
    step = max((row["step"] for row in rows), default=0)
    if step >= config.max_steps:
        return "done", ""
    evaluations, low = [row for row in rows if row["split"] == "val"], best(rows)
    if config.max_time is not None and max((row["seconds"] or 0.0 for row in rows), default=0.0) >= config.max_time:
        return "stopped", "max_time"
    stale = sum(row["step"] > low["step"] for row in evaluations) if low else len(evaluations)
    if config.patience is not None and stale >= config.patience:
        return "stopped", "patience"
    trained = [row for row in rows if row["split"] == "train"]
    if trained and trained[-1].get("refused") and trained[-1]["loss"] is None:
        return "unfinished", "its last losses or gradients were not finite"
    return "unfinished", "" if evaluations else "no evaluation yet"


def parameters(config: GPTConfig) -> int:
    """How many a `GPT` of this shape has."""
    width, wide = config.n_embd, config.ffn_mult * config.n_embd
    attention = 4 * width * width + (4 * width if config.bias else 0)
    block = attention + 2 * wide * width + wide + width + 4 * width  # feed-forward, its biases, two norms
    tables = config.vocab_size * (1 if config.tied_lm_head else 2) + config.block_size
    return tables * width + config.n_layer * block + 2 * width
