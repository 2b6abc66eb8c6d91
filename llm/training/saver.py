"""Saving beside the training: the step waits for a copy of the tensors, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llm.machine.world import shard, whole
from llm.storage.checkpoint import Groups


class Saver:
    """Writes one state at a time in a thread of its own, from copies in memory that is used again."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._writing: tuple[int, Future[Path]] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def copy(self, groups: Groups, keep: bool = True) -> Groups:
        """The tensors as they are now, whole and on the CPU; with `keep` false only what the other processes need for
        that is done, and nothing is returned. Only while nothing is being written: see `finished`.
        """
        assert self._writing is None
        for group, tensors in groups.items():
            for name, value in tensors.items():
                full = whole(value.detach())
                if keep and (group, name) not in self._copies:
                    self._copies[group, name] = torch.empty_like(full, device="cpu")
                if keep:
                    self._copies[group, name].copy_(full)
        return {
            group: {name: self._copies[group, name] for name in tensors if keep} for group, tensors in groups.items()
        }

    def start(self, step: int, write: Callable[[], Path]) -> None:
        """Begin to write the state of `step`."""
        assert self._writing is None
        self._writing = step, self._pool.submit(write)

    def finished(self, wait: bool = False) -> tuple[int, Path | OSError] | None:
        """The state that was begun, if it is written by now (or after waiting for it): its step, and its folder or
        why it could not be written. None while it is not, or if none was begun. Another kind of error is raised.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        step, future = self._writing
        self._writing = None
        try:
            return step, future.result()
        except OSError as error:
            return step, error

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._pool.shutdown()


def not_finite(groups: Groups) -> str | None:
    """The name of the first tensor (or shard of this process) that holds a number which is not finite; None if all is
    well.
    """
    named = [(name, shard(value)) for tensors in groups.values() for name, value in tensors.items()]
    named = [(name, value) for name, value in named if value.numel()]
    good = torch.stack([torch.isfinite(torch.stack(value.aminmax())).all() for _, value in named])
    return next((name for (name, _), fine in zip(named, good.tolist(), strict=True) if not fine), None)  # one wait
