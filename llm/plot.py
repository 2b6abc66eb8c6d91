"""The loss curve and the schedule as pictures, drawn from the record of a run. Never opens a window.

Everything is told apart by line, marker and a label at its end, not by colour alone. A name is drawn as
it stands: `parse_math=False`, so that a dollar sign starts no formula.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm import storage
from llm.bands import Band, band_of_run, normal
from llm.config import TrainConfig, read_toml
from llm.errors import UserError
from llm.lines import Row
from llm.metrics import best, losses, overfits_since, read_record
from llm.schedule import lr_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2000  # a training curve is thinned to at most this many
LANDMARKS = ((1, "ln V"), (2, "ln V / 2"), (4, "ln V / 4"))  # of V tokens: knows nothing, frequencies, some English
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of caches and fonts a person need not hear
DARK, GREY = "#222222", "#666666"
VAL, TRAIN = "#00508f", "#c55f10"  # dark and light, so that they differ in grey too
COLOURS = ("#00508f", "#d55e00", "#007a5a", "#a03070", "#6a5acd", "#8c6d1f", "#2b8cbe", "#444444")
MARKERS = "os^DvPX*"
Points = Sequence[tuple[float, float]]


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


def thinned(points: Points) -> Points:
    """At most `POINTS` points: the means of equally many neighbours each, so that nothing is left out."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(math.fsum(x for x, _ in b) / len(b), math.fsum(y for _, y in b) / len(b)) for b in bins]


def plain(name: str, limit: int = 22) -> str:
    """A name as one line of printable text, its middle left out if it is longer than `limit` characters."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return line if len(line) <= limit else line[: limit // 2] + "…" + line[-(limit // 2 - 1) :]


def spelled(loss: float) -> str:
    return f"{loss:.2f}" if loss < 100 else f"{loss:.4g}"


def _vocab_size(run_dir: Path) -> int | None:
    path = run_dir / "config.toml"
    size = read_toml(str(path)).get("vocab_size") if path.exists() else None
    return size if isinstance(size, int) and size > 1 else None


def _canvas(title: str, subtitle: str, ylabel: str, end: int, right: float = 0.82) -> "tuple[Figure, Axes]":
    """A figure with its titles, and axes for steps 0 to `end`; beyond `right` there is room for labels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 5.5), dpi=150)
    axes = figure.add_axes((0.1, 0.11, right - 0.1, 0.75))
    figure.text(0.02, 0.94, title, fontsize=16, fontweight="bold", parse_math=False)
    figure.text(0.02, 0.89, subtitle, fontsize=12.5, parse_math=False)
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel(ylabel, fontsize=12)
    axes.tick_params(labelsize=11.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.01 * end, end)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure, axes


def _across(axes: "Axes") -> Any:
    """Coordinates whose x is a step and whose y is a share of the height."""
    return axes.get_xaxis_transform()


def _text(axes: "Axes", x: float, y: float, text: str, dx: float = 0, dy: float = 0, **style: Any) -> None:
    """Text at a point, or (dx, dy) typographic points from it, on a white ground so that no line crosses it."""
    ground = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    for key, value in {"fontsize": 12, "color": DARK, "zorder": 6, "bbox": ground}.items():
        style.setdefault(key, value)
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", parse_math=False, **style)


def _curve(axes: "Axes", points: Points, colour: str, **style: Any) -> None:
    """A line through the points, with at most about 25 markers if any."""
    style |= {"markersize": 6, "markevery": max(1, len(points) // 25)} if "marker" in style else {}
    if len(points) == 1:  # a line of one point would not be seen
        style |= {"marker": style.get("marker", "s")}
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, clip_on=False, **style)


def _mark(axes: "Axes", x: float, y: float, text: str, dy: float = 44) -> None:
    """A star at a point and its label above it, or below it near the top, kept inside the picture."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    share = (x - left) / (right - left)
    ha = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    dy = -dy if dy > 20 and (y - low) / (high - low) > 0.8 else dy
    axes.plot(x, y, marker="*", markersize=19, color=DARK, markeredgecolor="white", zorder=5, clip_on=False)
    _text(axes, x, y, text, dy=dy, ha=ha, arrowprops={"arrowstyle": "-", "color": DARK} if abs(dy) > 20 else None)


def _limits(axes: "Axes", shown: list[float], ceiling: float) -> None:
    """The height of the picture: everything shown up to `ceiling`, saying so where something is higher."""
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    if high > ceiling > low:
        _text(
            axes, 0.98, 0.98, f"higher losses cut off, up to {high:.4g}", ha="right", va="top", xycoords=axes.transAxes
        )
        high = ceiling
    pad = 0.07 * (high - low) or 0.5
    axes.set_ylim(low - pad, high + pad)


def _end_labels(axes: "Axes", end: float, labels: list[tuple[float, str, str, str]]) -> None:
    """(y, text, colour, marker) to the right of the curves' ends, at their heights, moved apart where they touch."""
    low, high = axes.get_ylim()
    labels = sorted(labels)
    heights = [(min(max(y, low), high) - low) / (high - low) for y, *_ in labels]
    gap = min(0.055, 1 / len(labels)) if labels else 0
    for _ in range(100):
        for i in range(1, len(heights)):
            push = max(0.0, gap - (heights[i] - heights[i - 1])) / 2
            heights[i - 1], heights[i] = max(0.0, heights[i - 1] - push), min(1.0, heights[i] + push)
    for height, (_, text, colour, marker) in zip(heights, labels, strict=True):
        if marker:
            axes.plot(end * 1.025, height, marker, color=colour, markersize=7, transform=_across(axes), clip_on=False)
        _text(axes, end, height, text, dx=20 if marker else 9, color=colour, va="center", xycoords=_across(axes))


def _learning_rate(axes: "Axes", rows: list[Row], end: int, low: bool) -> "Axes | None":
    """The learning rate on its own axis at the right, in the half of the picture the losses leave free; the axis."""
    points = sorted((row["step"], row["lr"]) for row in rows if row["lr"] is not None)
    peak = max([lr for _, lr in points], default=0.0)
    if peak <= 0:
        return None
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)  # the labels lie over this curve
    axes.patch.set_visible(False)
    right.set_ylim(*((-0.35 * peak, 3.6 * peak) if low else (-2 * peak, 1.35 * peak)))
    points = points[:: math.ceil(len(points) / POINTS)]
    right.plot(
        [x for x, _ in points], [y for _, y in points], color=GREY, linewidth=1.6, linestyle=(0, (5, 1.5, 1, 1.5))
    )
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.spines["right"].set_bounds(0, peak)
    right.spines["right"].set_color(GREY)
    ticks = [0, peak / 2, peak]
    right.set_yticks(ticks, [f"{lr:.2g}" for lr in ticks], fontsize=11.5, color=GREY)
    _text(right, end, peak, "learning rate", dx=2, dy=12, color=GREY)
    return right


def _save(drawing: "Callable[[], Figure]", out: Path) -> None:
    """Make the drawing and write it to `out`, whole or not at all."""
    from matplotlib import rc_context
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    kind = out.suffix.lower().removeprefix(".")
    if kind not in known:
        raise UserError(f"{out}: no known picture; let its name end in one of .{', .'.join(sorted(known))}")
    with rc_context({"svg.fonttype": "none", "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
        figure = drawing()
        try:
            with storage.writing(out) as file:
                figure.savefig(file, format=kind)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
