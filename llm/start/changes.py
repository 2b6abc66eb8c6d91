"""What a resumed run may change, and what makes it another run."""

import os
import shlex
from pathlib import Path
from typing import Any

from llm.config import MODEL_FIELDS, TrainConfig, from_settings, to_settings
from llm.errors import UserError
from llm.start.run_data import places_of
from llm.tokens.reuse import unused

# what a resumed run may change: none of it alters a batch, a draw or the shape of the model
RESUMABLE = {
    *("max_steps", "max_time", "patience", "eval_every", "eval_tokens", "log_every", "save_every", "keep"),
    *("data_dir", "out_dir", "device", "compile", "sample_prompt", "sample_tokens"),
    *("parallel", "activation_checkpointing", "cpu_offload"),
}


SPLIT = "batch_size x gradient_accumulation_steps"  # of a step's windows: another split of the same is the same run


def as_the_run(config: TrainConfig, out_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` without those that name what the run has: "auto", which it has chosen, its start by another spelling,
    and its text, which `check_same_text` compares.
    """
    kept = {name: value for name, value in changes.items() if name != "text" and (name, value) != ("dtype", "auto")}
    if config.init_from and kept.get("init_from"):
        given = Path(os.path.abspath(str(kept["init_from"])))
        if given in {Path(os.path.abspath(place)) for place in places_of(config.init_from, out_dir, config)}:
            del kept["init_from"]
    return kept


def another_run(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first setting that differs and that a resumed run may not change; None if there is none."""
    before, after = decisive(before), decisive(after)
    return next((name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)), None)


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run the run it is; how a step's windows are split counts by their number alone."""
    size, steps = (settings.get(name, 0) for name in SPLIT.split(" x "))
    kept = {name: value for name, value in settings.items() if name not in {*RESUMABLE, *SPLIT.split(" x ")}}
    return kept | {SPLIT: size * steps}


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A run's settings with `changes` laid over them. Raises UserError for one that would be another run."""
    wanted = from_settings(changes, config)
    name = another_run(before := to_settings(config), after := to_settings(wanted))
    if name == SPLIT:
        raise UserError(
            f"{name} was {split_of(config)} = {config.windows_per_step} windows a step in this run and cannot become "
            f"{split_of(wanted)} = {wanted.windows_per_step} on --resume; {same_windows(config, wanted)}"
        )
    if name:
        raise UserError(
            f"{name} was {before.get(name)!r} in this run and cannot become {after.get(name)!r} on --resume; "
            f"leave it out, or start another run with: {new_run_command(config, {name: after.get(name)})}"
        )
    return wanted


def split_of(config: TrainConfig) -> str:
    return f"{config.batch_size} x {config.gradient_accumulation_steps}"


def same_windows(config: TrainConfig, wanted: TrainConfig) -> str:
    """How to have the windows of a step of `config` in micro-batches of about the size that was wanted."""
    windows, most = config.windows_per_step, wanted.batch_size
    if most == config.batch_size:  # more micro-batches alone were asked for
        most = max(1, windows // wanted.gradient_accumulation_steps)
    size = next(size for size in range(min(most, windows), 0, -1) if windows % size == 0)
    flags = f"--batch_size {size} --gradient_accumulation_steps {windows // size}"
    return f"split the same {windows} otherwise, with {flags}"


def new_run_command(config: TrainConfig, changes: dict[str, Any]) -> str:
    """The command for a run like that of `config` with `changes`; from its weights, if they fit."""
    out_dir = config.out_dir.rstrip("/")
    words = ["losscurve", "train", "--preset", f"{out_dir}/config.toml"]
    if not changes.keys() & (MODEL_FIELDS.keys() - {"dropout"} | {"vocab_size", "tokenizer", "init_from"}):
        words += ["--init_from", out_dir]
    for name, value in changes.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join([*words, "--out_dir", unused(f"{out_dir}-2")])
