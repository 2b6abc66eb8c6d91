"""The command that prepares a folder of token files, for messages."""

import shlex
from pathlib import Path
from typing import Any

from llm import storage
from llm.errors import UserError

FEW = 5  # texts that a command in a message may name


DEFAULTS = {"tokenizer": "auto", "val_fraction": 0.1}


def prepare_command(settings: dict[str, Any], folder: Path) -> str:
    """Return the command that prepares token files in `folder` with the settings of a meta.json."""
    words = []
    for word in settings["text"]:
        is_like_a_flag = word.startswith("-") and word != "-"
        words.append(shlex.quote(f"./{word}" if is_like_a_flag else word))
    flags = {"data_dir": folder} | {name: value for name, value in settings.items() if name != "text"}
    for name, value in flags.items():
        if value is not None and value != DEFAULTS.get(name):
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(["losscurve prepare", *words])


def again(folder: Path) -> str:
    """Return the remedy that prepares `folder` again, with the command for its meta.json if that has one."""
    try:
        settings = storage.read_json(folder / "meta.json")["settings"]
        command = prepare_command(settings, folder)
        if "-" not in settings["text"] and len(settings["text"]) <= FEW and command.isprintable():
            return f"prepare it again with: {command} --overwrite"
    except (UserError, KeyError, TypeError, AttributeError):  # there is no meta.json, or another program wrote it
        pass
    return f"prepare its text again, with --data_dir {shlex.quote(str(folder))} --overwrite"
