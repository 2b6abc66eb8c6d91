"""A llama's block as one autograd function: what is its own of a fused block (see fused_block.py).

Shapes as in fused_block.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.machine import kernel
from llm.machine.fused_block import PARTS, Drops, Sizes, attend, attend_backward, call

FILE = "block_llama.c"
call_llama = partial(kernel.call, FILE)


def fused_llama(
    x: Tensor, sizes: Sizes, drops: Drops | None, cos: Tensor, sin: Tensor, *weights: Tensor | None
) -> Tensor:
    """Return a block's output (B, T, C) for its input x (B, T, C).

    cos, sin: (T, D / 2), float32. weights: of ln_1, c_attn, the queries' norm, the keys' norm, attention's c_proj,
    ln_2, c_fc and the feed-forward layer's c_proj. Those of queries and keys are None if the model does not norm them.
    """
    return _Block.apply(x, sizes, drops, cos, sin, *weights)  # type: ignore[no-any-return, no-untyped-call]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Sizes, drops: Drops | None, cos: Tensor, sin: Tensor, *weights: Tensor
    ) -> Tensor:
        ln_1, c_attn, q_norm, k_norm, attn_proj, ln_2, c_fc, mlp_proj = weights
        B, T, H, K, D, eps = sizes
        x = x.contiguous().view(B * T, -1)
        qk_norm = None if q_norm is None else torch.stack((q_norm, k_norm))
        c_attn, attn_proj, c_fc, mlp_proj = (w.to(torch.bfloat16) for w in (c_attn, attn_proj, c_fc, mlp_proj))
        # attention
        _, y_1, scales_1 = _norm(x, None, ln_1, eps)
        joined = y_1 @ c_attn.t()
        heads, qk_scales = torch.empty_like(joined).view(-1), x.new_empty(B * T, H + K)
        call_llama("split_heads", joined, heads, qk_norm, qk_scales, cos, sin, eps, B, T, H, K, D)
        merged, attention = attend(heads, sizes, drops)
        added = merged @ attn_proj.t()
        # the feed-forward layer
        middle, y_2, scales_2 = _norm(x, drops(1, added) if drops else added, ln_2, eps)
        gates = y_2 @ c_fc.t()
        hidden = gates.new_empty(B * T, gates.size(1) // 2)
        call_llama("swiglu", gates, hidden, *hidden.shape)
        added, out = hidden @ mlp_proj.t(), torch.empty_like(x)
        call("add", middle, drops(2, added) if drops else added, out, x.numel())
        ctx.sizes, ctx.drops = sizes, drops
        ctx.save_for_backward(
            *(x, y_1, scales_1, joined, qk_scales, heads, attention, merged, middle, y_2, scales_2, gates),
            *(cos, sin, ln_1, c_attn, qk_norm, attn_proj, ln_2, c_fc, mlp_proj),
        )
        return out.view(B, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second time
        x, y_1, scales_1, joined, qk_scales, heads, attention, merged, middle, y_2, scales_2, gates = saved[:12]
        cos, sin, ln_1, c_attn, qk_norm, attn_proj, ln_2, c_fc, mlp_proj = saved[12:]
        (B, T, H, K, D, _), drops = ctx.sizes, ctx.drops
        # the feed-forward layer
        dout = dout.contiguous().view(B * T, -1)
        dadded = torch.empty_like(y_2)
        call("round_all", dout, dadded, dout.numel())
        if drops:
            drops(2, dadded)
        dhidden = dadded @ mlp_proj
        dgates, hidden = torch.empty_like(gates), torch.empty_like(dhidden)
        call_llama("swiglu_backward", gates, dhidden, dgates, hidden, *hidden.shape)
        dmlp_proj, dc_fc = dadded.t() @ hidden, dgates.t() @ y_2
        dmiddle, dadded, dln_2 = _norm_backward(dgates @ c_fc, middle, ln_2, scales_2, dout)
        # attention
        if drops:
            drops(1, dadded)
        dattn_proj = dadded.t() @ merged
        dheads = attend_backward(dadded @ attn_proj, heads, attention, ctx.sizes, drops)
        djoined, dqk_norm = torch.empty_like(joined), x.new_empty(PARTS, 2, D)
        call_llama(
            "split_heads_backward", dheads, joined, djoined, qk_norm, qk_scales, dqk_norm, cos, sin, B, T, H, K, D
        )
        dc_attn = djoined.t() @ y_1
        dx, _, dln_1 = _norm_backward(djoined @ c_attn, x, ln_1, scales_1, dmiddle)
        dq_norm, dk_norm = (None, None) if qk_norm is None else dqk_norm.sum(0)
        of_attention = (dln_1, dc_attn.float(), dq_norm, dk_norm, dattn_proj.float())
        of_mlp = (dln_2, dc_fc.float(), dmlp_proj.float())
        return dx.view(B, T, -1), None, None, None, None, *of_attention, *of_mlp


def _norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + added (N, C), its RMSNorm in bfloat16, and the scale of each row (N,)."""
    total = x if added is None else torch.empty_like(x)
    y, scales = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))
    call_llama("norm", x, added, total, weight, y, scales, eps, *x.shape)
    return total, y, scales


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor, passed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x: `passed` and what comes through the norm; the same in bfloat16; and the weight's."""
    dx, dx_rounded, dweights = torch.empty_like(x), torch.empty_like(dy), x.new_empty(PARTS, x.size(1))
    call_llama("norm_backward", dy, x, weight, scales, passed, dx, dx_rounded, dweights, *x.shape)
    return dx, dx_rounded, dweights.sum(0)
