"""A Gaussian prior of its own: around other weights, or yesterday's posterior."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from statistical import assert_at_most

import ivon_jax

ESS, NOISE = 40, 0.5
# Columns are orthogonal in the whole and in each half: then the exact posterior is
# diagonal, and a diagonal one loses nothing between the halves.
DESIGN = np.kron(np.array([[1, 1], [1, -1]] * (ESS // 4)), np.array([[1.0], [1.0]]))
DESIGN = DESIGN * np.array([1.0, 0.3])
TARGETS = DESIGN @ np.array([1.0, -2.0]) + NOISE * np.random.default_rng(0).normal(
    size=ESS
)


def exact(design, targets, mean, precision):
    """Mean and precision of Bayesian linear regression with a diagonal Hessian."""
    hess = (design**2).sum(0) / NOISE**2
    linear = precision * mean + design.T @ targets / NOISE**2
    return linear / (precision + hess), precision + hess


def fit(design, targets, prior, steps=400):
    """Train on the full batch with its exact Hessian diagonal, without noise."""
    x, y = jnp.asarray(design), jnp.asarray(targets)

    def loss_fn(w):
        return 0.5 * jnp.mean((x @ w - y) ** 2) / NOISE**2

    hess = jnp.mean(x**2, axis=0) / NOISE**2
    tx = ivon_jax.ivon(
        1.0, ess=len(y), b1=0.0, b2=0.5, hess_init=0.1, prior=prior, rescale_lr=False
    )
    params = prior.mean
    opt_state = tx.init(params)

    def step(carry, _):
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, hess=hess)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), length=steps)
    return ivon_jax.posterior(params, opt_state)


@pytest.mark.usefixtures("x64")
def test_two_halves_one_after_the_other_are_the_fit_on_the_whole():
    """Sequential Bayes: the posterior of the first half is the prior of the second."""
    half = ESS // 2
    prior = ivon_jax.Posterior.isotropic(jnp.array([0.5, 0.5]), 2.0)
    yesterday = fit(DESIGN[:half], TARGETS[:half], prior)
    today = fit(DESIGN[half:], TARGETS[half:], yesterday)
    whole = fit(DESIGN, TARGETS, prior)
    mean, precision = exact(DESIGN, TARGETS, np.array([0.5, 0.5]), 2.0)
    for q in (today, whole):
        np.testing.assert_allclose(q.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(q.precision, precision, rtol=1e-12)


@pytest.mark.statistical
def test_sampled_training_goes_on_where_yesterday_stopped(key):
    """The mean to a third of the posterior's stddev, the precision to a fifth."""
    half, steps = ESS // 2, 3000
    mean, precision = exact(DESIGN[:half], TARGETS[:half], np.zeros(2), 2.0)
    prior = ivon_jax.Posterior(jnp.float32(mean), jnp.float32(precision))
    x, y = jnp.float32(DESIGN[half:]), jnp.float32(TARGETS[half:])
    tx = ivon_jax.ivon(0.05, ess=half, b2=0.999, hess_init=1.0, prior=prior)
    grad_fn = ivon_jax.value_and_grad(
        lambda w: 0.5 * jnp.mean((x @ w - y) ** 2) / NOISE**2
    )

    def step(carry, step_key):
        params, opt_state = carry
        _, estimate = grad_fn(step_key, params, opt_state)
        updates, opt_state = tx.update(estimate, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    carry = prior.mean, tx.init(prior.mean)
    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    q = ivon_jax.posterior(*carry)
    mean, precision = exact(DESIGN, TARGETS, np.zeros(2), 2.0)
    assert_at_most(np.abs(q.mean - mean), precision**-0.5 / 3)
    np.testing.assert_allclose(q.precision, precision, rtol=0.2)


@pytest.mark.usefixtures("x64")
def test_every_step_follows_the_rules_with_the_prior_in_them():
    """Lines 4 to 8 in NumPy: delta is s_0 / ess, and m the distance from m_0."""
    rng = np.random.default_rng(0)
    m0, s0 = rng.normal(size=5), rng.uniform(1, 9, size=5)
    prior = ivon_jax.Posterior(jnp.asarray(m0), jnp.asarray(s0))
    settings = {"ess": 50, "hess_init": 0.7, "b2": 0.9, "rescale_lr": True}
    tx = ivon_jax.ivon(0.1, prior=prior, clip_radius=0.5, **settings)
    params = jnp.asarray(rng.normal(size=5))
    opt_state = tx.init(params)
    m, h, g = np.array(params), np.full(5, 0.7), np.zeros(5)
    for t in range(1, 30):
        sigma = 1 / np.sqrt(50 * h + s0)
        np.testing.assert_allclose(
            ivon_jax.posterior(params, opt_state).stddev, sigma, rtol=1e-12
        )
        theta = m + sigma * rng.normal(size=5)
        grad = np.sin(theta) + theta
        updates, opt_state = tx.update(
            jnp.asarray(grad), opt_state, params, sample=jnp.asarray(theta)
        )
        params = optax.apply_updates(params, updates)
        h_hat = grad * (theta - m) / sigma**2
        g = 0.9 * g + 0.1 * grad
        h = 0.9 * h + 0.1 * h_hat + 0.5 * 0.01 * (h - h_hat) ** 2 / (h + s0 / 50)
        direction = (g / (1 - 0.9**t) + s0 / 50 * (m - m0)) / (h + s0 / 50)
        m = m - 0.1 * 0.7 * np.clip(direction, -0.5, 0.5)
        np.testing.assert_allclose(params, m, rtol=1e-10)


def test_an_isotropic_prior_around_zero_is_weight_decay(key):
    params = {"w": jax.random.normal(key, (3, 2)), "b": jnp.ones(2)}
    prior = ivon_jax.Posterior.isotropic(optax.tree.zeros_like(params), 100 * 0.25)
    kwargs = dict(ess=100, hess_init=0.5, rescale_lr=False)
    results = []
    for tx in (
        ivon_jax.ivon(0.1, weight_decay=0.25, **kwargs),
        ivon_jax.ivon(0.1, prior=prior, **kwargs),
    ):
        opt_state = tx.init(params)
        theta = ivon_jax.sample(key, params, opt_state)
        updates, opt_state = tx.update(params, opt_state, params, sample=theta)
        results.append((updates, ivon_jax.posterior(params, opt_state)))
        np.testing.assert_allclose(
            ivon_jax.prior(params, opt_state).precision["b"], 25.0, rtol=1e-6
        )
    leaves = zip(*map(jax.tree.leaves, results), strict=True)
    for expected, actual in leaves:
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"ivon": tx, "adam": optax.adam(0.1)}, {"w": "ivon", "b": "adam"}
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_prior_over_all_parameters_fits_where_some_are_masked(wrap):
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    prior = ivon_jax.Posterior.isotropic(params, 2.0)
    tx = wrap(ivon_jax.ivon(0.1, ess=10, hess_init=1.0, prior=prior))
    opt_state = tx.init(params)
    theta = ivon_jax.sample(jax.random.key(0), params, opt_state)
    update = jax.jit(tx.update)
    _, opt_state = update(params, opt_state, params, sample=theta)
    found = ivon_jax.prior(params, opt_state)
    np.testing.assert_array_equal(found.mean["w"], 1.0)
    np.testing.assert_array_equal(found.precision["w"], 2.0)
    assert found.precision["b"] is None


def test_a_prior_over_all_parameters_fits_where_whole_trees_are_masked():
    """As by `optax.masked` with one boolean for a layer."""
    params = {"body": {"w": jnp.ones(3), "b": jnp.ones(3)}, "head": jnp.ones(2)}
    prior = ivon_jax.Posterior.isotropic(params, 2.0)
    tx = ivon_jax.ivon(0.1, ess=10, prior=prior)
    tx = optax.masked(tx, {"body": False, "head": True})
    found = ivon_jax.prior(params, tx.init(params))
    np.testing.assert_array_equal(found.mean["head"], 1.0)
    np.testing.assert_array_equal(found.precision["head"], 2.0)
    assert found.precision["body"] == {"w": None, "b": None}


@pytest.mark.usefixtures("standard_promotion")
def test_tempering_by_inject_hyperparams_leaves_the_prior_alone():
    """At another ess the likelihood counts more, the prior as before."""
    params = jnp.ones(3)
    prior = ivon_jax.Posterior.isotropic(params, 2.0)
    tx = optax.inject_hyperparams(ivon_jax.ivon)(0.1, ess=10.0, prior=prior)
    opt_state = tx.init(params)
    opt_state.hyperparams["ess"] = jnp.float32(100.0)
    _, opt_state = tx.update(params, opt_state, params, hess=jnp.ones(3))
    q = ivon_jax.posterior(params, opt_state)
    np.testing.assert_allclose(q.precision, 102.0, rtol=1e-6)


def test_the_state_keeps_a_copy_so_that_it_can_be_donated():
    """Also where training starts at the prior's own mean."""
    prior = ivon_jax.Posterior(jnp.ones(3), jnp.ones(3))
    tx = ivon_jax.ivon(0.1, ess=10, prior=prior)

    def step(params, opt_state):
        updates, opt_state = tx.update(params, opt_state, params, hess=params)
        return optax.apply_updates(params, updates), opt_state

    params = jnp.copy(prior.mean)
    jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    np.testing.assert_array_equal(prior.mean, 1.0)
    np.testing.assert_array_equal(prior.precision, 1.0)


def test_the_prior_in_the_state_is_as_wide_as_the_hessian():
    params = jnp.ones(3, jnp.bfloat16)
    prior = ivon_jax.Posterior.isotropic(params, 2.0)
    [state] = ivon_jax.find_states(ivon_jax.ivon(0.1, ess=10, prior=prior).init(params))
    assert state.prior.mean.dtype == state.prior.precision.dtype == jnp.float32


PARAMS = {"w": jnp.ones(2)}
PRIOR = ivon_jax.Posterior({"w": jnp.ones(2)}, {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (PARAMS, TypeError, "`prior` must be a Posterior, got dict."),
        (
            PRIOR._replace(precision={"w": None}),
            ValueError,
            "trains, got None at prior.precision['w']",
        ),
        (
            PRIOR._replace(precision={"w": -jnp.ones(2)}),
            ValueError,
            "`prior.precision['w']` must be non-negative and finite, got -1.0 to -1.0",
        ),
        (
            PRIOR._replace(mean={"w": jnp.ones(3)}),
            ValueError,
            "`prior.mean` must have the shapes of `params`, got (3,)",
        ),
        (
            PRIOR._replace(precision={"v": jnp.ones(2)}),
            ValueError,
            "`prior.precision` must have the tree structure of `params`",
        ),
    ],
)
def test_a_prior_that_does_not_fit_is_an_error(prior, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ivon_jax.ivon(0.1, ess=10, prior=prior).init(PARAMS)


def test_two_priors_are_an_error():
    message = "`weight_decay` must be left out where `prior` is given, got 0.1."
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.ivon(0.1, ess=10, prior=PRIOR, weight_decay=0.1)


@pytest.mark.parametrize(("made", "now"), [(None, PRIOR), (PRIOR, None)])
def test_a_prior_that_the_state_has_not_is_an_error(made, now):
    """And one that `ivon` has not: neither is used in silence."""
    made, now = (ivon_jax.ivon(0.1, ess=10, prior=prior) for prior in (made, now))
    message = "`prior` must be what the state was made with: it was made with"
    with pytest.raises(ValueError, match=re.escape(message)):
        now.update(PARAMS, made.init(PARAMS), PARAMS, hess=PARAMS)


@pytest.mark.parametrize("wrap", [lambda tx: tx, *WRAPPERS.values()])
def test_optax_tells_the_prior_from_scalars(wrap):
    """`optax.tree.map_params` maps what is like params; `init` has a placeholder."""
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    prior = ivon_jax.Posterior.isotropic(params, 2.0)
    tx = wrap(ivon_jax.ivon(0.1, ess=10, prior=prior))
    mapped = optax.tree.map_params(
        tx, lambda _: "param", tx.init(params), transform_non_params=lambda _: "other"
    )
    [state] = ivon_jax.find_states(mapped)
    assert set(jax.tree.leaves((state.hess, state.prior))) == {"param"}
    assert (state.count, state.ess, state.weight_decay) == ("other",) * 3


def test_parameters_may_be_numbers(key):
    """They take the step that arrays do."""
    numbers = {"a": 0.5, "b": jnp.ones(2)}
    tx = ivon_jax.ivon(0.1, ess=10, prior=ivon_jax.Posterior.isotropic(numbers, 2.0))

    def step(params):
        opt_state = tx.init(params)
        theta = ivon_jax.sample(key, params, opt_state)
        updates, _ = tx.update(theta, opt_state, params, sample=theta)
        return updates

    chex.assert_trees_all_close(step(numbers), step(jax.tree.map(jnp.asarray, numbers)))
