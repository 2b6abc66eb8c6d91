"""A rehearsal of a cluster run on one machine: the same settings with a smaller model, really run and really killed.

Several processes on the CPU train, save and lose one of them to SIGKILL; one process goes on alone, and what comes of
it is compared with a run that nothing happened to. What only the real settings can tell is looked at too.
"""

import contextlib
import math
import subprocess
import time
from pathlib import Path

import torch

from llm.config import TrainConfig, from_settings, to_settings
from llm.errors import Failure
from llm.record.metrics import read_record
from llm.start.run_folder import Say
from llm.storage import checkpoint
from llm.text import corpus
from llm.tokens.prepare import prepare
from llm.tokens.tokenizer import Tokenizer

LAYERS, WIDTH, CONTEXT, WINDOWS = 2, 64, 32, 2  # of the small model; windows in a micro-batch


STEPS, SAVE, EVALUATE = 16, 4, 8  # of the small run, and how often it saves and evaluates


EVAL_TOKENS = 3 * 2048  # three batches: among two processes one is left over


PIECE = 200_000  # characters of a text without token files


LIMIT = 300.0  # seconds for a job of a few; one that takes longer hangs


# how far apart two runs may be that add up in another order: losses in nats per token; weights, as the root of the mean
# square, in units of max_lr. Measured: 1e-6 and 2e-6 in float32, 8e-5 and 2e-2 in bfloat16; 1 or more where a resume
# forgets the optimizer's state
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (1e-2, 0.1), "float16": (1e-2, 0.1)}


NOT_CHECKED = (
    "NCCL and GPUs, the network between machines, whether each machine sees the same files, "
    "the accelerator's memory and speed"
)


def shrunk(config: TrainConfig, nproc: int, world_size: int) -> TrainConfig:
    """`config` with a model and a run small enough for seconds, on the CPU.

    What can break stays: how processes share the work, precision, dropout, heads, biases, the vocabulary, clipping, the
    shape of the schedule, and whether a process accumulates micro-batches or has but a part of one.
    """
    model, (batch, micro_batches) = config.model, _dealt(config, nproc, world_size)
    head = min(model.n_embd // model.n_head, max(1, WIDTH // model.n_head))
    settings = {
        "n_layer": min(LAYERS, model.n_layer),
        "n_embd": model.n_head * head,
        "block_size": min(CONTEXT, model.block_size),
        "batch_size": batch,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": STEPS,
        "warmup_steps": min(STEPS - 1, math.ceil(STEPS * config.warmup / config.max_steps)),
        "eval_every": EVALUATE,
        "eval_tokens": min(EVAL_TOKENS, config.eval_tokens),
        "save_every": SAVE,
        "log_every": 1,
        "keep": min(2, config.keep),
        "sample_tokens": min(5, config.sample_tokens),
        "device": "cpu",
        **{"compile": False, "init_from": None, "max_time": None, "patience": None, "sample_prompt": None},
    }
    return from_settings(settings, config)


def _dealt(config: TrainConfig, nproc: int, world_size: int) -> tuple[int, int]:
    """(batch_size, gradient_accumulation_steps) that give each of `nproc` processes micro-batches of the kind that each
    of `world_size` gets: a part of one, a whole one, several, or several of which the last is smaller.
    """
    share, batch = max(1, config.windows_per_step // world_size), config.batch_size
    if share < batch:
        return WINDOWS * nproc, 1
    if share % batch == 0:
        return WINDOWS, nproc * min(2, share // batch)
    part = next(number for number in range(2, nproc + 1) if nproc % number == 0)
    return part, nproc * (part + 1) // part  # `part` windows and one more for each


def changes(config: TrainConfig, small: TrainConfig) -> list[str]:
    """What was shrunk, from what to what, by setting."""
    before, after = to_settings(config), to_settings(small)
    names = [name for name in before if before[name] != after.get(name)]
    return [f"{name} {before[name]} -> {after.get(name, 'none')}" for name in names]


def differences(whole: Path, parts: Path) -> tuple[float, float]:
    """Between two runs that ended: the largest of their losses (nats per token), the root mean square of their weights.

    Raises Failure where they did not take the same steps at the same learning rates, or not with the same batches
    refused.
    """
    records = [read_record(folder) for folder in (whole, parts)]
    for kind in ("step", "split", "lr", "tokens"):
        if [row[kind] for row in records[0]] != [row[kind] for row in records[1]]:
            raise Failure(f"NOT the same run: the {kind} of its rows in metrics.jsonl differ from an undisturbed run's")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(*records, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        raise Failure("NOT the same run: another batch was refused than in an undisturbed run")
    losses = [abs(a - b) for a, b in pairs if a is not None]
    one, other = (checkpoint.newest_state(folder)[0]["model"] for folder in (whole, parts))
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    return max(losses, default=math.nan), float(apart.square().mean().sqrt())


def _piece(config: TrainConfig, folder: Path, given: Tokenizer | None, block_size: int, say: Say) -> tuple[Path, bool]:
    """(token files of the first PIECE characters of the text, whether that is all of it), made in `folder`."""
    files, left = [], PIECE
    (folder / "text").mkdir()
    with corpus.opened(config.text, limit=PIECE, text_field=config.text_field) as source:
        if source.missing:
            say(f"{source.missing}. Rehearsing on the help topics that Python carries instead")
        kind = "bpe" if source.missing and config.tokenizer == "auto" else config.tokenizer
        for number, file in enumerate(source.files):
            if left <= 0:
                break
            start = ""
            for piece in file.read():  # of a text, or the rows of a file
                start += piece + ("\n" if file.in_rows else "")
                if len(start) >= left:
                    break
            start = start[:left]
            left -= len(start)
            name = Path(file.label).name + (".txt" if file.in_rows else "")
            files.append(folder / "text" / f"{number:06d}-{name}")
            files[-1].write_text(start, encoding="utf-8", newline="")
    settings = (kind, config.vocab_size, config.val_fraction)
    prepare(tuple(map(str, files)), folder / "tokens", *settings, say=say, block_size=block_size, given=given)
    return folder / "tokens", left > 0


def _processes() -> dict[int, int]:
    """The parent of each process of this machine that has not ended, by their numbers."""
    if Path("/proc/self/stat").exists():  # Linux, where a small container has no ps
        listed = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended since
                state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
                listed.append([path.parent.name, parent, state])
    else:
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="]
        listed = [line.split() for line in subprocess.check_output(command, text=True).splitlines()]
    return {int(pid): int(parent) for pid, parent, state in listed if state[0] != "Z"}


def _children(pid: int) -> list[int]:
    """The processes that a process started, in the order of their start."""
    return sorted(child for child, parent in _processes().items() if parent == pid)


def _in_time(began: float, who: str) -> None:
    """Raises Failure for a job that hangs."""
    if time.monotonic() - began > LIMIT:
        raise Failure(f"{who} did not end in {LIMIT:.0f} s: something hangs, or this machine is very busy")
