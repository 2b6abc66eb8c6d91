"""Parallelism, applied to a model from outside: replicas (DDP), shards (FSDP2), activation checkpointing.

The model's own code knows one device and nothing of this.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from llm.config import TrainConfig
from llm.errors import UserError
from llm.machine.world import World

if TYPE_CHECKING:
    from llm.arch import Model
    from llm.model import Dropout, KVCache

Exchange = Callable[[bool], AbstractContextManager[None]]  # of a micro-batch: whether it is the last of its step


def check_parallel(config: TrainConfig, world: World, dtype: torch.dtype) -> None:
    """Check that the settings can be spread over the processes.

    Raises: UserError that names the setting and what to use instead.
    """
    windows = config.windows_per_step
    sharded = config.parallel == "fsdp"
    if windows % world.size:
        raise UserError(
            f"batch_size x gradient_accumulation_steps = {windows} windows do not divide among {world.size} processes; "
            f"try --gradient_accumulation_steps {world.size}, or another number of processes"
        )
    if config.cpu_offload and not sharded:
        raise UserError("cpu_offload: works with --parallel fsdp only")
    if sharded and dtype == torch.float16:
        raise UserError("dtype = 'float16': its loss scaling does not work with --parallel fsdp; use bfloat16")
    if sharded and config.compile:
        raise UserError("compile: does not work with --parallel fsdp; leave one of them out")


def recompute_activations(model: "Model") -> None:
    """Keep only the input of each block, and recompute the rest in the backward pass (Chen et al. 2016)."""

    def recompute(
        forward: Callable[..., Tensor], x: Tensor, cache: "KVCache | None", drop: "Dropout | None", *more: Any
    ) -> Tensor:
        place = drop.place if drop else 0

        def block(x: Tensor) -> Tensor:
            if drop:
                drop.place = place  # the second pass draws the same dropout as the first
            return forward(x, cache, drop, *more)

        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    for block in model.h:
        block.forward = partial(recompute, block.forward)


def shard_model(model: "Model", world: World, device: torch.device, dtype: torch.dtype, offload: bool) -> None:
    """Shard weights and gradients, and so the optimizer's state, over the processes (FSDP2; Zhao et al. 2023).

    The matrices of the blocks are all-gathered in the precision of their products. What autocast keeps in float32
    (embeddings, norms, and the output matrix, which the loss rounds itself) is all-gathered in float32. So the
    arithmetic is that of one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # FSDP2 warns of in-place changes to a returned view. The output of a block's layer is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    mesh = init_device_mesh(device.type, (world.size,))
    offload_policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    full_precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed_precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.h:
        block.may_fuse = False  # type: ignore[assignment]
        for layer in (block.attn, block.mlp):
            fully_shard(cast(nn.Module, layer), mesh=mesh, mp_policy=mixed_precision, offload_policy=offload_policy)
    fully_shard(model, mesh=mesh, mp_policy=full_precision, offload_policy=offload_policy)


class _ForwardModule(nn.Module):
    """Wrap a model and the function that training calls as its forward, perhaps compiled: DDP takes only a module."""

    def __init__(self, model: "Model", forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._forward = (forward,)  # a tuple, so that a compiled module is not registered as a second submodule

    def forward(self, *inputs: Any) -> Any:
        return self._forward[0](*inputs)


def exchanging(model: "Model", forward: Callable[..., Any], world: World) -> tuple[Callable[..., Any], Exchange]:
    """Return (the forward to train with, a context manager for each micro-batch).

    With them the gradients of a step become the mean over all processes. The all-reduce runs during the backward pass
    of the last micro-batch, and not before it.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2 adds this method

        @contextmanager
        def synchronize(last: bool) -> Iterator[None]:
            cast(Any, model).set_requires_gradient_sync(last)
            yield

        return forward, synchronize
    if world.size == 1:
        return forward, lambda last: nullcontext()
    replica = DistributedDataParallel(_ForwardModule(model, forward), gradient_as_bucket_view=True)
    return replica, lambda last: nullcontext() if last else replica.no_sync()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the full embeddings, norms and output matrix of a sharded model within the block.

    Code that calls parts of the model, rather than the model itself, needs this.
    """
    if hasattr(model, "unshard"):
        model.unshard()  # type: ignore[operator]
    yield
    reshard(model)


def reshard(model: nn.Module) -> None:
    """Free the full embeddings, norms and output matrix, which FSDP2 keeps after a forward pass without gradients."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]
