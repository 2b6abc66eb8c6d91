"""Join the processes that torchrun started into a world, and end them together."""

import datetime
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from llm.errors import Failure, UserError
from llm.machine.watchdog import LOST, Watch, _store, silence
from llm.machine.world import ALONE, World, _shared

STALLED = datetime.timedelta(minutes=10)  # for which an exchange of a step may make no progress


PATIENCE = datetime.timedelta(hours=12)  # of what is said in JSON: who says it may have prepared a large text


LATE = "rank {rank} did not start within {time} h; see what its machine says, and start again"


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
