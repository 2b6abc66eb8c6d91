"""What the fused blocks share: attention, dropout, and when a block may be fused.

A fused block is one autograd function for bfloat16 on a CPU: matrix products, and C between them (`block.c`). It
computes what `Block` of llm/model.py or llm/llama.py computes, which is its reference in the tests and takes its place
everywhere else. It saves autograd's work for dozens of small operations, their passes over the memory, and copies from
one layout to another.

Shapes as in llama.py, with N = B T tokens and G = H / K heads of queries to a head of keys. A d before a name means its
gradient.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llm.machine import kernel

PARTS = 16  # partial sums of the gradient of a vector of weights, as in block.h
LONGEST = 1024  # positions up to which a matrix (T, T) of each head is faster than fused attention

call = partial(kernel.call, "block.c")


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

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Return x, contiguous and of all windows, with elements dropped in place."""
        windows = self.keys.size(1)
        call("drop", x, x, self.keys[place], self.threshold, self.scale, windows, x.numel() // windows)
        return x


def is_possible(x: Tensor, file: str) -> bool:
    """Return whether a block can be fused for its input x (B, T, C): the kernels are for bfloat16 on a CPU.

    `file`: the C file of this kind of block. torch.compile fuses the plain operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or not 1 < x.size(1) <= LONGEST:
        return False
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return can_compile(file)


def can_compile(file: str) -> bool:
    """Return whether the C code of a kind of block can be compiled here."""
    return all(kernel.load_block_kernel(name) is not None for name in ("block.c", file))


def attend(heads: Tensor, sizes: Sizes, drops: Drops | None) -> tuple[Tensor, Tensor]:
    """Return causal attention (N, H D) of `heads`, laid out as in `Sizes.heads_of`, and its weights (B K, G T, T).

    The weights are those before dropout, for `attend_backward`.
    """
    B, T, H, _, D, _ = sizes
    q, k, v = sizes.heads_of(heads)
    weights = torch.bmm(q, k.transpose(1, 2))
    kept, keys, threshold, scale = _of_attention(drops, weights)
    call("softmax", weights, kept, keys, threshold, scale, D**-0.5, B, H * T, T)
    mixed = torch.bmm(weights if kept is None else kept, v)
    merged = mixed.new_empty(B * T, H * D)
    call("swap_axes", mixed, merged, B, H, T, D)
    return merged, weights


def attend_backward(dmerged: Tensor, heads: Tensor, weights: Tensor, sizes: Sizes, drops: Drops | None) -> Tensor:
    """Return the gradient of `heads`, laid out like them."""
    B, T, H, K, D, _ = sizes
    dmixed = torch.empty_like(dmerged).view(B * K, -1, D)
    call("swap_axes", dmerged, dmixed, B, T, H, D)
    q, k, v = sizes.heads_of(heads)
    dheads = torch.empty_like(heads)
    dq, dk, dv = sizes.heads_of(dheads)
    dweights = torch.bmm(dmixed, v.transpose(1, 2))
    kept, keys, threshold, scale = _of_attention(drops, weights)
    call("softmax_backward", weights, dweights, kept, keys, threshold, scale, D**-0.5, B, H * T, T)
    torch.bmm((weights if kept is None else kept).transpose(1, 2), dmixed, out=dv)
    torch.bmm(dweights, k, out=dq)
    torch.bmm(dweights.transpose(1, 2), q, out=dk)
    return dheads


def _of_attention(drops: Drops | None, weights: Tensor) -> tuple[Tensor | None, Tensor | None, int, float]:
    """Return a tensor for the weights after dropout, the keys of the windows, threshold and scale; None without it."""
    if drops is None:
        return None, None, 0, 1.0
    return torch.empty_like(weights), drops.keys[0], drops.threshold, drops.scale
