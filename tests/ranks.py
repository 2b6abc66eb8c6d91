"""Worlds of several processes for tests. They are forked from one that has imported everything once, so that a world
takes a second rather than torchrun's six; and what runs in them is written here, where they can import it.

Each process does the same jobs one after the other, each job in a store of its own, as if torchrun had started it.
"""

import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

# PyTorch asks for the name of each address it is connected to; where no name server answers that takes 5 seconds
os.environ.setdefault("RES_OPTIONS", "attempts:0")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "llm.commands.train", "llm.start.new_run", "llm.run", "ranks"]
)
HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds for all jobs of a world


@dataclass(frozen=True)
class Told:
    """What a job came to in one process."""

    value: Any = None  # what it returned
    error: str = ""  # the traceback it ended with instead
    out: str = ""
    err: str = ""


@dataclass(frozen=True)
class Job:
    function: Callable[..., Any]
    settings: dict[str, Any]


def job(function: Callable[..., Any], **settings: Any) -> Job:
    return Job(function, settings)


def world_of(
    size: int, jobs: list[Job], folder: Path, env: dict[str, str] | None = None, stopped: tuple[int, ...] = ()
) -> list[list[Told]]:
    """What each of `jobs` came to, by job and rank, in a world of `size` processes; 0: one without torchrun.

    A process that was killed has told nothing of the job it was at, nor of those after it. Those `stopped` are not
    waited for, and ended once the others are.
    """
    folder.mkdir(parents=True)
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
        for _ in (jobs if size else ())
    ]
    ports, work = [store.port for store in stores], [(j.function, j.settings) for j in jobs]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, ports, work, folder, env or {})) for rank in range(max(1, size))
    ]
    until = time.monotonic() + PATIENCE
    # the first start is that of the process they are forked from: it is to find this package and this file
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}):
        for process in processes:
            process.start()
    for rank, process in enumerate(processes):
        process.join(max(0.0, until - time.monotonic()) if rank not in stopped else 0.0)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    late = [rank for rank in alive if rank not in stopped]
    for rank in alive:
        os.kill(processes[rank].pid, signal.SIGKILL)
        processes[rank].join()
    told = [[_told(folder, number, rank) for rank in range(len(processes))] for number in range(len(jobs))]
    assert not late, f"ranks {late} of {size} never ended: {[t.error or t.err for row in told for t in row]}"
    return told


def values(told: list[Told]) -> list[Any]:
    """What a job returned on each rank, where it ended well on all."""
    for rank, one in enumerate(told):
        assert not one.error, f"rank {rank}: {one.error}"
        assert one.value is not None, f"rank {rank} told nothing: {one.err}"
    return [one.value for one in told]


def _told(folder: Path, number: int, rank: int) -> Told:
    words = [_read(folder / f"{number}-{rank}.{kind}") for kind in ("error", "out", "err")]
    path = folder / f"{number}-{rank}.pt"
    return Told(torch.load(path, weights_only=False) if path.exists() else None, *words)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _rank(rank: int, size: int, ports: list[int], jobs: list[Any], folder: Path, env: dict[str, str]) -> None:
    """One process of a world, at its jobs."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(env)
    if size:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        here |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({name: str(value) for name, value in here.items()})
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


# What runs in them.


def train(settings: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """A run, begun or gone on with, and all that this process saw of it: windows, draws of dropout, losses, weights."""
    from llm.config import from_settings
    from llm.machine.rendezvous import joined
    from llm.machine.world import whole
    from llm.start.new_run import new_run
    from llm.start.resume_run import resume_run
    from llm.train import train as training_loop
    from llm.training.events import Step
    from llm.training.saver import Saver
    from llm.training.state import tensors_of

    with joined() as world:
        opened = (
            resume_run(Path(settings["out_dir"]), settings, world=world)
            if resume
            else new_run(from_settings(settings), world=world)
        )
        with opened as training:
            start = Saver().copy(tensors_of(training.parts)), training.progress.step
            with (
                noting(training.parts) as seen,
                mock.patch("llm.training.evaluating.plot_runs"),
            ):  # pictures take their time
                steps = [event for event in training_loop(training) if isinstance(event, Step)]
        weights = {name: whole(p.detach()).cpu().clone() for name, p in training.parts.model.named_parameters()}
    return {
        "start": start,
        "seen": seen,
        "losses": [step.loss.item() for step in steps],
        "norms": [step.grad_norm.item() for step in steps],
        "weights": weights,
        "reason": training.reason,
    }


@contextmanager
def noting(trainer: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the model is trained on, in the order in which it comes: the windows, and what dropout leaves of them by
    its place in the model.
    """
    import llm.model

    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": [], "seeds": []}
    forward, draw = trainer.forward, llm.model.Dropout.__call__

    def noted(x: torch.Tensor, y: torch.Tensor, seeds: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            for name, value in (("x", x), ("y", y), ("seeds", seeds)):
                seen[name].append(value.clone())
        return forward(x, y, seeds)

    def drawn(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = draw(self, x)
        if torch.is_grad_enabled():
            seen.setdefault(f"dropout {self.place}", []).append((out != 0).flatten(1))
        return out

    with mock.patch.object(trainer, "forward", noted), mock.patch.object(llm.model.Dropout, "__call__", drawn):
        yield seen


def evaluated(settings: dict[str, Any], cases: list[tuple[int, int]]) -> list[tuple[float, float | None, int]]:
    """The evaluation of a run's first weights, on other tokens: for each (how many there are, limit) of `cases`."""
    from llm.config import from_settings
    from llm.evaluate import evaluate
    from llm.machine.device import precision
    from llm.machine.rendezvous import joined
    from llm.start.new_run import new_run

    with joined() as world, new_run(from_settings(settings), world=world) as training:
        trainer, found = training.parts, []
        vocab_size, block_size = trainer.model.config.vocab_size, trainer.model.config.block_size
        tokens = np.random.default_rng(5).integers(0, vocab_size, 10**5).astype(np.uint16)
        with precision(trainer.dtype, trainer.device):
            for count, limit in cases:
                where = tokens[:count], block_size, limit, training.token_bytes
                found.append(evaluate(trainer.model, *where, world=world))
    return [(one.loss, one.bits_per_byte, one.tokens) for one in found]


def command(lines: list[str], change: Callable[[int], AbstractContextManager[Any]] | None = None) -> int:
    """The exit code of a command, of which each rank may have a line of its own; `change` may make one rank differ."""
    from llm.commands.main import main

    rank = int(os.environ.get("RANK", 0))
    try:
        with change(rank) if change else nullcontext():
            return main(lines[rank % len(lines)].split())
    finally:
        if dist.is_initialized():  # a command that was refused leaves that to the end of its process
            dist.destroy_process_group()


def another_version(rank: int) -> AbstractContextManager[Any]:
    return mock.patch("llm.start.agreement.__version__", "0.0.9") if rank == 1 else nullcontext()


def other_code(rank: int) -> AbstractContextManager[Any]:
    return mock.patch("llm.start.agreement.code_hash", return_value="f" * 64) if rank == 1 else nullcontext()


def never_comes(rank: int, absent: int) -> AbstractContextManager[Any]:
    if rank == absent:
        os._exit(3)
    return mock.patch("llm.machine.rendezvous.STALLED", datetime.timedelta(seconds=1))


@dataclass
class Kill:
    """SIGKILL of rank `rank` before or after exchange number `at`, counted from 1, of the save at step `step`. Without
    `at`, SIGSTOP in place of it at that step. Of a save is all from where it is asked if the numbers are finite.
    """

    rank: int
    step: int
    at: int = 0
    after: bool = False
    count: int = 0
    saving: bool = False

    def __call__(self, rank: int) -> AbstractContextManager[Any]:
        return self._hooked() if rank == self.rank else nullcontext()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        import llm.train
        import llm.training.saver
        import llm.training.saving

        save, finite = llm.training.saving.save, llm.training.saving.tensors_of

        def begins(parts: Any) -> Any:  # what `not_finite` is asked about, and what is saved
            step = int(max(entry["step"] for entry in parts.optimizer.state.values()))
            if step == self.step:
                if not self.at:
                    os.kill(os.getpid(), signal.SIGSTOP)
                self.saving = True
            return finite(parts)

        def ends(training: Any, wait: bool = False) -> Iterator[Any]:
            yield from save(training, wait)
            self.saving = False

        with (
            mock.patch.object(llm.saving, "tensors_of", begins),
            mock.patch.object(llm.train, "save", ends),
            mock.patch.object(llm.saver, "whole", self._counted(llm.training.saver.whole)),
            mock.patch.object(dist, "all_gather", self._counted(dist.all_gather)),
            mock.patch.object(dist, "all_reduce", self._counted(dist.all_reduce)),
        ):
            yield

    def _counted(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            shared = not args or not isinstance(args[0], torch.Tensor) or self._is_exchange(exchange, args[0])
            self.count += self.saving and shared
            if self.saving and shared and self.count == self.at and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            outcome = exchange(*args, **kwargs)
            if self.saving and shared and self.count == self.at and self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            return outcome

        return counted

    @staticmethod
    def _is_exchange(exchange: Callable[..., Any], value: torch.Tensor) -> bool:
        return exchange.__name__ != "whole" or hasattr(value, "full_tensor")
