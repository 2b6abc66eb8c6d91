"""Heartbeats in torchrun's store, and the watchdog that ends a process when another one is lost.

A collective does not say which rank it waits for.
"""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from llm.errors import UserError
from llm.machine.world import World

HEARTBEAT_SECONDS = 1.0  # interval between the heartbeats of a process

HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which the job ends; LOSSCURVE_SILENCE overrides it

LINGER_SECONDS = 6 * HEARTBEAT_SECONDS  # the surviving ranks keep sending heartbeats, so that the lost one stands out

STORE_TIMEOUT = 30  # seconds to wait for an answer of torchrun's store

LOST = "the processes of the run lost contact"


def read_heartbeat_timeout() -> float:
    """Return the heartbeat timeout in seconds.

    Raises: UserError for a LOSSCURVE_SILENCE that is not a number of seconds or too small.
    """
    given = os.environ.get("LOSSCURVE_SILENCE", str(HEARTBEAT_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    least = 2 * HEARTBEAT_SECONDS
    if not least <= seconds < 1e6:
        raise UserError(f"LOSSCURVE_SILENCE = {given!r}: expected the heartbeat timeout in seconds, at least {least:g}")
    return seconds


def connect_to_store(leads: bool = False) -> Any:
    """Return a connection to torchrun's key-value store, which works while collectives are blocked.

    The launcher hosts the store; where it does not, rank 0 (`leads`) does. A connection takes one call at a time.
    """
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=STORE_TIMEOUT),
    )


class Watchdog:
    """Send the heartbeat of this process and end it when a watched rank, the store or the launcher is lost.

    Rank 0 watches all others; the others watch rank 0. One thread talks to the store, which may block it for good. A
    second thread judges the heartbeats and ends this process.
    """

    def __init__(self, world: World, prefix: str, timeout_seconds: float) -> None:
        self.rank = world.rank
        self.local_rank = world.local_rank
        self.launcher_pid = os.getppid()
        self.prefix = prefix  # of the keys in the store
        self.timeout_seconds = timeout_seconds
        self.all_others = [rank for rank in range(world.size) if rank != world.rank]
        self.watched = self.all_others if world.leads else [0]
        self.store = connect_to_store()
        self._store_lock = threading.Lock()
        self._store_answered = time.monotonic()
        self._store_error = ""
        self._heartbeats: dict[int, tuple[str, float]] = {}  # rank: (last heartbeat, time at which it changed)
        self._reports = False  # whether this process reports why the job ends
        self._other_reported: float | None = None  # time at which this process saw that another one reports
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._check_heartbeats, daemon=True, name="watchdog"),
            threading.Thread(target=self._exchange_heartbeats, daemon=True, name="heartbeats"),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(5)

    def claim_report(self) -> bool:
        """Return whether this process reports why the job ends: the first to ask among those that reach the store.

        Where the store does not answer, local rank 0 reports.
        """
        answered = time.monotonic() - self._store_answered < 3 * HEARTBEAT_SECONDS
        locked = answered and self._store_lock.acquire(timeout=2 * HEARTBEAT_SECONDS)
        first = self.local_rank == 0
        if locked:
            try:
                with contextlib.suppress(RuntimeError, ValueError, OSError):
                    first = int(self.store.add(f"{self.prefix}/reported", 1)) == 1
            finally:
                self._store_lock.release()
        self._reports = first
        return first

    def describe_missing_ranks(self, reports: bool) -> str:
        """Return a sentence that names the ranks whose heartbeat is stale, or "" if there are none.

        Only the process that `reports` gets it. The others keep sending heartbeats for LINGER_SECONDS, so that they are
        not taken for the missing one, and get "".
        """
        if not reports:
            time.sleep(LINGER_SECONDS)
            return ""
        self.watched = self.all_others
        time.sleep(4 * HEARTBEAT_SECONDS)
        missing = self._describe(self._stale_ranks(2.5 * HEARTBEAT_SECONDS))
        return f"{missing}: it has exited, or was cut off" if missing else ""

    def _exchange_heartbeats(self) -> None:
        name = f"{socket.gethostname()}, process {os.getpid()}"
        count = 0
        while not self._closed.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                with self._store_lock:
                    self.store.set(f"{self.prefix}/heartbeat/{self.rank}", f"{count} {name}")
                    for rank in self.watched:
                        self._read_heartbeat(rank)
                    waits_for_report = self._other_reported is None and not self._reports
                    if waits_for_report and self.store.check([f"{self.prefix}/reported"]):
                        self._other_reported = time.monotonic()
                self._store_answered = time.monotonic()
            except (RuntimeError, ValueError, OSError) as error:  # what the store raises when its host is gone
                self._store_error = f" ({str(error).splitlines()[0]})"

    def _read_heartbeat(self, rank: int) -> None:
        key = f"{self.prefix}/heartbeat/{rank}"
        heartbeat = self.store.get(key).decode() if self.store.check([key]) else ""
        if rank not in self._heartbeats or self._heartbeats[rank][0] != heartbeat:
            self._heartbeats[rank] = heartbeat, time.monotonic()

    def _check_heartbeats(self) -> None:
        last_check = time.monotonic()
        while not self._closed.wait(HEARTBEAT_SECONDS):
            now = time.monotonic()
            if now - last_check > self.timeout_seconds:
                # This process was itself stopped, and perhaps all were: nobody is to blame.
                self._store_answered = now
                self._heartbeats = {}
            last_check = now
            if os.getppid() != self.launcher_pid:
                self._end_process("the launcher of this process is gone")
            if now - self._store_answered > self.timeout_seconds:
                address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
                self._end_process(
                    f"torchrun's store at {address} has not answered for {self.timeout_seconds:.0f} s"
                    f"{self._store_error}"
                )
            if self._other_reported is not None and now - self._other_reported > LINGER_SECONDS:
                # The main thread may be blocked in a collective with a rank that waits for the lost one.
                os._exit(1)
            missing = self._describe(self._stale_ranks(self.timeout_seconds))
            if missing and self._other_reported is None and not self._reports:
                self._end_process(f"{missing} for {self.timeout_seconds:.0f} s: it hangs, was stopped, or was cut off")

    def _stale_ranks(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, changed) in sorted(self._heartbeats.items()) if now - changed > seconds]

    def _describe(self, ranks: list[int]) -> str:
        if not ranks:
            return ""
        names = []
        for rank in ranks[:3]:
            heartbeat, _ = self._heartbeats[rank]
            _, _, name = heartbeat.partition(" ")
            names.append(f"rank {rank} ({name})")
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return f"no heartbeat from {', '.join(names)}{more}"

    def _end_process(self, cause: str) -> None:
        """Exit from the watchdog thread: the main thread is blocked in a collective. Saved checkpoints stay."""
        if self.claim_report():
            with contextlib.suppress(OSError):
                print(f"error: {LOST}: {cause}; continue with --resume", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * HEARTBEAT_SECONDS)  # let the reporting rank print before torchrun ends the rest
        os._exit(1)
