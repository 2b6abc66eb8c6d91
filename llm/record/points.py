"""Reduce a long curve to as many points as a picture can show."""

import math
from collections.abc import Sequence
from typing import TypeVar

MAX_POINTS = 2000  # of a drawn curve

Points = Sequence[tuple[float, float]]
Item = TypeVar("Item")


def thin_by_mean(points: Points) -> Points:
    """Return at most MAX_POINTS points: the means of bins of equally many neighbours.

    For pictures of a whole record (PNG, report): the means show the level of a noisy training loss.

    The live page thins differently, with `page.thin.ExtremesCurve`. It adds one row at a time at constant cost, and it
    keeps recorded rows, so that spikes stay visible and a hover shows recorded values.
    """
    bin_size = math.ceil(len(points) / MAX_POINTS)
    if bin_size <= 1:
        return points
    bins = [points[i : i + bin_size] for i in range(0, len(points), bin_size)]
    return [_mean_point(found) for found in bins]


def _mean_point(points: Points) -> tuple[float, float]:
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    return mean_x, mean_y


def pick_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` (2 or more) of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]
