"""What all processes of a run have to agree on before the first step."""

import hashlib
import platform
from pathlib import Path

import torch

from llm import __version__, storage
from llm.config import TrainConfig, to_settings
from llm.data import TokenData
from llm.machine.world import World


def local_rank(world: World) -> int | None:
    """By which a process chooses its device; None where one process has all."""
    return world.local_rank if world.size > 1 else None


def agree(config: TrainConfig, data: TokenData, device: torch.device, world: World) -> None:
    """Raises UserError naming what is not the same for all processes: versions, code, tokens, settings, device."""
    settings = {name: value for name, value in to_settings(config).items() if name not in ("out_dir", "data_dir")}
    versions = {"losscurve": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts = {**versions, "the code of losscurve": code_hash(), **data.hashes, **settings, "device": device.type}
    world.agree(facts)


def code_hash() -> str:
    """SHA-256 over the Python files of the package."""
    digest, here = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)} {storage.sha256(path)}".encode())
    return digest.hexdigest()
