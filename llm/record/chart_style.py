"""How our pictures look: colours, axes, marks, labels."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm import storage
from llm.errors import UserError
from llm.storage.lines import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from llm.record.points import POINTS, Points

DARK, GREY = "#222222", "#666666"


VAL, TRAIN = "#00508f", "#c55f10"  # dark and light, so that they differ in grey too


COLOURS = ("#00508f", "#d55e00", "#007a5a", "#a03070", "#6a5acd", "#8c6d1f", "#2b8cbe", "#444444")


MARKERS = "os^DvPX*"


def plain(name: str, limit: int = 22) -> str:
    """A name as one line of printable text, its middle left out if it is longer than `limit` characters."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return line if len(line) <= limit else line[: limit // 2] + "…" + line[-(limit // 2 - 1) :]


def spelled(loss: float) -> str:
    return f"{loss:.2f}" if loss < 100 else f"{loss:.4g}"


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
