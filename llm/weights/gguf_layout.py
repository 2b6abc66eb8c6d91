"""The weights of a model under llama.cpp's names and in its layout, and back.

llama.cpp keeps a linear layer as PyTorch does, (out, in). What differs: it has queries, keys and values of a llama
apart, and gate and up; its architecture `llama` turns neighbouring channels of a head (0 with 1, 2 with 3), where ours
turns channel i with channel i + D/2, so the rows of queries and keys change places; and its GPT-2 has biases in every
linear, so that zeros stand for those that a model lacks. Its architecture `qwen3`, the one with a norm of queries and
keys, turns channels as ours does.

Shapes: C channels (n_embd), H heads, K heads of keys and values, D channels of a head.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.arch import Model
from llm.config import GPTConfig

Weights = dict[str, npt.NDArray[np.float32]]

GPT2_LINEARS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
NORMS = {"attn_norm": "ln_1", "ffn_norm": "ln_2"}


def architecture(config: GPTConfig) -> str:
    """Return llama.cpp's name for the shape of a model."""
    if config.arch == "gpt2":
        return "gpt2"
    return "qwen3" if config.qk_norm else "llama"


def to_gguf(model: Model) -> Weights:
    """Return the weights of `model` in float32 by llama.cpp's names."""
    config = model.config
    ours = {name: weight.detach().float().cpu().numpy() for name, weight in model.state_dict().items()}
    theirs = {"token_embd.weight": ours["wte.weight"], "output_norm.weight": ours["ln_f.weight"]}
    if not config.tied_lm_head:
        theirs["output.weight"] = ours["lm_head.weight"]
    if config.arch == "gpt2":
        theirs["position_embd.weight"] = ours["wpe.weight"]
        theirs["output_norm.bias"] = ours["ln_f.bias"]
    for layer in range(config.n_layer):
        block = {name.removeprefix(f"h.{layer}."): w for name, w in ours.items() if name.startswith(f"h.{layer}.")}
        found = _gpt2_block(block) if config.arch == "gpt2" else _llama_block(block, config)
        theirs |= {f"blk.{layer}.{name}": weight for name, weight in found.items()}
    return theirs


def _gpt2_block(block: Weights) -> Weights:
    found: Weights = {}
    for theirs, ours in (NORMS | GPT2_LINEARS).items():
        weight = block[f"{ours}.weight"]
        found[f"{theirs}.weight"] = weight
        found[f"{theirs}.bias"] = block.get(f"{ours}.bias", np.zeros(len(weight), np.float32))
    return found


def _llama_block(block: Weights, config: GPTConfig) -> Weights:
    H, K, D = config.n_head, config.kv_heads, config.head_size
    q, k, v = np.split(block["attn.c_attn.weight"], [H * D, (H + K) * D])
    gate, up = np.split(block["mlp.c_fc.weight"], 2)
    found = {
        "attn_q.weight": q,
        "attn_k.weight": k,
        "attn_v.weight": v,
        "attn_output.weight": block["attn.c_proj.weight"],
        "ffn_gate.weight": gate,
        "ffn_up.weight": up,
        "ffn_down.weight": block["mlp.c_proj.weight"],
    }
    found |= {f"{theirs}.weight": block[f"{ours}.weight"] for theirs, ours in NORMS.items()}
    if config.qk_norm:
        found["attn_q_norm.weight"] = block["qk_norm.q.weight"]
        found["attn_k_norm.weight"] = block["qk_norm.k.weight"]
    else:
        found["attn_q.weight"] = _interleave_pairs(q, H)
        found["attn_k.weight"] = _interleave_pairs(k, K)
    return found


def from_gguf(theirs: Weights, config: GPTConfig) -> dict[str, Tensor]:
    """Return the state_dict of a model of this shape.

    Raises KeyError for a tensor that is missing, and ValueError for one that no model of ours has.
    """
    left = dict(theirs)
    ours = {"wte.weight": left.pop("token_embd.weight"), "ln_f.weight": left.pop("output_norm.weight")}
    if not config.tied_lm_head:
        ours["lm_head.weight"] = left.pop("output.weight")
    if config.arch == "gpt2":
        ours["wpe.weight"] = left.pop("position_embd.weight")
        ours["ln_f.bias"] = left.pop("output_norm.bias")
    for layer in range(config.n_layer):
        take = _our_gpt2_block if config.arch == "gpt2" else _our_llama_block
        ours |= {f"h.{layer}.{name}": weight for name, weight in take(left, f"blk.{layer}.", config).items()}
    if left:
        raise ValueError(f"it has {min(left)}, which no model of ours has")
    # what is as the file has it is a read-only part of the file: copied, so that nothing depends on the file
    found = {name: torch.from_numpy(np.require(weight, requirements=["C", "W"])) for name, weight in ours.items()}
    if config.tied_lm_head:
        found["lm_head.weight"] = found["wte.weight"]
    return found


def _our_gpt2_block(left: Weights, prefix: str, config: GPTConfig) -> Weights:
    """Return the block under our names, and remove from `left` what it takes. Raises KeyError if something is missing.

    `prefix`: before the names of the block's tensors in the file.
    """
    found: Weights = {}
    for theirs, ours in (NORMS | GPT2_LINEARS).items():
        found[f"{ours}.weight"] = left.pop(f"{prefix}{theirs}.weight")
        bias = left.pop(f"{prefix}{theirs}.bias")
        if config.bias or not ours.startswith("attn."):
            found[f"{ours}.bias"] = bias
    return found


def _our_llama_block(left: Weights, prefix: str, config: GPTConfig) -> Weights:
    """Return the block under our names, and remove from `left` what it takes. Raises KeyError if something is missing.

    `prefix`: before the names of the block's tensors in the file.
    """

    def take(name: str) -> npt.NDArray[np.float32]:
        return left.pop(f"{prefix}{name}.weight")

    q, k, v = take("attn_q"), take("attn_k"), take("attn_v")
    found = {f"{ours}.weight": take(theirs) for theirs, ours in NORMS.items()}
    if config.qk_norm:
        found["qk_norm.q.weight"] = take("attn_q_norm")
        found["qk_norm.k.weight"] = take("attn_k_norm")
    else:
        q, k = _split_pairs(q, config.n_head), _split_pairs(k, config.kv_heads)
    found["attn.c_attn.weight"] = np.concatenate([q, k, v])
    found["attn.c_proj.weight"] = take("attn_output")
    found["mlp.c_fc.weight"] = np.concatenate([take("ffn_gate"), take("ffn_up")])
    found["mlp.c_proj.weight"] = take("ffn_down")
    return found


def _interleave_pairs(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Return the rows (heads * D, C) with channel i + D/2 of each head next to channel i."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _split_pairs(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Return the rows (heads * D, C) as they were before `_interleave_pairs`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
