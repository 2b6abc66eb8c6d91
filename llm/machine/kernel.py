"""Exponentials and their row sums, the one thing of a training step that PyTorch's parts are slow at.

PyTorch goes over the numbers three times; the few lines of `kernel.c` once, in half the time in bfloat16 and a third in
float32 (docs/performance.md). They are built at run time where there is a C compiler, in a fifth of a second, for the
processor at hand, and kept nowhere. Without one, or for other numbers, PyTorch does the same.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUPS = 8  # sums of a row that are rounded to bfloat16, by PyTorch's way, before they are added up in float32


def exp_sum(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replace what is in x (rows, width) by exp(x - shift); returns its rows' sums and the shift that was taken, both
    (rows, 1) in fp32. x is contiguous; in fp32 its transpose may be instead, for which there is C too.

    `shift`: one that is known to be safe. Without it each row's largest is taken, and also where x - shift would have
    to be rounded to few bits.
    """
    rows, width = x.shape
    small, on_cpu = x.dtype == torch.bfloat16, x.device.type == "cpu"
    in_columns = x.dtype == torch.float32 and x.t().is_contiguous()
    if on_cpu and (small or in_columns) and (compiled := built()) is not None:
        sums = torch.empty(rows, 1)
        if small:
            taken = torch.empty(rows, 1) if shift is None else shift
            compiled.exp_sum(x.data_ptr(), sums.data_ptr(), taken.data_ptr(), shift is None, rows, width)
        else:
            taken = x.amax(1, keepdim=True) if shift is None else shift
            compiled.exp_sum_columns(x.data_ptr(), sums.data_ptr(), taken.data_ptr(), rows, width)
        return sums, taken
    shifted = shift is None or bool(shift.any())
    if shift is None or (shifted and x.dtype != torch.float32):
        shift = x.amax(1, keepdim=True).float()
    if shifted:
        x.sub_(shift.to(x.dtype))
    x.exp_()
    if small and on_cpu and width % GROUPS == 0:  # a sum in float32 would first copy all of x to float32
        sums = x.view(rows, GROUPS, -1).sum(2).sum(1, keepdim=True, dtype=torch.float32)
    else:
        sums = x.sum(1, keepdim=True, dtype=torch.float32)
    return sums, shift


def compiler() -> str | None:
    """The C compiler of this machine: $CC, else cc; None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def built() -> Any:
    """The functions of `kernel.c`; None where they cannot be built.

    Their threads are those of PyTorch: it is linked without an OpenMP library, so that it finds the one already loaded.
    """
    cc = compiler()
    if cc is None:
        return None
    c_file = resources.files("llm.machine") / "kernel.c"
    with resources.as_file(c_file) as source, tempfile.TemporaryDirectory() as folder:
        part, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
        if platform.machine().lower() in ("x86_64", "amd64"):
            flags.append("-mprefer-vector-width=512")  # gcc prefers 256 bits on Intel's: 9 ms become 17
        try:
            for words in ([*flags, "-c", str(source), "-o", str(part)], ["-shared", str(part), "-o", str(library)]):
                subprocess.run([cc, *words], check=True, capture_output=True, timeout=60)
            found = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):  # another compiler's OpenMP among them
            return None
    pointers, numbers = [ctypes.c_void_p] * 3, [ctypes.c_int64] * 3
    found.exp_sum.argtypes, found.exp_sum.restype = [*pointers, *numbers], None
    found.exp_sum_columns.argtypes, found.exp_sum_columns.restype = [*pointers, *numbers[1:]], None
    return found
