"""Check what works on this machine: a list of checks, each with a time limit, and a remedy for what is broken.

What is checked may be broken, so nothing beyond the standard library is imported before its own check.
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

from llm.checks.check import CACHE, TRAIN_ELSEWHERE, Check, install_extra, set_variable
from llm.checks.hardware import compiler, device, fast_precision, threads
from llm.checks.one_step import parity
from llm.checks.reachable import text, vocabulary
from llm.errors import UserError

# package: oldest version; a test compares them with pyproject.toml
NEEDED = {
    "torch": "2.6",
    "numpy": "1.26",
    "safetensors": "0.4",
    "tiktoken": "0.7",
    "tokenizers": "0.20",
    "huggingface_hub": "0.25",
    "rich": "13",
    "matplotlib": "3.8",
    "jinja2": "3.1",
    "markupsafe": "2",
}

# extra: its packages, and what it is for
EXTRAS = {
    "dashboard": (("starlette", "uvicorn", "plotly"), "losscurve watch, the page that follows a run"),
    "tensorboard": (("tensorboard",), "losscurve train --track tensorboard"),
    "wandb": (("wandb",), "losscurve train --track wandb"),
}

TIME_LIMIT = 60.0  # seconds for a check; the slowest, the first use of a GPU, takes a few


def examine() -> Iterator[Check]:
    """Yield all checks as they finish. If a package is missing, only that check."""
    first = bounded("packages", packages, "pip install --force-reinstall losscurve")
    yield first
    if first.good is False:  # the other checks import them
        return
    reinstall = "pip install --force-reinstall torch"
    checks: list[tuple[str, Callable[[], Check], str]] = [
        ("threads", threads, reinstall),
        ("bfloat16", fast_precision, "losscurve train --dtype float32"),
        ("compiler", compiler, "losscurve train --no_compile"),
        ("device", device, "losscurve train --device cpu"),
        ("one step", parity, "losscurve train --device cpu"),
        ("disk", disk, TRAIN_ELSEWHERE),
        ("text", text, set_variable("LOSSCURVE_CACHE", CACHE)),
        ("vocabulary", vocabulary, set_variable("LOSSCURVE_CACHE", CACHE)),
    ]
    for name in EXTRAS:
        checks.append((name, functools.partial(extra, name), install_extra(name)))
    for name, check, remedy in checks:
        yield bounded(name, check, remedy)


def bounded(name: str, check: Callable[[], Check], remedy: str, seconds: float = TIME_LIMIT) -> Check:
    """Return the result of `check`, or a failure with `remedy` if it raises or takes longer than `seconds`."""
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
    if not found:
        return Check(name, False, f"no answer in {seconds:g} s", remedy)
    return found[0]


def packages() -> Check:
    """Check that every needed package can be imported and is new enough."""
    versions: list[str] = []
    problems: list[str] = []
    requirements: list[str] = []  # for pip, of the packages with a problem
    for name, oldest in NEEDED.items():
        try:
            importlib.import_module(name)
            version = metadata.version(name)
        except Exception as error:  # a shared library that does not load raises many kinds
            requirements.append(f'"{name}>={oldest}"')
            problems.append(f"{name} cannot be imported ({' '.join(str(error).split())[:120]})")
            continue
        versions.append(f"{name} {version}")
        if numbers(version) < numbers(oldest):
            requirements.append(f'"{name}>={oldest}"')
            problems.append(f"{name} {version} is older than {oldest}")
    if problems:
        return Check("packages", False, "; ".join(problems), f"pip install --upgrade {' '.join(requirements)}")
    return Check("packages", True, f"python {platform.python_version()}, {', '.join(versions)}")


def numbers(version: str) -> list[int]:
    """Return the numbers of a version: [2, 13, 0] for '2.13.0+cpu'."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def disk() -> Check:
    """Check that the current folder has room for the chapter's run, and that its files can be locked and flushed."""
    from llm import storage
    from llm.config import TrainConfig
    from llm.start.run_folder import disk_needed

    needed = disk_needed(TrainConfig())
    here = Path.cwd()
    try:
        storage.check_writable(here, needed)
    except UserError as error:
        return Check("disk", False, str(error), TRAIN_ELSEWHERE)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=here) as folder, storage.locked(Path(folder), "a check"):
        start = time.perf_counter()
        storage.write_bytes(Path(folder) / "file", b"written")
        flush_seconds = time.perf_counter() - start
    free = shutil.disk_usage(here).free
    facts = [
        f"{free / 2**30:,.1f} GiB free in {here}",
        f"the chapter's run needs {needed / 2**30:.1f}",
        f"a small file is flushed to disk in {1000 * flush_seconds:.0f} ms",
    ]
    for limit in storage.limits():
        facts.append(limit.partition(": ")[2])  # without the name of the folder
    return Check("disk", True, "; ".join(facts))


def extra(name: str) -> Check:
    """Check that the packages of an extra are installed. Importing them may be slow or start something."""
    names, purpose = EXTRAS[name]
    absent = [package for package in names if importlib.util.find_spec(package) is None]
    if absent:
        return Check(name, None, f"no {', '.join(absent)}; for {purpose}", install_extra(name))
    return Check(name, True, ", ".join(f"{package} {metadata.version(package)}" for package in names))
