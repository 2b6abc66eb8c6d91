"""Fork a run: a new one that shares its past up to a checkpoint, and then goes its own way.

A fork is a run folder like any other, with that state as its newest checkpoint. To train it is to resume it.
"""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from llm import storage
from llm.arch import empty_model
from llm.config import MODEL_FIELDS, TrainConfig, from_settings, over_preset, resolve_settings, to_settings, write_toml
from llm.config.differences import folder_name, settings_apart
from llm.errors import UserError, no_run
from llm.record import metrics, samples
from llm.start.changes import new_run_command
from llm.start.resume_run import check_unfinished
from llm.start.run_data import beside, open_run_data
from llm.start.run_folder import Say, by_its_name, disk_needed, write_environment
from llm.start.texts import check_prompt, run_tokenizer
from llm.storage import checkpoint
from llm.training import predictions
from llm.training.state import weights_of, write_pt, write_state
from llm.weights import run_config

OTHER_RUN = {  # settings that a fork cannot change, and why
    **dict.fromkeys([*(MODEL_FIELDS.keys() - {"dropout"}), "vocab_size"], "the saved weights have this shape"),
    **dict.fromkeys(
        ("text", "text_limit", "text_field", "tokenizer", "val_fraction"),
        "the saved weights belong to the tokens of this text",
    ),
    **dict.fromkeys(("seed", "order"), "a fork draws the same batches as its run"),
    "init_from": "a fork starts from the checkpoint",
    "teacher": "a fork learns from the teachers of its run",
    "optimizer": "the checkpoint has the moments of this one",
}


def fork(run_dir: Path, step: int, changes: dict[str, Any], out_dir: Path, say: Say = lambda line: None) -> TrainConfig:
    """Make `out_dir` a run that shares the past of the run in `run_dir` up to `step`; return its settings.

    `changes` are the settings that differ from then on, by field name. Of the record and the samples, the fork takes
    what is there up to `step`; `forked_from` in its env.json is what `describe_past` returns. Nothing is written to
    `run_dir`. A crash leaves `out_dir` complete, or as it was: see `storage.new_folder`.

    Raises:
        UserError: `step` has no checkpoint, it is damaged, a setting cannot change, the token files are not found,
            or `out_dir` holds files.
    """
    before = run_config(run_dir)
    state = find_state(run_dir, step)
    changes = resolve_settings(changes)
    ruled_out: list[str] = []
    config = over_preset(to_settings(before), changes, ruled_out.append, source=str(run_dir))
    check_changes(run_dir, before, config)
    check_free(out_dir)
    groups, facts = checkpoint.load_state(state)
    check_goes_on(run_dir, step, before, config, facts)
    data = open_run_data(run_dir, before, facts["data"], changes.get("data_dir"), say)
    config = from_settings({"out_dir": out_dir, "data_dir": beside(data.folder, out_dir)}, config)

    for line in ruled_out:
        say(line)
    if "sample_prompt" in changes:
        check_prompt(run_tokenizer(run_dir, config.model.vocab_size, say, data.folder), config.sample_prompt)
    if config.teacher:
        predictions.open_predictions(run_dir, config, len(data.train))
    storage.check_writable(out_dir, disk_needed(config, len(data.train)))
    with storage.new_folder(out_dir) as folder:
        storage.write_text(folder / "config.toml", write_toml(config))
        write_environment(folder, data, describe_past(run_dir, state, before, config))
        for name in ("tokenizer.json", metrics.NAME, samples.NAME):
            if (run_dir / name).exists():
                storage.write_bytes(folder / name, (run_dir / name).read_bytes())
        if config.teacher:
            with storage.folder_in_place(folder / predictions.FOLDER) as copy:
                shutil.copyfile(run_dir / predictions.FOLDER / predictions.NAME, copy / predictions.NAME)
        metrics.Record(folder).cut(step)
        samples.Samples(folder).cut(step)
        write_weights(run_dir, folder, config, groups, facts, say)
    return config


def find_state(run_dir: Path, step: int | None) -> Path:
    """Return the folder of the checkpoint that the run saved at `step`. Raises UserError that says which there are."""
    steps = checkpoint.saved_steps(run_dir)
    if step in steps:
        return run_dir / checkpoint.folder_name(step)
    if not (run_dir / "config.toml").is_file():
        raise no_run(run_dir, "config.toml")
    if not steps:
        raise UserError(f"{run_dir}: no checkpoint to fork from; train it first, or give the folder of another run")
    wrong = "no --at given" if step is None else f"step {step} has no checkpoint"
    raise UserError(
        f"{run_dir}: {wrong}; saved are {_listed(steps)}; "
        f"give one of them, such as --at {steps[(len(steps) - 1) // 2]} (train with a larger --keep to have more)"
    )


def describe_past(run_dir: Path, state: Path, before: TrainConfig, config: TrainConfig) -> dict[str, Any]:
    """Return what the env.json of a fork with the settings `config` says of where it comes from, as "forked_from".

    "run" is the folder, "step" that of the checkpoint, "state" the SHA-256 of its manifest, "before" the run's values
    of the settings that the fork changes. If the run is a fork too, "forked_from" is the same of its own origin. What
    else the run's env.json says of its past holds for the fork.
    """
    facts = {
        "run": beside(run_dir, Path(config.out_dir)),
        "step": int(state.name.removeprefix("step-")),
        "state": storage.sha256(state / "manifest.json"),
        "before": {name: old for name, (_, old) in settings_apart(config, before, ("out_dir", "data_dir")).items()},
    }
    earlier = storage.read_facts(run_dir / "env.json")
    if "forked_from" in earlier:
        facts["forked_from"] = earlier["forked_from"]
    return earlier | {"forked_from": facts}


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:4], "…", *shown[-4:]])


def usual_folder(run_dir: Path, step: int, changes: dict[str, Any]) -> Path:
    """Return the folder of a fork for which none is given: beside the run, named by the step and what changes.

    Raises:
        UserError: a change is no setting, or the name would be too long.
    """
    run_dir = by_its_name(run_dir)
    named = {name: value for name, value in resolve_settings(changes).items() if name != "data_dir"}
    name = "-".join(filter(None, [run_dir.name, "at", str(step), folder_name(named)]))
    if len(name.encode()) > 240:  # file systems take 255 bytes
        raise UserError(f"{name}: is too long for the name of a folder; give a shorter one, with --out_dir")
    return run_dir.with_name(name)


def check_free(out_dir: Path) -> None:
    """Raise UserError if `out_dir` is a file or a folder with files."""
    if (out_dir / "config.toml").exists():
        raise UserError(
            f"{out_dir}: holds a run; continue that with losscurve train --resume --out_dir "
            f"{shlex.quote(str(out_dir))}, or choose another --out_dir"
        )
    if out_dir.is_dir() and (found := [path.name for path in out_dir.iterdir()]):
        shown = max(found)  # a hidden one only if there is no other
        raise UserError(f"{out_dir}: holds other files ({shown}); choose another --out_dir")
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; choose another --out_dir")


def check_goes_on(run_dir: Path, step: int, before: TrainConfig, after: TrainConfig, facts: dict[str, Any]) -> None:
    """Raise UserError if a fork with the settings `after` would end before its first step."""
    if after.max_steps <= step:
        longer = before.max_steps if before.max_steps > step else 2 * step
        raise UserError(
            f"max_steps = {after.max_steps}: a fork at step {step} has no steps left; give a larger --max_steps, such "
            f"as {longer}, or an earlier --at"
        )
    check_unfinished(from_settings({"out_dir": run_dir}, after), facts["progress"])


def check_changes(run_dir: Path, before: TrainConfig, after: TrainConfig) -> None:
    """Raise UserError that names a setting which a fork cannot change, with the reason and what to do instead."""
    old, new = to_settings(before), to_settings(after)
    for name in sorted(old.keys() | new.keys()):
        reason = OTHER_RUN.get(name) or _reason_by_value(name, before, after)
        if reason and old.get(name) != new.get(name):
            command = new_run_command(before, str(run_dir), {name: new.get(name)})
            raise UserError(
                f"{name} was {_shown(old.get(name))} in this run and cannot become {_shown(new.get(name))} in a fork: "
                f"{reason}; leave it out, or start another run with: {command}"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _reason_by_value(name: str, before: TrainConfig, after: TrainConfig) -> str:
    """Return why a setting that may change cannot change from and to these values; "" if it can."""
    if name == "ema" and (before.ema == 0) != (after.ema == 0):
        return "the checkpoint has no average of the weights" if before.ema == 0 else "the checkpoint has an average"
    if name == "dtype" and "float16" in (before.dtype, after.dtype):
        return "float16 scales the loss, and the checkpoint holds the scale"
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
        out_dir,
        metrics.Record(out_dir),
        rows=0,
        step=step,
        weights=weights,
        best=best if is_best else None,
        groups=groups,
        facts={name: value for name, value in facts.items() if name != "step"},
        keep=config.keep,
        best_step=None,  # there is nothing older
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
    write_pt(weights_of(model, older[kind]), out_dir / "best.pt")
