"""Keep the curves of the page small: at most MAX_POINTS rows each, for a run of any length."""

from typing import Any

from llm.record.points import MAX_POINTS

COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "tokens_per_second", "lr")
Point = list[float | None]  # the values of COLUMNS in a row
Values = list[Point]


class ExtremesCurve:
    """A curve of at most MAX_POINTS rows, to which rows are added one at a time.

    The rows are divided into bins of equally many, and each bin keeps the rows of its lowest and its highest value. If
    there are too many bins, neighbours are merged. So the cost of a row does not depend on how many came before, and
    the curve keeps its extremes and both ends. `record.points.thin_by_mean` says why pictures are thinned differently.
    """

    def __init__(self, key: str) -> None:
        self.column = COLUMNS.index(key)
        self.bin_size = 1
        self._bins: list[Values] = []  # the full ones, each as the rows that it keeps, in order
        # the bin that is being filled
        self._filled = 0  # rows
        self._low: Point = []
        self._high: Point = []
        self._high_is_later = True
        # the ends of the curve
        self._first: Point = []
        self._last: Point = []

    def add(self, row: Point) -> None:
        """Add a row of COLUMNS; a row without this curve's value is ignored."""
        value = row[self.column]
        if value is None:
            return
        if self._filled == self.bin_size:
            self._bins.append(self._open_bin())
            self._filled = 0
            if len(self._bins) == MAX_POINTS // 2 - 2:  # an even number
                self._merge_neighbours()
        if self._filled == 0:
            self._low = row
            self._high = row
        elif value < self._low[self.column]:  # type: ignore[operator]
            self._low = row
            self._high_is_later = False
        elif value > self._high[self.column]:  # type: ignore[operator]
            self._high = row
            self._high_is_later = True
        self._filled += 1
        self._first = self._first or row
        self._last = row

    def rows(self) -> Values:
        """Return the rows kept, in order, including the first and the last row of the run."""
        if not self._filled:
            return []
        kept = [row for found in [*self._bins, self._open_bin()] for row in found]
        if kept[0] is not self._first:
            kept.insert(0, self._first)
        if kept[-1] is not self._last:
            kept.append(self._last)
        return kept

    def _open_bin(self) -> Values:
        """Return the rows that the bin being filled keeps so far."""
        if self._low is self._high:
            return [self._low]
        return [self._low, self._high] if self._high_is_later else [self._high, self._low]

    def _merge_neighbours(self) -> None:
        pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
        self._bins = [self._extremes(left + right) for left, right in pairs]
        self.bin_size *= 2

    def _extremes(self, rows: Values) -> Values:
        """Return the row of the lowest and the row of the highest value, in order."""
        by_value = sorted(range(len(rows)), key=lambda i: float(rows[i][self.column] or 0))
        return [rows[i] for i in sorted({by_value[0], by_value[-1]})]


def columns(rows: Values) -> list[list[Any]]:
    """Return the columns of rows of COLUMNS; measured values have six digits, as a hover shows them."""
    found: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    exact = found[:3]  # step, tokens, seconds
    rounded = [[None if value is None else float(f"{value:.6g}") for value in column] for column in found[3:]]
    return exact + rounded
