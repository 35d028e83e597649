"""Scores of Gaussian predictions against SciPy in double precision, and integrals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ivon_jax import metrics

METRICS = {
    "gaussian_nll": metrics.gaussian_nll,
    "crps": metrics.crps,
    "interval_coverage": metrics.interval_coverage,
}


def predictions(seed, shape=(500,)):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=shape)
    variance = rng.gamma(1.0, size=shape) + 0.01
    targets = mean + np.sqrt(variance) * rng.normal(size=shape) * 1.3
    return [x.astype(np.float32) for x in (mean, variance, targets)]


def expected(mean, variance, targets):
    """By SciPy, in double precision."""
    mean, variance, targets = (np.float64(x) for x in (mean, variance, targets))
    stddev = np.sqrt(variance)
    z = (targets - mean) / stddev
    low, high = stats.norm.interval(0.95, mean, stddev)
    return {
        "gaussian_nll": -stats.norm.logpdf(targets, mean, stddev).mean(),
        "crps": np.mean(
            stddev
            * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
        ),
        "interval_coverage": np.mean((targets >= low) & (targets <= high)),
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_agree_with_scipy(seed):
    arrays = predictions(seed)
    for name, value in expected(*arrays).items():
        result = METRICS[name](*arrays)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("mean", "stddev"), [(0.0, 1.0), (3.0, 0.2), (-1.0, 4.0)])
def test_the_score_is_the_integral_that_defines_it(mean, stddev):
    """Of (F(t) - [t >= y])^2, by quadrature, split where it jumps."""
    y = 0.7

    def squared(t):
        return (stats.norm.cdf(t, mean, stddev) - (t >= y)) ** 2

    low, high = mean - 12 * stddev - 5, mean + 12 * stddev + 5
    integral = sum(
        integrate.quad(squared, *ends, points=[mean])[0]
        for ends in [(low, y - 1e-12), (y, high)]
    )
    result = metrics.crps(*(np.float32([x]) for x in (mean, stddev**2, y)))
    np.testing.assert_allclose(result, integral, rtol=1e-5)


def test_without_variance_the_score_is_the_absolute_error():
    mean, variance, targets = predictions(0)
    result = metrics.crps(mean, np.full_like(variance, 1e-12), targets)
    absolute = np.abs(np.float64(targets) - mean).mean()
    np.testing.assert_allclose(result, absolute, rtol=1e-5)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99, 1 - 1e-9])
def test_the_interval_has_the_level_asked_for(level):
    """Of targets on both sides of each edge."""
    edge = stats.norm.ppf((1 + level) / 2)
    targets = np.float32([0.9999 * edge, -0.9999 * edge, 1.0001 * edge, -1.0001 * edge])
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    for kept, share in [([0, 1], 1), ([2, 3], 0), ([1, 2, 3], 1 / 3)]:
        where = np.isin(np.arange(4), kept)
        result = metrics.interval_coverage(zeros, ones, targets, level, where=where)
        np.testing.assert_allclose(result, share, rtol=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_one_variance_may_be_that_of_all(name):
    mean, _, targets = predictions(0)
    variances = np.full_like(mean, 0.5)
    for one in (0.5, np.float32(0.5), jnp.asarray(0.5)):
        result = METRICS[name](mean, one, targets)
        np.testing.assert_array_equal(result, METRICS[name](mean, variances, targets))


@pytest.mark.parametrize("name", METRICS)
def test_other_axes_jit_and_other_dtypes_give_the_same(name):
    """Of float16 arrays, averaged in float32; of integers as targets."""
    metric, arrays = METRICS[name], predictions(0, (20, 25))
    flat = [x.ravel() for x in arrays]
    np.testing.assert_allclose(metric(*arrays), metric(*flat), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metric)(*arrays), metric(*arrays), rtol=1e-6)
    low = [jnp.asarray(x, jnp.float16) for x in flat]
    result = metric(*low)
    assert result.dtype == jnp.float32
    again = metric(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_array_equal(result, again)
    whole = np.round(flat[2])
    result = metric(*flat[:2], whole.astype(np.int8))
    np.testing.assert_array_equal(result, metric(*flat[:2], whole))


@pytest.mark.parametrize("name", METRICS)
def test_what_is_masked_changes_neither_value_nor_gradient(name):
    arrays = predictions(0, (60,))
    where = np.random.default_rng(1).uniform(size=60) < 0.7
    metric = METRICS[name]
    counted = [x[where] for x in arrays]
    of_both = {"argnums": (0, 1)}
    value, gradients = jax.value_and_grad(metric, **of_both)(*counted)
    padded = [np.where(where, x, np.nan) for x in arrays]
    for run in (metric, jax.jit(metric)):
        result, found = jax.value_and_grad(run, **of_both)(*padded, where=where)
        np.testing.assert_allclose(result, value, rtol=1e-6)
        for grads, gradient in zip(found, gradients, strict=True):
            np.testing.assert_allclose(grads[where], gradient, rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(grads[~where], 0)


@pytest.mark.parametrize("name", METRICS)
def test_under_jit_what_makes_no_sense_is_nan(name):
    run, (mean, variance, targets) = jax.jit(METRICS[name]), predictions(0)
    assert np.isfinite(run(mean, variance, targets))
    for bad in (0.0, -1.0, np.nan):
        wrong = np.append(variance[:-1], np.float32(bad))
        assert np.isnan(run(mean, wrong, targets))
    assert np.isnan(run(np.append(mean[:-1], np.float32(np.nan)), variance, targets))
    none = np.zeros(500, bool)
    assert np.isnan(run(mean, variance, targets, where=none))


@pytest.mark.slow
def test_sums_over_millions_of_examples_are_exact():
    """To 1e-5 of double precision."""
    arrays = predictions(0, (3_000_000,))
    for name, value in expected(*arrays).items():
        np.testing.assert_allclose(
            METRICS[name](*arrays), value, rtol=1e-5, err_msg=name
        )


@pytest.mark.usefixtures("x64")
def test_double_precision_stays_so():
    arrays = [np.float64(x) for x in predictions(0)]
    for name, value in expected(*arrays).items():
        result = METRICS[name](*arrays)
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, value, rtol=1e-13)


MEAN, VARIANCE, TARGETS = predictions(0, (6,))
BAD = {
    "a column": (
        (MEAN[:, None], VARIANCE, TARGETS),
        "`mean` must have the targets' shape (6,), got (6, 1). Nothing is broadcast.",
    ),
    "one mean": ((0.0, VARIANCE, TARGETS), "`mean` must have the targets' shape (6,)"),
    "variances": (
        (MEAN, VARIANCE[:1], TARGETS),
        "`variance` must have the targets' shape (6,), got (1,).",
    ),
    "no variance": (
        (MEAN, 0 * VARIANCE, TARGETS),
        "`variance` must be positive, got 0.0. It is the square of the standard dev",
    ),
    "logarithms": (
        (MEAN, np.where(VARIANCE.min() == VARIANCE, -0.5, VARIANCE), TARGETS),
        "`variance` must be positive, got -0.5. ",
    ),
    "a NaN variance": ((MEAN, VARIANCE * np.nan, TARGETS), "must be positive, got nan"),
    "a NaN": (
        (MEAN * np.nan, VARIANCE, TARGETS),
        "`mean` must be finite, got nan. Training diverged?",
    ),
    "infinity": (
        (MEAN, VARIANCE, np.where(TARGETS > 0, np.inf, TARGETS)),
        "`targets` must be finite, got inf.",
    ),
    "nothing": (
        (MEAN[:0], VARIANCE[:0], TARGETS[:0]),
        "`targets` must have at least one entry, got none.",
    ),
    "booleans": (
        (MEAN, VARIANCE, TARGETS > 0),
        "`targets` must be real numbers, got dtype bool.",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", METRICS)
def test_arrays_that_do_not_fit_are_named(name, arrays, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        METRICS[name](*arrays)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5])
def test_the_level_is_a_probability(level):
    with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\), got"):
        metrics.interval_coverage(MEAN, VARIANCE, TARGETS, level)


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="`where` must be boolean"):
        metrics.crps(MEAN, VARIANCE, TARGETS, where=np.ones(6))
    with pytest.raises(ValueError, match="`where` must be true somewhere"):
        metrics.crps(MEAN, VARIANCE, TARGETS, where=np.zeros(6, bool))
