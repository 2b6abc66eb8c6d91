"""Device, precision, threads, memory and random state: what differs between machines."""

import ctypes
import functools
import math
import os
import platform
import re
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import UserError
from llm.machine import kernel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


RATE_SECONDS = 0.2  # after which no further product is measured


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device `name` means; "auto" is MPS, else CUDA, else CPU, as in the chapter. Of several processes on a machine
    each has a `local_rank`, and the CUDA device of that number.

    Raises UserError for a name that is not a device or a device that is not there.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name == "cuda":
        name = f"cuda:{local_rank}"
    elif local_rank is not None and name.startswith(("cuda:", "mps")):
        raise UserError(f"device = {name!r}: is one device, and there are several processes; give --device cuda or cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch("cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise UserError(f"device = {name!r}: expected auto, cpu, mps, cuda or cuda:N")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps': this machine has no Apple GPU that PyTorch can use; try --device auto")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UserError(f"device = {name!r}: PyTorch sees {count} CUDA devices here; try --device auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products; "auto" is bfloat16 where the device is fast at it, else float32.

    CUDA: bfloat16 from compute capability 8.0 on. CPU: bfloat16 if a probe of a few milliseconds
    shows its products clearly faster (AMX, AVX512-BF16). MPS: float32.
    Raises UserError for float16 where there is no loss scaling for it.
    """
    if name == "float16" and device.type == "mps":
        raise UserError("dtype = 'float16': not supported on mps here; use float32 or bfloat16")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _bf16_is_fast() else torch.float32


@functools.cache
def _bf16_is_fast() -> bool:
    # a product that the processor has no instructions for takes a second to be set up; on x86 they came after AVX-512
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # without hardware support a bf16 product is hundreds of times slower, so a small one goes first
    fp32, bf16 = _best_times(64, rounds=5)
    if bf16 > 20 * fp32 + 1e-3:
        return False
    fp32, bf16 = _best_times(256 if torch.get_num_threads() < 8 else 512, rounds=20)
    return bf16 * 1.4 < fp32  # AVX512-BF16 gives twice the speed and AMX far more


def _best_times(size: int, rounds: int) -> tuple[float, float]:
    """Return the seconds of a square product in float32 and in bfloat16, the best of `rounds`, measured in turn: under
    load most products are interrupted, and the longer ones more often.
    """
    squares = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for a in squares:
        torch.mm(a, a)  # sets up
    for _ in range(rounds):
        for number, a in enumerate(squares):
            start = time.perf_counter()
            torch.mm(a, a)
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0], best[1]


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of one square product here and now, the best of ten.

    What a step could reach if it were nothing but such products: model FLOP utilisation is counted against it. The
    size is chosen beforehand: one that depended on times would end with small products on a machine under load.
    """
    size = _measured_size(device, dtype)
    a = torch.ones(size, size, device=device, dtype=dtype)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 11 and (len(times) < 3 or time.perf_counter() - began < RATE_SECONDS):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])  # the first sets up


def _measured_size(device: torch.device, dtype: torch.dtype) -> int:
    """Return a size that keeps the device busy for some milliseconds: short enough to be left alone now and then."""
    if device.type == "cuda":
        return 8192 if torch.cuda.get_device_properties(device).multi_processor_count >= 64 else 4096
    if device.type == "cpu" and dtype == torch.float32:
        return 512 if torch.get_num_threads() < 8 else 1024
    if device.type == "cpu" and not (dtype == torch.bfloat16 and _bf16_is_fast()):
        return 128  # without instructions for it a larger one may take seconds
    return 1024


def precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to `dtype`; float32 is left as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def fast_products(device: torch.device) -> None:
    """Let float32 products of an NVIDIA card run in TF32: 10 bits of mantissa, several times the speed."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def onto(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """`array` on the device. A CUDA device fetches it by itself from pinned memory, and nothing waits for that."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_memory() -> None:
    """Let freed memory serve the next step instead of going back to the system.

    Handing out fresh pages costs more than the arithmetic done in them. glibc only; elsewhere the
    allocator is left as it is. Constants: M_MMAP_THRESHOLD = -3 (at most 32 MiB), M_TRIM_THRESHOLD = -1.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)
        libc.mallopt(-1, 2**31 - 1)


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """The device, precision and threads, in a few words."""
    precise = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device}), {precise}"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads), {precise}"
    return f"{device}, {precise}"


def environment() -> dict[str, Any]:
    """What a later reader needs to judge or repeat a run: versions, machine, threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "processes": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "compiler": kernel.compiler() is not None,
    }
