"""The settings that a resumed run may change, and those that would make it another run."""

import os
import shlex
from pathlib import Path
from typing import Any

from llm.config import MODEL_FIELDS, TrainConfig, coerce, from_settings, to_settings, typed_words
from llm.errors import UserError
from llm.prepare.reuse import default_folder, unused
from llm.start.run_data import places_of

# a resumed run may change these: none alters a batch, a draw or the shape of the model
RESUMABLE = {
    *("max_steps", "max_time", "patience", "eval_every", "eval_tokens", "log_every", "save_every", "keep"),
    *("data_dir", "out_dir", "device", "compile", "sample_prompt", "sample_tokens"),
    *("parallel", "activation_checkpointing", "cpu_offload"),
}
# settings that need other token files
OTHER_TOKENS = {"text", "text_limit", "text_field", "tokenizer", "vocab_size", "val_fraction"}
SPLIT = "batch_size x gradient_accumulation_steps"  # another split of the same windows is the same run


def drop_restatements(config: TrainConfig, out_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return `changes` without those that repeat a setting of the run.

    These are `dtype = "auto"`, which the run has resolved; `init_from` and `teacher`, if they are another form of the
    same path; and `text`, which `check_same_text` compares.
    """
    kept = {name: value for name, value in changes.items() if name != "text" and (name, value) != ("dtype", "auto")}

    def is_same(ours: str, given: Any) -> bool:
        places = places_of(ours, out_dir, config)
        return os.path.abspath(str(given)) in {os.path.abspath(place) for place in places}

    if config.init_from and kept.get("init_from") and is_same(config.init_from, kept["init_from"]):
        del kept["init_from"]
    teachers = coerce("teacher", kept.get("teacher", ()))
    if config.teacher and len(teachers) == len(config.teacher) and all(map(is_same, config.teacher, teachers)):
        del kept["teacher"]
    return kept


def incompatible_setting(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return the first setting that differs and that a resumed run may not change, None if there is none."""
    before = identifying_settings(before)
    after = identifying_settings(after)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return name
    return None


def identifying_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a resume must not change. Of the windows of a step, only their number counts."""
    size, steps = (settings.get(name, 0) for name in SPLIT.split(" x "))
    kept = {name: value for name, value in settings.items() if name not in {*RESUMABLE, *SPLIT.split(" x ")}}
    return kept | {SPLIT: size * steps}


def apply_changes(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return a run's settings with `changes` applied. Raises UserError for a change that would make it another run."""
    wanted = from_settings(changes, config)
    before, after = to_settings(config), to_settings(wanted)
    name = incompatible_setting(before, after)
    if name == SPLIT:
        raise UserError(
            f"{name} was {split_of(config)} = {config.windows_per_step} windows a step in this run and cannot become "
            f"{split_of(wanted)} = {wanted.windows_per_step} on --resume; {split_remedy(config, wanted)}"
        )
    if name:
        command = new_run_command(config, wanted.out_dir, {name: after.get(name)})
        raise UserError(
            f"{name} was {before.get(name)!r} in this run and cannot become {after.get(name)!r} on --resume; "
            f"leave it out, or start another run with: {command}"
        )
    return wanted


def split_of(config: TrainConfig) -> str:
    """Return the split of a step's windows in the form of SPLIT, such as "8 x 4"."""
    return f"{config.batch_size} x {config.gradient_accumulation_steps}"


def split_remedy(config: TrainConfig, wanted: TrainConfig) -> str:
    """Return the flags that split the windows of `config` into micro-batches of about the size that was wanted."""
    windows = config.windows_per_step
    largest = wanted.batch_size
    if largest == config.batch_size:  # only more micro-batches were asked for
        largest = max(1, windows // wanted.gradient_accumulation_steps)
    size = next(size for size in range(min(largest, windows), 0, -1) if windows % size == 0)
    flags = f"--batch_size {size} --gradient_accumulation_steps {windows // size}"
    return f"split the same {windows} otherwise, with {flags}"


def new_run_command(config: TrainConfig, run_dir: str, changes: dict[str, Any]) -> str:
    """Return the command for a run like that of `config` in `run_dir` with `changes`, from its weights if they fit."""
    out_dir = run_dir.rstrip("/") or run_dir
    if changes.keys() & OTHER_TOKENS:
        text = changes.get("text") or config.text
        tokens = f"{default_folder(TrainConfig(text=text))}-for-{Path(out_dir).resolve().name}"
        changes = changes | {"data_dir": unused(tokens)}
    words = ["losscurve", "train", "--preset", f"{out_dir}/config.toml"]
    if not changes.keys() & (MODEL_FIELDS.keys() - {"dropout"} | {"vocab_size", "tokenizer", "init_from"}):
        words += ["--init_from", out_dir]
    for name, value in changes.items():
        if value is not None:
            words += [f"--{name}", *typed_words(name, value)]
    return shlex.join([*words, "--out_dir", unused(f"{out_dir}-2")])
