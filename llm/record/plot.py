"""Pictures: the loss curve of one run or several, a schedule, a prediction for many accelerators."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config import TrainConfig, read_toml
from llm.record.bands import Band, band_of_run, normal
from llm.record.metrics import best, losses, overfits_since, read_record
from llm.schedule import lr_at
from llm.storage.lines import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from llm.record.chart_style import (
    COLOURS,
    DARK,
    GREY,
    MARKERS,
    TRAIN,
    VAL,
    _across,
    _canvas,
    _curve,
    _end_labels,
    _learning_rate,
    _limits,
    _mark,
    _save,
    _text,
    plain,
    spelled,
)
from llm.record.points import thinned

LANDMARKS = ((1, "ln V"), (2, "ln V / 2"), (4, "ln V / 4"))  # of V tokens: knows nothing, frequencies, some English


logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of caches and fonts a person need not hear


def plot_runs(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw one run, or several together, into the file `out`, in the format of its extension.

    Raises UserError for a run that is not there or damaged, and for an `out` that cannot be written.
    """
    _save(lambda: draw(run_dirs), out)


def plot_schedule(config: TrainConfig, out: Path) -> None:
    """Draw the learning rate over the steps into the file `out`. Raises UserError as `plot_runs` does."""
    _save(lambda: draw_schedule(config), out)


def plot_scaling(curves: dict[str, list[tuple[float, float]]], title: str, out: Path) -> None:
    """Draw the efficiency, a share of 1, over the number of accelerators, with each curve's name at its end.

    Raises UserError for an `out` that cannot be written.
    """
    _save(lambda: draw_scaling(curves, title), out)


def draw_scaling(curves: dict[str, list[tuple[float, float]]], title: str) -> "Figure":
    """The picture of `plot_scaling`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    for (name, points), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        _curve(axes, points, colour, marker=marker, linewidth=2)
        _text(axes, *points[-1], name, dy=-26, ha="right", color=colour)
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_xlabel("accelerators", fontsize=12)
    axes.set_ylabel("speed, of what it would be if nothing were sent", fontsize=12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(run_dirs: Sequence[Path]) -> "Figure":
    """The picture of one run folder, or of several together. Raises UserError as `plot_runs` does."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in run_dirs]
    records = [read_record(run_dir) for run_dir in run_dirs]
    vocab_sizes = [_vocab_size(run_dir) for run_dir in run_dirs]
    if len(run_dirs) == 1:
        return draw_run(records[0], names[0], vocab_sizes[0], band_of_run(run_dirs[0]))
    return draw_comparison(records, names, comparable=len(set(vocab_sizes)) == 1)


def draw_run(rows: list[Row], name: str, vocab_size: int | None = None, band: Band | None = None) -> "Figure":
    """Losses, landmarks and learning rate of one run, and the band where such runs lie. Without a vocabulary size
    there are no landmarks.
    """
    lowest, turned, val, train = best(rows), overfits_since(rows), losses(rows, "val"), thinned(losses(rows, "train"))
    end = max([row["step"] for row in rows], default=0) or 1
    figure, axes = _canvas(plain(name, 50), _summary(rows, band), "loss (nats per token)", end)
    if band is not None:
        steps = [step for step in band.steps if step <= end]
        lower, upper = ([ends[side] for step in steps if (ends := band.at(step))] for side in (0, 1))
        axes.fill_between(steps, lower, upper, facecolor=GREY, alpha=0.5, edgecolor=GREY, zorder=1)
    if turned is not None:
        _text(axes, (turned + end) / 2, 0.02, "overfitting", ha="center", color=GREY, xycoords=_across(axes))
    _curve(axes, train, TRAIN, linewidth=1.2)
    _curve(axes, val, VAL, linewidth=2.4, marker="o")
    curves = ((val, "validation", VAL), (train, "training", TRAIN))
    labels = [(curve[-1][1], f"{word} {spelled(curve[-1][1])}", colour, "") for curve, word, colour in curves if curve]
    marks = landmark_losses(vocab_size)
    start = [y for y, _ in marks[:1]] or [loss for _, loss in (val or train)[:1]] or [1.0]
    _limits(axes, [y for y, _ in marks] + [loss for _, loss in [*val, *train]], 1.5 * start[0])
    for level, landmark in marks:
        nearest = min([y for y, *_ in labels], key=lambda y: abs(y - level), default=0.0)
        axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        va, dy = ("top", -2) if nearest > level else ("bottom", 2)  # the label keeps away from the curve
        _text(axes, end, level, f"{landmark} = {level:.2f}", dy=dy, ha="right", va=va, color=GREY)
    if lowest is not None:
        _mark(axes, lowest["step"], lowest["loss"], f"best {spelled(lowest['loss'])} at step {lowest['step']:,}")
    _end_labels(axes, end, labels)
    low = max([y for y, *_ in labels], default=0.0) > sum(axes.get_ylim()) / 2
    behind = _learning_rate(axes, rows, end, low) or axes
    if turned is not None:
        behind.axvspan(turned, end, facecolor="#f1f1f1", edgecolor="#dcdcdc", hatch="//", zorder=0)
    return figure


def landmark_losses(vocab_size: int | None) -> list[tuple[float, str]]:
    """Loss and name of each landmark; none where the vocabulary is not known or has one token, which is no guess."""
    return [(math.log(vocab_size) / k, name) for k, name in LANDMARKS] if vocab_size and vocab_size > 1 else []


def _summary(rows: list[Row], band: Band | None) -> str:
    """What a run came to, in one line."""
    lowest, turned = best(rows), overfits_since(rows)
    if lowest is None:
        return "no evaluation yet"
    line = f"best validation loss {spelled(lowest['loss'])} at step {lowest['step']:,}"
    line += f" ({lowest['bits_per_byte']:.2f} bits per byte)" if lowest["bits_per_byte"] is not None else ""
    line += f"; overfits since step {turned:,}" if turned is not None else ""
    verdict = normal(rows, band)
    line += f"; {verdict.partition(':')[0]}" if verdict else ""
    lost = sum(row["loss"] is None for row in rows)
    return line + (f"; {lost:,} losses not finite" if lost else "")


def draw_comparison(records: list[list[Row]], names: list[str], comparable: bool = True) -> "Figure":
    """Losses of several runs together, each labelled with its name and lowest validation loss."""
    note = "solid: validation, dashed: training; labels: name and lowest validation loss"
    note = note if comparable else "vocabularies differ, so these losses per token do not compare"
    end = max([row["step"] for rows in records for row in rows], default=0) or 1
    figure, axes = _canvas(f"{len(records)} runs", note, "loss (nats per token)", end, right=0.65)
    shown, labels = [], []
    for number, (rows, name) in enumerate(zip(records, names, strict=True)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        val, train, lowest = losses(rows, "val"), thinned(losses(rows, "train")), best(rows)
        _curve(axes, train, colour, linewidth=1, linestyle=(0, (4, 2)), alpha=0.8)
        _curve(axes, val, colour, linewidth=2, marker=marker)
        if val or train:
            label = plain(name) + (f" {spelled(lowest['loss'])}" if lowest is not None else "")
            labels.append(((val or train)[-1][1], label, colour, marker))
        shown += [*val, *train]
    settled = [loss for step, loss in shown if step >= end / 20]  # the fall at the start would flatten the rest
    _limits(axes, [loss for _, loss in shown], max(settled, default=math.inf))
    _end_labels(axes, end, labels)
    return figure


def draw_schedule(config: TrainConfig) -> "Figure":
    """The learning rate over the steps, with the warm-up, the peak and the last value marked."""
    steps, warmup, last = config.max_steps, config.warmup, lr_at(config.max_steps, config)
    subtitle = f"{config.schedule}, {warmup:,} steps of warm-up ({100 * warmup / steps:.3g} % of {steps:,})"
    figure, axes = _canvas("Learning rate over the steps", subtitle, "", steps)
    axes.set_ylim(0, config.max_lr * 1.25)
    axes.yaxis.set_major_formatter(lambda lr, _: f"{lr:.3g}")
    if warmup:
        axes.axvspan(0, warmup, facecolor="#f1f1f1", edgecolor="#dcdcdc", hatch="//", zorder=0)
        ha, dx = ("left", 6) if warmup < steps / 2 else ("right", -6)
        _text(axes, warmup, 0.03, "warm-up", dx=dx, ha=ha, color=GREY, xycoords=_across(axes))
    marks = sorted({steps * i // 500 for i in range(501)} | {warmup})
    axes.plot(marks, [lr_at(step, config) for step in marks], color=VAL, linewidth=2.4)
    _mark(axes, warmup, lr_at(warmup, config), f"peak {config.max_lr:.3g} at step {warmup:,}", dy=14)
    _end_labels(axes, steps, [(last, f"end {last:.3g}", DARK, "")])
    return figure


def _vocab_size(run_dir: Path) -> int | None:
    path = run_dir / "config.toml"
    size = read_toml(str(path)).get("vocab_size") if path.exists() else None
    return size if isinstance(size, int) and size > 1 else None
