"""Settings by name: convert flags, TOML files and keywords to a checked config, and back."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llm.config import other_names
from llm.config.fields import (
    BOOLEAN_WORDS,
    COUNT_SUFFIXES,
    LISTS,
    PATHS,
    SECONDS_PER_UNIT,
    describe,
    expanded,
    field_type,
    parse_duration,
    parse_integer,
    short_repr,
)
from llm.config.recipe import (
    FIELDS,
    MODEL_FIELDS,
    MUON_SETTINGS,
    PRESETS,
    TEACHER_SETTINGS,
    TRAIN_FIELDS,
    TrainConfig,
)
from llm.errors import UserError

ALIASES = {  # nanoGPT's names that mean the same
    "max_iters": "max_steps",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "learning_rate": "max_lr",
    "warmup_iters": "warmup_steps",
}

TEXTS_WITH_LIMIT = ("tinystories", "fineweb-edu")  # the texts of llm.text.hub: text_limit applies to these only


# ---- one value


def coerce(name: str, value: Any) -> Any:
    """Return `value` (from a flag, a TOML file or Python) as the type of the field `name`. Raises UserError."""
    f = FIELDS[name]
    kind, is_optional = field_type(f)
    if value is None and is_optional:
        return None
    try:
        return _convert(f, kind, value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise UserError(f"{name} = {short_repr(value)}: expected {describe(f)}") from None


def _convert(f: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """Return `value` as a `kind`. Raises one of the exceptions that `coerce` catches."""
    if f.name in LISTS:
        return _convert_paths(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(value)
        return value
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise TypeError(value)
        return expanded(str(value)) if f.name in PATHS else str(value)
    if kind is bool:
        return value if isinstance(value, bool) else BOOLEAN_WORDS[value.lower()]
    if isinstance(value, bool):
        raise TypeError(value)
    if isinstance(value, str):
        return _parse_number(kind, f.metadata["unit"], value)
    if f.metadata["unit"] == "steps or duration" and isinstance(value, float):
        return value  # an int is steps, a float is seconds
    if kind is int and isinstance(value, float) and value != int(value):
        raise ValueError(value)
    return kind(value)


def _convert_paths(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, Path)) for item in items):
        raise TypeError(value)
    return tuple(expanded(str(item)) for item in items)


def _parse_number(kind: Any, unit: str, text: str) -> int | float:
    if unit == "duration":
        return parse_duration(text)
    if unit == "steps or duration" and text.strip()[-1:] in SECONDS_PER_UNIT:
        return parse_duration(text)
    if unit == "characters" and text[-1:] in COUNT_SUFFIXES:
        return int(float(text[:-1]) * COUNT_SUFFIXES[text[-1]])
    if kind is float:
        return float(text)
    if re.fullmatch(r"[+-]?[\d_]+", text):
        return int(text.replace("_", ""))
    return parse_integer(text)


# ---- many values


def resolve_name(name: str) -> str:
    """Return the field for `name`: our name or nanoGPT's, with hyphens or underscores.

    Raises UserError for an unknown name; the message suggests our name for it, or the most similar one.
    """
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in FIELDS:
        raise UserError(f"unknown setting {short_repr(name)}{_suggest(plain)}")
    return plain


def _suggest(name: str) -> str:
    found = other_names.find_our_name(name, FIELDS)
    if found:
        own, note = found
        return f"; use {own!r}" + (f" ({note})" if note else "")
    found = other_names.find_our_name(name, ("resume", "track", "nproc"))
    if found:
        own, note = found
        return f"; use the flag losscurve train --{own} ({note or 'see docs/scale.md'}), which is not a setting"
    near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def resolve_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with the names and types of our fields. Raises UserError, also if one is given twice."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        own = resolve_name(name)
        if own in values:
            raise UserError(f"{own} is given twice, by several of its names; give it once")
        values[own] = coerce(own, value)
    return values


def from_settings(settings: dict[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """Return `base` (default: the chapter's recipe) with the flat `settings` replaced in it. Raises UserError."""
    values = resolve_settings(settings)
    base = base or TrainConfig()
    train = {name: value for name, value in values.items() if name in TRAIN_FIELDS}
    model = {name: value for name, value in values.items() if name in MODEL_FIELDS}
    if train.get("vocab_size") is not None:
        model["vocab_size"] = train["vocab_size"]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model), **train)


# ---- a config as flat settings, as words and as TOML


def typed_words(name: str, value: Any) -> list[str]:
    """Return the value of a setting as the words that follow its flag."""
    if isinstance(value, tuple):
        return list(map(str, value))
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, float) and FIELDS[name].metadata["unit"] == "steps or duration":
        return [f"{value:.10g}s"]  # without the unit, it would be steps
    return [str(value)]


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the flat settings of a config: `from_settings(to_settings(c)) == c`.

    Settings that are None, and those of another architecture or optimizer or of no teachers, are left out.
    """
    values = {name: getattr(config, name) for name in TRAIN_FIELDS}
    unused: set[str] = set()
    if config.optimizer != "muon":
        unused |= {*MUON_SETTINGS}
    if not config.teacher:
        unused |= {"teacher", *TEACHER_SETTINGS}
    values = {name: value for name, value in values.items() if name not in unused}
    model = config.model
    values |= {name: getattr(model, name) for name, f in MODEL_FIELDS.items() if f.metadata["arch"] in ("", model.arch)}
    return {name: value for name, value in values.items() if value is not None}


def read_toml(source: str) -> dict[str, Any]:
    """Return the settings of a preset, by its name, or of a TOML file, by its path. Raises UserError."""
    if source in PRESETS:
        text = resources.files("llm.config").joinpath("presets", f"{source}.toml").read_text(encoding="utf-8")
    else:
        source = expanded(source)
        text = _read_toml_file(source)
    try:
        return resolve_settings(tomllib.loads(text))
    except (ValueError, RecursionError, UserError) as error:  # ValueError: not TOML, or a number too long
        raise UserError(f"{source}: {error}") from None


def _read_toml_file(path: str) -> str:
    if not path.endswith(".toml"):
        near = difflib.get_close_matches(path, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}, or a .toml file"
        raise UserError(f"unknown preset {path!r}; {hint}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # editors on Windows start a file with a byte-order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a valid path
        raise UserError(f"{path}: cannot be read ({error})") from None


def write_toml(config: TrainConfig, names: Collection[str] = tuple(FIELDS)) -> str:
    """Return the config as TOML text that `read_toml` reads back; with `names`, only these settings of it."""
    settings = {name: value for name, value in to_settings(config).items() if name in names}
    return "".join(f"{name} = {_format_toml_value(value)}\n" for name, value in settings.items())


def _format_toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_format_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids a bare DEL
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
