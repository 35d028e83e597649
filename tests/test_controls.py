"""Every control of IVON is what its name says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import baselines, controls

import ivon_jax

# As in the scripts, which are written for jax as it is.
pytestmark = pytest.mark.usefixtures("implicit_ranks", "standard_promotion")
BATCH, STEPS = 8, 12


@pytest.fixture
def problem():
    init, features = baselines.mlp((3, 4, 2))
    return baselines.Problem(
        init=init,
        features=features,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        num_data=24,
        batch_size=BATCH,
        epochs=4,
        prior_precision=2.0,
    )


@pytest.fixture
def data(key):
    x = jax.random.normal(key, (24, 3))
    return x, jnp.asarray(x[:, 0] > 0, jnp.int32)


def run(system, problem, data, key, **setting):
    """Return the states after each step, in batches of one order."""
    system = system(problem, **setting)
    step = jax.jit(system.step)
    states = [system.init(problem.init(key))]
    for i in range(STEPS):
        batch = (a[i % 3 * BATCH :][:BATCH] for a in data)
        states.append(step(jax.random.fold_in(key, i), states[-1], *batch))
    return states


def hess(state):
    [ivon_state] = ivon_jax.find_states(state[1])
    return ivon_state.hess


def test_without_noise_is_momentum(problem, data, key):
    """The transcript is in NumPy: an average of gradients, debiased, and the prior."""
    states = run(controls.without_noise, problem, data, key, learning_rate=0.3)
    mean, average = np.float64(flat(states[0][0])), 0.0
    unravel = jax.flatten_util.ravel_pytree(states[0][0])[1]
    for i in range(STEPS):
        x, y = (a[i % 3 * BATCH :][:BATCH] for a in data)
        params = unravel(jnp.asarray(mean, jnp.float32))
        grad = np.float64(flat(jax.grad(problem.mean_loss)(params, x, y)))
        average = 0.9 * average + 0.1 * grad
        rate = float(problem.schedule(0.3)(i))
        debiased = average / (1 - 0.9 ** (i + 1))
        mean = mean - rate * (debiased + 2.0 / 24 * mean)
        np.testing.assert_allclose(flat(states[i + 1][0]), mean, rtol=1e-4, atol=1e-6)


def flat(params):
    return np.asarray(jax.flatten_util.ravel_pytree(params)[0])


def test_constant_noise_moves_the_mean_and_not_h(problem, data, key):
    setting = dict(learning_rate=0.3, hess_init=0.7)
    *_, last = run(controls.with_constant_noise, problem, data, key, **setting)
    *_, quiet = run(controls.without_noise, problem, data, key, learning_rate=0.3)
    np.testing.assert_allclose(flat(hess(last)), 0.7, rtol=1e-6)
    assert np.all(flat(last[0]) != flat(quiet[0]))
    stddev = ivon_jax.posterior(*last).stddev
    expected = (24 * (0.7 + 2.0 / 24)) ** -0.5
    np.testing.assert_allclose(flat(stddev), expected, rtol=1e-6)


def test_less_noise_makes_constant_noise_the_control_without(problem, data, key):
    """With an h_0 of 1e9 the draws are the mean, and the step is the same."""
    setting = dict(learning_rate=0.3, hess_init=1e9)
    *_, noisy = run(controls.with_constant_noise, problem, data, key, **setting)
    *_, quiet = run(controls.without_noise, problem, data, key, learning_rate=0.3)
    np.testing.assert_allclose(flat(noisy[0]), flat(quiet[0]), rtol=2e-3, atol=1e-4)


def test_squared_gradient_is_the_square_of_the_gradient_of_a_batch(problem, data, key):
    setting = dict(learning_rate=0.3, hess_init=0.7)
    first, second, *_ = run(controls.squared_gradient, problem, data, key, **setting)
    x, y = (a[:BATCH] for a in data)
    theta = ivon_jax.sample(jax.random.fold_in(key, 0), *first)
    square = flat(jax.grad(problem.mean_loss)(theta, x, y)) ** 2
    s = (1 - problem.b2) * (square - 0.7)
    expected = 0.7 + s + s**2 / (2 * (0.7 + problem.weight_decay))
    np.testing.assert_allclose(flat(hess(second)), expected, rtol=1e-5)


def test_constant_precision_keeps_mean_geometric_mean_and_entropy(key):
    """A half of the log of the precision's determinant is the entropy."""
    keys = jax.random.split(key, 4)
    shapes = (5, 3), (4,)
    mean = [jax.random.normal(*each) for each in zip(keys[:2], shapes, strict=True)]
    precision = [
        jnp.exp(3 * jax.random.normal(*each))
        for each in zip(keys[2:], shapes, strict=True)
    ]
    q = ivon_jax.Posterior(mean, precision)
    constant = controls.constant_precision(q)
    stddev = flat(constant.stddev)
    assert np.ptp(stddev) == 0
    geometric = np.exp(np.log(flat(q.stddev)).mean())
    np.testing.assert_allclose(stddev[0], geometric, rtol=1e-5)
    np.testing.assert_allclose(constant.entropy(), q.entropy(), rtol=1e-5)
    np.testing.assert_array_equal(flat(constant.mean), flat(q.mean))


@pytest.fixture
def trained(problem, data, key):
    """Three runs of IVON: states, keys and settings."""
    keys = jax.random.split(key, 3)
    settings = dict(learning_rate=jnp.full(3, 0.3), hess_init=jnp.full(3, 0.3))
    runs = baselines.fit(baselines.ivon, problem, keys, settings, data)
    return runs.state, keys, settings


def predict(system, problem, trained, x, **more):
    state, keys, settings = trained
    return baselines.predict(system, problem, state, keys, settings | more, x, 16)


def test_predictions_are_draws_of_the_changed_posterior(problem, data, trained):
    """At T = 1 the same draws as IVON's; at T near 0 the mean; constant: others."""
    x, ivon = data[0], baselines.ivon
    plain = predict(ivon, problem, trained, x)
    tempered = controls.tempered(ivon)
    same = predict(tempered, problem, trained, x, temperature=jnp.ones(3))
    cold = predict(tempered, problem, trained, x, temperature=jnp.full(3, 1e-12))
    mean = predict(baselines.at_mean(ivon), problem, trained, x)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(cold, mean, atol=1e-4)
    q = jax.vmap(ivon_jax.posterior)(*trained[0])
    q = jax.tree.map(lambda a: a[0], q)
    constant = predict(controls.at_constant_precision(ivon), problem, trained, x)

    def of_draw(key):
        theta = controls.constant_precision(q).sample(key)
        return jax.nn.softmax(problem.apply(theta, x))

    expected = jax.vmap(of_draw)(jax.random.split(trained[1][0], 16)).mean(axis=0)
    np.testing.assert_allclose(constant[0], expected, atol=1e-5)
    assert np.max(np.abs(constant - plain)) > 1e-3


def test_temperatures_are_those_of_calibrate(problem, data, trained):
    states, keys, _ = trained
    found = controls.temperatures(problem, states, keys, data, 8)
    q = jax.tree.map(lambda a: a[1], jax.vmap(ivon_jax.posterior)(*states))
    best = ivon_jax.calibrate(
        lambda theta: jax.nn.softmax(problem.apply(theta, data[0])),
        *(q, data[1], keys[1]),
        num_samples=8,
    )
    ratio = flat(best.variance) / flat(q.variance)
    np.testing.assert_allclose(found[1], ratio, rtol=1e-4)


def test_scaling_undoes_a_sharpening_of_each_run(key):
    """Labels are drawn from probabilities; logits thrice as large are given."""
    logits_key, label_key = jax.random.split(key)
    logits = 2 * jax.random.normal(logits_key, (4_000, 3))
    labels = jax.random.categorical(label_key, logits)
    given = jnp.stack([jax.nn.softmax(c * logits) for c in (3.0, 0.5)])
    scaled = controls.temperature_scaled(given, labels, given)
    # The temperature of 4,000 labels has a standard error of some 2 %.
    truth = jax.nn.softmax(logits)
    assert np.max(np.abs(scaled - truth[None])) < 0.05
    np.testing.assert_allclose(scaled[0], scaled[1], atol=1e-3)


def test_members_are_averaged_with_their_neighbours():
    probs = jnp.arange(24.0).reshape(6, 2, 2)
    found = controls.ensembled(probs, 3)
    expected = np.stack([probs[:3].mean(axis=0), probs[3:].mean(axis=0)])
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(("epochs", "members", "each"), [(20, 5, 4), (3, 5, 1)])
def test_members_share_the_epochs_of_one(problem, epochs, members, each):
    problem = dataclasses.replace(problem, epochs=epochs)
    assert controls.of_equal_cost(problem, members).epochs == each


def test_early_stopping_keeps_each_runs_best_epoch(problem, data, key):
    """At a constant learning rate, the first epochs of a long run are a short run."""
    keys = jax.random.split(key, 3)
    settings = dict(learning_rate=jnp.full(3, 1.0), weight_decay=jnp.zeros(3))
    wrong = data[0], 1 - data[1]  # so that later is worse

    def losses(epochs, held_out=None):
        shorter = dataclasses.replace(problem, epochs=epochs)
        arguments = constant_adamw, shorter, keys, settings, data
        runs = baselines.fit(*arguments, held_out=held_out)
        return held_out_loss(problem, runs.state, wrong)

    plain = np.array([losses(epochs) for epochs in range(1, 5)])
    best = losses(4, held_out=wrong)
    np.testing.assert_allclose(best, plain.min(axis=0), rtol=1e-5)
    assert np.all(best < 0.9 * plain[-1])


def constant_adamw(problem, learning_rate, weight_decay):
    tx = optax.adamw(learning_rate, weight_decay=weight_decay)
    return baselines.point(problem, tx)


def held_out_loss(problem, state, held_out):
    return jax.vmap(lambda params: problem.mean_loss(params, *held_out))(state[0])


def test_runs_may_have_data_of_their_own(problem, data, key):
    """The same data for each give what shared ones give; others something else."""
    keys = jax.random.split(key, 3)
    settings = dict(learning_rate=jnp.full(3, 0.1))
    x, y = data
    own = [jnp.stack([a, a, b]) for a, b in ((x, -x), (y, y))]
    shared = baselines.fit(baselines.sgd, problem, keys, settings, data).state[0]
    found = baselines.fit(
        baselines.sgd, problem, keys, settings, own, own_data=True
    ).state[0]
    a, b = (
        jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0])(p)
        for p in (shared, found)
    )
    np.testing.assert_allclose(a[:2], b[:2], atol=1e-6)
    assert np.max(np.abs(a[2] - b[2])) > 1e-3
