"""Risk over coverage against a plain loop over thresholds in double precision."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import metrics


def loop(scores, errors, max_risk=0.05):
    """The definition, of scores without ties."""
    errors = np.float64(errors)[np.argsort(-np.float64(scores))]
    n = len(errors)
    risk = np.array([errors[: k + 1].mean() for k in range(n)])
    best = np.array([np.sort(errors)[: k + 1].mean() for k in range(n)])
    coverage = (np.arange(n) + 1) / n
    return {
        "coverage": coverage,
        "risk": risk,
        "aurc": risk.mean(),
        "e_aurc": risk.mean() - best.mean(),
        "coverage_at_risk": max(coverage[risk <= max_risk], default=0.0),
    }


def problem(seed, n=400):
    """Confident predictions are wrong less often; no score is there twice."""
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n).astype(np.float32) / n
    return scores, rng.uniform(size=n) < 0.5 * (1 - scores)


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, 1e-5, 1e-7, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_curve_is_its_definition(seed):
    scores, wrong = problem(seed)
    losses = np.random.default_rng(seed).gamma(1.0, size=400).astype(np.float32)
    for errors in (wrong, wrong.astype(np.int8), losses):
        assert_same(metrics.risk_coverage(scores, errors), loop(scores, errors))


@pytest.mark.parametrize("max_risk", [0.0, 0.02, 0.1, 0.5])
def test_coverage_at_a_risk_is_the_largest_that_has_it(max_risk):
    scores, wrong = problem(0)
    expected = loop(scores, wrong, max_risk)
    assert_same(metrics.risk_coverage(scores, wrong, max_risk=max_risk), expected)


def test_coverage_at_several_risks():
    scores, wrong = problem(0)
    limits = np.array([[0.0, 0.05], [0.1, 2.0]])
    result = metrics.risk_coverage(scores, wrong, max_risk=limits)["coverage_at_risk"]
    expected = [[loop(scores, wrong, r)["coverage_at_risk"] for r in x] for x in limits]
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_tie_is_the_mean_over_all_orders():
    """And no threshold splits it: the coverage at a risk has all of it, or nothing."""
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    errors = np.array([0.0, 0.0, 1.0, 4.0, 2.0])
    runs = []
    for order in itertools.permutations(range(3)):
        apart = scores + 1e-3 * np.array([0, *order, 0])
        runs.append(loop(apart, errors))
    result = metrics.risk_coverage(scores, errors, max_risk=1.25)
    for name in ("risk", "aurc", "e_aurc"):
        mean = np.mean([run[name] for run in runs], axis=0)
        np.testing.assert_allclose(result[name], mean, rtol=1e-6)
    np.testing.assert_allclose(result["coverage_at_risk"], 0.8)
    result = metrics.risk_coverage(scores, errors, max_risk=1.2)
    np.testing.assert_allclose(result["coverage_at_risk"], 0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_the_examples_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=200).astype(np.float32)
    errors = rng.gamma(1.0, size=200).astype(np.float32)
    order = rng.permutation(200)
    expected = metrics.risk_coverage(scores, errors)
    assert_same(metrics.risk_coverage(scores[order], errors[order]), expected)


def test_the_best_order_has_no_excess_and_equal_scores_the_mean_risk():
    errors = np.array([True, False, False, True])
    assert metrics.risk_coverage(-errors.astype(int), errors)["e_aurc"] == 0
    equal = metrics.risk_coverage(np.zeros(4), errors)
    np.testing.assert_array_equal(equal["risk"], 0.5)
    assert equal["coverage_at_risk"] == 0
    right = metrics.risk_coverage(np.zeros(4), errors & False)
    assert right["aurc"] == 0
    assert right["coverage_at_risk"] == 1


@pytest.mark.parametrize("shape", [(60,), (6, 10)])
def test_what_is_masked_is_as_if_it_were_not_there(shape):
    """But for the curve, which repeats its last point. Also beside infinite scores."""
    scores, wrong = problem(0, 60)
    scores[:3], scores[3:5] = np.inf, -np.inf
    where = np.random.default_rng(1).uniform(size=60) < 0.7
    count = where.sum()
    expected = metrics.risk_coverage(scores[where], wrong[where])
    for fill in (np.nan, np.inf, -np.inf):
        padded = np.where(where, scores, np.float32(fill)).reshape(shape)
        losses = np.where(where, wrong, np.float32(np.nan)).reshape(shape)
        for run in (metrics.risk_coverage, jax.jit(metrics.risk_coverage)):
            result = run(padded, losses, where=where.reshape(shape))
            for name in ("coverage", "risk"):
                tail = result[name][count:]
                np.testing.assert_allclose(tail, result[name][count - 1], rtol=1e-6)
                result[name] = result[name][:count]
            assert_same(result, expected)


def test_lists_are_arrays():
    scores, errors = [0.9, 0.5, 0.7], [0.0, 1.0, 0.5]
    result = metrics.risk_coverage(scores, errors)
    np.testing.assert_allclose(result["risk"], [0.0, 0.25, 0.5], rtol=1e-6)


def test_risk_coverage_works_under_jit_and_vmap():
    scores, wrong = (np.stack(x) for x in zip(problem(0), problem(1), strict=True))
    result = jax.jit(jax.vmap(metrics.risk_coverage))(scores, wrong)
    for i in range(2):
        one = metrics.risk_coverage(scores[i], wrong[i])
        assert_same({name: x[i] for name, x in result.items()}, one)


def test_under_jit_what_makes_no_sense_is_nan():
    scores, wrong = problem(0)
    run = jax.jit(metrics.risk_coverage)
    holes = np.where(scores > 0.5, scores, np.nan)
    none = np.zeros(400, bool)
    for result in (
        run(holes, wrong),
        run(scores, np.where(wrong, np.nan, 0.0)),
        run(scores, wrong, where=none),
    ):
        assert all(np.isnan(x).all() for x in result.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_scores_of_other_dtypes_are_ranked_in_float32(dtype):
    scores, wrong = problem(0)
    low = jnp.asarray(10 * scores, dtype)
    result = metrics.risk_coverage(low, wrong)
    assert {x.dtype for x in result.values()} == {jnp.dtype("float32")}
    assert_same(result, metrics.risk_coverage(low.astype(jnp.float32), wrong))


@pytest.mark.slow
def test_sums_over_millions_of_examples_are_exact():
    """To 1e-5 of double precision, of mistakes and of losses."""
    n = 3_000_000
    rng = np.random.default_rng(0)
    scores = rng.permutation(n).astype(np.float32)
    order = np.argsort(-scores)
    losses = rng.gamma(1.0, size=n).astype(np.float32)
    for errors in (losses < 0.1, losses):
        result = metrics.risk_coverage(scores, errors)
        sums = np.cumsum(np.float64(errors)[order])
        risk = sums / (np.arange(n) + 1)
        np.testing.assert_allclose(result["aurc"], risk.mean(), rtol=1e-5)
        np.testing.assert_allclose(result["risk"], risk, rtol=1e-5)


SCORES, WRONG = problem(0)
BAD = {
    "shapes": (
        (SCORES, WRONG[1:]),
        "`errors` must have the scores' shape (400,), got (399,).",
    ),
    "nothing": ((SCORES[:0], WRONG[:0]), "`scores` must have at least one entry, got"),
    "NaN": ((SCORES * np.nan, WRONG), "`scores` must be numbers, got NaN for 400 of"),
    "NaN errors": (
        (SCORES, SCORES * np.nan),
        "`errors` must be numbers, got NaN for 400 of 400.",
    ),
    "booleans": ((WRONG, SCORES), "`scores` must be real numbers, got dtype bool."),
    "complex": ((SCORES, SCORES * 1j), "`errors` must be real numbers, got dtype comp"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_arrays_that_do_not_fit_are_named(arrays, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        metrics.risk_coverage(*arrays)


def test_the_risk_is_a_number():
    with pytest.raises(TypeError, match="`max_risk` must be real numbers, got dtype"):
        metrics.risk_coverage(SCORES, WRONG, max_risk=True)
