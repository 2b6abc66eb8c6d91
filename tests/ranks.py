"""Run jobs in worlds of several processes, as torchrun would start them, for tests.

The processes are forked from a server that has imported everything once, so a world starts in one second instead of
torchrun's six. Each process runs the same jobs one after the other, each job with a key-value store of its own. The
jobs' functions are in rank_jobs.py, where the processes can import them.
"""

import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import rank_jobs
import torch
import torch.distributed as dist

# PyTorch looks up the name of each address it connects to, which takes 5 seconds where no name server answers.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch.distributed.fsdp", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"),
        *("llm.commands.train", "llm.start.new_run", "llm.run", "ranks", "rank_jobs"),
    ]
)
HERE = Path(__file__).parent
WORLD_TIMEOUT = 120.0  # seconds for all jobs of a world


@dataclass(frozen=True)
class Outcome:
    """How a job ended on one rank."""

    value: Any = None  # what it returned
    error: str = ""  # the traceback, if it raised instead
    out: str = ""  # its stdout
    err: str = ""  # its stderr


@dataclass(frozen=True)
class Job:
    function: Callable[..., Any]
    settings: dict[str, Any]


def job(function: Callable[..., Any], **settings: Any) -> Job:
    return Job(function, settings)


def run_world(
    size: int, jobs: list[Job], folder: Path, env: dict[str, str] | None = None, stopped: tuple[int, ...] = ()
) -> list[list[Outcome]]:
    """Run `jobs` in a world of `size` processes (0: one process without torchrun); return outcomes by job and rank.

    A process that was killed leaves the outcomes of its current and later jobs empty. The ranks in `stopped` are not
    waited for; they are killed once the others have ended.
    """
    folder.mkdir(parents=True)
    stores = [_new_store() for _ in (jobs if size else ())]
    ports = [store.port for store in stores]
    work = [(job.function, job.settings) for job in jobs]
    processes = [
        CONTEXT.Process(target=_run_rank, args=(rank, size, ports, work, folder, env or {}))
        for rank in range(max(1, size))
    ]
    deadline = time.monotonic() + WORLD_TIMEOUT
    # The first start also starts the server that processes are forked from, which must find this package and file.
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}):
        for process in processes:
            process.start()
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()) if rank not in stopped else 0.0)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    late = [rank for rank in alive if rank not in stopped]
    for rank in alive:
        os.kill(processes[rank].pid, signal.SIGKILL)
        processes[rank].join()
    outcomes = [[_read_outcome(folder, number, rank) for rank in range(len(processes))] for number in range(len(jobs))]
    assert not late, f"ranks {late} of {size} never ended: {[one.error or one.err for row in outcomes for one in row]}"
    return outcomes


def run_job(
    size: int, job: Job, folder: Path, env: dict[str, str] | None = None, stopped: tuple[int, ...] = ()
) -> list[Outcome]:
    """Run one job in a world of `size` processes; return its outcomes by rank."""
    return run_world(size, [job], folder, env, stopped)[0]


def exit_codes(size: int, line: str, folder: Path) -> list[int]:
    """Run one command in a world of `size` processes; return its exit codes by rank."""
    return require_values(run_job(size, job(rank_jobs.run_command, lines=[line]), folder))


def require_values(outcomes: list[Outcome]) -> list[Any]:
    """Return what a job returned, by rank. It must have succeeded on every rank."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, f"rank {rank}: {outcome.error}"
        assert outcome.value is not None, f"rank {rank} returned nothing: {outcome.err}"
    return [outcome.value for outcome in outcomes]


def error_lines(outcomes: list[Outcome]) -> list[str]:
    """Return the lines on any rank's stderr that report an error to the user."""
    return [line for one in outcomes for line in one.err.splitlines() if line.startswith("error: ")]


def _new_store() -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=30)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)


def _read_outcome(folder: Path, number: int, rank: int) -> Outcome:
    error, out, err = (_read_text(folder / f"{number}-{rank}.{kind}") for kind in ("error", "out", "err"))
    path = folder / f"{number}-{rank}.pt"
    value = torch.load(path, weights_only=False) if path.exists() else None
    return Outcome(value, error, out, err)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _run_rank(rank: int, size: int, ports: list[int], jobs: list[Any], folder: Path, env: dict[str, str]) -> None:
    """Run all jobs in this process, which is one rank, and write their outcomes to `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(env)
    if size:
        os.environ.update(_torchrun_variables(rank, size))
    for number, (function, settings) in enumerate(jobs):
        if size:
            os.environ["MASTER_PORT"] = str(ports[number])
        for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
            stream.flush()
            with open(folder / f"{number}-{rank}.{kind}", "wb") as file:
                os.dup2(file.fileno(), stream.fileno())
        try:
            value = function(**settings)
        except BaseException:
            (folder / f"{number}-{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
            return
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        torch.save(value, folder / f"{number}-{rank}.pt.tmp")
        os.replace(folder / f"{number}-{rank}.pt.tmp", folder / f"{number}-{rank}.pt")


def _torchrun_variables(rank: int, size: int) -> dict[str, str]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    return {name: str(value) for name, value in variables.items()}
