"""Refused batches, whose loss or gradient is not finite: count them, and find the first module that breaks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm.machine.device import precision
from llm.machine.world import ALONE, World, full_tensor
from llm.training.parts import MicroBatch, Parts
from llm.training.state import Progress

FINITE = "nothing: it is finite now"


IN_A_ROW = 3  # refused batches after which a run rolls back


class NotFinite(Exception):
    """A number is not finite. `batches` are the consecutive refused steps; it is empty if a weight is not finite."""

    def __init__(self, reason: str, batches: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.batches = list(batches)


def refused_in_a_row(progress: Progress) -> list[int]:
    """Return the newest steps whose batches were all refused, if there are at least IN_A_ROW, else an empty list."""
    refused = set(progress.refused) - set(progress.skipped)
    first = progress.step
    while first in refused:
        first -= 1
    steps = list(range(first + 1, progress.step + 1))
    return steps if len(steps) >= IN_A_ROW else []


def where_it_breaks(model: nn.Module, loss_of: Callable[[], Tensor], world: World = ALONE) -> str:
    """Return what is first not finite: a weight, the output of a module, the loss or a gradient.

    `loss_of` runs the model on the batch. Gradients are None afterwards. All ranks must call this together, because it
    gathers sharded weights.
    """
    for name, p in model.named_parameters():
        if not torch.isfinite(full_tensor(p.detach())).all():
            return f"weight {name}"
    found: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"output of {name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        loss = loss_of()
    finally:
        for hook in hooks:
            hook.remove()
    broke = found[0] if found else FINITE if torch.isfinite(loss) else "the loss"
    if world.any(broke != FINITE):
        return broke
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    model.zero_grad(set_to_none=True)
    return f"gradient of {broken[-1]}" if broken else FINITE


def describe_batch(parts: Parts, step: int, micro: MicroBatch) -> dict[str, Any]:
    """Return a micro-batch of `step` as JSON: its windows as text, and what is first not finite in it."""

    def loss() -> Tensor:
        with precision(parts.dtype, parts.device):
            return parts.model(micro.x, micro.y, micro.seeds, micro.taught)[1]  # type: ignore[no-any-return]

    first = where_it_breaks(parts.model, loss, parts.world)
    decode = parts.tokenizer.decode if parts.tokenizer else str
    return {"step": step, "first": first, "windows": [decode(ids.tolist()) for ids in micro.x.cpu()]}
