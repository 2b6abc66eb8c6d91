"""Curves that stay small: at most `POINTS` rows of each, however many a run logs."""

from typing import Any

POINTS = 2000  # of a curve, at most
COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr")
Point = list[float | None]  # the values of `COLUMNS` in a row
Values = list[Point]


class Thinned:
    """A curve of at most `POINTS` rows: of each stretch of equally many, those of the lowest and highest value.

    When stretches are too many, each two neighbours become one. So a row costs the same however many came before,
    and the curve keeps its extremes and both ends.
    """

    def __init__(self, key: str) -> None:
        self.column, self.stride = COLUMNS.index(key), 1
        self._stretches: list[Values] = []  # those that are full, each the rows it keeps, in order
        self._held = 0  # rows in the one that is not
        self._low: Point = []
        self._high: Point = []
        self._high_is_later = True
        self._first: Point = []
        self._last: Point = []

    def add(self, row: Point) -> None:
        """A row of `COLUMNS`; one without this curve's value is no point of it."""
        value = row[self.column]
        if value is None:
            return
        if self._held == self.stride:
            self._stretches.append(self._open())
            self._held = 0
            if len(self._stretches) == POINTS // 2 - 2:  # an even number
                self._halve()
        if self._held == 0:
            self._low = self._high = row
        elif value < self._low[self.column]:  # type: ignore[operator]
            self._low, self._high_is_later = row, False
        elif value > self._high[self.column]:  # type: ignore[operator]
            self._high, self._high_is_later = row, True
        self._held += 1
        self._first = self._first or row
        self._last = row

    def rows(self) -> Values:
        """The rows kept, in order, the first and the last among them."""
        if not self._held:
            return []
        kept = [row for stretch in [*self._stretches, self._open()] for row in stretch]
        first, last = [self._first], [self._last]
        return (first if kept[0] is not first[0] else []) + kept + (last if kept[-1] is not last[0] else [])

    def _open(self) -> Values:
        """The rows that the last stretch keeps."""
        if self._low is self._high:
            return [self._low]
        return [self._low, self._high] if self._high_is_later else [self._high, self._low]

    def _halve(self) -> None:
        old = self._stretches
        self._stretches = [self._extremes(a + b) for a, b in zip(old[::2], old[1::2], strict=True)]
        self.stride *= 2

    def _extremes(self, rows: Values) -> Values:
        """Of a few rows, the one of the lowest value and that of the highest, in order."""
        order = sorted(range(len(rows)), key=lambda i: float(rows[i][self.column] or 0))
        return [rows[i] for i in sorted({order[0], order[-1]})]


def columns(rows: Values) -> Values:
    """Rows of `COLUMNS`, turned; shortened to six digits, which is what a hover shows."""
    turned = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    return turned[:3] + [[None if v is None else float(f"{v:.6g}") for v in column] for column in turned[3:]]


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
