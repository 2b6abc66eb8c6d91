"""The processes of a run, as one of them sees it, and the messages that they exchange.

Messages are small, travel over the CPU (gloo) and are JSON, never pickle; what teachers predict is scattered. DDP and
FSDP2 exchange gradients and shards (parallel.py). A run without torchrun is a world of one process.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import Failure, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it. Without arguments: a run in one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank among the processes of this machine
    started: bool = False  # torchrun started this process
    restarted: bool = False  # torchrun (--max-restarts) restarted this job after it had called `mark_started`
    step_group: Any = None  # gloo group of all processes, for collectives within a step
    json_group: Any = None  # gloo group of all processes with a long timeout, for JSON messages
    store: Any = None  # torchrun's key-value store

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON `value` of every process, ordered by rank.

        Raises: The error, on all processes, that one of them passed to `_raise_everywhere` instead of a value.
        """
        return self._exchange({"value": value})

    def first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only and return its JSON value on all processes, which wait for it.

        Raises: What `make` raises, on all processes, if it is a UserError or a Failure.
        """
        if not self.leads:
            return self.gather(None)[0]  # type: ignore[no-any-return]
        try:
            made = make()
        except (UserError, Failure) as error:
            self._raise_everywhere(error)
            raise
        return self.gather(made)[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that all processes complete, or none: a UserError or Failure of one is raised on all of them.

        Inside the block, processes may exchange JSON, and nothing else.
        """
        try:
            yield
        except (UserError, Failure) as error:
            self._raise_everywhere(error)
            raise
        self.gather(None)

    def _raise_everywhere(self, error: Exception) -> None:
        # An error that already has `quiet` came from the exchange, so the other processes raise it too.
        if self.size == 1 or hasattr(error, "quiet"):
            return
        origin = "" if self.leads else f"rank {self.rank} on {socket.gethostname()}: "
        kind = UserError if isinstance(error, UserError) else Failure
        self._exchange({"error": kind.__name__, "message": f"{origin}{error}"})

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.step_group)
        return bool(flags.item())

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a CPU tensor to its sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.step_group)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """All-reduce a tensor on the device to its mean over the processes, in place. The CPU never waits for a GPU."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def scatter(self, into: Tensor, parts: Sequence[Tensor] | None) -> Tensor:
        """Fill a CPU tensor with this process's one of the `parts`, which only rank 0 has, and return it."""
        dist.scatter(into, None if parts is None else list(parts), group=self.step_group)
        return into

    def rows(self, count: int) -> slice:
        """Return this process's share of a batch of `count` windows, which `check_parallel` made divisible."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that `facts` are the same on all processes.

        Raises: UserError that names the first fact which differs, with its two values and their ranks.
        """
        by_rank = self.gather({"host": socket.gethostname(), **facts})
        names = dict.fromkeys(name for other in by_rank for name in other if name != "host")
        for rank, other in enumerate(by_rank):
            for name in names:
                if other.get(name) == by_rank[0].get(name):
                    continue
                expected = f"{by_rank[0].get(name, 'absent')} on rank 0 ({by_rank[0]['host']})"
                found = f"{other.get(name, 'absent')} on rank {rank} ({other['host']})"
                error = UserError(f"{name} is {expected} and {found}; make them the same")
                raise mark_as_shared(error, prints=self.leads)

    def mark_started(self) -> None:
        """Record in torchrun's store that this job owns its run, so that it resumes the run if torchrun restarts it."""
        if self.store and self.leads:
            self.store.set(RUN_STARTED_KEY, "1")

    def _exchange(self, outcome: dict[str, Any]) -> list[Any]:
        """Send the `outcome` of this process to all and return the values of all. Raises the first error among them."""
        if self.size == 1:
            return [outcome["value"]]
        content = torch.frombuffer(bytearray(json.dumps(outcome).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.json_group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        received = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.json_group)
        outcomes = []
        for message, size in zip(received, sizes, strict=True):
            outcomes.append(json.loads(bytes(message[: int(size)].tolist())))
        for other in outcomes:
            if "error" in other:
                kind = UserError if other["error"] == UserError.__name__ else Failure
                raise mark_as_shared(kind(other["message"]), prints=self.leads)
        return [other["value"] for other in outcomes]


ALONE = World()
RUN_STARTED_KEY = "losscurve/run-started"  # in torchrun's store, which outlives a restart of the processes


def mark_as_shared(error: Exception, prints: bool) -> Exception:
    """Mark an error that several processes raise; only the one that `prints` reports it to the user."""
    error.quiet = not prints  # type: ignore[attr-defined]
    return error


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor of a sharded one, a collective that all processes must call; else `value` itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local_shard(value: Tensor) -> Tensor:
    """Return the shard that this process holds of a sharded tensor; else `value` itself."""
    return value.to_local() if hasattr(value, "to_local") else value


def gather_shards(shard: Tensor, p: Tensor) -> Tensor:
    """Return the full tensor of `shard`, which has the place of this process's shard of `p`; a collective.

    If `p` is not sharded, `shard` is full. The result may have another dtype than `p`; it is on the device of the mesh.
    """
    if not hasattr(p, "device_mesh"):
        return shard
    from torch.distributed.tensor import DTensor

    local = shard.to(collective_device(p))
    place = {"device_mesh": p.device_mesh, "placements": p.placements}  # type: ignore[attr-defined]
    return DTensor.from_local(local, **place, shape=p.shape, stride=p.stride()).full_tensor()


def take_shard(full: Tensor, p: Tensor) -> Tensor:
    """Return this process's shard of `full`, which all processes have: the rows that it holds of the sharded `p`.

    If `p` is not sharded, return `full` itself.
    """
    if not hasattr(p, "device_mesh"):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    replicas = DTensor.from_local(full, p.device_mesh, [Replicate()])
    return replicas.redistribute(placements=p.placements).to_local().to(p.device)  # type: ignore[attr-defined]


def receive(world: World, into: Tensor, value: Tensor | None) -> None:
    """Fill `into` on every process, sharded or not, with the full tensor `value` that only rank 0 has."""
    if world.size == 1 and not hasattr(into, "full_tensor"):
        assert value is not None
        into.copy_(value)
        return
    full = torch.empty(into.shape, dtype=into.dtype) if value is None else value.to(into.dtype)
    full = full.to(collective_device(into)).contiguous()
    if hasattr(into, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        full = distribute_tensor(full, into.device_mesh, into.placements)  # type: ignore[attr-defined]
    else:
        dist.broadcast(full, 0)
    into.copy_(full)


def collective_device(value: Tensor) -> torch.device:
    """Return the device of collectives of `value`: the mesh's, also where cpu_offload keeps its shard on the CPU."""
    mesh = getattr(value, "device_mesh", None)
    return torch.device(mesh.device_type) if mesh is not None else value.device
