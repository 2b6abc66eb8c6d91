"""What benchmarks/gpu.py prints: a table of the sides, the optimizer's part of a step, and its kernels by kind."""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llm.training.parts import Parts

KINDS = {  # the first pattern that a kernel's name matches decides
    "attention": "flash|fmha|attention|cudnn.*sdpa",
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas|mm$|linear$",
    "optimizer": "multi_tensor|foreach|fused_adam|lerp",
    "compiled by torch.compile": "^triton_",
    "copies and fills": "memcpy|memset|copy|fill",
    "sums, exponentials, softmax": "exp|reduce|softmax|sum",
    "index and sort": "index|sort|embedding|gather|scatter",
    "other": "",
}
LONGEST = 40  # kernels that are listed by name


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table of the sides."""
    first = rows[0]
    shape = f"{first['parameters'] / 1e6:.1f} M parameters, {first['batch_size']} x {first['block_size']}"
    print(f"{first['preset']}: {shape}, {first['text']}; {first['device']}, torch {first['torch']},")
    print(f"  {first['matrix_rate'] / 1e12:.2f} TFLOP/s in a bfloat16 product")
    print(f"{'side':<19}{'tokens/s':>11}{'spread':>22}{'ms':>8}{'of rate':>8}", end="")
    print(f"{'GiB':>7}{'plan':>7}{'update':>8}{'ready':>7}")
    for found in rows:
        if found["failed"]:
            print(f"{found['side']:<19}FAILED {found['failed']}")
            continue
        spread = f"{found['low']:,.0f}-{found['high']:,.0f}"
        planned = "" if found["planned_gib"] is None else f"{found['planned_gib']:.2f}"
        update = f"{found['update_ms']:.1f}" if "update_ms" in found else ""
        print(
            f"{found['side']:<19}{found['tokens_per_second']:>11,.0f}{spread:>22}{found['step_ms']:>8.1f}"
            f"{found['utilisation']:>8.1%}{found['peak_gib']:>7.2f}{planned:>7}{update:>8}{found['ready_seconds']:>6.0f}s"
        )
    for found in rows:
        if "trained_loss" in found:
            steps, seconds = found["trained_steps"], found["trained_seconds"]
            print(f"{found['side']}: loss {found['trained_loss']:.4f} after {steps} steps, {seconds:.0f} s of training")


def update_seconds(parts: Parts, run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of the optimizer in the steps of `run`, with the device idle before it."""
    times: list[float] = []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    plain = parts.optimizer.step

    def timed(*arguments: Any) -> None:
        wait()
        start = time.perf_counter()
        plain(*arguments)
        wait()
        times.append(time.perf_counter() - start)

    parts.optimizer.step = timed  # type: ignore[method-assign, assignment]
    run()
    parts.optimizer.step = plain  # type: ignore[method-assign]
    return statistics.median(times)


def write_profile(run: Callable[[], object], steps: int, step_seconds: float, file: Path) -> None:
    """Print the milliseconds of a step by kind of kernel, and write them and the longest kernels to `file`.

    `run` makes `steps` steps and waits for the device. `step_seconds`: of a step without the profiler. Without a GPU,
    the operations on the CPU are listed.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        run()
    times: dict[str, float] = {}  # name: milliseconds a step
    for event in profiler.key_averages():
        on_device = event.device_type == DeviceType.CUDA
        if event.is_user_annotation:  # such as a step of the optimizer: it spans kernels that are listed themselves
            continue
        if on_device == torch.cuda.is_available():
            spent = event.self_device_time_total if on_device else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + spent / 1000 / steps
    by_kind = dict.fromkeys(KINDS, 0.0)
    for name, spent in times.items():
        by_kind[next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))] += spent
    by_kind["no kernel at work"] = max(0.0, 1000 * step_seconds - sum(times.values()))
    lines = [f"a step of {1000 * step_seconds:.1f} ms"]
    lines += [f"  {kind:<28}{spent:8.2f} ms {spent / 1000 / step_seconds:5.0%}" for kind, spent in by_kind.items()]
    print("\n".join(lines))
    longest = sorted(times.items(), key=lambda item: -item[1])[:LONGEST]
    lines += ["", *(f"{spent:9.3f} ms  {name[:160]}" for name, spent in longest)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
