"""Count the verdicts of `losscurve compare` that are wrong: how often it sees a difference where there is none.

simulate: experiments with losses drawn by numpy: curves of several seeds, correlated windows, a second look.
train:    real ones: tiny models on a text, N runs of one setting with other seeds, and with half of these seeds runs
          with a bad learning rate and with one that is a little low. Runs that exist are kept.
count:    the verdicts on the runs that `train` made.

    python -m benchmarks.verdicts simulate
    python -m benchmarks.verdicts train --text my.txt --out_dir runs/verdicts --runs 120
    python -m benchmarks.verdicts count --out_dir runs/verdicts
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from llm import fit
from llm.config import TrainConfig, from_settings
from llm.experiments.compare import Comparison, compare_pair, corrected
from llm.experiments.paired import Difference, holm, paired_difference, seeds_needed, unpaired_difference
from llm.experiments.parts import PARTS, part_evaluations
from llm.experiments.recorded import Group, RecordedRun, read_run
from llm.experiments.rounds import CHECKS, find_behind

EXPERIMENTS = 2000
SPREAD = 0.02  # standard deviation of a simulated loss over seeds, nats per token
TINY = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "dtype": "float32"},
    **{"max_steps": 200, "eval_every": 50, "log_every": 50, "keep": 1, "sample_tokens": 0, "tokenizer": "char"},
}
SETTINGS = {"usual": {"max_lr": 3e-3}, "near": {"max_lr": 2.4e-3}, "bad": {"max_lr": 6e-4}}
SEEDS = 3  # of each setting in an experiment

Draws = np.random.Generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulate", "train", "count"))
    parser.add_argument("--text", help="what the real runs train on")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--runs", type=int, default=120, help="of the usual setting; half as many of the others")
    parser.add_argument("--most", type=int, default=10**6, help="stop after training so many runs")
    args = parser.parse_args()
    if args.what == "simulate":
        simulate()
    elif args.what == "train":
        train_runs(args.text, args.out_dir, args.runs, args.most)
    else:
        count(args.out_dir)


# ---- simulated experiments


def simulate() -> None:
    print(f"{EXPERIMENTS:,} experiments in each row; seeds spread by {SPREAD} (standard deviation)")
    for seeds in (2, 3, 5, 8):
        for shared in (0.0, 0.5, 0.9):
            found = [simulated(np.random.default_rng(i), seeds, shared, 0.0) for i in range(EXPERIMENTS)]
            shown = [simulated(np.random.default_rng(i), seeds, shared, -SPREAD) for i in range(EXPERIMENTS)]
            alarms, power = share(found), share(shown)
            print(f"{seeds} seeds, a pair shares {shared:.0%}: false alarms {alarms:.1%}, seen at {SPREAD} {power:.1%}")
    families = [family(np.random.default_rng(i)) for i in range(EXPERIMENTS)]
    print(f"5 settings against one, 3 seeds, none differs: an alarm at any {statistics.fmean(families):.1%}")
    for looks in (1, 2):
        alarms = share(two_looks(np.random.default_rng(i), 0.0, looks) for i in range(EXPERIMENTS))
        power = share(two_looks(np.random.default_rng(i), -SPREAD, looks) for i in range(EXPERIMENTS))
        print(f"3 seeds, then as many as advised, --looks {looks}: false alarms {alarms:.1%}, seen {power:.1%}")
    for settings in (2, 6, 12):
        stopped = [first_to_stop(np.random.default_rng(i), settings) for i in range(EXPERIMENTS)]
        some = statistics.fmean(bool(names) for names in stopped)
        best = statistics.fmean("0" in names for names in stopped)
        print(f"try: {settings} settings, none differs: one stops in {some:.1%}, the first one in {best:.1%}")
    for correlation in (0.0, 0.5, 0.9, 0.97):
        losses = windows(np.random.default_rng(1), correlation)
        zeros = [0.0] * len(losses)
        each = share(paired_difference(column, zeros) for column in losses.T.tolist())
        parts = np.stack([part.mean(axis=0) for part in np.array_split(losses, PARTS)]).T.tolist()
        cut = share(paired_difference(column, zeros[:PARTS]) for column in parts)
        print(
            f"{len(losses):,} windows, neighbours correlated by {correlation}: false alarms with each as a pair", end=""
        )
        print(f" {each:.1%}, in {PARTS} parts {cut:.1%}")


def share(differences: Iterable[Difference]) -> float:
    """Return the share of differences that are called real."""
    return statistics.fmean(difference.is_real for difference in differences)


def curves(draws: Draws, seeds: int, shared: float, apart: float) -> tuple[Group, Group]:
    """Return two settings with drawn loss curves; the second lies `apart` from the first in the end.

    `shared` is the part of the variance over seeds that a seed gives to both.
    """
    common = draws.normal(0, SPREAD * math.sqrt(shared), seeds)
    found = []
    for name, offset in (("A", 0.0), ("B", apart)):
        config = from_settings(TINY | {"max_lr": 1e-3 if name == "A" else 2e-3})
        own = draws.normal(0, SPREAD * math.sqrt(1 - shared), seeds)
        noise = draws.normal(0, 0.1 * SPREAD, (seeds, 5))  # differs from evaluation to evaluation
        runs = []
        for seed in range(seeds):
            rows = []
            for i, step in enumerate(range(0, 201, 50)):
                share_done = step / 200
                loss = (
                    2.5 + 2 / (1 + 10 * share_done) + share_done * (offset + common[seed] + own[seed]) + noise[seed, i]
                )
                rows.append({"step": step, "tokens": step * 256, "seconds": step / 100, "loss": float(loss)})
            runs.append(drawn_run(name, config, seed, rows))
        found.append(Group(name, runs))
    return found[0], found[1]


def drawn_run(name: str, config: TrainConfig, seed: int, rows: list[dict[str, float]]) -> RecordedRun:
    config = dataclasses.replace(config, seed=seed)
    return RecordedRun(Path(f"{name}-{seed}"), config, rows, None, {"val.bin": "drawn"}, (), None)


def simulated(draws: Draws, seeds: int, shared: float, apart: float) -> Difference:
    """Return the difference at the last step of two drawn settings, as `losscurve compare` finds it."""
    return corrected([compare_pair(*curves(draws, seeds, shared, apart))])[0].findings["step"].difference


def family(draws: Draws) -> bool:
    """Return whether any of 5 settings without a difference is called better or worse than a sixth."""
    base, _ = curves(draws, SEEDS, 0.5, 0.0)
    found: list[Comparison] = [compare_pair(base, curves(draws, SEEDS, 0.5, 0.0)[1]) for _ in range(5)]
    return any(comparison.findings["step"].difference.is_real for comparison in corrected(found))


def two_looks(draws: Draws, apart: float, looks: int) -> Difference:
    """Return the verdict of a person who adds as many seeds as the first verdict says, and looks again."""
    losses = draws.normal(apart, SPREAD, SEEDS).tolist()
    (first,) = holm([paired_difference(losses, [0.0] * SEEDS)], looks)
    needed = None if first.is_real else seeds_needed(first)
    if needed is None:
        return first
    losses += draws.normal(apart, SPREAD, needed - SEEDS).tolist()
    return holm([paired_difference(losses, [0.0] * needed)], looks)[0]


def first_to_stop(draws: Draws, settings: int) -> list[str]:
    """Return the settings that `try` stops first among settings that do not differ; none if all are trained whole.

    The losses at both looks share what a seed does to all settings, and half of what it does to one.
    """
    losses = draws.normal(0, SPREAD, SEEDS) + draws.normal(0, SPREAD, (settings, SEEDS))
    for _ in CHECKS:
        _, behind = find_behind({str(i): row for i, row in enumerate(losses.tolist())})
        if behind:
            break
        losses += draws.normal(0, SPREAD, losses.shape)
    return list(behind)


def windows(draws: Draws, correlation: float) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return (windows, EXPERIMENTS) differences of losses whose mean is 0, and neighbours correlated."""
    found = draws.normal(size=(1742, EXPERIMENTS))
    for i in range(1, len(found)):
        found[i] = correlation * found[i - 1] + math.sqrt(1 - correlation**2) * found[i]
    return found


# ---- real experiments


def train_runs(text: str, out_dir: Path, runs: int, most: int) -> None:
    """Train the runs that do not exist."""
    wanted = [(name, seed) for name in SETTINGS for seed in range(runs if name == "usual" else runs // 2)]
    missing = [(name, seed) for name, seed in wanted if not (out_dir / f"{name}-{seed}" / "model.pt").exists()]
    for name, seed in missing[:most]:
        settings = TINY | SETTINGS[name] | {"seed": seed, "data_dir": str(out_dir / "data")}
        fit(text, out_dir=out_dir / f"{name}-{seed}", overwrite=True, say=lambda line: None, **settings)
    print(f"{len(wanted) - len(missing[most:])} of {len(wanted)} runs")


def count(out_dir: Path) -> None:
    runs = {name: read_all(out_dir, name) for name in SETTINGS}
    ends = {name: [run.evaluations[-1]["loss"] for run in found] for name, found in runs.items()}
    usual = runs["usual"]
    half = len(usual) // 2
    groups = range(0, half - SEEDS + 1, SEEDS)
    for name, losses in ends.items():
        print(f"{name}: {len(losses)} runs, loss {statistics.fmean(losses):.4f}, spread {statistics.stdev(losses):.4f}")
    none = [verdict_of(usual[i : i + SEEDS], usual[half + i : half + i + SEEDS]) for i in groups]
    print(f"no difference, {SEEDS} seeds against {SEEDS} others: {sum(d.is_real for d in none)} alarms in {len(none)}")
    for name in ("near", "bad"):
        known = [verdict_of(usual[i : i + SEEDS], runs[name][i : i + SEEDS]) for i in groups]
        both = ends["usual"][:half]
        apart = [ours - theirs for ours, theirs in zip(ends[name], both, strict=True)]
        spread, correlation = statistics.stdev(apart), statistics.correlation(ends[name], both)
        seen = sum(found.low > 0 for found in known)
        print(f"{name} - usual: {statistics.fmean(apart):+.4f}, spread of pairs {spread:.4f}, ", end="")
        print(f"correlation {correlation:.2f}; {SEEDS} pairs: seen in {seen} of {len(known)}")
    for judge in (unpaired_difference, paired_difference):
        print(f"resampled from the usual runs: {resampled(ends['usual'], judge):.1%} alarms by {judge.__name__}")
    parts = [[part.loss for part in part_evaluations(run)] for run in usual[: 2 * len(none)]]
    weights = [paired_difference(*parts[2 * i : 2 * i + 2]) for i in range(len(none))]
    print(f"one seed against another: {sum(d.is_real for d in weights)} of {len(weights)} pairs of weights differ")


def read_all(out_dir: Path, name: str) -> list[RecordedRun]:
    return [read_run(path) for path in sorted(out_dir.glob(f"{name}-*"), key=lambda p: int(p.name.split("-")[1]))]


def verdict_of(first: Sequence[RecordedRun], second: Sequence[RecordedRun]) -> Difference:
    found = compare_pair(Group("A", first), Group("B", second))
    return corrected([found])[0].findings["step"].difference


def resampled(losses: list[float], judge: Callable[[list[float], list[float]], Difference]) -> float:
    """Return the share of false alarms among random choices of SEEDS runs against SEEDS others of one setting."""
    draws = np.random.default_rng(0)
    chosen = [draws.choice(losses, 2 * SEEDS, replace=False).tolist() for _ in range(EXPERIMENTS)]
    return share(judge(losses[:SEEDS], losses[SEEDS:]) for losses in chosen)


if __name__ == "__main__":
    main()
