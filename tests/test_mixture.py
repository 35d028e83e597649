"""Several Gaussians as one posterior."""

import re

import chex
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


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_members_may_have_dtypes_of_their_own(dtypes, key):
    """They are what they would be in float32, and so are the samples."""
    members = [
        q._replace(mean=q.mean.astype(dtype))
        for q, dtype in zip(MEMBERS, dtypes, strict=False)
    ]
    wide = [q._replace(mean=q.mean.astype(jnp.float32)) for q in members]
    x = jnp.float32([0.2, 0.7])
    mixtures = ivon_jax.Mixture(members), ivon_jax.Mixture(wide)
    for read in (lambda q: q.log_prob(x), lambda q: q.sample(key, (3,))):
        actual, expected = map(read, mixtures)
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.statistical
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


@pytest.mark.statistical
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


AMBIGUOUS = {
    "one vector": ivon_jax.Posterior(jnp.ones(2), jnp.ones(2)),
    "a layer": ivon_jax.Posterior(
        {"w": jnp.ones((3, 2)), "b": jnp.ones(3)},
        {"w": jnp.ones((3, 2)), "b": jnp.ones(3)},
    ),
    "a frozen vector": ivon_jax.Posterior(
        {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, {"w": jnp.ones((3, 2)), "b": None}
    ),
}


@pytest.mark.parametrize("q", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_one_posterior_is_not_read_as_members(q):
    message = "`posteriors` must be a list, got one Posterior that may be single or st"
    mixture = ivon_jax.Mixture(q)
    theta, key = q.mean, jax.random.key(0)
    calls = (
        lambda: mixture.num_members,
        lambda: mixture.member(0),
        lambda: mixture.sample(key),
        lambda: mixture.strata(key, 2),
        lambda: mixture.log_prob(theta),
        lambda: ivon_jax.predict(lambda t: t, mixture, key, 2),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    single = ivon_jax.Mixture([q])
    assert single.num_members == 1
    np.testing.assert_allclose(single.log_prob(theta), q.log_prob(theta), rtol=1e-6)
    stacked = ivon_jax.Mixture.from_stacked(q)
    assert stacked.num_members == len(jax.tree.leaves(q)[0])
    shapes = jax.tree.map(lambda x: x.shape[1:], theta)
    assert jax.tree.map(jnp.shape, stacked.sample(key)) == shapes


def test_members_are_counted_and_chosen_without_a_stack():
    """Their arrays are the very same, and abstract ones will do."""
    mixture = ivon_jax.Mixture(MEMBERS)
    assert mixture.num_members == 3
    for index in (1, np.int8(1), -2):
        assert mixture.member(index) is MEMBERS[1]
    assert "concatenate" not in str(jax.make_jaxpr(lambda m: m.num_members)(mixture))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_there_is_no_member_beyond_the_last(form):
    mixture = ivon_jax.Mixture(form)
    for bad in (3, 5, -4, jnp.int32(3), jnp.array([0, 7])):
        with pytest.raises(IndexError, match=r"`index` must be in -3\.\.2, got -?\d"):
            mixture.member(bad)
    for bad in (1.0, None, True, "1", jnp.float32(1)):
        with pytest.raises(TypeError, match="`index` must be an integer, got"):
            mixture.member(bad)
    traced = jax.jit(lambda i: mixture.member(i).mean)
    for bad in (3, 5, -4):
        assert np.all(np.isnan(traced(bad)))
    for good in (0, 2, -1, np.uint8(1)):
        np.testing.assert_array_equal(traced(good), MEANS[good])
        np.testing.assert_array_equal(mixture.member(good).mean, MEANS[good])
    two = mixture.member(jnp.array([2, -3]))
    np.testing.assert_array_equal(two.mean, MEANS[[2, 0]])


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
    mixture = ivon_jax.Mixture.from_stacked(together)
    assert mixture.num_members == 4
    for i, member_key in enumerate(keys):
        alone = jax.jit(train)(member_key)
        np.testing.assert_allclose(mixture.member(i).mean, alone.mean, rtol=1e-6)


def test_a_mixture_is_a_pytree_that_predicts_under_jit(key):
    mixture = ivon_jax.Mixture(MEMBERS)
    predict = jax.jit(lambda q, k: ivon_jax.predict(lambda x: x, q, k, 9))
    expected = ivon_jax.predict(lambda x: x, mixture, key, 9)
    np.testing.assert_allclose(predict(mixture, key), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint32, jnp.bfloat16])
def test_point_masses_may_be_of_any_dtype(dtype, key):
    mean = {"w": jnp.zeros(2), "fixed": jnp.asarray([True, False]).astype(dtype)}
    q = ivon_jax.Posterior(mean, {"w": jnp.ones(2), "fixed": None})
    mixture = ivon_jax.Mixture([q, q])
    for drawn in (mixture.sample(key), mixture.member(jnp.asarray(1)).mean):
        assert drawn["fixed"].dtype == dtype
        np.testing.assert_array_equal(drawn["fixed"], mean["fixed"])


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


@pytest.mark.parametrize(
    "mixture",
    [
        ivon_jax.Mixture(MEMBERS),
        ivon_jax.Mixture(STACKED),
        ivon_jax.Mixture.from_stacked(STACKED),
    ],
    ids=["list", "stacked", "marked"],
)
def test_a_temperature_is_that_of_every_member(mixture):
    """And the mixture stays of the form that it had."""
    tempered = mixture.tempered(4.0)
    assert jax.tree.structure(tempered) == jax.tree.structure(mixture)
    for i, member in enumerate(MEMBERS):
        chex.assert_trees_all_close(tempered.member(i), member.tempered(4.0), rtol=1e-6)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray, np.int8, np.uint16])
def test_an_index_may_be_an_integer_of_any_kind(of):
    mixture = ivon_jax.Mixture(MEMBERS)
    for each in (mixture, ivon_jax.Mixture.from_stacked(mixture.stacked)):
        np.testing.assert_array_equal(each.member(of(1)).mean, MEMBERS[1].mean)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_several_indices_give_several_members(of):
    last = len(MEMBERS) - 1
    chosen = ivon_jax.Mixture(MEMBERS).member(of([last, -last - 1, 1]))
    expected = np.stack([MEMBERS[i].mean for i in (last, 0, 1)])
    np.testing.assert_array_equal(chosen.mean, expected)
