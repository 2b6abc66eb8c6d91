"""Compare one update of tiny models on the CPU and on the device: they may differ by rounding only."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.checks.check import Check
from llm.errors import Failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm.arch import Model
    from llm.config import GPTConfig

SHAPES: dict[str, dict[str, Any]] = {  # one of each architecture; a llama's heads share their keys and values
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 64},
    "llama": {"n_layer": 2, "n_head": 2, "n_embd": 64, "arch": "llama", "n_kv_head": 1},
}

LOSS_TOLERANCE = 1e-4  # nats per token

GRADIENT_TOLERANCE = 1e-3  # of the gradient's norm; another order of summation gives 1e-6

# of the update's norm; AdamW's first update follows the sign of each gradient, which may be near 0
UPDATE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Outcome:
    """The result of one update, in float64 on the CPU. Gradient and update are flat, over all parameters."""

    loss: float  # nats per token
    gradient: "Tensor"
    update: "Tensor"


def one_step(
    device: "torch.device", arch: str = "gpt2", dropout: float = 0.0, dtype: str = "float32", compiles: bool = False
) -> Outcome:
    """Run the first update of a tiny model on random tokens; in float32 equal on all devices except for rounding.

    TF32, which training uses on CUDA, is off here. The update is AdamW's: Muon's iteration runs in bfloat16 on CUDA.
    Raises Failure if it `compiles` and torch.compile does not work.
    """
    import numpy as np
    import torch

    from llm.config import from_settings
    from llm.data import TokenData
    from llm.machine.device import DTYPES
    from llm.optim import make_optimizer
    from llm.start.build import compile_forward
    from llm.train import train_step
    from llm.training.parts import Parts

    recipe = {"batch_size": 8, "max_steps": 10, "warmup_steps": 0, "dtype": dtype}
    config = from_settings({"vocab_size": 257, "block_size": 32, "dropout": dropout} | SHAPES[arch] | recipe)
    tokens = np.random.default_rng(0).integers(0, 257, 4096).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, 257, True, "random", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = tiny_model(config.model)  # weights are drawn on the CPU, so every device starts from the same
    before = [p.detach().double() for p in model.parameters()]
    model.to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    optimizer = make_optimizer(model, config)
    parts = Parts(config, model, model, optimizer, scaler, data, None, device, DTYPES[dtype])
    if compiles:
        compile_forward(parts, _refuse)
    loss = train_step(parts, 0).loss.item()
    after = [p.detach().cpu().double() for p in model.parameters()]
    gradients = [p.grad.detach().cpu().double().flatten() for p in model.parameters() if p.grad is not None]
    updates = [(new - old).flatten() for old, new in zip(before, after, strict=True)]
    return Outcome(loss, torch.cat(gradients), torch.cat(updates))


def _refuse(reason: str) -> None:
    raise Failure(reason)


def tiny_model(config: "GPTConfig") -> "Model":
    """Return a new model without a matrix of zeros: behind a llama's, all gradients of the first step would be 0."""
    import torch

    from llm.arch import make_model

    model = make_model(config)
    for p in model.parameters():
        if p.dim() == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


def differences(expected: Outcome, found: Outcome) -> tuple[float, float, float]:
    """Return the differences of loss, gradient and update.

    The loss differs in nats per token; gradient and update as shares of the expected norm.
    """

    def relative(a: "Tensor", b: "Tensor") -> float:
        if a.shape != b.shape:
            return float("inf")
        return float((a - b).norm() / a.norm())

    loss = abs(expected.loss - found.loss)
    return loss, relative(expected.gradient, found.gradient), relative(expected.update, found.update)


def parity() -> Check:
    """Compare one update of each shape on the CPU and on the device, without and with dropout.

    Without a GPU, compare two on the CPU.
    """
    import torch

    from llm.machine.device import choose_device

    cpu = torch.device("cpu")
    device = choose_device("auto")
    limits = torch.tensor([LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE])
    found = {
        arch: torch.tensor(
            [differences(one_step(cpu, arch, dropout), one_step(device, arch, dropout)) for dropout in (0.0, 0.1)]
        ).amax(0)  # propagates NaN
        for arch in SHAPES
    }
    broken = [arch for arch, values in found.items() if not bool((values <= limits).all())]  # NaN is not <=
    loss, gradient, update = torch.stack([found[arch] for arch in broken or found]).amax(0).tolist()
    where = "twice on the cpu" if device == cpu else f"on {device} and on the cpu"
    message = (
        f"{' and '.join(broken or found)} {where}: loss differs by {loss:.1e} nats, gradient by {gradient:.1e}, "
        f"update by {update:.1e} of it"
    )
    if not broken:
        return Check("one step", True, message)
    allowed = f"{LOSS_TOLERANCE:g}, {GRADIENT_TOLERANCE:g}, {UPDATE_TOLERANCE:g}"
    remedy = "pip install --force-reinstall torch" if device == cpu else "losscurve train --device cpu"
    return Check("one step", False, f"{message}; at most {allowed} is rounding", remedy)
