"""What of this machine works: a list of checks, each bounded in time, each with a remedy where something is broken.

What is examined may be broken, so nothing beyond the standard library is imported before its own check.
"""

import functools
import importlib
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llm.errors import UserError

if TYPE_CHECKING:
    pass
from llm.checks.check import CACHE, ELSEWHERE, Check, install, setting
from llm.checks.hardware import compiler, device, fast_precision, threads
from llm.checks.one_step import parity
from llm.checks.reachable import text, vocabulary

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


SECONDS = 60.0  # for a check that hangs; the slowest here, a first look at a GPU, takes a few


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


def disk() -> Check:
    """Room for a run of the chapter's size here, and that files can be locked and made durable."""
    import torch

    from llm import storage
    from llm.config import TrainConfig
    from llm.model import GPT
    from llm.start.run_folder import disk_needed

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


def extra(name: str) -> Check:
    """Whether the packages of an extra are there; they are not imported, since that may be slow or start something."""
    names, brings = EXTRAS[name]
    absent = [package for package in names if importlib.util.find_spec(package) is None]
    if absent:
        return Check(name, None, f"no {', '.join(absent)}; for {brings}", install(name))
    return Check(name, True, ", ".join(f"{package} {metadata.version(package)}" for package in names))
