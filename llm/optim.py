"""Parameter groups and the optimizer: AdamW (Loshchilov & Hutter 2019), fused where PyTorch has it."""

from typing import Any

import torch
from torch import Tensor, nn

from llm.config import TrainConfig
from llm.errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float, split: bool) -> list[dict[str, Any]]:
    """One group, or with `split` two: norms, biases and embeddings go without weight decay.

    An output matrix tied to the embedding counts as the embedding.
    """
    if not split:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters, as the config says; its learning rate is set at every step."""
    groups = parameter_groups(model, config.weight_decay, config.weight_decay_split)
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "exp_avg.h.0.ln_1.weight" and so on; for a checkpoint."""
    return {
        f"{kind}.{name}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back. Raises UserError where they are not this model's."""
    parameters = dict(model.named_parameters())
    kinds = {key.partition(".")[0] for key in tensors}  # none at all: no update was made yet
    if absent := {f"{kind}.{name}" for kind in kinds for name in parameters} - tensors.keys():
        raise UserError(f"saved state: no optimizer entry {min(absent)}; it belongs to another run")
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters or value.shape != (() if kind == "step" else parameters[name].shape):
            raise UserError(f"saved state: optimizer entry {key} does not fit the model; it belongs to another run")
        p = parameters[name]
        optimizer.state[p][kind] = value.to(p.device, copy=True)
