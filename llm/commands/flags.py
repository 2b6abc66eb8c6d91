"""Flags: each setting is a flag (`--n_layer 6`, `--n-layer=6`, nanoGPT's name). Only typed flags are returned."""

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
    BOOLEAN_WORDS,
    FIELDS,
    LISTS,
    PRESETS,
    TrainConfig,
    check_expanded,
    expanded,
    field_type,
    given_names,
    other_names,
    over_preset,
    read_toml,
)
from llm.errors import UserError
from llm.plan.request import Request, read_request


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors that suggest the most similar flag. It never takes a value for a flag.

    `bare` names the flags that a word without a flag may belong to. With one flag, the word becomes its value; with
    several, the error names them all.
    """

    def __init__(self, prog: str, description: str, bare: tuple[str, ...] = ()) -> None:
        if len(bare) == 1:
            description += f" A word without a flag is a value of --{bare[0]}."
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.bare = bare

    def add_run(self) -> None:
        """Add the optional argument RUN, the run folder."""
        self.add_argument(
            "run",
            nargs="?",
            default="checkpoints",
            metavar="RUN",
            type=input_path,
            help="run folder (default: checkpoints)",
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError, where argparse would print its usage and exit."""
        raise UserError(message)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse `argv`; the name of a flag may have hyphens or underscores. Raises UserError.

        `words` of the result is `argv` in its normal form (`--n_layer=6`), for a process that parses it again.
        """
        words = self._normalise(argv)
        known, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(f"unknown argument {unknown[-1]}; see --help")
        known.words = words
        return known

    def _normalise(self, argv: list[str]) -> list[str]:
        """Return `argv` with each flag and its value as one word (`--n_layer=6`), then `--` and the other words."""
        end = argv.index("--") if "--" in argv else len(argv)
        left = argv[:end]
        positional = argv[end + 1 :]  # a word behind -- is never a flag
        if "-h" in left or "--help" in left:
            return ["--help"]
        if self.bare:
            left += [self._with_flag(word) for word in positional]
            positional = []

        flags: list[str] = []
        before_dashes: list[str] = []  # positional words that stand before --
        typed: dict[str, str] = {}  # setting: the flag that gave it
        while left:
            word = left.pop(0)
            if self._is_value(word) and not self.bare:
                before_dashes.append(word)
                continue
            if self._is_value(word):
                word = self._with_flag(word)
            flags += self._take_flag(word, left, typed)

        positional = before_dashes + positional
        takes_positional = any(not action.option_strings for action in self._actions)
        if positional and not takes_positional:
            raise UserError(f"unknown argument {positional[0]}; see --help")
        return [*flags, "--", *positional] if positional else flags

    def _take_flag(self, word: str, left: list[str], typed: dict[str, str]) -> list[str]:
        """Return the flag `word` with its values, one word each, and take the values from the words `left` behind it.

        Adds the flag to `typed`. Raises UserError for an unknown flag, for one that was typed before, and for a value
        that is missing or superfluous.
        """
        typed_name, equals, value = word.partition("=")
        name = _underscored(typed_name)
        action = self._option_string_actions.get(name)
        if action is None:
            raise UserError(self._explain_unknown(typed_name))
        may_repeat = isinstance(action, argparse._AppendAction)
        if action.dest in typed and not may_repeat:
            raise UserError(_explain_repeated(typed[action.dest], name))
        typed[action.dest] = name
        if equals and action.nargs == 0:
            raise UserError(f"{name}: takes no value; leave out ={value}")
        values = [value] if equals else self._take_values(name, action, left)
        return [f"{name}={value}" for value in values] or [name]

    def _take_values(self, name: str, action: argparse.Action, left: list[str]) -> list[str]:
        """Take the values of the flag `name` from the words `left` behind it. Raises UserError if there is none."""
        if action.nargs == 0:
            return []
        if action.nargs == "?":
            return [left.pop(0)] if left and left[0].lower() in BOOLEAN_WORDS else []
        values: list[str] = []
        while left and self._is_value(left[0]) and (action.nargs == "+" or not values):
            values.append(left.pop(0))
        if values:
            return values
        if not left:
            raise UserError(f"{name}: no value follows; give {name} {action.metavar or 'VALUE'}")
        joined = shlex.quote(f"{name}={left[0]}")
        raise UserError(f"{name}: no value follows; write a value that starts with a dash as {joined}")

    def _is_value(self, word: str) -> bool:
        """Return whether a word is not a flag: it has no dash, is a negative number, or is a text no flag could be."""
        if not word.startswith("-") or word == "-" or re.fullmatch(r"-(\.?\d.*|inf|nan)", word):
            return True
        return bool(re.search(r"\s", word)) and _underscored(word.partition("=")[0]) not in self._option_string_actions

    def _with_flag(self, word: str) -> str:
        """Return a word that has no flag as the value of its flag. Raises UserError if that is not clear."""
        name = _underscored(f"--{word.partition('=')[0]}")
        if "=" in word and "--vary" in self._option_string_actions:
            raise UserError(f"{word}: has no flag; write {shlex.join(['--vary', word])}")
        if "=" in word and name in self._option_string_actions:
            raise UserError(f"{word}: a flag starts with two dashes; write {shlex.quote(f'--{word}')}")
        if len(self.bare) > 1:
            choices = " or ".join(flag(name, word) for name in self.bare)
            raise UserError(f"{word}: has no flag; write {choices}")
        if "--preset" in self._option_string_actions and (word in PRESETS or word.endswith(".toml")):
            raise UserError(
                f"{word}: is a preset; write {flag('preset', word)}; to train on it as a text, write "
                f"{flag('text', word)}"
            )
        return f"--{self.bare[0]}={word}"

    def _explain_unknown(self, typed_name: str) -> str:
        """Return the error for an unknown flag, with the best suggestion."""
        problem = f"unknown argument {typed_name}"
        if os.path.lexists(typed_name):
            return f"{problem}; if you mean the file of that name, write {shlex.quote(f'./{typed_name}')}"
        plain = _underscored(typed_name).lstrip("-")
        options = [option.removeprefix("--") for option in self._option_string_actions]
        found = other_names.find_our_name(plain, options)
        if found:
            own, note = found
            return f"{problem}; use --{own}" + (f" ({note})" if note else "")
        near = difflib.get_close_matches(f"--{plain}", self._option_string_actions, n=1)
        if near and len(plain) > 2:  # a shorter name is similar to many flags
            return f"{problem}; did you mean {near[0]}?"
        return f"{problem}; see --help"


def _underscored(name: str) -> str:
    """Return the name of a flag as argparse knows it."""
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _explain_repeated(first: str, second: str) -> str:
    if first == second:
        return f"{first}: given twice; give it once"
    return f"{first} and {second}: are the same setting; give one of them"


def flag(name: str, value: object) -> str:
    """Return a flag with its value, quoted for a shell."""
    word = str(value)
    separator = "=" if word.startswith("-") else " "
    return f"--{name}{separator}{shlex.quote(word)}"


# ---- types for argparse


def path(word: str) -> Path:
    """Return a path, with a leading ~ expanded. Raises UserError."""
    return Path(expanded(word))


def input_path(word: str) -> Path:
    """Return a path to read. Raises UserError, also for a glob pattern that no shell has expanded."""
    found = path(word)
    check_expanded(str(found))
    return found


# ---- settings


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add a flag for each of the named settings. A flag that was not typed is absent from the parsed result."""
    for name in names:
        f = FIELDS[name]
        kind, _ = field_type(f)
        more: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name)}
        if kind is bool:
            more |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif name in LISTS:
            more |= {"nargs": "+", "metavar": "PATH", "action": "extend"}
        elif get_origin(kind) is not None:
            more["metavar"] = "|".join(get_args(kind))
        else:
            more["metavar"] = name.split("_")[-1].upper()
        aliases = [f"--{alias}" for alias, own in ALIASES.items() if own == name]
        parser.add_argument(f"--{name}", *aliases, **more)
        if kind is bool:
            parser.add_argument(
                f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def _help(name: str) -> str:
    f = FIELDS[name]
    words = f.metadata["help"]
    if f.default is not None and f.default != ():
        words += f" (default: {f.default})"
    return str(words).replace("%", "%%")  # argparse formats its help with %


def typed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were typed as flags, by field name."""
    return {name: value for name, value in vars(args).items() if name in FIELDS}


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Print on stderr what a person may not expect, such as which files of a folder are read."""
    print(f"note: {message}", file=sys.stderr)


def config_from(args: argparse.Namespace, say: Callable[[str], None] = note) -> TrainConfig:
    """Return the preset or TOML file of `--preset` with the typed flags replaced in it. Raises UserError.

    `say` gets a line about each setting of the preset that the flags rule out.
    """
    preset = read_toml(args.preset) if getattr(args, "preset", None) else {}
    return over_preset(preset, typed_settings(args), say)


def given_settings(args: argparse.Namespace) -> set[str]:
    """Return the names of the settings that the preset and the typed flags give. Raises UserError."""
    return given_names(read_toml(args.preset) if args.preset else {}, typed_settings(args))


def request_from(args: argparse.Namespace, say: Callable[[str], None] = note) -> Request:
    """Return the run that `--time` asks for, with the settings of `--preset` and the typed ones as given.

    Raises UserError. `say` as in `config_from`.
    """
    preset = read_toml(args.preset) if args.preset else {}
    return read_request(args.time, preset, typed_settings(args), say)
