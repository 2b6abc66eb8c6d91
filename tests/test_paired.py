"""The statistics against published figures, the density itself, and counts of false alarms in simulated experiments."""

import math

import numpy as np
import pytest

from llm.experiments.paired import (
    FALSE_ALARMS,
    Difference,
    holm,
    paired_difference,
    seeds_needed,
    unpaired_difference,
    verdict,
)
from llm.experiments.student import critical, two_sided

# Student's own data (1908): hours of sleep that ten patients gained by two drugs
ONE = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
OTHER = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def integrated(t: float, freedom: int) -> float:
    """Return P(|T| > t) from the density of Student's t, integrated over the angle (t = √freedom tan a)."""
    size = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angles = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20_001)
    return 2 * size * float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 31, 200])
def test_student_is_the_integral_of_its_density(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.0, 4.0, 12.7):
        assert two_sided(t, freedom) == pytest.approx(integrated(t, freedom), abs=1e-7)


def test_student_has_the_published_quantiles() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {freedom: round(critical(0.05, freedom), 3) for freedom in table} == table
    assert critical(0.01, 5) == pytest.approx(4.032, abs=5e-4)


def test_a_paired_difference_is_that_of_students_own_data() -> None:
    """As published with R's example of t.test: t = 4.0621, p = 0.002833, 0.7001142 to 2.4598858."""
    found = paired_difference(OTHER, ONE)
    assert found.mean == pytest.approx(1.58)
    assert found.mean / found.standard_error == pytest.approx(4.0621, abs=5e-5)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.pairs == 10


def test_an_unpaired_difference_is_that_of_students_own_data() -> None:
    """As published with R: t = 1.8608 with 17.776 degrees of freedom, of which we use 17 (t = 2.110 from a table)."""
    found = unpaired_difference(OTHER, ONE)
    assert found.freedom == 17
    assert found.mean / found.standard_error == pytest.approx(1.8608, abs=5e-5)
    assert found.high - found.mean == pytest.approx(2.110 * 1.58 / 1.8608, abs=1e-3)
    assert not found.is_real


def test_holm_rejects_step_by_step_and_its_intervals_agree() -> None:
    """p = 0.005 and 0.01 pass at 0.05 / 4 and 0.05 / 3; 0.03 fails at 0.05 / 2, and 0.04 with it, though below 0.05."""
    differences = [Difference(-critical(p, 9), 1.0, 0.0, 0.0, 10, 9) for p in (0.01, 0.04, 0.03, 0.005)]
    corrected = holm(differences)
    assert [found.is_real for found in corrected] == [True, False, False, True]
    assert [found.level for found in corrected] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    alone = holm(differences[:1])[0]
    assert alone.level == FALSE_ALARMS
    assert alone.is_real


def test_verdicts_in_words() -> None:
    assert verdict(Difference(-0.021, 0.004, -0.030, -0.012, 5, 4)) == "better by 0.021 (0.012 to 0.030)"
    assert verdict(Difference(0.021, 0.004, 0.012, 0.030, 5, 4)) == "worse by 0.021 (0.012 to 0.030)"
    assert verdict(paired_difference([4.0], [4.1])).startswith("not known: 0.100 lower with one seed")
    unclear = verdict(paired_difference([4.00, 3.98, 4.02], [4.03, 4.04, 4.03]))
    assert unclear == (
        "no difference larger than 0.096 (0.033 lower, which may be chance); if it is as large as it looks, 4 more "
        "seeds of each would tell"
    )
    assert verdict(paired_difference([4.0, 3.0], [4.0, 3.0])) == "no difference at all: the same losses"
    assert "more" not in verdict(paired_difference([4.0, 4.1], [4.1, 4.0]))  # no difference, however many seeds


def test_pairs_that_are_none_are_refused() -> None:
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match=r"finite|zip"):
            paired_difference(ours, theirs)
    with pytest.raises(ValueError, match="finite"):
        unpaired_difference([1.0], [math.inf])


def likely_counts(trials: int, share: float, chance: float = 1e-4) -> tuple[int, int]:
    """Return the counts that a binomial variable stays between, but for `chance` at each end."""
    weights = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)]
    below = np.cumsum(weights)
    return int(np.searchsorted(below, chance)), int(np.searchsorted(below, 1 - chance))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_false_alarms_are_as_many_as_stated(seeds: int) -> None:
    """The same settings with other seeds: losses of a spread of 0.02 around one mean, half of it shared by a pair."""
    draws = np.random.default_rng(seeds)
    trials = 500
    alarms = 0
    for _ in range(trials):
        shared = draws.normal(4.0, 0.014, seeds)
        ours, theirs = (shared + draws.normal(0, 0.014, seeds) for _ in range(2))
        alarms += paired_difference(ours.tolist(), theirs.tolist()).is_real
    low, high = likely_counts(trials, FALSE_ALARMS)
    assert low <= alarms <= high


def test_a_family_of_comparisons_has_as_many_false_alarms_as_one() -> None:
    """Five settings without a difference, each compared with the first: an alarm at any of them in 5 % at most."""
    draws = np.random.default_rng(5)
    trials = 300
    families = 0
    for _ in range(trials):
        first, *others = draws.normal(4.0, 0.02, (6, 4)).tolist()
        families += any(found.is_real for found in holm([paired_difference(other, first) for other in others]))
    assert families <= likely_counts(trials, FALSE_ALARMS)[1]


def test_the_seeds_needed_show_the_difference_in_four_of_five_experiments() -> None:
    draws = np.random.default_rng(8)
    size, spread, trials = 0.02, 0.02, 500
    measured = Difference(-size, spread / math.sqrt(3), -1.0, 1.0, 3, 2)
    count = seeds_needed(measured)
    assert count is not None
    found = sum(
        paired_difference(draws.normal(-size, spread, count).tolist(), [0.0] * count).is_real for _ in range(trials)
    )
    low, high = likely_counts(trials, 0.8)
    assert low <= found <= high + 0.05 * trials  # a whole number of seeds gives a little more
    assert seeds_needed(paired_difference([1.0], [2.0])) is None
