"""What differs between machines: device, precision, threads, memory."""

import ctypes
import functools
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import Tensor

from llm.errors import UserError
from llm.machine import kernel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Without it, PyTorch refuses products on CUDA within `fixed_order`. It is read at the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RATE_SECONDS = 0.2  # after this time, `matrix_rate` starts no further product


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device that `name` means; "auto" is MPS, else CUDA, else CPU, as in the chapter.

    Each of several processes on a machine passes its `local_rank` and gets the CUDA device of that number.

    Raises: UserError for a name that is not a device and for a device that is absent.
    """
    if name == "auto":
        name = _best_device_name()
    if local_rank is not None and name == "cuda":
        name = f"cuda:{local_rank}"
    elif local_rank is not None and name.startswith(("cuda:", "mps")):
        raise UserError(
            f"device = {name!r}: is one device, and there are several processes; use --device cuda or --device cpu"
        )
    if not re.fullmatch("cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise UserError(f"device = {name!r}: expected auto, cpu, mps, cuda or cuda:N")
    kind, _, index = name.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps': this machine has no Apple GPU that PyTorch can use; try --device auto")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UserError(f"device = {name!r}: PyTorch sees {count} CUDA devices here; try --device auto")
    return torch.device(name)


def _best_device_name() -> str:
    if torch.backends.mps.is_available():
        return "mps"
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of matrix products; "auto" is bfloat16 where the device is fast at it, else float32.

    CUDA: bfloat16 from compute capability 8.0 on. CPU: bfloat16 if a benchmark of a few milliseconds shows clearly
    faster products (AMX, AVX512-BF16). MPS: float32.

    Raises: UserError for float16 on MPS, where there is no loss scaling for it.
    """
    if name == "float16" and device.type == "mps":
        raise UserError("dtype = 'float16': not supported on mps here; use float32 or bfloat16")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        fast = major >= 8
    else:
        fast = device.type == "cpu" and _bf16_is_fast()
    return torch.bfloat16 if fast else torch.float32


@functools.cache
def _bf16_is_fast() -> bool:
    # The first bf16 product takes a second to set up where the CPU has no instructions for it. On x86 these
    # instructions came after AVX-512.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # Without hardware support a bf16 product is hundreds of times slower, so try a small one first.
    fp32, bf16 = _best_times(64, rounds=5)
    if bf16 > 20 * fp32 + 1e-3:
        return False
    fp32, bf16 = _best_times(256 if torch.get_num_threads() < 8 else 512, rounds=20)
    return bf16 * 1.4 < fp32  # AVX512-BF16 doubles the speed, AMX gives far more


def _best_times(size: int, rounds: int) -> tuple[float, float]:
    """Return the shortest time of a square product in float32 and in bfloat16, in seconds.

    The two precisions take turns over `rounds` rounds: on a busy machine most products are interrupted, and the longer
    ones more often.
    """
    squares = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for a in squares:
        torch.mm(a, a)  # warm-up: the first product sets up
    for _ in range(rounds):
        for number, a in enumerate(squares):
            start = time.perf_counter()
            torch.mm(a, a)
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0], best[1]


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured rate of one square matrix product in FLOP/s, the best of ten.

    A step that was nothing but such products would reach this rate, so matrix-product utilisation is relative to it.
    The size of the product is fixed beforehand: a size that depended on measured times would end with small products
    on a busy machine. The numbers are random: a GPU computes faster on constant ones, because they take less power.
    """
    size = _product_size(device, dtype)
    generator = torch.Generator(device).manual_seed(0)  # leaves PyTorch's own generator as it is
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    torch.mm(a, a)[0, 0].item()  # warm-up; .item() waits for the device
    times: list[float] = []
    first_start = time.perf_counter()
    while len(times) < 2 or (len(times) < 10 and time.perf_counter() - first_start < RATE_SECONDS):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _product_size(device: torch.device, dtype: torch.dtype) -> int:
    # A size that keeps the device busy for some milliseconds: short enough that some products run uninterrupted.
    if device.type == "cuda":
        return 8192 if torch.cuda.get_device_properties(device).multi_processor_count >= 64 else 4096
    if device.type == "cpu" and dtype == torch.float32:
        return 512 if torch.get_num_threads() < 8 else 1024
    if device.type == "cpu" and not (dtype == torch.bfloat16 and _bf16_is_fast()):
        return 128  # a larger product may take seconds where the CPU has no instructions for this precision
    return 1024


def precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return an autocast context for `dtype`; it does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def fast_products(device: torch.device) -> None:
    """Enable TF32 for float32 products on an NVIDIA GPU: 10 bits of mantissa, several times the speed."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Within the block, operations on CUDA add up in a fixed order, so that the same step gives the same bits.

    Otherwise the backward pass of attention and `index_add_` add atomically, each time in another order, and a resumed
    run would differ from the uninterrupted one. On other devices the order is fixed in any case.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # not `warn_only`: attention would then keep its atomic sums
    memory.fill_uninitialized_memory = False  # a pass over each new tensor, and none is read unset
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled


def onto(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """Return `array` as a tensor on `device`. To CUDA it is copied asynchronously, from pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # of a strided tensor, PyTorch would first make a copy in pageable memory
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def keep_memory() -> None:
    """Make the C allocator reuse freed memory in the next step instead of returning it to the system.

    Mapping fresh pages costs more than the arithmetic done in them. What was freed before, as by the preparation of the
    text, goes back to the system first: its pieces are too small for tensors, and a run would hold them to its end.
    Only glibc has these settings; other allocators are left unchanged. Constants: M_MMAP_THRESHOLD = -3 (at most
    32 MiB), M_TRIM_THRESHOLD = -1.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(-3, 32 * 2**20)
        libc.mallopt(-1, 2**31 - 1)


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Return the device, the precision and the number of CPU threads as a short text."""
    dtype_name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device}), {dtype_name}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads > 1)}), {dtype_name}"
    return f"{device}, {dtype_name}"


def environment() -> dict[str, Any]:
    """Return the versions, machine and threads that a reader needs to judge or repeat a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "processes": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "compiler": kernel.find_compiler() is not None,
    }
