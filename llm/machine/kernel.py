"""The C code of a training step: what PyTorch is slow at on a CPU.

`kernel.c` computes exponentials and their row sums for the loss (`exp_sum`). PyTorch makes three passes over the
numbers; the C code makes one, in half the time in bfloat16 and a third in float32 (docs/performance.md). `block.c`
computes the parts of a block between its matrix products, for llm/machine/fused_block.py (`call`); `block_llama.c` and
`block_gpt2.c` are what only a llama's block or only GPT-2's needs.

Where there is a C compiler, a file is compiled at run time for this CPU, when it is first needed: `kernel.c` in a tenth
of a second, the others in less than one. The library is kept in the user's own cache folder, under a name that follows
from all that it depends on. Without a compiler, and for other dtypes, PyTorch computes the same.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import storage
from llm.errors import Failure

SOURCES = resources.files("llm.machine")

# Sums in any order, so that they take whole vectors to their end; and no loop split in two, one of them not in vectors.
# Not for kernel.c, whose exponential relies on the order of its operations.
BLOCK_FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-fno-split-loops")

GROUPS = 8  # partial sums of a row that PyTorch rounds to bfloat16 before they are added up in float32


def exp_sum(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replace `x` by exp(x - shift), in place, and return its row sums and the shift that was used.

    Args:
        x: (rows, width), contiguous. In fp32 its transpose may be contiguous instead; the C code covers that too.
        shift: (rows, 1) in fp32, known to be safe. Without it the maximum of each row is used. PyTorch's path also
            uses the maximum where x - shift would be rounded to few bits.

    Returns:
        Row sums and shift, both (rows, 1) in fp32.
    """
    in_columns = x.dtype == torch.float32 and x.t().is_contiguous()
    if x.device.type == "cpu" and (x.dtype == torch.bfloat16 or in_columns):
        library = load_kernel()
        if library is not None:
            return _exp_sum_in_c(library, x, shift)
    return _exp_sum_in_pytorch(x, shift)


def _exp_sum_in_c(library: Any, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    sums = torch.empty(rows, 1)
    if x.dtype == torch.bfloat16:
        find_maximum = shift is None
        used = torch.empty(rows, 1) if shift is None else shift
        library.exp_sum(x.data_ptr(), sums.data_ptr(), used.data_ptr(), find_maximum, rows, width)
    else:
        used = x.amax(1, keepdim=True) if shift is None else shift
        library.exp_sum_columns(x.data_ptr(), sums.data_ptr(), used.data_ptr(), rows, width)
    return sums, used


def _exp_sum_in_pytorch(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    shifted = shift is None or bool(shift.any())
    if shift is None or (shifted and x.dtype != torch.float32):
        shift = x.amax(1, keepdim=True).float()
    if shifted:
        x.sub_(shift.to(x.dtype))
    x.exp_()
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and width % GROUPS == 0:
        # PyTorch's float32 sum of a bfloat16 tensor first copies all of it to float32.
        sums = x.view(rows, GROUPS, -1).sum(2).sum(1, keepdim=True, dtype=torch.float32)
    else:
        sums = x.sum(1, keepdim=True, dtype=torch.float32)
    return sums, shift


def call(file: str, name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of a C file of the blocks: tensors are passed as pointers, None as a null one."""
    getattr(load_block_kernel(file), name)(*map(_for_c, arguments))


def _for_c(argument: Tensor | float | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)


def find_compiler() -> str | None:
    """Return the path of this machine's C compiler ($CC, else cc), or None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def load_kernel() -> Any:
    """Compile and load the functions of `kernel.c`; return None where that is impossible."""
    library = _compile("kernel.c")
    if library is not None:
        pointers = [ctypes.c_void_p] * 3
        integers = [ctypes.c_int64] * 3
        library.exp_sum.argtypes = [*pointers, *integers]
        library.exp_sum.restype = None
        library.exp_sum_columns.argtypes = [*pointers, *integers[1:]]
        library.exp_sum_columns.restype = None
    return library


@functools.cache
def load_block_kernel(file: str) -> Any:
    """Compile and load a C file of the blocks; return None where that is impossible."""
    return _compile(file, BLOCK_FLAGS)


def _compile(name: str, more_flags: Sequence[str] = ()) -> Any:
    """Return the library of a C file of this folder; None where it cannot be compiled.

    The library shares PyTorch's threads: it is linked without an OpenMP library, so it uses the one already loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", *more_flags]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append("-mprefer-vector-width=512")  # gcc prefers 256 bits on Intel CPUs: 17 ms instead of 9
    try:
        kept = _kept_library(compiler, name, flags)
        if kept is not None:
            with contextlib.suppress(OSError):  # it is not there yet
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory() as folder, resources.as_file(SOURCES / name) as source:
            object_file, library_file = Path(folder, "kernel.o"), Path(folder, "kernel.so")
            _run([compiler, *flags, "-c", str(source), "-o", str(object_file)])
            _run([compiler, "-shared", str(object_file), "-o", str(library_file)])
            library = ctypes.CDLL(str(library_file))
            if kept is not None:
                _keep(library_file, kept)
            return library
    except (OSError, subprocess.SubprocessError):  # for example, the OpenMP library of another compiler is missing
        return None


def _kept_library(compiler: str, name: str, flags: Sequence[str]) -> Path | None:
    """Return where the library of a C file is kept; None where no home folder is known.

    Its name is a hash of the sources, the flags, and the compiler's own macros: its version and what this CPU can do.
    """
    macros = _run([compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
    sources = [(SOURCES / file).read_bytes() for file in (name, "block.h")]
    parts = b"\0".join([*sources, " ".join(flags).encode(), macros])
    try:
        return storage.users_cache_folder() / "compiled" / f"{Path(name).stem}-{hashlib.sha256(parts).hexdigest()}.so"
    except Failure:
        return None


def _keep(library_file: Path, kept: Path) -> None:
    """Copy a library to where it is kept, whole or not at all; a folder that cannot be written keeps nothing."""
    part = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(library_file.read_bytes())
            file.flush()
            os.fsync(file.fileno())  # a library that a crash has cut short would end the process that loads it
        part.replace(kept)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
