"""Student's t distribution for whole degrees of freedom.

Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: finite sums, exact for whole
degrees of freedom. This is all that we would need scipy (140 MB installed) for.
"""

import math
from functools import cache


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that |T| is above `t` (0 or more); `freedom` (1 or more) is the degrees of freedom."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term = cosine
        total = term if freedom > 1 else 0.0
        for i in range(2, freedom - 1, 2):
            term *= cosine * cosine * i / (i + 1)
            total += term
        inside = (angle + sine * total) * 2 / math.pi
    else:
        term = total = 1.0
        for i in range(1, freedom - 1, 2):
            term *= cosine * cosine * i / (i + 1)
            total += term
        inside = sine * total
    return min(1.0, max(0.0, 1.0 - inside))


@cache
def critical(level: float, freedom: int) -> float:
    """Return the t that |T| is above with probability `level`, such as 12.71 for 0.05 and one degree of freedom."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > level:
        high *= 2
    for _ in range(60):  # each halves the interval
        middle = (low + high) / 2
        if two_sided(middle, freedom) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
