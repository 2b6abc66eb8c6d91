"""Weights in Hugging Face's layout and in ours: GPT-2's for `GPT`, Llama's and Qwen3's for `Llama`.

The names of the tensors are those of the transformers library.
Ours join queries, keys and values into one matrix, and gate and up into another; GPT-2's matrices are transposed there
(its Conv1D multiplies with (in, out)).

Shapes: C channels, V vocabulary.
"""

import re

import torch
from torch import Tensor

from llm.config import GPTConfig
from llm.errors import UserError

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # in GPT-2
GPT2_BIASES = ("attn.c_attn.bias", "attn.c_proj.bias")  # GPT-2 always has them
LLAMA_NAMES = (  # ours, theirs
    ("ln_1.weight", "input_layernorm.weight"),
    ("ln_2.weight", "post_attention_layernorm.weight"),
    ("attn.c_proj.weight", "self_attn.o_proj.weight"),
    ("mlp.c_proj.weight", "mlp.down_proj.weight"),
    ("qk_norm.q.weight", "self_attn.q_norm.weight"),
    ("qk_norm.k.weight", "self_attn.k_norm.weight"),
)
LLAMA_JOINED = {  # ours: theirs, in the order of their rows
    "attn.c_attn.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.c_fc.weight": [f"mlp.{part}_proj.weight" for part in ("gate", "up")],
}
LLAMA_ENDS = {"wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight"}
# ---- out of the house


def weights_out(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of a model of ours as transformers names it. A tied head is left out."""
    return _gpt2_out(config, weights) if config.arch == "gpt2" else _llama_out(config, weights)


def _gpt2_out(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            if not config.tied_lm_head:
                found[name] = tensor
        else:
            found[f"transformer.{name}"] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    if not config.bias:
        for layer in range(config.n_layer):
            for name, width in zip(GPT2_BIASES, (3 * config.n_embd, config.n_embd), strict=True):
                found[f"transformer.h.{layer}.{name}"] = torch.zeros(width, dtype=weights["wte.weight"].dtype)
    return found


def _llama_out(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    queries, keys = config.n_head * config.head_size, config.kv_heads * config.head_size
    rows = {"attn.c_attn.weight": [queries, keys, keys], "mlp.c_fc.weight": [config.ffn_width] * 2}
    renamed = dict(LLAMA_NAMES)
    found = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            if not config.tied_lm_head:
                found[name] = tensor
        elif name in LLAMA_ENDS:
            found[LLAMA_ENDS[name]] = tensor
        else:
            _, layer, part = name.split(".", 2)
            if part in rows:
                matrices = torch.split(tensor, rows[part])
                for theirs, matrix in zip(LLAMA_JOINED[part], matrices, strict=True):
                    found[f"model.layers.{layer}.{theirs}"] = matrix.contiguous()
            else:
                found[f"model.layers.{layer}.{renamed[part]}"] = tensor
    return found


# ---- into the house


def weights_in(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict for a model of ours from tensors as transformers names them, in float32.

    Masks that old versions saved are left out, and a tied head is the embedding. Raises UserError that names a tensor
    which is missing, or a head other than the embedding in a model that ties them. Shapes are the caller's to check.
    """
    theirs = {_bare(name): tensor for name, tensor in tensors.items()}
    found = _gpt2_names(config, theirs) if config.arch == "gpt2" else _llama_names(config, theirs)
    head = theirs.get("lm_head.weight")
    if config.tied_lm_head:
        if "wte.weight" not in found:
            some = ", ".join(sorted(theirs)[:3]) or "none"
            raise UserError(f"has no token embedding among its names ({some}, …)")
        found["lm_head.weight"] = found["wte.weight"]
        if head is not None and not torch.equal(head.float(), found["wte.weight"]):
            raise UserError("has an lm_head.weight of its own, and not the embedding as its head")
    elif head is not None:
        found["lm_head.weight"] = head.float()
    return found


def _bare(name: str) -> str:
    """Return a tensor's name without what torch.compile, DDP or the model with a head put before it."""
    name = re.sub(r"^(?:_orig_mod\.|module\.)+", "", name)
    return re.sub(r"^(?:transformer|model)\.(?=wte|wpe|h\.|ln_f|embed_tokens|layers|norm)", "", name)


def _gpt2_names(config: GPTConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in theirs.items():
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias")):
            found[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).float().contiguous()
    return found


def _llama_names(config: GPTConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {their: ours for ours, their in LLAMA_NAMES}
    ends = {their.removeprefix("model."): ours for ours, their in LLAMA_ENDS.items()}
    parts = {their: ours for ours, list_of_theirs in LLAMA_JOINED.items() for their in list_of_theirs}
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        _, layer, part = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        if name in ends:
            found[ends[name]] = tensor.float()
        elif part in renamed:
            found[f"h.{layer}.{renamed[part]}"] = tensor.float()
        elif part not in parts and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            found[name] = tensor  # unknown: the caller names it
    for number in range(config.n_layer):
        for ours, list_of_theirs in LLAMA_JOINED.items():
            names = [f"layers.{number}.{their}" for their in list_of_theirs]
            if missing := [name for name in names if name not in theirs]:
                raise UserError(f"has no model.{missing[0]}")
            found[f"h.{number}.{ours}"] = torch.cat([theirs[name].float() for name in names])
    return found
