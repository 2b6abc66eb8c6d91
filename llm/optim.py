"""Parameter groups, the optimizer (AdamW: Loshchilov & Hutter 2019; or Muon and AdamW) and gradient clipping."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm.config import TrainConfig
from llm.machine.world import full_tensor
from llm.muon import Muon, hidden_matrices


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, without the wrappers that keep torch.compile out of it: they import all of the compiler.

    That takes a second at the start of a run. Nothing here compiles the optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    _fused_step = inspect.unwrap(torch.optim.AdamW.step)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            # PyTorch itself does not wait for this copy. With cpu_offload it is one to the CPU, which reads it at once.
            self.found_inf = found_inf.to(next(iter(self.state)).device)
            if not kernel_reads_found_inf(self.found_inf.device):
                if self.found_inf.item():
                    return
                del self.found_inf  # some of these versions raise an error for it
        self._fused_step()


def kernel_reads_found_inf(device: torch.device) -> bool:
    """Return whether PyTorch's fused kernel leaves the weights as they are if `found_inf` is not 0.

    On MPS it does from PyTorch 2.13 on (https://github.com/pytorch/pytorch/pull/186360).
    """
    return device.type != "mps" or torch.__version__ >= "2.13"  # it compares as a version, not as a text


def parameter_groups(
    model: nn.Module, weight_decay: float, split: bool, without: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return one group, or with `split` two: norms, biases and embeddings get no weight decay.

    An output matrix tied to the embedding counts as the embedding. The parameters `without` are left out. A step
    multiplies the schedule's learning rate by a group's `lr_ratio`.
    """
    absent = {id(p) for p in without}
    parameters = [p for p in model.parameters() if id(p) not in absent]
    if not split:
        return [{"params": parameters, "weight_decay": weight_decay, "lr_ratio": 1.0}]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in parameters if p.dim() < 2 or id(p) in embeddings]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_ratio": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32) -> AdamW | Muon:
    """Return the optimizer of the settings: AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    The training loop sets its learning rate at every step. `dtype`: precision of the run's matrix products.
    If its attribute `found_inf` (one float32) is not 0, a step leaves weights and state as they are.
    """
    matrices = hidden_matrices(model) if config.optimizer == "muon" else {}
    groups = parameter_groups(model, config.weight_decay, config.weight_decay_split, matrices)
    optimizer = AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
    for p in model.parameters():  # now: a resume copies into them, and later they would fill gaps in a step
        if p not in matrices:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p.detach()),
                "exp_avg_sq": torch.zeros_like(p.detach()),
            }
    if not matrices:
        return optimizer
    ratio = config.muon_lr / config.max_lr
    group = {"lr": config.muon_lr, "lr_ratio": ratio, "weight_decay": config.weight_decay}
    return Muon(optimizer, matrices, group | {"muon_momentum": config.muon_momentum}, dtype)


def clip_gradients(model: nn.Module, grad_clip: float) -> Tensor:
    """Clip the gradients to a total norm of `grad_clip`, if it is above 0; return the norm before clipping."""
    norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    is_within = norm.device.type == "cpu" and bool(grad_clip / (norm + 1e-6) >= 1)  # then PyTorch would multiply by 1
    if grad_clip > 0 and not is_within:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    return norm
