"""Bits per byte against minutes: `train --time`, the chapter's recipe and nanoGPT's CPU settings, in turn here.

Trains them one after the other on the same text, prints where each ended, and draws the curves. A run of `--time` is
made for each time given; the others run once, for the longest.

    python -m benchmarks.minutes [--text shakespeare] [--times 30s 1m 150s] [--out docs/minutes.png]

Runs that are there already are only drawn.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config import parse_duration
from llm.record import chart_style
from llm.record.chart_style import COLOURS, MARKERS, add_curve, add_end_labels, add_text, make_canvas, save_figure
from llm.record.metrics import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = {"the chapter's recipe": "chapter", "nanoGPT's CPU settings": "shakespeare-char-cpu"}
MANY_STEPS = 10**5  # more than fit the time, so that the schedule decays as the recipe says and no sooner
EVALUATIONS = {"chapter": 25, "shakespeare-char-cpu": 250}  # steps between them
Curve = list[tuple[float, float]]  # (minutes, bits per byte)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="shakespeare")
    parser.add_argument("--times", nargs="+", default=["30s", "1m", "150s"])
    parser.add_argument("--out", type=Path, default=Path("docs/minutes.png"))
    parser.add_argument("--runs", type=Path, default=Path("runs/minutes"))
    args = parser.parse_args()
    longest = max(args.times, key=parse_duration)
    curves = {}
    for time in args.times:
        curves[f"--time {time}"] = curve(args.runs / f"time-{time}", args.text, "--time", time)
    for name, preset in OTHERS.items():
        limits = ["--max_time", longest, "--eval_every", str(EVALUATIONS[preset]), "--sample_tokens", "0"]
        curves[name] = curve(args.runs / preset, args.text, "--preset", preset, *limits)
    for name, points in curves.items():
        minutes, bits = min(points, key=lambda point: point[1])
        print(f"{name:<24} lowest {bits:.3f} bits per byte after {60 * minutes:.0f} s of {60 * points[-1][0]:.0f}")
    save_figure(lambda: picture(curves, Path(args.text).name, parse_duration(longest) / 60), args.out)


def curve(folder: Path, text: str, *flags: str) -> Curve:
    """Train the run in `folder` unless it is there; return its evaluations."""
    if not folder.is_dir():
        words = ["train", "--text", text, "--out_dir", str(folder), *flags]
        subprocess.run([sys.executable, "-m", "llm", *words], check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in read_record(folder) if row["split"] == "val" and row["step"] > 0]
    return [(row["seconds"] / 60, row["bits_per_byte"]) for row in rows]


def picture(curves: dict[str, Curve], text: str, end: float) -> "Figure":
    """Return the curves on one scale of minutes."""
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = make_canvas(f"Bits per byte against minutes: {text}", "validation", "bits per byte", 1, right=0.7)
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
            add_text(axes, minutes, bits, f"{name}: {bits:.2f}", dx=6, color=colour, va="center", fontsize=11)
    add_end_labels(axes, end, labels)
    return figure


if __name__ == "__main__":
    main()
