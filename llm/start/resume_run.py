"""Resume a run from its newest checkpoint, in the stages of a new one: request, text, parts, folder."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm import storage
from llm.config import TrainConfig, coerce, from_settings, to_settings, write_toml
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import DTYPES, choose_device, environment, fixed_order
from llm.machine.parallel import check_parallel
from llm.machine.world import ALONE, World
from llm.prepare.reuse import made_from
from llm.record import metrics
from llm.record.samples import Samples
from llm.start.agreement import agree, local_rank
from llm.start.build import build, connect
from llm.start.changes import (
    SPLIT,
    apply_changes,
    drop_restatements,
    identifying_settings,
    incompatible_setting,
    new_run_command,
    split_of,
)
from llm.start.run_data import beside, open_run_data
from llm.start.run_folder import Say, disk_needed, disk_used, say_limits, write_environment
from llm.start.texts import check_prompt, run_tokenizer
from llm.storage import checkpoint
from llm.training.live import LiveRun
from llm.training.predictions import open_predictions
from llm.training.state import newest_state, restore
from llm.weights import run_config


@contextmanager
def resume_run(
    out_dir: Path, changes: dict[str, Any], say: Say = lambda _: None, world: World = ALONE
) -> Iterator[LiveRun]:
    """Yield the run in `out_dir`, restored from its newest checkpoint that verifies, on any number of processes.

    `changes` are new values of settings; only those in `changes.RESUMABLE` may differ from the run's own.

    Raises UserError for a change of another setting or of the text, for a folder without a run, and for a run that is
    complete.
    """
    with contextlib.ExitStack() as stack:
        with world.together():
            before, config = check_request(out_dir, changes, world)
            device = choose_device(config.device, local_rank(world))
            check_parallel(config, world, DTYPES[config.dtype])
            if world.leads:
                stack.enter_context(storage.locked(out_dir, "this run folder"))
            groups, facts, unusable = newest_state(out_dir, world)
            check_same_settings(out_dir, before, facts)
            check_unfinished(config, facts.get("progress", {}))
            data = open_run_data(out_dir, before, facts.get("data"), changes.get("data_dir"), say)
            text = () if world.restarted else coerce("text", changes.get("text", ()))  # a restart is the same command
            if text and world.leads:
                check_same_text(text, config, data.folder, say)
            config = from_settings({"data_dir": beside(data.folder, out_dir)}, config)
            tokenizer = run_tokenizer(out_dir, config.model.vocab_size, say, data.folder)
            check_prompt(tokenizer, config.sample_prompt)
            agree(config, data, device, world)
        stack.enter_context(fixed_order(device))
        parts = build(config, data, tokenizer, device, DTYPES[config.dtype], world)
        progress = restore(parts, groups, facts)
        with world.together():
            if world.leads:
                if config.teacher:
                    parts.predictions = open_predictions(out_dir, config, len(data.train))
                storage.check_writable(out_dir, disk_needed(config) - disk_used(out_dir))
                set_aside(unusable, say)
                say_changes(out_dir, data, before, config, say)
                cut_back(out_dir, before, config, progress.step)
                say_limits(say)
            world.mark_started()
        connect(parts, say)
        yield LiveRun(parts, out_dir, progress, config.sample_prompt or "\n")


def check_request(out_dir: Path, changes: dict[str, Any], world: World) -> tuple[TrainConfig, TrainConfig]:
    """Return the settings that the run had, and those that it continues with. Rank 0 reads them for all.

    Raises UserError if there is no run, or if a change would make it another run.
    """
    before = from_settings(world.first(lambda: to_settings(run_config(out_dir))))
    wanted = drop_restatements(before, out_dir, changes) | {"out_dir": out_dir}
    return before, apply_changes(before, wanted)


def _with_newer_settings(out_dir: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint with the defaults of those that it lacks, because they are newer than it."""
    try:
        return dict(json.loads(json.dumps(to_settings(from_settings(saved)))))
    except UserError as error:
        raise UserError(f"{out_dir}: its checkpoint has other settings ({error}); start another run") from None


def check_same_settings(out_dir: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raise UserError if config.toml differs from the settings that the checkpoint was trained with."""
    saved = facts.get("settings")
    now = json.loads(json.dumps(to_settings(config)))
    if not isinstance(saved, dict):
        raise UserError(f"{out_dir}: its checkpoint is of another version (no settings in state.json)")
    saved = _with_newer_settings(out_dir, saved)
    if name := incompatible_setting(saved, now):
        ours, theirs = ({**settings, **identifying_settings(settings)}.get(name) for settings in (now, saved))
        raise UserError(
            f"{out_dir / 'config.toml'}: {name} is {ours!r}, and the checkpoint was trained with {theirs!r}; "
            f"put that back"
        )


def check_unfinished(config: TrainConfig, progress: dict[str, Any]) -> None:
    """Raise UserError if the run is already complete."""
    step, seconds = progress["step"], progress["seconds"]
    if step >= config.max_steps:
        raise UserError(f"{config.out_dir}: complete at step {step}; give a larger --max_steps to go on")
    if config.max_time is not None and seconds >= config.max_time:
        raise UserError(f"{config.out_dir}: has used its max_time of {config.max_time:g} s; give a larger --max_time")
    if config.patience is not None and progress["stale"] >= config.patience:
        raise UserError(f"{config.out_dir}: patience ran out at step {step}; give a larger --patience to go on")


def check_same_text(text: tuple[str, ...], config: TrainConfig, folder: Path, say: Say) -> None:
    """Raise UserError if the token files of the run were not made from the content of `text`."""
    if made_from(folder, dataclasses.replace(config, text=text), say=say):
        return
    raise UserError(
        f"text = {' '.join(text)}: not the text that {folder} was made from; leave --text out to go on with that, "
        f"or train on it with: {new_run_command(config, config.out_dir, {'text': text})}"
    )


def set_aside(unusable: dict[Path, str], say: Say) -> None:
    """Rename checkpoints that failed verification, so that no later resume tries them again."""
    for state, reason in unusable.items():
        say(f"skipped a checkpoint: {reason}; it is now {checkpoint.set_aside(state).name}")


def say_changes(out_dir: Path, data: TokenData, before: TrainConfig, config: TrainConfig, say: Say) -> None:
    """Say what differs from the run before the resume: settings, and the environment in env.json."""
    then = storage.read_facts(out_dir / "env.json")
    now = json.loads(json.dumps(environment()))
    if not then:
        say(f"{out_dir / 'env.json'}: not readable, so it is unknown whether this machine is the one the run began on")
    changes = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if key in then and then[key] != now[key]]
    if changes:
        say(f"{'; '.join(changes)}: from here on the run may differ in its last digits")
    if changes or not then:
        write_environment(out_dir, data, then)
    if config.max_steps != before.max_steps:
        say(f"max_steps was {before.max_steps} and is {config.max_steps}: the schedule changes from here on")
    if split_of(config) != split_of(before):
        splits = f"{SPLIT} was {split_of(before)} and is {split_of(config)}"
        say(f"{splits}: the same windows, and losses that may differ in their last digits")


def cut_back(out_dir: Path, before: TrainConfig, config: TrainConfig, step: int) -> None:
    """Write changed settings, and delete what was recorded after the checkpoint of `step`."""
    if config != before:
        storage.write_text(out_dir / "config.toml", write_toml(config))
    metrics.Record(out_dir).cut(step)
    Samples(out_dir).cut(step)
