"""Draw a comparison: the curves of all runs above, the difference from the first setting with its band below."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm.experiments.compare import Comparison, difference_curve
from llm.experiments.recorded import Axis, Group, RecordedRun, Unit
from llm.experiments.words import UNITS, apart
from llm.record.chart_style import (
    COLOURS,
    GREY,
    MARKERS,
    add_curve,
    add_end_labels,
    format_loss,
    make_canvas,
    plain,
    set_height,
)
from llm.record.points import Item, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTLED = 0.2  # share of a curve after which it sets the heights: the first fall would flatten the rest


def draw_comparisons(
    settings: Sequence[Group], comparisons: Sequence[Comparison], words: Mapping[str, str] | None = None
) -> "Figure":
    """Return the figure of comparisons with the first of the settings; those that do not compare are left out.

    `words`: what stands beside the name of each setting; unless given, what differs from the first setting.
    """
    kept = [found for found in comparisons if found.unit is not None]
    unit: Unit = "bits_per_byte" if any(found.unit == "bits_per_byte" for found in kept) else "loss"
    axis: Axis = "tokens" if any("tokens" in found.findings for found in kept) else "step"
    shown = [settings[0], *(found.other for found in kept)]
    points = [point for setting in shown for run in setting.runs for point in run.points(axis, unit)]
    end = max((place for place, _ in points), default=0.0) or 1.0

    runs = sum(len(setting.runs) for setting in shown)
    left_out = f"; {len(comparisons) - len(kept)} not comparable, left out" if len(kept) < len(comparisons) else ""
    subtitle = f"validation loss of each run{left_out}"
    figure, upper = make_canvas(f"{len(shown)} settings, {runs} runs", subtitle, UNITS[unit], int(end), right=0.64)
    figure.set_size_inches(10, 8)
    upper.set_position((0.1, 0.45, 0.54, 0.42))
    upper.set_xlabel("")
    upper.set_xlim(-0.01 * end, 1.01 * end)
    upper.tick_params(labelbottom=False)
    lower = figure.add_axes((0.1, 0.08, 0.54, 0.29), sharex=upper)
    lower.set_xlabel("tokens" if axis == "tokens" else "step", fontsize=12)
    lower.set_ylabel(f"difference from {shown[0].name}", fontsize=12)
    lower.tick_params(labelsize=11.5)
    lower.spines[["top", "right"]].set_visible(False)

    if words is None:
        words = {setting.name: apart(shown[0], setting, in_short=True) for setting in shown[1:]}
    _add_losses(upper, shown, words, axis, unit, end)
    _add_differences(lower, kept, shown, axis, unit, end)
    return figure


def _add_losses(
    axes: "Axes", settings: Sequence[Group], words: Mapping[str, str], axis: Axis, unit: Unit, end: float
) -> None:
    """Draw the validation loss of every run, in the colour of its setting."""
    labels = []
    every: list[tuple[float, float]] = []
    settled: list[tuple[float, float]] = []
    for number, setting in enumerate(settings):
        colour, marker = _style(number)
        curves = [_own_points(run, settings[:number], axis, unit) for run in setting.runs]
        for curve in curves:
            add_curve(axes, curve, colour, linewidth=1.6, marker=marker if len(curves) == 1 else "")
            every += curve
            settled += _settled(curve)
        if any(curves):
            last = [curve[-1][1] for curve in curves if curve]
            mean = sum(last) / len(last)
            label = f"{setting.name} {format_loss(mean)} {plain(words.get(setting.name, ''), 26)}"
            labels.append((mean, label.rstrip(), colour, marker))
    set_height(axes, [loss for _, loss in every], max((loss for _, loss in settled), default=float("inf")))
    add_end_labels(axes, end, labels, gap=0.075)


def _add_differences(
    axes: "Axes", comparisons: Sequence[Comparison], settings: Sequence[Group], axis: Axis, unit: Unit, end: float
) -> None:
    """Draw the difference of each setting from the first, with the 95 % interval at each evaluation."""
    axes.axhline(0, color=GREY, linewidth=1)
    heights = [0.0]
    labels = []
    has_band = False
    for number, found in enumerate(comparisons, 1):
        colour, marker = _style(number)
        curve = difference_curve(found.base, found.other, axis, unit)
        add_curve(axes, [(place, difference.mean) for place, difference in curve], colour, linewidth=2, marker=marker)
        banded = [(place, difference) for place, difference in curve if difference.pairs > 1]
        if banded:
            has_band = True
            places = [place for place, _ in banded]
            lows, highs = [difference.low for _, difference in banded], [difference.high for _, difference in banded]
            axes.fill_between(places, lows, highs, facecolor=colour, alpha=0.18, linewidth=0)
        heights += [difference.mean for _, difference in _settled(curve)]
        heights += [edge for _, difference in _settled(banded) for edge in (difference.low, difference.high)]
        if curve:
            labels.append((curve[-1][1].mean, f"{found.other.name} {curve[-1][1].mean:+.3f}", colour, marker))
    pad = 0.1 * (max(heights) - min(heights)) or 0.5
    axes.set_ylim(min(heights) - pad, max(heights) + pad)
    for line in axes.lines:
        line.set_clip_on(True)
    words = "band: 95 % interval at each evaluation" if has_band else "one seed each: may be chance"
    axes.set_title(f"difference (below 0: better); {words}", loc="left", fontsize=12.5, parse_math=False)
    add_end_labels(axes, end, labels, gap=0.1)


def _own_points(run: RecordedRun, drawn: Sequence[Group], axis: Axis, unit: Unit) -> Points:
    """Return the losses of a run: of a fork only those from its fork on, if the run before it is drawn."""
    shared = max((run.shared_with(other) for setting in drawn for other in setting.runs), default=0)
    return run.points(axis, unit, shared)


def _settled(curve: Sequence[tuple[float, Item]]) -> Sequence[tuple[float, Item]]:
    """Return the later part of a curve, whatever the lengths of others."""
    return [point for point in curve if point[0] >= SETTLED * curve[-1][0]]


def _style(number: int) -> tuple[str, str]:
    """Return the colour and the marker of a setting."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
