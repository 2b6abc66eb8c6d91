"""Parallelism, applied to a model from outside: replicas (DDP), shards (FSDP2), recomputed activations.

The model knows one device and nothing of this.
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
    from llm.model import GPT, Dropout, KVCache

Exchange = Callable[[bool], AbstractContextManager[None]]


def check_parallel(config: TrainConfig, world: World, dtype: torch.dtype) -> None:
    """Raises UserError where the settings cannot be spread over the processes."""
    windows, sharded = config.windows_per_step, config.parallel == "fsdp"
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


def recompute_activations(model: "GPT") -> None:
    """Keep only what enters a block, and compute the rest again in backward (Chen et al. 2016)."""

    def twice(forward: Callable[..., Tensor], x: Tensor, cache: "KVCache | None", drop: "Dropout | None") -> Tensor:
        place = drop.place if drop else 0

        def block(x: Tensor) -> Tensor:
            if drop:
                drop.place = place  # the second time it draws what it drew the first
            return forward(x, cache, drop)

        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    for block in model.h:
        block.forward = partial(twice, block.forward)


def shard_model(model: "GPT", world: World, device: torch.device, dtype: torch.dtype, offload: bool) -> None:
    """Shard weights, gradients and, with them, the optimizer's state over the processes (FSDP2; Zhao et al. 2023).

    The matrices of the blocks travel in the precision of their products. What autocast keeps in float32 (embeddings,
    norms, and the output matrix, which the loss rounds by itself) does so here: the arithmetic is that of one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # what a block adds to the stream is never changed in place, which is all that this warns of
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    mesh = init_device_mesh(device.type, (world.size,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    products = None if dtype == torch.float32 else dtype
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        for layer in (block.attn, block.mlp):
            fully_shard(cast(nn.Module, layer), mesh=mesh, mp_policy=mixed, offload_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=precise, offload_policy=policy)


class _Forward(nn.Module):
    """A model with the forward it is trained by, perhaps a compiled one: DDP takes a module."""

    def __init__(self, model: "GPT", forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._forward = model, (forward,)  # in a tuple, so as not to be a second submodule

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward[0](*inputs)


def exchanging(model: "GPT", forward: Callable[..., Any], world: World) -> tuple[Callable[..., Any], Exchange]:
    """(forward to train by, context of a micro-batch), by which the gradients of a step become the mean over all
    processes: they are exchanged while the last micro-batch runs backward, and not before it.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's

        @contextmanager
        def synced(last: bool) -> Iterator[None]:
            cast(Any, model).set_requires_gradient_sync(last)
            yield

        return forward, synced
    if world.size == 1:
        return forward, lambda last: nullcontext()
    replica = DistributedDataParallel(_Forward(model, forward), gradient_as_bucket_view=True)
    return replica, lambda last: nullcontext() if last else replica.no_sync()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """For what calls parts of a model rather than the model: its embeddings, norms and output matrix, whole."""
    sharded = hasattr(model, "unshard")
    if sharded:
        model.unshard()  # type: ignore[operator]
    yield
    if sharded:
        model.reshard()  # type: ignore[operator]
