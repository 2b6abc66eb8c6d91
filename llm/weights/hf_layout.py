"""Shapes and weights in Hugging Face's terms and in ours: GPT-2's for `GPT`, Llama's and Qwen3's for `Llama`.

The names of the fields and tensors are those of the transformers library (`GPT2Config`, `LlamaConfig`, `Qwen3Config`).
Ours join queries, keys and values into one matrix, and gate and up into another; GPT-2's matrices are transposed there
(its Conv1D multiplies with (in, out)).

Shapes: C channels, V vocabulary.
"""

import re
from typing import Any

import torch
from torch import Tensor

from llm.config import GPTConfig
from llm.errors import UserError

GELUS = {"exact": "gelu", "tanh": "gelu_new"}  # ours: theirs
OUR_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs: ours
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
KINDS = {  # model_type: the class of the model with a head
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


# ---- out of the house


def settings_out(config: GPTConfig) -> dict[str, Any]:
    """Return what a config.json says of the shape of a model."""
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied_lm_head, "use_cache": True}
    if config.arch == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": [KINDS["gpt2"]],
            **common,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.ffn_width,
            "activation_function": GELUS[config.gelu],
            "layer_norm_epsilon": 1e-5,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        }
    kind = "qwen3" if config.qk_norm else "llama"
    return {
        "model_type": kind,
        "architectures": [KINDS[kind]],
        **common,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # for transformers before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        **({} if kind == "qwen3" else {"mlp_bias": False}),
        "attention_dropout": config.dropout,
    }


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


def settings_in(raw: dict[str, Any]) -> GPTConfig:
    """Return the shape that a config.json describes.

    Raises UserError that names the field and the value which no model of ours has. A field that is missing has the
    value that transformers gives it.
    """
    kind = raw.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model_type = {kind!r}: losscurve has no such architecture; it knows {', '.join(KINDS)}")
    classes = raw.get("architectures")
    if classes and not any(name in (KINDS[kind], KINDS[kind].replace("LMHead", "")) for name in classes):
        raise UserError(f"architectures = {classes}: losscurve has language models only, here {KINDS[kind]}")
    _refuse(raw, {"quantization_config": (None,), "is_encoder_decoder": (False,), "add_cross_attention": (False,)})
    return _gpt2_in(raw) if kind == "gpt2" else _llama_in(raw, kind)


def _refuse(raw: dict[str, Any], expected: dict[str, tuple[Any, ...]]) -> None:
    """Raise UserError for the first field that is there and has none of its `expected` values."""
    for name, values in expected.items():
        found = raw.get(name, values[0])
        if found not in values:
            known = " or ".join(map(repr, values))
            raise UserError(f"{name} = {found!r}: losscurve's model of this kind has {known} only")


def _gpt2_in(raw: dict[str, Any]) -> GPTConfig:
    _refuse(
        raw,
        {
            "activation_function": ("gelu_new", *OUR_GELUS),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    )
    width = _integer(raw, "n_embd", 768)
    inner = _integer(raw, "n_inner", 4 * width)
    if inner % width:
        raise UserError(f"n_inner = {inner}: losscurve's GPT-2 has a multiple of n_embd = {width} only")
    return GPTConfig(
        arch="gpt2",
        vocab_size=_integer(raw, "vocab_size", 50257),
        block_size=_integer(raw, "n_positions", _integer(raw, "n_ctx", 1024)),
        n_layer=_integer(raw, "n_layer", 12),
        n_head=_integer(raw, "n_head", 12),
        n_embd=width,
        ffn_mult=inner // width,
        bias=True,
        tied_lm_head=bool(raw.get("tie_word_embeddings", True)),
        gelu=OUR_GELUS[raw.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
    )


def _llama_in(raw: dict[str, Any], kind: str) -> GPTConfig:
    _refuse(raw, {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)})
    if raw.get("use_sliding_window", kind != "qwen3") and raw.get("sliding_window") is not None:
        raise UserError(f"sliding_window = {raw['sliding_window']!r}: losscurve's attention has no window")
    if others := sorted(set(raw.get("layer_types") or ()) - {"full_attention"}):
        raise UserError(f"layer_types has {others}: losscurve's layers have full attention only")
    width, heads = _integer(raw, "hidden_size", 4096), _integer(raw, "num_attention_heads", 32)
    head_dim = _integer(raw, "head_dim", 128 if kind == "qwen3" else width // heads)
    return GPTConfig(
        arch="llama",
        vocab_size=_integer(raw, "vocab_size", 151936 if kind == "qwen3" else 32000),
        block_size=_integer(raw, "max_position_embeddings", 32768 if kind == "qwen3" else 2048),
        n_layer=_integer(raw, "num_hidden_layers", 32),
        n_head=heads,
        n_kv_head=_integer(raw, "num_key_value_heads", 32 if kind == "qwen3" else heads),
        n_embd=width,
        head_dim=None if head_dim * heads == width else head_dim,
        ffn_dim=_integer(raw, "intermediate_size", 22016 if kind == "qwen3" else 11008),
        tied_lm_head=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(raw),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
    )


def _rope_theta(raw: dict[str, Any]) -> float:
    """Return the base of the rotation. Raises UserError for a rotation that is scaled or of some channels only."""
    rope = {"rope_theta": raw.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        more = raw.get(name) or {}
        if not isinstance(more, dict):
            raise UserError(f"{name} = {more!r}: expected an object")
        found = more.get("rope_type", more.get("type", "default"))
        if found != "default":
            raise UserError(f"{name}.rope_type = {found!r}: losscurve does not scale the angles of RoPE")
        rope |= more
    _refuse(
        rope | {"partial_rotary_factor": raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))},
        {"partial_rotary_factor": (1.0,)},
    )
    return _number(rope, "rope_theta", 10000.0)


def _integer(raw: dict[str, Any], name: str, default: int) -> int:
    """Return a field that is a whole number above 0; the default if it is null or missing."""
    value = default if raw.get(name) is None else raw[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{name} = {value!r}: expected a whole number above 0")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = default if raw.get(name) is None else raw[name]
    if type(value) not in (int, float):
        raise UserError(f"{name} = {value!r}: expected a number")
    return float(value)


def weights_in(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict for a model of ours from tensors as transformers names them, in float32.

    Masks that old versions saved are left out, and a tied head is the embedding. Raises UserError that names a tensor
    which is missing. Shapes are the caller's to check.
    """
    theirs = {_bare(name): tensor for name, tensor in tensors.items()}
    found = _gpt2_names(config, theirs) if config.arch == "gpt2" else _llama_names(config, theirs)
    head = theirs.get("lm_head.weight")
    if config.tied_lm_head:
        found["lm_head.weight"] = found["wte.weight"]
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
