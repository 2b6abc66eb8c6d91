"""The processes of a run: who they are, what they agree on, and how they end together.

torchrun starts them and says who they are; a run without it is a world of one. What is said here is small and goes over
the CPU (gloo), as JSON and never as a pickle; gradients and shards are exchanged by PyTorch's own DDP and FSDP2
(parallel.py).
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import Failure, UserError

T = TypeVar("T")
BEAT = 1.0  # seconds between the signs of life of a process
SILENCE = 60.0  # seconds without one after which the job ends, unless LOSSCURVE_SILENCE says otherwise
PARTING = 6 * BEAT  # for which processes that are left go on beating, so that the one that is gone can be told
STORE_WAIT = 30  # seconds for an answer of torchrun's store
STALLED = datetime.timedelta(minutes=10)  # for which an exchange of a step may make no progress
PATIENCE = datetime.timedelta(hours=12)  # of what is said in JSON: who says it may have prepared a large text
LOST = "the processes of the run lost each other"
LATE = "rank {rank} did not start within {time} h; see what its machine says, and start again"


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


def described() -> World | None:
    """Who this process is among those that torchrun started; None without it. Raises UserError."""
    if "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if absent := [name for name in names if name not in os.environ]:
        raise UserError(f"RANK is set and {absent[0]} is not; start processes with torchrun, or unset RANK")
    try:
        rank, size, local, port = (int(os.environ[name]) for name in names if name != "MASTER_ADDR")
        if not (0 <= rank < size and 0 <= local < size and 0 < port < 2**16):
            raise ValueError(f"{rank}, {size}, {local} and port {port} cannot be")
    except ValueError as error:
        raise UserError(f"{', '.join(names)}: {error}; start processes with torchrun, or unset RANK") from None
    return World(rank, size, local, started=True)


def silence() -> float:
    """Seconds. Raises UserError for a LOSSCURVE_SILENCE that is none."""
    given = os.environ.get("LOSSCURVE_SILENCE", str(SILENCE))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 2 * BEAT <= seconds < 1e6:
        raise UserError(f"LOSSCURVE_SILENCE = {given!r}: expected seconds, at least {2 * BEAT:g}")
    return seconds


@contextmanager
def joined() -> Iterator[World]:
    """The world of this process: what torchrun describes, all of it there; without torchrun, of one.

    A process that ends, hangs or is cut off ends the others too, within SILENCE, with one line that names it.
    Raises UserError, and Failure for that.
    """
    world = described()
    if world is None:
        yield ALONE
        return
    watch = None
    try:
        store, allowed = _met(world)
        name = _name_of_start(world, store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        named = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=STALLED, rank=world.rank, world_size=world.size, store=named)
        watch = Watch(world, name, allowed)
        watch.start()
        restarted = store.check(["losscurve/begun"])
        groups = dist.new_group(backend="gloo"), dist.new_group(backend="gloo", timeout=PATIENCE)
        world = World(world.rank, world.size, world.local_rank, True, restarted, *groups, store)
        yield world
        world.gather(None)  # none leaves while another is at work
    except (UserError, Failure) as error:
        if hasattr(error, "quiet") and dist.is_initialized():  # raised on all of them: none waits for another
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_of_a_connection(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which ends the rest: first it is said who failed
        says = watch.says() if watch else world.local_rank == 0
        cause = watch.missing(says) if watch else ""
        failure = Failure(f"{LOST}: {cause or str(error).splitlines()[0]}; go on with --resume")
        raise _shared(failure, says) from error
    finally:
        if watch:
            watch.close()
    dist.destroy_process_group()


def _met(world: World) -> tuple[Any, float]:
    """The store, and the silence that is allowed. Raises UserError and Failure, for the first of a machine to print."""
    try:
        return _store(leads=world.leads), silence()
    except UserError as error:
        raise _shared(error, world.local_rank == 0) from None
    except RuntimeError as error:
        where, why = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ), str(error).splitlines()[0].rstrip(".")
        failure = Failure(f"the store at {where} cannot be reached ({why}); see MASTER_ADDR, and start again")
        raise _shared(failure, world.local_rank == 0) from error


def _store(leads: bool = False) -> Any:
    """A connection to torchrun's store, in which the processes can say what they cannot say to each other.

    The launcher keeps it; where it does not, the leading process does. It takes one call at a time.
    """
    keeps = leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where, wait = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), datetime.timedelta(seconds=STORE_WAIT)
    return dist.TCPStore(*where, is_master=keeps, wait_for_workers=False, timeout=wait)  # type: ignore[attr-defined]


def _name_of_start(world: World, store: Any) -> str:
    """A name for this start of the processes, which no other start had.

    torchrun's store outlives a restart, and what its machines count of restarts may differ. So that nobody takes what
    an earlier start left there for this one's, each process asks by a name that is new, and rank 0 answers.
    """
    mine = uuid.uuid4().hex
    if not world.leads:
        store.set(f"losscurve/asks/{world.rank}", mine)
        try:
            store.wait([f"losscurve/answer/{mine}"], STALLED)
        except dist.DistStoreError:
            raise Failure(LATE.format(rank=0, time=STALLED)) from None
        name = str(store.get(f"losscurve/answer/{mine}").decode())
        store.set(f"losscurve/{name}/heard/{world.rank}", "")
        return f"losscurve/{name}"
    silent, began = list(range(1, world.size)), time.monotonic()
    while silent:
        if time.monotonic() - began > STALLED.total_seconds():
            raise Failure(LATE.format(rank=silent[0], time=STALLED))
        for rank in silent:
            if store.check([key := f"losscurve/asks/{rank}"]):
                store.set(f"losscurve/answer/{store.get(key).decode()}", mine)
        silent = [rank for rank in silent if not store.check([f"losscurve/{mine}/heard/{rank}"])]
        time.sleep(0.05)
    return f"losscurve/{mine}"


def _is_of_a_connection(error: RuntimeError) -> bool:
    words = ("onnection", "gloo", "NCCL", "peer", "timed out", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


class Watch:
    """Signs of life in torchrun's store, given and looked for: a collective does not say who keeps it waiting.

    Rank 0 looks at all, the others at rank 0. One thread speaks with the store, which may keep it waiting for good; the
    other judges what it heard, and ends this process where that is too little.
    """

    def __init__(self, world: World, prefix: str, allowed: float) -> None:
        self.rank, self.local_rank, self.launcher = world.rank, world.local_rank, os.getppid()
        self.store, self.prefix, self.allowed = _store(), prefix, allowed
        self.everyone = [rank for rank in range(world.size) if rank != world.rank]
        self.others = self.everyone if world.leads else [0]
        self._done, self._store_lock = threading.Event(), threading.Lock()
        self._seen: dict[int, tuple[str, float]] = {}  # by rank: its last sign, and when it was new
        self._heard, self._trouble = time.monotonic(), ""  # when the store last answered, and what it said instead
        self._mine = False  # whether this process says why the job ends
        self._over: float | None = None  # when it was seen that another does
        work = {"watch": self._judge, "signs": self._speak}
        self._threads = [threading.Thread(target=do, daemon=True, name=name) for name, do in work.items()]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _speak(self) -> None:
        host, beat = f"{socket.gethostname()}, process {os.getpid()}", 0
        while not self._done.wait(BEAT):
            beat += 1
            try:
                with self._store_lock:
                    self.store.set(f"{self.prefix}/sign/{self.rank}", f"{beat} {host}")
                    for rank in self.others:
                        key = f"{self.prefix}/sign/{rank}"
                        sign = self.store.get(key).decode() if self.store.check([key]) else ""
                        if rank not in self._seen or self._seen[rank][0] != sign:
                            self._seen[rank] = sign, time.monotonic()
                    if self._over is None and not self._mine and self.store.check([f"{self.prefix}/said"]):
                        self._over = time.monotonic()
                self._heard = time.monotonic()
            except (RuntimeError, ValueError, OSError) as error:  # what the store raises when it is gone
                self._trouble = f" ({str(error).splitlines()[0]})"

    def _judge(self) -> None:
        woke = time.monotonic()
        while not self._done.wait(BEAT):
            now = time.monotonic()
            if now - woke > self.allowed:  # this process was itself stopped, and perhaps all were: nobody is to blame
                self._heard, self._seen = now, {}
            woke = now
            if os.getppid() != self.launcher:
                self._end("the launcher of this process is gone")
            if now - self._heard > self.allowed:
                where = "the store of the run at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
                self._end(f"{where} has not answered for {self.allowed:.0f} s{self._trouble}")
            if self._over is not None and now - self._over > PARTING:
                os._exit(1)  # its exchange waits for one that waits for another, and so on to the one that is gone
            named = self._named(self._silent(self.allowed))
            if named and self._over is None and not self._mine:
                self._end(f"{named} for {self.allowed:.0f} s: it hangs, was stopped, or was cut off")

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self._seen.items()) if now - since > seconds]

    def _named(self, ranks: list[int]) -> str:
        """The processes that are silent, in words; "" if there are none."""
        if not ranks:
            return ""
        names = ", ".join(f"rank {rank} ({self._seen[rank][0].partition(' ')[2]})" for rank in ranks[:3])
        return f"nothing was heard of {names}" + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")

    def missing(self, says: bool) -> str:
        """Who gives no sign of life, in words, for the process that says it; "" for the others, which stay for so long
        that they can be told from it, and where it cannot be told.
        """
        if not says:
            time.sleep(PARTING)
            return ""
        self.others = self.everyone
        time.sleep(4 * BEAT)
        named = self._named(self._silent(2.5 * BEAT))
        return f"{named}: it has ended, or was cut off" if named else ""

    def says(self) -> bool:
        """Whether it is for this process to say why the job ends: the first to ask, of those that reach the store."""
        reached = time.monotonic() - self._heard < 3 * BEAT and self._store_lock.acquire(timeout=2 * BEAT)
        try:
            first = int(self.store.add(f"{self.prefix}/said", 1)) == 1 if reached else self.local_rank == 0
        except (RuntimeError, ValueError, OSError):
            first = self.local_rank == 0
        finally:
            if reached:
                self._store_lock.release()
        self._mine = first
        return first

    def _end(self, cause: str) -> None:
        """End this process from beside its work, which waits for another in vain. What was saved stays."""
        if self.says():
            with contextlib.suppress(OSError):
                print(f"error: {LOST}: {cause}; go on with --resume", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * BEAT)  # so that it is said before torchrun ends the rest
        os._exit(1)

    def close(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(5)
