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
    share = controls.of_equal_cost(problem, members)
    assert (share.epochs, share.steps) == (each, 0)
    steps = dataclasses.replace(problem, steps=epochs)
    assert controls.of_equal_cost(steps, members).num_steps == each


@pytest.fixture
def subsets(data, key):
    """Problem, keys, settings and data of three runs with 4, 4 and 24 examples."""
    init, features = baselines.mlp((3, 4, 2))
    problem = baselines.Problem(
        *(init, features, optax.softmax_cross_entropy_with_integer_labels),
        **dict(num_data=0, batch_size=4, epochs=0, steps=40),
    )
    keys = jnp.stack([key] * 3)
    settings = dict(size=jnp.array([4, 4, 24]), learning_rate=jnp.full(3, 0.3))
    x, y = data
    rows = jnp.stack([jnp.arange(24), jnp.arange(24)[::-1], jnp.arange(24)])
    return problem, keys, settings, x, rows, y[rows]


def test_a_run_sees_its_own_examples_alone(subsets):
    """What stands behind the first four changes the third run alone."""
    system = baselines.with_size(baselines.sgd)
    *arguments, labels = subsets
    first = baselines.fit_subsets(system, *arguments, labels)
    other = baselines.fit_subsets(system, *arguments, labels.at[:, 4:].set(1))
    a, b = (np.asarray(jax.vmap(flatten)(state[0])) for state in (first, other))
    np.testing.assert_array_equal(a[:2], b[:2])
    assert np.max(np.abs(a[2] - b[2])) > 1e-3
    assert np.max(np.abs(a[0] - a[1])) > 1e-3


def flatten(params):
    return jax.flatten_util.ravel_pytree(params)[0]


def test_a_run_ends_with_as_many_examples_as_it_has(subsets):
    """IVON's ess is the run's own size, and h_0 stays where its mean is over it all."""
    system = baselines.with_size(baselines.with_prior(baselines.ivon))
    problem, keys, settings, *rest = subsets
    settings |= dict(hess_init=jnp.full(3, 0.5), prior_precision=jnp.full(3, 2.0))
    state = baselines.fit_subsets(system, problem, keys, settings, *rest)
    [ivon_state] = ivon_jax.find_states(state[1])
    np.testing.assert_array_equal(ivon_state.ess, [4.0, 4.0, 24.0])
    np.testing.assert_allclose(ivon_state.weight_decay, [0.5, 0.5, 2.0 / 24])
    assert np.all(ivon_state.count == 40)


def test_early_stopping_keeps_each_runs_best_state(subsets):
    """With labels turned round, later is worse: the best of 20 is an early one."""
    system = baselines.with_size(constant_sgd)
    problem, *_, x, _, labels = subsets
    held_out = x, 1 - labels[0]

    def loss(state):
        return jax.vmap(lambda p: problem.mean_loss(p, *held_out))(state[0])

    last = loss(baselines.fit_subsets(system, *subsets))
    best = baselines.fit_subsets(system, *subsets, held_out=held_out)
    problem = dataclasses.replace(problem, steps=2)
    first = loss(baselines.fit_subsets(system, problem, *subsets[1:]))
    assert np.all(loss(best) <= np.minimum(last, first * 1.2))
    assert np.all(loss(best)[2] < 0.9 * last[2])


def constant_sgd(problem, learning_rate):
    return baselines.point(problem, optax.sgd(learning_rate))
