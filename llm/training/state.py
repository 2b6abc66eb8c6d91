"""The state of a run: what it is made of, where it stands, how both get on the disk and back."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm import storage
from llm.config import TrainConfig, to_settings
from llm.data import TokenData, batch_at
from llm.errors import UserError
from llm.machine.device import onto
from llm.machine.world import ALONE, World, receive
from llm.model import GPT
from llm.record import metrics
from llm.storage import checkpoint
from llm.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes. B windows of T tokens, on the device."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, one token later
    seeds: Tensor  # (B,) int32, by which dropout draws
    parts: float  # micro-batches of this size that make up this process's share of the step
    is_last: bool  # of the step


@dataclass
class Parts:
    """What a step works on.

    `forward` is the model, perhaps compiled or wrapped for many processes. `exchange(is_last)` is the context of a
    micro-batch: gradients are exchanged between processes with the last one of a step.
    """

    config: TrainConfig
    model: GPT
    forward: Callable[..., Any]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # for float16; passes everything through where it is not enabled
    data: TokenData
    tokenizer: Tokenizer | None  # None: its vocabulary cannot be had, so no samples and no bits per byte
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    exchange: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext()
    data_seconds: float = 0.0  # spent on making batches since the last training row

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this process's share of the batch of `step`, in micro-batches of `batch_size` windows or fewer."""
        config, start = self.config, time.perf_counter()
        rows = self.world.rows(config.windows_per_step)
        batch = batch_at(self.data.train, config.seed, step, config.windows_per_step, config.model.block_size, rows)
        self.data_seconds += time.perf_counter() - start
        count = len(batch.x)
        for first in range(0, count, config.batch_size):
            windows = slice(first, first + config.batch_size)
            x, y, seeds = (onto(self.device, part[windows]) for part in (batch.x, batch.y, batch.seeds))
            yield MicroBatch(x, y, seeds, count / len(x), first + len(x) == count)


@dataclass
class Progress:
    """Where a run stands: saved with the weights, so that a resumed run goes on as if never stopped."""

    step: int = 0  # batches done
    tokens: int = 0  # in them
    seconds: float = 0.0  # since the start, evaluations and all
    bookkeeping: float = 0.0  # seconds of these spent on anything but steps
    losses: list[float | None] = field(default_factory=list)  # of the steps since the last record; None: refused
    recent: list[float] = field(default_factory=list)  # of the last steps, to judge a leap by
    told_loss: float = 0.0  # sum of the losses since the last evaluation
    told_count: int = 0  # and their number
    refused: list[int] = field(default_factory=list)  # steps whose batch made no update
    passed_over: list[int] = field(default_factory=list)  # those of them not tried again after going back
    went_back: int = 0
    best_step: int = 0
    best_loss: float | None = None  # lowest validation loss, nats per token
    last_loss: float | None = None  # newest validation loss
    stale: int = 0  # evaluations since the best


def tensors_of(parts: Parts) -> checkpoint.Groups:
    """The tensors to save, by group: the model's parameters (tied ones once) and the optimizer's state."""
    return {
        "model": dict(parts.model.named_parameters()),
        "optimizer": optimizer_tensors(parts.model, parts.optimizer),
    }


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "exp_avg.h.0.ln_1.weight" and so on; for a checkpoint.

    Nothing before the first update: it is all zeros.
    """
    named = {name: optimizer.state[p] for name, p in model.named_parameters()}
    if not any(entry["step"].item() for entry in named.values()):
        return {}
    return {f"{kind}.{name}": value for name, entry in named.items() for kind, value in entry.items()}


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor], world: World = ALONE
) -> None:
    """Put the `optimizer_tensors` that rank 0 has back. Raises UserError where they are not this model's."""
    wanted = {
        f"{kind}.{name}": value for name, p in model.named_parameters() for kind, value in optimizer.state[p].items()
    }
    with world.together():
        if tensors and (absent := wanted.keys() - tensors.keys()):
            raise UserError(f"saved state: no optimizer entry {min(absent)}; it belongs to another run")
        for key, value in tensors.items():
            if key not in wanted or value.shape != wanted[key].shape:
                raise UserError(f"saved state: optimizer entry {key} does not fit the model; it belongs to another run")
    begun = world.first(lambda: bool(tensors))
    for key, value in wanted.items():
        receive(world, value, tensors.get(key)) if begun else value.zero_()


def weights_of(parts: Parts, copies: checkpoint.Groups) -> dict[str, Tensor]:
    """The model's state_dict out of copies of its parameters; tied weights are one parameter of two names."""
    names = {id(p): name for name, p in parts.model.named_parameters()}
    whole = parts.model.state_dict(keep_vars=True)
    return {key: copies["model"][names[id(p)]] for key, p in whole.items()}


def facts_of(parts: Parts, progress: Progress) -> dict[str, Any]:
    """All of a state that is not a tensor."""
    return {
        "progress": asdict(progress),
        "scaler": parts.scaler.state_dict(),
        "data": parts.data.hashes,
        "settings": to_settings(parts.config),
    }


def write_state(
    out_dir: Path,
    record: metrics.Record,
    rows: int,
    step: int,
    weights: dict[str, Tensor],
    groups: checkpoint.Groups,
    facts: dict[str, Any],
    keep: int,
    is_best: bool,
) -> Path:
    """Put a state on the disk, and all that it relies on before it, `rows` of the record too. Raises OSError."""
    record.flush(rows)
    content = io.BytesIO()  # PyTorch's own writer turns a full disk into a RuntimeError, now and then
    torch.save(weights, content)
    for name in ("model.pt", "best.pt") if is_best else ("model.pt",):
        storage.write_bytes(out_dir / name, content.getbuffer())
    del content
    return checkpoint.save_state(out_dir, step, groups, facts, keep, is_best)


def newest_state(out_dir: Path, world: World) -> tuple[checkpoint.Groups, dict[str, Any], dict[Path, str]]:
    """What `checkpoint.newest_state` finds; the tensors on rank 0 only, which alone reads the run folder."""
    groups: checkpoint.Groups = {}

    def read() -> list[Any]:
        tensors, facts, passed_over = checkpoint.newest_state(out_dir)
        groups.update(tensors)
        return [facts, {str(folder): reason for folder, reason in passed_over.items()}]

    facts, passed_over = world.first(read)
    return groups, facts, {Path(folder): reason for folder, reason in passed_over.items()}


def restore(parts: Parts, groups: checkpoint.Groups, facts: dict[str, Any]) -> Progress:
    """Put a saved state, whose tensors rank 0 has, into the parts of a run; returns where it stood.

    Raises UserError where the state does not fit the model or the data.
    """
    world, parameters, saved = parts.world, dict(parts.model.named_parameters()), groups.get("model", {})
    with world.together():
        if facts.get("data") != parts.data.hashes:
            raise UserError(f"{parts.data.folder}: not the data this run was trained on; give the right --data_dir")
        if world.leads and {k: v.shape for k, v in saved.items()} != {k: p.shape for k, p in parameters.items()}:
            raise UserError("saved state: its weights do not fit the settings in config.toml")
    with torch.no_grad():
        for name, p in parameters.items():
            receive(world, p, saved.get(name))
    restore_optimizer(parts.model, parts.optimizer, groups.get("optimizer", {}), world)
    try:
        parts.scaler.load_state_dict(facts["scaler"])
        return Progress(**facts["progress"])
    except (KeyError, TypeError) as error:
        raise UserError(f"saved state: state.json is of another version ({error}); start another run") from None
