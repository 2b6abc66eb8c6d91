"""The shape of a model in Hugging Face's terms and in ours: GPT-2's for `GPT`, Llama's and Qwen3's for `Llama`.

The names and the defaults of the fields are those of the transformers library (`GPT2Config`, `LlamaConfig`,
`Qwen3Config`).
"""

from typing import Any

from llm.config import GPTConfig, short_repr
from llm.errors import UserError
from llm.weights.shape import check_field, foreign_shape

GELUS = {"exact": "gelu", "tanh": "gelu_new"}  # ours: theirs
OUR_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs: ours
KINDS = {  # model_type: the class of the model with a head
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Our fields: theirs, and the values that transformers gives to those that are missing
GPT2_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "tied_lm_head": ("tie_word_embeddings", True),
}
GPT2_ALIASES = {  # that transformers takes for them
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
LLAMA_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "block_size": ("max_position_embeddings", 2048),
    "n_layer": ("num_hidden_layers", 32),
    "n_head": ("num_attention_heads", 32),
    "n_embd": ("hidden_size", 4096),
    "ffn_dim": ("intermediate_size", 11008),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_lm_head": ("tie_word_embeddings", False),
}
QWEN3_FIELDS = LLAMA_FIELDS | {
    "vocab_size": ("vocab_size", 151936),
    "block_size": ("max_position_embeddings", 32768),
    "ffn_dim": ("intermediate_size", 22016),
}


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


def settings_in(raw: dict[str, Any]) -> GPTConfig:
    """Return the shape that a config.json describes.

    A field that is missing, or null where transformers allows that, has the value that transformers gives it. Raises
    UserError that names the field and the value which no model of ours has.
    """
    kind = raw.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model_type = {kind!r}: losscurve has no such architecture; it knows {', '.join(KINDS)}")
    classes = raw.get("architectures")
    if classes and not any(name in (KINDS[kind], KINDS[kind].replace("LMHead", "")) for name in classes):
        raise UserError(f"architectures = {classes}: losscurve has language models only, here {KINDS[kind]}")
    if raw.get("quantization_config") is not None:
        raise UserError(
            f"quantization_config = {short_repr(raw['quantization_config'])}: losscurve reads weights in float32, "
            "bfloat16 and float16 only"
        )
    _refuse(raw, {"is_encoder_decoder": (False,), "add_cross_attention": (False,)})
    return _gpt2_in(raw) if kind == "gpt2" else _llama_in(raw, kind)


def _refuse(raw: dict[str, Any], expected: dict[str, tuple[Any, ...]]) -> None:
    """Raise UserError for the first field that is there and has none of its `expected` values, the default first."""
    for name, values in expected.items():
        found = raw.get(name, values[0])
        if found not in values:
            known = " or ".join(map(repr, values))
            raise UserError(f"{name} = {short_repr(found)}: losscurve's model of this kind has {known} only")


def _gpt2_in(raw: dict[str, Any]) -> GPTConfig:
    raw = {GPT2_ALIASES.get(name, name): value for name, value in raw.items()}
    _refuse(
        raw,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    )
    sizes = _sizes(raw, GPT2_FIELDS)
    width = sizes["n_embd"]
    inner = 4 * width if raw.get("n_inner") is None else raw["n_inner"]
    if type(inner) is not int or inner % width:
        raise UserError(f"n_inner = {short_repr(inner)}: losscurve's GPT-2 has a multiple of n_embd = {width} only")
    names = {ours: theirs for ours, (theirs, _) in GPT2_FIELDS.items()} | {"ffn_mult": "n_inner / n_embd"}
    gelu = OUR_GELUS[raw.get("activation_function", "gelu_new")]
    return foreign_shape(names, arch="gpt2", ffn_mult=inner // width, bias=True, gelu=gelu, **sizes)


def _llama_in(raw: dict[str, Any], kind: str) -> GPTConfig:
    is_qwen3 = kind == "qwen3"
    _refuse(raw, {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)})
    window = raw.get("sliding_window", 4096 if is_qwen3 else None)
    if raw.get("use_sliding_window", not is_qwen3) and window is not None:
        raise UserError(f"sliding_window = {short_repr(window)}: losscurve's attention has no window")
    if others := sorted(set(map(str, raw.get("layer_types") or ())) - {"full_attention"}):
        raise UserError(f"layer_types has {others}: losscurve's layers have full attention only")
    fields = QWEN3_FIELDS if is_qwen3 else LLAMA_FIELDS
    names = {ours: theirs for ours, (theirs, _) in fields.items()} | {"n_kv_head": "num_key_value_heads"}
    sizes = _sizes(raw, fields)
    heads = sizes["n_head"]
    kv_heads = raw.get("num_key_value_heads", 32 if is_qwen3 else None)  # null: as many as heads
    head_dim = raw.get("head_dim")  # null: the width is divided by the heads
    if is_qwen3:
        head_dim = _value(raw, "head_dim", 128)
    return foreign_shape(
        names,
        arch="llama",
        n_kv_head=heads if kv_heads is None else kv_heads,
        head_dim=None if head_dim in (None, sizes["n_embd"] / heads) else head_dim,
        rope_theta=_rope_theta(raw),
        qk_norm=is_qwen3,
        **sizes,
    )


def _rope_theta(raw: dict[str, Any]) -> float:
    """Return the base of the rotation. Raises UserError for a rotation that is scaled or of some channels only."""
    for name in ("rope_scaling", "rope_parameters"):
        more = raw.get(name) or {}
        if not isinstance(more, dict) or any(isinstance(value, dict) for value in more.values()):
            raise UserError(f"{name} = {short_repr(more)}: expected one object for all layers")
        found = more.get("rope_type", more.get("type", "default"))
        if found != "default":
            raise UserError(f"{name}.rope_type = {short_repr(found)}: losscurve does not scale the angles of RoPE")
        if more.get("partial_rotary_factor") is not None:
            _refuse(more, {"partial_rotary_factor": (1.0,)})
    if raw.get("partial_rotary_factor") is not None:
        _refuse(raw, {"partial_rotary_factor": (1.0,)})
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # newer files have it here
    theta = _value(nested if "rope_theta" in nested else raw, "rope_theta", 10000.0)
    check_field("rope_theta", theta, "rope_theta")
    return float(theta)


def _sizes(raw: dict[str, Any], fields: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """Return the values of `fields` by our names. Raises UserError for one that no model of ours has."""
    found = {}
    for ours, (theirs, default) in fields.items():
        found[ours] = _value(raw, theirs, default)
        check_field(ours, found[ours], theirs)
    return found


def _value(raw: dict[str, Any], name: str, default: Any) -> Any:
    """Return a field of config.json, `default` if it is missing. Raises UserError for null."""
    value = raw.get(name, default)
    if value is None:
        raise UserError(f"{name} = null: a model needs this")
    return value
