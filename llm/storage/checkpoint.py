"""The resumable state of a run: named tensors and facts in a folder that is complete or absent.

`step-000500/` holds one safetensors file for each group of tensors ("model", "optimizer", ...),
`state.json` and `manifest.json` with their hashes. It knows nothing of the model. `latest` and `best`
are text files with a folder's name. Loading runs no code: safetensors and JSON only.
"""

import itertools
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

Groups = dict[str, dict[str, Tensor]]


DTYPES = {  # safetensors' names
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


_NAME = re.compile(r"step-(\d{6,})")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a saved state, oldest first."""
    found = {path.name: _NAME.fullmatch(path.name) for path in run_dir.glob("step-*") if path.is_dir()}
    steps = {name: int(match[1]) for name, match in found.items() if match}
    return sorted(step for name, step in steps.items() if name == folder_name(step))


def save_state(run_dir: Path, step: int, groups: Groups, facts: dict[str, Any], keep: int, is_best: bool) -> Path:
    """Write the state of `step`, point `latest` (and `best`) at it, then retire older states.

    The `keep` newest and the best stay. Nothing older is touched before the new state is on the disk.
    States of later steps, such as those of a schedule of kills, do not count and are left alone.
    """
    final = run_dir / folder_name(step)
    with storage.folder_in_place(final) as folder:
        for name, tensors in groups.items():
            with storage.writing(folder / f"{name}.safetensors") as file:
                for piece in pieces(tensors):
                    file.write(piece)
        storage.write_json(folder / "state.json", {"step": step, **facts})
    storage.write_text(run_dir / "latest", final.name + "\n")
    if is_best:
        storage.write_text(run_dir / "best", final.name + "\n")
    best = run_dir / "best"
    spared = best.read_text(encoding="utf-8", errors="replace").strip() if best.exists() else ""
    for old in [saved for saved in saved_steps(run_dir) if saved <= step][:-keep]:
        if folder_name(old) != spared:
            try:
                storage.remove_folder(run_dir / folder_name(old))
            except OSError as error:  # the new state is saved all the same
                storage.note(run_dir, "old states could not be removed; the next save tries again", error)
    return final


def pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of the tensors, the same bytes as `safetensors.torch.save` makes of them, one tensor after the
    other: that function would hold all of them twice more.
    """
    ordered = sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0]))  # so all are aligned
    ends = [0, *itertools.accumulate(value.nbytes for _, value in ordered)]
    header = {
        name: {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        for (name, value), start, end in zip(ordered, ends, ends[1:], strict=False)
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, value in ordered:
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def load_state(folder: Path) -> tuple[Groups, dict[str, Any]]:
    """(tensors by group, facts) of a saved state, every byte verified against its manifest first.

    Raises UserError naming the file that is missing, changed or not a state of ours.
    """
    storage.verify_folder(folder)
    facts = storage.read_json(folder / "state.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("step"), int):
        raise UserError(f"{folder / 'state.json'}: not the state of a run")
    if _NAME.fullmatch(folder.name) and folder.name != folder_name(facts["step"]):
        raise UserError(f"{folder / 'state.json'}: the state of step {facts['step']}, under another name")
    groups = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            groups[path.stem] = load(path.read_bytes())
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not readable as safetensors ({error})") from None
    return groups, facts


def newest_state(run_dir: Path) -> tuple[Groups, dict[str, Any], dict[Path, str]]:
    """The newest state that verifies, and the newer folders that were passed over, each with its reason.

    Raises UserError where none does.
    """
    passed_over: dict[Path, str] = {}
    for step in reversed(saved_steps(run_dir)):
        folder = run_dir / folder_name(step)
        try:
            groups, facts = load_state(folder)
            return groups, facts, passed_over
        except (UserError, OSError) as error:
            passed_over[folder] = str(error)
    reason = f" ({'; '.join(passed_over.values())})" if passed_over else ""
    raise UserError(f"{run_dir}: no saved state to resume from{reason}; start anew with --overwrite")


def set_aside(folder: Path) -> Path:
    """Rename a state that does not verify, so that it is never tried again and can still be looked at."""
    names = (f"damaged-{folder.name}" + (f"-{n}" if n else "") for n in itertools.count())
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    storage.rename_folder(folder, aside)
    storage.sync_folder(folder.parent)
    return aside
