"""Verdicts on the paper's claims: intervals as SciPy has them, and words by them."""

import math
import re

import numpy as np
import pytest
from common import claims, results
from common.intervals import Interval
from scipy import stats

RNG = np.random.default_rng(0)
OURS, OTHER = RNG.normal(1.0, 0.3, 5).tolist(), RNG.normal(1.2, 0.3, 5).tolist()
RESULTS = results.load()


@pytest.mark.parametrize(("better", "sign"), [("lower", -1), ("higher", 1)])
def test_values_of_seeds_are_compared_seed_by_seed(better, sign):
    value, low, high = claims.in_favour(
        claims.difference(OURS, OTHER, count=99), better
    )
    test = stats.ttest_rel(sign * np.array(OURS), sign * np.array(OTHER))
    expected = test.confidence_interval(0.95)
    np.testing.assert_allclose([low, high], [expected.low, expected.high], rtol=1e-12)
    np.testing.assert_allclose(value, sign * np.mean(np.subtract(OURS, OTHER)))


def test_of_means_and_errors_the_errors_are_taken_together():
    """Five runs: four degrees of freedom, 2.776 errors."""
    ours, other = {"mean": 0.7, "error": 0.03}, {"mean": 0.5, "error": 0.04}
    value, low, high = claims.difference(ours, other, 5)
    np.testing.assert_allclose(value, 0.2)
    np.testing.assert_allclose([value - low, high - value], 2.7764451 * 0.05)


def test_a_difference_has_its_interval_already():
    cell = {"difference": 0.2, "low": -0.1, "high": 0.4}
    assert claims.difference(cell, None, 5) == (0.2, -0.1, 0.4)
    interval = claims.in_favour(claims.difference(cell, None, 5), "lower")
    assert interval == (-0.2, -0.4, 0.1)


def test_what_printing_has_rounded_widens_the_interval():
    cells = {"mean": 0.7, "error": 0.0}, {"mean": 0.5, "error": 0.0}
    value, low, high = claims.difference(*cells, 5, digits=1)
    expected = 2.7764451 * math.hypot(0.05, 0.05) + 0.1
    np.testing.assert_allclose([value - low, high - value], expected)


@pytest.mark.parametrize(
    ("interval", "margin", "expected"),
    [
        ((0.2, 0.1, 0.3), 0.0, "holds"),
        ((0.0, -0.1, 0.1), 0.0, "can't be told"),
        ((-0.2, -0.3, -0.1), 0.0, "does not hold"),
        ((-0.01, -0.02, 0.01), 0.05, "holds"),
        ((-0.04, -0.08, 0.0), 0.05, "can't be told"),
        ((-0.2, -0.3, -0.1), 0.05, "does not hold"),
        ((math.nan, math.nan, math.nan), 0.0, "can't be told"),
    ],
)
def test_a_verdict_says_no_more_than_its_interval(interval, margin, expected):
    assert claims.verdict(Interval(*interval), margin) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.2, "holds"),
        (1.3, "does not hold"),
        ({"median": 1.1, "low": 1.0, "high": 1.2}, "holds"),
        ({"median": 1.2, "low": 1.1, "high": 1.3}, "can't be told"),
        ({"median": 1.5, "low": 1.3, "high": 1.7}, "does not hold"),
    ],
)
def test_a_cost_is_held_to_its_limit(value, expected):
    assert claims.below(value, 1.25) == expected


def test_a_run_that_diverged_decides_nothing():
    gained = claims.difference([1.0, None, 1.0], [2.0, 2.0, 2.0], 3)
    assert claims.verdict(gained) == "can't be told"


def test_every_interval_is_finite():
    """Each comparison finds two cells, with errors."""
    for row in claims.judged(RESULTS, claims.load()):
        assert "nan" not in row["gain, 95 %"], row
        assert re.match("holds|does not hold|can't be told", row["verdict"])
