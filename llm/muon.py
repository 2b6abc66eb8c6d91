"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks.

Muon replaces the momentum of a matrix by the nearest (semi-)orthogonal matrix: an update then changes all directions
of the matrix by about the same amount, not mostly the few that dominate the gradient. After it, all vectors along the
longer side get one length, so that no neuron is changed more than another (Li et al. 2025, "NorMuon", here without its
mean over the steps).
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from llm.machine.world import collective_device, gather_shards, local_shard, take_shard

# (a, b, c) of the three iterations. Together they bring singular values from 0.0075 to 1 as near to 1 as three can
# (Amsel et al. 2025, "Polar Express"). Jordan repeats one triple five times; see docs/decisions.md, "The optimizer".
COEFFICIENTS = ((8.1948, -24.0205, 17.7642), (3.7690, -2.8171, 0.5474), (2.8758, -2.1496, 0.4718))
MARGIN = 1.02  # the iteration diverges above 1, and bfloat16 rounds a norm
EPS = 1e-7  # smallest norm that a matrix is divided by
BATCH = 2**27  # numbers that one batch of products holds: 134 M parameters, or a single larger matrix


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Return the matrices of the blocks, each with the rows of the matrices that are stacked in it.

    Queries, keys and values are one parameter (`attn.c_attn`), and so are gate and up of a gated feed-forward layer
    (`mlp.c_fc`). Muon must orthogonalise each of them apart. The output projections give their widths: `attn.c_proj`
    has a column for each row of the queries, `mlp.c_proj` one for each row of the gate.
    """
    found: dict[nn.Parameter, list[int]] = {}
    for block in model.h:  # type: ignore[union-attr]
        for p in block.parameters():
            if p.dim() == 2:
                found[p] = [p.size(0)]
        c_attn, c_fc = block.attn.c_attn.weight, block.mlp.c_fc.weight
        queries, hidden = block.attn.c_proj.weight.size(1), block.mlp.c_proj.weight.size(1)
        found[c_attn] = [queries] + 2 * [(c_attn.size(0) - queries) // 2]
        found[c_fc] = [hidden] * (c_fc.size(0) // hidden)
    return found


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns), rows <= columns, whose singular values are near 1.

    They keep their singular vectors. Each iteration turns a singular value s into a s + b s^3 + c s^5. Those above
    0.0077 of the matrix's Frobenius norm end between 0.63 and 1.37.
    """
    x: Tensor = matrices / (MARGIN * torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)).clamp(min=EPS)
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def balanced(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns), rows <= columns, with columns of one length. Their norms stay.

    The rows of an orthogonal matrix have one length; its columns, which are more, need not have one.
    """
    lengths = torch.linalg.vector_norm(matrices, dim=1, keepdim=True, dtype=torch.float32)
    factors: Tensor = lengths.square().mean(2, keepdim=True).sqrt() / lengths.clamp(min=EPS)
    return matrices * factors.to(matrices.dtype)


def orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize and balance matrices of any shapes. Those of one shape, or its transpose, are one batch.

    Of a square matrix, the rows get one length.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    found = list(matrices)
    for numbers in by_shape.values():
        is_tall = {number: matrices[number].size(0) >= matrices[number].size(1) for number in numbers}
        wide = balanced(orthogonalize(torch.stack([matrices[n].mT if is_tall[n] else matrices[n] for n in numbers])))
        for n, matrix in zip(numbers, wide, strict=True):
            found[n] = matrix.mT if is_tall[n] else matrix
    return found


def scaled(matrix: Tensor) -> Tensor:
    """Return an orthogonal matrix times sqrt(max(1, rows / columns))."""
    rows, columns = matrix.shape
    return matrix * math.sqrt(rows / columns) if rows > columns else matrix


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices of a model, and the given AdamW for its other parameters: one optimizer.

    The learning rate is the size of an update: as in Jordan's implementation, the root mean square of the elements of
    a change is about lr / sqrt(columns), whatever the shape. Its spectral norm is about lr * sqrt(max(1, rows /
    columns)), or a little more since the vectors along the longer side have one length. Weight decay is decoupled: a
    step first multiplies a matrix by 1 - lr * weight_decay.

    If the attribute `found_inf` (one float32) is not 0, a step leaves weights and momentum as they are, as the fused
    AdamW does. Gradients must be unscaled before the step.
    """

    _step_supports_amp_scaling = True  # GradScaler passes found_inf, and does not wait for it
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)  # as in optim.AdamW
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        matrices: dict[nn.Parameter, list[int]],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Add to the groups of `adamw` one of `matrices` (with the rows of each stacked one) and settings `group`.

        `dtype` is the precision of the run's products. On CUDA the iteration takes bfloat16 in any case; Jordan
        found it precise enough.
        """
        super().__init__([*adamw.param_groups, {"params": list(matrices), **group}], {})
        self.adamw = adamw
        self.state = adamw.state
        self.rows = matrices
        self.batches: list[list[nn.Parameter]] = [[]]
        for p in matrices:
            self.state[p] = {"momentum": torch.zeros_like(p.detach())}
            if sum(q.numel() for q in self.batches[-1]) + p.numel() > BATCH and self.batches[-1]:
                self.batches.append([])
            self.batches[-1].append(p)
        is_cuda = collective_device(next(iter(matrices))).type == "cuda"
        self.dtype = torch.bfloat16 if is_cuda or dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients."""
        found_inf = getattr(self, "found_inf", None)
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        device = self.batches[0][0].device
        is_refused = torch.zeros((), device=device) if found_inf is None else found_inf.to(device)
        for batch in self.batches:
            self._update(batch, is_refused != 0)

    def _update(self, batch: list[nn.Parameter], is_refused: Tensor) -> None:
        group = self.param_groups[-1]
        updates = [self._nesterov(p, group["muon_momentum"], is_refused) for p in batch]
        pieces = [
            piece for p, update in zip(batch, updates, strict=True) for piece in torch.split(update, self.rows[p])
        ]
        del updates
        orthogonal = (scaled(matrix) for matrix in orthogonalize_all(pieces))
        lr = torch.where(is_refused, 0.0, group["lr"])
        for p in batch:
            update = take_shard(torch.cat([next(orthogonal) for _ in self.rows[p]]), p)
            weight = local_shard(p)
            weight.mul_(1 - lr * group["weight_decay"])
            weight.addcmul_(update, lr, value=-1)

    def _nesterov(self, p: nn.Parameter, momentum: float, is_refused: Tensor) -> Tensor:
        """Update the momentum of `p`; return the whole matrix that follows from it, in the precision of the iteration.

        A refused gradient is replaced by the momentum, which then stays as it is.
        """
        assert p.grad is not None
        buffer = local_shard(self.state[p]["momentum"])
        gradient = torch.where(is_refused, buffer, local_shard(p.grad))
        buffer.lerp_(gradient, 1 - momentum)
        return gather_shards(gradient.lerp_(buffer, momentum).to(self.dtype), p)
