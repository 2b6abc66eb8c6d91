"""A line chart for a page: where everything stands, in per cent of the plot.

Per cent keep letters and lines their size at every width, so that one drawing serves a desk, a phone and paper.
What it looks like is the page's affair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm.record.points import Points

UNITS = 1000  # of the curves' own coordinates, across and down


GAP = 5.0  # per cent between labels, a line of text


class Curve(NamedTuple):
    """A line of a chart. `name` is its class on the page; `label` stands at its end."""

    name: str
    label: str
    points: Points  # (step, value)
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps 0 to `end`, values from `low` to `high`."""

    name: str
    title: str
    words: str  # what it shows, for who does not see it
    end: int
    low: float
    high: float
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = ()  # horizontal lines and their names
    star: tuple[int, float, str] | None = None
    band: Sequence[tuple[int, float, float]] = ()  # (step, lower, upper)
    shaded_from: int | None = None

    @property
    def left(self) -> float:
        """The plot begins and ends a hundredth beyond the curves, for the dots at their ends."""
        return -0.01 * self.end

    @property
    def right(self) -> float:
        return 1.01 * self.end

    def x(self, step: float) -> float:
        """Per cent from the left."""
        return round(100 * (step - self.left) / (self.right - self.left), 3)

    def y(self, value: float) -> float:
        """Per cent from the top."""
        return round(100 * (self.high - value) / (self.high - self.low), 3)

    def line(self, points: Points) -> str:
        """The points of a polyline, in UNITS."""
        scale = UNITS / 100
        return " ".join(f"{self.x(x) * scale:.6g},{self._bounded(y) * scale:.6g}" for x, y in points)

    def dots(self, points: Points) -> str:
        """A path of lines without length, which round ends make dots."""
        scale = UNITS / 100
        return "".join(f"M{self.x(x) * scale:.6g} {self._bounded(y) * scale:.6g}h0" for x, y in points)

    def band_line(self) -> str:
        """The outline of the band."""
        return self.line([(x, high) for x, _, high in self.band] + [(x, low) for x, low, _ in reversed(self.band)])

    def _bounded(self, value: float) -> float:
        """`y`, at most ten heights away: browsers do not draw what is absurdly far."""
        return min(max(self.y(value), -1000), 1100)

    def x_ticks(self) -> list[tuple[float, str]]:
        return [(step, tick_words(step)) for step in ticks(0, self.end, 5) if step == int(step)]

    def y_ticks(self) -> list[tuple[float, str]]:
        return [(value, tick_words(value)) for value in ticks(self.low, self.high, 5)]

    def end_labels(self) -> list[tuple[float, Curve]]:
        """The labels at the curves' ends: their heights, moved apart where they would touch."""
        ends = sorted((min(max(self.y(c.points[-1][1]), 0), 100), c.name, c) for c in self.curves if c.points)
        placed: list[tuple[float, Curve]] = []
        for height, _, curve in ends:
            placed.append((max(height, placed[-1][0] + GAP) if placed else height, curve))
        return placed

    def level_side(self, level: float) -> str:
        """Whether a level's name stands above or below its line: away from the nearest curve's end."""
        ends = [curve.points[-1][1] for curve in self.curves if curve.points]
        return "below" if min(ends, key=lambda y: abs(y - level), default=level) > level else "above"

    def star_side(self) -> str:
        """Where the star's label keeps away from the levels' names, which stand at the right."""
        assert self.star is not None
        step, value, _ = self.star
        names = [
            self.y(level) + (GAP / 2 if self.level_side(level) == "below" else -GAP / 2) for level, _ in self.levels
        ]
        near = min((abs(self.y(value) - GAP - name) for name in names), default=100.0)
        return "under" if near < GAP and self.x(step) > 60 else "over"

    def data(self) -> dict[str, Any]:
        """The numbers, for a script that reads them out and zooms."""
        return {
            curve.name: [[float(f"{x:.10g}") for x, _ in curve.points], [float(f"{y:.6g}") for _, y in curve.points]]
            for curve in self.curves
        }


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values from `low` to `high`, 1, 2 or 5 of a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_words(value: float) -> str:
    """A value of an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
