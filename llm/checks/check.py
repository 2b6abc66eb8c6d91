"""One check of the doctor, and how its remedies are spelled."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


HOME = "%USERPROFILE%" if os.name == "nt" else "$HOME" if os.environ.get("HOME") else "$PWD"


CACHE, ELSEWHERE = f"{HOME}/losscurve-cache", f'losscurve train --out_dir "{HOME}/losscurve-runs"'


@dataclass(frozen=True)
class Check:
    """What became of one check: `good` is None for what is not needed and absent, or could be better."""

    name: str
    good: bool | None
    words: str
    remedy: str = ""  # a command to paste


def setting(name: str, value: str) -> str:
    """How a shell sets an environment variable."""
    return f"set {name}={value}" if os.name == "nt" else f'export {name}="{value}"'


def install(extra: str) -> str:
    return f'pip install "losscurve[{extra}]"'
