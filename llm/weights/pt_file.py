"""Weights in .pt files: find the file, check it, and infer the shape of its model. Loading runs no code."""

import dataclasses
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.arch import Model, make_model, tensor_shapes
from llm.config import GPTConfig, TrainConfig, from_settings, read_toml
from llm.errors import UserError, no_run
from llm.tokens.foreign import is_text, signature

WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which training programs store the weights
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
FEED_FORWARD = ("mlp.c_fc.weight", "mlp.c_proj.weight")
PARTS = re.compile(r".*\.(safetensors|index\.json)|pytorch_model.*\.bin|\w*config\.json|tokenizer\.json")
SAVE = "save the weights alone: torch.save(model.state_dict(), 'weights.pt')"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch.save's magic number, before it wrote zip


def run_config(folder: Path) -> TrainConfig:
    """Return the settings of the run in `folder`. Raises UserError if there is no run."""
    if (folder / "config.json").is_file() and not (folder / "config.toml").exists():
        raise UserError(
            f"{folder}: a model in Hugging Face's format and no run; sample from it with --checkpoint "
            f"{shlex.quote(str(folder))}, train from it with --init_from {shlex.quote(str(folder))}"
        )
    if (folder / "state.json").is_file():
        raise UserError(
            f"{folder}: a checkpoint and no run; give its run, {folder.parent}, or sample from the checkpoint with "
            f"--checkpoint {shlex.quote(str(folder))}"
        )
    if not (folder / "config.toml").is_file():
        raise no_run(folder, "config.toml")
    return from_settings(read_toml(str(folder / "config.toml")))


def weights_file(source: str, preferred: str = "best") -> Path:
    """Return the "best" weights of a run folder or its "last", the others if it lacks these; a file as it is."""
    path = Path(source)
    names = ["best.pt", "model.pt"] if preferred == "best" else ["model.pt", "best.pt"]
    candidates = [path / name for name in names] if path.is_dir() else [path]
    if (folder := _folder_of(path)) is not None:
        raise UserError(f"{source}: is only a part of a model; give the folder of all its files: {folder}")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir() and next(path.glob("*.safetensors"), None) is not None:
        raise UserError(f"{source}: has safetensors files, but no config.json with their shape; copy the whole folder")
    what = "no weights in this folder" if path.is_dir() else "no such file or folder"
    raise UserError(
        f"{source}: {what}; give a run folder, a state_dict saved by torch.save, a GGUF file, or a model in Hugging "
        "Face's format"
    )


def _folder_of(path: Path) -> Path | None:
    """Return the folder of the run or model of which `path` is only a file; None if it is none."""
    if not (path.is_file() and PARTS.fullmatch(path.name)):
        return None
    folder = path.parent.parent if path.with_name("state.json").is_file() else path.parent
    is_whole = any((folder / name).is_file() for name in ("config.toml", "config.json"))
    return folder if is_whole else None


def load_model(path: Path, device: torch.device, base: GPTConfig | None = None) -> Model:
    """Return a model in evaluation mode with the weights of a .pt file. Raises UserError as `read_weights` does."""
    config, weights = read_weights(path, base or GPTConfig())
    model = make_model(config)
    model.load_state_dict(weights)
    return model.to(device).eval()


def check_sums(path: Path) -> None:
    """Raise UserError if the file is not an archive of torch.save, or fails its CRC-32 sums.

    torch.save writes a zip archive with these sums, and torch.load does not check them.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train a model first, or give the path of a .pt file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a .pt file") from None
    if not head.startswith(b"PK\3\4"):
        raise UserError(f"{path}: {_no_archive(path, head, size)}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.rpartition("/")[2] for entry in entries}
            if "data.pkl" not in names:
                raise UserError(f"{path}: is a zip archive, but not one of torch.save; {SAVE}")
            if "constants.pkl" in names:
                raise UserError(f"{path}: is TorchScript, which is a program; {SAVE}")
            damaged = archive.testzip()
            if marked := [entry.filename for entry in entries if entry.external_attr]:
                raise ValueError(f"{marked[0]} is marked as no plain file")
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is cut off or damaged ({error}; {size:,} bytes); copy or download it again") from None
    except Exception as error:  # zipfile raises many kinds for a file that is not its own
        raise UserError(f"{path}: not a state_dict saved by torch.save ({error}); {SAVE}") from None
    if damaged is not None:
        raise UserError(f"{path}: changed since it was written ({damaged}: CRC-32 differs); use another of the run's")


def _no_archive(path: Path, head: bytes, size: int) -> str:
    """Return what a file is that is not a zip archive, and the remedy."""
    if not head:
        return "is empty; copy or download it again"
    if found := signature(head):
        return f"is {found[0]}; {found[1]}"
    if head.startswith(LEGACY):
        convert = _command("torch.save(torch.load(a, 'cpu', weights_only=True), b)", path)
        return f"is in the format of torch.save before PyTorch 1.6, which has no checksums; write it anew: {convert}"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        convert = _command("from safetensors.torch import load_file; torch.save(load_file(a), b)", path)
        return (
            "is a safetensors file, which does not tell the shape of its model; give a folder that has its config.json "
            f"too, or if losscurve's names are in it, write it as a .pt file: {convert}"
        )
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"is a pickle that torch.save did not write, and loading it could run code; {SAVE}"
    if is_text(head):
        return f"is a text, not weights; {SAVE}"
    return f"not a state_dict saved by torch.save; {SAVE}"


def _command(code: str, path: Path) -> str:
    """Return a shell command that runs `code`, which reads the file `a` at `path` and writes `b` beside it."""
    files = f"{shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('.new.pt')))}"
    return f'python -c "import sys, torch; a, b = sys.argv[1:]; {code}" {files}'


def _state_dict(path: Path, content: Any, base: GPTConfig) -> tuple[dict[str, Tensor], GPTConfig]:
    """Return the weights in the content of a .pt file, and `base` with the number of heads in nanoGPT's `model_args`.

    The weights are taken out of the dict that a training program puts around them, without the prefix that
    torch.compile, DDP or a wrapping module adds to their names. Raises UserError if there are none.
    """
    is_nanogpt = False
    for _ in range(3):  # dicts may be nested; in a hostile file, one may contain itself
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not inner:
            break
        arguments = content.get("model_args")
        is_nanogpt = is_nanogpt or isinstance(arguments, dict)
        if isinstance(arguments, dict) and type(arguments.get("n_head")) is int:
            base = dataclasses.replace(base, n_head=arguments["n_head"])
        content = inner[0]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} and no weights; {SAVE}")
    content = {_without_wrappers(name): tensor for name, tensor in content.items()}
    found = [name for name in content if isinstance(name, str) and name.endswith("wte.weight")]
    if len(found) != 1:
        some = ", ".join(map(repr, list(content)[:3])) or "none"
        raise UserError(f"{path}: has no wte.weight (its names: {some}, …), so no weights of a GPT of ours; {SAVE}")
    prefix = found[0].removesuffix("wte.weight")
    weights = {name.removeprefix(prefix) if isinstance(name, str) else name: w for name, w in content.items()}
    weights = weights if len(weights) == len(content) else content
    return (_of_nanogpt(weights) if is_nanogpt else weights), base


def _without_wrappers(name: Any) -> Any:
    """Return the name of a tensor without what torch.compile and DDP put before it."""
    return re.sub(r"^(?:_orig_mod\.|module\.)+", "", name) if isinstance(name, str) else name


def _of_nanogpt(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of nanoGPT's model in ours.

    Its head is always tied, also where a copy in half precision has stored it twice. Without biases it has none in the
    norms and the feed-forward layers either, where ours have them: they are zeros. Old versions saved the mask of
    attention as attn.bias.
    """
    found = {name: w for name, w in weights.items() if not (name.endswith(".attn.bias") and w.dim() == 4)}
    for name in [name for name in found if name.endswith((*NORMS, *FEED_FORWARD))]:
        bias = name.removesuffix("weight") + "bias"
        if bias not in found:
            found[bias] = found[name].new_zeros(len(found[name]))
    head, embedding = found.get("lm_head.weight"), found["wte.weight"]
    if head is None or torch.equal(head, embedding):
        found["lm_head.weight"] = embedding
    return found


def read_weights(path: Path, base: GPTConfig) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape and the state_dict in a .pt file.

    Sizes come from the tensors. Heads, GELU and dropout cannot be inferred from them; they come from the config.toml
    beside the file, else from `base`. Loading runs no code.

    Raises UserError if the file is not a state_dict of a `GPT`.
    """
    check_sums(path)
    weights, base = _state_dict(path, load_plain_data(path), base)
    if (path.parent / "config.toml").exists():
        base = run_config(path.parent).model
    config, expected = infer_shape(path, weights, base)
    check_tensors(path, weights, expected)
    return config, weights


def load_plain_data(path: Path) -> Any:
    """Return the content of a .pt file. Raises UserError unless it is tensors and plain data only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a file that is not its own
        if objects := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds Python objects ({objects[1]}) besides weights, and loading those could run code; {SAVE}"
            ) from None
        raise UserError(f"{path}: not a state_dict saved by torch.save ({type(error).__name__}); {SAVE}") from None


def infer_shape(path: Path, weights: dict[str, Tensor], base: GPTConfig) -> tuple[GPTConfig, dict[str, torch.Size]]:
    """Return the config that fits `weights`, and the shape of each tensor by name. Raises UserError if none fits."""
    _check_heads(path, weights.get("wte.weight"), base)
    unfit = (KeyError, ValueError, IndexError, AttributeError, TypeError, ZeroDivisionError, RuntimeError, UserError)
    try:
        vocab_size, n_embd = weights["wte.weight"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.")}
        find = _gpt2_sizes if "wpe.weight" in weights else _llama_sizes
        config = dataclasses.replace(
            base,
            vocab_size=vocab_size,
            n_layer=len(layers),
            n_embd=n_embd,
            tied_lm_head=weights["lm_head.weight"].data_ptr() == weights["wte.weight"].data_ptr(),
            **find(weights, base),
        )
        return config, tensor_shapes(config)
    except unfit as error:
        raise UserError(
            f"{path}: not the weights of a GPT of ours ({type(error).__name__}: {error}); give other weights"
        ) from None


def _check_heads(path: Path, embedding: Any, base: GPTConfig) -> None:
    """Raise UserError if the width of the embedding (V, C) is not divisible by the number of heads."""
    if not isinstance(embedding, Tensor) or embedding.dim() != 2 or base.head_dim is not None:
        return
    width, heads = embedding.shape[1], base.n_head
    if width % heads:
        fitting = max(n for n in range(1, heads) if width % n == 0)
        raise UserError(
            f"{path}: is {width} channels wide, which {heads} heads do not divide; give the number of heads that it "
            f"was trained with, such as --n_head {fitting}"
        )


def _gpt2_sizes(weights: dict[str, Tensor], base: GPTConfig) -> dict[str, Any]:
    return {
        "arch": "gpt2",
        "block_size": weights["wpe.weight"].shape[0],
        "ffn_mult": weights["h.0.mlp.c_fc.weight"].shape[0] // weights["wte.weight"].shape[1],
        "bias": "h.0.attn.c_attn.bias" in weights,
    }


def _llama_sizes(weights: dict[str, Tensor], base: GPTConfig) -> dict[str, Any]:
    """Return the sizes that a llama's tensors show. Its context, heads and rope_theta are not among them."""
    if base.arch != "llama":
        raise UserError("has no wpe.weight, and only the config.toml of its run tells the sizes of a llama")
    head_size = base.head_dim or weights["wte.weight"].shape[1] // base.n_head
    rows = weights["h.0.attn.c_attn.weight"].shape[0]  # those of queries, keys and values
    return {
        "n_kv_head": (rows // head_size - base.n_head) // 2,
        "ffn_dim": weights["h.0.mlp.c_fc.weight"].shape[0] // 2,
        "qk_norm": "h.0.qk_norm.q.weight" in weights,
    }


def check_tensors(path: Path, weights: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Raise UserError that names the first tensor that is missing, unknown, misshapen, sparse or not finite."""
    for name in sorted(set(expected) | set(weights)):
        if name not in weights:
            raise UserError(f"{path}: has no {name}, which a GPT of ours of this shape needs; give other weights")
        if name not in expected:
            raise UserError(f"{path}: has {name}, which a GPT of ours of this shape has not; give other weights")
        found = getattr(weights[name], "shape", None)
        if found != expected[name]:
            raise UserError(
                f"{path}: {name} is {found and tuple(found)}, and this shape needs {tuple(expected[name])}; "
                f"give other weights"
            )
        if weights[name].layout != torch.strided:
            raise UserError(f"{path}: {name} is a sparse tensor; save a plain state_dict")
        if not weights[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {weights[name].dtype} numbers; save the weights in float32")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path}: {name} holds a number that is not finite; use other weights")
