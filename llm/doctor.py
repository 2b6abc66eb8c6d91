"""What of this machine works: a list of checks, each bounded in time, each with a remedy where something is broken.

What is examined may be broken, so nothing beyond the standard library is imported before its own check.
"""

import functools
import hashlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# package: oldest version; as in pyproject.toml, which a test compares
NEEDED = {
    **{"torch": "2.6", "numpy": "1.26", "safetensors": "0.4", "tiktoken": "0.7", "tokenizers": "0.20"},
    **{"rich": "13", "matplotlib": "3.8", "jinja2": "3.1", "markupsafe": "2"},
}
EXTRAS = {  # what is installed together: its packages, and what they bring
    "dashboard": (("starlette", "uvicorn", "plotly"), "losscurve watch, the page that follows a run"),
    "tensorboard": (("tensorboard",), "losscurve train --track tensorboard"),
    "wandb": (("wandb",), "losscurve train --track wandb"),
}
HOME = "%USERPROFILE%" if os.name == "nt" else "$HOME" if os.environ.get("HOME") else "$PWD"
CACHE, ELSEWHERE = f"{HOME}/losscurve-cache", f'losscurve train --out_dir "{HOME}/losscurve-runs"'
SECONDS = 60.0  # for a check that hangs; the slowest here, a first look at a GPU, takes a few
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's: microseconds of processor in a period, and the period
LOSS_TOLERANCE = 1e-4  # nats per token
GRADIENT_TOLERANCE = 1e-3  # of the gradient's length; another order of adding up gives 1e-6
UPDATE_TOLERANCE = 2e-2  # of the update's length: AdamW's first goes by the sign of numbers that may be near 0


@dataclass(frozen=True)
class Check:
    """What became of one check: `good` is None for what is not needed and absent, or could be better."""

    name: str
    good: bool | None
    words: str
    remedy: str = ""  # a command to paste


def examine() -> Iterator[Check]:
    """All checks, as they are made. The packages come first: without them there is nothing else to look at."""
    first = bounded("packages", packages, "pip install --force-reinstall losscurve")
    yield first
    if first.good is False:
        return
    broken = "pip install --force-reinstall torch"
    checks: tuple[tuple[str, Callable[[], Check], str], ...] = (
        ("threads", threads, broken),
        ("bfloat16", fast_precision, "losscurve train --dtype float32"),
        ("compiler", compiler, "losscurve train --no_compile"),
        ("device", device, "losscurve train --device cpu"),
        ("one step", parity, "losscurve train --device cpu"),
        ("disk", disk, ELSEWHERE),
        ("text", text, setting("LOSSCURVE_CACHE", CACHE)),
        ("vocabulary", vocabulary, setting("LOSSCURVE_CACHE", CACHE)),
        *((name, functools.partial(extra, name), install(name)) for name in EXTRAS),
    )
    for name, check, remedy in checks:
        yield bounded(name, check, remedy)


def bounded(name: str, check: Callable[[], Check], remedy: str, seconds: float = SECONDS) -> Check:
    """What `check` finds. One that raises or does not end in `seconds` found something broken."""
    found: list[Check] = []

    def work() -> None:
        try:
            found.append(check())
        except Exception as error:
            cause = " ".join(str(error).split()) or "no reason given"
            found.append(Check(name, False, f"{type(error).__name__}: {cause[:200]}", remedy))

    thread = threading.Thread(target=work, daemon=True)  # a hung driver or file system cannot be interrupted
    thread.start()
    thread.join(seconds)
    return found[0] if found else Check(name, False, f"no answer in {seconds:g} s", remedy)


def setting(name: str, value: str) -> str:
    """How a shell sets an environment variable."""
    return f"set {name}={value}" if os.name == "nt" else f'export {name}="{value}"'


def install(extra: str) -> str:
    return f'pip install "losscurve[{extra}]"'


def packages() -> Check:
    """Everything that is needed can be imported and is new enough."""
    versions, missing, why = [], [], []
    for name, oldest in NEEDED.items():
        try:
            importlib.import_module(name)
            version = metadata.version(name)
        except Exception as error:  # a library of it that does not load raises many kinds
            missing.append(f'"{name}>={oldest}"')
            why.append(f"{name} cannot be imported ({' '.join(str(error).split())[:120]})")
            continue
        versions.append(f"{name} {version}")
        if numbers(version) < numbers(oldest):
            missing.append(f'"{name}>={oldest}"')
            why.append(f"{name} {version} is older than {oldest}")
    if missing:
        return Check("packages", False, "; ".join(why), f"pip install --upgrade {' '.join(missing)}")
    return Check("packages", True, f"python {platform.python_version()}, {', '.join(versions)}")


def numbers(version: str) -> list[int]:
    """2.13.0+cpu as [2, 13, 0]."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


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

    from llm.device import choose_dtype, matrix_rate

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

    from llm.device import choose_device

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


@dataclass(frozen=True)
class Outcome:
    """What one update did, in float64 on the CPU; gradient and update are those of all parameters, flat."""

    loss: float  # nats per token
    gradient: "Tensor"
    update: "Tensor"


def one_step(on: "torch.device", dropout: float = 0.0) -> Outcome:
    """The first update of a tiny model on random tokens, in float32; the same everywhere but for rounding.

    float32 in full: TF32, which training uses on CUDA, is not asked for here.
    """
    import numpy as np
    import torch

    from llm.config import from_settings
    from llm.data import TokenData
    from llm.model import GPT
    from llm.optim import make_optimizer
    from llm.state import Parts
    from llm.train import train_step

    shape = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 64, "dropout": dropout}
    config = from_settings(shape | {"batch_size": 8, "max_steps": 10, "warmup_steps": 0, "dtype": "float32"})
    tokens = np.random.default_rng(0).integers(0, 257, 4096).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, 257, True, "random", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GPT(config.model)  # its weights are drawn on the CPU
    before = [p.detach().double() for p in model.parameters()]
    model.to(on).train()
    scaler = torch.amp.GradScaler(on.type, enabled=False)
    optimizer = make_optimizer(model, config)
    parts = Parts(config, model, model, optimizer, scaler, data, None, on, torch.float32)
    loss = train_step(parts, 0).loss.item()
    after = [p.detach().cpu().double() for p in model.parameters()]
    gradient = torch.cat([p.grad.detach().cpu().double().flatten() for p in model.parameters() if p.grad is not None])
    return Outcome(loss, gradient, torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)]))


def differences(expected: Outcome, found: Outcome) -> tuple[float, float, float]:
    """Of the losses (nats per token), and of gradients and updates as shares of the length expected."""

    def apart(a: "Tensor", b: "Tensor") -> float:
        return float((a - b).norm() / a.norm()) if a.shape == b.shape else float("inf")

    loss = abs(expected.loss - found.loss)
    return loss, apart(expected.gradient, found.gradient), apart(expected.update, found.update)


def parity() -> Check:
    """One update on the CPU and the same on the device, without and with dropout; on the CPU alone, done twice."""
    import torch

    from llm.device import choose_device

    cpu, other = torch.device("cpu"), choose_device("auto")
    found = [differences(one_step(cpu, share), one_step(other, share)) for share in (0.0, 0.1)]
    worst = torch.tensor(found).amax(0).tolist()  # NaN where any is
    where = f"done twice on the {other}" if other == cpu else f"on {other} and on the cpu"
    words = f"{where}: loss differs by {worst[0]:.1e} nats, gradient by {worst[1]:.1e}, update by {worst[2]:.1e} of it"
    limits = (LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE)
    if all(value <= limit for value, limit in zip(worst, limits, strict=True)):  # false for NaN
        return Check("one step", True, words)
    allowed = ", ".join(f"{limit:g}" for limit in limits)
    remedy = "pip install --force-reinstall torch" if other == cpu else "losscurve train --device cpu"
    return Check("one step", False, f"{words}; at most {allowed} is rounding", remedy)


def disk() -> Check:
    """Room for a run of the chapter's size here, and that files can be locked and made durable."""
    import torch

    from llm import storage
    from llm.config import TrainConfig
    from llm.model import GPT
    from llm.start import disk_needed

    config = TrainConfig()
    with torch.device("meta"):
        needed = disk_needed(GPT(config.model), config)
    here = Path.cwd()
    try:
        storage.check_writable(here, needed)
    except UserError as error:
        return Check("disk", False, str(error), ELSEWHERE)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=here) as folder, storage.locked(Path(folder), "a check"):
        start = time.perf_counter()
        storage.write_bytes(Path(folder) / "file", b"written")
        took = time.perf_counter() - start
    free = shutil.disk_usage(here).free
    words = f"{free / 2**30:,.1f} GiB free in {here}; the chapter's run needs {needed / 2**30:.1f}"
    safe = f"a file is safe on it after {1000 * took:.0f} ms"
    limits = [limit.partition(": ")[2] for limit in storage.limits()]  # without the name of the folder
    return Check("disk", True, "; ".join([words, safe, *limits]))


def text() -> Check:
    from llm import corpus, storage

    path = storage.cache_folder() / "tinyshakespeare" / "input.txt"
    without = "runs without a --text take the text that Python carries"
    known = corpus.SHAKESPEARE_URL, path, corpus.SHAKESPEARE_SHA256
    return cached("text", "tiny Shakespeare", *known, setting("LOSSCURVE_CACHE", CACHE), without)


def vocabulary() -> Check:
    from llm import storage, tokenizer

    own = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(own) if own else storage.cache_folder() / "tiktoken"
    path = folder / hashlib.sha1(tokenizer.VOCAB_URL.encode()).hexdigest()
    remedy = "unset TIKTOKEN_CACHE_DIR" if own else setting("LOSSCURVE_CACHE", CACHE)
    without = "tokens are made from the text itself (bpe)"
    known = tokenizer.VOCAB_URL, path, tokenizer.VOCAB_SHA256
    return cached("vocabulary", "GPT-2's vocabulary", *known, remedy, without)


def cached(name: str, what: str, url: str, path: Path, sha256: str, remedy: str, without: str) -> Check:
    """Whether a download is in its cache or could be had: `remedy` is for a cache that cannot be written, `without`
    says what runs do without the download.
    """
    from llm import storage

    if path.is_file() and storage.sha256(path) == sha256:
        return Check(name, True, f"{what} is in {path.parent}")
    state = f"{what} {'is damaged' if path.is_file() else 'is not'} in {path.parent}"
    try:
        storage.check_writable(path.parent)
    except UserError as error:
        return Check(name, False, str(error), remedy)
    reason = silence(url)
    if reason is None:
        return Check(name, True, f"{state}; {urlsplit(url).netloc} answers, so it is fetched when it is needed")
    words = f"{state}, and {urlsplit(url).netloc} cannot be reached ({reason}): {without}"
    return Check(name, None, words, f'curl --create-dirs -o "{path}" {url}')


def silence(url: str) -> str | None:
    """Why nothing answers at `url`, within seconds; None if something does."""
    from llm.download import CONNECT_SECONDS

    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):
                answer.append(None)
        except Exception as error:  # whatever a network can do
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            answer.append(str(getattr(error, "reason", None) or error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # no timeout covers the look-up of the name
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answer[0] if answer else f"no answer in {CONNECT_SECONDS:g} s"


def extra(name: str) -> Check:
    """Whether the packages of an extra are there; they are not imported, since that may be slow or start something."""
    names, brings = EXTRAS[name]
    absent = [package for package in names if importlib.util.find_spec(package) is None]
    if absent:
        return Check(name, None, f"no {', '.join(absent)}; for {brings}", install(name))
    return Check(name, True, ", ".join(f"{package} {metadata.version(package)}" for package in names))
