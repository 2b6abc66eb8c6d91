"""Compare whole steps by shape: the chapter's GPT and a llama, both of plain operations and with fused blocks.

Each round measures the matrix rate and then every side in turn, in this process. Prints medians in milliseconds, the
GFLOP/s of the model's products, their share of the rate, and the optimizer's share of the step.

    python -m benchmarks.blocks [--rounds 5] [--steps 10] [--shapes 4x128x128x16x1024,...]

A shape: layers x width x block_size x windows x vocabulary; with the heads that `train --time` gives it.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.config import from_settings
from llm.config.counts import flops_per_token
from llm.data import TokenData
from llm.machine.device import choose_dtype, matrix_rate
from llm.plan.rule import heads
from llm.start.build import build
from llm.train import train_step

SHAPES = "4x128x64x12x65,4x128x128x16x1024,5x160x256x12x1024,6x192x256x12x1024,6x384x256x12x1024"
SIDES: dict[str, dict[str, Any]] = {
    "gpt2, plain": {"arch": "gpt2"},
    "gpt2, fused": {"arch": "gpt2"},
    "gpt2, fused, dropout": {"arch": "gpt2", "dropout": 0.1},
    "llama, plain": {"arch": "llama"},
    "llama, fused": {"arch": "llama"},
    "llama, fused, Muon": {"arch": "llama", "optimizer": "muon"},
    "llama, fused, dropout": {"arch": "llama", "dropout": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a side in a round, after 2 untimed")
    parser.add_argument("--shapes", default=SHAPES)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    dtype = choose_dtype("auto", cpu)
    for shape in args.shapes.split(","):
        sides = {name: parts_of(shape, more, dtype) for name, more in SIDES.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        updates: dict[str, list[float]] = {name: [] for name in sides}
        rates = []
        for number in range(args.rounds):
            matrix_rate.cache_clear()
            rates.append(matrix_rate(cpu, dtype))
            for name, parts in sides.items():
                type(parts.model.h[0]).may_fuse = "fused" in name
                measured = [timed_step(parts, number * args.steps + step) for step in range(2 + args.steps)][2:]
                times[name] += [whole for whole, _ in measured]
                updates[name] += [update for _, update in measured]
        rate = statistics.median(rates)
        print(f"{shape}: products at {rate / 1e9:.0f} GFLOP/s ({str(dtype).removeprefix('torch.')})")
        for name, parts in sides.items():
            seconds, update = statistics.median(times[name]), statistics.median(updates[name])
            reached = flops_per_token(parts.config.model) * parts.config.tokens_per_step / seconds
            print(
                f"  {name:<22}{1e3 * seconds:8.1f} ms ({1e3 * min(times[name]):.1f} to {1e3 * max(times[name]):.1f}) "
                f"{reached / 1e9:6.0f} GFLOP/s {reached / rate:5.0%}, optimizer {update / seconds:4.0%}",
                flush=True,
            )


def parts_of(shape: str, more: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return the parts of a run of a shape on random tokens."""
    n_layer, width, block_size, windows, vocabulary = map(int, shape.split("x"))
    settings = {"n_layer": n_layer, "n_embd": width, "n_head": heads(width, {}), "block_size": block_size}
    settings |= {"batch_size": windows, "vocab_size": vocabulary, "warmup_steps": 0} | more
    tokens = np.random.default_rng(0).integers(0, vocabulary, 300_000).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, vocabulary, True, "random", {})
    parts = build(from_settings(settings), data, None, torch.device("cpu"), dtype)
    parts.model.train()
    return parts


def timed_step(parts: Any, step: int) -> tuple[float, float]:
    """Return the seconds of a step, and those of its optimizer."""
    update = 0.0
    plain_step = parts.optimizer.step

    def step_optimizer(*arguments: Any) -> None:
        nonlocal update
        start = time.perf_counter()
        plain_step(*arguments)
        update = time.perf_counter() - start

    parts.optimizer.step = step_optimizer
    start = time.perf_counter()
    train_step(parts, step).loss.item()
    whole = time.perf_counter() - start
    parts.optimizer.step = plain_step
    return whole, update


if __name__ == "__main__":
    main()
