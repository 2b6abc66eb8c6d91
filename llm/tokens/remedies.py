"""The command that prepares a folder of token files, for messages."""

import shlex
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError

FEW = 5  # texts that a command in a message names


def prepare_command(settings: dict[str, Any], folder: Path) -> str:
    """What to type for token files in `folder` with the settings that meta.json names."""
    words = [f"./{word}" if word.startswith("-") and word != "-" else word for word in settings["text"]]
    usual = {"tokenizer": "auto", "val_fraction": 0.1}
    flags = {"data_dir": folder} | {name: settings[name] for name in settings if name != "text"}
    flags = {name: value for name, value in flags.items() if value not in (None, usual.get(name))}
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return " ".join(["losscurve prepare", *map(shlex.quote, words), *given])


def again(folder: Path) -> str:
    """How to make the token files of `folder` again: by the command that its meta.json tells, if there is one."""
    try:
        settings = storage.read_json(folder / "meta.json")["settings"]
        command = prepare_command(settings, folder)
        if "-" not in settings["text"] and len(settings["text"]) <= FEW and command.isprintable():
            return f"prepare it again with: {command} --overwrite"
    except (UserError, KeyError, TypeError, AttributeError):  # none, or none of ours
        pass
    return f"prepare its text again, with --data_dir {shlex.quote(str(folder))} --overwrite"
