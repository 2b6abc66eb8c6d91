"""Lay out a line chart for an HTML page: positions in per cent of the plot.

With per cent, text and lines keep their size at every width, so one drawing works on a desktop, a phone and paper. The
page's style sheet decides what the chart looks like.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm.record.points import Points

UNITS = 1000  # width and height of the curves' own coordinates
GAP = 5.0  # per cent between labels: one line of text


class Curve(NamedTuple):
    """A line of a chart. `name` is its class on the page; `label` stands at its end."""

    name: str
    label: str
    points: Points  # (step, value)
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps 0 to `end`, with values from `low` to `high`."""

    name: str
    title: str
    words: str  # a description for screen readers
    end: int
    low: float
    high: float
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = ()  # horizontal lines and their names
    star: tuple[int, float, str] | None = None  # step, value, label
    band: Sequence[tuple[int, float, float]] = ()  # (step, lower, upper)
    shaded_from: int | None = None  # step

    @property
    def left(self) -> float:
        """The step at the left edge: 1 % beyond the curves, to leave room for dots at their ends."""
        return -0.01 * self.end

    @property
    def right(self) -> float:
        """The step at the right edge."""
        return 1.01 * self.end

    def x(self, step: float) -> float:
        """Return the position of a step, in per cent from the left."""
        return round(100 * (step - self.left) / (self.right - self.left), 3)

    def y(self, value: float) -> float:
        """Return the position of a value, in per cent from the top."""
        return round(100 * (self.high - value) / (self.high - self.low), 3)

    def line(self, points: Points) -> str:
        """Return the `points` attribute of a polyline, in UNITS."""
        scale = UNITS / 100
        return " ".join(f"{self.x(x) * scale:.6g},{self._bounded(y) * scale:.6g}" for x, y in points)

    def dots(self, points: Points) -> str:
        """Return a path of lines of length zero, which round line caps turn into dots."""
        scale = UNITS / 100
        return "".join(f"M{self.x(x) * scale:.6g} {self._bounded(y) * scale:.6g}h0" for x, y in points)

    def band_line(self) -> str:
        """Return the outline of the band, as `line` does."""
        upper = [(step, high) for step, _, high in self.band]
        lower = [(step, low) for step, low, _ in self.band]
        return self.line(upper + lower[::-1])

    def _bounded(self, value: float) -> float:
        """Return `y`, at most ten heights away: browsers do not draw lines to points that are very far away."""
        return min(max(self.y(value), -1000), 1100)

    def x_ticks(self) -> list[tuple[float, str]]:
        return [(step, format_tick(step)) for step in ticks(0, self.end, 5) if step == int(step)]

    def y_ticks(self) -> list[tuple[float, str]]:
        return [(value, format_tick(value)) for value in ticks(self.low, self.high, 5)]

    def end_labels(self) -> list[tuple[float, Curve]]:
        """Return the heights of the labels at the curves' ends; labels that would overlap are moved down."""
        ends = sorted((min(max(self.y(c.points[-1][1]), 0), 100), c.name, c) for c in self.curves if c.points)
        placed: list[tuple[float, Curve]] = []
        for height, _, curve in ends:
            if placed:
                height = max(height, placed[-1][0] + GAP)
            placed.append((height, curve))
        return placed

    def level_side(self, level: float) -> str:
        """Return whether a level's name stands "above" or "below" its line: away from the nearest end of a curve."""
        ends = [curve.points[-1][1] for curve in self.curves if curve.points]
        nearest = min(ends, key=lambda end: abs(end - level), default=level)
        return "below" if nearest > level else "above"

    def star_side(self) -> str:
        """Return whether the star's label stands "over" or "under" it: away from the levels' names at the right."""
        assert self.star is not None
        step, value, _ = self.star
        distances = []
        for level, _ in self.levels:
            middle_of_name = self.y(level) + (GAP / 2 if self.level_side(level) == "below" else -GAP / 2)
            distances.append(abs(self.y(value) - GAP - middle_of_name))
        return "under" if min(distances, default=100.0) < GAP and self.x(step) > 60 else "over"

    def data(self) -> dict[str, Any]:
        """Return steps and values of each curve, for the script that shows values and zooms."""
        return {
            curve.name: [[float(f"{x:.10g}") for x, _ in curve.points], [float(f"{y:.6g}") for _, y in curve.points]]
            for curve in self.curves
        }


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    return [float(f"{i * spacing:.10g}") for i in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]


def format_tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
