"""Next-token cross-entropy from hidden states and the output matrix, without holding all logits at once.

With a vocabulary of 50,257 the logits of a batch are by far the largest tensor of a training step (412 MB for 2,048
tokens). This module computes them for some rows at a time, in blocks of columns that fit the processor's cache, and
replaces them by their exponentials at once. Softmax only scales each row of exponentials, so they are never divided:
the scale is applied to the sums of products instead (as in online softmax, Milakov & Gimelshein 2018).

N tokens, C channels, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.machine.kernel import exp_sum

ROWS_BYTES = 68 * 2**20  # exponentials of one chunk of rows on a CPU, about; measured, see docs/decisions.md
BLOCK_BYTES = 8192  # one row in a block of columns on a CPU; measured too
GPU_ROWS_BYTES = 2**30  # a chunk on a GPU, where a block is a whole row, because every kernel launch costs time
ROUND = 64  # chunks are multiples of so many rows: other products are slower
SMALL = 256  # vocabulary up to which all logits at once, by plain operations, are faster in bfloat16 on a CPU
HALF_SCALE = 16  # in float16, n is divided out in two parts, this before the product: 1 / (n V) would underflow
TAUGHT_BYTES = 12  # held at once for each logit of a model with a teacher: three matrices in float32
TINY = 1e-6  # probabilities that add up to less than this cannot be told from 0 in float32
SAFE = 60.0  # exp of numbers up to this size, and its sum over a row, stay in the range of float32 and bfloat16


class Taught(NamedTuple):
    """What teachers predict of the tokens that a model learns from: the K most probable ones at each position."""

    ids: Tensor  # (..., K) int64, for the positions of the model's hidden states
    probabilities: Tensor  # (..., K)
    share: float  # of the target that is the teachers'; the rest is the token of the text


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the same as `linear_cross_entropy`, from all logits at once: the reference that tests compare with."""
    logits = hidden @ weight.T
    return F.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
    )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, taught: Taught | None = None) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of the logits `hidden @ weight.T`.

    hidden (..., C), weight (V, C), targets (...) with ids below V. Products run in the autocast precision if autocast
    is on, else in that of `hidden`; softmax and loss are always float32.

    With `taught`, the value is the same, and the gradient is that of the cross-entropy with (1 - share) times the
    targets plus share times what the teachers predict (distillation, Hinton et al. 2015, at temperature 1). So losses
    with and without teachers compare. What the K probabilities leave to all other tokens is divided among those as the
    model itself divides it: of them the gradient corrects the sum alone.
    """
    rows, kind = hidden.reshape(-1, hidden.size(-1)), hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if taught is not None:
        return _TaughtCrossEntropy.apply(rows, weight, targets.reshape(-1), dtype, taught)  # type: ignore[no-any-return, no-untyped-call]
    if kind == "cpu" and dtype == torch.bfloat16 and len(weight) <= SMALL:
        return plain_cross_entropy(rows, weight, targets)
    if not torch.is_grad_enabled():  # autograd.Function does not see no_grad(); detach, or it computes gradients anyway
        rows, weight = rows.detach(), weight.detach()
    return _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1), dtype)  # type: ignore[no-any-return, no-untyped-call]


def chunk_rows(n: int, vocab_size: int, size: int, on_cpu: bool) -> int:
    """Return how many of n rows make one chunk, for logits of `size` bytes each. All chunks are about as large."""
    most = max(1, (ROWS_BYTES if on_cpu else GPU_ROWS_BYTES) // (vocab_size * size))
    rows = math.ceil(n / math.ceil(n / most))
    return rows if rows < ROUND else math.ceil(rows / ROUND) * ROUND


def _safe_shift(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Return a shift (N, 1) in fp32 for each row of logits: minus the shift, none is above SAFE, the largest not below
    -SAFE. Return None if no shift is certain before the logits are computed.

    A logit is at most the product of the norms of its two vectors, and the largest of a row is at least the row's mean.
    """
    lengths, longest = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (hidden, weight))
    highest = lengths * longest.max()
    shift: Tensor = (highest - SAFE).clamp(min=0)
    if highest.max() > SAFE:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if not (mean - shift >= -SAFE).all():
            return None
    return shift[:, None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the loss and its gradients together, so that no logit is computed twice."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.asked = dtype, *ctx.needs_input_grad[:2]
        loss, *ctx.found = _loss_and_gradients(hidden, weight, targets, *ctx.asked)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # handed over, so that they become `.grad` without a copy; a second backward computes them again
        found, ctx.found = ctx.found or _loss_and_gradients(*ctx.saved_tensors, *ctx.asked)[1:], None
        if grad.device.type != "cpu" or grad.item() != 1:  # usually it is 1, which saves a pass over 26 MB
            found = [g if g is None else g.mul_(grad) for g in found]
        return *found, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, vocab, dtypes = hidden.size(0), weight.size(0), (hidden.dtype, weight.dtype)
    on_cpu = hidden.device.type == "cpu"
    # on other devices this would wait for the result; float16 overflows beyond exp(11)
    safe = _safe_shift(hidden, weight) if on_cpu and dtype != torch.float16 else None
    hidden = hidden.to(dtype)
    # summed in fp32, whatever the products' precision
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants_hidden else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
    total = hidden.new_zeros((), dtype=torch.float32)
    chunk, wide = chunk_rows(n, vocab, dtype.itemsize, on_cpu), BLOCK_BYTES // dtype.itemsize if on_cpu else vocab
    upright = on_cpu and dtype == torch.float32  # logits by columns, which is faster for the products there
    blocks = [slice(start, min(start + wide, vocab)) for start in range(0, vocab, wide)]
    for start in range(0, n, chunk):
        rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
        known = safe[start : start + chunk] if safe is not None else None
        top = known if known is not None else total.new_full((len(rows), 1), -torch.inf)
        norm = total.new_zeros(len(rows), 1)
        sums = torch.zeros_like(rows, dtype=torch.float32)
        parts = []
        for block in blocks:
            columns = weight[block].to(dtype)
            # the allocator reuses this memory (device.keep_memory), also for the gradients of the other layers
            logits = torch.mm(columns, rows.t()).t() if upright else torch.mm(rows, columns.t())
            part, shift = exp_sum(logits, known)
            if wants_weight:
                parts.append((block, logits, shift))
            if shift is known:
                norm += part
                if wants_hidden:
                    sums += torch.mm(logits, columns)  # not `addmm_`, which would round once for each column
            else:  # each block is shifted by its own largest logit: safe for logits of any size
                higher = torch.maximum(top, shift)
                before, now = (top - higher).exp(), (shift - higher).exp()
                norm, top = norm * before + part * now, higher
                if wants_hidden:
                    sums = sums * before + torch.mm(logits, columns) * now
        ours = weight[wanted].to(dtype).float()
        total += (top + norm.log() - (rows.float() * ours).sum(1, keepdim=True)).sum()
        if grad_hidden is not None:
            torch.sub(sums / norm, ours, out=grad_hidden[start : start + chunk]).div_(n)
        if grad_weight is not None:
            # float16 has no numbers as small as 1 / (n V), and none above 65,504
            early = HALF_SCALE if dtype == torch.float16 else n
            norm *= early
            scaled = (rows / norm).to(dtype)
            for block, exponentials, shift in parts:
                if shift is not known:
                    scaled = (rows * ((shift - top).exp() / norm)).to(dtype)
                if dtype == torch.float32:
                    grad_weight[block].addmm_(exponentials.t(), scaled, beta=1 if start else 0)
                else:
                    product = torch.mm(exponentials.t(), scaled)
                    product = product if early == n else product.float() * (early / n)
                    (grad_weight[block].add_ if start else grad_weight[block].copy_)(product)
            grad_weight.index_add_(0, wanted, rows.float(), alpha=-1 / n)
    found = [g if g is None else g.to(kind) for g, kind in zip((grad_hidden, grad_weight), dtypes, strict=True)]
    return total / n, found[0], found[1]


class _TaughtCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        taught: Taught,
    ) -> Tensor:
        """Compute the loss and its gradients together, for some rows at a time."""
        n, ours, share = len(hidden), weight.to(dtype), taught.share
        known, probable = (part.reshape(n, -1) for part in taught[:2])
        exact = torch.float32 if dtype == torch.float16 else dtype  # sums over many rows pass float16's 65,504
        chunk = chunk_rows(n, len(weight), TAUGHT_BYTES, hidden.device.type == "cpu")
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen here
            for start in range(0, n, chunk):
                part = slice(start, start + chunk)
                rows, wanted = hidden[part].to(dtype), targets[part, None]
                predicted = torch.log_softmax((rows @ ours.t()).float(), 1)
                total -= predicted.gather(1, wanted).sum()
                slope = predicted.exp_()  # by the logits: what the model predicts, minus the target
                theirs, same = probable[part], slope.gather(1, known[part])  # both of the K tokens
                rest, our_rest = ((1 - p.sum(1, keepdim=True)).clamp_(min=TINY) for p in (theirs, same))
                scale = rest / our_rest
                slope *= 1 - share * scale
                slope.scatter_add_(1, known[part], share * (scale * same - theirs))
                slope.scatter_add_(1, wanted, slope.new_full((len(rows), 1), share - 1))
                slope = slope.to(exact)
                grad_hidden[part] = slope @ ours.to(exact)
                grad_weight += slope.t() @ rows.to(exact)
        ctx.found = grad_hidden.div_(n).to(hidden.dtype), grad_weight.div_(n).to(weight.dtype)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(g * grad for g in ctx.found), None, None, None
