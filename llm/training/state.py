"""The state of a run: its progress and tensors, written to a checkpoint and restored from one."""

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm import storage
from llm.config import to_settings
from llm.errors import UserError
from llm.machine.parallel import reshard
from llm.machine.world import ALONE, World, receive
from llm.record import metrics
from llm.storage import checkpoint
from llm.training.averaging import Average
from llm.training.parts import Parts


@dataclass
class Progress:
    """The progress of a run. Checkpoints hold it, so that a resumed run continues as if it had never stopped."""

    step: int = 0  # completed steps
    tokens: int = 0  # in the batches of these steps
    seconds: float = 0.0  # since the start of the run, evaluations included
    bookkeeping: float = 0.0  # how many of these seconds were spent on neither training steps nor teachers
    predicting: float = 0.0  # in how many of them the teachers predicted, before the first step
    losses: list[float | None] = field(default_factory=list)  # of the steps since the last row; None: refused
    recent: list[float] = field(default_factory=list)  # losses of the last steps, to detect spikes
    interval_loss: float = 0.0  # sum of the losses since the last evaluation
    interval_steps: int = 0  # number of these losses
    refused: list[int] = field(default_factory=list)  # steps whose batch made no update
    skipped: list[int] = field(default_factory=list)  # refused steps that are skipped after a rollback
    rollbacks: int = 0
    best_step: int = 0
    best_loss: float | None = None  # lowest validation loss, nats per token
    best_weights: str = "raw"  # those with that loss, in best.pt: "raw", or "ema" for their average
    last_loss: float | None = None  # newest validation loss, nats per token
    stale: int = 0  # evaluations since the best


def tensors_of(parts: Parts) -> checkpoint.Groups:
    """Return the tensors to save, by group: the model's parameters (tied ones once), the optimizer's state, the average
    of the weights.
    """
    reshard(parts.model)  # an evaluation leaves the root gathered, and its parameters are then others
    groups: checkpoint.Groups = {
        "model": dict(parts.model.named_parameters()),
        "optimizer": optimizer_tensors(parts.model, parts.optimizer),
    }
    if parts.average:
        groups["ema"] = parts.average.tensors()
    return groups


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by names such as "exp_avg.h.0.ln_1.weight".

    Returns {} before the first update, when all of it is zero.
    """
    named = {name: optimizer.state[p] for name, p in model.named_parameters()}
    if not any(entry["step"].item() for entry in named.values() if "step" in entry):  # Muon counts no steps
        return {}
    return {f"{kind}.{name}": value for name, entry in named.items() for kind, value in entry.items()}


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], world: World = ALONE
) -> None:
    """Copy `tensors`, the `optimizer_tensors` on rank 0, into the optimizer of every rank.

    Raises UserError if they do not fit this model.
    """
    wanted = {
        f"{kind}.{name}": value for name, p in model.named_parameters() for kind, value in optimizer.state[p].items()
    }
    with world.together():
        if tensors and (absent := wanted.keys() - tensors.keys()):
            raise UserError(f"checkpoint: no optimizer entry {min(absent)}; it belongs to another run")
        for key, value in tensors.items():
            if key not in wanted or value.shape != wanted[key].shape:
                raise UserError(f"checkpoint: optimizer entry {key} does not fit the model; it belongs to another run")
    is_saved = world.first(lambda: bool(tensors))
    for key, value in wanted.items():
        if is_saved:
            receive(world, value, tensors.get(key))
        else:
            value.zero_()


def restore_average(average: Average, tensors: dict[str, Tensor], world: World = ALONE) -> None:
    """Copy `tensors`, the `Average.tensors` on rank 0, into the average of every rank.

    Raises UserError if they do not fit this model.
    """
    wanted = average.tensors()
    with world.together():
        if world.leads and {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in wanted.items()}:
            raise UserError("checkpoint: its average of the weights does not fit the settings in config.toml")
    for name, value in wanted.items():
        receive(world, value, tensors.get(name))


def weights_of(model: nn.Module, copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's state_dict from copies of its parameters. Tied weights are one parameter with two names."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = model.state_dict(keep_vars=True)
    return {key: copies[names[id(p)]] for key, p in parameters.items()}


def facts_of(parts: Parts, progress: Progress) -> dict[str, Any]:
    """Return the content of a checkpoint that is not a tensor."""
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
    best: dict[str, Tensor] | None,
    groups: checkpoint.Groups,
    facts: dict[str, Any],
    keep: int,
    best_step: int | None,
) -> Path:
    """Flush the first `rows` rows of the record, write `weights` as model.pt and `best`, unless it is None, as best.pt,
    then the checkpoint.

    Raises OSError.
    """
    record.flush(rows)
    if best is weights:  # serialised once
        write_pt(weights, out_dir / "model.pt", out_dir / "best.pt")
    else:
        write_pt(weights, out_dir / "model.pt")
        if best is not None:
            write_pt(best, out_dir / "best.pt")
    return checkpoint.save_state(out_dir, step, groups, facts, keep, best_step)


def write_pt(weights: dict[str, Tensor], *paths: Path) -> None:
    """Write weights to all `paths`. Raises OSError."""
    content = io.BytesIO()  # PyTorch's own writer raises RuntimeError on a full disk, not always OSError
    torch.save(weights, content)
    for path in paths:
        storage.write_bytes(path, content.getbuffer())


def newest_state(out_dir: Path, world: World) -> tuple[checkpoint.Groups, dict[str, Any], dict[Path, str]]:
    """Return the result of `checkpoint.newest_state`. Only rank 0 reads the folder, and only it gets the tensors."""
    groups: checkpoint.Groups = {}

    def read() -> list[Any]:
        tensors, facts, unusable = checkpoint.newest_state(out_dir)
        groups.update(tensors)
        return [facts, {str(folder): reason for folder, reason in unusable.items()}]

    facts, unusable = world.first(read)
    return groups, facts, {Path(folder): reason for folder, reason in unusable.items()}


def restore(parts: Parts, groups: checkpoint.Groups, facts: dict[str, Any]) -> Progress:
    """Copy a checkpoint, with its tensors on rank 0, into the parts of a run; return the progress that it holds.

    Raises UserError if it does not fit the model or the data.
    """
    world = parts.world
    parameters = dict(parts.model.named_parameters())
    saved = groups.get("model", {})
    with world.together():
        if facts.get("data") != parts.data.hashes:
            raise UserError(f"{parts.data.folder}: not the data this run was trained on; give the right --data_dir")
        if world.leads and {k: v.shape for k, v in saved.items()} != {k: p.shape for k, p in parameters.items()}:
            raise UserError("checkpoint: its weights do not fit the settings in config.toml")
    with torch.no_grad():
        for name, p in parameters.items():
            receive(world, p, saved.get(name))
    restore_optimizer(parts.model, parts.optimizer, groups.get("optimizer", {}), world)
    if parts.average:
        restore_average(parts.average, groups.get("ema", {}), world)
    try:
        parts.scaler.load_state_dict(facts["scaler"])
        return Progress(**facts["progress"])
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint: state.json is of another version ({error}); start another run") from None
