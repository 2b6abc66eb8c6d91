"""Checks of threads, precision, compiler and device."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from llm.checks.check import Check, setting

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's: microseconds of processor in a period, and the period


def threads() -> Check:
    import torch

    count, cores = torch.get_num_threads(), processors()
    words = f"{count} on {cores:g} processors, {torch.backends.cpu.get_cpu_capability()}"
    if count > max(1, cores):
        best = setting("OMP_NUM_THREADS", str(max(1, int(cores))))
        return Check("threads", None, f"{words}: more than there are processors slow a step down", best)
    if count < cores and "OMP_NUM_THREADS" in os.environ:
        return Check("threads", None, f"{words}: OMP_NUM_THREADS keeps it from more", "unset OMP_NUM_THREADS")
    return Check("threads", True, words)


def processors() -> float:
    """Processors that this process may use: those it is bound to, less where a container has a share of them."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = CPU_LIMIT.read_text(encoding="ascii").split()
        return min(count, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return count


def fast_precision() -> Check:
    """Whether `--dtype auto` means bfloat16 on the CPU, and what matrix products reach."""
    import torch

    from llm.machine.device import choose_dtype, matrix_rate

    cpu = torch.device("cpu")
    plain = f"{matrix_rate(cpu, torch.float32) / 1e9:,.0f} GFLOP/s in float32"
    if choose_dtype("auto", cpu) is torch.float32:
        return Check("bfloat16", None, f"not fast on this CPU, so float32 is used; products reach {plain}")
    rate = matrix_rate(cpu, torch.bfloat16)
    return Check("bfloat16", True, f"fast on this CPU: products reach {rate / 1e9:,.0f} GFLOP/s, and {plain}")


def compiler() -> Check:
    """What --compile needs: a C++ compiler with OpenMP and Python's headers, and on CUDA triton."""
    import torch

    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", usual)
    words = name.split()
    if not words or shutil.which(words[0]) is None:
        get = {"darwin": "xcode-select --install", "linux": "sudo apt install g++ python3-dev"}.get(sys.platform, "")
        return Check("compiler", None, f"no {name}: --compile trains without compiling", get)
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return Check("compiler", None, "no triton: --compile trains without compiling", "pip install triton")
    if sys.platform == "win32":
        return Check("compiler", True, f"{shutil.which(words[0])}")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags = ["-x", "c++", "-std=c++17", *openmp, "-I", sysconfig.get_path("include"), "-fsyntax-only", "-"]
    source = "#include <Python.h>\n#include <cmath>\n" + ("#include <omp.h>\n" if openmp else "")
    tried = subprocess.run(
        [*words, *flags], input=source, capture_output=True, text=True, errors="replace", timeout=30, check=False
    )
    if tried.returncode:
        error = next((line for line in tried.stderr.splitlines() if "error" in line), "it fails")
        get = "sudo apt install g++ python3-dev" if sys.platform == "linux" else "xcode-select --install"
        return Check("compiler", None, f"{name} cannot compile ({error.strip()[:120]}): --compile will not work", get)
    return Check("compiler", True, f"{shutil.which(words[0])}, for --compile")


def device() -> Check:
    """The device that `--device auto` means."""
    import torch

    from llm.machine.device import choose_device

    chosen = choose_device("auto")
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        major, minor = torch.cuda.get_device_capability(chosen)
        words = f"{torch.cuda.get_device_name(chosen)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
        return Check("device", True, f"{words}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if chosen.type == "mps":
        return Check("device", True, "the GPU of this Mac (mps)")
    if not nvidia_here():
        return Check("device", None, "no GPU, so the CPU trains; a GPU is many times as fast")
    here = "the CPU trains, though an NVIDIA GPU is here"
    if torch.version.cuda is None:
        return Check("device", None, f"{here}: PyTorch {torch.__version__} is built without CUDA", cuda_build())
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Check("device", None, f"{here}: CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")
    words = f"{here}: PyTorch's CUDA {torch.version.cuda} does not work with its driver; look which CUDA that has"
    return Check("device", False, words, "nvidia-smi")


def nvidia_here() -> bool:
    """Whether the driver's own tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False)
    return listed.returncode == 0 and b"GPU" in listed.stdout


def cuda_build() -> str:
    """How to get PyTorch with CUDA: on Linux the index has it, elsewhere PyTorch's page knows."""
    if sys.platform == "linux":
        return "pip install --force-reinstall torch"
    return "python -m webbrowser https://pytorch.org/get-started/locally"
