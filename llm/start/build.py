"""Build the objects that a training step uses: model, optimizer, loss scaler and the forward function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.arch import make_model
from llm.config import TrainConfig
from llm.data import TokenData
from llm.loss import Taught, linear_cross_entropy
from llm.machine.device import fast_products, keep_memory, precision
from llm.machine.parallel import exchanging, recompute_activations, shard_model
from llm.machine.world import ALONE, World
from llm.optim import make_optimizer
from llm.start.run_folder import Say
from llm.tokens.tokenizer import Tokenizer
from llm.training.averaging import Average
from llm.training.parts import Parts


def build(
    config: TrainConfig,
    data: TokenData,
    tokenizer: Tokenizer | None,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
    weights: dict[str, Tensor] | None = None,
) -> Parts:
    """Return the parts of a run, with the given `weights` or, without any, weights initialised from the seed."""
    keep_memory()
    fast_products(device)
    if device.type == "cuda" and device.index is not None:  # "cuda" is the current device already
        torch.cuda.set_device(device)  # FSDP puts its shards there; otherwise it is 0 in every process
    torch.manual_seed(config.seed)
    model = make_model(config.model)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(device)
    if config.activation_checkpointing:
        recompute_activations(model)
    if config.parallel == "fsdp" and world.started:
        shard_model(model, world, device, dtype, config.cpu_offload)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, config, dtype)
    parts = Parts(config, model, model, optimizer, scaler, data, tokenizer, device, dtype, world)
    if config.ema:
        parts.average = Average(model, config.ema)
    return parts


def connect(parts: Parts, say: Say) -> None:
    """Set `parts.forward`: compiled if the settings ask for it, and with the all-reduce of several processes."""
    if parts.config.compile:
        compile_forward(parts, say)
    if parts.config.parallel == "fsdp" and not parts.world.started:
        say("parallel = 'fsdp' needs torchrun; in this one process there is nothing to share")
    parts.forward, parts.exchange = exchanging(parts.model, parts.forward, parts.world)
    if parts.config.parallel == "ddp" and parts.world.size > 1:
        # DDP rebuilds its buckets after the first backward pass, which changes the order of the all-reduce. Without
        # this, the first step of a resumed run would add up in another order than the run that was never stopped.
        warm_up(parts, parts.forward)


def warm_up(parts: Parts, forward: Callable[..., Any]) -> None:
    """Run a warm-up forward and backward pass on the first micro-batch of the run."""
    micro = next(parts.micro_batches(0))
    try:
        with precision(parts.dtype, parts.device):
            loss: Any = forward(micro.x, micro.y, micro.seeds, micro.taught)[1]
        loss.backward()
    finally:
        parts.model.zero_grad(set_to_none=True)
        parts.data_seconds = 0.0


def compile_forward(parts: Parts, say: Say) -> None:
    """Compile the forward pass with torch.compile. If that fails, `say` gets one line and the run trains without it.

    Only the blocks are compiled. The loss is a series of matrix products and would not be faster. The compiled gradient
    of the embedding adds atomically in no fixed order, so two runs would differ.
    """
    model = parts.model
    stream = torch.compile(model.stream)

    def forward(idx: Tensor, targets: Tensor, seeds: Tensor, taught: Taught | None = None) -> tuple[None, Tensor]:
        hidden = stream(model.wte(idx), seeds=seeds)
        return None, linear_cross_entropy(hidden, model.lm_head.weight, targets, taught)

    try:
        warm_up(parts, forward)
        parts.forward = forward
    except Exception as error:  # a compiler can raise anything; the run does not depend on it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"torch.compile does not work here, training without it ({reason})")
