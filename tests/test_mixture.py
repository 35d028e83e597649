"""Several Gaussians as one posterior."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from scipy import stats
from statistical import assert_at_most, assert_mean

import ivon_jax

MEANS = np.array([[-3.0, 0.0], [0.0, 1.0], [5.0, 2.0]], np.float32)
STDDEVS = np.array([[1.0, 2.0], [0.5, 1.0], [0.1, 3.0]], np.float32)
MEMBERS = [
    ivon_jax.Posterior(jnp.asarray(m), jnp.asarray(s**-2.0))
    for m, s in zip(MEANS, STDDEVS, strict=True)
]
STACKED = ivon_jax.Posterior(jnp.asarray(MEANS), jnp.asarray(STDDEVS**-2.0))
FORMS = {"list": MEMBERS, "stacked": STACKED}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_density_is_the_mean_of_the_members_densities(form):
    x = np.array([0.2, 0.7])
    densities = stats.norm(MEANS, STDDEVS).pdf(x).prod(axis=1)
    actual = ivon_jax.Mixture(form).log_prob(jnp.float32(x))
    np.testing.assert_allclose(actual, np.log(densities.mean()), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_samples_have_the_moments_of_the_mixture(form, key):
    """Within five standard errors of 4,000 draws."""
    draws = np.asarray(ivon_jax.Mixture(form).sample(key, (4000,)))
    variance = (STDDEVS**2 + MEANS**2).mean(0) - MEANS.mean(0) ** 2
    error = np.sqrt(variance / 4000)
    assert_at_most(np.abs(draws.mean(0) - MEANS.mean(0)), 5 * error)
    fourth = np.mean((draws - MEANS.mean(0)) ** 4, axis=0)
    error = np.sqrt((fourth - variance**2) / 4000)
    assert_at_most(np.abs(draws.var(0) - variance), 5 * error)


def test_prediction_draws_as_often_from_each_member():
    """With narrow members the mean of 6 samples is that of the means, exactly."""
    narrow = STACKED._replace(precision=jnp.full((3, 2), 1e12))
    mean = ivon_jax.predict(
        lambda x: x, ivon_jax.Mixture(narrow), jax.random.key(0), num_samples=6
    )
    np.testing.assert_allclose(mean, MEANS.mean(0), atol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 4, 5])
def test_means_are_unbiased_where_the_samples_do_not_divide(num_samples, key):
    """Over 3,000 keys every member is drawn as often, to five standard errors."""
    mixture = ivon_jax.Mixture(STACKED)
    keys = jax.random.split(key, 3000)
    drawn = jax.vmap(lambda k: mixture.strata(k, num_samples))(keys)
    counts = np.stack([np.sum(drawn == i, axis=1) for i in range(3)], axis=1)
    assert np.all(counts >= num_samples // 3)
    assert np.all(counts <= -(-num_samples // 3))
    assert_mean(counts, num_samples / 3)


def test_members_train_as_one_vmapped_program(key):
    """To the bits of training them one after the other."""
    tx = ivon_jax.ivon(0.1, ess=10, hess_init=1.0)

    def train(key):
        params = jax.random.normal(key, (3,))
        opt_state = tx.init(params)
        theta = ivon_jax.sample(key, params, opt_state)
        updates, opt_state = tx.update(theta, opt_state, params, sample=theta)
        params = optax.apply_updates(params, updates)
        return ivon_jax.posterior(params, opt_state)

    keys = jax.random.split(key, 4)
    together = jax.jit(jax.vmap(train))(keys)
    mixture = ivon_jax.Mixture(together)
    assert mixture.num_members == 4
    for i, member_key in enumerate(keys):
        alone = jax.jit(train)(member_key)
        np.testing.assert_allclose(mixture.member(i).mean, alone.mean, rtol=1e-6)


def test_a_mixture_is_a_pytree_that_predicts_under_jit(key):
    mixture = ivon_jax.Mixture(MEMBERS)
    predict = jax.jit(lambda q, k: ivon_jax.predict(lambda x: x, q, k, 9))
    expected = ivon_jax.predict(lambda x: x, mixture, key, 9)
    np.testing.assert_allclose(predict(mixture, key), expected, rtol=1e-5, atol=1e-6)


def test_point_masses_differ_between_members():
    """Say, of a layer that each run trained with Adam."""
    q = ivon_jax.Posterior(
        {"w": jnp.zeros(2), "b": jnp.ones(2)}, {"w": None, "b": None}
    )
    other = q._replace(mean=jax.tree.map(lambda x: x + 2.0, q.mean))
    mean = ivon_jax.predict(
        lambda theta: theta["b"],
        ivon_jax.Mixture([q, other]),
        jax.random.key(0),
        num_samples=2,
    )
    np.testing.assert_array_equal(mean, 2.0)


@pytest.mark.parametrize(
    ("posteriors", "error", "message"),
    [
        ([], ValueError, "`posteriors` must have at least one member, got none."),
        ({}, TypeError, "`posteriors` must be a list of posteriors"),
        ([jnp.ones(2)], TypeError, "`posteriors[0]` must be a posterior, got"),
        (
            [MEMBERS[0], ivon_jax.Posterior(jnp.ones(3), jnp.ones(3))],
            ValueError,
            "`posteriors[1]` must have the shapes of `posteriors[0]`",
        ),
        (
            ivon_jax.Posterior({"a": jnp.ones(())}, {"a": jnp.ones(())}),
            ValueError,
            "`posteriors` must have one leading axis of members in every array",
        ),
    ],
)
def test_what_is_no_mixture_is_an_error(posteriors, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ivon_jax.Mixture(posteriors).sample(jax.random.key(0))


def test_a_mixture_read_back_from_msgpack_predicts():
    """Its arrays are NumPy's, which no traced index fits."""
    mixture = ivon_jax.Mixture(
        ivon_jax.Posterior(np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32))
    )
    mixture = serialization.from_bytes(mixture, serialization.to_bytes(mixture))
    theta = ivon_jax.predict(lambda theta: theta, mixture, jax.random.key(0), 6)
    assert theta.shape == (2,)
