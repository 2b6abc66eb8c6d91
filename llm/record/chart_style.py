"""The elements of our matplotlib pictures: colours, axes, curves, marks, labels.

VAL and TRAIN also colour the report (`report/report.css`) and, together with COLOURS, the live page
(`page/page.css`, `page/words.js`). These have slightly different shades, for contrast on a screen in light and dark.
Change the colours together.
"""

import base64
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm import storage
from llm.errors import UserError
from llm.record.points import MAX_POINTS, Points
from llm.storage.lines import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = "#222222"
GREY = "#666666"
VAL = "#00508f"
EMA = "#007a5a"  # validation of the average of the weights
TRAIN = "#c55f10"  # lighter than VAL, so that the two differ in greyscale too
SHADING: dict[str, Any] = {
    "facecolor": "#f1f1f1",
    "edgecolor": "#dcdcdc",
    "hatch": "//",
    "zorder": 0,
}  # of a range of steps

# of several runs, which differ by marker too
COLOURS = ("#00508f", "#d55e00", "#007a5a", "#a03070", "#6a5acd", "#8c6d1f", "#2b8cbe", "#444444")
MARKERS = "os^DvPX*"


def plain(name: str, limit: int = 22) -> str:
    """Return a name as one line of printable text; its middle is left out if it exceeds `limit` characters."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return line if len(line) <= limit else line[: limit // 2] + "…" + line[-(limit // 2 - 1) :]


def format_loss(loss: float) -> str:
    """Return a loss with two decimals, or four digits if it is large."""
    return f"{loss:.2f}" if loss < 100 else f"{loss:.4g}"


def make_canvas(title: str, subtitle: str, ylabel: str, end: int, right: float = 0.82) -> "tuple[Figure, Axes]":
    """Return a figure with its titles, and axes for steps 0 to `end`.

    `right` is the share of the width at which the axes end; the labels of the curves stand beyond.
    """
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


def step_and_height(axes: "Axes") -> Any:
    """Return the coordinates whose x is a step and whose y is a share of the height of the axes."""
    return axes.get_xaxis_transform()


def add_text(axes: "Axes", x: float, y: float, text: str, dx: float = 0, dy: float = 0, **style: Any) -> None:
    """Write text at a point, moved by (dx, dy) typographic points, on white so that no curve crosses it."""
    background = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    usual: dict[str, Any] = {"fontsize": 12, "color": DARK, "zorder": 6, "bbox": background}
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", parse_math=False, **(usual | style))


def add_curve(axes: "Axes", points: Points, colour: str, **style: Any) -> None:
    """Draw a line through the points; if `style` has a marker, with at most about 25 of them."""
    if "marker" in style:
        style |= {"markersize": 6, "markevery": max(1, len(points) // 25)}
    if len(points) == 1:  # a line of one point would be invisible
        style["marker"] = style.get("marker") or "s"
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, clip_on=False, **style)


def add_star(axes: "Axes", x: float, y: float, text: str, dy: float = 44) -> None:
    """Mark a point with a star and a label above it, or below it near the top, inside the picture."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    share = (x - left) / (right - left)
    if share < 0.2:
        alignment = "left"
    elif share > 0.8:
        alignment = "right"
    else:
        alignment = "center"
    if dy > 20 and (y - low) / (high - low) > 0.8:
        dy = -dy
    arrow = {"arrowstyle": "-", "color": DARK} if abs(dy) > 20 else None
    axes.plot(x, y, marker="*", markersize=19, color=DARK, markeredgecolor="white", zorder=5, clip_on=False)
    add_text(axes, x, y, text, dy=dy, ha=alignment, arrowprops=arrow)


def set_height(axes: "Axes", values: list[float], ceiling: float) -> None:
    """Set the y range to `values`, but cut it off at `ceiling`; a label says so if it cuts off something."""
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if high > ceiling > low:
        words = f"higher losses cut off, up to {high:.4g}"
        add_text(axes, 0.98, 0.98, words, ha="right", va="top", xycoords=axes.transAxes)
        high = ceiling
        for line in axes.lines:  # otherwise they would go on over the title
            line.set_clip_on(True)
    pad = 0.07 * (high - low) or 0.5
    axes.set_ylim(low - pad, high + pad)


def add_end_labels(axes: "Axes", end: float, labels: list[tuple[float, str, str, str]], gap: float = 0.055) -> None:
    """Write labels (y, text, colour, marker) to the right of the curves' ends.

    Each label stands at its curve's height; labels nearer than `gap`, a share of the height, are moved apart.
    """
    if not labels:
        return
    low, high = axes.get_ylim()
    labels = sorted(labels)
    heights = [(min(max(y, low), high) - low) / (high - low) for y, *_ in labels]
    _move_apart(heights, gap=min(gap, 1 / len(labels)))
    for height, (_, text, colour, marker) in zip(heights, labels, strict=True):
        if marker:
            place = step_and_height(axes)
            axes.plot(end * 1.025, height, marker, color=colour, markersize=7, transform=place, clip_on=False)
        dx = 20 if marker else 9
        add_text(axes, end, height, text, dx=dx, color=colour, va="center", xycoords=step_and_height(axes))


def _move_apart(heights: list[float], gap: float) -> None:
    """Move ascending heights in 0 to 1, in place, until neighbours are about `gap` apart."""
    for _ in range(100):
        for i in range(1, len(heights)):
            push = max(0.0, gap - (heights[i] - heights[i - 1])) / 2
            heights[i - 1] = max(0.0, heights[i - 1] - push)
            heights[i] = min(1.0, heights[i] + push)


def add_learning_rate(axes: "Axes", rows: list[Row], end: int, low: bool) -> "Axes | None":
    """Draw the learning rate on an axis of its own at the right; return that axis, None if no rate is recorded.

    `low` says whether the curve goes to the lower half of the picture, or else to the upper one.
    """
    points = sorted((row["step"], row["lr"]) for row in rows if row["lr"] is not None)
    peak = max([lr for _, lr in points], default=0.0)
    if peak <= 0:
        return None
    points = points[:: math.ceil(len(points) / MAX_POINTS)]
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)  # the labels of `axes` lie over this curve
    axes.patch.set_visible(False)
    if low:
        right.set_ylim(-0.35 * peak, 3.6 * peak)
    else:
        right.set_ylim(-2 * peak, 1.35 * peak)
    dashes = (0, (5, 1.5, 1, 1.5))
    right.plot([x for x, _ in points], [y for _, y in points], color=GREY, linewidth=1.6, linestyle=dashes)
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.spines["right"].set_bounds(0, peak)
    right.spines["right"].set_color(GREY)
    ticks = [0, peak / 2, peak]
    right.set_yticks(ticks, [f"{lr:.2g}" for lr in ticks], fontsize=11.5, color=GREY)
    add_text(right, end, peak, "learning rate", dx=2, dy=12, color=GREY)
    return right


def save_figure(draw: "Callable[[], Figure]", out: Path) -> None:
    """Draw a figure and write it to `out`, complete or not at all.

    Raises:
        UserError: the extension of `out` is no known picture format, or `out` cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    kind = out.suffix.lower().removeprefix(".")
    if kind not in known:
        raise UserError(f"{out}: unknown picture format; use a name that ends in one of .{', .'.join(sorted(known))}")
    with rc_context({"svg.fonttype": "none", "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
        figure = draw()
        try:
            with storage.writing(out) as file:
                figure.savefig(file, format=kind)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def png_of(figure: "Figure") -> bytes:
    """Return a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def data_url(figure: "Figure") -> str:
    """Return a figure as the address of a picture that a page holds itself."""
    return f"data:image/png;base64,{base64.b64encode(png_of(figure)).decode()}"
