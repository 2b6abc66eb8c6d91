"""GPT-2's block as one autograd function: what is its own of a fused block (see fused_block.py).

Shapes as in fused_block.py, with F = the width of the feed-forward layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.machine import kernel
from llm.machine.fused_block import PARTS, Drops, Sizes, attend, attend_backward, call

FILE = "block_gpt2.c"
call_gpt2 = partial(kernel.call, FILE)


def fused_gpt2(x: Tensor, sizes: Sizes, drops: Drops | None, by_tanh: bool, *weights: Tensor | None) -> Tensor:
    """Return a block's output (B, T, C) for its input x (B, T, C).

    weights: each a matrix or vector and its bias, of ln_1, c_attn, attention's c_proj, ln_2, c_fc and the feed-forward
    layer's c_proj. The biases of c_attn and of attention's c_proj are None if the model has none.
    """
    return _Block.apply(x, sizes, drops, by_tanh, *weights)  # type: ignore[no-any-return, no-untyped-call]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, drops: Drops | None, by_tanh: bool, *weights: Tensor) -> Tensor:
        ln_1, ln_1_bias, c_attn, c_attn_bias, attn_proj, attn_proj_bias = weights[:6]
        ln_2, ln_2_bias, c_fc, c_fc_bias, mlp_proj, mlp_proj_bias = weights[6:]
        B, T, H, _, D, eps = sizes
        x = x.contiguous().view(B * T, -1)
        c_attn, attn_proj, c_fc, mlp_proj = (w.to(torch.bfloat16) for w in (c_attn, attn_proj, c_fc, mlp_proj))
        # attention
        _, y_1, scales_1 = _norm(x, None, ln_1, ln_1_bias, eps)
        joined = _linear(y_1, c_attn, c_attn_bias)
        heads = torch.empty_like(joined).view(-1)
        heads.view(3, B, H, T, D).copy_(joined.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4))
        merged, attention = attend(heads, sizes, drops)
        added = _linear(merged, attn_proj, attn_proj_bias)
        # the feed-forward layer
        middle, y_2, scales_2 = _norm(x, drops(1, added) if drops else added, ln_2, ln_2_bias, eps)
        slopes = y_2 @ c_fc.t()
        hidden = torch.empty_like(slopes)
        call_gpt2("gelu", slopes, c_fc_bias, hidden, int(by_tanh), *slopes.shape)
        added, out = _linear(hidden, mlp_proj, mlp_proj_bias), torch.empty_like(x)
        call("add", middle, drops(2, added) if drops else added, out, x.numel())
        ctx.sizes, ctx.drops, ctx.has_bias = sizes, drops, c_attn_bias is not None
        ctx.save_for_backward(
            *(x, y_1, scales_1, heads, attention, merged, middle, y_2, scales_2, slopes, hidden),
            *(ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj),
        )
        return out.view(B, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second time
        x, y_1, scales_1, heads, attention, merged, middle, y_2, scales_2, slopes, hidden = saved[:11]
        ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj = saved[11:]
        (B, T, H, _, D, _), drops, C, F = ctx.sizes, ctx.drops, x.size(1), hidden.size(1)
        sums = x.new_empty(PARTS, 9 * C + F)
        of_ln_1, of_c_attn, of_attn_proj, of_ln_2, of_c_fc, of_mlp_proj = sums.split([2 * C, 3 * C, C, 2 * C, F, C], 1)
        # the feed-forward layer
        dout = dout.contiguous().view(B * T, C)
        dadded = torch.empty_like(y_2)
        call("round_all", dout, dadded, dout.numel())
        if drops:
            drops(2, dadded)
        call_gpt2("sum_rows", dadded, of_mlp_proj, *_sizes(of_mlp_proj, dadded))
        dmlp_proj, dhidden = dadded.t() @ hidden, dadded @ mlp_proj
        call_gpt2("gelu_backward", dhidden, slopes, of_c_fc, *_sizes(of_c_fc, dhidden))
        dc_fc = dhidden.t() @ y_2
        dmiddle, dadded = _norm_backward(dhidden @ c_fc, middle, ln_2, scales_2, dout, of_ln_2)
        # attention
        if drops:
            drops(1, dadded)
        if ctx.has_bias:
            call_gpt2("sum_rows", dadded, of_attn_proj, *_sizes(of_attn_proj, dadded))
        dattn_proj = dadded.t() @ merged
        dheads = attend_backward(dadded @ attn_proj, heads, attention, ctx.sizes, drops)
        djoined = x.new_empty(B * T, 3 * C, dtype=torch.bfloat16)
        djoined.view(B, T, 3, H, D).copy_(dheads.view(3, B, H, T, D).permute(1, 3, 0, 2, 4))
        if ctx.has_bias:
            call_gpt2("sum_rows", djoined, of_c_attn, *_sizes(of_c_attn, djoined))
        dc_attn = djoined.t() @ y_1
        dx, _ = _norm_backward(djoined @ c_attn, x, ln_1, scales_1, dmiddle, of_ln_1)
        vectors = sums.sum(0).split([C, C, 3 * C, C, C, C, F, C])
        dln_1, dln_1_bias, dc_attn_bias, dattn_proj_bias, dln_2, dln_2_bias, dc_fc_bias, dmlp_proj_bias = vectors
        if not ctx.has_bias:
            dc_attn_bias = dattn_proj_bias = None
        of_attention = (dln_1, dln_1_bias, dc_attn.float(), dc_attn_bias, dattn_proj.float(), dattn_proj_bias)
        of_mlp = (dln_2, dln_2_bias, dc_fc.float(), dc_fc_bias, dmlp_proj.float(), dmlp_proj_bias)
        return dx.view(B, T, C), None, None, None, *of_attention, *of_mlp


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias.to(torch.bfloat16), x, weight.t())


def _norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + added (N, C), its LayerNorm in bfloat16, and the mean and the scale of each row (N, 2)."""
    total = x if added is None else torch.empty_like(x)
    y, scales = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x), 2)
    call_gpt2("layer_norm", x, added, total, weight, bias, y, scales, eps, *x.shape)
    return total, y, scales


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor, passed: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, `passed` and what comes through the norm, and the same in bfloat16; write `sums`."""
    dx, dx_rounded = torch.empty_like(x), torch.empty_like(dy)
    call_gpt2("layer_norm_backward", dy, x, weight, scales, passed, dx, dx_rounded, sums, *_sizes(sums, x))
    return dx, dx_rounded


def _sizes(sums: Tensor, d: Tensor) -> tuple[int, int, int]:
    """Return what a function of block_gpt2.c expects: the stride from part to part of `sums`, and the shape of d."""
    return sums.stride(0), d.size(0), d.size(1)
