"""The temperature with the least NLL on held-out data, and what it is chosen by."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import temp_bytes
from scipy import special, stats
from test_seam import Correlated

import ivon_jax
from ivon_jax import calibration

KEY = jax.random.key(0)
N, D, C = 60, 4, 3


def problem(seed, stddev=1.0):
    """A classifier, right in two of three, and its posterior of this width."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D)).astype(np.float32)
    w = rng.normal(size=(D, C)).astype(np.float32)
    labels = np.where(rng.uniform(size=N) < 0.6, (x @ w).argmax(1), 0)
    precision = rng.uniform(0.5, 2.0, size=(D, C)).astype(np.float32) / stddev**2
    q = ivon_jax.Posterior({"w": jnp.asarray(w)}, {"w": jnp.asarray(precision)})
    return q, jnp.asarray(x), jnp.asarray(labels, jnp.int32)


def probs(theta, x):
    return jax.nn.softmax(x @ theta["w"])


def nll_of(probs, labels):
    picked = np.asarray(probs, np.float64)[np.arange(len(labels)), labels]
    return -np.log(picked).mean()


def curve_of(q, x, labels, **options):
    options = {"num_samples": 4, "args": (x,)} | options
    return ivon_jax.calibration_curve(probs, q, labels, KEY, **options)


@pytest.mark.parametrize("stddev", [0.1, 10.0])
def test_the_curve_is_the_nll_of_predictions_at_each_temperature(stddev):
    """With the key and the samples of `predict`, in double precision."""
    q, x, labels = problem(0, stddev)
    curve = curve_of(q, x, labels)
    for i in range(0, len(curve.nll), 6):
        tempered = q.tempered(curve.temperatures[i])
        average = ivon_jax.predict(probs, tempered, KEY, 4, (x,))
        np.testing.assert_allclose(curve.nll[i], nll_of(average, labels), rtol=2e-5)
    at_mean = nll_of(probs(q.mean, x), labels)
    np.testing.assert_allclose(curve.mean_nll, at_mean, rtol=1e-5)
    np.testing.assert_allclose(curve.nll[0], at_mean, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_temperature_is_the_best_of_a_fine_grid(seed):
    """To the 8 % between the points, by NumPy with the same draws."""
    q, x, labels = problem(seed, stddev=0.1)
    q = q._replace(mean={"w": 2 * q.mean["w"]})  # too sure
    curve = curve_of(q, x, labels)
    draws = [q.sample(k)["w"] - q.mean["w"] for k in jax.random.split(KEY, 4)]

    def nll(temperature):
        weights = [
            np.asarray(q.mean["w"], float) + temperature**0.5 * d
            for d in np.asarray(draws, float)
        ]
        each = [special.softmax(np.asarray(x, float) @ w, axis=1) for w in weights]
        return nll_of(np.mean(each, axis=0), labels)

    fine = 10.0 ** np.linspace(-8, 3, 1101)
    best = fine[np.argmin([nll(t) for t in fine])]
    assert 1e-3 < best < 1e3
    assert abs(np.log10(curve.temperature / best)) < 4 / 121 + 0.01
    assert (
        curve.nll.min() == curve.nll[list(curve.temperatures).index(curve.temperature)]
    )


@pytest.mark.parametrize(("seed", "stddev"), [(0, 0.01), (1, 1.0), (2, 100.0)])
def test_samples_are_never_worse_than_the_mean(seed, stddev):
    """On the data of the calibration, to what is left of their noise at 1e-7."""
    q, x, labels = problem(seed, stddev)
    calibrated = ivon_jax.calibrate(probs, q, labels, KEY, args=(x,))
    average = ivon_jax.predict(probs, calibrated, KEY, 16, (x,))
    assert nll_of(average, labels) <= nll_of(probs(q.mean, x), labels) * 1.001


def test_calibrate_returns_the_posterior_at_the_best_temperature():
    q, x, labels = problem(0, stddev=10.0)
    curve = curve_of(q, x, labels)
    calibrated = ivon_jax.calibrate(probs, q, labels, KEY, num_samples=4, args=(x,))
    chex.assert_trees_all_close(calibrated, q.tempered(curve.temperature))
    assert 1e-4 < curve.temperature < 1.0


def test_the_temperatures_are_in_order_and_reach_from_the_mean_to_100():
    curve = curve_of(*problem(0))
    assert curve.temperatures.shape == curve.nll.shape == (30,)
    assert np.all(np.diff(curve.temperatures) > 0)
    assert curve.temperatures[0] <= 1.01e-7
    assert curve.temperatures[-1] >= 99


def test_one_chooses_among_temperatures_of_ones_own():
    q, x, labels = problem(0, stddev=10.0)
    curve = curve_of(q, x, labels, temperatures=[1.0, 0.01, 1e-6])
    np.testing.assert_allclose(curve.temperatures, [1e-6, 0.01, 1.0])
    assert curve.temperature == jnp.float32(0.01)
    assert curve.nll.argmin() == 1
    calibrated = ivon_jax.calibrate(
        *(probs, q, labels, KEY), args=(x,), temperatures=np.array([4.0, 2.0])
    )
    chex.assert_trees_all_close(calibrated, q.tempered(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_targets_with_a_density_need_no_labels(dtype):
    """y ~ N(theta, s^2): least where T sigma^2 + s^2 is the targets' variance.

    With 4,000 draws the NLL is off by 0.02 sqrt(2) nats at most, of each the same; the
    temperature by some per cents.
    """
    y, noise, stddev = np.random.default_rng(0).normal(size=400), 0.5, 3.0
    q = ivon_jax.Posterior(jnp.zeros((), dtype), jnp.asarray(stddev**-2.0, jnp.float32))

    def log_densities(theta):
        wide = theta.astype(jnp.float32)
        return jax.scipy.stats.norm.logpdf(jnp.asarray(y, jnp.float32), wide, noise)

    curve = ivon_jax.calibration_curve(log_densities, q, None, KEY, num_samples=4000)
    expected = (np.mean(y**2) - noise**2) / stddev**2
    np.testing.assert_allclose(curve.temperature, expected, rtol=0.15)
    best = stats.norm(0, np.sqrt(np.mean(y**2))).logpdf(y).mean()
    np.testing.assert_allclose(curve.nll.min(), -best, rtol=0.01)


def test_densities_neither_overflow_nor_underflow():
    """A target of a million nats, either way."""
    q = ivon_jax.Posterior(jnp.zeros(()), jnp.ones(()))
    for level in (1e6, -1e6):
        curve = ivon_jax.calibration_curve(
            lambda theta, level=level: jnp.full(3, level) + 0.0 * theta, q, None, KEY
        )
        np.testing.assert_allclose(curve.nll, -level, rtol=1e-6)
        np.testing.assert_allclose(curve.mean_nll, -level, rtol=1e-6)


@pytest.mark.parametrize("form", ["list", "stacked"])
def test_every_member_of_a_mixture_gets_the_temperature(form):
    """And it stays the mixture that it was. Its mean is that of the members' means."""
    (one, x, labels), (other, _, _) = problem(0, 10.0), problem(1, 10.0)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), one, other)
    mixture = {
        "list": ivon_jax.Mixture([one, other]),
        "stacked": ivon_jax.Mixture.from_stacked(stacked),
    }[form]
    curve = curve_of(mixture, x, labels, num_samples=6)
    calibrated = ivon_jax.calibrate(
        *(probs, mixture, labels, KEY), num_samples=6, args=(x,)
    )
    assert jax.tree.structure(calibrated) == jax.tree.structure(mixture)
    for i, q in enumerate((one, other)):
        chex.assert_trees_all_close(
            calibrated.member(i), q.tempered(curve.temperature), rtol=1e-6
        )
    means = (probs(one.mean, x) + probs(other.mean, x)) / 2
    np.testing.assert_allclose(curve.mean_nll, nll_of(means, labels), rtol=1e-5)
    average = ivon_jax.predict(probs, calibrated, KEY, 6, (x,))
    np.testing.assert_allclose(curve.nll.min(), nll_of(average, labels), rtol=2e-5)


def test_a_point_stays_where_it_is():
    q, x, labels = problem(0)
    point = q._replace(precision={"w": None})
    curve = curve_of(point, x, labels)
    np.testing.assert_allclose(curve.nll, curve.mean_nll, rtol=1e-6)
    calibrated = ivon_jax.calibrate(probs, point, labels, KEY, args=(x,))
    chex.assert_trees_all_equal(calibrated, point)


class Tempered(Correlated):
    """Another family: all that is asked of it is a mean, samples and a temperature."""

    def tempered(self, temperature):
        return Tempered(self.mean, self.root * jnp.sqrt(temperature))


def test_any_family_that_has_temperatures_is_calibrated():
    q, x, labels = problem(0)
    family = Tempered(q.mean, 10.0 * jnp.eye(D * C))
    curve = curve_of(family, x, labels)
    calibrated = ivon_jax.calibrate(
        *(probs, family, labels, KEY), num_samples=4, args=(x,)
    )
    assert type(calibrated) is Tempered
    expected = family.tempered(curve.temperature)
    chex.assert_trees_all_close(calibrated.root, expected.root)
    assert curve.nll.min() < curve.nll[-1]


def test_what_is_masked_is_as_if_it_were_not_there():
    q, x, labels = problem(0, stddev=10.0)
    where = np.random.default_rng(1).uniform(size=N) < 0.7
    expected = curve_of(q, x[where], labels[where])
    padded = jnp.where(where[:, None], x, jnp.nan), jnp.where(where, labels, -100)
    for run in (curve_of, jax.jit(curve_of)):
        chex.assert_trees_all_close(run(q, *padded, where=where), expected, rtol=1e-5)


def test_of_masked_log_likelihoods_none_counts():
    """Without labels it is as with them."""
    q, x, labels = problem(0, stddev=10.0)
    where = np.random.default_rng(1).uniform(size=N) < 0.7

    def log_likelihoods(theta, x):
        one_hot = jax.nn.one_hot(labels, C)
        return jnp.sum(jnp.log(probs(theta, x)) * one_hot, axis=-1)

    padded = jnp.where(where[:, None], x, jnp.nan)
    curve = ivon_jax.calibration_curve(
        log_likelihoods, q, None, KEY, num_samples=4, args=(padded,), where=where
    )
    expected = curve_of(q, x, labels, where=where)
    chex.assert_trees_all_close(curve, expected, rtol=1e-5)


def test_examples_may_have_any_axes():
    q, x, labels = problem(0)
    curve = curve_of(q, x.reshape(6, 10, D), labels.reshape(6, 10))
    chex.assert_trees_all_close(curve, curve_of(q, x, labels), rtol=1e-5)


def test_calibration_works_under_jit_and_vmap():
    q, x, labels = problem(0, stddev=10.0)
    expected = ivon_jax.calibrate(probs, q, labels, KEY, args=(x,))

    def calibrate(q, labels, x):
        return ivon_jax.calibrate(probs, q, labels, KEY, args=(x,))

    chex.assert_trees_all_close(jax.jit(calibrate)(q, labels, x), expected, rtol=1e-4)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), (q, labels, x))
    result = jax.jit(jax.vmap(calibrate))(*both)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[1], result), expected, rtol=1e-4
    )


def test_memory_grows_with_neither_samples_nor_temperatures():
    """Up to the keys, and a number for each temperature."""
    q = ivon_jax.Posterior(jnp.ones((1000, 10)), jnp.ones((1000, 10)))
    labels = jnp.zeros(1000, jnp.int32)

    def temporaries(num_samples, num_temperatures):
        temperatures = jnp.linspace(0.1, 1.0, num_temperatures)
        run = jax.jit(
            lambda q: ivon_jax.calibration_curve(
                *(jax.nn.softmax, q, labels, KEY),
                num_samples=num_samples,
                temperatures=temperatures,
            )
        )
        return temp_bytes(run.lower(q))

    few = temporaries(2, 2)
    assert temporaries(1002, 2) - few < 1000 * 100 < 1000 * q.mean.nbytes
    assert temporaries(2, 1002) - few < 1000 * 100


def test_temperatures_without_a_finite_nll_are_passed_over():
    q = ivon_jax.Posterior(jnp.zeros(3), jnp.ones(3))

    def overflowing(theta):
        wide = jnp.max(jnp.abs(theta)) > 1.0
        return jnp.where(wide, jnp.nan, -(theta**2) + 1.0)

    curve = ivon_jax.calibration_curve(overflowing, q, None, KEY)
    assert np.isnan(curve.nll[-1])
    assert np.isfinite(curve.nll[0])
    assert curve.temperature == curve.temperatures[0]


def test_under_jit_labels_of_no_class_give_nan():
    """A label or an output that makes no sense must not look like a temperature."""
    q, x, labels = problem(0)
    assert np.isfinite(jax.jit(curve_of)(q, x, labels).temperature)
    for bad in (-1, C):
        result = jax.jit(curve_of)(q, x, labels.at[0].set(bad))
        assert np.isnan(result.temperature)
        assert np.isnan(result.mean_nll)


Q, X, LABELS = problem(0)
LEAST_LOGIT = str(float(jnp.min(X @ Q.mean["w"])))[:6]  # at the mean
BAD = {
    "one temperature": (
        {"temperatures": [1.0]},
        "`temperatures` must have shape (K,), two or more to choose from, got shape",
    ),
    "a number": ({"temperatures": 1.0}, "use `posterior.tempered(temperature)`."),
    "zero": (
        {"temperatures": [0.0, 1.0]},
        "`temperatures` must be positive and finite, got 0.0. For the mean, take",
    ),
    "infinity": ({"temperatures": [1.0, np.inf]}, "positive and finite, got inf."),
    "a NaN": ({"temperatures": [1.0, np.nan]}, "positive and finite, got nan."),
    "labels above": ({"labels": LABELS + 1}, "`labels` must be in 0..2, got 3."),
    "labels below": ({"labels": LABELS - 1}, "`labels` must be in 0..2, got -1."),
    "fewer labels": ({"labels": LABELS[1:]}, "`labels` must have shape (60,), one"),
    "floats": (
        {"labels": LABELS.astype(float)},
        "`labels` must be integers, got dtype",
    ),
    "no examples": (
        {"labels": LABELS[:0], "args": (X[:0],)},
        "`fn(theta)` must have shape (..., num_classes) and at least one example, got",
    ),
    "logits": (
        {"fn": lambda theta, x: x @ theta["w"]},
        f"`fn(theta)` must be non-negative, got {LEAST_LOGIT}",
    ),
    "no sum": (
        {"fn": lambda theta, x: 2 * probs(theta, x)},
        "`fn(theta)` must sum to one over its last axis, got a sum of 2.0",
    ),
    "classes": (
        {"fn": lambda theta, x: jnp.argmax(probs(theta, x), -1)},
        "`fn(theta)` must be floating-point, got dtype int32.",
    ),
    "several": (
        {"fn": lambda theta, x: (probs(theta, x), 0.0)},
        "`fn(theta)` must be one array, got tuple.",
    ),
    "a total": (
        {"fn": lambda theta, x: probs(theta, x).sum(), "labels": None},
        "`fn(theta)` must have shape (N,), a log-likelihood for each example, got",
    ),
    "integers": (
        {"fn": lambda theta, x: jnp.argmax(probs(theta, x), -1), "labels": None},
        "`fn(theta)` must be floating-point, got dtype int32.",
    ),
    "no samples": ({"num_samples": 0}, "`num_samples` must be at least 1, got 0."),
    "parameters": ({"posterior": Q.mean}, "`posterior` must be a posterior, got dict."),
    "no function": ({"fn": X}, "`fn` must be a function of the parameters, got"),
    "no key": ({"key": 0}, "`key` must be a JAX random key, got 0."),
    "no tuple": ({"args": X}, "`args` must be a tuple of arguments, got ArrayImpl."),
    "a mask of numbers": ({"where": LABELS}, "`where` must be boolean, true where an"),
    "a short mask": (
        {"where": LABELS[1:] > 0},
        "`where` must broadcast to shape (60,)",
    ),
    "probability zero": (
        {"fn": lambda _, x: jax.nn.one_hot(LABELS + 1, 4)[: len(x)]},
        "`fn(theta)` must have a finite NLL at some temperature, got inf at the lowest",
    ),
    "NaN": (
        {"fn": lambda _, x: jnp.full(len(x), jnp.nan), "labels": None},
        "got nan at the lowest of 30. Did training diverge, or does a label have",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(changed, message):
    arguments = {"fn": probs, "posterior": Q, "labels": LABELS, "key": KEY}
    arguments |= {"num_samples": 2, "args": (X,)} | changed
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ivon_jax.calibrate(**arguments)


def scaling_problem(seed, shape=(200,)):
    """Logits that are too large by a factor, and labels drawn with the right ones."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=(*shape, 4))
    noise = rng.gumbel(size=logits.shape)
    factor = 10.0 ** rng.uniform(-1, 1)
    return (factor * logits).astype(np.float32), (logits + noise).argmax(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_temperature_scaling_finds_the_least_nll(seed):
    """Of a fine grid in double precision, to the grid's spacing."""
    logits, labels = scaling_problem(seed)
    grid = 10.0 ** np.linspace(-2, 2, 4001)
    wide = logits.astype(float)
    log_probs = [special.log_softmax(wide / t, axis=1) for t in grid]
    nll = [-x[np.arange(len(labels)), labels].mean() for x in log_probs]
    result = calibration.temperature_scaling(logits, labels)
    np.testing.assert_allclose(result, grid[np.argmin(nll)], rtol=3e-3)
    assert result.dtype == jnp.float32


def test_temperature_scaling_of_what_is_masked_and_of_other_axes():
    logits, labels = scaling_problem(0, (10, 20))
    where = np.random.default_rng(1).uniform(size=labels.shape) < 0.7
    expected = calibration.temperature_scaling(logits[where], labels[where])
    padded = np.where(where[..., None], logits, np.nan)
    labels = np.where(where, labels, -100)
    for run in (
        calibration.temperature_scaling,
        jax.jit(calibration.temperature_scaling),
    ):
        result = run(padded, labels, where=where)
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_temperature_scaling_of_what_is_always_right_or_without_sense():
    right, labels = 5.0 * np.eye(3, dtype=np.float32), np.arange(3)
    scale = jax.jit(calibration.temperature_scaling)
    np.testing.assert_allclose(scale(right, labels), 1e-4, rtol=1e-3)
    np.testing.assert_allclose(scale(-right, labels), 1e4, rtol=1e-3)
    assert np.isnan(scale(right, labels + 1))
    assert np.isnan(scale(right * np.float32(np.nan), labels))


def test_probabilities_of_zero_have_logarithms_to_scale():
    """As if there were no such class."""
    logits, labels = scaling_problem(0)
    more = np.concatenate([logits, np.full((200, 1), -np.inf, np.float32)], axis=1)
    result = calibration.temperature_scaling(more, labels)
    expected = calibration.temperature_scaling(logits, labels)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (3.0, 0, "`logits` must have shape (..., num_classes), two or more"),
        (X[:, :1], LABELS, "`logits` must have shape (..., num_classes), two or more"),
        (X[:0], LABELS[:0], "at least one example, got shape (0, 4)."),
        (X.astype(int), LABELS, "`logits` must be floating-point, got dtype int32."),
        (X, LABELS[1:], "`labels` must have shape (60,)"),
        (X, LABELS + 2, "`labels` must be in 0..3, got 4."),
        (X, X, "`labels` must be integers, got dtype float32."),
    ],
)
def test_temperature_scaling_names_what_does_not_fit(logits, labels, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        calibration.temperature_scaling(logits, labels)


def test_the_linearised_curve_is_the_nll_of_its_probabilities():
    """At each temperature; the covariance is that of the tempered posterior."""
    q, x, labels = problem(0, stddev=1.0)
    q = q._replace(mean={"w": 3 * q.mean["w"]})

    def logits(theta, x):
        return x @ theta["w"]

    outputs = ivon_jax.linearized(logits, q, x)
    curve = calibration.linearized_curve(outputs, labels)
    for i in (0, 13, 29):
        tempered = q.tempered(curve.temperatures[i])
        predicted = ivon_jax.linearized(logits, tempered, x).probs()
        np.testing.assert_allclose(curve.nll[i], nll_of(predicted, labels), rtol=2e-5)
    np.testing.assert_allclose(curve.mean_nll, nll_of(probs(q.mean, x), labels), 1e-5)
    best = np.argmin(curve.nll)
    assert curve.temperature == curve.temperatures[best]
    assert curve.nll[best] < 0.95 * curve.mean_nll
    where = np.arange(N) < 40
    masked = calibration.linearized_curve(outputs, labels.at[50].set(-1), where=where)
    some = jax.tree.map(lambda a: a[:40], outputs)
    expected = calibration.linearized_curve(some, labels[:40])
    chex.assert_trees_all_close(masked, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`labels` must be in 0\.\.2, got 3"):
        calibration.linearized_curve(outputs, labels + 1)
    with pytest.raises(ValueError, match="`temperatures` must have shape"):
        calibration.linearized_curve(outputs, labels, temperatures=[1.0])
