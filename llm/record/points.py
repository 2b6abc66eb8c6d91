"""Points of a curve, thinned to as many as can be drawn."""

import math
from collections.abc import Sequence

POINTS = 2000  # a training curve is thinned to at most this many


Points = Sequence[tuple[float, float]]


def thinned(points: Points) -> Points:
    """At most `POINTS` points: the means of equally many neighbours each, so that nothing is left out."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(math.fsum(x for x, _ in b) / len(b), math.fsum(y for _, y in b) / len(b)) for b in bins]
