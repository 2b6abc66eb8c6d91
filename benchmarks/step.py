"""Compare the seconds of a training step: ours, the chapter's plain loop, and a transformers GPT-2 in a plain loop.

Each round runs every side in a process of its own, one after the other, so that other work on the machine affects all
of them. Prints a table of medians and ratios, and the floor: the step's matrix products at the rate of a large product,
measured in the same run. --json FILE writes all of it.

    python -m benchmarks.step [--rounds 3] [--steps 5] [--preset chapter] [--sides plain,ours] [--json FILE]
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = ("plain", "reused", "transformers", "ours")  # reused: plain, with freed memory kept by the process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a side in a round, after 2 untimed")
    parser.add_argument("--preset", default="chapter")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one side, in this process
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.preset, args.steps)))
        return
    sides = args.sides.split(",")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rates: dict[str, float] = {}
    for _ in range(args.rounds):
        update_matrix_rates(rates)
        for side in sides:
            found[side].append(measure_in_process(side, args.preset, args.steps))
    update_matrix_rates(rates)
    rows = [summarize(side, found[side]) for side in sides]
    print_rows(rows)
    work = step_flops(args.preset)
    floors = {dtype: 1000 * work / rate for dtype, rate in rates.items()}
    for dtype, floor in floors.items():
        rate = f"{work / 1e9:.0f} GFLOP at {rates[dtype] / 1e9:.0f} GFLOP/s ({dtype})"
        print(f"floor: {rate}: {floor:.0f} ms, {rows[0]['median_ms'] / floor:.2f}x")
    if args.json:
        facts = {
            "floor_ms": floors,
            "matrix_flops_per_second": rates,
            "step_flops": work,
            "preset": args.preset,
            "machine": platform.processor() or platform.machine(),
            "rows": rows,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)


def measure_in_process(side: str, preset: str, steps: int) -> dict[str, Any]:
    """Return what `measure` does, from a process of its own."""
    flags = ["--side", side, "--preset", preset, "--steps", str(steps)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(finished.stdout)  # type: ignore[no-any-return]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table of the sides; the first one is the reference of the ratios."""
    reference = rows[0]["median_ms"]
    print(f"{'side':<14}{'ms a step':>10}{'spread':>14}{'ratio':>8}{'peak MiB':>10}{'loss':>9}")
    for row in rows:
        spread = f"{row['min_ms']:.0f}-{row['max_ms']:.0f}"
        ratio = f"{reference / row['median_ms']:.2f}x"
        print(
            f"{row['side']:<14}{row['median_ms']:>10.1f}{spread:>14}{ratio:>8}{row['peak_mib']:>10.0f}{row['loss']:>9.4f}"
        )


def update_matrix_rates(rates: dict[str, float]) -> None:
    """Measure a large product in float32 and in the precision that ours runs in; keep the best rate of each.

    `rates`: FLOP/s by dtype.
    """
    import torch

    from llm.machine.device import choose_dtype, matrix_rate

    cpu = torch.device("cpu")
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", cpu))):
        matrix_rate.cache_clear()
        name = str(dtype).removeprefix("torch.")
        rates[name] = max(rates.get(name, 0.0), matrix_rate(cpu, dtype))


def step_flops(preset: str) -> float:
    """Return the floating-point operations of the matrix products of one step."""
    from llm.config.counts import flops_per_token

    config = settings_of(preset)
    return float(flops_per_token(config.model) * config.tokens_per_step)


def settings_of(preset: str) -> Any:
    """Return the config of a preset with the vocabulary of its text."""
    from llm.config import from_settings, read_toml

    return from_settings(read_toml(preset) | {"vocab_size": 65 if "char" in preset else 50257})


def summarize(side: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median and the spread of one side over the rounds."""
    times = sorted(ms for run in runs for ms in run["ms"])
    return {
        "side": side,
        "median_ms": statistics.median(times),
        "min_ms": times[0],
        "max_ms": times[-1],
        "peak_mib": max(run["peak_mib"] for run in runs),
        "loss": runs[0]["loss"],
    }


def measure(side: str, preset: str, steps: int) -> dict[str, Any]:
    """Return the milliseconds of each of `steps` steps on random tokens, the peak memory and the last loss."""
    import numpy as np
    import torch

    config = settings_of(preset)
    vocab_size = config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, 300_000).astype(np.uint16)
    torch.manual_seed(config.seed)
    make_step = {"plain": plain, "reused": reused, "transformers": transformers, "ours": ours}[side]
    step = make_step(config, tokens)
    times = []
    loss = float("nan")
    for number in range(2 + steps):
        start = time.perf_counter()
        loss = step(number)
        times.append(1000 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": times[2:], "peak_mib": peak, "loss": loss}


def ours(config: Any, tokens: Any) -> Callable[[int], float]:
    """Return a step of this package: its own model, data, loss, optimizer and precision."""
    from pathlib import Path

    from llm.data import TokenData
    from llm.machine.device import choose_device, choose_dtype
    from llm.start.build import build
    from llm.train import train_step

    device = choose_device("cpu")
    data = TokenData(Path(), tokens, tokens, config.model.vocab_size, True, "random", {})
    parts = build(config, data, None, device, choose_dtype(config.dtype, device))
    parts.model.train()
    return lambda number: train_step(parts, number).loss.item()


def plain_batch(config: Any, tokens: Any) -> tuple[Any, Any]:
    """Return a batch of random windows, x and y (B, T), as the chapter draws it."""
    import numpy as np
    import torch

    block = config.model.block_size
    starts = torch.randint(len(tokens) - block - 1, (config.batch_size,))
    x = torch.stack([torch.from_numpy(tokens[i : i + block].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
    return x, y


def plain_loop(config: Any, tokens: Any, loss_of: Callable[[Any, Any], Any], parameters: Any) -> Callable[[int], float]:
    """Return a step of the chapter's loop, for any model and loss."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=config.max_lr, betas=(config.beta1, config.beta2))

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = config.max_lr * min(1.0, number / 100)
        loss = loss_of(*plain_batch(config, tokens))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def plain(config: Any, tokens: Any) -> Callable[[int], float]:
    """Return a step of the chapter's loop: all logits at once, PyTorch's cross-entropy, its default AdamW."""
    import torch

    from llm import GPT

    model = GPT(config.model)

    def loss_of(x: Any, y: Any) -> Any:
        logits, _ = model(x)
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))

    return plain_loop(config, tokens, loss_of, model.parameters())


def reused(config: Any, tokens: Any) -> Callable[[int], float]:
    """Return a step of the plain loop with freed memory kept by the process, and nothing else of ours."""
    from llm.machine.device import keep_memory

    keep_memory()
    return plain(config, tokens)


def transformers_model(shape: Any) -> Any:
    """Return a GPT-2 of the transformers package in the shape of a `GPTConfig`."""
    import transformers as peer

    return peer.GPT2LMHeadModel(
        peer.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            tie_word_embeddings=shape.tied_lm_head,
        )
    )


def transformers(config: Any, tokens: Any) -> Callable[[int], float]:
    """Return a step of the plain loop with a GPT-2 of the transformers package, of the same shape."""
    model = transformers_model(config.model)
    model.train()

    def loss_of(x: Any, y: Any) -> Any:
        import torch

        logits = model(x).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))

    return plain_loop(config, tokens, loss_of, model.parameters())


if __name__ == "__main__":
    main()
