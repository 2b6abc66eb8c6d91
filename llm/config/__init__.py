"""Settings: fields with units, the recipe, presets and TOML files. This package does not import torch.

A setting has one name everywhere: the field here, the key in a TOML file, the flag on the command line and the keyword
of `llm.fit`.
"""

from llm.config.differences import differing_settings
from llm.config.fields import (
    BOOLEAN_WORDS,
    LISTS,
    NO_PATH,
    check_expanded,
    check_path,
    check_value,
    expanded,
    field_type,
    is_pattern,
    parse_duration,
    short_repr,
)
from llm.config.over_preset import given_names, merged, over_preset
from llm.config.recipe import FIELDS, MODEL_FIELDS, PRESETS, TRAIN_FIELDS, GPTConfig, TrainConfig
from llm.config.settings import (
    ALIASES,
    TEXTS_WITH_LIMIT,
    coerce,
    from_settings,
    read_toml,
    resolve_settings,
    to_settings,
    typed_words,
    write_toml,
)

__all__ = [
    "ALIASES",
    "BOOLEAN_WORDS",
    "FIELDS",
    "LISTS",
    "MODEL_FIELDS",
    "NO_PATH",
    "PRESETS",
    "TEXTS_WITH_LIMIT",
    "TRAIN_FIELDS",
    "GPTConfig",
    "TrainConfig",
    "check_expanded",
    "check_path",
    "check_value",
    "coerce",
    "differing_settings",
    "expanded",
    "field_type",
    "from_settings",
    "given_names",
    "is_pattern",
    "merged",
    "over_preset",
    "parse_duration",
    "read_toml",
    "resolve_settings",
    "short_repr",
    "to_settings",
    "typed_words",
    "write_toml",
]
