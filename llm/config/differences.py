"""Compare the settings of a run with the defaults."""

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
    derived = dataclasses.replace(config, warmup_steps=None, min_lr=None)
    same_kind = TrainConfig(optimizer=config.optimizer, model=GPTConfig(arch=config.model.arch))
    usual = to_settings(same_kind) | to_settings(TrainConfig())
    usual |= {"warmup_steps": derived.warmup, "min_lr": derived.final_lr}
    return {
        name: value for name, value in to_settings(config).items() if name not in ignored and value != usual.get(name)
    }
