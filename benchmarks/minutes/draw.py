"""Draw bits per byte against minutes: `train --time` beside presets, from the runs of benchmarks/minutes/train.py.

python -m benchmarks.minutes.train shakespeare --times 30 70 140
python -m benchmarks.minutes.train shakespeare --times 140 --recipes chapter shakespeare-char-cpu
python -m benchmarks.minutes.draw shakespeare [--runs runs/minutes] [--out docs/minutes.png]
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.minutes.train import TIME
from llm.record import chart_style
from llm.record.chart_style import COLOURS, MARKERS, add_curve, add_end_labels, add_text, make_canvas, save_figure
from llm.record.metrics import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"chapter": "the chapter's recipe", "shakespeare-char-cpu": "nanoGPT's CPU settings"}
Curve = list[tuple[float, float]]  # (minutes, bits per byte)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--runs", type=Path, default=Path("runs/minutes"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/minutes.png"))
    args = parser.parse_args()
    curves = read_curves(args.runs, args.text, args.seed)
    for name, points in curves.items():
        minutes, bits = min(points, key=lambda point: point[1])
        print(f"{name:<24} lowest {bits:.3f} bits per byte after {60 * minutes:.0f} s of {60 * points[-1][0]:.0f}")
    save_figure(lambda: picture(curves, args.text), args.out)


def read_curves(runs: Path, text: str, seed: int) -> dict[str, Curve]:
    """Return the evaluations of each run on `text`, from the shortest time to the longest, presets last."""
    found = []
    for folder in runs.glob(f"{text}-*-{seed}"):
        seconds, _, recipe = folder.name.removeprefix(f"{text}-").removesuffix(f"-{seed}").partition("-")
        found.append((recipe != TIME, int(seconds), recipe, folder))
    curves = {}
    for is_preset, seconds, recipe, folder in sorted(found):
        rows = [row for row in read_record(folder) if row["split"] == "val" and row["step"] > 0]
        name = NAMES.get(recipe, recipe) if is_preset else f"--time {seconds}s"
        curves[name] = [(row["seconds"] / 60, row["bits_per_byte"]) for row in rows]
    return curves


def picture(curves: dict[str, Curve], text: str) -> "Figure":
    """Return the curves on one scale of minutes."""
    from matplotlib.ticker import StrMethodFormatter

    end = max(minutes for points in curves.values() for minutes, _ in points)
    figure, axes = make_canvas(f"Bits per byte against minutes: {text}", "validation", "bits per byte", 1, right=0.66)
    axes.set_xlabel("minutes", fontsize=12)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    chart_style.set_height(axes, [bits for points in curves.values() for _, bits in points], ceiling=4.0)
    labels = []
    for (name, points), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        add_curve(axes, points, colour, marker=marker, linewidth=2)
        minutes, bits = points[-1]
        if minutes > 0.9 * end:
            labels.append((bits, f"{name}: {bits:.2f}", colour, marker))
        else:
            add_text(axes, minutes, bits, f"{name}: {bits:.2f}", dx=4, dy=-8, color=colour, va="top", fontsize=11)
    add_end_labels(axes, end, labels)
    return figure


if __name__ == "__main__":
    main()
