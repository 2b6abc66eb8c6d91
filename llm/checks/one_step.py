"""One update of a tiny model, on the CPU and on the device: equal but for rounding."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
from llm.checks.check import Check

LOSS_TOLERANCE = 1e-4  # nats per token


GRADIENT_TOLERANCE = 1e-3  # of the gradient's length; another order of adding up gives 1e-6


UPDATE_TOLERANCE = 2e-2  # of the update's length: AdamW's first goes by the sign of numbers that may be near 0


@dataclass(frozen=True)
class Outcome:
    """What one update did, in float64 on the CPU; gradient and update are those of all parameters, flat."""

    loss: float  # nats per token
    gradient: "Tensor"
    update: "Tensor"


def one_step(on: "torch.device", dropout: float = 0.0) -> Outcome:
    """The first update of a tiny model on random tokens, in float32; the same everywhere but for rounding.

    float32 in full: TF32, which training uses on CUDA, is not asked for here.
    """
    import numpy as np
    import torch

    from llm.config import from_settings
    from llm.data import TokenData
    from llm.model import GPT
    from llm.optim import make_optimizer
    from llm.train import train_step
    from llm.training.parts import Parts

    shape = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 64, "dropout": dropout}
    config = from_settings(shape | {"batch_size": 8, "max_steps": 10, "warmup_steps": 0, "dtype": "float32"})
    tokens = np.random.default_rng(0).integers(0, 257, 4096).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, 257, True, "random", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GPT(config.model)  # its weights are drawn on the CPU
    before = [p.detach().double() for p in model.parameters()]
    model.to(on).train()
    scaler = torch.amp.GradScaler(on.type, enabled=False)
    optimizer = make_optimizer(model, config)
    parts = Parts(config, model, model, optimizer, scaler, data, None, on, torch.float32)
    loss = train_step(parts, 0).loss.item()
    after = [p.detach().cpu().double() for p in model.parameters()]
    gradient = torch.cat([p.grad.detach().cpu().double().flatten() for p in model.parameters() if p.grad is not None])
    return Outcome(loss, gradient, torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)]))


def differences(expected: Outcome, found: Outcome) -> tuple[float, float, float]:
    """Of the losses (nats per token), and of gradients and updates as shares of the length expected."""

    def apart(a: "Tensor", b: "Tensor") -> float:
        return float((a - b).norm() / a.norm()) if a.shape == b.shape else float("inf")

    loss = abs(expected.loss - found.loss)
    return loss, apart(expected.gradient, found.gradient), apart(expected.update, found.update)


def parity() -> Check:
    """One update on the CPU and the same on the device, without and with dropout; on the CPU alone, done twice."""
    import torch

    from llm.machine.device import choose_device

    cpu, other = torch.device("cpu"), choose_device("auto")
    found = [differences(one_step(cpu, share), one_step(other, share)) for share in (0.0, 0.1)]
    worst = torch.tensor(found).amax(0).tolist()  # NaN where any is
    where = f"done twice on the {other}" if other == cpu else f"on {other} and on the cpu"
    words = f"{where}: loss differs by {worst[0]:.1e} nats, gradient by {worst[1]:.1e}, update by {worst[2]:.1e} of it"
    limits = (LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE)
    if all(value <= limit for value, limit in zip(worst, limits, strict=True)):  # false for NaN
        return Check("one step", True, words)
    allowed = ", ".join(f"{limit:g}" for limit in limits)
    remedy = "pip install --force-reinstall torch" if other == cpu else "losscurve train --device cpu"
    return Check("one step", False, f"{words}; at most {allowed} is rounding", remedy)
