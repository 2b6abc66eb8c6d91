"""Compare the throughput of training steps on a GPU, and their share of the GPU's measured rate of matrix products.

For each preset: ours, ours with --compile, and the chapter's plain loop, in float32 and under bfloat16 autocast; each
in a process of its own, in turn, round after round. A side that does not fit in the GPU's memory is reported as such.

    python -m benchmarks.gpu [--presets chapter,gpt2-124m] [--batch_size 32] [--rounds 3] [--steps 20] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.step import plain_batch, settings_of

SIDES = ("plain", "plain-bf16", "ours", "ours-compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="chapter,gpt2-124m")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a side in a round, after 5 untimed")
    parser.add_argument("--device", default="cuda", help="cpu only tries the program out")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("PRESET", "SIDE"), help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.one:
        preset, side = args.one
        print(json.dumps(measure(preset, side, args.batch_size, args.steps, args.device)))
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for preset in args.presets.split(","):
            for side in args.sides.split(","):
                found.setdefault((preset, side), []).append(measure_in_process(preset, side, args))
    rows = [summarize(preset, side, runs) for (preset, side), runs in found.items()]
    print_rows(rows)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def measure_in_process(preset: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure` does, from a process of its own."""
    flags = ["--batch_size", str(args.batch_size), "--steps", str(args.steps), "--device", args.device]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *flags, "--one", preset, side],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout)  # type: ignore[no-any-return]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table of the sides, and the GPU's rate of matrix products."""
    print(f"{'preset':<22}{'side':<15}{'tokens/s':>12}{'spread':>22}{'of matrix rate':>16}{'peak GiB':>10}{'loss':>9}")
    for row in rows:
        if row["failed"]:
            print(f"{row['preset']:<22}{row['side']:<15}  {row['failed']}")
            continue
        spread = f"{row['low']:,.0f}-{row['high']:,.0f}"
        print(
            f"{row['preset']:<22}{row['side']:<15}{row['tokens_per_second']:>12,.0f}{spread:>22}"
            f"{row['matmul_utilisation']:>16.1%}{row['peak_gib']:>10.2f}{row['loss']:>9.4f}"
        )
    succeeded = [row for row in rows if not row["failed"]]
    if succeeded:
        rate = max(row["matrix_rate"] for row in succeeded)
        print(f"{succeeded[0]['device']}: {rate / 1e12:.1f} TFLOP/s in a bfloat16 product")


def summarize(preset: str, side: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of one side over the rounds."""
    failed = next((run["failed"] for run in runs if run["failed"]), None)
    if failed:
        return {"preset": preset, "side": side, "failed": failed}
    rates = sorted(run["tokens_per_second"] for run in runs)
    median = statistics.median(rates)
    matrix_rate = max(run["matrix_rate"] for run in runs)
    return {
        "preset": preset,
        "side": side,
        "failed": None,
        "device": runs[0]["device"],
        "tokens_per_second": median,
        "low": rates[0],
        "high": rates[-1],
        "matrix_rate": matrix_rate,
        "matmul_utilisation": median * runs[0]["flops_per_token"] / matrix_rate,
        "peak_gib": max(run["peak_gib"] for run in runs),
        "loss": runs[0]["loss"],
    }


def measure(preset: str, side: str, batch_size: int, steps: int, device_name: str) -> dict[str, Any]:
    """Measure one side in this process: the tokens per second of all `steps` together.

    The host waits for the device only after the last step.
    """
    import numpy as np
    import torch

    from llm.config import from_settings, to_settings
    from llm.config.counts import flops_per_token
    from llm.machine.device import describe_device, matrix_rate

    changes = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "compile": side == "ours-compiled"}
    config = from_settings(to_settings(settings_of(preset)) | changes)
    device = torch.device(device_name)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 2_000_000).astype(np.uint16)
    torch.manual_seed(config.seed)
    make_step = ours if side.startswith("ours") else plain
    try:
        step = make_step(config, tokens, device, side)
        for number in range(5):
            loss = step(number)
        loss.item()
        start = time.perf_counter()
        for number in range(steps):
            loss = step(5 + number)
        last_loss = loss.item()
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return {"failed": f"out of memory at batch {batch_size}"}
    return {
        "failed": None,
        "device": describe_device(device, torch.bfloat16),
        "tokens_per_second": steps * config.tokens_per_step / seconds,
        "matrix_rate": matrix_rate(device, torch.bfloat16),
        "flops_per_token": flops_per_token(config.model),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan"),
        "loss": last_loss,
    }


def ours(config: Any, tokens: Any, device: Any, side: str) -> Callable[[int], Any]:
    """Return our step; it returns the loss as a tensor."""
    from pathlib import Path

    import torch

    from llm.data import TokenData
    from llm.start.build import build, compile_forward
    from llm.train import train_step

    data = TokenData(Path(), tokens, tokens, config.model.vocab_size, True, "random", {})
    parts = build(config, data, None, device, torch.bfloat16)
    parts.model.train()
    if config.compile:
        compile_forward(parts, lambda reason: print(reason, file=sys.stderr))
    return lambda number: train_step(parts, number).loss


def plain(config: Any, tokens: Any, device: Any, side: str) -> Callable[[int], Any]:
    """Return a step of the chapter's loop: all logits at once, PyTorch's cross-entropy, its default AdamW."""
    import torch

    from llm import GPT

    model = GPT(config.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.max_lr, betas=(config.beta1, config.beta2))

    def step(number: int) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = config.max_lr * min(1.0, number / 100)
        x, y = (ids.to(device) for ids in plain_batch(config, tokens))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=side == "plain-bf16"):
            logits, _ = model(x)
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
