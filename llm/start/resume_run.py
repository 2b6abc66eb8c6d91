"""Go on with a run from its newest checkpoint that verifies."""

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
from llm.machine.device import DTYPES, choose_device, environment
from llm.machine.parallel import check_parallel
from llm.machine.world import ALONE, World
from llm.record import metrics
from llm.record.samples import Samples
from llm.start.agreement import agree, local_rank
from llm.start.build import build, connect
from llm.start.changes import SPLIT, another_run, as_the_run, changed, decisive, new_run_command, split_of
from llm.start.run_data import beside, open_run_data
from llm.start.run_folder import Say, disk_needed, say_limits, write_environment
from llm.start.texts import run_tokenizer
from llm.storage import checkpoint
from llm.tokens.reuse import default_folder, made_from, unused
from llm.training.live import LiveRun
from llm.training.state import newest_state, restore
from llm.weights import run_config


@contextmanager
def resume_run(
    out_dir: Path, changes: dict[str, Any], say: Say = lambda _: None, world: World = ALONE
) -> Iterator[LiveRun]:
    """The run in `out_dir`, going on from its newest saved state that verifies, in as many processes as there are.

    `changes` are settings that differ from the run's own, of those in RESUMABLE. Raises UserError
    for others, for a run that is not there, and for one that is complete.
    """
    with contextlib.ExitStack() as stack:
        with world.together():
            before = from_settings(world.first(lambda: to_settings(run_config(out_dir))))
            text = () if world.restarted else coerce("text", changes.get("text", ()))  # else it is the same command
            config = changed(before, as_the_run(before, out_dir, changes) | {"out_dir": out_dir})
            device = choose_device(config.device, local_rank(world))
            check_parallel(config, world, DTYPES[config.dtype])
            if world.leads:
                stack.enter_context(storage.locked(out_dir, "this run folder"))
            groups, facts, passed_over = newest_state(out_dir, world)
            check_same_settings(out_dir, before, facts)
            check_unfinished(config, facts.get("progress", {}))
            data = open_run_data(out_dir, before, facts.get("data"), changes.get("data_dir"), say)
            if text and world.leads:
                check_same_text(text, config, data.folder, say)
            config = from_settings({"data_dir": beside(data.folder, out_dir)}, config)
            tokenizer = run_tokenizer(out_dir, config.model.vocab_size, say, data.folder)
            agree(config, data, device, world)
        parts = build(config, data, tokenizer, device, DTYPES[config.dtype], world)
        restored = restore(parts, groups, facts)
        with world.together():
            if world.leads:
                storage.check_writable(out_dir, disk_needed(parts.model, config))
                for state, reason in passed_over.items():
                    say(f"passed over a saved state: {reason}; it is now {checkpoint.set_aside(state).name}")
                say_changes(out_dir, data, say)
                if config.max_steps != before.max_steps:
                    then, now = before.max_steps, config.max_steps
                    say(f"max_steps was {then} and is {now}: the schedule changes from here on")
                if (then_split := split_of(before)) != (now_split := split_of(config)):
                    say(
                        f"{SPLIT} was {then_split} and is {now_split}: the same windows, and losses that may differ in "
                        f"their last digits"
                    )
                if config != before:
                    storage.write_text(out_dir / "config.toml", write_toml(config))
                metrics.cut(out_dir, restored.step)
                Samples(out_dir).cut(restored.step)
                say_limits(say)
            world.begun()
        connect(parts, say)
        yield LiveRun(parts, out_dir, restored, config.sample_prompt or "\n")


def check_same_settings(out_dir: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raises UserError if config.toml is not what the saved state was trained with."""
    saved, now = facts.get("settings"), json.loads(json.dumps(to_settings(config)))
    if not isinstance(saved, dict):
        raise UserError(f"{out_dir}: its saved state is of another version (no settings in state.json)")
    if name := another_run(saved, now):
        ours, theirs = ({**settings, **decisive(settings)}.get(name) for settings in (now, saved))
        raise UserError(
            f"{out_dir / 'config.toml'}: {name} is {ours!r}, and the saved state was trained with {theirs!r}; "
            f"put that back"
        )


def check_same_text(text: tuple[str, ...], config: TrainConfig, folder: Path, say: Say) -> None:
    """Raises UserError where `text`, by its content, is not what the token files of a run were made from."""
    if not made_from(folder, dataclasses.replace(config, text=text), say=say):
        tokens = unused(f"{default_folder(TrainConfig(text=text))}-for-{Path(config.out_dir).resolve().name}")
        raise UserError(
            f"text = {' '.join(text)}: not the text that {folder} was made from; leave --text out to go on with that, "
            f"or train on it with: {new_run_command(config, {'text': text, 'data_dir': tokens})}"
        )


def say_changes(out_dir: Path, data: TokenData, say: Say) -> None:
    """Say what is not as it was when the run began (env.json): the last digits of its numbers may change with it."""
    try:
        then = storage.read_json(out_dir / "env.json")
    except UserError:
        then = None
    now = json.loads(json.dumps(environment()))
    if not isinstance(then, dict):
        say(f"{out_dir / 'env.json'}: not readable, so nobody can tell if this machine is the one the run began on")
        then = {}
    changes = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if key in then and then[key] != now[key]]
    if changes:
        say(f"{'; '.join(changes)}: from here on the run may differ in its last digits")
    if changes or not then:
        write_environment(out_dir, data)


def check_unfinished(config: TrainConfig, progress: dict[str, Any]) -> None:
    """Raises UserError where the run has nothing left to do."""
    step, seconds = progress["step"], progress["seconds"]
    if step >= config.max_steps:
        raise UserError(f"{config.out_dir}: complete at step {step}; give a larger --max_steps to go on")
    if config.max_time is not None and seconds >= config.max_time:
        raise UserError(f"{config.out_dir}: has used its max_time of {config.max_time:g} s; give a larger --max_time")
    if config.patience is not None and progress["stale"] >= config.patience:
        raise UserError(f"{config.out_dir}: patience ran out at step {step}; give a larger --patience to go on")
