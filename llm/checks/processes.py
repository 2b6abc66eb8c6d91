"""The processes of a rehearsal's job: which of them run, and a time limit for all."""

import contextlib
import subprocess
import time
from pathlib import Path

from llm.errors import Failure

TIME_LIMIT = 300.0  # seconds; a job takes a few, so one that takes longer hangs


def running_processes() -> dict[int, int]:
    """Return the parent's id of each process of this machine that has not ended, by its id."""
    if Path("/proc/self/stat").exists():  # Linux; a small container has no ps
        listed = _list_from_proc()
    else:
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="]
        listed = [line.split() for line in subprocess.check_output(command, text=True).splitlines()]
    # Z: a zombie, which has ended and was not waited for yet
    return {int(pid): int(parent) for pid, parent, state in listed if state[0] != "Z"}


def _list_from_proc() -> list[list[str]]:
    """Return [id, parent's id, state] of each process."""
    listed = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            after_name = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            state, parent = after_name.split()[:2]
            listed.append([path.parent.name, parent, state])
    return listed


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that `pid` started and that have not ended, in the order of their start."""
    return sorted(child for child, parent in running_processes().items() if parent == pid)


def check_time(began: float, who: str) -> None:
    """Raises Failure if more than TIME_LIMIT has passed since `began` (a time of `time.monotonic`)."""
    if time.monotonic() - began > TIME_LIMIT:
        raise Failure(f"{who} did not end in {TIME_LIMIT:.0f} s: something hangs, or this machine is very busy")
