"""Next-token cross-entropy from hidden states and the output matrix, without ever holding all logits.

With a vocabulary of 50,257 the logits of a batch are by far the largest tensor of a training step
(412 MB for 2,048 tokens). They are made here a chunk of rows at a time, in a buffer that is reused:
each chunk becomes its probabilities, and these its share of the gradients, before the next is made.

N tokens, C channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

ROWS_BYTES = 48 * 2**20  # of one chunk of fp32 logits: measured, see docs/decisions.md

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
        """The loss, and at once its gradients, so that no chunk of logits is computed twice."""
        n, vocab = hidden.size(0), weight.size(0)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # summed over chunks in fp32, whatever the products' precision
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        chunk = max(1, min(n, ROWS_BYTES // (4 * vocab)))
        buffer = _buffer(chunk * vocab, hidden.device, hidden.dtype)
        # in fp32 the probabilities overwrite the logits; otherwise they need fp32 room of their own
        softmax_buffer = _buffer(chunk * vocab, hidden.device, torch.float32)
        for start in range(0, n, chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            shape, size = (rows.size(0), vocab), rows.size(0) * vocab
            logits = torch.mm(rows, weight.t(), out=buffer[:size].view(shape))
            # log-sum-exp = max - log(largest probability): exact, and safe for logits of any size
            top, hit = logits.amax(1, keepdim=True).float(), logits.gather(1, wanted).float()
            probabilities = torch.softmax(logits, 1, dtype=torch.float32, out=softmax_buffer[:size].view(shape))
            total += (top - probabilities.amax(1, keepdim=True).log() - hit).sum()
            if not (wants_hidden or wants_weight):
                continue
            probabilities.scatter_add_(1, wanted, torch.full_like(hit, -1.0))
            if logits.dtype != torch.float32:
                logits.copy_(probabilities)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                if logits.dtype == torch.float32:
                    grad_weight.addmm_(logits.t(), rows)
                else:
                    grad_weight += torch.mm(logits.t(), rows)
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
