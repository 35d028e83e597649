"""Averages over the posterior: right, lean, and of any pytree."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import temp_bytes
from scipy import stats
from statistical import assert_mean

import ivon_jax
from ivon_jax import predictive

POSTERIOR = ivon_jax.Posterior(
    mean={"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)},
    precision={"w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)},
)


def outputs(theta):
    """A pytree of several shapes and dtypes."""
    return {
        "mean": theta["w"],
        "positive": theta["w"] > 0,
        "pair": (theta["w"].sum(), jnp.sign(theta["w"]).astype(jnp.bfloat16)),
    }


def test_predict_is_the_mean_over_its_keys_samples(key):
    result = ivon_jax.predict(outputs, POSTERIOR, key, num_samples=7)
    draws = [outputs(POSTERIOR.sample(k)) for k in jax.random.split(key, 7)]
    expected = jax.tree.map(
        lambda *xs: jnp.mean(jnp.stack([x.astype(jnp.float32) for x in xs]), 0), *draws
    )
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}


@pytest.mark.statistical
def test_predict_converges_to_the_expectation(key):
    """E[theta^2] = m^2 + sigma^2."""
    keys = jax.random.split(key, 400)
    squares = jax.jit(
        jax.vmap(lambda k: ivon_jax.predict(lambda t: t["w"] ** 2, POSTERIOR, k, 16))
    )(keys)
    mean, variance = POSTERIOR.mean["w"], POSTERIOR.variance["w"]
    assert_mean(squares, mean**2 + variance)


def test_one_sample_is_that_sample(key):
    result = ivon_jax.predict(lambda theta: theta, POSTERIOR, key, num_samples=1)
    sample = POSTERIOR.sample(jax.random.split(key, 1)[0])
    chex.assert_trees_all_close(result, sample, rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_samples(key):
    """Up to the keys, 8 bytes each: no stack of parameters or of predictions."""
    q = ivon_jax.Posterior(jnp.ones(10_000), jnp.ones(10_000))

    def temporaries(num_samples):
        run = jax.jit(lambda k: ivon_jax.predict(jnp.sin, q, k, num_samples))
        return temp_bytes(run.lower(key))

    few, many = temporaries(2), temporaries(1002)
    assert many - few < 1000 * 100 < 1000 * q.mean.nbytes


def test_probabilities_average_to_probabilities(key):
    probs = ivon_jax.predict(lambda t: jax.nn.softmax(t["w"]), POSTERIOR, key)
    np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-6)


def test_an_infinite_mean_is_infinite(key):
    """As that of log-likelihoods may be; not NaN."""

    def log_likelihoods(theta):
        return jnp.stack([-jnp.inf, theta["w"].sum()])

    result = ivon_jax.predict(log_likelihoods, POSTERIOR, key, num_samples=4)
    assert result[0] == -jnp.inf
    assert jnp.isfinite(result[1])


def test_parameters_are_no_posterior(key):
    message = "`posterior` must be a posterior, got dict. Pass `ivon_jax.posterior("
    with pytest.raises(TypeError, match=re.escape(message)):
        ivon_jax.predict(outputs, POSTERIOR.mean, key)


@pytest.mark.parametrize("bad", [0, -3])
def test_the_number_of_samples_is_positive(bad, key):
    message = f"`num_samples` must be at least 1, got {bad}."
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.predict(outputs, POSTERIOR, key, num_samples=bad)


@pytest.mark.parametrize("bad", [2.0, "64", None, True])
def test_the_number_of_samples_is_an_integer(bad, key):
    message = f"`num_samples` must be an integer, got {bad!r}."
    with pytest.raises(TypeError, match=re.escape(message)):
        ivon_jax.predict(outputs, POSTERIOR, key, num_samples=bad)


UNFIT = {
    "no function": (
        {"fn": None},
        "`fn` must be a function of the parameters, got None",
    ),
    "parameters": ({"posterior": None}, "`posterior` must be a posterior, got None"),
    "no key": ({"key": None}, "`key` must be a JAX random key, got None. Pass `jax."),
    "a seed": ({"key": 0}, "`key` must be a JAX random key, got 0. Pass `jax.random"),
    "numbers": (
        {"key": jnp.ones(2)},
        "`key` must be one JAX random key, got float32 of",
    ),
    "keys": (
        {"key": jnp.zeros((3, 2), jnp.uint32)},
        "`key` must be one JAX random key, got key<fry> of shape (3,).",
    ),
    "rows": (
        {"args": jnp.ones((2, 3))},
        "`args` must be a tuple of arguments, got ",
    ),
    "nothing": (
        {"fn": lambda _: None},
        "`fn(theta)` must be an array or a pytree of arrays, got None. Does the",
    ),
    "text": (
        {"fn": lambda _: {"logits": "x"}},
        "`fn(theta)` must be an array or a pytree of arrays, got str at fn(theta)['log",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), UNFIT.values(), ids=UNFIT)
def test_predict_names_what_does_not_fit(arguments, message):
    good = {"fn": outputs, "posterior": POSTERIOR, "key": jax.random.key(0)}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ivon_jax.predict(**(good | arguments))


def test_counts_may_be_numpys_and_keys_legacy():
    key = jax.random.PRNGKey(3)
    result = ivon_jax.predict(outputs, POSTERIOR, key, np.int64(3))
    expected = ivon_jax.predict(outputs, POSTERIOR, jax.random.wrap_key_data(key), 3)
    chex.assert_trees_all_equal(result, expected)


def class_probabilities(theta):
    """Of two examples and three classes; the last is impossible for the first."""
    logits = theta["w"].at[0, 2].set(-jnp.inf)
    return jax.nn.softmax(2 * logits)


def entropy(probs):
    """In double precision, from the definition."""
    probs = np.asarray(probs, np.float64)
    return -np.sum(np.where(probs > 0, probs * np.log(probs + (probs == 0)), 0), -1)


def test_uncertainties_are_the_entropies_of_its_keys_samples(key):
    """In nats, of the same samples that `predict` draws; with a probability of zero."""
    result = predictive.uncertainty(class_probabilities, POSTERIOR, key, num_samples=9)
    probs = [class_probabilities(POSTERIOR.sample(k)) for k in jax.random.split(key, 9)]
    mean = np.mean(np.asarray(probs, np.float64), axis=0)
    total, aleatoric = entropy(mean), np.mean([entropy(p) for p in probs], axis=0)
    expected = predictive.Uncertainty(mean, total, aleatoric, total - aleatoric)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    assert result.epistemic.min() > 1e-3
    assert result.total.shape == (2,)


def test_probabilities_of_uncertainty_are_those_of_predict(key):
    result = predictive.uncertainty(class_probabilities, POSTERIOR, key, 5)
    probs = ivon_jax.predict(class_probabilities, POSTERIOR, key, 5)
    np.testing.assert_array_equal(result.probs, probs)


def test_uncertainty_passes_arguments_on(key):
    def probs(theta, x, scale=1.0):
        return jax.nn.softmax(scale * theta["w"] + x)

    x = jnp.eye(2, 3)
    result = predictive.uncertainty(probs, POSTERIOR, key, 3, args=(x, 2.0))
    expected = predictive.uncertainty(lambda t: probs(t, x, 2.0), POSTERIOR, key, 3)
    chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_total_uncertainty_is_aleatoric_plus_epistemic(key):
    _, total, aleatoric, epistemic = predictive.uncertainty(
        class_probabilities, POSTERIOR, key
    )
    np.testing.assert_allclose(total, aleatoric + epistemic, rtol=1e-6)


def test_certain_samples_that_disagree_are_epistemic_alone(key):
    """Of one-hot probabilities each sample's entropy is zero, not NaN."""

    def winner(theta):
        positive = theta["w"][0, 0] > 0
        return jnp.stack([positive, ~positive]).astype(jnp.float32)

    _, total, aleatoric, epistemic = predictive.uncertainty(winner, POSTERIOR, key, 50)
    assert aleatoric == 0
    assert epistemic == total > 0.1


@pytest.mark.parametrize("num_samples", [1, 3, 64, 1000])
def test_a_point_has_no_epistemic_uncertainty(key, num_samples):
    """Up to the rounding of sums, which never makes it negative."""
    logits = jax.random.normal(key, (500, 7))
    q = ivon_jax.Posterior(logits, None)
    result = predictive.uncertainty(jax.nn.softmax, q, key, num_samples)
    assert result.epistemic.min() >= 0
    assert result.epistemic.max() < 1e-6 * np.log(7) * np.sqrt(num_samples)
    np.testing.assert_allclose(result.total, result.aleatoric, rtol=1e-4)


@pytest.mark.slow
def test_memory_of_uncertainty_does_not_grow_with_the_number_of_samples():
    """Up to the keys, as that of `predict`."""
    key = jax.random.key(0)
    q = ivon_jax.Posterior(jnp.ones((1000, 10)), jnp.ones((1000, 10)))

    def temporaries(num_samples):
        run = jax.jit(
            lambda k: predictive.uncertainty(jax.nn.softmax, q, k, num_samples)
        )
        return temp_bytes(run.lower(key))

    few, many = temporaries(2), temporaries(1002)
    assert many - few < 1000 * 100 < 1000 * q.mean.nbytes


def test_uncertainties_are_of_single_or_double_precision(key):
    """Of bfloat16 probabilities; and the same under jit."""

    def low(theta):
        return class_probabilities(theta).astype(jnp.bfloat16)

    run = functools.partial(predictive.uncertainty, low, POSTERIOR, num_samples=4)
    result = run(key)
    assert {x.dtype for x in result} == {jnp.dtype("float32")}
    chex.assert_trees_all_close(result, jax.jit(run)(key), rtol=1e-5, atol=1e-6)


NO_PROBABILITIES = {
    "logits": (lambda theta: theta["w"] + 10, "`fn(theta)` must sum to one"),
    "log-probabilities": (
        lambda theta: jax.nn.log_softmax(theta["w"]),
        "`fn(theta)` must be non-negative, got -",
    ),
    "classes": (
        lambda theta: jnp.argmax(theta["w"], axis=-1),
        "`fn(theta)` must be floating-point, got dtype int32.",
    ),
    "a scalar": (
        lambda theta: theta["w"].sum(),
        "`fn(theta)` must have shape (..., num_classes)",
    ),
    "several": (
        lambda theta: (theta["w"], theta["w"]),
        "`fn(theta)` must be one array, got tuple. Return the predictions alone.",
    ),
}


@pytest.mark.parametrize(
    ("fn", "message"), NO_PROBABILITIES.values(), ids=NO_PROBABILITIES
)
def test_uncertainty_is_of_probabilities(fn, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        predictive.uncertainty(fn, POSTERIOR, jax.random.key(0), num_samples=2)


def test_uncertainty_names_what_does_not_fit(key):
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        predictive.uncertainty(class_probabilities, POSTERIOR, key, num_samples=0)
    with pytest.raises(TypeError, match="`posterior` must be a posterior, got dict"):
        predictive.uncertainty(class_probabilities, POSTERIOR.mean, key)


def affine(theta, x):
    return x @ theta["w"] + theta["b"][None]


def network(theta, x):
    return jnp.tanh(affine(theta, x)) @ theta["v"]


def problem(seed, n=9):
    """A posterior for both models and inputs, in double precision."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 4)}
    mean = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    precision = {name: jnp.asarray(rng.uniform(1, 9, s)) for name, s in shapes.items()}
    return ivon_jax.Posterior(mean, precision), jnp.asarray(rng.normal(size=(n, 2)))


linearized = jax.jit(predictive.linearized, static_argnames=("fn", "chunk_size"))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("x64")
def test_a_linear_model_has_its_exact_predictive(seed):
    """The c-th output has variance sum_d x_d^2 s_dc^2 + s_c^2; outputs are apart."""
    q, x = problem(seed)
    result = linearized(affine, q, x)
    variance = jax.tree.map(np.asarray, q.variance)
    variances = np.asarray(x) ** 2 @ variance["w"] + variance["b"]
    expected = predictive.Linearized(
        affine(q.mean, x), np.stack([np.diag(v) for v in variances])
    )
    chex.assert_trees_all_close(result, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("chunk_size", [1, 4, 9, 100])
@pytest.mark.usefixtures("x64")
def test_the_covariance_of_a_network_is_that_of_its_jacobian(chunk_size):
    """In any chunks; with a point mass."""
    q, x = problem(0)
    q = q._replace(precision=q.precision | {"b": None})
    result = linearized(network, q, x, chunk_size=chunk_size)
    jacobian = jax.jacobian(network)(q.mean, x)
    expected = sum(
        np.einsum(
            "icp,p,idp->icd",
            np.reshape(jacobian[name], (9, 4, -1)),
            np.ravel(q.variance[name]),
            np.reshape(jacobian[name], (9, 4, -1)),
        )
        for name in ("w", "v")
    )
    np.testing.assert_allclose(result.covariance, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(result.mean, network(q.mean, x), rtol=1e-13)


@pytest.mark.statistical
def test_predictions_of_a_linear_model_have_the_moments_of_samples(key):
    """To five standard errors, of products for the covariance."""
    q, x = jax.tree.map(lambda x: x.astype(jnp.float32), problem(0, n=1))
    result = linearized(affine, q, x)
    draws = jax.vmap(lambda theta: affine(theta, x))(q.sample(key, (20_000,)))
    assert_mean(draws, result.mean)
    errors = draws - result.mean[None]
    assert_mean(errors[..., :, None] * errors[..., None, :], result.covariance)


def test_without_variance_linearized_probabilities_are_the_softmax():
    logits = jnp.linspace(-3.0, 3.0, 12).reshape(4, 3)
    result = predictive.Linearized(logits, jnp.zeros((4, 3, 3))).probs()
    np.testing.assert_allclose(result, jax.nn.softmax(logits), rtol=1e-6)


def test_linearized_probabilities_divide_logits_by_their_own_uncertainty():
    """Of two classes with variances v, 0 and logits m, 0 it is MacKay's sigmoid."""
    mean, variance = 1.5, 4.0
    covariance = jnp.array([[[variance, 0.3], [0.3, 0.0]]])
    result = predictive.Linearized(jnp.array([[mean, 0.0]]), covariance).probs()
    expected = 1 / (1 + np.exp(-mean / np.sqrt(1 + np.pi * variance / 8)))
    np.testing.assert_allclose(result[0], [expected, 1 - expected], rtol=1e-6)


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("mean", [0.5, 2.0, 5.0])
def test_linearized_probabilities_are_near_those_of_gaussian_logits(mean, variance):
    """The sigmoid's approximation is known to be within 0.02, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    sigmoids = 1 / (1 + np.exp(-mean - np.sqrt(variance) * nodes))
    expected = weights @ sigmoids / weights.sum()
    covariance = jnp.array([[[variance, 0.0], [0.0, 0.0]]])
    result = predictive.Linearized(jnp.array([[mean, 0.0]]), covariance).probs()
    assert abs(result[0, 0] - expected) < 0.02


def test_no_jacobian_needs_memory():
    """It would be that of 50 x P for each example."""
    q, x = ivon_jax.Posterior(*jnp.ones((2, 400, 50))), jnp.ones((4, 400))

    def matmul(theta, x):
        return x @ theta

    def temporaries(chunk_size):
        run = linearized.lower(matmul, q, x, chunk_size=chunk_size)
        return temp_bytes(run)

    assert temporaries(1) < 3 * q.mean.nbytes
    assert temporaries(4) < 3 * 4 * q.mean.nbytes


def test_linearized_names_what_does_not_fit():
    q, x = problem(0)
    message = "`posterior` must be a Posterior, one Gaussian, got dict."
    with pytest.raises(TypeError, match=message):
        predictive.linearized(affine, q.mean, x)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        predictive.linearized(affine, q, x, chunk_size=0)
    message = "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples"
    with pytest.raises(ValueError, match=re.escape(message)):
        predictive.linearized(lambda theta, x: affine(theta, x).sum(), q, x)
    with pytest.raises(ValueError, match="`x` must have one or more examples"):
        predictive.linearized(affine, q, jnp.ones(()))
    with pytest.raises(ValueError, match=r"at x\[0\]. Pass arrays, not lists."):
        predictive.linearized(affine, q, [1.0, 2.0])


def test_the_derivative_of_entropy_is_finite_where_a_probability_is_zero():
    """That of p log p is infinite at 0; there it is left out."""
    q = ivon_jax.Posterior(jnp.zeros(()), jnp.ones(()))

    def total(shift):
        probs = jnp.stack([shift, 1 - shift, jnp.zeros(())])
        return ivon_jax.uncertainty(lambda _: probs, q, jax.random.key(0), 2).total

    np.testing.assert_allclose(jax.grad(total)(0.2), np.log(0.8 / 0.2), rtol=1e-5)


def test_one_logit_is_the_sigmoids():
    """MacKay's approximation, where a softmax over one class would be one."""
    mean, variance = np.array([[2.0], [-1.0]]), np.array([3.0, 0.5])
    outputs = predictive.Linearized(
        jnp.asarray(mean), jnp.asarray(variance)[:, None, None]
    )
    scaled = mean[:, 0] / np.sqrt(1 + np.pi / 8 * variance)
    np.testing.assert_allclose(
        outputs.probs()[:, 0], 1 / (1 + np.exp(-scaled)), rtol=1e-6
    )


def mean_and_variance(theta):
    """Of six targets, with a mean far from zero."""
    return 1e3 + theta["w"].ravel(), jnp.exp(theta["w"].ravel())


def test_moments_are_those_of_the_mixture_of_gaussians(key):
    """The law of total variance in double precision; a mean of 1,000 cancels not."""
    moments = predictive.predict_moments(mean_and_variance, POSTERIOR, key, 7)
    draws = [mean_and_variance(POSTERIOR.sample(k)) for k in jax.random.split(key, 7)]
    means, variances = (np.float64(x) for x in zip(*draws, strict=True))
    np.testing.assert_allclose(moments.mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.aleatoric, variances.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.epistemic, means.var(0), rtol=1e-3)
    expected = variances.mean(0) + means.var(0)
    np.testing.assert_allclose(moments.variance, expected, rtol=1e-3)


def test_moments_of_a_mixture_have_the_disagreement_of_its_members(key):
    """Two points: half their distance, squared."""
    low, high = (ivon_jax.Posterior(jnp.float32([x]), None) for x in (1.0, 4.0))
    moments = predictive.predict_moments(
        lambda theta, noise: (theta, noise),
        *(ivon_jax.Mixture([low, high]), key, 4, (jnp.float32(0.5),)),
    )
    assert [float(x[0]) for x in moments] == [2.5, 2.75, 0.5, 2.25]


def test_a_point_has_no_epistemic_variance(key):
    point = POSTERIOR._replace(precision={"w": None})
    moments = predictive.predict_moments(mean_and_variance, point, key, 3)
    np.testing.assert_array_equal(moments.epistemic, 0)
    np.testing.assert_array_equal(moments.variance, moments.aleatoric)


@pytest.mark.parametrize("level", [0.5, 0.95, 1 - 1e-9])
def test_intervals_are_the_central_ones_of_a_gaussian(level):
    moments = predictive.Moments(*jnp.float32([[1.0], [4.0], [3.0], [1.0]]))
    expected = stats.norm.interval(level, 1.0, 2.0)
    np.testing.assert_allclose(np.ravel(moments.interval(level)), expected, rtol=1e-5)


NO_MOMENTS = {
    "a mean": (lambda t: t["w"], "`fn(theta)` must be a pair, (mean, variance) of the"),
    "three": (lambda t: (t["w"],) * 3, "`fn(theta)` must be a pair, (mean, variance)"),
    "other shapes": (
        lambda t: (t["w"], t["w"][0]),
        "`fn(theta)` must have a variance for each mean, or one for all, got shapes",
    ),
    "booleans": (
        lambda t: (t["w"] > 0, t["w"]),
        "`fn(theta)` must be real numbers, got dtype bool.",
    ),
}


@pytest.mark.parametrize(("fn", "message"), NO_MOMENTS.values(), ids=NO_MOMENTS)
def test_moments_are_of_means_and_variances(fn, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        predictive.predict_moments(fn, POSTERIOR, jax.random.key(0), 2)


def test_moments_name_what_does_not_fit(key):
    with pytest.raises(TypeError, match="`posterior` must be a posterior, got dict"):
        predictive.predict_moments(mean_and_variance, POSTERIOR.mean, key)
    with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\), got 95"):
        predictive.Moments(*jnp.ones((4, 1))).interval(95)
