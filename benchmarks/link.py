"""The link between processes of this machine, and what `llm.scale.predict` makes of it: see benchmarks/scale.py.

The link is gloo's on loopback: two processes all-reduce messages of several sizes, and 2 (N - 1) hops of latency and
2 (N - 1) / N S bytes of bandwidth are fitted to the medians of the smallest and of one as large as a bucket of
gradients; the others show how far that holds. `predicted` turns it, and the tokens a second of one process with its
share of the threads, into tokens a second of N; `errors` compares.

    python -m benchmarks.link [--nproc 2] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from llm.config import TrainConfig
from llm.plan.clusters import BUCKET, Parallel, predict

SIZES = (*(2**power for power in range(10, 25, 2)), BUCKET, 2**26)  # bytes of a message: 1 KiB to 64 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in this process, below torchrun
    args = parser.parse_args()
    if args.one:
        time_messages()
        return
    timed = measured(args.nproc)
    bandwidth, latency = fitted(timed, args.nproc)
    print(f"{'bytes':>12}{'ms':>10}{'fitted':>10}")
    for size, seconds in timed:
        print(f"{size:>12,}{1e3 * seconds:>10.3f}{1e3 * ring(size, args.nproc, bandwidth, latency):>10.3f}")
    print(f"{args.nproc} processes, gloo on loopback: {bandwidth / 1e9:.3g} GB/s, {latency * 1e6:.3g} us a hop")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"messages": timed, "bandwidth": bandwidth, "latency": latency}, file, indent=2)


def predicted(
    config: TrainConfig,
    counts: Sequence[int],
    rate_of_one: float,
    bandwidth: float,
    latency: float,
    parallel: Parallel = "ddp",
    size: int = 4,
    update: float = 0.0,
) -> dict[int, float]:
    """Tokens a second of so many processes, by their number; `rate_of_one` and `update` as in
    `llm.plan.clusters.predict`.
    """
    measured = rate_of_one, bandwidth, latency
    return {
        count: predict(config, count, *measured, parallel, size=size, update=update).tokens_per_second
        for count in counts
    }


def errors(said: dict[int, float], taken: dict[int, float]) -> dict[int, float]:
    """(predicted - taken) / taken, by number of processes, of those that were measured."""
    return {count: said[count] / rate - 1 for count, rate in taken.items()}


def ring(size: float, nproc: int, bandwidth: float, latency: float) -> float:
    """Seconds of an all-reduce of so many bytes."""
    return 2 * (nproc - 1) * (latency + size / nproc / bandwidth)


def fitted(timed: Sequence[tuple[int, float]], nproc: int) -> tuple[float, float]:
    """Bandwidth (bytes a second) and latency (seconds a hop) through the smallest of (bytes, seconds) and the one of a
    BUCKET."""
    hops = 2 * (nproc - 1)
    small, least = min(timed)
    bandwidth = hops / nproc * (BUCKET - small) / (dict(timed)[BUCKET] - least)
    return bandwidth, least / hops - small / nproc / bandwidth


def measured(nproc: int) -> list[tuple[int, float]]:
    """(bytes, seconds) of all-reduces between processes that torchrun starts, one thread each."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    shown = subprocess.run(
        [*run, "-m", "benchmarks.link", "--one"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [(size, seconds) for size, seconds in json.loads(shown.stdout.splitlines()[-1])]


def time_messages() -> None:
    """The median seconds of an all-reduce of each of SIZES, printed by the first process as JSON."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found: list[Any] = []
    for size in SIZES:
        message, times = torch.ones(size // 4), []
        for _ in range(max(10, min(300, 2**29 // size // 10))):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(message)
            times.append(time.perf_counter() - start)
        found.append((size, statistics.median(times[3:])))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
