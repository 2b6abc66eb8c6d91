"""Heartbeats in the store of torchrun: a collective does not say which rank keeps it waiting."""

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

BEAT = 1.0  # seconds between the signs of life of a process


SILENCE = 60.0  # seconds without one after which the job ends, unless LOSSCURVE_SILENCE says otherwise


PARTING = 6 * BEAT  # for which processes that are left go on beating, so that the one that is gone can be told


STORE_WAIT = 30  # seconds for an answer of torchrun's store


LOST = "the processes of the run lost each other"


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


def _store(leads: bool = False) -> Any:
    """A connection to torchrun's store, in which the processes can say what they cannot say to each other.

    The launcher keeps it; where it does not, the leading process does. It takes one call at a time.
    """
    keeps = leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where, wait = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), datetime.timedelta(seconds=STORE_WAIT)
    return dist.TCPStore(*where, is_master=keeps, wait_for_workers=False, timeout=wait)  # type: ignore[attr-defined]


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
