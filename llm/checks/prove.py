"""Prove that a resumed run equals an uninterrupted one: train, kill with SIGKILL, resume, and compare bit for bit."""

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

# these differ between any two runs
TIMES = ("seconds", "tokens_per_second", "matmul_utilisation", "data_seconds", "bookkeeping", "predicting")


def fingerprint(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each part of a run: weights, optimizer, record, samples. Times are left out."""
    groups, facts, _ = checkpoint.newest_state(run_dir)
    progress = _without_times(facts["progress"])
    rows = [_without_times(row) for row in read_record(run_dir)]
    found = {f"{name} at step {facts['step']}": _hash_tensors(tensors) for name, tensors in groups.items()}
    for name in ("model.pt", "best.pt"):
        found[name] = _hash_tensors(torch.load(run_dir / name, weights_only=True))
    found["progress"] = _hash_json([progress, facts["scaler"]])
    found[f"metrics.jsonl, {len(rows)} rows"] = _hash_json(rows)
    found["samples.txt"] = hashlib.sha256((run_dir / "samples.txt").read_bytes()).hexdigest()
    return found


def _without_times(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in TIMES}


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_run(flags: list[str], out_dir: Path) -> None:
    """Train without interruption, in a separate process. Raises Failure if it fails."""
    finish(start([*flags, "--out_dir", str(out_dir), "--overwrite"]))


def killed_run(flags: list[str], out_dir: Path, max_steps: int, kills: int, generator: random.Random) -> Iterator[int]:
    """Train the same run, kill it with SIGKILL at `kills` random moments, resume it each time, and finish it.

    Yields the last recorded step at each kill. Raises Failure if a process fails otherwise.
    """
    (out_dir / "metrics.jsonl").unlink(missing_ok=True)
    moments = sorted(generator.uniform(0, max_steps) for _ in range(kills))
    for moment in moments:
        process = start(_start_or_resume(flags, out_dir))
        step_at_start = _recorded_step(out_dir)
        while process.poll() is None and _recorded_step(out_dir) < int(moment):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.5))
        if process.poll() is not None:
            finish(process)  # it ended before its moment came; raises if it failed
            return
        process.kill()
        process.communicate()
        yield max(step_at_start, _recorded_step(out_dir))
        if checkpoint.saved_steps(out_dir)[-1:] == [max_steps]:
            return  # the last checkpoint is complete, so there is nothing to resume
    finish(start(_start_or_resume(flags, out_dir)))


def _start_or_resume(flags: list[str], out_dir: Path) -> list[str]:
    """Return the flags that resume the run, or that start it if there is no record or no checkpoint."""
    if not (out_dir / "metrics.jsonl").exists() or not checkpoint.saved_steps(out_dir):
        return [*flags, "--out_dir", str(out_dir), "--overwrite"]
    return ["--out_dir", str(out_dir), "--resume"]


def start(flags: list[str], environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start `train` with these flags in a separate process, with `environment` added to its variables."""
    command = [sys.executable, "-m", "llm", "train", *flags]
    variables = child_environment() | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables)


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait for a run. Raises Failure with its error message if its exit code is not 0."""
    _, errors = process.communicate()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        message = next(
            (line for line in lines if line.startswith("error: ")), lines[-1]
        )  # torchrun adds lines after it
        raise Failure(f"a training run failed: {message}")


def _recorded_step(out_dir: Path) -> int:
    """Return the last step in the record, -1 if there is none."""
    try:
        return max((row["step"] for row in read_record(out_dir)), default=-1)
    except UserError:
        return -1
