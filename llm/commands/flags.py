"""Flags: settings become `--n_layer 6`, `--n-layer=6` and nanoGPT's names; only what was typed is kept."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, get_args, get_origin

from llm.config import ALIASES, FIELDS, TrainConfig, field_type, from_settings, read_toml
from llm.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and suggest the nearest flag."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse `argv`; a flag may be spelled with hyphens or underscores. Raises UserError."""
        plain = [_underscored(word) for word in argv]
        known, unknown = self.parse_known_args(plain)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            raise UserError(
                f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help")
            )
        return known


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


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
            more |= {"nargs": "+", "metavar": "PATH"}
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


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The preset or TOML file of `--preset`, with the typed flags over it. Raises UserError."""
    preset = read_toml(args.preset) if getattr(args, "preset", None) else {}
    return from_settings(preset | typed_settings(args))


def warn(message: str) -> None:
    """A line on stderr that is not to be missed."""
    print(f"warning: {message}", file=sys.stderr)
