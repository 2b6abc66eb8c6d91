"""Fork a run: a new one that shares its past up to a saved state, and then goes its own way.

A fork is a run folder like any other, with that state as its newest checkpoint. To train it is to resume it.
"""

import io
from pathlib import Path
from typing import Any

import torch

from llm import storage
from llm.arch import empty_model
from llm.config import MODEL_FIELDS, TrainConfig, from_settings, over_preset, resolve_settings, to_settings, write_toml
from llm.errors import UserError
from llm.record import metrics, samples
from llm.start.changes import new_run_command
from llm.start.resume_run import check_unfinished
from llm.start.run_data import beside, open_run_data
from llm.start.run_folder import Say, disk_needed, write_environment
from llm.storage import checkpoint
from llm.training.state import weights_of, write_state
from llm.weights import run_config

OTHER_RUN = {  # settings that a fork cannot change, and why
    **dict.fromkeys([*(MODEL_FIELDS.keys() - {"dropout"}), "vocab_size"], "the saved weights have this shape"),
    **dict.fromkeys(
        ("text", "text_limit", "text_field", "tokenizer", "val_fraction"),
        "the saved weights belong to the tokens of this text",
    ),
    **dict.fromkeys(("seed", "order"), "a fork draws the same batches as its run"),
    "init_from": "a fork starts from the saved state",
    "optimizer": "the saved state has the moments of this one",
}


def fork(run_dir: Path, step: int, changes: dict[str, Any], out_dir: Path, say: Say = lambda line: None) -> TrainConfig:
    """Make `out_dir` a run that shares the past of the run in `run_dir` up to `step`; return its settings.

    `changes` are the settings that differ from then on, by field name. Of the record and the samples, the fork takes
    what is there up to `step`; `env.json` names the run, the step and the SHA-256 of the state's manifest as
    `forked_from`. Nothing is written to `run_dir`.

    Raises:
        UserError: there is no state of `step`, it is damaged, a setting cannot change, the token files are not found,
            or `out_dir` holds a run.
    """
    before = run_config(run_dir)
    state = find_state(run_dir, step)
    changes = resolve_settings(changes)
    config = over_preset(to_settings(before), changes, say)
    check_changes(before, config)
    check_free(out_dir)
    groups, facts = checkpoint.load_state(state)
    check_unfinished(config, facts["progress"])
    data = open_run_data(run_dir, before, facts["data"], changes.get("data_dir"), say)
    config = from_settings({"out_dir": out_dir, "data_dir": beside(data.folder, out_dir)}, config)

    storage.check_writable(out_dir, disk_needed(config))
    with storage.locked(out_dir, "this run folder"):
        check_free(out_dir)
        storage.write_text(out_dir / "config.toml", write_toml(config))
        origin = {"run": beside(run_dir, out_dir), "step": step, "state": storage.sha256(state / "manifest.json")}
        write_environment(out_dir, data, origin)
        for name in ("tokenizer.json", metrics.NAME, samples.NAME):
            if (run_dir / name).exists():
                storage.write_bytes(out_dir / name, (run_dir / name).read_bytes())
        metrics.cut(out_dir, step)
        samples.Samples(out_dir).cut(step)
        write_weights(run_dir, out_dir, config, groups, facts, say)
    return config


def find_state(run_dir: Path, step: int | None) -> Path:
    """Return the folder of the state that the run saved at `step`. Raises UserError that says which there are."""
    steps = checkpoint.saved_steps(run_dir)
    if step in steps:
        return run_dir / checkpoint.folder_name(step)
    if not steps:
        raise UserError(f"{run_dir}: no saved state to fork from; train it first, or give the folder of another run")
    raise UserError(
        f"{run_dir}: {'no --at given' if step is None else f'no state of step {step}'}; saved are {_listed(steps)}; "
        f"give one of them, such as --at {steps[(len(steps) - 1) // 2]} (train with a larger --keep to have more)"
    )


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:4], "…", *shown[-4:]])


def check_free(out_dir: Path) -> None:
    """Raise UserError if `out_dir` holds a run."""
    if any((out_dir / name).exists() for name in ("config.toml", metrics.NAME)) or checkpoint.saved_steps(out_dir):
        raise UserError(
            f"{out_dir}: holds a run; continue that with losscurve train --resume --out_dir {out_dir}, or choose "
            "another --out_dir"
        )


def check_changes(before: TrainConfig, after: TrainConfig) -> None:
    """Raise UserError that names a setting which a fork cannot change, with the reason and what to do instead."""
    old, new = to_settings(before), to_settings(after)
    for name in sorted(old.keys() | new.keys()):
        reason = OTHER_RUN.get(name) or _reason_by_value(name, before, after)
        if reason and old.get(name) != new.get(name):
            raise UserError(
                f"{name} was {old.get(name)!r} in this run and cannot become {new.get(name)!r} in a fork: {reason}; "
                f"leave it out, or start another run with: {new_run_command(before, {name: new.get(name)})}"
            )


def _reason_by_value(name: str, before: TrainConfig, after: TrainConfig) -> str:
    """Return why a setting that may change cannot change from and to these values; "" if it can."""
    if name == "ema" and (before.ema == 0) != (after.ema == 0):
        return "the saved state has no average of the weights" if before.ema == 0 else "the saved state has an average"
    if name == "dtype" and "float16" in (before.dtype, after.dtype):
        return "float16 scales the loss, and the saved state holds the scale"
    is_other_step = before.order == "epochs" and before.windows_per_step != after.windows_per_step
    if name in ("batch_size", "gradient_accumulation_steps") and is_other_step:
        return "with order = 'epochs' another number of windows a step would repeat or leave out some"
    return ""


def write_weights(
    run_dir: Path, out_dir: Path, config: TrainConfig, groups: checkpoint.Groups, facts: dict[str, Any], say: Say
) -> None:
    """Write the checkpoint, model.pt, and best.pt if the run in `run_dir` still has the weights that were best then."""
    progress = facts["progress"]
    step, best_step = progress["step"], progress["best_step"]
    model = empty_model(config.model)
    kind = "ema" if progress["best_weights"] == "ema" else "model"
    weights = best = weights_of(model, groups["model"])
    if kind == "ema" and best_step == step:
        best = weights_of(model, groups[kind])
    is_best = progress["best_loss"] is not None and best_step == step
    facts = facts | {"settings": to_settings(config)}
    write_state(
        *(out_dir, metrics.Record(out_dir), 0, step, weights, best if is_best else None),
        *(groups, {name: value for name, value in facts.items() if name != "step"}, config.keep),
    )
    if progress["best_loss"] is None or is_best:
        return
    if best_step not in checkpoint.saved_steps(run_dir):
        say(
            f"{run_dir}: no longer has the weights of step {best_step}, the best up to step {step}; the fork has a "
            "best.pt once it is better"
        )
        return
    older, _ = checkpoint.load_state(run_dir / checkpoint.folder_name(best_step))
    content = io.BytesIO()
    torch.save(weights_of(model, older[kind]), content)
    storage.write_bytes(out_dir / "best.pt", content.getbuffer())
