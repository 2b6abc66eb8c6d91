"""Compare the settings of a run with the defaults, or with those of another run; name a folder by what differs."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from llm.config.recipe import TEACHER_SETTINGS, TRAIN_FIELDS, GPTConfig, TrainConfig
from llm.config.settings import to_settings


def differing_settings(config: TrainConfig, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that differ from the chapter's recipe, except those in `ignored`.

    `warmup_steps` and `min_lr` differ only if they are not the defaults that follow from the other settings. Settings
    that the recipe's architecture or optimizer does not have are compared with their own defaults.
    """
    derived = _with_derived(config)
    same_kind = TrainConfig(optimizer=config.optimizer, model=GPTConfig(arch=config.model.arch))
    usual = to_settings(same_kind) | to_settings(TrainConfig())
    usual |= {name: TRAIN_FIELDS[name].default for name in TEACHER_SETTINGS}
    usual |= {"warmup_steps": derived.warmup, "min_lr": derived.final_lr}
    return {
        name: value for name, value in to_settings(config).items() if name not in ignored and value != usual.get(name)
    }


def settings_apart(ours: TrainConfig, theirs: TrainConfig, ignored: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return (ours, theirs) of each setting that differs, except those in `ignored`.

    The values are those in force, given or by default; None where a setting is off or does not apply. A default that
    follows from another setting, such as `min_lr` from `max_lr`, does not count if it follows in both.
    """
    given = [_given_settings(config) for config in (ours, theirs)]
    in_force = [resolved_settings(config) for config in (ours, theirs)]
    found = {}
    for name in dict.fromkeys([*given[0], *given[1]]):
        pair = in_force[0].get(name), in_force[1].get(name)
        if name not in ignored and given[0].get(name) != given[1].get(name) and pair[0] != pair[1]:
            found[name] = pair
    return found


def resolved_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the flat settings of a config, with the defaults that follow from other settings."""
    settings = to_settings(config) | {"warmup_steps": config.warmup, "min_lr": config.final_lr}
    if config.schedule == "wsd":
        settings["decay_fraction"] = config.cooldown
    if config.model.arch == "llama":
        model = config.model
        settings |= {"n_kv_head": model.kv_heads, "ffn_dim": model.ffn_width, "head_dim": model.head_size}
    return settings


def folder_name(changes: dict[str, Any]) -> str:
    """Return a name for the folder of a run with these changes, "max_lr=0.01", that every file system takes."""
    words = ",".join(
        f"{name}={value:.6g}" if type(value) is float else f"{name}={value}" for name, value in changes.items()
    )
    return re.sub(r"[^\w.,=+-]", "_", words)[:150]


def _given_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the flat settings of a config without `warmup_steps` and `min_lr` where these follow from others."""
    derived = _with_derived(config)
    settings = to_settings(config)
    for name, follows in (("warmup_steps", derived.warmup), ("min_lr", derived.final_lr)):
        if settings.get(name) == follows:
            del settings[name]
    return settings


def _with_derived(config: TrainConfig) -> TrainConfig:
    """Return `config` with the warm-up and the final rate that follow from its other settings."""
    return dataclasses.replace(config, warmup_steps=None, min_lr=None)
