"""GGUF, the file of llama.cpp and of what is built on it: write a model and its tokenizer (`llm.weights` reads it).

Vectors and the embedding of positions stay in float32, as llama.cpp's own converter leaves them. `q8_0` has blocks of
32 weights of a row, each of 8 bits, with one scale in float16; a matrix whose rows are no multiple of 32 is written in
float16 instead, as llama.cpp's quantiser does.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm import __version__
from llm.arch import Model
from llm.config import GPTConfig
from llm.errors import UserError
from llm.tokens.gguf import add_tokenizer
from llm.tokens.tokenizer import Tokenizer
from llm.weights.gguf_file import LAYER_NORM_EPS, MISSING, OUR_GELU
from llm.weights.gguf_layout import architecture, to_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGML_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
OUR_VERSION = "losscurve.version"  # the key that says who wrote the file, one of the first
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}  # llama.cpp's, "mostly" of that type


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
    writer.add_string(OUR_VERSION, __version__)
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
