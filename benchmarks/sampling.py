"""Tokens a second of sampling: the chapter's plain loop, and ours, at the chapter's sizes with untrained weights.

The plain loop runs the whole window for every token. "fits" is measured while the text fits the context of 64
tokens, "slides" on 200 tokens, most of them after the window has begun to slide, which has it computed anew for each.

    python -m benchmarks.sampling [--rounds 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llm import GPT, GPTConfig
from llm.generate import generate
from llm.machine.device import choose_dtype, keep_memory, precision

CPU = torch.device("cpu")
KNOBS: dict[str, dict[str, int]] = {"temperature 1": {}, "top-k 50": {"top_k": 50}, "greedy": {"temperature": 0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    keep_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    default = choose_dtype("auto", CPU)
    sides: dict[str, Callable[[], float]] = {"plain loop, float32, slides": lambda: plain(model, 200)}
    for dtype in dict.fromkeys((torch.float32, default)):
        for batch in (1, 32):
            for knob, settings in KNOBS.items():
                for name, count in (("fits", 60), ("slides", 200)):
                    label = f"ours, {str(dtype).removeprefix('torch.')}, batch {batch}, {knob}, {name}"
                    sides[label] = lambda d=dtype, b=batch, s=settings, c=count: ours(model, d, b, c, s)  # type: ignore[misc]
    found: dict[str, list[float]] = {label: [] for label in sides}
    for _ in range(rounds):
        for label, side in sides.items():
            found[label].append(side())
    reference = statistics.median(next(iter(found.values())))
    print(f"{'':<56}{'tokens/s':>10}{'spread':>14}{'ratio':>8}")
    for label, speeds in found.items():
        middle, spread = statistics.median(speeds), f"{min(speeds):.0f}-{max(speeds):.0f}"
        print(f"{label:<56}{middle:>10.0f}{spread:>14}{middle / reference:>7.1f}x")


@torch.no_grad()
def plain(model: GPT, count: int) -> float:
    """Tokens a second of the chapter's loop."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(count):
        logits, _ = model(ids[:, -model.config.block_size :])
        assert logits is not None
        ids = torch.cat([ids, torch.multinomial(torch.softmax(logits[:, -1], 1), 1)], 1)
    return count / (time.perf_counter() - start)


def ours(model: GPT, dtype: torch.dtype, batch: int, count: int, knobs: dict[str, int]) -> float:
    """Tokens a second, of all samples of the batch together."""
    prompt = torch.zeros(batch, 4, dtype=torch.int64)
    start = time.perf_counter()
    with precision(dtype, CPU):
        for _ in generate(model, prompt, count, **knobs):  # type: ignore[arg-type]
            pass
    return batch * count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
