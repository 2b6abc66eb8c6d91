"""Checks of threads, precision, compiler and device."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig

from llm.checks.check import Check, set_variable
from llm.machine.processors import processors


def threads() -> Check:
    """Check that PyTorch has as many threads as this process has processors."""
    import torch

    count = torch.get_num_threads()
    available = processors()
    message = f"{count} on {available:g} processors, {torch.backends.cpu.get_cpu_capability()}"
    if count > max(1, available):
        remedy = set_variable("OMP_NUM_THREADS", str(max(1, int(available))))
        return Check("threads", None, f"{message}: more threads than processors make a step slower", remedy)
    if count < available and "OMP_NUM_THREADS" in os.environ:
        return Check("threads", None, f"{message}: OMP_NUM_THREADS limits the threads", "unset OMP_NUM_THREADS")
    return Check("threads", True, message)


def fast_precision() -> Check:
    """Check whether `--dtype auto` means bfloat16 on the CPU, and measure its matrix products."""
    import torch

    from llm.machine.device import choose_dtype, matrix_rate

    cpu = torch.device("cpu")
    float32_rate = f"{matrix_rate(cpu, torch.float32) / 1e9:,.0f} GFLOP/s in float32"
    if choose_dtype("auto", cpu) is torch.float32:
        return Check("bfloat16", None, f"slow on this CPU, so float32 is used; matrix products reach {float32_rate}")
    rate = matrix_rate(cpu, torch.bfloat16)
    message = f"fast on this CPU: matrix products reach {rate / 1e9:,.0f} GFLOP/s, and {float32_rate}"
    return Check("bfloat16", True, message)


def compiler() -> Check:
    """Check what --compile needs: a C++ compiler with OpenMP and Python's headers, and triton with CUDA."""
    import torch

    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", default)
    command = name.split()
    if not command or shutil.which(command[0]) is None:
        remedies = {"darwin": "xcode-select --install", "linux": "sudo apt install g++ python3-dev"}
        message = f"no {name}: --compile trains without compiling"
        return Check("compiler", None, message, remedies.get(sys.platform, ""))
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return Check("compiler", None, "no triton: --compile trains without compiling", "pip install triton")
    if sys.platform == "win32":
        return Check("compiler", True, f"{shutil.which(command[0])}")
    error = _compile_error(command)
    if error:
        remedy = "sudo apt install g++ python3-dev" if sys.platform == "linux" else "xcode-select --install"
        return Check("compiler", None, f"{name} cannot compile ({error}): --compile will not work", remedy)
    return Check("compiler", True, f"{shutil.which(command[0])}, for --compile")


def _compile_error(command: list[str]) -> str:
    """Compile a file that includes what torch.compile needs; return the compiler's error, "" if there is none."""
    flags = ["-x", "c++", "-std=c++17"]
    source = "#include <Python.h>\n#include <cmath>\n"
    if sys.platform != "darwin":
        flags += ["-fopenmp"]
        source += "#include <omp.h>\n"
    flags += ["-I", sysconfig.get_path("include"), "-fsyntax-only", "-"]
    finished = subprocess.run(
        [*command, *flags], input=source, capture_output=True, text=True, errors="replace", timeout=30, check=False
    )
    if finished.returncode == 0:
        return ""
    error = next((line for line in finished.stderr.splitlines() if "error" in line), "it fails")
    return error.strip()[:120]


def device() -> Check:
    """Check the device that `--device auto` means."""
    import torch

    from llm.machine.device import choose_device

    chosen = choose_device("auto")
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        major, minor = torch.cuda.get_device_capability(chosen)
        name = f"{torch.cuda.get_device_name(chosen)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
        return Check("device", True, f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if chosen.type == "mps":
        return Check("device", True, "the GPU of this Mac (mps)")
    if not has_nvidia_gpu():
        return Check("device", None, "no GPU, so training runs on the CPU; a GPU is many times as fast")
    unused = "training runs on the CPU, though this machine has an NVIDIA GPU"
    if torch.version.cuda is None:
        message = f"{unused}: PyTorch {torch.__version__} is built without CUDA"
        return Check("device", None, message, install_cuda_build())
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Check("device", None, f"{unused}: CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")
    message = (
        f"{unused}: PyTorch's CUDA {torch.version.cuda} does not work with its driver; compare the CUDA version of "
        "the driver"
    )
    return Check("device", False, message, "nvidia-smi")


def has_nvidia_gpu() -> bool:
    """Return whether the driver's own tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False)
    return listed.returncode == 0 and b"GPU" in listed.stdout


def install_cuda_build() -> str:
    """Return the command that installs PyTorch with CUDA; outside Linux, one that opens PyTorch's instructions."""
    if sys.platform == "linux":
        return "pip install --force-reinstall torch"
    return "python -m webbrowser https://pytorch.org/get-started/locally"
