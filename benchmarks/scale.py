"""Training in several processes on this machine: speed, share of communication, overlap, and what one process pays.

Every job runs in processes of its own with one thread each, in turn with the others, and times the same steps:

    plain   one process, without torchrun
    one     the same below torchrun, which is to cost nothing
    ddp, fsdp   N processes that share the windows of a step

Beside each timed step of ddp goes one whose gradients stay where they are: the difference is what the exchange costs
in the end. A trace of one step shows how much of the exchange lies within backward, and that accumulation exchanges
with its last micro-batch only.

Last comes what llm/scale.py predicts from the plain loop and the link between the processes, measured in the same run.

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

from benchmarks.link import fitted, measured, predicted
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
        work(args.job, args.preset, args.steps, args.trace)
        return
    jobs = {"plain": 0, "one": 1, "ddp": args.nproc, "fsdp": args.nproc}
    found: dict[str, list[dict[str, Any]]] = {job: [] for job in jobs}
    for _ in range(args.rounds):
        for job, nproc in jobs.items():
            found[job].append(start(job, nproc, args))
    median = {job: statistics.median(ms for run in runs for ms in run["ms"]) for job, runs in found.items()}
    tokens = settings_of(args.preset).tokens_per_step
    print(f"{'job':<8}{'processes':>10}{'ms a step':>11}{'tokens/s':>10}{'speed-up':>10}{'efficiency':>12}")
    for job, nproc in jobs.items():
        ratio, processes = median["plain"] / median[job], max(1, nproc)
        shown = f"{tokens / median[job] * 1000:>10,.0f}{ratio:>10.2f}{ratio / processes:>12.1%}"
        print(f"{job:<8}{processes:>10}{median[job]:>11.1f}{shown}")
    alone = statistics.median(ms for run in found["ddp"] for ms in run["ms_without_exchange"])
    facts = {key: statistics.median(run[key] for run in found["ddp"]) for key in found["ddp"][0] if "ms" not in key}
    print(f"one process below torchrun: {median['one'] / median['plain'] - 1:+.1%}")
    print(f"ddp without the exchange: {alone:.1f} ms; the exchange adds {1 - alone / median['ddp']:.1%} of a step")
    print(f"of {1000 * facts['exchange']:.0f} ms of exchange, {facts['within_backward']:.0%} lies within backward")
    print(f"exchanges of a step: {facts['exchanges']:.0f}; accumulating 4 micro-batches {facts['accumulated']:.0f}")
    bandwidth, latency = fitted(measured(args.nproc), args.nproc)
    config, rate = settings_of(args.preset), 1000 * tokens / median["plain"]
    print(f"link: {bandwidth / 1e9:.3g} GB/s, {1e6 * latency:.0f} us a hop")
    for job in ("ddp", "fsdp"):
        said = predicted(config, [args.nproc], rate, bandwidth, latency, job, size=2)[args.nproc]
        taken = 1000 * tokens / median[job]
        print(f"{job}: predicted {said:,.0f} tokens/s, took {taken:,.0f}: {said / taken - 1:+.0%}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"median_ms": median, "ddp": facts, "runs": found}, file, indent=2)


def start(job: str, nproc: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the first process of a job measured."""
    words = ["-m", "benchmarks.scale", "--job", job, "--preset", args.preset, "--steps", str(args.steps)]
    words += ["--trace", args.trace] if args.trace else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.run([sys.executable, *torchrun, *words], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(shown.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def work(job: str, preset: str, steps: int, trace: str | None) -> None:
    """One process of a job; the first prints what it measured."""
    from llm.machine.rendezvous import init_distributed

    with init_distributed() as world:
        found = measure(world, job, preset, steps, trace)
        if world.leads:
            print(json.dumps(found))


def measure(world: Any, job: str, preset: str, steps: int, trace: str | None) -> dict[str, Any]:
    """Milliseconds of each of `steps` steps on random tokens; for ddp also the facts of its exchange."""
    import dataclasses

    import numpy as np

    from llm.data import TokenData
    from llm.machine.device import choose_device, choose_dtype
    from llm.start.build import build, connect
    from llm.train import train_step

    config = dataclasses.replace(settings_of(preset), parallel="fsdp" if job == "fsdp" else "ddp")
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 300_000).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, config.model.vocab_size, True, "random", {})
    device = choose_device("cpu")
    parts = build(config, data, None, device, choose_dtype("auto", device), world)
    connect(parts, print)
    parts.model.train()
    exchanged = parts.exchange
    ms: dict[bool, list[float]] = {True: [], False: []}
    order = [True, True] + [True, False][: 2 if job == "ddp" else 1] * steps
    for number, exchange in enumerate(order):
        parts.exchange = exchanged if exchange else (lambda last: exchanged(False))
        world.gather(None)
        start = time.perf_counter()
        train_step(parts, number).loss.item()
        ms[exchange].append(1000 * (time.perf_counter() - start))
    found: dict[str, Any] = {"ms": ms[True][2:]}
    if job == "ddp":
        parts.exchange = exchanged
        facts = traced(parts, trace)
        few = {"batch_size": config.batch_size // 4, "gradient_accumulation_steps": 4}
        parts.config = dataclasses.replace(config, **few)
        facts["accumulated"] = traced(parts, None)["exchanges"]
        found |= {"ms_without_exchange": ms[False], **facts}
    return found


def traced(parts: Any, trace: str | None) -> dict[str, float]:
    """Of one step: the gradients' exchanges, their seconds, and the share of these that lies within backward."""
    from torch.profiler import ProfilerActivity, profile

    from llm.train import train_step

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train_step(parts, 0).loss.item()
    if trace and parts.world.leads:
        profiled.export_chrome_trace(trace)
    events = profiled.events() or []
    spans = [(e.time_range.start, e.time_range.end) for e in events if e.name == "gloo:all_reduce"]
    backward = [e.time_range for e in events if e.name.startswith("autograd::engine::evaluate_function")]
    first, last = min(span.start for span in backward), max(span.end for span in backward)
    gradients = [(start, end) for start, end in spans if first <= start <= last]
    seconds = sum(end - start for start, end in gradients) / 1e6
    within = sum(min(end, last) - start for start, end in gradients) / 1e6
    return {"exchanges": len(gradients), "exchange": seconds, "within_backward": within / seconds if seconds else 0.0}


if __name__ == "__main__":
    main()
