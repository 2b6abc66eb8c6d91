"""Read GGUF, the file of llama.cpp and of what is built on it: a model with its tokenizer, checked before it is used.

Weights of any type that the package `gguf` can turn into float32 are read: F32, F16, BF16, Q8_0 and llama.cpp's other
quantised types. What the file says and no model of ours has is refused by name.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llm.arch import tensor_shapes
from llm.config import GPTConfig
from llm.errors import UserError
from llm.tokens.gguf import read_tokenizer
from llm.weights.foreign import ForeignModel
from llm.weights.gguf_layout import Weights, from_gguf
from llm.weights.pt_file import check_tensors
from llm.weights.shape import foreign_shape

MAGIC = b"GGUF"
LAYER_NORM_EPS = 1e-5  # PyTorch's
OUR_GELU = "losscurve.gelu"  # a key that llama.cpp does not know: it always computes GELU by tanh
NAMES = {  # of our fields
    "block_size": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "n_embd": "embedding_length",
    "ffn_dim": "feed_forward_length",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
MISREAD = (ValueError, IndexError, TypeError, RuntimeError)  # what the package raises for bytes that make no sense
MISSING = "gguf is not installed; install it with: pip install gguf"


def is_gguf(path: Path) -> bool:
    """Whether a file is called .gguf or begins as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> ForeignModel:
    """Return the model of a GGUF file, with its weights in float32, and its tokenizer.

    Raises:
        UserError: the file is damaged, or holds a model or a tokenizer that is none of ours; the message says which.
    """
    try:
        from gguf import GGUFReader, quants
    except ImportError:
        raise UserError(MISSING) from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path}: not a GGUF file; give another, or the model's folder in Hugging Face's format")

    class CheckedReader(GGUFReader):
        """Beyond the end of a file, the package's reader finds empty values, as many as a damaged length says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> Any:
            self.data: Any = np.asarray(self.data)  # as a memmap, each of 100,000 tokens takes twice the time
            part = super()._get(offset, dtype, count, *order, **orders)
            if len(part) < int(count):
                raise ValueError("it is cut off or damaged")
            return part

    try:
        reader = CheckedReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (*MISREAD, KeyError) as error:
        raise UserError(
            f"{path}: cut off or damaged, or of a version that the package gguf does not know "
            f"({' '.join(str(error).split())}); copy or download it again"
        ) from None
    try:
        config = _read_shape(fields, {tensor.name for tensor in reader.tensors})
        tokenizer = read_tokenizer(fields)
        theirs = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        if config.arch == "gpt2":
            config = dataclasses.replace(config, bias=_has_biases(theirs, config))
        weights = from_gguf(theirs, config)
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}, which a model of ours needs; give another file") from None
    except (*MISREAD, UserError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a GGUF file that losscurve can read ({cause}); give another file, or the model's folder in "
            "Hugging Face's format"
        ) from None
    check_tensors(path, weights, tensor_shapes(config))
    return ForeignModel(path, config, weights, tokenizer)


def _read_shape(fields: dict[str, Any], names: set[str]) -> GPTConfig:
    """Return the shape of the model whose tensors have these names. Raises KeyError, ValueError or UserError."""
    arch = fields["general.architecture"]
    if arch not in ("gpt2", "llama", "qwen3"):
        raise ValueError(f"its architecture is {arch!r}; expected gpt2, llama or qwen3")
    if fields.get("split.count", 0) > 1:
        raise ValueError(f"it is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
    terms = {ours: f"{arch}.{theirs}" for ours, theirs in NAMES.items()}
    C = int(fields[f"{arch}.embedding_length"])
    shape: dict[str, Any] = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "block_size": int(fields[f"{arch}.context_length"]),
        "n_layer": int(fields[f"{arch}.block_count"]),
        "n_head": int(fields[f"{arch}.attention.head_count"]),
        "n_embd": C,
        "tied_lm_head": "output.weight" not in names,
    }
    ffn_width = int(fields[f"{arch}.feed_forward_length"])
    if arch == "gpt2":
        _expect_value(fields, "gpt2.attention.layer_norm_epsilon", LAYER_NORM_EPS)
        if ffn_width % C:
            raise ValueError(f"its feed-forward layer has {ffn_width} channels, no multiple of its {C}")
        gelu = fields.get(OUR_GELU, "tanh")
        return foreign_shape(terms, arch="gpt2", ffn_mult=ffn_width // C, gelu=gelu, **shape)
    D = int(fields.get(f"{arch}.attention.key_length", C // shape["n_head"]))
    for key in ("attention.value_length", "rope.dimension_count"):
        _expect_value(fields, f"{arch}.{key}", D)
    for key in ("expert_count", "attention.sliding_window"):
        _expect_value(fields, f"{arch}.{key}", 0)
    if fields.get(f"{arch}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise ValueError("it scales the angles of its RoPE, which losscurve does not")
    return foreign_shape(
        terms,
        arch="llama",
        head_dim=None if D * shape["n_head"] == C else D,
        norm_eps=_shortest(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        n_kv_head=int(fields.get(f"{arch}.attention.head_count_kv", shape["n_head"])),
        ffn_dim=ffn_width,
        rope_theta=_shortest(fields.get(f"{arch}.rope.freq_base", 1e4)),
        qk_norm=arch == "qwen3",
        **shape,
    )


def _has_biases(theirs: Weights, config: GPTConfig) -> bool:
    """Whether a GPT-2's attention has biases: the file always does, and they are zeros where the model has none."""
    layers = range(config.n_layer)
    return any(theirs[f"blk.{layer}.attn_{part}.bias"].any() for layer in layers for part in ("qkv", "output"))


def _shortest(number: float) -> float:
    """Return the shortest decimal number that is this one in float32, in which the file has it: 1e-6, not 9.99…e-7."""
    return float(str(np.float32(number)))


def _expect_value(fields: dict[str, Any], key: str, expected: float) -> None:
    """Raise ValueError if a number in the metadata is there and is not as expected."""
    found = fields.get(key, expected)
    if not np.isclose(found, expected, rtol=1e-6):
        raise ValueError(f"its {key} is {found:g}, and losscurve has {expected:g}")
