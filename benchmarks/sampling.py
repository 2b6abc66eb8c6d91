"""Compare the throughput of sampling: the chapter's plain loop, and ours, at the chapter's sizes with random weights.

The plain loop computes the whole window for every token. "fits" is measured while the text fits the context of 64
tokens. "slides" is measured on 200 tokens: for most of them the window has moved on, so it is computed again for each.

    python -m benchmarks.sampling [--rounds 3]
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

from llm import GPT, GPTConfig
from llm.generate import generate
from llm.machine.device import choose_dtype, keep_memory, precision

CPU = torch.device("cpu")
KNOBS: dict[str, dict[str, int]] = {"temperature 1": {}, "top-k 50": {"top_k": 50}, "greedy": {"temperature": 0}}
TOKENS = {"fits": 60, "slides": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    keep_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    sides = make_sides(model)
    found: dict[str, list[float]] = {label: [] for label in sides}
    for _ in range(rounds):
        for label, side in sides.items():
            found[label].append(side())
    reference = statistics.median(next(iter(found.values())))
    print(f"{'':<56}{'tokens/s':>10}{'spread':>14}{'ratio':>8}")
    for label, rates in found.items():
        median = statistics.median(rates)
        spread = f"{min(rates):.0f}-{max(rates):.0f}"
        print(f"{label:<56}{median:>10.0f}{spread:>14}{median / reference:>7.1f}x")


def make_sides(model: GPT) -> dict[str, Callable[[], float]]:
    """Return the measurements by label; each returns tokens per second. The first is the reference."""
    sides: dict[str, Callable[[], float]] = {"plain loop, float32, slides": functools.partial(plain, model, 200)}
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", CPU))):
        dtype_name = str(dtype).removeprefix("torch.")
        for batch in (1, 32):
            for knob, settings in KNOBS.items():
                for name, count in TOKENS.items():
                    label = f"ours, {dtype_name}, batch {batch}, {knob}, {name}"
                    sides[label] = functools.partial(ours, model, dtype, batch, count, settings)
    return sides


@torch.no_grad()
def plain(model: GPT, count: int) -> float:
    """Return the tokens per second of the chapter's loop."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(count):
        logits, _ = model(ids[:, -model.config.block_size :])
        assert logits is not None
        token = torch.multinomial(torch.softmax(logits[:, -1], 1), 1)
        ids = torch.cat([ids, token], 1)
    return count / (time.perf_counter() - start)


def ours(model: GPT, dtype: torch.dtype, batch: int, count: int, knobs: dict[str, int]) -> float:
    """Return the tokens per second of our loop, over all samples of the batch."""
    prompt = torch.zeros(batch, 4, dtype=torch.int64)
    start = time.perf_counter()
    with precision(dtype, CPU):
        for _ in generate(model, prompt, count, **knobs):  # type: ignore[arg-type]
            pass
    return batch * count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
