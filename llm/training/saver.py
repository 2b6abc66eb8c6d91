"""Write checkpoints in a thread: a step waits while the tensors are copied, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llm.machine.world import full_tensor, local_shard
from llm.storage.checkpoint import Groups


class Saver:
    """Writes one checkpoint at a time in its own thread, from copies of the tensors in reused buffers."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._writing: tuple[int, Future[Path]] | None = None  # step, and the future of its folder
        self._copies: dict[tuple[str, str], Tensor] = {}

    def copy(self, groups: Groups, keep: bool = True) -> Groups:
        """Return copies of the full tensors, on the CPU. Call it only while nothing is being written: see `finished`.

        All ranks must call this, because it gathers sharded tensors. A rank with `keep` false takes part in the
        collectives and gets no copies.
        """
        assert self._writing is None
        for group, tensors in groups.items():
            for name, value in tensors.items():
                full = full_tensor(value.detach())
                if not keep:
                    continue
                if (group, name) not in self._copies:
                    self._copies[group, name] = torch.empty_like(full, device="cpu")
                self._copies[group, name].copy_(full)
        return {
            group: {name: self._copies[group, name] for name in tensors if keep} for group, tensors in groups.items()
        }

    def start(self, step: int, write: Callable[[], Path]) -> None:
        """Start to write the checkpoint of `step`."""
        assert self._writing is None
        self._writing = step, self._pool.submit(write)

    def finished(self, wait: bool = False) -> tuple[int, Path | OSError] | None:
        """Return the step of the checkpoint that was started, and its folder or the error that prevented it.

        Returns None while it is being written (with `wait` it waits for the end), or if none was started. Raises any
        other error of the thread.
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
        """Wait until the checkpoint in progress is written, and end the thread."""
        self._pool.shutdown()


def not_finite(groups: Groups) -> str | None:
    """Return the name of the first tensor (or shard of this rank) with a number that is not finite, else None."""
    named = [(name, local_shard(value)) for tensors in groups.values() for name, value in tensors.items()]
    named = [(name, value) for name, value in named if value.numel()]
    is_finite = torch.stack([torch.isfinite(torch.stack(value.aminmax())).all() for _, value in named])
    flags = is_finite.tolist()  # waits for the device once, not once per tensor
    return next((name for (name, _), finite in zip(named, flags, strict=True) if not finite), None)
