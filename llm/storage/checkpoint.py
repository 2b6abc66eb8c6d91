"""Checkpoints to resume from: named tensors and facts in a folder that is complete or absent.

`step-000500/` holds one safetensors file for each group of tensors ("model", "optimizer", ...), `state.json`, and
`manifest.json` with the SHA-256 of each file. This module knows nothing of the model. Loading runs no code: it reads
safetensors and JSON only.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from llm import storage
from llm.errors import UserError

Groups = dict[str, dict[str, Tensor]]  # group: {name: tensor}

DTYPES = {  # the names that safetensors gives them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_NAME = re.compile(r"step-(\d{6,})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint in `run_dir`, oldest first."""
    steps = []
    for path in run_dir.glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        step = int(match[1])
        if path.name == folder_name(step):
            steps.append(step)
    return sorted(steps)


def save_state(
    run_dir: Path, step: int, groups: Groups, facts: dict[str, Any], keep: int, best_step: int | None = None
) -> Path:
    """Write the checkpoint of `step`, then remove older ones; return its folder.

    The `keep` newest stay, and that of `best_step`. Nothing older is touched before the new checkpoint is on the disk.
    Checkpoints of later steps, such as those of a run with planned kills, do not count towards `keep` and stay.
    """
    final = run_dir / folder_name(step)
    with storage.folder_in_place(final) as folder:
        for name, tensors in groups.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        storage.write_json(folder / "state.json", {"step": step, **facts})
    _remove_old(run_dir, step, keep, best_step)
    return final


def _remove_old(run_dir: Path, step: int, keep: int, best_step: int | None) -> None:
    up_to_now = [saved for saved in saved_steps(run_dir) if saved <= step]
    for old in up_to_now[:-keep]:
        if old != best_step:
            try:
                storage.remove_folder(run_dir / folder_name(old))
            except OSError as error:  # the new checkpoint is saved all the same
                storage.note(run_dir, "old checkpoints could not be removed; the next save tries again", error)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file. Raises OSError."""
    with storage.writing(path) as file:
        for part in serialize_tensors(tensors):
            file.write(part)


def serialize_tensors(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor at a time.

    They are the bytes that `safetensors.torch.save` returns; that function holds all tensors in memory twice more.
    """
    # Largest elements first, as safetensors orders them: so all tensors are aligned.
    ordered = sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, value in ordered:
        end = start + value.nbytes
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, value in ordered:
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def load_state(folder: Path) -> tuple[Groups, dict[str, Any]]:
    """Return (tensors by group, facts) of a checkpoint, after verifying every byte against its manifest.

    Raises: UserError that names the file which is missing, changed or not part of a checkpoint of ours.
    """
    storage.verify_folder(folder)
    facts = storage.read_json(folder / "state.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("step"), int):
        raise UserError(f"{folder / 'state.json'}: not the state of a run")
    if _NAME.fullmatch(folder.name) and folder.name != folder_name(facts["step"]):
        raise UserError(f"{folder / 'state.json'}: the state of step {facts['step']}, under another name")
    groups = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        try:
            groups[path.stem] = load(path.read_bytes())
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not readable as safetensors ({error})") from None
    return groups, facts


def newest_state(run_dir: Path) -> tuple[Groups, dict[str, Any], dict[Path, str]]:
    """Return (tensors by group, facts, skipped) of the newest checkpoint that verifies.

    `skipped` holds the folders of newer checkpoints that do not verify, each with the reason.

    Raises: UserError if no checkpoint verifies.
    """
    skipped: dict[Path, str] = {}
    for step in reversed(saved_steps(run_dir)):
        folder = run_dir / folder_name(step)
        try:
            groups, facts = load_state(folder)
            return groups, facts, skipped
        except (UserError, OSError) as error:
            skipped[folder] = str(error)
    reasons = f" ({'; '.join(skipped.values())})" if skipped else ""
    raise UserError(f"{run_dir}: no checkpoint to resume from{reasons}; start a new run with --overwrite")


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint that does not verify, so that no resume tries it again and the user can inspect it."""
    aside = folder.with_name(f"damaged-{folder.name}")
    number = 0
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    storage.rename_folder(folder, aside)
    storage.sync_folder(folder.parent)
    return aside
