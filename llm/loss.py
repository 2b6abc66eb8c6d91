"""Next-token cross-entropy from hidden states and the output matrix, without ever holding all logits.

With a vocabulary of 50,257 the logits of a batch are by far the largest tensor of a training step
(412 MB for 2,048 tokens). They are made here for some rows at a time, in blocks of columns that stay in
the processor's cache, and turned into exponentials at once. Softmax is a row scaling of these, so they are
never divided: the scale goes onto the sums of products instead (as in online softmax, Milakov &
Gimelshein 2018).

N tokens, C channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

ROWS_BYTES = 200 * 2**20  # of the exponentials of one chunk of rows, and
COLUMNS = 2048  # in a block of them: both measured, see docs/decisions.md

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of logits `hidden @ weight.T`.

    hidden (..., C), weight (V, C), targets (...) with ids below V. Products run in the autocast
    precision if one is on, else in that of `hidden`; softmax and loss are fp32 in any case.
    """
    rows = hidden.reshape(-1, hidden.size(-1))
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1))  # type: ignore[no-any-return, no-untyped-call]


def _buffer(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Scratch space that outlives the step: fresh pages would cost more than the arithmetic in them."""
    kept = _buffers.get((device, dtype))
    if kept is None or kept.numel() < size:
        kept = _buffers[device, dtype] = torch.empty(size, device=device, dtype=dtype)
    return kept


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss, and at once its gradients, so that no logit is computed twice."""
        n, vocab = hidden.size(0), weight.size(0)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # summed in fp32, whatever the products' precision
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        chunk = max(1, min(n, ROWS_BYTES // (hidden.element_size() * vocab)))
        blocks = [slice(start, min(start + COLUMNS, vocab)) for start in range(0, vocab, COLUMNS)]
        columns = weight.t().contiguous()  # products of whole rows are faster
        for start in range(0, n, chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            kept = _buffer(len(rows) * (vocab if wants_weight else COLUMNS), hidden.device, hidden.dtype)
            top, norm = rows.new_full((len(rows), 1), -torch.inf, dtype=torch.float32), total.new_zeros(len(rows), 1)
            sums = torch.zeros_like(rows, dtype=torch.float32)
            parts = []
            for block in blocks:
                at, width = block.start if wants_weight else 0, block.stop - block.start
                logits = kept[len(rows) * at : len(rows) * (at + width)].view(len(rows), width)
                torch.mm(rows, columns[:, block], out=logits)
                # each block has its own shift, its largest logit: safe for logits of any size
                shift = logits.amax(1, keepdim=True)
                exponentials = logits.sub_(shift).exp_()
                parts.append((block, exponentials, shift.float()))
                higher = torch.maximum(top, shift.float())
                before, now = (top - higher).exp_(), (shift - higher).exp_()
                norm = norm * before + exponentials.sum(1, keepdim=True, dtype=torch.float32) * now
                if wants_hidden:
                    sums = sums.mul_(before).add_(torch.mm(exponentials, weight[block]) * now)
                top = higher
            ours = weight[wanted].float()
            hit = (rows.float() * ours).sum(1, keepdim=True)
            total += (top + norm.log() - hit).sum()
            if grad_hidden is not None:
                torch.sub(sums / norm, ours, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                for block, exponentials, shift in parts:
                    scaled = (rows * ((shift - top).exp_() / norm)).to(rows.dtype)
                    if rows.dtype == torch.float32:
                        grad_weight[block].addmm_(exponentials.t(), scaled)
                    else:
                        grad_weight[block] += torch.mm(exponentials.t(), scaled)
                grad_weight.index_add_(0, wanted, rows.float(), alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.n = n
        return total / n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad / ctx.n
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * scale).to(ctx.dtypes[1]),
            None,
        )
