"""A llama's block as one autograd function, for bfloat16 on a CPU: matrix products, and C between them.

It computes what `llama.Block` computes, which is its reference in the tests and takes its place everywhere else. It
saves autograd's work for 60 small operations, their passes over the memory, and copies from one layout to another.

Shapes as in llama.py, with N = B T tokens and G = H / K heads of queries to a head of keys. A d before a name means its
gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.machine.kernel import call, load_block_kernel

PARTS = 16  # partial sums of the gradient of a norm's weight, as in block.c
LONGEST = 1024  # positions up to which a matrix (T, T) of each head is faster than fused attention


class Sizes(NamedTuple):
    """The sizes of a block and its input."""

    B: int
    T: int
    H: int
    K: int
    D: int
    eps: float  # of the norms

    def heads_of(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B K, G T, D), keys and values (B K, T, D): the parts of what `split_heads` writes."""
        B, T, H, K, D, _ = self
        q, k, v = torch.split(heads, [B * H * T * D, B * K * T * D, B * K * T * D])
        return q.view(B * K, -1, D), k.view(B * K, T, D), v.view(B * K, T, D)


class Drops(NamedTuple):
    """Dropout in a block: of the weights of attention, and of the outputs of both layers."""

    keys: Tensor  # (3, B) int32
    threshold: int
    scale: float

    def __call__(self, place: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return x, contiguous and of all windows, with elements dropped; in place, unless there is an `out`."""
        out = x if out is None else out
        windows = self.keys.size(1)
        call("drop", x, out, self.keys[place], self.threshold, self.scale, windows, x.numel() // windows)
        return out


def is_possible(x: Tensor) -> bool:
    """Return whether `fused_block` can compute a block of x (B, T, C): the kernel is for bfloat16 on a CPU.

    torch.compile fuses the plain operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or not 1 < x.size(1) <= LONGEST:
        return False
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return load_block_kernel() is not None


def fused_block(
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
        call("split_heads", joined, heads, qk_norm, qk_scales, cos, sin, eps, B, T, H, K, D)
        q, k, v = sizes.heads_of(heads)
        attention = torch.bmm(q, k.transpose(1, 2))
        call("softmax", attention, D**-0.5, B * H, T)
        kept = drops(0, attention, torch.empty_like(attention)) if drops else attention
        mixed = torch.bmm(kept, v)
        merged = mixed.new_empty(B * T, H * D)
        call("swap_axes", mixed, merged, B, H, T, D)
        added = merged @ attn_proj.t()
        # the feed-forward layer
        middle, y_2, scales_2 = _norm(x, drops(1, added) if drops else added, ln_2, eps)
        gates = y_2 @ c_fc.t()
        hidden = gates.new_empty(B * T, gates.size(1) // 2)
        call("swiglu", gates, hidden, *hidden.shape)
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
        x, y_1, scales_1, joined, qk_scales, heads, attention, merged, middle, y_2, scales_2, gates = ctx.saved_tensors[
            :12
        ]
        cos, sin, ln_1, c_attn, qk_norm, attn_proj, ln_2, c_fc, mlp_proj = ctx.saved_tensors[12:]
        (B, T, H, K, D, _), drops = ctx.sizes, ctx.drops
        # the feed-forward layer
        dout = dout.contiguous().view(B * T, -1)
        dadded = torch.empty_like(y_2)
        call("round_all", dout, dadded, dout.numel())
        if drops:
            drops(2, dadded)
        dhidden = dadded @ mlp_proj
        dgates, hidden = torch.empty_like(gates), torch.empty_like(dhidden)
        call("swiglu_backward", gates, dhidden, dgates, hidden, *hidden.shape)
        dmlp_proj, dc_fc = dadded.t() @ hidden, dgates.t() @ y_2
        dmiddle, dadded, dln_2 = _norm_backward(dgates @ c_fc, middle, ln_2, scales_2, dout)
        # attention
        if drops:
            drops(1, dadded)
        dattn_proj = dadded.t() @ merged
        dmerged = dadded @ attn_proj
        dmixed = torch.empty_like(dmerged).view(B * K, -1, D)
        call("swap_axes", dmerged, dmixed, B, T, H, D)
        q, k, v = ctx.sizes.heads_of(heads)
        dheads = torch.empty_like(heads)
        dq, dk, dv = ctx.sizes.heads_of(dheads)
        kept = drops(0, attention, torch.empty_like(attention)) if drops else attention
        torch.bmm(kept.transpose(1, 2), dmixed, out=dv)
        dattention = torch.bmm(dmixed, v.transpose(1, 2))
        if drops:
            drops(0, dattention)
        call("softmax_backward", attention, dattention, D**-0.5, B * H, T)
        torch.bmm(dattention, k, out=dq)
        torch.bmm(dattention.transpose(1, 2), q, out=dk)
        djoined, dqk_norm = torch.empty_like(joined), x.new_empty(PARTS, 2, D)
        call("split_heads_backward", dheads, joined, djoined, qk_norm, qk_scales, dqk_norm, cos, sin, B, T, H, K, D)
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
    call("norm", x, added, total, weight, y, scales, eps, *x.shape)
    return total, y, scales


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor, passed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x: `passed` and what comes through the norm; the same in bfloat16; and the weight's."""
    dx, dx_rounded, dweights = torch.empty_like(x), torch.empty_like(dy), x.new_empty(PARTS, x.size(1))
    call("norm_backward", dy, x, weight, scales, passed, dx, dx_rounded, dweights, *x.shape)
    return dx, dx_rounded, dweights.sum(0)
