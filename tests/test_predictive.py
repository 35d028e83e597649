"""Averages over the posterior: right, lean, and of any pytree."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statistical import assert_mean

import ivon_jax

POSTERIOR = ivon_jax.Posterior(
    mean={"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)},
    precision={"w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)},
)


def outputs(theta):
    """A pytree of several shapes and dtypes."""
    return {
        "mean": theta["w"],
        "positive": theta["w"] > 0,
        "pair": (theta["w"].sum(), theta["w"].astype(jnp.bfloat16)),
    }


def test_predict_is_the_mean_over_its_keys_samples(key):
    result = ivon_jax.predict(outputs, POSTERIOR, key, num_samples=7)
    draws = [outputs(POSTERIOR.sample(k)) for k in jax.random.split(key, 7)]
    expected = jax.tree.map(
        lambda *xs: jnp.mean(jnp.stack([x.astype(jnp.float32) for x in xs]), 0), *draws
    )
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}


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
        return run.lower(key).compile().memory_analysis().temp_size_in_bytes

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
