"""Write a plan as a TOML file, which `train --preset` reads."""

from pathlib import Path

from llm import storage
from llm.config import TrainConfig, write_toml
from llm.errors import UserError


def write(config: TrainConfig, path: Path) -> None:
    """Write the settings to a new file for `--preset`. Raises UserError if it exists or cannot be written."""
    check_new(path)
    try:
        storage.write_text(path, write_toml(config))
    except OSError as error:
        raise UserError(f"out = {path}: cannot be written ({error.strerror}); choose another place") from None


def check_new(path: Path) -> None:
    """Raises UserError for a name that `write` would refuse."""
    if path.suffix != ".toml":
        raise UserError(f"out = {path}: its name does not end in .toml; give it that ending, which --preset expects")
    if path.exists():
        raise UserError(f"out = {path}: already exists; remove it, or choose another name")
