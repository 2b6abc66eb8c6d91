"""The run folder: refuse or clear an earlier run, the disk it needs, env.json."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm import __version__, storage
from llm.config import TrainConfig
from llm.config.counts import count_parameters
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import environment
from llm.storage import checkpoint
from llm.training import predictions

Say = Callable[[str], None]  # prints a line for the user

OURS = (
    *("metrics.jsonl", "env.json", "tokenizer.json", "refused.json", "report.html"),
    *("samples.jsonl", "samples.txt", "loss_curve.png", "config.toml"),
)
WEIGHTS = ("model.pt", "best.pt")
# facts in env.json that stay true on another machine: the checkpoint that a fork began from, and whether the run, or
# one that it goes on from, began with weights that another program had trained
PAST = ("forked_from", "pretrained")


def once(say: Say) -> Say:
    """Return `say` without the lines that it was given before: a text that is opened again is described once."""
    said: set[str] = set()

    def say_new(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_new


def by_its_name(run_dir: Path) -> Path:
    """Return the path of a run folder that ends in its name, also of one that is typed as `.` or `..`."""
    return run_dir if run_dir.name.strip(".") else Path(os.path.abspath(run_dir))


def say_limits(say: Say) -> None:
    """Say which operations the file systems of this run lack."""
    for limit in storage.limits():
        say(limit)


def refuse_existing(out_dir: Path, overwrite: bool) -> bool:
    """Return whether `out_dir` holds a run. Raise UserError that names it if it may not be overwritten, or what else is
    there that a run would replace.
    """
    found = [name for name in ("config.toml", "metrics.jsonl", *WEIGHTS) if (out_dir / name).exists()]
    states = checkpoint.saved_steps(out_dir)
    if not found and not states:
        others = [name for name in OURS if os.path.lexists(out_dir / name)]
        if others:
            raise UserError(
                f"{out_dir}: holds {others[0]}, which is of no run and would be replaced; choose another --out_dir"
            )
        return False
    if not overwrite:
        there = f"a run saved at step {states[-1]}" if states else f"a run ({found[0]})"
        raise UserError(
            f"{out_dir}: holds {there}; continue with --resume, replace it with --overwrite, or choose another "
            "--out_dir"
        )
    return True


def clear(out_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else: config.toml last, which says that there is one."""
    states = [out_dir / checkpoint.folder_name(step) for step in checkpoint.saved_steps(out_dir)]
    for folder in (*states, *out_dir.glob("damaged-step-*"), *out_dir.glob(predictions.FOLDER)):
        storage.remove_folder(folder)
    pointers = [name for name in ("latest", "best") if (out_dir / name).is_file()]  # of older versions
    for name in (*pointers, *WEIGHTS, *OURS):
        (out_dir / name).unlink(missing_ok=True)


def disk_needed(config: TrainConfig, tokens: int = 0) -> int:
    """Return the bytes of a run at its largest: checkpoints, the two .pt files, and what its teachers predict.

    A checkpoint holds weights, two moments and, with `ema`, an average of the weights, in float32. `tokens`: those of
    the training text, of which the teachers still have to predict.
    """
    size = 4 * count_parameters(config.model)
    return size * ((4 if config.ema else 3) * (config.keep + 2) + 3) + predictions.size_of(config, tokens)


def disk_used(out_dir: Path) -> int:
    """Return the bytes of what a run has written already of that."""
    folders = [out_dir / checkpoint.folder_name(step) for step in checkpoint.saved_steps(out_dir)]
    files = [*(path for folder in folders for path in folder.iterdir()), *(out_dir / name for name in WEIGHTS)]
    return sum(path.stat().st_size for path in files if path.is_file())


def write_environment(out_dir: Path, data: TokenData, past: dict[str, Any]) -> None:
    """Write versions, machine, commit and data hashes to env.json, and those facts of `past` that PAST names."""
    here = Path(__file__).parents[1]
    asked = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ) if shutil.which("git") and (here.parent / ".git").exists() else None  # fmt: skip
    facts: dict[str, Any] = {"losscurve": __version__, "commit": asked.stdout.strip() if asked else None}
    facts["data"] = data.hashes
    facts |= {name: past[name] for name in PAST if name in past}
    storage.write_json(out_dir / "env.json", facts | environment())
