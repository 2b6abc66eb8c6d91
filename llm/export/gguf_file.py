"""GGUF, the file of llama.cpp and of what is built on it: write a model and its tokenizer, and read them back.

Vectors and the embedding of positions stay in float32, as llama.cpp's own converter leaves them. `q8_0` has blocks of
32 weights of a row, each of 8 bits, with one scale in float16; a matrix whose rows are no multiple of 32 is written in
float16 instead, as llama.cpp's quantiser does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.arch import Model, make_model
from llm.config import GPTConfig
from llm.errors import UserError
from llm.export.gguf_layout import Weights, architecture, from_gguf, to_gguf
from llm.export.gguf_tokens import add_tokenizer, read_tokenizer
from llm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

LAYER_NORM_EPS = 1e-5  # PyTorch's
GGML_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}  # llama.cpp's, "mostly" of that type
OUR_GELU = "losscurve.gelu"  # the only key that llama.cpp does not know: it always computes GELU by tanh
MISSING = "gguf is not installed; install it with: pip install gguf"


def write_gguf(model: Model, tokenizer: Tokenizer, path: Path, dtype: str, name: str) -> list[str]:
    """Write a GGUF file, and return the names of the matrices that are in float16 because q8_0 does not fit them.

    Args:
        dtype: of the matrices, one of GGML_TYPES.
        name: of the model, for people.

    Raises:
        UserError: gguf is not installed, a weight is too large for float16, or the tokenizer does not fit the model.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, quants
    except ImportError:
        raise UserError(MISSING) from None
    writer = GGUFWriter(path, architecture(model.config))
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    _add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    instead = []
    for tensor, weight in to_gguf(model).items():
        kind = _type_of(tensor, weight.shape, dtype)
        if kind == "F16" and dtype == "q8_0":
            instead.append(tensor)
        if kind == "F16" and np.abs(weight).max() > np.finfo(np.float16).max:
            raise UserError(f"{tensor} has a weight that is too large for float16; give --dtype bfloat16")
        ggml = GGMLQuantizationType[kind]
        writer.add_tensor(tensor, quants.quantize(np.ascontiguousarray(weight), ggml), raw_dtype=ggml)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return instead


def _type_of(tensor: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return ggml's name for the type in which a tensor is written."""
    if len(shape) == 1 or tensor == "position_embd.weight":
        return "F32"
    if dtype == "q8_0" and shape[-1] % 32:
        return "F16"
    return GGML_TYPES[dtype]


def _add_shape(writer: "GGUFWriter", config: GPTConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.arch == "gpt2":
        writer.add_layer_norm_eps(LAYER_NORM_EPS)
        writer.add_string(OUR_GELU, config.gelu)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)


def read_gguf(path: Path) -> tuple[Model, Tokenizer]:
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

    class CheckedReader(GGUFReader):
        """Beyond the end of a file, the package's reader finds empty values, as many as a damaged length says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> Any:
            part = super()._get(offset, dtype, count, *order, **orders)
            if len(part) < int(count):
                raise ValueError("it is cut off or damaged")
            return part

    try:
        reader = CheckedReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        weights = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        config = _read_shape(fields, weights)
        model = make_model(config)
        model.load_state_dict(from_gguf(weights, config))
        return model.eval(), read_tokenizer(fields)
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}, which a model of ours needs; give another file") from None
    except (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError, UserError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"{path}: not a GGUF file that losscurve can read ({cause}); give another file") from None


def _read_shape(fields: dict[str, Any], weights: Weights) -> GPTConfig:
    """Return the shape of the model in a GGUF file. Raises KeyError, ValueError or UserError if it is none of ours."""
    arch = fields["general.architecture"]
    if arch not in ("gpt2", "llama", "qwen3"):
        raise ValueError(f"its architecture is {arch!r}; expected gpt2, llama or qwen3")
    C = int(fields[f"{arch}.embedding_length"])
    shape: dict[str, Any] = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "block_size": int(fields[f"{arch}.context_length"]),
        "n_layer": int(fields[f"{arch}.block_count"]),
        "n_head": int(fields[f"{arch}.attention.head_count"]),
        "n_embd": C,
        "tied_lm_head": "output.weight" not in weights,
    }
    ffn_width = int(fields[f"{arch}.feed_forward_length"])
    if arch == "gpt2":
        _expect_value(fields, "gpt2.attention.layer_norm_epsilon", LAYER_NORM_EPS)
        if ffn_width % C:
            raise ValueError(f"its feed-forward layer has {ffn_width} channels, no multiple of its {C}")
        biases = [
            weights[f"blk.{layer}.attn_{part}.bias"] for layer in range(shape["n_layer"]) for part in ("qkv", "output")
        ]
        gelu = fields.get(OUR_GELU, "tanh")
        return GPTConfig(ffn_mult=ffn_width // C, bias=any(map(np.any, biases)), gelu=gelu, **shape)
    D = int(fields.get(f"{arch}.attention.key_length", C // shape["n_head"]))
    for key in ("attention.value_length", "rope.dimension_count"):
        _expect_value(fields, f"{arch}.{key}", D)
    if scaled := [key for key in (*fields, *weights) if ".rope.scaling." in key or key.startswith("rope_")]:
        raise ValueError(f"it scales its RoPE ({scaled[0]})")
    return GPTConfig(
        arch="llama",
        head_dim=None if D * shape["n_head"] == C else D,
        norm_eps=_shortest(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        n_kv_head=int(fields.get(f"{arch}.attention.head_count_kv", shape["n_head"])),
        ffn_dim=ffn_width,
        rope_theta=_shortest(fields.get(f"{arch}.rope.freq_base", 1e4)),
        qk_norm=arch == "qwen3",
        **shape,
    )


def _shortest(number: float) -> float:
    """Return the shortest decimal number that is this one in float32, in which the file has it: 1e-6, not 9.99…e-7."""
    return float(str(np.float32(number)))


def _expect_value(fields: dict[str, Any], key: str, expected: float) -> None:
    """Raise ValueError if a number in the metadata is there and is not as expected."""
    found = fields.get(key, expected)
    if not np.isclose(found, expected, rtol=1e-6):
        raise ValueError(f"its {key} is {found:g}, and losscurve has {expected:g}")
