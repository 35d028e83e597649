"""An estimate goes through any transformation as two things, or is an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ivon_jax

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda p: 3.0 * jnp.cos(p), PARAMS)
HESS = jax.tree.map(lambda p: 0.5 + p, PARAMS)
ESTIMATE = ivon_jax.Estimate(GRADS, HESS)
TX = ivon_jax.ivon(0.1, ess=50, b2=0.9)
ONE = {"w": True, "b": False}
pytestmark = pytest.mark.usefixtures("standard_promotion")

WRAPPERS = {
    "bare": TX,
    "chain": optax.chain(optax.clip_by_global_norm(1.0), TX, optax.scale(0.5)),
    "masked": optax.masked(TX, ONE),
    "partition": optax.partition(
        {"ivon": TX, "adam": optax.adam(0.1)}, {"w": "ivon", "b": "adam"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(ivon_jax.ivon)(0.1, ess=50.0),
    "if_finite": optax.apply_if_finite(TX, 2),
}
on_both_sides = pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


def assert_trees_close(actual, expected, rtol=1e-6):
    pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS)
def test_its_update_passes_the_halves_on_apart(tx):
    expected = tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=HESS)
    assert_trees_close(ESTIMATE.update(tx, tx.init(PARAMS), PARAMS), expected)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(ADAPTER(tx))])
def test_multi_steps_averages_gradients_and_takes_the_last_hessian(wrap):
    """As the documentation says; also in a chain, once it is wrapped as told."""
    tx = wrap(optax.MultiSteps(TX, 2))
    opt_state = tx.init(PARAMS)
    first = ivon_jax.Estimate(jax.tree.map(jnp.zeros_like, GRADS), PARAMS)
    _, opt_state = first.update(tx, opt_state, PARAMS)
    updates, _ = ESTIMATE.update(tx, opt_state, PARAMS)
    half = jax.tree.map(lambda g: g / 2, GRADS)
    assert_trees_close(updates, TX.update(half, TX.init(PARAMS), PARAMS, hess=HESS)[0])


def ADAPTER(multi):
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)


def test_other_optimizers_take_the_gradient_alone():
    tx = optax.adam(0.1)
    expected = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_trees_close(ESTIMATE.update(tx, tx.init(PARAMS), PARAMS), expected)


def test_a_transformation_that_knows_gradients_alone_gets_these():
    params = jnp.zeros(2)
    tx = optax.GradientTransformation(
        lambda _: (), lambda updates, state, _=None: (updates, state)
    )
    estimate = ivon_jax.Estimate(jnp.ones(2), jnp.full(2, 3.0))
    updates, _ = estimate.update(tx, tx.init(params), params)
    np.testing.assert_array_equal(updates, np.ones(2))


def test_it_stands_for_gradients_where_nothing_is_before_ivon():
    expected = TX.update(GRADS, TX.init(PARAMS), PARAMS, hess=HESS)
    assert_trees_close(TX.update(ESTIMATE, TX.init(PARAMS), PARAMS), expected)


FOREIGN = {
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_a_large_norm": optax.clip_by_global_norm(1e6),
    "clip": optax.clip(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "scale": optax.scale(0.99),
    "centralize": optax.centralize(),
    "add_noise": optax.add_noise(0.01, 0.5, 0),
    "sign": optax.scale_by_sign(),
    "normalize": optax.normalize_by_update_norm(),
}


@on_both_sides
@pytest.mark.parametrize("before", FOREIGN.values(), ids=FOREIGN)
def test_what_takes_it_for_one_gradient_is_an_error(before, transform):
    """All NaN where values are unknown."""
    tx = optax.chain(before, TX)
    update = transform(tx.update)
    if transform is jax.jit:
        updates, _ = update(ESTIMATE, tx.init(PARAMS), PARAMS)
        assert all(jnp.all(jnp.isnan(u)) for u in jax.tree.leaves(updates))
        return
    message = "`estimate` must reach IVON as it was made, got one that was changed as"
    with pytest.raises(ValueError, match=re.escape(message)):
        update(ESTIMATE, tx.init(PARAMS), PARAMS)


def test_a_changed_estimate_cannot_be_used_later():
    scaled = jax.tree.map(lambda x: 0.5 * x, ESTIMATE)
    with pytest.raises(ValueError, match="must reach IVON as it was made"):
        scaled.update(TX, TX.init(PARAMS), PARAMS)
    again = ivon_jax.Estimate(scaled.grad, scaled.hess)
    again.update(TX, TX.init(PARAMS), PARAMS)


REFUSED = {
    "masked": WRAPPERS["masked"],
    "partition": WRAPPERS["partition"],
    "if_finite": WRAPPERS["if_finite"],
    "multi_steps": optax.MultiSteps(TX, 2),
    "adam": optax.adam(0.1),
}


@pytest.mark.parametrize("tx", REFUSED.values(), ids=REFUSED)
def test_errors_of_wrappers_name_the_verb(tx):
    """They are jax's, about trees, and show the type."""
    message = "`estimate.update(tx, opt_state, params)`"
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        tx.update(ESTIMATE, tx.init(PARAMS), PARAMS)


def test_two_names_and_two_parts():
    grad, hess = ESTIMATE
    assert (grad, hess) == (ESTIMATE.grad, ESTIMATE.hess) == (GRADS, HESS)
    assert "overwritten" not in ESTIMATE


def stacked(count):
    return [
        jax.tree.map(lambda x: jnp.stack([x + i for i in range(count)]), tree)
        for tree in (GRADS, HESS)
    ]


MEAN = ivon_jax.Estimate(
    *(jax.tree.map(lambda x: x.mean(0), tree) for tree in stacked(3))
)


def by_scan(estimates):
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), estimates)

    def add(total, x):
        return jax.tree.map(lambda t, x: t + x / 3, total, x), None

    return jax.lax.scan(add, zero, estimates)[0]


def by_pmean(estimates):
    mean = jax.vmap(lambda e: jax.lax.pmean(e, "i"), axis_name="i")(estimates)
    return jax.tree.map(lambda x: x[0], mean)


@on_both_sides
@pytest.mark.parametrize("average", [by_scan, by_pmean])
def test_averages_of_estimates_are_estimates(average, transform):
    mean = transform(average)(ivon_jax.Estimate(*stacked(3)))
    opt_state = TX.init(PARAMS)
    expected = MEAN.update(TX, opt_state, PARAMS)
    assert_trees_close(mean.update(TX, opt_state, PARAMS), expected, 1e-5)


@pytest.mark.parametrize("axes", [0, ivon_jax.Estimate(0, 0)])
def test_stacks_of_estimates_are_mapped(axes):
    """Made of stacked arrays, by one axis or an estimate of two."""
    grads, hess = stacked(3)
    update = jax.vmap(lambda e: e.update(TX, TX.init(PARAMS), PARAMS), in_axes=(axes,))
    updates, _ = update(ivon_jax.Estimate(grads, hess))
    expected, _ = ESTIMATE.update(TX, TX.init(PARAMS), PARAMS)
    assert_trees_close(jax.tree.map(lambda u: u[0], updates), expected)


def test_what_is_no_transformation_is_named():
    message = "`tx` must be an optax transformation, got tuple. Call `estimate.update("
    with pytest.raises(TypeError, match=re.escape(message)):
        ESTIMATE.update(TX.init(PARAMS), TX, PARAMS)


def test_a_lost_sample_names_what_may_have_lost_it():
    """`optax.chain` drops what `MultiSteps` would have understood."""
    tx = optax.chain(optax.MultiSteps(TX, 2))
    theta = ivon_jax.sample(jax.random.key(0), PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="got none") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, sample=theta)
    for remedy in (
        "`optax.GradientTransformationExtraArgs(multi.init, multi.update)`",
        "`ivon_jax.flax.TrainState`",
        "`ivon_jax.sampled`",
    ):
        assert remedy in str(error.value)
