"""Measure the link between processes of this machine, and predict the throughput of N processes from it.

The link is gloo on loopback: two processes all-reduce messages of several sizes. 2 (N - 1) hops of latency and
2 (N - 1) / N S bytes of bandwidth are fitted to the medians of the smallest message and of one as large as a bucket of
gradients; the other sizes show how far the fit holds. `predicted` turns the link, and the throughput of one process
with its share of the threads, into the throughput of N processes; `errors` compares it with measurements. See
benchmarks/scale.py.

    python -m benchmarks.link [--nproc 2] [--json FILE]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from llm.config import TrainConfig
from llm.plan.accelerators import Accelerator, Link
from llm.plan.clusters import Parallel, Prediction, Speed
from llm.plan.clusters import predicted as predict_step
from llm.plan.collectives import BUCKET

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
    timed = measure_link(args.nproc)
    bandwidth, latency = fit_link(timed, args.nproc)
    print(f"{'bytes':>12}{'ms':>10}{'fitted':>10}")
    for size, seconds in timed:
        fitted = ring_seconds(size, args.nproc, bandwidth, latency)
        print(f"{size:>12,}{1e3 * seconds:>10.3f}{1e3 * fitted:>10.3f}")
    print(f"{args.nproc} processes, gloo on loopback: {bandwidth / 1e9:.3g} GB/s, {latency * 1e6:.3g} us a hop")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"messages": timed, "bandwidth": bandwidth, "latency": latency}, file, indent=2)


def predict_from_measurements(
    config: TrainConfig,
    nproc: int,
    rate_of_one: float,
    bandwidth: float,
    latency: float,
    parallel: Parallel = "ddp",
    overlap: float = 0.0,
    itemsize: int = 4,
    update: float = 0.0,
) -> Prediction:
    """Return the prediction of a step from measurements of `nproc` processes that are all in one node.

    Args:
        rate_of_one: tokens per second of one process while the others run too (on a CPU: with its share of the threads)
        bandwidth: bytes per second of the link between two processes
        latency: seconds per hop of that link
        overlap: share of the backward pass that messages overlap with
        itemsize: bytes of a number in the matrix products
        update: seconds of the optimizer's update in one process; 0 counts it as work that is shared, like the rest
    """
    link = Link(bandwidth, latency)
    measured = Accelerator("measured", 0.0, 0.0, math.inf, link, link, "measured", per_node=nproc, overlap=overlap)
    speed = Speed(1 / rate_of_one - update / config.tokens_per_step, update)
    return predict_step(config, nproc, parallel, measured, speed, itemsize)


def predict_throughput(
    config: TrainConfig,
    counts: Sequence[int],
    rate_of_one: float,
    bandwidth: float,
    latency: float,
    parallel: Parallel = "ddp",
    itemsize: int = 4,
    update: float = 0.0,
) -> dict[int, float]:
    """Return the tokens per second for each number of processes in `counts`.

    The other arguments are those of `predict_from_measurements`.
    """
    found = {}
    for count in counts:
        step = predict_from_measurements(
            config, count, rate_of_one, bandwidth, latency, parallel, itemsize=itemsize, update=update
        )
        found[count] = step.tokens_per_second
    return found


def errors(predicted: dict[int, float], measured: dict[int, float]) -> dict[int, float]:
    """Return (predicted - measured) / measured for each number of processes that was measured."""
    return {count: predicted[count] / rate - 1 for count, rate in measured.items()}


def ring_seconds(size: float, nproc: int, bandwidth: float, latency: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes."""
    return 2 * (nproc - 1) * (latency + size / nproc / bandwidth)


def fit_link(timed: Sequence[tuple[int, float]], nproc: int) -> tuple[float, float]:
    """Return the bandwidth (bytes per second) and the latency (seconds per hop) of the link.

    They are fitted to two of `timed`, which are (bytes, seconds): the smallest message and that of a BUCKET.
    """
    hops = 2 * (nproc - 1)
    small, small_seconds = min(timed)
    bucket_seconds = dict(timed)[BUCKET]
    bandwidth = hops / nproc * (BUCKET - small) / (bucket_seconds - small_seconds)
    return bandwidth, small_seconds / hops - small / nproc / bandwidth


def measure_link(nproc: int) -> list[tuple[int, float]]:
    """Return (bytes, seconds) of all-reduces between processes that torchrun starts, with one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    finished = subprocess.run(
        [*torchrun, "-m", "benchmarks.link", "--one"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    last_line = finished.stdout.splitlines()[-1]
    return [(size, seconds) for size, seconds in json.loads(last_line)]


def time_messages() -> None:
    """Time an all-reduce of each of SIZES; the first process prints the median seconds as JSON."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found: list[Any] = []
    for size in SIZES:
        message = torch.ones(size // 4)
        times = []
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
