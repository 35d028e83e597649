"""Baselines that learn a Gaussian, beside transcripts and exact posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import baselines
from linear_model import NOISE, example, flat, steps_of, train, unflat
from statistical import assert_mean

import ivon_jax

# The scripts of benchmarks/ run so, and these systems are theirs.
pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")
START = np.array([0.5, -1.0, 0.2, 0.1])


@pytest.fixture
def linear():
    return example()


def gradients(linear, theta):
    """The gradient of each example's loss, (N, 4)."""
    errors = linear.design @ theta - linear.y
    return linear.design * errors[:, None] / NOISE**2


def standard_noise(key):
    """The noise that a posterior of float64 weights draws from this key."""
    return flat(ivon_jax.Posterior(*map(unflat, (np.zeros(4), np.ones(4)))).sample(key))


def cosine(t, length):
    """The schedule without its warm-up, which shorter runs than 40 steps have not."""
    return 0.5 * (1 + np.cos(np.pi * t / length))


@pytest.mark.usefixtures("x64")
def test_swag_beside_a_transcript(linear, key):
    """Maddox et al. (2019), Algorithm 1, with five snapshots and rank three."""
    rate, ratio, problem = 0.02, 0.3, linear.problem(epochs=100)
    system = baselines.swag(problem, rate, ratio, rank=3, snapshots=5)
    theta, velocity, taken = START, np.zeros(4), []
    for t in range(100):
        gradient = gradients(linear, theta).mean(axis=0)
        velocity = 0.9 * velocity + gradient + problem.weight_decay * theta
        share = cosine(t, 80) if t < 80 else 0.0
        theta = theta - rate * (ratio + (1 - ratio) * share) * velocity
        if t + 1 in (84, 88, 92, 96, 100):
            taken.append(theta)
    *_, state = steps_of(system, system.init(unflat(START)), [key] * 100, linear)
    _, (_, count, mean, square, deviations) = state
    taken = np.roll(taken, 1, axis=1)  # a flattened tree begins with the bias
    assert count == 5
    np.testing.assert_allclose(mean, np.mean(taken, axis=0), rtol=1e-10)
    np.testing.assert_allclose(square, np.mean(taken**2, axis=0), rtol=1e-10)
    running = np.cumsum(taken, axis=0) / np.arange(1, 6)[:, None]
    expected = (taken - running)[[3, 4, 2]]  # the last three, in a ring
    np.testing.assert_allclose(deviations, expected, rtol=1e-6, atol=1e-14)


@pytest.mark.statistical
def test_swag_draws_half_of_each_covariance(linear, key):
    """Of the diagonal, and of the deviations' products over rank - 1."""
    rng = np.random.default_rng(1)
    mean, variance, deviations = (
        rng.normal(size=4),
        np.arange(1, 5),
        rng.normal(size=(3, 4)),
    )
    system = baselines.swag(linear.problem(epochs=100), 0.1, 1.0, rank=3)
    trained, (count, taken, *_) = system.init(unflat(np.float32(START)))
    moments = map(jnp.float32, (mean, variance + mean**2, deviations))
    state = trained, (count, taken + 7, *moments)
    x = np.eye(3)
    keys = jax.random.split(key, 4000)
    draws = jax.vmap(lambda k: system.outputs(k, state, jnp.float32(x)))(keys)[..., 0]
    design = np.c_[np.ones(3), x]  # in the order of the flattened tree
    assert_mean(draws, design @ mean)
    centred = np.asarray(draws) - design @ mean
    covariance = (np.diag(variance) + deviations.T @ deviations / 2) / 2
    products = centred[:, :, None] * centred[:, None]
    assert_mean(products, design @ covariance @ design.T)


def stationary_swag(rate, curvature, noise, num_snapshots, every):
    """The expected variance of heavy ball's snapshots, on a quadratic.

    Angle and velocity follow z' = A z + n xi, so that P = A P A^T + n n^T Var(xi), and
    their covariance is A^k P over k steps; of the snapshots' mean it is subtracted.
    """
    a = np.array([[1 - rate * curvature, -0.9 * rate], [curvature, 0.9]])
    n = np.array([-rate, 1.0])
    drive = noise * np.outer(n, n)
    p = np.linalg.solve(np.eye(4) - np.kron(a, a), drive.ravel()).reshape(2, 2)
    lags = np.abs(np.subtract.outer(*[np.arange(num_snapshots)] * 2))
    of_lag = [
        (np.linalg.matrix_power(a, every * k) @ p)[0, 0] for k in range(num_snapshots)
    ]
    return p[0, 0] - np.array(of_lag)[lags].mean()


@pytest.mark.statistical
def test_swag_of_a_quadratic_is_the_stationary_covariance(linear, key):
    """Here the bias alone learns, from batches of four independent targets."""
    problem = linear.problem(epochs=500)  # 40 snapshots in the last 100 steps, every 2
    system = baselines.swag(problem, 0.05, 1.0, snapshots=50)

    def run(key):
        def step(state, key):
            y = jax.random.normal(key, (4,))
            return system.step(key, state, jnp.zeros((4, 3)), y), None

        state = system.init(unflat(np.zeros(4, np.float32)))
        (_, (_, _, mean, square, _)), _ = jax.lax.scan(
            step, state, jax.random.split(key, 500)
        )
        return square[0] - mean[0] ** 2

    variances = jax.jit(jax.vmap(run))(jax.random.split(key, 400))
    curvature = 1 / NOISE**2 + problem.weight_decay
    expected = stationary_swag(0.05, curvature, 1 / NOISE**4 / 4, 50, 2)
    assert_mean(variances, expected)


@pytest.mark.usefixtures("x64")
def test_vogn_beside_a_transcript(linear, key):
    """Osawa et al. (2019), equations 3 to 5: squared gradients of single examples."""
    keys, (rate, hess_init) = jax.random.split(key, 3), (0.5, 2.0)
    problem, size = linear.problem(epochs=39), len(linear.y)
    delta, b1, b2 = problem.weight_decay, 0.9, 1 - 2 / 39
    system = baselines.vogn(problem, rate, hess_init)
    mean, momentum, hess = START, np.zeros(4), np.full(4, hess_init)
    states = steps_of(system, system.init(unflat(START)), keys, linear)
    for t, (step_key, state) in enumerate(zip(keys, states, strict=True)):
        theta = mean + standard_noise(step_key) / np.sqrt(size * (hess + delta))
        each = gradients(linear, theta)
        momentum = b1 * momentum + (1 - b1) * (each.mean(axis=0) + delta * mean)
        hess = b2 * hess + (1 - b2) * (each**2).mean(axis=0)
        alpha = rate * (hess_init + delta) * cosine(t, 39)
        mean = mean - alpha * momentum / (hess + delta)
        np.testing.assert_allclose(flat(state[0]), mean, rtol=1e-9)
        np.testing.assert_allclose(flat(state[2]), hess, rtol=1e-9)


@pytest.mark.statistical
def test_vogn_stays_at_its_fixed_point(linear, key):
    """The exact mean; and h is the expected square of one example's gradient there."""
    problem, size = linear.problem(epochs=1000), len(linear.y)
    delta, design = problem.weight_decay, linear.design
    errors, hess = design @ linear.mean - linear.y, np.ones(4)
    for _ in range(200):
        spread = design**2 @ (1 / (size * (hess + delta)))
        squares = (errors**2 + spread)[:, None] * design**2 / NOISE**4
        hess = squares.mean(axis=0)
    system = baselines.vogn(problem, 0.1, 1.0)
    mean, momentum, _, count = system.init(unflat(np.float32(linear.mean)))
    state = mean, momentum, unflat(np.float32(hess)), count
    x, y = jnp.float32(linear.x), jnp.float32(linear.y)
    keys = jax.random.split(key, 4000)
    _, momentum, new, _ = jax.jit(jax.vmap(lambda k: system.step(k, state, x, y)))(keys)
    assert_mean(flat(momentum), np.zeros(4))
    assert_mean((flat(new) - np.float32(hess)) / (1 - problem.b2), np.zeros(4))


@pytest.mark.statistical
def test_bbb_stays_at_the_best_diagonal_gaussian(linear, key):
    """Of exact mean, and of the diagonal of the exact precision: no gradient there."""
    system = baselines.bbb(linear.problem(), 0.1, 1.0)
    stddev = np.diag(linear.precision) ** -0.5
    q = tuple(unflat(np.float32(v)) for v in (linear.mean, np.log(np.expm1(stddev))))
    state = q, system.init(q[0])[1]
    x, y = jnp.float32(linear.x), jnp.float32(linear.y)
    keys = jax.random.split(key, 4000)
    _, opt_state = jax.jit(jax.vmap(lambda k: system.step(k, state, x, y)))(keys)
    for momentum in optax.tree.get(opt_state, "mu"):
        assert_mean(flat(momentum), np.zeros(4))


def test_bbb_finds_the_best_diagonal_gaussian(linear, key):
    """From a posterior three times too narrow; Adam's steps shake it until the end."""
    problem = linear.problem(epochs=3000)
    setting = {"learning_rate": 0.02, "hess_init": 300.0}
    keys = jax.random.split(key, 200)
    (mean, rho), _ = train(baselines.bbb, problem, linear, keys, **setting)
    assert_mean(flat(mean), linear.mean)
    stddev = np.diag(linear.precision) ** -0.5
    assert_mean(jax.nn.softplus(flat(rho)), stddev)


def test_evon_finds_the_exact_mean(linear, key):
    problem = linear.problem(epochs=1000)
    setting = {"learning_rate": 0.1, "hess_init": 30.0}
    keys = jax.random.split(key, 200)
    params, _ = train(baselines.evon, problem, linear, keys, **setting)
    assert_mean(flat(params), linear.mean)


@pytest.mark.statistical
def test_ivon_stays_at_the_best_diagonal_gaussian(linear, key):
    """Its h is the mean of the examples' Hessians; the prior is outside of it."""
    problem, size = linear.problem(epochs=10_000), len(linear.y)
    hess = (linear.design**2).mean(axis=0) / NOISE**2
    system = baselines.ivon(problem, 0.1, 1.0)
    params, opt_state = system.init(unflat(np.float32(linear.mean)))
    [first] = ivon_jax.find_states(opt_state)
    opt_state = optax.tree.set(opt_state, hess=unflat(np.float32(hess)))
    precision = ivon_jax.posterior(params, opt_state).precision
    np.testing.assert_allclose(flat(precision), np.diag(linear.precision), rtol=1e-5)
    x, y = jnp.float32(linear.x), jnp.float32(linear.y)

    def step(key):
        _, opt_state = system.step(key, (params, opt_state_), x, y)
        [state] = ivon_jax.find_states(opt_state)
        return state.momentum, state.hess

    opt_state_ = opt_state
    momentum, new = jax.jit(jax.vmap(step))(jax.random.split(key, 4000))
    assert first.ess == size
    assert_mean(flat(momentum) / 0.1, -problem.weight_decay * linear.mean)
    assert_mean((flat(new) - np.float32(hess)) / (1 - problem.b2), np.zeros(4))


@pytest.mark.usefixtures("x64")
def test_bsam_beside_a_transcript(linear, key):
    """Möllenhoff and Khan (2023), Algorithm 1."""
    keys, (rate, rho, gamma) = jax.random.split(key, 3), (0.1, 0.05, 0.2)
    problem, size = linear.problem(epochs=39), len(linear.y)
    delta, b1, b2 = problem.weight_decay, 0.9, 0.999
    system = baselines.bsam(problem, rate, rho, gamma)
    mean, momentum, scale = START, np.zeros(4), np.ones(4)
    states = steps_of(system, system.init(unflat(START)), keys, linear)
    for t, (step_key, state) in enumerate(zip(keys, states, strict=True)):
        theta = mean + standard_noise(step_key) / np.sqrt(size * scale)
        gradient = gradients(linear, theta).mean(axis=0)
        moved = mean + rho * gradient / scale
        there = gradients(linear, moved).mean(axis=0)
        momentum = b1 * momentum + (1 - b1) * (there + delta * mean)
        drive = np.sqrt(scale) * np.abs(gradient) + delta + gamma
        scale = b2 * scale + (1 - b2) * drive
        alpha = rate * (gamma + delta) * cosine(t, 39)
        mean = mean - alpha * momentum / scale
        np.testing.assert_allclose(flat(state[0]), mean, rtol=1e-9)
        np.testing.assert_allclose(flat(state[2]), scale, rtol=1e-9)


@pytest.mark.statistical
def test_bsam_draws_with_variance_one_over_n_s(linear, key):
    system = baselines.bsam(linear.problem(), 0.1, 0.05, 0.2)
    mean, momentum, _, count = system.init(unflat(np.float32(START)))
    scale = np.float32([1.0, 2.0, 3.0, 4.0])
    state = mean, momentum, unflat(scale), count
    keys = jax.random.split(key, 4000)
    x = jnp.eye(3)
    draws = jax.vmap(lambda k: system.outputs(k, state, x))(keys)[..., 0]
    expected = START[:-1] + START[-1]
    assert_mean(draws, expected)
    variance = (1 / scale[:-1] + 1 / scale[-1]) / len(linear.y)
    assert_mean((draws - expected) ** 2, variance)
