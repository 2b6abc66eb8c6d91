"""The processes of a run as one of them sees it, and what they say to each other.

What is said is small and goes over the CPU (gloo), as JSON and never as a pickle. DDP and FSDP2 exchange gradients and
shards (parallel.py). A run without torchrun is a world of one.
"""

import json
import socket
from collections.abc import Callable, Iterator
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
    """The processes of a run as one of them sees it. Without arguments: a run in one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    started: bool = False  # by torchrun
    restarted: bool = False  # by torchrun's --max-restarts, after this job had begun its run
    group: Any = None  # of all processes, over the CPU: for what is exchanged in steps
    patient: Any = None  # the same, for what is said in JSON
    store: Any = None  # torchrun's

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON `value` of each process, by rank. Where one came with an error instead, that is raised on all."""
        return self._exchange({"value": value})

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns, or raises, on rank 0: a JSON value that the others wait for."""
        if not self.leads:
            return self.gather(None)[0]  # type: ignore[no-any-return]
        try:
            made = make()
        except (UserError, Failure) as error:
            self._tell(error)
            raise
        return self.gather(made)[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave well, or none: an error a person should know is raised on each of them.

        Within it they may exchange JSON, and nothing else.
        """
        try:
            yield
        except (UserError, Failure) as error:
            self._tell(error)
            raise
        self.gather(None)

    def _tell(self, error: Exception) -> None:
        """Raise an error of this process on all of them, unless it came from there."""
        if self.size > 1 and not hasattr(error, "quiet"):
            where = "" if self.leads else f"rank {self.rank} on {socket.gethostname()}: "
            kind = UserError if isinstance(error, UserError) else Failure
            self._exchange({"error": kind.__name__, "words": f"{where}{error}"})

    def any(self, flag: bool) -> bool:
        """Return whether any process raises its `flag`."""
        if self.size == 1:
            return flag
        raised = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self.group)
        return bool(raised.item())

    def sum(self, values: Tensor) -> Tensor:
        """Tensors on the CPU, added up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """Tensors on the device, averaged over the processes, in place; nothing waits for it on a GPU."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def rows(self, count: int) -> slice:
        """This process's share of a batch of `count` windows. They divide evenly: see `check_parallel`."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises UserError naming the first of `facts` that is not the same everywhere."""
        told = self.gather({"host": socket.gethostname(), **facts})
        names = dict.fromkeys(name for other in told for name in other if name != "host")
        for rank, name in ((rank, name) for rank in range(len(told)) for name in names):
            if told[rank].get(name) != told[0].get(name):
                ours, theirs = (f"{told[r].get(name, 'absent')} on rank {r} ({told[r]['host']})" for r in (0, rank))
                raise _shared(UserError(f"{name} is {ours} and {theirs}; make them the same"), self.leads)

    def begun(self) -> None:
        """The run has begun: if torchrun starts this job's processes again, they go on with it."""
        if self.store and self.leads:
            self.store.set("losscurve/begun", "1")

    def _exchange(self, outcome: dict[str, Any]) -> list[Any]:
        """What each process came to, of which this is ours; raises the first error among them."""
        if self.size == 1:
            return [outcome["value"]]
        content = torch.frombuffer(bytearray(json.dumps(outcome).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.patient)
        room = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        room[: len(content)] = content
        found = [torch.zeros_like(room) for _ in range(self.size)]
        dist.all_gather(found, room, group=self.patient)
        outcomes = [json.loads(bytes(f[: int(n)].tolist())) for f, n in zip(found, sizes, strict=True)]
        for told in outcomes:
            if "error" in told:
                kind = UserError if told["error"] == UserError.__name__ else Failure
                raise _shared(kind(told["words"]), self.leads)
        return [told["value"] for told in outcomes]


ALONE = World()


def _shared(error: Exception, leads: bool) -> Exception:
    """An error that all processes raise and only the leading one prints."""
    error.quiet = not leads  # type: ignore[attr-defined]
    return error


def whole(value: Tensor) -> Tensor:
    """The full tensor of one that is sharded over the processes, which all have to ask for it; else itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return value.to_local() if hasattr(value, "to_local") else value


def receive(world: World, into: Tensor, value: Tensor | None) -> None:
    """Fill `into`, sharded or not, on every process with the `value` (its full tensor) that rank 0 has."""
    if world.size == 1 and not hasattr(into, "full_tensor"):
        assert value is not None
        into.copy_(value)
        return
    full = torch.empty(into.shape, dtype=into.dtype) if value is None else value.to(into.dtype)
    full = full.to(_exchanged_on(into)).contiguous()
    if hasattr(into, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        full = distribute_tensor(full, into.device_mesh, into.placements)  # type: ignore[attr-defined]
    else:
        dist.broadcast(full, 0)
    into.copy_(full)


def _exchanged_on(value: Tensor) -> torch.device:
    mesh = getattr(value, "device_mesh", None)
    return torch.device(mesh.device_type) if mesh is not None else value.device
