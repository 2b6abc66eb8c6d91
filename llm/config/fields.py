"""What a field of the settings is: its help, unit and bounds, and the checks of a value and of a path."""

import dataclasses
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

PATHS = ("text", "data_dir", "out_dir", "init_from")


TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


NO_PATH = "that looks like a text, not a path; write it to a file and give the file's name"


FLOAT32 = (2.0**-126, 2.0**128 - 2.0**104)  # its smallest and largest number above 0


COUNTS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    unit: str = "",
) -> Any:
    """A documented field; `low <= value <= high` and `value > above` are checked by `validate`."""
    limits = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "unit": unit, **limits})


def field_type(f: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """The type of a field without its `None`, and whether `None` is allowed."""
    options = get_args(f.type) if get_origin(f.type) in (typing.Union, types.UnionType) else (f.type,)
    kinds = [kind for kind in options if kind is not type(None)]
    return kinds[0], len(kinds) < len(options)


def parse_duration(text: str) -> float:
    """Seconds in '90', '45s', '10m', '1.5h' or '2d'. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise ValueError("give seconds, or a number with s, m, h or d, such as 10m")
    return float(match[1]) * UNITS[match[2] or "s"]


def expanded(path: str) -> str:
    """`path` with a leading ~ or ~name replaced by that home folder. Raises UserError where nobody knows it.

    A shell does this too, but not after `=`, in quotes, in a TOML file or in Python.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path) if os.environ.get("HOME") != "" else path  # an empty one would make ~/x be /x
    if found == path and not os.path.lexists(path):  # a file may be called ~x, and a pattern of the shell names it
        user = path.partition("/")[0]
        raise UserError(f"{shown(path)}: the home folder {user} is not known here; give the whole path")
    return found


def is_pattern(path: str) -> bool:
    """Whether `path` names no file, but stands for those that a shell would have put in its place."""
    return bool(re.search(r"[*?[]", path)) and not os.path.lexists(path)


def check_expanded(path: str) -> None:
    """Raises UserError for a pattern that matches something: no shell has expanded it."""
    if is_pattern(path) and (found := len(glob.glob(path))):
        raise UserError(
            f"{path}: is a pattern that no shell has expanded (it matches {found}); leave out its quotes, or give "
            "the names themselves"
        )


def shown(value: Any) -> str:
    """`value` as in Python, shortened: a file may hold a number of thousands of digits or tables without end."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    try:
        return short.repr(value)
    except ValueError:  # Python spells no whole number beyond 4,300 digits
        return "a huge number"


def int_of_float(text: str) -> int:
    """'1e6' is a million; '1.5' is no integer (ValueError)."""
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def describe(f: dataclasses.Field[Any]) -> str:
    """What a field accepts, in words."""
    kind, _ = field_type(f)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if f.metadata["unit"] == "duration":
        return "a duration such as 90, 10m or 2h"
    if f.metadata["unit"] == "characters":
        return "a number of characters such as 50M or 2G"
    if f.metadata["unit"] == "steps or duration":
        return "a whole number of steps, or a duration such as 10m, at least 1 s"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text that is not empty"}.get(
        kind, "a list of paths"
    )
    low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
    bounds = [
        f"at least {low}" if low is not None else "",
        f"above {above:g}" if above is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    return f"{words} {' and '.join(b for b in bounds if b)}".strip()


def validate(config: Any) -> None:
    """Raises UserError naming the first field of a dataclass of settings that is out of its bounds."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name == "model" or (value is None and field_type(f)[1]):
            continue
        kind, _ = field_type(f)
        low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
        if get_origin(kind) is Literal:
            good = value in get_args(kind)
        elif kind in (int, float):
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            good = good and abs(value) <= sys.float_info.max  # neither NaN nor infinite, nor a whole number beyond
            good = good and (isinstance(value, int) or kind is float or f.metadata["unit"] == "steps or duration")
            good = good and (low is None or value >= low) and (high is None or value <= high)
            good = good and (above is None or value > above)
        elif kind is bool:
            good = isinstance(value, bool)
        else:  # a text, or several
            words = (value,) if kind is str else value
            good = isinstance(words, tuple) and all(isinstance(word, str) and word for word in words)
            if good and re.search("[\ud800-\udfff]", "".join(words)):  # how Python holds bytes that are no UTF-8
                cure = "type it in a UTF-8 terminal" if f.name == "sample_prompt" else "give the file another name"
                raise UserError(f"{f.name} = {shown(value)}: not valid UTF-8; {cure}")
            if good and f.name in ("text", "data_dir", "out_dir", "init_from"):
                for word in words:
                    check_path(f.name, word)
        if not good:
            raise UserError(f"{f.name} = {shown(value)}: expected {describe(f)}")
        if kind is float and not f.metadata["unit"] and value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
            end, limit = ("below", FLOAT32[0]) if abs(value) < 1 else ("above", FLOAT32[1])
            raise UserError(
                f"{f.name} = {shown(value)}: {end} {limit:.2g}, the end of float32, in which it is used; "
                f"give {'0 or a larger' if end == 'below' else 'a smaller'} number"
            )


def check_path(name: str, word: str) -> None:
    """Raises UserError for what no file system takes as a path: a text given in place of its file, usually."""
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in re.split(r"[/\\]", word))
    if longest > 255 or len(word) > 4000:
        raise UserError(f"{name} = {shown(word)}: {NO_PATH}")
