"""How many processors this process may use: a container, a scheduler or taskset may leave it fewer than there are."""

import os
from pathlib import Path

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period


def processors() -> float:
    """Return the processors of this process: its affinity, or less if its container has a CPU quota, such as 1.5."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = float(found or 1)
    try:
        quota, period = CPU_LIMIT.read_text(encoding="ascii").split()
        return min(count, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return count


def cores(share_of: int = 1) -> int:
    """Return how many threads suit each of `share_of` processes that compute at the same time, at least 1."""
    return max(1, int(processors()) // share_of)
