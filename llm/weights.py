"""Weights in .pt files: which file is meant, and what shape of model is in it. Loading runs no code."""

import dataclasses
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from llm.config import GPTConfig, TrainConfig, from_settings, read_toml
from llm.errors import UserError
from llm.model import GPT


def run_config(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`. Raises UserError where there is none."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: no run here (no config.toml); train one with --out_dir {folder}")
    return from_settings(read_toml(str(folder / "config.toml")))


def weights_file(source: str) -> Path:
    """The .pt file meant by a run folder (its best weights, else its last) or by the file itself."""
    path = Path(source)
    candidates = [path / "best.pt", path / "model.pt"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{source}: no run and no .pt file there; give a run folder or a state_dict saved by torch.save")


def load_model(path: Path, device: torch.device, base: GPTConfig | None = None) -> GPT:
    """A model in evaluation mode with the weights of a .pt file. Raises UserError as `read_weights` does."""
    config, weights = read_weights(path, base or GPTConfig())
    model = GPT(config)
    model.load_state_dict(weights)
    return model.to(device).eval()


def check_sums(path: Path) -> None:
    """Raises UserError if a byte of a .pt file changed: it is a zip archive, whose checksums torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if marked := [info.filename for info in archive.infolist() if info.external_attr]:
                raise ValueError(f"{marked[0]} is marked as no plain file")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train a model first, or give the path of a .pt file") from None
    except Exception as error:  # zipfile raises many kinds for a file that is not its own
        raise UserError(f"{path}: not a state_dict saved by torch.save ({error})") from None
    if damaged is not None:
        raise UserError(f"{path}: changed since it was written ({damaged}: CRC-32 differs); use another of the run's")


def read_weights(path: Path, base: GPTConfig) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the state_dict in a .pt file. Sizes come from the tensors; what these do not tell
    (heads, GELU, dropout) from the config.toml beside the file, else from `base`.

    Raises UserError where the file is not a state_dict of a `GPT`. Loading runs no code.
    """
    check_sums(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{path}: not a state_dict saved by torch.save ({type(error).__name__})") from None
    if (path.parent / "config.toml").exists():
        base = run_config(path.parent).model
    try:
        vocab_size, n_embd = weights["wte.weight"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.")}
        tied = weights["lm_head.weight"].data_ptr() == weights["wte.weight"].data_ptr()
        config = dataclasses.replace(
            base,
            vocab_size=vocab_size,
            block_size=weights["wpe.weight"].shape[0],
            n_layer=len(layers),
            n_embd=n_embd,
            ffn_mult=weights["h.0.mlp.c_fc.weight"].shape[0] // n_embd,
            bias="h.0.attn.c_attn.bias" in weights,
            tied_lm_head=tied,
        )
        with torch.device("meta"):
            expected = {name: p.shape for name, p in GPT(config).state_dict().items()}
    except (
        KeyError,
        ValueError,
        IndexError,
        AttributeError,
        TypeError,
        ZeroDivisionError,
        RuntimeError,
        UserError,
    ) as error:
        raise UserError(f"{path}: not the weights of a GPT of ours ({type(error).__name__}: {error})") from None
    for name in sorted(set(expected) | set(weights)):
        found = getattr(weights.get(name), "shape", None)
        if found != expected.get(name):
            raise UserError(f"{path}: {name} is {found and tuple(found)}, and this shape needs {expected.get(name)}")
        if weights[name].layout != torch.strided:
            raise UserError(f"{path}: {name} is a sparse tensor; save a plain state_dict")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path}: {name} holds a number that is not finite; use other weights")
    return config, weights
