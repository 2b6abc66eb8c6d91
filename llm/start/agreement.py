"""Check before the first step that all processes of a run agree."""

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

from llm import __version__, storage
from llm.config import TrainConfig, to_settings
from llm.data import TokenData
from llm.machine.world import World


def local_rank(world: World) -> int | None:
    """Return the local rank, by which a process chooses its device; None for a run of one process."""
    return world.local_rank if world.size > 1 else None


def agree(config: TrainConfig, data: TokenData, device: torch.device, world: World) -> None:
    """Raise UserError that names a difference between processes: versions, code, token files, settings or device."""
    settings = {name: value for name, value in to_settings(config).items() if name not in ("out_dir", "data_dir")}
    versions = {"losscurve": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts = {**versions, "the code of losscurve": code_hash(), **data.hashes, **settings, "device": device.type}
    world.agree(facts)


@cache
def code_hash() -> str:
    """Return the SHA-256 of the Python files of the package."""
    digest, here = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)} {storage.sha256(path)}".encode())
    return digest.hexdigest()
