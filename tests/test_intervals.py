"""Intervals over seeds and over test examples hold what they should hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import intervals, tables
from common.intervals import Interval, interval, paired_mean
from statistical import assert_mean

SEEDS, EXAMPLES, RUNS = 5, 200, 300
SPREADS = {  # of seeds, of examples, and of both together
    "seeds": (1.0, 1.0, 1.0),
    "examples": (0.0, 10.0, 3.0),
    "all alike": (0.3, 4.0, 10.0),
}


@pytest.mark.parametrize("case", SPREADS)
def test_an_interval_covers_the_truth_as_often_as_it_says(case):
    """Of 300 experiments, with five seeds: a percentile bootstrap covers 85 %."""
    seeds, examples, both = SPREADS[case]
    rng = np.random.default_rng(0)
    shape = SEEDS, EXAMPLES
    covered = []
    for key in jax.random.split(jax.random.key(0), RUNS):
        effects = (
            seeds * rng.normal(size=(SEEDS, 1)),
            examples * rng.normal(size=EXAMPLES),
            both * rng.normal(size=shape),
        )
        shared = rng.normal(size=shape) * 100
        a, b = (jnp.asarray(x, jnp.float32) for x in (sum(effects, 7.0), shared))
        found = quick_interval(key, a + b, b)
        covered.append(found.low <= 7.0 <= found.high)
    assert_mean(np.array(covered), 0.95, z=4)


def quick_interval(key, *arrays):
    return interval(key, paired_mean, *arrays, resamples=100)


def test_without_effects_of_seeds_it_is_the_bootstrap_over_examples():
    """All seeds alike: the standard error of one mean of N."""
    losses = np.random.default_rng(0).gamma(2.0, size=2_000).astype("float32")
    both = jnp.asarray(np.stack([losses] * SEEDS))
    found = interval(jax.random.key(0), jnp.mean, both, resamples=4_000)
    error = losses.std() / np.sqrt(losses.size)
    np.testing.assert_allclose(found.estimate, losses.mean(), rtol=1e-5)
    # The standard deviation of 4,000 draws is known to 1.1 %.
    np.testing.assert_allclose(found.high - found.low, 2 * 1.96 * error, rtol=0.05)


def test_without_effects_of_examples_it_is_students_interval():
    values = np.float32([1.0, 2.0, 4.0, 3.0, 7.0])
    alike = jnp.asarray(np.repeat(values[:, None], EXAMPLES, axis=1))
    found = interval(jax.random.key(0), jnp.mean, alike)
    np.testing.assert_allclose(found, intervals.over_seeds(values), rtol=1e-5)
    np.testing.assert_allclose(found.estimate, 3.4)
    np.testing.assert_allclose(found.high - 3.4, 2.776445 * 1.029563, rtol=1e-5)


def test_what_both_systems_share_is_no_error():
    a = jax.random.normal(jax.random.key(0), (SEEDS, EXAMPLES))
    found = interval(jax.random.key(1), paired_mean, a + 0.5, a)
    np.testing.assert_allclose(found, 0.5, atol=1e-6)


def test_no_difference_at_all_is_a_point():
    a = jnp.ones((SEEDS, EXAMPLES))
    assert interval(jax.random.key(0), paired_mean, a, a) == (0.0, 0.0, 0.0)


def test_cell():
    cell = Interval(-0.0123, -0.04, 0.01).cell
    assert tables.cell(cell, 3) == "-0.012 (-0.040 to 0.010)"
    assert tables.mean(cell) == -0.0123
