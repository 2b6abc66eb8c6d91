"""Tell a difference from chance: differences in pairs, their 95 % interval, and the verdict in words.

Two runs with the same seed see the same windows in the same order, so what a seed does to both cancels in the
difference (common random numbers). What is left is judged by Student's t over the pairs.

The pairs are either seeds, which say whether a setting is better, or parts of the validation text, which say only
whether these weights are better.

Sources: Student, The probable error of a mean (1908); Welch, The generalization of 'Student's' problem (1947); Holm,
A simple sequentially rejective multiple test procedure (1979).
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llm.experiments.student import critical, two_sided

FALSE_ALARMS = 0.05  # the share of verdicts "better" or "worse" where there is no difference
POWER = 0.8  # the chance that as many seeds as `seeds_needed` says show the difference
FEWEST = 3  # pairs that are worth asking for: with 2, the interval is 13 standard errors wide to each side
MOST = 30  # pairs that are worth asking for


@dataclass(frozen=True)
class Difference:
    """The mean of ours minus theirs. Losses: below 0, ours is better."""

    mean: float
    standard_error: float  # of the mean; infinite for one pair, which shows no spread
    low: float  # the interval holds the true difference in 1 - level of all experiments
    high: float
    pairs: int
    freedom: int  # degrees of freedom of Student's t; 0 for one pair
    level: float = FALSE_ALARMS

    @property
    def p_value(self) -> float:
        """The probability of a mean as far from 0 as this one, or further, if there is no difference."""
        if self.freedom == 0 or self.mean == 0:
            return 1.0
        return two_sided(abs(self.mean) / self.standard_error, self.freedom) if self.standard_error > 0 else 0.0

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the difference of losses in pairs: ours[i] and theirs[i] share the seed, or the windows.

    Raises:
        ValueError: there is no pair, not as many of one as of the other, or a loss that is not finite.
    """
    apart = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    if not apart or not all(map(math.isfinite, apart)):
        raise ValueError("expected one or more pairs of finite losses")
    count = len(apart)
    error = statistics.stdev(apart) / math.sqrt(count) if count > 1 else math.inf
    return _with_interval(Difference(statistics.fmean(apart), error, -math.inf, math.inf, count, count - 1))


def unpaired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the difference of the means of losses that share nothing, such as runs with other seeds (Welch's test).

    `pairs` is the number of the fewer losses. Welch's degrees of freedom are rounded down.

    Raises:
        ValueError: there is no loss of one, or a loss that is not finite.
    """
    if not ours or not theirs or not all(map(math.isfinite, [*ours, *theirs])):
        raise ValueError("expected one or more finite losses of each")
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    pairs = min(len(ours), len(theirs))
    if pairs == 1:
        return Difference(mean, math.inf, -math.inf, math.inf, 1, 0)
    mine, other = (statistics.variance(losses) / len(losses) for losses in (ours, theirs))
    scale = mine**2 / (len(ours) - 1) + other**2 / (len(theirs) - 1)
    freedom = int((mine + other) ** 2 / scale) if scale > 0 else pairs - 1
    return _with_interval(Difference(mean, math.sqrt(mine + other), mean, mean, pairs, max(1, freedom)))


def _with_interval(difference: Difference, level: float = FALSE_ALARMS) -> Difference:
    """Return the difference with the interval that misses the true one in a share of `level`."""
    if difference.freedom == 0:
        return dataclasses.replace(difference, level=level)
    half = critical(level, difference.freedom) * difference.standard_error
    return dataclasses.replace(difference, low=difference.mean - half, high=difference.mean + half, level=level)


def holm(differences: Sequence[Difference], looks: float = 1) -> list[Difference]:
    """Return the differences of several settings from one, with intervals that are wider by Holm's correction.

    With them, the chance that any of the settings without a difference is called better or worse is 5 %. Holm judges
    the smallest p-value at 5 % / k, the next at 5 % / (k - 1), and so on until one fails; the rest fail with it. Each
    interval here has the level at which Holm judges it, or the level of the first that failed, so an interval
    excludes 0 exactly if Holm's test rejects.

    If the same question is asked `looks` times, as more seeds come in, each time has its share of the 5 % (Bonferroni).
    If the one is the best of several settings by these very losses, `looks` is `looks_at_best` of their number.
    """
    order = sorted(range(len(differences)), key=lambda i: differences[i].p_value)
    corrected = list(differences)
    level = FALSE_ALARMS
    has_failed = False
    for rank, i in enumerate(order):
        if not has_failed:
            level = FALSE_ALARMS / looks / (len(order) - rank)
        corrected[i] = _with_interval(differences[i], level)
        has_failed = has_failed or not corrected[i].is_real
    return corrected


def looks_at_best(count: int) -> float:
    """Return the `looks` of `holm` for differences from the best of `count` settings by the same losses.

    All of the count (count - 1) / 2 pairs could have been compared, and Holm's correction is for count - 1 of them.
    """
    return max(1, count / 2)


def seeds_needed(difference: Difference) -> int | None:
    """Return how many pairs in all would show this difference in 4 of 5 experiments.

    It takes the mean and the spread of the pairs as they were measured. None if one pair shows no spread, or more than
    MOST pairs would be needed.
    """
    if difference.pairs < 2:
        return None
    spread = difference.standard_error * math.sqrt(difference.pairs)
    for count in range(max(FEWEST, difference.pairs + 1), MOST + 1):
        reach = critical(difference.level, count - 1) + critical(2 * (1 - POWER), count - 1)
        if abs(difference.mean) >= reach * spread / math.sqrt(count):
            return count
    return None


def verdict(difference: Difference, pair: str = "seed", unit: str = "") -> str:
    """Return in words whether ours is better: "better by 0.021 (0.012 to 0.030)", "worse by …", or what is not known.

    `pair` is what a pair consists of: "seed", or "part" of a validation text, of which nobody can have more. `unit`
    follows the numbers.
    """
    digits = _decimals(difference)
    unit = unit and f" {unit}"
    seen = f"{abs(difference.mean):.{digits}f}{unit} {'lower' if difference.mean < 0 else 'higher'}"
    if difference.pairs == 1:
        more = f"; {FEWEST - 1} more seeds of each may tell" if pair == "seed" else ""
        return f"not known: {seen} with one {pair} each, which may be chance{more}"
    if difference.is_real:
        near, far = sorted((abs(difference.low), abs(difference.high)))
        word = "better" if difference.mean < 0 else "worse"
        return f"{word} by {abs(difference.mean):.{digits}f} ({near:.{digits}f} to {far:.{digits}f}){unit}"
    bound = max(abs(difference.low), abs(difference.high))
    if bound == 0:
        return "no difference at all: the same losses"
    words = f"no difference larger than {bound:.{digits}f}{unit} ({seen.replace(unit, '')}, which may be chance)"
    needed = seeds_needed(difference) if pair == "seed" else None
    if needed is None:
        return words
    count = needed - difference.pairs
    return f"{words}; if it is as large as it looks, {count} more seed{'s' * (count > 1)} of each would tell"


def _decimals(difference: Difference) -> int:
    """Return the decimals that show a digit of the standard error, or two of the mean if there is none: 3 to 6."""
    error = difference.standard_error if difference.pairs > 1 else abs(difference.mean) / 10
    return min(6, max(3, -math.floor(math.log10(error)))) if error > 0 else 3
