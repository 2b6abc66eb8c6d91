"""Connect the processes that torchrun started into a world, and end them together."""

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
from llm.machine.watchdog import LOST, Watchdog, connect_to_store, read_heartbeat_timeout
from llm.machine.world import ALONE, RUN_STARTED_KEY, World, mark_as_shared

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # of a start, and of a collective within a step

JSON_TIMEOUT = datetime.timedelta(hours=12)  # of an exchange of JSON: its sender may be preparing a large text


def read_torchrun_environment() -> World | None:
    """Return what torchrun's environment variables say of this process, or None if torchrun did not start it.

    Raises: UserError for variables that are missing or contradict each other.
    """
    if "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if name not in os.environ]
    if absent:
        raise UserError(f"RANK is set and {absent[0]} is not; start processes with torchrun, or unset RANK")
    try:
        rank, size, local_rank, port = (int(os.environ[name]) for name in names if name != "MASTER_ADDR")
        if not (0 <= rank < size and 0 <= local_rank < size and 0 < port < 2**16):
            raise ValueError(f"{rank}, {size}, {local_rank} and port {port} are impossible")
    except ValueError as error:
        raise UserError(f"{', '.join(names)}: {error}; start processes with torchrun, or unset RANK") from None
    return World(rank, size, local_rank, started=True)


@contextmanager
def init_distributed() -> Iterator[World]:
    """Yield the world of this process once all its processes are there; without torchrun, a world of one.

    A process that exits, hangs or is cut off ends the others too, within the heartbeat timeout. One of them prints a
    line that names it.

    Raises: UserError for torchrun's environment and for LOSSCURVE_SILENCE; Failure when contact is lost.
    """
    world = read_torchrun_environment()
    if world is None:
        yield ALONE
        return
    watchdog = None
    try:
        store, heartbeat_timeout = _connect(world)
        prefix = _agree_on_prefix(world, store)
        _init_process_group(world, store, prefix)
        watchdog = Watchdog(world, prefix, heartbeat_timeout)
        watchdog.start()
        world = World(
            world.rank,
            world.size,
            world.local_rank,
            started=True,
            restarted=store.check([RUN_STARTED_KEY]),
            step_group=dist.new_group(backend="gloo"),
            json_group=dist.new_group(backend="gloo", timeout=JSON_TIMEOUT),
            store=store,
        )
        yield world
        world.gather(None)  # no process leaves while another is at work
    except (UserError, Failure) as error:
        if hasattr(error, "quiet") and dist.is_initialized():  # all processes raise it: none waits for another
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_connection_error(error):
            raise
        # Ignore torchrun's SIGTERM to the other processes until one of them has reported who failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reports = watchdog.claim_report() if watchdog else world.local_rank == 0
        missing = watchdog.describe_missing_ranks(reports) if watchdog else ""
        failure = Failure(f"{LOST}: {missing or _first_line(error)}; continue with --resume")
        raise mark_as_shared(failure, prints=reports) from error
    finally:
        if watchdog:
            watchdog.close()
    dist.destroy_process_group()


def _connect(world: World) -> tuple[Any, float]:
    """Return torchrun's store and the heartbeat timeout in seconds. Only local rank 0 reports an error."""
    try:
        return connect_to_store(leads=world.leads), read_heartbeat_timeout()
    except UserError as error:
        raise mark_as_shared(error, prints=world.local_rank == 0) from None
    except RuntimeError as error:
        address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        cause = _first_line(error).rstrip(".")
        failure = Failure(
            f"torchrun's store at {address} cannot be reached ({cause}); check MASTER_ADDR, then start the run again"
        )
        raise mark_as_shared(failure, prints=world.local_rank == 0) from error


def _init_process_group(world: World, store: Any, prefix: str) -> None:
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        rank=world.rank,
        world_size=world.size,
        store=dist.PrefixStore(prefix, store),  # type: ignore[attr-defined]
    )


def _agree_on_prefix(world: World, store: Any) -> str:
    """Return a prefix for keys in the store, the same on all processes, that no earlier start used.

    torchrun's store outlives a restart, and its machines may count restarts differently. So that no process takes a key
    of an earlier start for one of this start, each process asks under a random name, and rank 0 answers that name.
    """
    if world.leads:
        return _answer_all_ranks(world, store)
    question = uuid.uuid4().hex
    store.set(f"losscurve/asks/{world.rank}", question)
    try:
        store.wait([f"losscurve/answer/{question}"], COLLECTIVE_TIMEOUT)
    except dist.DistStoreError:
        raise _late_failure(rank=0) from None
    start = str(store.get(f"losscurve/answer/{question}").decode())
    store.set(f"losscurve/{start}/heard/{world.rank}", "")
    return f"losscurve/{start}"


def _answer_all_ranks(world: World, store: Any) -> str:
    start = uuid.uuid4().hex
    first_answer = time.monotonic()
    waiting = list(range(1, world.size))
    while waiting:
        if time.monotonic() - first_answer > COLLECTIVE_TIMEOUT.total_seconds():
            raise _late_failure(rank=waiting[0])
        for rank in waiting:
            key = f"losscurve/asks/{rank}"
            if store.check([key]):
                store.set(f"losscurve/answer/{store.get(key).decode()}", start)
        waiting = [rank for rank in waiting if not store.check([f"losscurve/{start}/heard/{rank}"])]
        time.sleep(0.05)
    return f"losscurve/{start}"


def _late_failure(rank: int) -> Failure:
    return Failure(
        f"rank {rank} did not start within {COLLECTIVE_TIMEOUT} (h:mm:ss); "
        "read the error on its machine, then start the run again"
    )


def _is_connection_error(error: RuntimeError) -> bool:
    words = ("onnection", "gloo", "NCCL", "peer", "timed out", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
