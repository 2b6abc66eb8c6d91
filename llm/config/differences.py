"""Compare the settings of a run with the defaults, or with those of another run."""

import dataclasses
from collections.abc import Collection
from typing import Any

from llm.config.recipe import GPTConfig, TrainConfig
from llm.config.settings import to_settings


def differing_settings(config: TrainConfig, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that differ from the chapter's recipe, except those in `ignored`.

    `warmup_steps` and `min_lr` differ only if they are not the defaults that follow from the other settings. Settings
    that the recipe's architecture or optimizer does not have are compared with their own defaults.
    """
    derived = _with_derived(config)
    same_kind = TrainConfig(optimizer=config.optimizer, model=GPTConfig(arch=config.model.arch))
    usual = to_settings(same_kind) | to_settings(TrainConfig())
    usual |= {"warmup_steps": derived.warmup, "min_lr": derived.final_lr}
    return {
        name: value for name, value in to_settings(config).items() if name not in ignored and value != usual.get(name)
    }


def settings_apart(ours: TrainConfig, theirs: TrainConfig, ignored: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return (ours, theirs) of each setting that differs, except those in `ignored`.

    A value is None where a setting is not given, does not apply, or is the default that follows from other settings.
    """
    both = [_given_settings(config) for config in (ours, theirs)]
    names = [name for name in dict.fromkeys([*both[0], *both[1]]) if name not in ignored]
    pairs = {name: (both[0].get(name), both[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def resolved_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the flat settings of a config, with the defaults that follow from other settings."""
    settings = to_settings(config) | {"warmup_steps": config.warmup, "min_lr": config.final_lr}
    if config.schedule == "wsd":
        settings["decay_fraction"] = config.cooldown
    if config.model.arch == "llama":
        settings |= {"n_kv_head": config.model.kv_heads, "ffn_dim": config.model.ffn_width}
    return settings


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
