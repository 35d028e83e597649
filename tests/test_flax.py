"""Flax linen and NNX: the same step as plain optax, and nothing else touched."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training import train_state
from statistical import assert_moved

import ivon_jax
import ivon_jax.flax

X = jax.random.normal(jax.random.key(7), (8, 4))
TX = ivon_jax.ivon(0.1, ess=50)
pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(3)(x)))


class NNX(nnx.Module):
    """Dropout and batch statistics beside the parameters, one layer used twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.tied = self.first
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.tied(self.first(x)))))


class Sequential(nn.Module):
    """Its layers are numbered in the order of `without_dropout`'s."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        return nn.Dense(1)(nn.tanh(x))


def linen_loss(params, x):
    return jnp.mean(Linen().apply({"params": params}, x) ** 2)


def linen_state(tx, cls=ivon_jax.flax.TrainState):
    params = Linen().init(jax.random.key(0), X)["params"]
    return cls.create(apply_fn=Linen().apply, params=params, tx=tx)


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


def nnx_model(tx=TX, wrt=nnx.Param):
    model = NNX(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def plain_step(tx, params, opt_state, theta, grads):
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


def test_linen_step_is_optaxs(key):
    state = linen_state(TX)
    theta = state.sample(key)
    grads = jax.grad(linen_loss)(theta, X)
    new_state = jax.jit(lambda s: s.apply_gradients(grads=grads, sample=theta))(state)
    expected = plain_step(TX, state.params, state.opt_state, theta, grads)
    chex.assert_trees_all_close(
        (new_state.params, new_state.opt_state), expected, rtol=1e-6
    )
    assert new_state.step == 1
    chex.assert_trees_all_equal(
        theta, ivon_jax.sample(key, state.params, state.opt_state)
    )


def test_linen_posterior_is_the_states(key):
    state = linen_state(TX)
    chex.assert_trees_all_equal(state.posterior().sample(key), state.sample(key))


def estimate_step(state, key):
    grad_fn = ivon_jax.value_and_grad(linen_loss, mc_samples=2)
    _, estimate = grad_fn(key, state.params, state.opt_state, X)
    return state.apply_gradients(grads=estimate)


def test_flaxs_own_train_state_takes_an_estimate(key):
    """A trainer that passes on gradients alone needs no change."""
    ours = estimate_step(linen_state(TX), key)
    unmodified = estimate_step(linen_state(TX, cls=train_state.TrainState), key)
    chex.assert_trees_all_equal(ours.params, unmodified.params)
    chex.assert_trees_all_equal(ours.opt_state, unmodified.opt_state)


@pytest.mark.statistical
def test_our_train_state_takes_an_estimate_within_any_wrapper(key):
    tx = optax.chain(
        optax.identity(), optax.masked(TX, {"Dense_0": True, "Dense_1": False})
    )
    state = linen_state(tx)
    new_state = estimate_step(state, key)
    assert_moved(new_state.params, state.params)


def test_our_train_state_trains_the_baseline_too():
    """Without IVON it is Flax's."""
    grads = jax.tree.map(jnp.ones_like, linen_state(optax.adam(0.1)).params)
    results = [
        linen_state(optax.adam(0.1), cls).apply_gradients(grads=grads).params
        for cls in (ivon_jax.flax.TrainState, train_state.TrainState)
    ]
    chex.assert_trees_all_equal(*results)


def test_other_fields_are_replaced_as_in_flax(key):
    state = linen_state(TX)
    theta = state.sample(key)
    new_state = state.apply_gradients(grads=theta, sample=theta, apply_fn=len)
    assert new_state.apply_fn is len


def test_linen_without_a_sample_says_what_to_pass():
    state = linen_state(TX)
    with pytest.raises(ValueError, match=r"got none\. Pass `sample=theta`"):
        state.apply_gradients(grads=state.params)


def test_nnx_step_is_optaxs(key):
    model, optimizer = nnx_model()
    sampled = ivon_jax.flax.sample(key, model, optimizer)
    grads = nnx.grad(nnx_loss)(sampled, X)
    before, theta, grad = (
        nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, sampled, grads)
    )
    expected, _ = plain_step(TX, before, TX.init(before), theta, grad)
    optimizer.update(model, grads, sample=nnx.state(sampled, nnx.Param))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(after, expected, rtol=1e-6)


def test_nnx_step_works_in_jit_without_a_second_trace(key):
    model, optimizer = nnx_model()
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x, key):
        traces.append(1)
        sampled = ivon_jax.flax.sample(key, model, optimizer)
        loss, grads = nnx.value_and_grad(nnx_loss)(sampled, x)
        optimizer.update(model, grads, sample=nnx.state(sampled, nnx.Param))
        return loss

    losses = [train_step(model, optimizer, X, k) for k in jax.random.split(key, 20)]
    assert len(traces) == 1
    assert optimizer.step[...] == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert model.dropout.rngs.count[...] == 20


@pytest.mark.statistical
def test_nnx_draws_only_what_the_optimizer_trains(key):
    """Everything else is shared, and tied layers stay tied."""
    head = nnx.All(nnx.Param, nnx.PathContains("last"))
    model, optimizer = nnx_model(wrt=head)
    sampled = ivon_jax.flax.sample(key, model, optimizer)
    assert_moved(sampled.last.kernel[...], model.last.kernel[...])
    np.testing.assert_array_equal(sampled.first.kernel[...], model.first.kernel[...])
    assert sampled.tied is sampled.first
    sampled(X)
    np.testing.assert_array_equal(sampled.norm.mean[...], model.norm.mean[...])
    assert model.dropout.rngs.count[...] == 1


def test_nnx_sampling_leaves_the_mean_alone(key):
    model, optimizer = nnx_model()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    ivon_jax.flax.sample(key, model, optimizer)
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.chain(optax.clip_by_global_norm(1.0), TX),
        lambda: optax.inject_hyperparams(ivon_jax.ivon)(0.1, ess=50),
        lambda: optax.MultiSteps(TX, 2),
    ],
    ids=["chain", "inject_hyperparams", "multi_steps"],
)
def test_nnx_finds_ivon_within_a_wrapper(wrap, key):
    model, optimizer = nnx_model(wrap())
    sampled = ivon_jax.flax.sample(key, model, optimizer)
    grads = nnx.grad(nnx_loss)(sampled, X)
    optimizer.update(model, grads, sample=nnx.state(sampled, nnx.Param))


def test_nnx_posterior_samples_merge_into_the_model(key):
    model, optimizer = nnx_model()
    q = ivon_jax.flax.posterior(model, optimizer)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graphdef, q.sample(key), rest)
    sampled = ivon_jax.flax.sample(key, model, optimizer)
    np.testing.assert_array_equal(merged.last.kernel[...], sampled.last.kernel[...])


def test_nnx_modules_work_in_the_functional_style(key):
    """Split, train the state with plain optax and several samples, merge."""
    graphdef, params, rest = nnx.split(NNX(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(theta, x):
        return nnx_loss(nnx.merge(graphdef, theta, rest, copy=True), x)

    grad_fn = ivon_jax.value_and_grad(loss_fn, mc_samples=2, microbatches=2)
    opt_state = TX.init(params)
    _, estimate = jax.jit(grad_fn)(key, params, opt_state, X)
    updates, _ = TX.update(estimate, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "read",
    [
        lambda m, o: ivon_jax.flax.sample(jax.random.key(0), m, o),
        ivon_jax.flax.posterior,
    ],
)
def test_nnx_without_ivon_says_what_to_pass(read):
    message = "`opt_state` must contain the state of `ivon_jax.ivon`"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(*nnx_model(optax.adam(0.1)))


def test_an_nnx_posterior_is_the_prior_of_the_next_optimizer(key):
    """Its leaves are arrays, those of the optimizer's parameters are variables."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    first = nnx.Optimizer(model, ivon_jax.ivon(0.1, ess=100), wrt=nnx.Param)
    q = ivon_jax.flax.posterior(model, first)
    tx = ivon_jax.ivon(0.1, ess=50, prior=q)
    second = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, y = jax.random.normal(key, (8, 3)), jnp.ones((8, 2))

    @nnx.jit
    def step(model, optimizer, key):
        sampled = ivon_jax.flax.sample(key, model, optimizer)
        grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(sampled)
        optimizer.update(model, grads, sample=nnx.state(sampled, nnx.Param))

    step(model, second, key)
    chex.assert_trees_all_close(ivon_jax.flax.prior(model, second), q)
    divergence = ivon_jax.flax.posterior(model, second).kl_divergence(q)
    assert 0 < divergence < jnp.inf


def pure_loss(graphdef, rest):
    return lambda theta, x: nnx_loss(nnx.merge(graphdef, theta, rest, copy=True), x)


def without_dropout():
    """The same numbers in the same layers: the model, and its loss as a function."""
    model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(3, 1, rngs=nnx.Rngs(1))
    )
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


OPTIONS = {
    "one": {},
    "microbatches": {"mc_samples": 2, "microbatches": 2},
    "bfloat16": {"microbatches": 2, "compute_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nnx_estimate_is_the_plain_one_bit_for_bit(options):
    model, optimizer = without_dropout()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    plain = ivon_jax.value_and_grad(pure_loss(graphdef, rest), **options)
    key = jax.random.key(3)
    expected = jax.jit(plain)(key, params, TX.init(params), X)
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss, **options)
    result = nnx.jit(grad_fn)(key, model, optimizer, X)
    chex.assert_trees_all_equal(result, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nnx_estimate_is_linens_bit_for_bit(options):
    """Linen's parameters, in the model's places and order: kernels after biases."""
    model, optimizer = without_dropout()
    layers = [model.layers[0], model.layers[2]]
    params = {
        f"Dense_{i}": {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for i, layer in enumerate(layers)
    }
    key = jax.random.key(3)

    def loss_fn(params, x):
        return jnp.mean(Sequential().apply({"params": params}, x) ** 2)

    plain = jax.jit(ivon_jax.value_and_grad(loss_fn, **options))
    loss, expected = plain(key, params, TX.init(params), X)
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss, **options)
    result_loss, result = nnx.jit(grad_fn)(key, model, optimizer, X)
    np.testing.assert_array_equal(result_loss, loss)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def norm_model():
    model = nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def test_batch_statistics_are_the_mean_over_slices():
    """Each starts from the old ones, so that one step moves them once."""
    model, optimizer = norm_model()
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss, microbatches=2, mc_samples=2)
    nnx.jit(grad_fn)(jax.random.key(0), model, optimizer, X)
    halves = X[::2], X[1::2]
    np.testing.assert_allclose(
        model.mean[...], 0.5 * np.mean(X, axis=0), rtol=1e-5, atol=1e-6
    )
    variance = np.mean([np.var(half, axis=0) for half in halves], axis=0)
    np.testing.assert_allclose(model.var[...], 0.5 + 0.5 * variance, rtol=1e-5)


def test_other_state_advances_as_in_one_plain_step():
    """Counts of random streams by one, keys not at all, frozen weights to no bit."""
    head = nnx.All(nnx.Param, nnx.PathContains("last"))
    model, optimizer = nnx_model(wrt=head)
    before = jax.tree.map(jnp.copy, ivon_jax.flax.arrays(nnx.state(model, nnx.Param)))
    key = jax.random.key_data(model.dropout.rngs.key[...])
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss, wrt=head, mc_samples=3)
    _, estimate = nnx.jit(grad_fn)(jax.random.key(0), model, optimizer, X)
    assert model.dropout.rngs.count[...] == 1
    np.testing.assert_array_equal(jax.random.key_data(model.dropout.rngs.key[...]), key)
    after = ivon_jax.flax.arrays(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(after, before)
    assert len(jax.tree.leaves(estimate.grad)) == 2
    optimizer.update(model, estimate.grad, hess=estimate.hess)
    assert jnp.all(model.last.kernel[...] != before["last"]["kernel"])
    np.testing.assert_array_equal(model.first.kernel[...], before["first"]["kernel"])


@pytest.mark.parametrize("options", [{"mc_samples": 2}, {"microbatches": 2}])
def test_each_draw_has_a_dropout_mask_of_its_own(options):
    """Of 64 entries in two draws: were the masks one, their mean would be 0 or 2."""

    def loss_with_mask(model, x):
        return nnx_loss(model, x), model.dropout(jnp.ones(64))

    grad_fn = ivon_jax.flax.value_and_grad(loss_with_mask, has_aux=True, **options)
    model, optimizer = nnx_model()
    (_, mean), _ = nnx.jit(grad_fn)(jax.random.key(0), model, optimizer, X)
    assert set(np.unique(mean)) == {0.0, 1.0, 2.0}
    assert model.dropout.rngs.count[...] == 2


@pytest.mark.parametrize("options", [{}, {"mc_samples": 2}, {"microbatches": 2}])
def test_a_stream_of_keys_is_no_argument(options):
    """Flax itself says that its count cannot be changed there, and not what to do."""

    def loss(model, x, rngs):
        return jnp.mean(nnx.Dropout(0.5)(model(x), rngs=rngs))

    grad_fn = ivon_jax.flax.value_and_grad(loss, **options)
    args = jax.random.key(0), *nnx_model()
    rngs = nnx.Rngs(0)
    streams = {"args[1]": ([X, rngs], {}), "kwargs['rngs']": ([X], {"rngs": rngs})}
    for name, (rest, named) in streams.items():
        message = f"`args` must have no stream of random keys, got Rngs at {name}: each"
        with pytest.raises(TypeError, match=re.escape(message)):
            grad_fn(*args, *rest, **named)
    loss, _ = grad_fn(*args, X, rngs.dropout())
    assert np.isfinite(loss)


def test_nnx_optimizer_steps_down_with_everything_at_once():
    """Samples, micro-batches, bfloat16, dropout and batch statistics; one trace."""
    model, optimizer = nnx_model()
    traces = []
    grad_fn = ivon_jax.flax.value_and_grad(
        nnx_loss, mc_samples=2, microbatches=2, compute_dtype=jnp.bfloat16
    )

    @nnx.jit
    def train_step(key, model, optimizer, x):
        traces.append(1)
        loss, estimate = grad_fn(key, model, optimizer, x)
        optimizer.update(model, estimate.grad, hess=estimate.hess)
        return loss

    losses = [
        train_step(k, model, optimizer, X)
        for k in jax.random.split(jax.random.key(0), 20)
    ]
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert model.dropout.rngs.count[...] == 20


def test_nnx_aux_comes_back():
    model, optimizer = without_dropout()
    grad_fn = ivon_jax.flax.value_and_grad(
        lambda model, x: (nnx_loss(model, x), {"x": x.sum()}), has_aux=True
    )
    (loss, aux), _ = grad_fn(jax.random.key(0), model, optimizer, X)
    assert loss.shape == ()
    np.testing.assert_allclose(aux["x"], X.sum(), rtol=1e-5)


def test_nnx_filter_must_be_the_optimizers():
    head = nnx.All(nnx.Param, nnx.PathContains("last"))
    model, optimizer = nnx_model(wrt=head)
    message = "`wrt` must be the filter of the optimizer, got <class 'flax.nnx"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.flax.value_and_grad(nnx_loss)(jax.random.key(0), model, optimizer, X)


# Trainers that own the gradient, with the sample as their parameters.
KEY = jax.random.key(3)
SAMPLED = ivon_jax.sampled(TX, KEY)


def plain_loop(loss_fn, params, steps):
    """The README's, its first gradient at the mean."""
    opt_state = TX.init(params)
    theta, curvature = params, {"hess": hess_of(opt_state)}

    @jax.jit
    def step(t, theta, params, opt_state, curvature):
        grads = jax.grad(loss_fn)(theta, X)
        updates, opt_state = TX.update(grads, opt_state, params, **curvature)
        params = optax.apply_updates(params, updates)
        theta = ivon_jax.sample(jax.random.fold_in(KEY, t + 1), params, opt_state)
        return theta, params, opt_state

    for t in range(steps):
        theta, params, opt_state = step(t, theta, params, opt_state, curvature)
        curvature = {"sample": theta}
    return ivon_jax.posterior(params, opt_state)


def hess_of(opt_state):
    return ivon_jax.find_states(opt_state)[0].hess


def test_flaxs_own_train_state_trains_a_sample():
    """Untouched: it knows nothing of IVON. Mean and precision of the plain loop."""
    state = linen_state(SAMPLED, cls=train_state.TrainState)
    expected = plain_loop(linen_loss, state.params, 5)

    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=jax.grad(linen_loss)(state.params, X))

    for _ in range(5):
        state = train_step(state)
    q = ivon_jax.posterior(state.params, state.opt_state)
    chex.assert_trees_all_close(q, expected, rtol=1e-5, atol=1e-6)


def test_nnx_optimizer_trains_a_sample():
    """Untouched, and every reader sees the mean."""
    model, _ = without_dropout()
    optimizer = nnx.Optimizer(model, SAMPLED, wrt=nnx.Param)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, ivon_jax.flax.arrays(params))
    expected = plain_loop(pure_loss(graphdef, rest), params, 5)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss)(model, X))

    for _ in range(5):
        train_step(model, optimizer)
    q = ivon_jax.flax.posterior(model, optimizer)
    chex.assert_trees_all_close(q, expected, rtol=1e-5, atol=1e-6)
    at_mean = ivon_jax.flax.mean(model, optimizer)
    for key, read in {
        "mean": at_mean,
        "sample": ivon_jax.flax.sample(KEY, model, optimizer),
    }.items():
        theta = ivon_jax.flax.arrays(nnx.state(read, nnx.Param))
        wanted = q.mean if key == "mean" else q.sample(KEY)
        chex.assert_trees_all_equal(theta, wanted)
    assert jnp.all(at_mean.layers[0].kernel[...] != model.layers[0].kernel[...])
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss)
    _, estimate = grad_fn(KEY, model, optimizer, X)
    plain_fn = ivon_jax.value_and_grad(pure_loss(graphdef, rest))
    opt_state = ivon_jax.flax.arrays(optimizer.opt_state)
    _, plain_estimate = plain_fn(KEY, q.mean, opt_state.inner_state, X)
    chex.assert_trees_all_close(
        ivon_jax.flax.arrays(estimate), plain_estimate, rtol=1e-5, atol=1e-6
    )


def test_our_train_state_reads_the_mean_too():
    state = linen_state(SAMPLED)
    grads = jax.grad(linen_loss)(state.params, X)
    state = state.apply_gradients(grads=grads)
    chex.assert_trees_all_equal(state.posterior().mean, state.opt_state.mean)
    theta = state.sample(KEY)
    chex.assert_trees_all_equal(theta, state.posterior().sample(KEY))
    state.apply_gradients(grads=jax.grad(linen_loss)(theta, X), sample=theta)


OVERWRITE = "_overwrite_with_gradient"


def fp8_states(tx):
    """Ours and Flax's, with a collection whose gradients are its next values."""
    params = {"params": {"w": jnp.ones(3)}, OVERWRITE: {"scale": jnp.ones(2)}}
    classes = ivon_jax.flax.TrainState, train_state.TrainState
    return [cls.create(apply_fn=len, params=params, tx=tx) for cls in classes]


FP8_GRADS = {"params": {"w": jnp.ones(3)}, OVERWRITE: {"scale": jnp.full(2, 7.0)}}


def test_linen_overwrites_what_flax_overwrites():
    ours, flaxs = (
        state.apply_gradients(grads=FP8_GRADS) for state in fp8_states(optax.sgd(0.1))
    )
    chex.assert_trees_all_equal(ours.params, flaxs.params)
    np.testing.assert_array_equal(ours.params[OVERWRITE]["scale"], 7.0)


def test_linen_samples_beside_what_is_overwritten(key):
    """Which is a point mass; the step is that of the rest alone."""
    state, _ = fp8_states(TX)
    theta = state.sample(key)
    q = state.posterior()
    chex.assert_trees_all_equal(theta, q.sample(key))
    np.testing.assert_array_equal(theta[OVERWRITE]["scale"], 1.0)
    assert jnp.all(theta["params"]["w"] != 1.0)
    assert q.precision[OVERWRITE]["scale"] is None
    new_state = state.apply_gradients(grads=FP8_GRADS, sample=theta)
    trees = (state.params, state.opt_state, theta, FP8_GRADS)
    mean, opt_state, theta, grads = (
        tree["params"] if isinstance(tree, dict) else tree for tree in trees
    )
    expected, _ = plain_step(TX, mean, opt_state, theta, grads)
    chex.assert_trees_all_close(new_state.params["params"], expected, rtol=1e-6)
    np.testing.assert_array_equal(new_state.params[OVERWRITE]["scale"], 7.0)


@pytest.mark.parametrize("source", ["sample", "hess", "estimate"])
def test_linen_trains_with_multi_steps(source):
    """The second step moves the parameters, as with `MultiSteps` itself."""
    multi = optax.MultiSteps(TX, 2)
    params = {"w": jnp.ones(3)}
    state = ivon_jax.flax.TrainState.create(apply_fn=len, params=params, tx=multi)
    theta = state.sample(jax.random.key(0))
    arguments = {
        "sample": {"grads": params, "sample": theta},
        "hess": {"grads": params, "hess": params},
        "estimate": {"grads": ivon_jax.Estimate(params, params)},
    }[source]
    held = {"sample": theta} if source == "sample" else {"hess": params}
    opt_state, updates = multi.init(params), None
    for _ in range(2):
        state = state.apply_gradients(**arguments)
        updates, opt_state = multi.update(params, opt_state, params, **held)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6)
    assert jnp.all(state.params["w"] != 1.0)


@pytest.mark.parametrize(
    ("order", "name", "got"),
    [
        ((0, 2, 1), "optimizer", "NNX"),
        ((1, 2, 0), "optimizer", "PRNGKeyArray"),
        ((2, 0, 1), "optimizer", "NNX"),
        ((1, 0, 2), "model", "PRNGKeyArray"),
        ((0, 2, 2), "model", "Optimizer"),
    ],
)
def test_arguments_in_another_order_are_named(order, name, got):
    model, optimizer = nnx_model()
    arguments = jax.random.key(0), model, optimizer
    message = (
        f"`{name}` must be an .* got {got}. "
        r"The order is `sample\(key, model, optimizer\)`"
    )
    with pytest.raises(TypeError, match=message):
        ivon_jax.flax.sample(*(arguments[i] for i in order))


@pytest.mark.parametrize("read", [ivon_jax.flax.posterior, ivon_jax.flax.prior])
def test_a_model_for_an_optimizer_is_named(read):
    model, optimizer = nnx_model()
    with pytest.raises(TypeError, match="`optimizer` must be an"):
        read(optimizer, model)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: ivon_jax.sampled(tx, KEY)])
def test_nnx_optimizer_may_mask_parameters(wrap):
    """Those without a posterior are in the model at their value, as point masses."""
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    def kernels(params):
        return jax.tree.map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    groups = optax.masked(TX, kernels), optax.masked(optax.set_to_zero(), others)
    optimizer = nnx.Optimizer(model, wrap(optax.chain(*groups)), wrt=nnx.Param)
    bias = jnp.copy(model.bias[...])
    grad_fn = ivon_jax.flax.value_and_grad(nnx_loss, mc_samples=2)
    _, estimate = grad_fn(jax.random.key(0), model, optimizer, X)
    optimizer.update(model, estimate.grad, hess=estimate.hess)
    q = ivon_jax.flax.posterior(model, optimizer)
    assert len(jax.tree.leaves(q.precision)) == 1
    np.testing.assert_array_equal(ivon_jax.flax.mean(model, optimizer).bias[...], bias)


def others(params):
    return jax.tree.map_with_path(
        lambda path, _: "bias" in jax.tree_util.keystr(path), params
    )
