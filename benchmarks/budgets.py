"""Train for several times on several texts, in the shape that the rule chooses, the one below it and the one above.

The rows that are kept are in budgets.csv beside this file. The rule of `train --time` (llm/plan/rule.py) follows from
them: tests/test_budgets.py holds its choices and its predicted losses against them.

    python -m benchmarks.budgets TEXT [TEXT ...] [--seconds 10 20 40 80] [--shapes -1 0 1] [--seed 1] [--out FILE.csv]
    python -m benchmarks.budgets --fit

One run at a time, on a machine that does nothing else: a neighbour changes the shape that is chosen. A row is appended
as soon as its run has ended.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.config import to_settings
from llm.config.counts import count_parameters_by_part
from llm.machine.device import choose_dtype, matrix_rate
from llm.plan import rule
from llm.plan.arithmetic import run_flops
from llm.plan.autopilot import choose_run
from llm.plan.request import read_request
from llm.plan.text_facts import look_at
from llm.record.metrics import read_record
from llm.weights import run_config

TABLE = Path(__file__).with_suffix(".csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files, folders or names, one run each")
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--shapes", type=int, nargs="+", default=[-1, 0, 1], help="steps from the rule's own in SHAPES")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--fit", action="store_true", help="only print the figures of PREDICTION that fit the table")
    args = parser.parse_args()
    if args.fit:
        print(fitted(read_table()))
        return
    for text in args.texts:
        for seconds in args.seconds:
            for shape in shapes_around(chosen_shape(text, seconds), args.shapes):
                append(args.out, measured(text, seconds, shape, args.seed))


def chosen_shape(text: str, seconds: int) -> tuple[int, int]:
    """Return layers and width that the rule chooses here."""
    request = read_request(str(seconds), {}, {"text": [text]})
    model = choose_run(request, prepares=True, say=print).proposal.config.model
    return model.n_layer, model.n_embd


def shapes_around(chosen: tuple[int, int], offsets: list[int]) -> list[tuple[int, int]]:
    """Return the rows of SHAPES at these offsets from the chosen one, as far as there are any."""
    places = [rule.SHAPES.index(chosen) + offset for offset in offsets]
    return [rule.SHAPES[place] for place in places if 0 <= place < len(rule.SHAPES)]


def measured(text: str, seconds: int, shape: tuple[int, int], seed: int) -> dict[str, Any]:
    """Train in a process of its own, as a person would, and return a row of the table."""
    n_layer, n_embd = shape
    cpu = torch.device("cpu")
    dtype = choose_dtype("auto", cpu)
    matrix_rate.cache_clear()
    rate = matrix_rate(cpu, dtype)
    with tempfile.TemporaryDirectory(prefix="budgets-") as folder:
        run = Path(folder) / "run"
        words = ["train", "--text", text, "--time", f"{seconds}s", "--n_layer", str(n_layer), "--n_embd", str(n_embd)]
        words += ["--seed", str(seed), "--out_dir", str(run)]
        subprocess.run([sys.executable, "-m", "llm", *words], check=True, stdout=subprocess.DEVNULL)
        config = run_config(run)
        last = [row for row in read_record(run) if row["split"] == "val"][-1]
        chosen = to_settings(config) | {"block_size": config.model.block_size}
        tokens = json.loads((Path(config.data_dir) / "meta.json").read_text())["splits"]["train"]["tokens"]
    facts = look_at(read_request(str(seconds), {}, {"text": [text]}).config)
    return {
        "text": Path(text).name,
        "train_bytes": facts.train_bytes,
        "compressed": round(facts.compressed, 3),
        "asked": seconds,
        "seconds": round(last["seconds"], 1),
        "rate": round(rate / 1e9),
        "n_layer": n_layer,
        "n_embd": n_embd,
        "block_size": config.model.block_size,
        "windows": config.windows_per_step,
        "vocabulary": config.model.vocab_size,
        "blocks": count_parameters_by_part(config.model)["blocks"],
        "train_tokens": tokens,
        "steps": last["step"],
        "epochs": round(last["step"] * config.tokens_per_step / tokens, 2),
        "dropout": config.model.dropout,
        "weight_decay": chosen.get("weight_decay", config.weight_decay),
        "flops": float(f"{run_flops(config):.4g}"),
        "seed": seed,
        "bits_per_byte": round(last["bits_per_byte"], 4),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and print it."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the rows of the table, numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: value if name == "text" else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def fitted(rows: list[dict[str, Any]]) -> tuple[float, ...]:
    """Return the figures of `rule.PREDICTION` by least squares, and the standard deviation of what is left."""
    features = np.array([rule.prediction_features(row["flops"], row["train_bytes"]) for row in rows])
    ratios = np.array([row["bits_per_byte"] / row["compressed"] for row in rows])
    figures, *_ = np.linalg.lstsq(features, ratios, rcond=None)
    left = ratios - features @ figures
    return (*(round(float(figure), 4) for figure in figures), round(float(left.std(ddof=len(figures))), 4))


if __name__ == "__main__":
    main()
