"""The result of one check of the doctor, and parts of its remedies."""

import os
from dataclasses import dataclass


def _home() -> str:
    """Return a home folder as a shell writes it; the current folder if there is no home."""
    if os.name == "nt":
        return "%USERPROFILE%"
    return "$HOME" if os.environ.get("HOME") else "$PWD"


CACHE = f"{_home()}/losscurve-cache"

TRAIN_ELSEWHERE = f'losscurve train --out_dir "{_home()}/losscurve-runs"'


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `good` is None for something that is absent and not needed, or that works but could be faster.
    """

    name: str
    good: bool | None
    message: str
    remedy: str = ""  # a command to paste


def set_variable(name: str, value: str) -> str:
    """Return the shell command that sets an environment variable."""
    return f"set {name}={value}" if os.name == "nt" else f'export {name}="{value}"'


def install_extra(extra: str) -> str:
    """Return the shell command that installs an extra of this package."""
    return f'pip install "losscurve[{extra}]"'
