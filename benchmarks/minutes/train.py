"""Train for several times on several texts: `train --time` and presets in turn.

The rows that are kept are in runs.csv beside this file (docs/decisions.md, "The rule, tried").

    python -m benchmarks.minutes.train TEXT [TEXT ...] [--times 15 30 60 120] [--recipes time shakespeare-char-cpu]
    python -m benchmarks.minutes.train TEXT --flags="--n_layer 3 --n_embd 128"    # beside what the rule chooses

One run at a time, on a machine that does nothing else: a neighbour changes the shape that is chosen. A row is appended
as soon as its run has ended; the runs stay in runs/minutes. A row has the loss of the last weights on the whole
validation split: a short run itself evaluates a part. A preset's schedule is stretched over the time, and its row has
its lowest loss.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llm.checks.memorised import run_tokens
from llm.config import TrainConfig, to_settings
from llm.config.counts import count_parameters_by_part
from llm.evaluate import evaluate
from llm.machine.device import choose_dtype, matrix_rate, precision
from llm.plan.arithmetic import run_flops
from llm.plan.request import read_request
from llm.plan.text_facts import look_at
from llm.record.metrics import read_record
from llm.run import Run
from llm.weights import run_config

TABLE = Path(__file__).with_name("runs.csv")
TIME = "time"  # the recipe that is chosen by `train --time`
TAUGHT = ("time, with a teacher", "time, with {} teachers")  # the same, with teachers first
SPEED_STEPS = 200  # of a preset, to see how many fit the time
FILL = 0.97  # of the time that a preset fills, with
EVALUATIONS = 4  # besides the one at the start: each takes it seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="files, folders or names, one run each")
    parser.add_argument("--times", type=int, nargs="+", default=[15, 30, 60, 120], help="seconds")
    parser.add_argument("--recipes", nargs="+", default=[TIME], help="time, or presets")
    parser.add_argument("--flags", default="", help="of train, for every run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--runs", type=Path, default=Path("runs/minutes"))
    args = parser.parse_args()
    for text in args.texts:
        for seconds in args.times:
            for recipe in args.recipes:
                name = "-".join([Path(text).stem, str(seconds), recipe, str(args.seed), *args.flags.split()])
                folder = args.runs / name
                rate = measured_rate()
                train(text, seconds, recipe, folder, ["--seed", str(args.seed), *args.flags.split()])
                append(
                    args.out, row_of(folder, text, seconds, recipe) | {"flags": args.flags, "rate": round(rate / 1e9)}
                )


def measured_rate() -> float:
    """Return what this machine does now, in FLOP/s."""
    cpu = torch.device("cpu")
    matrix_rate.cache_clear()
    return matrix_rate(cpu, choose_dtype("auto", cpu))


def train(text: str, seconds: int, recipe: str, folder: Path, flags: list[str]) -> None:
    """Train in a process of its own, as a person would."""
    if recipe == TIME:
        run(text, folder, [*flags, "--time", f"{seconds}s"])
        return
    short = folder.with_name(folder.name + "-speed")
    flags = [*flags, "--preset", recipe, "--sample_tokens", "0", "--eval_tokens", str(2**20)]  # the whole split
    run(text, short, [*flags, "--max_steps", str(SPEED_STEPS), "--eval_every", str(SPEED_STEPS)])
    rows = list(read_record(short))
    evaluation = next(row["seconds"] for row in rows if row["split"] == "val")  # at step 0, before any training
    step = run_config(short).tokens_per_step / [row for row in rows if row["split"] == "train"][-1]["tokens_per_second"]
    steps = int((FILL * seconds - (1 + EVALUATIONS) * evaluation) / step)
    limits = ["--max_steps", str(steps), "--eval_every", str(-(-steps // EVALUATIONS)), "--max_time", f"{seconds}s"]
    run(text, folder, [*flags, *limits])


def run(text: str, folder: Path, flags: list[str]) -> None:
    words = ["train", "--text", text, "--out_dir", str(folder), *flags]
    subprocess.run([sys.executable, "-m", "llm", *words], check=True, stdout=subprocess.DEVNULL)


def row_of(folder: Path, text: str, seconds: int, recipe: str) -> dict[str, Any]:
    """Return a row of the table."""
    config = run_config(folder)
    evaluations = [row for row in read_record(folder) if row["split"] == "val" and row["step"] > 0]
    lowest = min(row["bits_per_byte"] for row in evaluations)
    last = evaluations[-1]
    tokens = json.loads((Path(config.data_dir) / "meta.json").read_text())["splits"]["train"]["tokens"]
    facts = look_at(read_request(str(seconds), {}, {"text": [text]}).config)
    return {
        "text": Path(text).name,
        "recipe": TAUGHT[len(config.teacher) > 1].format(len(config.teacher)) if config.teacher else recipe,
        "train_bytes": facts.train_bytes,
        "asked": seconds,
        "seconds": round(last["seconds"] + seconds_of_teachers(config), 1),
        "n_layer": config.model.n_layer,
        "n_embd": config.model.n_embd,
        "block_size": config.model.block_size,
        "windows": config.windows_per_step,
        "vocabulary": config.model.vocab_size,
        "blocks": count_parameters_by_part(config.model)["blocks"],
        "train_tokens": tokens,
        "steps": last["step"],
        "epochs": round(last["step"] * config.tokens_per_step / tokens, 2),
        "dropout": config.model.dropout,
        "weight_decay": to_settings(config).get("weight_decay", config.weight_decay),
        "flops": float(f"{run_flops(config):.4g}"),
        "seed": config.seed,
        "bits_per_byte": round(of_whole_split(folder) if recipe == TIME else lowest, 4),
    }


def seconds_of_teachers(config: TrainConfig) -> float:
    """Return the seconds of the teachers that `train --time` trained first, and of their own teachers."""
    folders = [Path(name) for name in config.teacher]
    return sum(read_record(folder)[-1]["seconds"] + seconds_of_teachers(run_config(folder)) for folder in folders)


def of_whole_split(folder: Path) -> float:
    """Return the bits per byte of a run's last weights on its whole validation split, in the precision of the run."""
    run = Run.open(folder)
    tokens, cpu = run_tokens(run).val, torch.device("cpu")
    with precision(choose_dtype(run.config.dtype, cpu), cpu):
        block_size, lengths = run.config.model.block_size, run.tokenizer.token_bytes()
        found = evaluate(run.model("last"), tokens, block_size, len(tokens), lengths)
    assert found.bits_per_byte is not None
    return found.bits_per_byte


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and print it."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
