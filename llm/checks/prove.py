"""Proof that a resumed run is the run that was never stopped: whole runs, killed for good and resumed, compared."""

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.errors import Failure, UserError
from llm.machine.interpreter import child_environment
from llm.record.metrics import read_record
from llm.storage import checkpoint

TIMES = (
    "seconds",
    "tokens_per_second",
    "matmul_utilisation",
    "data_seconds",
    "bookkeeping",
)  # what differs between any two runs


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything a run came to, by what it is: weights, optimizer, record, samples; times left out."""
    groups, facts, _ = checkpoint.newest_state(run_dir)
    progress = {key: value for key, value in facts["progress"].items() if key not in TIMES}
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_record(run_dir)]
    found = {f"{name} at step {facts['step']}": _tensors(tensors) for name, tensors in groups.items()}
    for name in ("model.pt", "best.pt"):
        found[name] = _tensors(torch.load(run_dir / name, weights_only=True))
    found["where it stands"] = _json([progress, facts["scaler"]])
    found[f"metrics.jsonl, {len(rows)} rows"] = _json(rows)
    found["samples.txt"] = hashlib.sha256((run_dir / "samples.txt").read_bytes()).hexdigest()
    return found


def _tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_run(flags: list[str], out_dir: Path) -> None:
    """Train without any interruption, in a process of its own. Raises Failure if it does not end well."""
    finish(start([*flags, "--out_dir", str(out_dir), "--overwrite"]))


def killed_run(flags: list[str], out_dir: Path, max_steps: int, kills: int, luck: random.Random) -> Iterator[int]:
    """The same run, killed by SIGKILL `kills` times at random moments and resumed each time, then finished.

    Yields the last recorded step at each kill.
    """
    (out_dir / "metrics.jsonl").unlink(missing_ok=True)
    moments = sorted(luck.uniform(0, max_steps) for _ in range(kills))
    for moment in moments:
        process = start(_go_on(flags, out_dir))
        before = _recorded(out_dir)
        while process.poll() is None and _recorded(out_dir) < int(moment):
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.5))
        if process.poll() is not None:
            finish(process)  # it ended before its moment came: well, or it says why not
            return
        process.kill()
        process.communicate()
        yield max(before, _recorded(out_dir))
        if checkpoint.saved_steps(out_dir)[-1:] == [max_steps]:
            return  # all was done but its last words
    finish(start(_go_on(flags, out_dir)))


def _go_on(flags: list[str], out_dir: Path) -> list[str]:
    """How to go on: from the saved state, or anew where there is none or where this is the first start."""
    if not (out_dir / "metrics.jsonl").exists() or not checkpoint.saved_steps(out_dir):
        return [*flags, "--out_dir", str(out_dir), "--overwrite"]
    return ["--out_dir", str(out_dir), "--resume"]


def start(words: list[str], environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """`train` with these flags, in a process of its own, with more variables in its environment."""
    command = [sys.executable, "-m", "llm", "train", *words]
    env = child_environment() | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait for a run. Raises Failure, with the line that says why, if it does not end well."""
    _, errors = process.communicate()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])  # torchrun has the last word
        raise Failure(f"a training run did not end well: {said}")


def _recorded(out_dir: Path) -> int:
    """The last step in the record, -1 if there is none."""
    try:
        return max((row["step"] for row in read_record(out_dir)), default=-1)
    except UserError:
        return -1
