"""The jobs that tests run in worlds of several processes (ranks.py), and the faults that they inject there.

Each function runs on every rank. llm is imported inside them, so that its modules see torchrun's variables.
"""

import datetime
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist


def train(settings: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Train a new or a resumed run; return what this rank saw of it: batches, dropout masks, losses, weights."""
    from llm.config import from_settings
    from llm.machine.rendezvous import init_distributed
    from llm.machine.world import full_tensor
    from llm.start.new_run import new_run
    from llm.start.resume_run import resume_run
    from llm.train import train as training_loop
    from llm.training.events import Step
    from llm.training.saver import Saver
    from llm.training.state import tensors_of

    with init_distributed() as world:
        if resume:
            opened = resume_run(Path(settings["out_dir"]), settings, world=world)
        else:
            opened = new_run(from_settings(settings), world=world)
        with opened as training:
            start = Saver().copy(tensors_of(training.parts)), training.progress.step
            with (
                record_inputs(training.parts) as seen,
                mock.patch("llm.training.evaluating.plot_runs"),  # plots are slow
            ):
                steps = [event for event in training_loop(training) if isinstance(event, Step)]
        parameters = training.parts.model.named_parameters()
        weights = {name: full_tensor(p.detach()).cpu().clone() for name, p in parameters}
    return {
        "start": start,
        "seen": seen,
        "losses": [step.loss.item() for step in steps],
        "norms": [step.grad_norm.item() for step in steps],
        "weights": weights,
        "reason": training.reason,
    }


@contextmanager
def record_inputs(trainer: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Yield lists that fill, in order, with the training batches and with the mask of each dropout in the model."""
    import llm.model

    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": [], "seeds": []}
    forward = trainer.forward
    dropout = llm.model.Dropout.__call__

    def recorded_forward(x: torch.Tensor, y: torch.Tensor, seeds: torch.Tensor, taught: Any = None) -> Any:
        if torch.is_grad_enabled():
            for name, value in (("x", x), ("y", y), ("seeds", seeds)):
                seen[name].append(value.clone())
        return forward(x, y, seeds, taught)

    def recorded_dropout(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = dropout(self, x)
        if torch.is_grad_enabled():
            seen.setdefault(f"dropout {self.place}", []).append((out != 0).flatten(1))
        return out

    with (
        mock.patch.object(trainer, "forward", recorded_forward),
        mock.patch.object(llm.model.Dropout, "__call__", recorded_dropout),
    ):
        yield seen


def evaluate_first_weights(
    settings: dict[str, Any], cases: list[tuple[int, int]]
) -> list[tuple[float, float | None, int]]:
    """Evaluate a run's initial weights on other tokens, for each (number of tokens, limit) of `cases`."""
    from llm.config import from_settings
    from llm.evaluate import evaluate
    from llm.machine.device import precision
    from llm.machine.rendezvous import init_distributed
    from llm.start.new_run import new_run

    with init_distributed() as world, new_run(from_settings(settings), world=world) as training:
        parts = training.parts
        block_size = parts.model.config.block_size
        tokens = np.random.default_rng(5).integers(0, parts.model.config.vocab_size, 10**5).astype(np.uint16)
        found = []
        with precision(parts.dtype, parts.device):
            for count, limit in cases:
                split = tokens[:count], block_size, limit, training.token_bytes
                found.append(evaluate(parts.model, *split, world=world))
    return [(one.loss, one.bits_per_byte, one.tokens) for one in found]


def run_command(lines: list[str], change: Callable[[int], AbstractContextManager[Any]] | None = None) -> int:
    """Run a command and return its exit code. Each rank may have its own line; `change(rank)` may patch one rank."""
    from llm.commands.main import main

    rank = int(os.environ.get("RANK", 0))
    try:
        with change(rank) if change else nullcontext():
            return main(lines[rank % len(lines)].split())
    finally:
        if dist.is_initialized():  # a refused command leaves this to the end of its process
            dist.destroy_process_group()


def run_restarted(line: str) -> list[int]:
    """Run a command, and again as torchrun restarts it: with the same store. Return both exit codes."""
    return [run_command([line]) for _ in range(2)]


def patch_version(rank: int) -> AbstractContextManager[Any]:
    return mock.patch("llm.start.agreement.__version__", "0.0.9") if rank == 1 else nullcontext()


def patch_code_hash(rank: int) -> AbstractContextManager[Any]:
    return mock.patch("llm.start.agreement.code_hash", return_value="f" * 64) if rank == 1 else nullcontext()


def exit_before_start(rank: int, absent: int) -> AbstractContextManager[Any]:
    """Exit if this is the rank `absent`; the others wait for it for one second."""
    if rank == absent:
        os._exit(3)
    return mock.patch("llm.machine.rendezvous.COLLECTIVE_TIMEOUT", datetime.timedelta(seconds=1))


@dataclass
class Kill:
    """Kill `rank` before or after exchange number `at`, counted from 1, of the save at step `step`.

    Without `at`, stop it by SIGSTOP at that step instead. A save begins with the check that all numbers are finite.
    """

    rank: int
    step: int
    at: int = 0
    after: bool = False
    count: int = 0
    saving: bool = False

    def __call__(self, rank: int) -> AbstractContextManager[Any]:
        return self._patched() if rank == self.rank else nullcontext()

    @contextmanager
    def _patched(self) -> Iterator[None]:
        import llm.train
        import llm.training.saver
        import llm.training.saving

        save = llm.training.saving.save
        tensors_of = llm.training.saving.tensors_of

        def begin_save(parts: Any) -> Any:  # the tensors that `not_finite` checks, and that are saved
            step = int(max(entry["step"] for entry in parts.optimizer.state.values()))
            if step == self.step:
                if not self.at:
                    os.kill(os.getpid(), signal.SIGSTOP)
                self.saving = True
            return tensors_of(parts)

        def end_save(training: Any, wait: bool = False) -> Iterator[Any]:
            yield from save(training, wait)
            self.saving = False

        with (
            mock.patch.object(llm.training.saving, "tensors_of", begin_save),
            mock.patch.object(llm.train, "save", end_save),
            mock.patch.object(llm.training.saver, "full_tensor", self._counted(llm.training.saver.full_tensor)),
            mock.patch.object(dist, "all_gather", self._counted(dist.all_gather)),
            mock.patch.object(dist, "all_reduce", self._counted(dist.all_reduce)),
        ):
            yield

    def _counted(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts = self.saving and self._is_exchange(exchange, args)
            self.count += counts
            if counts and self.count == self.at and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            outcome = exchange(*args, **kwargs)
            if counts and self.count == self.at and self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            return outcome

        return counted

    @staticmethod
    def _is_exchange(exchange: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        # full_tensor is a collective only for a sharded tensor.
        if exchange.__name__ != "full_tensor" or not args or not isinstance(args[0], torch.Tensor):
            return True
        return hasattr(args[0], "full_tensor")
