"""Flags: settings become `--n_layer 6`, `--n-layer=6` and nanoGPT's names; only what was typed is kept."""

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from llm.config import (
    ALIASES,
    FIELDS,
    PRESETS,
    TRUTHS,
    TrainConfig,
    check_expanded,
    expanded,
    field_type,
    other_names,
    over_preset,
    read_toml,
)
from llm.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and suggest the nearest flag, and which never takes a value for a flag.

    A word that belongs to no flag is the value of the flag `bare`; of several none is chosen, and all are named.
    """

    def __init__(self, prog: str, description: str, bare: tuple[str, ...] = ()) -> None:
        words = f"{description} A word that belongs to no flag is --{bare[0]}'s." if len(bare) == 1 else description
        super().__init__(prog=prog, description=words, allow_abbrev=False)
        self.bare = bare

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse `argv`; a flag may be spelled with hyphens or underscores. Raises UserError.

        The result's `words` are those of `argv` with nothing left to guess, for a process that is given them again.
        """
        words = self._joined(argv)
        known, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(f"unknown argument {unknown[-1]}; see --help")
        known.words = words
        return known

    def _joined(self, argv: list[str]) -> list[str]:
        """`argv` with each flag and its value in one word (`--n_layer=6`), then the words that belong to no flag."""
        end = argv.index("--") if "--" in argv else len(argv)
        left, rest = argv[:end], argv[end + 1 :]  # what is behind -- is no flag, however it looks
        if {"-h", "--help"} & set(left):
            return ["--help"]
        flags, plain = [], []
        typed: dict[str, str] = {}  # by setting, the flag that gave it
        if self.bare:
            left += [self._meant(word) for word in rest]
            rest = []
        while left:
            word = left.pop(0)
            if self._is_value(word):
                if not self.bare:
                    plain.append(word)
                    continue
                word = self._meant(word)
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(_underscored(name))
            if action is None:
                raise UserError(self._unknown(name))
            name = _underscored(name)
            if action.dest in typed and not isinstance(action, argparse._AppendAction):  # which takes all
                raise UserError(_twice(typed[action.dest], name))
            typed[action.dest] = name
            values = [value] if equals else self._values(name, action, left)
            if equals and action.nargs == 0:
                raise UserError(f"{name}: takes no value; leave out ={value}")
            flags += [f"{name}={value}" for value in values] or [name]
        plain += rest
        if plain and all(action.option_strings for action in self._actions):
            raise UserError(f"unknown argument {plain[0]}; see --help")
        return [*flags, *(["--", *plain] if plain else [])]

    def _values(self, name: str, action: argparse.Action, left: list[str]) -> list[str]:
        """The words that are the values of a flag, taken from those that are `left` behind it."""
        values: list[str] = []
        if action.nargs == "?":
            return [left.pop(0)] if left and left[0].lower() in TRUTHS else []
        while action.nargs != 0 and left and self._is_value(left[0]) and (action.nargs == "+" or not values):
            values.append(left.pop(0))
        if action.nargs == 0 or values:
            return values
        if not left:
            raise UserError(f"{name}: no value follows; give {name} {action.metavar or 'VALUE'}")
        value = shlex.quote(f"{name}={left[0]}")
        raise UserError(f"{name}: no value follows; a value that begins with a dash is given as {value}")

    def _is_value(self, word: str) -> bool:
        """Whether a word is no flag by its look: no dash, a negative number, or a text that no flag could be."""
        if not word.startswith("-") or word == "-" or re.fullmatch(r"-(\.?\d.*|inf|nan)", word):
            return True
        return bool(re.search(r"\s", word)) and _underscored(word.partition("=")[0]) not in self._option_string_actions

    def _meant(self, word: str) -> str:
        """A word that belongs to no flag, with the flag that it is the value of."""
        name = _underscored(f"--{word.partition('=')[0]}")
        if "=" in word and name in self._option_string_actions:
            raise UserError(f"{word}: a flag begins with two dashes; write {shlex.quote(f'--{word}')}")
        if len(self.bare) > 1:
            choices = " or ".join(flag(name, word) for name in self.bare)
            raise UserError(f"{word}: belongs to no flag; write {choices}")
        if "--preset" in self._option_string_actions and (word in PRESETS or word.endswith(".toml")):
            raise UserError(
                f"{word}: settings are given as {flag('preset', word)}; to train on it as a text, write "
                f"{flag('text', word)}"
            )
        return f"--{self.bare[0]}={word}"

    def _unknown(self, name: str) -> str:
        """What to say of a flag that is none of ours."""
        said, plain = f"unknown argument {name}", _underscored(name).lstrip("-")
        if os.path.lexists(name):
            return f"{said}; the file of that name is given as {shlex.quote(f'./{name}')}"
        options = [option.removeprefix("--") for option in self._option_string_actions]
        if found := other_names.ours(plain, options):
            own, note = found
            return f"{said}; here it is --{own}" + (f" ({note})" if note else "")
        near = difflib.get_close_matches(f"--{plain}", self._option_string_actions, n=1) if len(plain) > 2 else []
        return said + (f"; did you mean {near[0]}?" if near else "; see --help")


def _underscored(name: str) -> str:
    """The name of a flag as argparse knows it."""
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _twice(first: str, second: str) -> str:
    if first == second:
        return f"{first}: given twice; give it once"
    return f"{first} and {second}: are the same setting; give one of them"


def flag(name: str, value: object) -> str:
    """A flag with its value, for a person to paste."""
    word = str(value)
    return f"--{name}={shlex.quote(word)}" if word.startswith("-") else f"--{name} {shlex.quote(word)}"


def path(word: str) -> Path:
    """A type for argparse: a path, perhaps in a home folder. Raises UserError."""
    return Path(expanded(word))


def input_path(word: str) -> Path:
    """A type for argparse: a path to read. Raises UserError, also for a pattern that a shell should have expanded."""
    found = path(word)
    check_expanded(str(found))
    return found


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """One flag for each named field of the settings; absent from the result unless typed."""
    aliases = {name: [f"--{alias}" for alias, meant in ALIASES.items() if meant == name] for name in FIELDS}
    for name in names:
        f = FIELDS[name]
        kind, _ = field_type(f)
        more: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name)}
        if kind is bool:
            more |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif name == "text":
            more |= {"nargs": "+", "metavar": "PATH", "action": "extend"}
        else:
            more["metavar"] = "|".join(get_args(kind)) if get_origin(kind) is not None else name.split("_")[-1].upper()
        parser.add_argument(f"--{name}", *aliases[name], **more)
        if kind is bool:
            parser.add_argument(
                f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def _help(name: str) -> str:
    f = FIELDS[name]
    default = f.default
    words = f.metadata["help"] + ("" if default is None or default == () else f" (default: {default})")
    return str(words).replace("%", "%%")  # argparse formats its help with %


def typed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed as flags, by field name."""
    return {name: value for name, value in vars(args).items() if name in FIELDS}


def warn(message: str) -> None:
    """A line on stderr that is not to be missed."""
    print(f"warning: {message}", file=sys.stderr)


def config_from(args: argparse.Namespace, say: Callable[[str], None] = warn) -> TrainConfig:
    """The preset or TOML file of `--preset`, with the typed flags over it. Raises UserError."""
    preset = read_toml(args.preset) if getattr(args, "preset", None) else {}
    return over_preset(preset, typed_settings(args), say)
