"""Models of other programs: a folder in Hugging Face's format, or the name of one on its hub.

config.json and tokenizer.json are checked before any weight is read or downloaded. Weights are read from safetensors,
in one file or in several with an index; else from .bin files, which are read as plain data.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm import storage
from llm.arch import tensor_shapes
from llm.config import GPTConfig
from llm.errors import Failure, UserError
from llm.storage import download
from llm.tokens import huggingface
from llm.tokens.tokenizer import Tokenizer
from llm.weights.hf_config import settings_in
from llm.weights.hf_layout import weights_in
from llm.weights.pt_file import check_sums, check_tensors, load_plain_data

MASKS = (".attn.bias", ".attn.masked_bias")  # which old versions of GPT-2 saved
FILES = (".gguf", ".pt")  # what ends so is a file, and no name on the hub
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|gpt2(-medium|-large|-xl)?|distilgpt2")
FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))  # names of the files of weights, in order of preference
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ForeignModel:
    """A model of another program, in our terms."""

    path: Path  # its folder or file
    config: GPTConfig
    weights: dict[str, Tensor]  # float32
    tokenizer: Tokenizer | None  # None: the folder has no tokenizer.json


def is_foreign(source: str) -> bool:
    """Whether `source` is a folder with a config.json, or no path at all but the form of a name on the hub."""
    path = Path(source)
    if path.exists():
        return (path / "config.json").is_file() and not (path / "config.toml").exists()
    return HUB_NAME.fullmatch(source) is not None and path.suffix not in FILES


def read_foreign(source: str) -> ForeignModel:
    """Return the model in a folder, or of a name on the hub, which is downloaded into the hub's own cache.

    Raises:
        UserError: the folder is incomplete or damaged, or the model is one that losscurve does not have; the message
            names the field.
        Failure: the hub cannot be reached, or has no such model.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _download(source, TEXT_FILES)
    config = read_shape(folder)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens, and the model has {config.vocab_size}; "
            "give a folder whose files belong together"
        )
    if not Path(source).exists():
        folder = _download_weights(source)
    return ForeignModel(folder, config, _read_weights(folder, config), tokenizer)


def read_shape(folder: Path) -> GPTConfig:
    """Return the shape that config.json describes. Raises UserError that names a field which no model of ours has."""
    path = folder / "config.json"
    raw = storage.read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object; give the folder of a model")
    try:
        return settings_in(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}; give another model, or correct this file if it is wrong") from None


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in tokenizer.json, None if there is none. Raises UserError if it cannot be used."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return huggingface.read(path.read_text(encoding="utf-8"), _end_of_text(folder))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}; give a model with another tokenizer") from None


def _end_of_text(folder: Path) -> str | None:
    """Return the name of the token between documents: eos_token in tokenizer_config.json, None if there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    settings = storage.read_json(path)
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


# ---- weights


def _read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    paths = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= _read_file(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(MASKS):
            raise UserError(
                f"{paths[0]}: {name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, and weights here are "
                "float32, bfloat16 or float16; give the model in one of these"
            )
    try:
        weights = weights_in(config, tensors)
    except UserError as error:
        raise UserError(
            f"{paths[0]}: {error}, which config.json asks for; give another copy of the model, or correct that file"
        ) from None
    check_tensors(paths[0], weights, tensor_shapes(config))
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights: one, or all that an index lists. Raises UserError if one is missing."""
    for stem, suffix in FORMATS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _listed(index)
    raise UserError(f"{folder}: has a config.json, but no model.safetensors beside it; copy the whole folder")


def _listed(index: Path) -> list[Path]:
    content = storage.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names: set[Any] = set(places.values()) if isinstance(places, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UserError(f"{index}: not an index of files of weights; copy the whole folder again")
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: missing, and {index.name} lists it; copy or download it")
    return [index.parent / name for name in sorted(names)]


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: cut off, or no safetensors file ({error}); copy or download it again") from None
    check_sums(path)
    content = load_plain_data(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds other things than tensors; give a model saved as safetensors")
    return content


# ---- the hub


def _download_weights(name: str) -> Path:
    """Return the folder of a model on the hub, with its weights: safetensors if it has them, else .bin files."""
    folder = Path()
    for stem, suffix in FORMATS:
        patterns = (f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}", f"{stem}.{suffix}.index.json")
        folder = _download(name, (*TEXT_FILES, *patterns))
        if any((folder / pattern).exists() for pattern in (patterns[0], patterns[2])):
            break
    return folder


def _download(name: str, names: tuple[str, ...]) -> Path:
    """Return the folder in the hub's cache with the files of these names or patterns. Raises Failure."""
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    trouble = download.unreachable(endpoint)  # the library would try for long; its cache may have the model
    patterns: dict[str, Any] = {"allow_patterns": list(names), "local_files_only": bool(trouble)}
    try:
        return Path(snapshot_download(name, endpoint=endpoint, **patterns))
    except Exception as error:  # the library raises many kinds, those of its HTTP client among them
        cause = trouble or " ".join(str(error).split())[:200] or type(error).__name__
        raise Failure(
            f"{name}: no such file or folder here, and it cannot be read from {endpoint} ({cause}); check the name, or "
            "connect to the network and run this again"
        ) from None
