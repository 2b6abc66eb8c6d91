"""Parameter groups, the optimizer (AdamW: Loshchilov & Hutter 2019) and gradient clipping."""

from typing import Any

import torch
from torch import Tensor, nn

from llm.config import TrainConfig
from llm.machine.world import full_tensor


def parameter_groups(model: nn.Module, weight_decay: float, split: bool) -> list[dict[str, Any]]:
    """Return one group, or with `split` two: norms, biases and embeddings get no weight decay.

    An output matrix tied to the embedding counts as the embedding.
    """
    if not split:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters. The training loop sets its learning rate at every step.

    If its attribute `found_inf` (one float32) is not 0, the fused kernel leaves weights and moments as they are.
    """
    groups = parameter_groups(model, config.weight_decay, config.weight_decay_split)
    optimizer = torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
    for p in model.parameters():  # now, so that the moments are not allocated between the buffers of the first steps
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p.detach()),
            "exp_avg_sq": torch.zeros_like(p.detach()),
        }
    return optimizer


def clip_gradients(model: nn.Module, grad_clip: float) -> Tensor:
    """Clip the gradients to a total norm of `grad_clip`, if it is above 0; return the norm before clipping."""
    norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    return norm
