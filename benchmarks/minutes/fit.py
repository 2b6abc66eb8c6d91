"""Fit the prediction of the loss (llm/plan/prediction/loss.py) to runs.csv, and print its table.

    python -m benchmarks.minutes.fit [TEXT ...]

A run counts if its recipe is that of the rule (llm/plan/rule.py), with teachers or without, and its text is in
texts.csv. The FLOPs are those of the run alone, without its teachers. Each TEXT, a file or a name, is first added there
with its cross-entropy. Every text has the same weight, however many its runs.
"""

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.minutes.train import TABLE, TIME
from llm.plan import rule
from llm.plan.prediction import loss
from llm.plan.request import read_request
from llm.plan.text_facts import look_at

TEXTS = Path(__file__).with_name("texts.csv")
SHAPE_FLAGS = {"--n_layer", "--n_embd", "--block_size", "--weight_decay"}

Row = dict[str, Any]
Fit = tuple[float, float]  # SHARE and POWER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*")
    for text in parser.parse_args().texts:
        add_text(text)
    rows, missing = measured()
    for text in sorted(missing):
        print(f"# left out, for its cross-entropy is not in {TEXTS.name}: {text}")
    share, power = fitted(rows)
    print(f"SHARE = {share:.4f}\nFLOPS = {loss.FLOPS:.0e}\nPOWER = {power:.4f}")
    errors = {text: errors_without(rows, text) for text in texts_of(rows)}
    print(f"ERROR = {max(max(ratios) for ratios, _ in errors.values()):.3f}")
    for name in loss.MEASURED:
        values = [row[name] for row in rows]
        print(f"MEASURED {name}: {min(values):.4g} to {max(values):.4g}")
    for text, (_, bits) in errors.items():
        print(f"# {text}, from the others: {len(bits)} runs, {min(bits):+.3f} to {max(bits):+.3f} bits per byte")


def add_text(text: str) -> None:
    """Append the cross-entropy of a text to texts.csv."""
    facts = look_at(read_request("60", {}, {"text": [text]}).config)
    with TEXTS.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow([Path(text).name, f"{facts.cross_entropy:.4f}"])


def measured() -> tuple[list[Row], set[str]]:
    """Return the runs that count, with the cross-entropy of their text, and the texts that are not in texts.csv."""
    with TEXTS.open(newline="", encoding="utf-8") as file:
        bits = {row["text"]: float(row["cross_entropy"]) for row in csv.DictReader(file)}
    with TABLE.open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["recipe"].startswith(TIME) and has_rule(row)]
    rows = []
    for row in found:
        if row["text"] in bits:
            numbers = {name: float(row[name]) for name in ("train_bytes", "flops", "steps", "bits_per_byte")}
            rows.append({"text": row["text"], "cross_entropy": bits[row["text"]]} | numbers)
    return rows, {row["text"] for row in found} - bits.keys()


def has_rule(row: dict[str, str]) -> bool:
    """Return whether a run had what the rule chooses today, except for its shape."""
    passes = float(row["epochs"])
    repetition = passes * float(row["blocks"]) / float(row["train_tokens"])
    chosen = rule.regularisation(passes, repetition, "wsd", is_taught=row["recipe"] != TIME)
    given = {word for word in row["flags"].split() if word.startswith("--")}
    return given <= SHAPE_FLAGS and all(float(row[name]) == chosen[name] for name in ("weight_decay", "dropout"))


def fitted(rows: list[Row]) -> Fit:
    """Return SHARE and POWER by least squares on the logarithms."""
    counts = {text: sum(row["text"] == text for row in rows) for text in texts_of(rows)}
    weights = np.array([counts[row["text"]] ** -0.5 for row in rows])
    work = np.array([math.log(row["flops"] / loss.FLOPS) for row in rows])
    shares = np.array([math.log(row["bits_per_byte"] / row["cross_entropy"]) for row in rows])
    features = np.stack([np.ones(len(rows)), work], axis=1)
    (constant, power), *_ = np.linalg.lstsq(features * weights[:, None], shares * weights, rcond=None)
    return math.exp(constant), float(power)


def errors_without(rows: list[Row], text: str) -> tuple[list[float], list[float]]:
    """Return the errors of a fit to the other texts for the runs on `text`: as ratios from 1 up, and in bits."""
    share, power = fitted([row for row in rows if row["text"] != text])
    ratios, bits = [], []
    for row in rows:
        if row["text"] == text:
            predicted = row["cross_entropy"] * share * (row["flops"] / loss.FLOPS) ** power
            ratios.append(math.exp(abs(math.log(predicted / row["bits_per_byte"]))))
            bits.append(predicted - row["bits_per_byte"])
    return ratios, bits


def texts_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in rows))


if __name__ == "__main__":
    main()
