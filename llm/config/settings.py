"""Settings by name: from flags, TOML files and keywords to a checked config, and back."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llm.config import other_names
from llm.config.fields import (
    COUNTS,
    PATHS,
    TRUTHS,
    UNITS,
    describe,
    expanded,
    field_type,
    int_of_float,
    parse_duration,
    shown,
)
from llm.config.recipe import FIELDS, MODEL_FIELDS, PRESETS, TRAIN_FIELDS, TrainConfig
from llm.errors import UserError

# nanoGPT's names, where they mean the same
ALIASES = {
    "max_iters": "max_steps",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "learning_rate": "max_lr",
    "warmup_iters": "warmup_steps",
}


LIMITED = ("tinystories", "fineweb-edu")  # the texts of llm.hub, which have a text_limit


def coerce(name: str, value: Any) -> Any:
    """`value` (from a flag, a TOML file or Python) as the type of the field `name`, or UserError."""
    f = FIELDS[name]
    kind, optional = field_type(f)
    wrong = UserError(f"{name} = {shown(value)}: expected {describe(f)}")
    if value is None and optional:
        return None
    if name == "text":
        items = [value] if isinstance(value, (str, Path)) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, Path)) for i in items):
            raise wrong
        return tuple(expanded(str(item)) for item in items)
    try:
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise wrong
            return value
        if kind is str:
            if not isinstance(value, (str, Path)):
                raise wrong
            return expanded(str(value)) if name in PATHS else str(value)
        if kind is bool:
            return value if isinstance(value, bool) else TRUTHS[value.lower()]
        if isinstance(value, bool):
            raise wrong
        if f.metadata["unit"] == "duration" and isinstance(value, str):
            return parse_duration(value)
        if f.metadata["unit"] == "steps or duration":  # an int is steps, a float seconds
            if isinstance(value, float):
                return value
            if isinstance(value, str) and value.strip()[-1:] in UNITS:
                return parse_duration(value)
        if f.metadata["unit"] == "characters" and isinstance(value, str) and value[-1:] in COUNTS:
            return int(float(value[:-1]) * COUNTS[value[-1]])
        if kind is int and isinstance(value, float) and value != int(value):
            raise wrong
        if kind is int and isinstance(value, str):
            return int(value.replace("_", "")) if re.fullmatch(r"[+-]?[\d_]+", value) else int_of_float(value)
        return kind(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise wrong from None


def known_name(name: str) -> str:
    """The field that `name` (perhaps with hyphens, perhaps nanoGPT's) means, or UserError with ours or the nearest."""
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in FIELDS:
        raise UserError(f"unknown setting {shown(name)}{_hint(plain)}")
    return plain


def _hint(name: str) -> str:
    if found := other_names.ours(name, FIELDS):
        own, note = found
        return f"; here it is {own!r}" + (f" ({note})" if note else "")
    if found := other_names.ours(name, ("resume", "track", "nproc")):
        return f"; that is no setting but a flag: losscurve train --{found[0]} ({found[1] or 'see docs/scale.md'})"
    near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` by the names and in the types of our fields. Raises UserError, also for one that is given twice."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        known = known_name(name)
        if known in values:
            raise UserError(f"{known} is given twice, by several of its names; give it once")
        values[known] = coerce(known, value)
    return values


def from_settings(settings: dict[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """`base` (the chapter's recipe if None) with flat `settings` laid over it, checked."""
    values = known_settings(settings)
    base = base or TrainConfig()
    ours = {name: value for name, value in values.items() if name in TRAIN_FIELDS}
    model = {name: value for name, value in values.items() if name in MODEL_FIELDS}
    if ours.get("vocab_size") is not None:
        model["vocab_size"] = ours["vocab_size"]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model), **ours)


def over_preset(preset: dict[str, Any], given: dict[str, Any], say: Callable[[str], None]) -> TrainConfig:
    """The settings of a preset with those that a person gave over them, checked.

    A setting of the preset that one of the person's makes impossible is replaced by its default, and `say` gets a
    line about each. What the person gave is never changed. Raises UserError.
    """
    preset, given = known_settings(preset), known_settings(given)
    left_out: dict[str, list[str]] = {}  # settings by reason
    for name, instead, reason in _impossible(preset, given):
        left_out.setdefault(reason, []).append(f"{name} = {shown(preset[name])}")
        preset[name] = FIELDS[name].default if instead is None else instead
    config = from_settings(preset | given)
    for reason, settings in left_out.items():
        say(f"{', '.join(settings)} of the preset is left out: {reason}")
    return config


def _impossible(preset: dict[str, Any], given: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """What of a preset cannot be with what a person gave: the setting, the value instead (None: its default), why."""
    found: list[tuple[str, Any, str]] = []
    both = preset | given

    def clash(name: str, reason: str, instead: Any = None) -> None:
        if preset.get(name) is not None and name not in given:
            found.append((name, instead, reason))

    steps, lr, width = (given.get(name) for name in ("max_steps", "max_lr", "n_embd"))
    if steps is not None and (both.get("warmup_steps") or 0) >= steps:
        clash("warmup_steps", f"it is not below max_steps = {steps}; the warm-up is {steps // 50} steps (2 %)")
    if lr is not None and (both.get("min_lr") or 0) > lr:
        clash("min_lr", f"it is above max_lr = {lr:g}; the learning rate ends at a tenth of that")
    heads = preset.get("n_head") or 1
    if width is not None and width > 0 and heads > 0 and width % heads:
        fitting = max(number for number in range(1, heads + 1) if width % number == 0)
        clash("n_head", f"it does not divide n_embd = {width}; n_head is {fitting}", fitting)
    if given.get("parallel") == "ddp" and both.get("cpu_offload"):
        clash("cpu_offload", "it works with parallel = 'fsdp' only")
    if given.get("parallel") == "fsdp" and both.get("compile"):
        clash("compile", "it does not work with parallel = 'fsdp'")
    if given.get("parallel") == "fsdp" and both.get("dtype") == "float16":
        clash("dtype", "it does not work with parallel = 'fsdp'; dtype is auto")
    text, tokenizer = (name in given and given[name] != preset.get(name) for name in ("text", "tokenizer"))
    if text and not set(given["text"]) & set(LIMITED):
        clash("text_limit", f"it is for {' and '.join(LIMITED)}, and text is another")
    if given.get("init_from") and given["init_from"] != preset.get("init_from"):
        for name in (*MODEL_FIELDS, "tokenizer", "vocab_size"):
            if name != "dropout":
                clash(name, "the weights of init_from decide it")
    elif tokenizer or (text and both.get("tokenizer") == "char"):
        clash("vocab_size", "it was that of another text or tokenizer")
    return found


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """The flat settings of a config: `from_settings(to_settings(c)) == c`. Fields that are None are left out."""
    values = {name: getattr(config, name) for name in TRAIN_FIELDS}
    values |= {name: getattr(config.model, name) for name in MODEL_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def read_toml(source: str) -> dict[str, Any]:
    """The settings of a preset, by name, or of a TOML file, by path. Raises UserError naming what is wrong."""
    if source in PRESETS:
        text = resources.files("llm.config").joinpath("presets", f"{source}.toml").read_text(encoding="utf-8")
    else:
        source = expanded(source)
        if not source.endswith(".toml"):
            near = difflib.get_close_matches(source, PRESETS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}, or a .toml file"
            raise UserError(f"unknown preset {source!r}; {hint}")
        try:
            # Windows' editors begin it with a byte-order mark
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
            raise UserError(f"{source}: cannot be read ({error})") from None
    try:
        return known_settings(tomllib.loads(text))
    except (ValueError, RecursionError, UserError) as error:  # ValueError: not TOML, or a number too long
        raise UserError(f"{source}: {error}") from None


def write_toml(config: TrainConfig) -> str:
    """The config as TOML text that `read_toml` reads back."""

    def spelled(value: Any) -> str:
        if isinstance(value, tuple):
            return "[" + ", ".join(spelled(item) for item in value) + "]"
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(f"{name} = {spelled(value)}\n" for name, value in to_settings(config).items())
