"""The Gaussian: its moments, its densities, and finding it wherever IVON sits."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from statistical import assert_mean, assert_moved

import ivon_jax

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3), "scale": jnp.ones(())}
DRAWS = 10_000


def trained_state(tx, params):
    """A state with Hessians that differ from entry to entry."""
    hess = jax.tree.map(lambda p: 1.0 + jnp.abs(p), params)
    return tx.update(params, tx.init(params), params, hess=hess)[1]


def test_sigma_is_line_8_of_the_algorithm():
    """sigma = 1 / sqrt(ess (h + weight_decay)), and precision, variance go with it."""
    tx = ivon_jax.ivon(0.1, ess=50, weight_decay=0.3, b2=0.5)
    opt_state = trained_state(tx, PARAMS)
    q = ivon_jax.posterior(PARAMS, opt_state)
    [state] = ivon_jax.find_states(opt_state)
    for name, h in state.hess.items():
        precision = 50 * (np.asarray(h, np.float64) + 0.3)
        np.testing.assert_allclose(q.precision[name], precision, rtol=1e-6)
        np.testing.assert_allclose(q.variance[name], 1 / precision, rtol=1e-6)
        np.testing.assert_allclose(q.stddev[name], precision**-0.5, rtol=1e-6)


@pytest.mark.statistical
def test_perturbation_has_the_moments_of_the_posterior(key):
    """Mean 0, variance sigma^2, fourth moment 3 sigma^4, entry by entry."""
    opt_state = trained_state(ivon_jax.ivon(0.1, ess=50, b2=0.5), PARAMS)
    q = ivon_jax.posterior(PARAMS, opt_state)
    draw = jax.jit(jax.vmap(lambda k: ivon_jax.sample(k, PARAMS, opt_state)))
    theta = draw(jax.random.split(key, DRAWS))
    for name, mean in PARAMS.items():
        noise = (theta[name] - mean[None]) / q.stddev[name][None]
        assert_mean(noise, 0.0)
        assert_mean(noise**2, 1.0)
        assert_mean(noise**4, 3.0)


@pytest.mark.statistical
def test_every_entry_of_every_leaf_has_its_own_noise(key):
    """All products of two entries average to zero, leaves of equal shape included."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    opt_state = ivon_jax.ivon(0.1, ess=1, weight_decay=0.0).init(params)
    q = ivon_jax.posterior(params, opt_state)
    noise = jnp.concatenate(list(q.sample(key, (DRAWS,)).values()), axis=1)
    products = noise[:, :, None] * noise[:, None, :]
    off_diagonal = ~np.eye(6, dtype=bool)
    assert_mean(products[:, off_diagonal], 0.0)


@pytest.mark.statistical
def test_same_key_same_theta_other_key_other_theta(key):
    opt_state = ivon_jax.ivon(0.1, ess=50).init(PARAMS)
    theta = ivon_jax.sample(key, PARAMS, opt_state)
    chex.assert_trees_all_equal(theta, ivon_jax.sample(key, PARAMS, opt_state))
    other = ivon_jax.sample(jax.random.fold_in(key, 1), PARAMS, opt_state)
    assert_moved(other, theta)


def test_theta_is_the_same_under_jit_to_rounding(key):
    opt_state = ivon_jax.ivon(0.1, ess=50).init(PARAMS)
    eager = ivon_jax.sample(key, PARAMS, opt_state)
    jitted = jax.jit(ivon_jax.sample)(key, PARAMS, opt_state)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-6)


def test_sample_with_a_shape_stacks_draws_of_split_keys(key):
    q = ivon_jax.posterior(PARAMS, ivon_jax.ivon(0.1, ess=50).init(PARAMS))
    many = q.sample(key, (2, 3))
    chex.assert_tree_shape_prefix(many, (2, 3))
    one = q.sample(jax.random.split(key, (2, 3))[1, 2])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1, 2], many), one, rtol=1e-6)


def test_legacy_keys_are_keys():
    """`jax.random.PRNGKey` gives the same draw as the typed key of the same seed."""
    opt_state = ivon_jax.ivon(0.1, ess=50).init(PARAMS)
    legacy = ivon_jax.sample(jax.random.PRNGKey(7), PARAMS, opt_state)
    typed = ivon_jax.sample(jax.random.key(7), PARAMS, opt_state)
    chex.assert_trees_all_equal(legacy, typed)


def gaussian(seed, name):
    rng = np.random.default_rng(seed)
    mean, precision = rng.normal(size=(4, 2)), rng.gamma(2.0, size=(4, 2))
    return ivon_jax.Posterior({name: jnp.asarray(mean)}, {name: jnp.asarray(precision)})


def log_density(x, mean, precision):
    return np.sum(
        0.5 * np.log(precision / (2 * np.pi)) - precision * (x - mean) ** 2 / 2
    )


@pytest.mark.usefixtures("x64")
def test_densities_agree_with_the_written_out_formulas():
    q, p = gaussian(0, "w"), gaussian(1, "w")
    m, s, m0, s0 = (np.asarray(x["w"]) for x in (*q, *p))
    theta = np.linspace(-1, 1, 8).reshape(4, 2)
    np.testing.assert_allclose(
        q.log_prob({"w": jnp.asarray(theta)}), log_density(theta, m, s), rtol=1e-12
    )
    np.testing.assert_allclose(
        q.entropy(), np.sum(0.5 * np.log(2 * np.pi * np.e / s)), rtol=1e-12
    )
    kl = 0.5 * np.sum(s0 / s + s0 * (m - m0) ** 2 - 1 + np.log(s / s0))
    np.testing.assert_allclose(q.kl_divergence(p), kl, rtol=1e-12)
    np.testing.assert_allclose(q.kl_divergence(q), 0.0, atol=1e-12)


@pytest.mark.statistical
def test_entropy_and_divergence_are_the_means_of_log_densities(key):
    q, p = gaussian(0, "w"), gaussian(1, "w")
    theta = q.sample(key, (DRAWS,))
    log_q, log_p = jax.vmap(q.log_prob)(theta), jax.vmap(p.log_prob)(theta)
    assert_mean(-log_q, q.entropy())
    assert_mean(log_q - log_p, q.kl_divergence(p))


FIRST = {"w": True, "b": False, "scale": False}
GROUPS = {"w": "wide", "b": "narrow", "scale": "adam"}


def ivon(**kwargs):
    return ivon_jax.ivon(**{"learning_rate": 0.1, "ess": 50} | kwargs)


WRAPPERS = {
    "bare": ivon,
    "scale_by_ivon": lambda: ivon_jax.scale_by_ivon(ess=50),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), ivon()),
    "chain_in_chain": lambda: optax.chain(optax.chain(optax.identity(), ivon())),
    "inject_hyperparams": lambda: optax.inject_hyperparams(ivon_jax.ivon)(0.1, ess=50),
    "multi_steps": lambda: optax.MultiSteps(ivon(), every_k_schedule=2),
    "if_finite": lambda: optax.apply_if_finite(ivon(), max_consecutive_errors=3),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_posterior_is_found_inside(wrap, key):
    """And theta is the same in every wrapper."""
    theta = ivon_jax.sample(key, PARAMS, wrap().init(PARAMS))
    expected = ivon_jax.sample(key, PARAMS, ivon().init(PARAMS))
    chex.assert_trees_all_close(theta, expected, rtol=1e-6)


@pytest.mark.statistical
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_step_inside_moves_the_hessian(wrap, key):
    tx = wrap()
    params, opt_state = PARAMS, tx.init(PARAMS)
    theta = ivon_jax.sample(key, params, opt_state)
    for _ in range(2):
        _, opt_state = tx.update(theta, opt_state, params, sample=theta)
    [state] = ivon_jax.find_states(opt_state)
    assert_moved(state.hess, jax.tree.map(jnp.ones_like, PARAMS))


@pytest.mark.statistical
def test_masked_parameters_are_point_masses(key):
    tx = optax.masked(ivon(), FIRST)
    opt_state = tx.init(PARAMS)
    theta = ivon_jax.sample(key, PARAMS, opt_state)
    assert_moved(theta["w"], PARAMS["w"])
    assert theta["b"] is PARAMS["b"]
    q = ivon_jax.posterior(PARAMS, opt_state)
    assert q.precision["b"] is None
    np.testing.assert_array_equal(q.stddev["b"], np.zeros(3))
    np.testing.assert_array_equal(q.variance["scale"], 0.0)
    _, opt_state = tx.update(PARAMS, opt_state, PARAMS, sample=theta)


def test_point_masses_are_left_out_of_densities():
    """The densities are those of the rest alone."""
    q = gaussian(0, "w")
    mixed = ivon_jax.Posterior(q.mean | {"n": jnp.arange(3)}, q.precision | {"n": None})
    prior = ivon_jax.Posterior(mixed.mean, {"w": jnp.ones((4, 2)), "n": None})
    prior_alone = ivon_jax.Posterior(q.mean, {"w": jnp.ones((4, 2))})
    np.testing.assert_array_equal(mixed.log_prob(mixed.mean), q.log_prob(q.mean))
    np.testing.assert_array_equal(mixed.entropy(), q.entropy())
    np.testing.assert_array_equal(
        mixed.kl_divergence(prior), q.kl_divergence(prior_alone)
    )


@pytest.mark.statistical
def test_a_mask_may_be_a_prefix_of_the_parameters(key):
    """One False for a whole subtree, as optax allows."""
    params = {"head": jnp.ones(2), "body": {"a": jnp.ones(3), "b": [jnp.ones(1)]}}
    tx = optax.masked(ivon(), {"head": True, "body": False})
    theta = ivon_jax.sample(key, params, tx.init(params))
    assert_moved(theta["head"], params["head"])
    chex.assert_trees_all_equal(theta["body"], params["body"])


def test_frozen_integers_come_back_unchanged(key):
    params = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    tx = optax.masked(ivon(), {"w": True, "steps": False})
    theta = ivon_jax.sample(key, params, tx.init(params))
    assert theta["steps"] is params["steps"]


def partitioned():
    return optax.partition(
        {"wide": ivon(ess=50), "narrow": ivon(ess=5000), "adam": optax.adam(0.1)},
        GROUPS,
    )


@pytest.mark.statistical
@pytest.mark.usefixtures("standard_promotion")
def test_partition_makes_one_posterior_of_several_groups(key):
    """Each group with its own ess; what Adam trains is a point mass."""
    tx = partitioned()
    opt_state = tx.init(PARAMS)
    q = ivon_jax.posterior(PARAMS, opt_state)
    np.testing.assert_allclose(q.precision["w"], 50 * (1 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(q.precision["b"], 5000 * (1 + 1e-4), rtol=1e-6)
    assert q.precision["scale"] is None
    theta = ivon_jax.sample(key, PARAMS, opt_state)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = tx.update(grads, opt_state, PARAMS, sample=theta)
    for name in ("w", "b"):
        assert_moved(updates[name], jnp.zeros_like(PARAMS[name]))


@pytest.mark.usefixtures("standard_promotion")
def test_groups_train_as_they_would_alone(key):
    """A group's step sees its own parameters, gradients and samples, and no others'."""
    tx, alone = partitioned(), ivon(ess=5000)
    opt_state = tx.init(PARAMS)
    theta = ivon_jax.sample(key, PARAMS, opt_state)
    updates, _ = tx.update(PARAMS, opt_state, PARAMS, sample=theta)
    mean, b = {"b": PARAMS["b"]}, {"b": theta["b"]}
    expected, _ = alone.update(mean, alone.init(mean), mean, sample=b)
    chex.assert_trees_all_close(updates["b"], expected["b"], rtol=1e-6)


def test_hess_passes_through_a_mask():
    """The whole tree goes in, as with sample."""
    tx = optax.masked(ivon(b2=0.5), FIRST)
    hess = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    _, opt_state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hess=hess)
    [state] = ivon_jax.find_states(opt_state)
    assert jnp.all(state.hess["w"] > 1.5)


def test_the_posterior_is_a_pytree(key):
    """It goes through jit and vmap, and comes back the same type."""
    q = ivon_jax.posterior(PARAMS, ivon().init(PARAMS))
    doubled = jax.jit(lambda q: jax.tree.map(lambda x: 2 * x, q))(q)
    assert isinstance(doubled, ivon_jax.Posterior)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), q)
    theta = jax.vmap(lambda q, k: q.sample(k))(stacked, jax.random.split(key))
    chex.assert_tree_shape_prefix(theta, (2,))


def test_low_precision_samples_round_the_float32_sample(key):
    """The same key gives the same noise; only the last rounding differs."""
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    high = jax.tree.map(lambda p: p.astype(jnp.float32), low)
    theta = ivon_jax.sample(key, low, ivon().init(low))
    exact = ivon_jax.sample(key, high, ivon().init(high))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    chex.assert_trees_all_equal(theta, rounded)


def test_init_keeps_the_sharding_of_the_parameters():
    """On a one-device mesh; the sharding of each leaf is its parameter's."""
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    params = jax.device_put({"w": jnp.ones((4, 2))}, sharding)
    state = ivon_jax.scale_by_ivon(ess=50).init(params)
    assert state.hess["w"].sharding == sharding
    assert state.momentum["w"].sharding == sharding


def test_init_is_abstract(key):
    """`eval_shape` needs no arrays, and neither does sampling."""
    tx = ivon()
    shapes = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(PARAMS))
    theta = jax.eval_shape(ivon_jax.sample, key, PARAMS, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(theta, PARAMS)


@pytest.mark.parametrize(
    "call",
    [
        ivon_jax.mean,
        ivon_jax.posterior,
        ivon_jax.prior,
        lambda p, s: ivon_jax.sample(jax.random.key(0), p, s),
        lambda p, s: ivon_jax.value_and_grad(jnp.sum)(jax.random.key(0), p, s),
    ],
    ids=["mean", "posterior", "prior", "sample", "value_and_grad"],
)
def test_parameters_and_state_in_each_others_place_are_named(call):
    tx = optax.chain(optax.clip(1.0), ivon_jax.ivon(0.1, ess=10))
    params = jnp.ones(2)
    message = "`params` must be the parameters, got an optimizer state with the IVONS"
    with pytest.raises(ValueError, match=message):
        call(tx.init(params), params)
    call(params, tx.init(params))


@pytest.mark.parametrize(
    "find", [ivon_jax.posterior, lambda p, s: ivon_jax.sample(0, p, s)]
)
def test_no_ivon_in_the_state_says_what_to_pass(find):
    message = "`opt_state` must contain the state of `ivon_jax.ivon`"
    with pytest.raises(ValueError, match=re.escape(message)):
        find(PARAMS, optax.adam(0.1).init(PARAMS))


def test_two_owners_of_one_parameter_are_refused():
    opt_state = optax.chain(ivon(), ivon()).init(PARAMS)
    message = "`opt_state` must have one IVON state for each parameter, got 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.posterior(PARAMS, opt_state)


def test_params_of_another_tree_are_named():
    message = "`params` must have the tree structure of the optimizer's state, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.posterior({"v": jnp.ones(3)}, ivon().init(PARAMS))


def test_params_of_another_shape_are_named():
    message = "got (4,) at params['b'], where the optimizer's state has (3,)."
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.posterior(PARAMS | {"b": jnp.ones(4)}, ivon().init(PARAMS))


def test_a_batch_of_states_is_sent_to_vmap():
    """Its ess would broadcast along the wrong axis."""
    stacked = jax.vmap(lambda ess: ivon(ess=ess).init(PARAMS))(jnp.array([1.0, 9.0]))
    params = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    message = "`opt_state` must be one state, got a batch of shape (2,). Call under"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.posterior(params, stacked)


def test_densities_take_python_numbers():
    q = ivon_jax.Posterior({"w": 1.0}, {"w": jnp.float32(2 * np.pi)})
    np.testing.assert_allclose(q.log_prob({"w": 1.0}), 0.0, atol=1e-6)
    np.testing.assert_allclose(q.kl_divergence(q), 0.0, atol=1e-6)


def test_densities_name_a_tree_that_does_not_fit():
    q = gaussian(0, "w")
    message = "`theta` must have the tree structure of the posterior's mean, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        q.log_prob({"v": jnp.ones((4, 2))})
    with pytest.raises(
        ValueError, match=re.escape(message.replace("theta", "prior.mean"))
    ):
        q.kl_divergence(gaussian(0, "v"))


def test_a_prior_with_other_point_masses_is_refused():
    q = gaussian(0, "w")
    prior = ivon_jax.Posterior(q.mean, {"w": None})
    message = "`prior.precision` must be None where the posterior's is"
    with pytest.raises(ValueError, match=re.escape(message)):
        q.kl_divergence(prior)
