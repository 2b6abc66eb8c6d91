"""Parameter groups and the optimizer: AdamW (Loshchilov & Hutter 2019)."""

from typing import Any

import torch
from torch import Tensor, nn

from llm.config import TrainConfig

EPS = 1e-8  # added to the root of the second moment


class AdamW:
    """What `torch.optim.AdamW(fused=True)` computes, by the same kernel, with `param_groups` and `state` as there.

    Not that class itself, since torch.optim loads the compiler: a second and 70 MB at every start. Memory is taken
    at once, so that it does not settle between the buffers of the first steps. Where `found_inf` (one float32) is
    not 0, a step leaves everything as it was.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p in (p for group in groups for p in group["params"]):
            moments = {kind: torch.zeros_like(p.detach()) for kind in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.found_inf: Tensor | None = None

    def zero_grad(self) -> None:
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps, mean, square = ([self.state[p][kind] for p in params] for kind in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                *(params, [p.grad for p in params], mean, square, [], steps),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=EPS,
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))


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


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over the model's parameters, as the config says; its learning rate is set at every step."""
    groups = parameter_groups(model, config.weight_decay, config.weight_decay_split)
    return AdamW(groups, config.max_lr, (config.beta1, config.beta2))
