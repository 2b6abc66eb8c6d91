"""Measure training in several processes on this machine: speed, communication, overlap, and torchrun's own cost.

Every job runs in processes of its own with one thread each, in turn with the others, and times the same steps:

    plain   one process, without torchrun
    one     the same below torchrun, which should cost nothing
    ddp, fsdp   N processes that share the windows of a step

Each timed step of ddp is followed by one that does not all-reduce its gradients: the difference is what the all-reduce
costs. A trace of one step shows how much of it overlaps with the backward pass, and that gradient accumulation
all-reduces with its last micro-batch only.

At the end, llm/plan/clusters.py predicts the jobs from the plain loop and the link between the processes, measured in
the same run.

    python -m benchmarks.scale [--nproc 2] [--rounds 3] [--steps 6] [--preset chapter] [--trace FILE] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.link import fit_link, measure_link, predict_throughput
from benchmarks.step import settings_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a job in a round, after 2 untimed")
    parser.add_argument("--preset", default="chapter")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace of one step of the first process")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # one process of a job
    args = parser.parse_args()
    if args.job:
        run_job(args.job, args.preset, args.steps, args.trace)
        return
    processes_of = {"plain": 0, "one": 1, "ddp": args.nproc, "fsdp": args.nproc}  # 0: without torchrun
    found: dict[str, list[dict[str, Any]]] = {job: [] for job in processes_of}
    for _ in range(args.rounds):
        for job, nproc in processes_of.items():
            found[job].append(start_job(job, nproc, args))
    median_ms = {job: statistics.median(ms for run in runs for ms in run["ms"]) for job, runs in found.items()}
    tokens = settings_of(args.preset).tokens_per_step
    print_jobs(processes_of, median_ms, tokens)
    ddp_facts = print_communication(found["ddp"], median_ms)
    print_predictions(args.preset, args.nproc, median_ms, tokens)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"median_ms": median_ms, "ddp": ddp_facts, "runs": found}, file, indent=2)


def print_jobs(processes_of: dict[str, int], median_ms: dict[str, float], tokens: int) -> None:
    """Print a table of the jobs. `tokens`: tokens of a step."""
    print(f"{'job':<8}{'processes':>10}{'ms a step':>11}{'tokens/s':>10}{'speed-up':>10}{'efficiency':>12}")
    for job, nproc in processes_of.items():
        processes = max(1, nproc)
        speed_up = median_ms["plain"] / median_ms[job]
        rate = tokens / median_ms[job] * 1000
        timing = f"{median_ms[job]:>11.1f}{rate:>10,.0f}"
        print(f"{job:<8}{processes:>10}{timing}{speed_up:>10.2f}{speed_up / processes:>12.1%}")


def print_communication(ddp_runs: list[dict[str, Any]], median_ms: dict[str, float]) -> dict[str, float]:
    """Print what torchrun and the all-reduce cost; return the medians of the facts about the all-reduce."""
    without_exchange = statistics.median(ms for run in ddp_runs for ms in run["ms_without_exchange"])
    names = [name for name in ddp_runs[0] if "ms" not in name]
    facts = {name: statistics.median(run[name] for run in ddp_runs) for name in names}
    print(f"one process below torchrun: {median_ms['one'] / median_ms['plain'] - 1:+.1%}")
    print(
        f"ddp without the all-reduce: {without_exchange:.1f} ms; the all-reduce adds "
        f"{1 - without_exchange / median_ms['ddp']:.1%} of a step"
    )
    print(f"of {1000 * facts['exchange']:.0f} ms of all-reduce, {facts['within_backward']:.0%} is within backward")
    print(f"all-reduces of a step: {facts['exchanges']:.0f}; accumulating 4 micro-batches {facts['accumulated']:.0f}")
    return facts


def print_predictions(preset: str, nproc: int, median_ms: dict[str, float], tokens: int) -> None:
    """Measure the link, and print predicted and measured throughput of ddp and fsdp."""
    bandwidth, latency = fit_link(measure_link(nproc), nproc)
    print(f"link: {bandwidth / 1e9:.3g} GB/s, {1e6 * latency:.0f} us a hop")
    config = settings_of(preset)
    rate_of_one = 1000 * tokens / median_ms["plain"]
    for job in ("ddp", "fsdp"):
        predicted = predict_throughput(config, [nproc], rate_of_one, bandwidth, latency, job, itemsize=2)[nproc]
        measured = 1000 * tokens / median_ms[job]
        print(f"{job}: predicted {predicted:,.0f} tokens/s, took {measured:,.0f}: {predicted / measured - 1:+.0%}")


def start_job(job: str, nproc: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run a job in `nproc` processes below torchrun (0: in one, without it); return what its first process measured."""
    flags = ["-m", "benchmarks.scale", "--job", job, "--preset", args.preset, "--steps", str(args.steps)]
    if args.trace:
        flags += ["--trace", args.trace]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    finished = subprocess.run(
        [sys.executable, *torchrun, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    last_line = finished.stdout.splitlines()[-1]
    return json.loads(last_line)  # type: ignore[no-any-return]


def run_job(job: str, preset: str, steps: int, trace: str | None) -> None:
    """Be one process of a job; the first one prints what it measured."""
    from llm.machine.rendezvous import init_distributed

    with init_distributed() as world:
        found = measure(world, job, preset, steps, trace)
        if world.leads:
            print(json.dumps(found))


def measure(world: Any, job: str, preset: str, steps: int, trace: str | None) -> dict[str, Any]:
    """Return the milliseconds of each of `steps` steps on random tokens; for ddp also facts about its all-reduce."""
    import dataclasses

    import numpy as np

    from llm.data import TokenData
    from llm.machine.device import choose_device, choose_dtype
    from llm.start.build import build, connect

    config = dataclasses.replace(settings_of(preset), parallel="fsdp" if job == "fsdp" else "ddp")
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 300_000).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, config.model.vocab_size, True, "random", {})
    device = choose_device("cpu")
    parts = build(config, data, None, device, choose_dtype("auto", device), world)
    connect(parts, print)
    parts.model.train()
    if job != "ddp":
        ms, _ = time_steps(parts, [True, True] + [True] * steps)
        return {"ms": ms[2:]}
    with_exchange, without_exchange = time_steps(parts, [True, True] + [True, False] * steps)
    facts = trace_all_reduce(parts, trace)
    batch_size = config.batch_size // 4
    parts.config = dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=4)
    facts["accumulated"] = trace_all_reduce(parts, None)["exchanges"]
    return {"ms": with_exchange[2:], "ms_without_exchange": without_exchange, **facts}


def time_steps(parts: Any, order: list[bool]) -> tuple[list[float], list[float]]:
    """Run a step for each item of `order`, which says whether it exchanges its gradients.

    Returns the milliseconds of the steps with and of those without the exchange.
    """
    from llm.train import train_step

    exchange = parts.exchange
    with_exchange: list[float] = []
    without_exchange: list[float] = []
    for number, is_exchanged in enumerate(order):
        parts.exchange = exchange if is_exchanged else (lambda is_last: exchange(False))
        parts.world.gather(None)  # all processes start together
        start = time.perf_counter()
        train_step(parts, number).loss.item()
        ms = 1000 * (time.perf_counter() - start)
        (with_exchange if is_exchanged else without_exchange).append(ms)
    parts.exchange = exchange
    return with_exchange, without_exchange


def trace_all_reduce(parts: Any, trace: str | None) -> dict[str, float]:
    """Profile one step.

    Returns the number of gradient all-reduces, their seconds, and the share of these seconds within the backward pass.
    """
    from torch.profiler import ProfilerActivity, profile

    from llm.train import train_step

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train_step(parts, 0).loss.item()
    if trace and parts.world.leads:
        profiled.export_chrome_trace(trace)
    events = profiled.events() or []
    spans = [(e.time_range.start, e.time_range.end) for e in events if e.name == "gloo:all_reduce"]
    backward = [e.time_range for e in events if e.name.startswith("autograd::engine::evaluate_function")]
    first = min(span.start for span in backward)
    last = max(span.end for span in backward)
    gradients = [(start, end) for start, end in spans if first <= start <= last]
    seconds = sum(end - start for start, end in gradients) / 1e6
    within = sum(min(end, last) - start for start, end in gradients) / 1e6
    return {"exchanges": len(gradients), "exchange": seconds, "within_backward": within / seconds if seconds else 0.0}


if __name__ == "__main__":
    main()
