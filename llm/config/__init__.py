"""Settings: fields with units, the recipe, presets and TOML files. No torch.

A setting has one name everywhere: the field here, the key in a TOML file, the flag on the command line and the keyword
of `llm.fit`.
"""

from llm.config.fields import (
    COUNTS,
    FLOAT32,
    NO_PATH,
    PATHS,
    TRUTHS,
    UNITS,
    check_expanded,
    check_path,
    describe,
    expanded,
    field_type,
    int_of_float,
    is_pattern,
    parse_duration,
    setting,
    shown,
    validate,
)
from llm.config.recipe import FIELDS, MODEL_FIELDS, PRESETS, TRAIN_FIELDS, GPTConfig, TrainConfig
from llm.config.settings import (
    ALIASES,
    LIMITED,
    coerce,
    from_settings,
    known_name,
    known_settings,
    over_preset,
    read_toml,
    to_settings,
    write_toml,
)

__all__ = [
    "ALIASES",
    "COUNTS",
    "FIELDS",
    "FLOAT32",
    "LIMITED",
    "MODEL_FIELDS",
    "NO_PATH",
    "PATHS",
    "PRESETS",
    "TRAIN_FIELDS",
    "TRUTHS",
    "UNITS",
    "GPTConfig",
    "TrainConfig",
    "check_expanded",
    "check_path",
    "coerce",
    "describe",
    "expanded",
    "field_type",
    "from_settings",
    "int_of_float",
    "is_pattern",
    "known_name",
    "known_settings",
    "over_preset",
    "parse_duration",
    "read_toml",
    "setting",
    "shown",
    "to_settings",
    "validate",
    "write_toml",
]
