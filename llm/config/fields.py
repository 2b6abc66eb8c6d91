"""A field of the settings: its help text, unit and bounds, and the checks of its value."""

import dataclasses
import functools
import glob
import os
import re
import reprlib
import sys
import types
import typing
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

from llm.errors import UserError

PATHS = ("text", "data_dir", "out_dir", "init_from", "teacher")  # the fields that hold paths,
LISTS = ("text", "teacher")  # and those of them that hold several

BOOLEAN_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

SECONDS_PER_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

COUNT_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}

SMALLEST_FLOAT32 = 2.0**-126  # the smallest normal number above 0
LARGEST_FLOAT32 = 2.0**128 - 2.0**104

NO_PATH = "that looks like a text, not a path; write it to a file and give the file's name"
LONGEST_NAME = 255  # bytes of one component of a path, on common file systems
LONGEST_PATH = 4000  # characters


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    unit: str = "",
    arch: str = "",
) -> Any:
    """Return a dataclass field with its documentation. `validate` checks `low <= value <= high` and `value > above`.

    `arch` names the architecture that has the setting; if it is empty, all have it.
    """
    bounds = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "unit": unit, "arch": arch} | bounds)


@functools.cache
def field_type(f: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """Return the type of a field without its `None`, and whether `None` is allowed."""
    is_union = get_origin(f.type) in (typing.Union, types.UnionType)
    options = get_args(f.type) if is_union else (f.type,)
    kinds = [kind for kind in options if kind is not type(None)]
    return kinds[0], len(kinds) < len(options)


def parse_duration(text: str) -> float:
    """Return the seconds in '90', '45s', '10m', '1.5h' or '2d'. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise ValueError("give seconds, or a number with s, m, h or d, such as 10m")
    return float(match[1]) * SECONDS_PER_UNIT[match[2] or "s"]


def parse_integer(text: str) -> int:
    """Return the integer value of a float literal: 1,000,000 for '1e6'. Raises ValueError for '1.5'."""
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def short_repr(value: Any) -> str:
    """Return `repr(value)`, shortened: a file may hold a number with thousands of digits or deeply nested tables."""
    short = reprlib.Repr()
    short.maxstring = 120
    short.maxother = 120
    try:
        return short.repr(value)
    except ValueError:  # Python converts no integer beyond 4,300 digits to a string
        return "a huge number"


# ---- paths


def expanded(path: str) -> str:
    """Return `path` with a leading ~ or ~name replaced by that home folder.

    A shell does this too, but not after `=`, in quotes, in a TOML file or in Python.
    Raises UserError if the home folder is unknown.
    """
    if not path.startswith("~"):
        return path
    found = path
    if os.environ.get("HOME") != "":  # with an empty HOME, expanduser would turn ~/x into /x
        found = os.path.expanduser(path)
    if found == path and not os.path.lexists(path):  # a file may be named ~x, and a shell's pattern can give that name
        user = path.partition("/")[0]
        raise UserError(f"{short_repr(path)}: cannot find the home folder {user}; give the whole path")
    return found


def is_pattern(path: str) -> bool:
    """Return whether `path` is a glob pattern and not the name of an existing file."""
    return bool(re.search(r"[*?[]", path)) and not os.path.lexists(path)


def check_expanded(path: str) -> None:
    """Raise UserError for a glob pattern that matches files: no shell has expanded it."""
    if not is_pattern(path):
        return
    matches = len(glob.glob(path))
    if matches:
        raise UserError(
            f"{path}: is a glob pattern that no shell has expanded (it matches {matches}); remove its quotes, or give "
            "the file names"
        )


def check_path(name: str, path: str) -> None:
    """Raise UserError for a path that no file system accepts, usually a text given in place of its file.

    `name` is the setting that holds the path.
    """
    components = re.split(r"[/\\]", path)
    longest = max(len(component.encode("utf-8", "surrogateescape")) for component in components)
    if longest > LONGEST_NAME or len(path) > LONGEST_PATH:
        raise UserError(f"{name} = {short_repr(path)}: {NO_PATH}")


# ---- the checks of a value


def describe(f: dataclasses.Field[Any]) -> str:
    """Return a phrase for the values that a field accepts, such as "a whole number at least 1"."""
    kind, _ = field_type(f)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    by_unit = {
        "duration": "a duration such as 90, 10m or 2h",
        "characters": "a number of characters such as 50M or 2G",
        "steps or duration": "a whole number of steps, or a duration such as 10m, at least 1 s",
    }
    if f.metadata["unit"] in by_unit:
        return by_unit[f.metadata["unit"]]
    by_type = {int: "a whole number", float: "a number", bool: "true or false", str: "a non-empty string"}
    bounds = []
    if f.metadata["low"] is not None:
        bounds.append(f"at least {f.metadata['low']}")
    if f.metadata["above"] is not None:
        bounds.append(f"above {f.metadata['above']:g}")
    if f.metadata["high"] is not None:
        bounds.append(f"at most {f.metadata['high']}")
    return f"{by_type.get(kind, 'a list of paths')} {' and '.join(bounds)}".strip()


def validate(config: Any) -> None:
    """Check every field of a dataclass of settings. Raises UserError that names the first field out of its bounds."""
    for f in dataclasses.fields(config):
        if f.name != "model":
            check_value(f, getattr(config, f.name), f.name)


def check_value(f: dataclasses.Field[Any], value: Any, name: str) -> None:
    """Raise UserError for a value that the field does not accept. `name` is what the message calls the field."""
    kind, is_optional = field_type(f)
    if value is None and is_optional:
        return
    if not _is_accepted(f, kind, value):
        raise UserError(f"{name} = {short_repr(value)}: expected {describe(f)}")
    if kind is str or get_origin(kind) is tuple:
        _check_strings(name, value)
    elif kind is float and not f.metadata["unit"]:
        _check_float32(name, value)


def _is_accepted(f: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return _is_accepted_number(f, kind, value)
    if kind is bool:
        return isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and value != ""
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)


def _is_accepted_number(f: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if not abs(value) <= sys.float_info.max:  # NaN, an infinity, or an integer beyond the range of floats
        return False
    takes_float = kind is float or f.metadata["unit"] == "steps or duration"
    if isinstance(value, float) and not takes_float:
        return False
    low, high, above = f.metadata["low"], f.metadata["high"], f.metadata["above"]
    is_above_low = (low is None or value >= low) and (above is None or value > above)
    return is_above_low and (high is None or value <= high)


def _check_strings(name: str, value: str | tuple[str, ...]) -> None:
    values = (value,) if isinstance(value, str) else value
    if re.search("[\ud800-\udfff]", "".join(values)):  # lone surrogates: Python's form of bytes that are not UTF-8
        remedy = "type it in a UTF-8 terminal" if name == "sample_prompt" else "give the file another name"
        raise UserError(f"{name} = {short_repr(value)}: not valid UTF-8; {remedy}")
    if name in PATHS:
        for path in values:
            check_path(name, path)


def _check_float32(name: str, value: float) -> None:
    """Raise UserError if float32, in which training uses the value, would round it to 0 or to infinity."""
    if value == 0:
        return
    if abs(value) < SMALLEST_FLOAT32:
        raise UserError(
            f"{name} = {short_repr(value)}: below {SMALLEST_FLOAT32:.2g}, the smallest normal float32 number, and "
            "training uses float32; give 0 or a larger number"
        )
    if abs(value) > LARGEST_FLOAT32:
        raise UserError(
            f"{name} = {short_repr(value)}: above {LARGEST_FLOAT32:.2g}, the largest float32 number, and training uses "
            "float32; give a smaller number"
        )
