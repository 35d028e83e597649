"""Each system that IVON is compared with, beside closed forms of linear models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import baselines
from linear_model import NOISE, Linear, example, flat, steps_of, train, unflat
from statistical import assert_mean

# The scripts of benchmarks/ run so, and these systems are theirs.
pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")


@pytest.fixture
def linear():
    return example()


@pytest.mark.usefixtures("x64")
def test_sgd_finds_the_maximum_of_the_posterior_density(linear, key):
    """Which is the exact mean, where the posterior is Gaussian."""
    problem = linear.problem(epochs=2000)
    params, _ = train(baselines.sgd, problem, linear, key[None], learning_rate=0.02)
    np.testing.assert_allclose(flat(params)[0], linear.mean, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_muon_without_decay_finds_the_least_squares(linear, key):
    problem, settings = linear.problem(epochs=2000), {"weight_decay": 0.0}
    settings["learning_rate"] = 0.05
    params, _ = train(baselines.muon, problem, linear, key[None], **settings)
    expected = np.linalg.lstsq(linear.design, linear.y)[0]
    np.testing.assert_allclose(flat(params)[0], expected, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_adahessian_takes_newtons_step(key):
    """Of a diagonal Hessian each Rademacher probe tells the diagonal exactly."""
    x = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]]) * [3.0, 0.5]
    linear = Linear(x, np.array([1.0, 2.0, -1.0, 0.5]))
    system = baselines.adahessian(linear.problem(), 1.0, 0.0, b1=0.0, eps=0.0)
    state = system.init(linear.problem().init(key))
    [state] = steps_of(system, state, [key], linear)
    least_squares = np.linalg.lstsq(linear.design, linear.y)[0]
    np.testing.assert_allclose(flat(state[0]), least_squares, rtol=1e-12)


@pytest.mark.statistical
def test_adahessians_probe_of_any_hessian(linear, key):
    """E (z_i (H z)_i)^2 is the square of H_ii and of all others in its row."""
    system = baselines.adahessian(linear.problem(), 1.0, 0.0)
    x, y = jnp.float32(linear.x), jnp.float32(linear.y)

    def square(key):
        _, _, square, _ = system.step(key, system.init(unflat(np.zeros(4))), x, y)
        return jnp.append(square[1]["w"], square[1]["b"]) / (1 - 0.999)

    squares = jax.vmap(square)(jax.random.split(key, 2000))
    hessian = linear.design.T @ linear.design / NOISE**2 / len(linear.y)
    assert_mean(squares, (hessian**2).sum(axis=1))


@dataclasses.dataclass(frozen=True)
class Kernel(baselines.Problem):
    """A quadratic in the weights of a convolution, with a diagonal Hessian."""

    def mean_loss(self, params, x, y):
        del x, y
        return 0.5 * jnp.sum(jnp.arange(-1.0, 7.0).reshape(2, 2, 1, 2) * params**2)


def test_adahessian_averages_over_the_window_of_a_convolution(linear, key):
    """With signs: the entries of a channel are -1, 1, 3, 5 and 0, 2, 4, 6."""
    problem = Kernel(**vars(linear.problem()))
    system = baselines.adahessian(problem, 0.1, 0.0)
    state = system.init(jnp.ones((2, 2, 1, 2)))
    _, _, square, _ = system.step(key, state, None, None)
    expected = 0.001 * np.tile([2.0**2, 3.0**2], (2, 2, 1, 1))
    np.testing.assert_allclose(square, expected, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_adahessian_beside_a_transcript(linear, key):
    """Yao et al. (2021), Algorithm 1 with Hessian power one and decoupled decay."""
    keys, (rate, decay, b1, b2, eps) = (
        jax.random.split(key, 3),
        (0.1, 0.2, 0.9, 0.999, 1e-4),
    )
    problem = linear.problem(epochs=39)  # no warm-up, and a slow cosine
    system = baselines.adahessian(problem, rate, decay)
    theta = np.array([0.5, -1.0, 0.2, 0.1])
    hessian = linear.design.T @ linear.design / NOISE**2 / len(linear.y)
    m, v = np.zeros(4), np.zeros(4)
    states = steps_of(system, system.init(unflat(theta)), keys, linear)
    for t, (step_key, state) in enumerate(zip(keys, states, strict=True)):
        z = flat(optax.tree.random_like(step_key, unflat(theta), jax.random.rademacher))
        gradient = linear.design.T @ (linear.design @ theta - linear.y)
        gradient = gradient / NOISE**2 / len(linear.y)
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * (z * (hessian @ z)) ** 2
        mean, scale = m / (1 - b1 ** (t + 1)), np.sqrt(v / (1 - b2 ** (t + 1)))
        alpha = rate * 0.5 * (1 + np.cos(np.pi * t / 39))
        theta = theta - alpha * (mean / (scale + eps) + decay * theta)
        np.testing.assert_allclose(flat(state[0]), theta, rtol=1e-6)


@pytest.mark.statistical
def test_dropout_has_the_moments_of_a_masked_sum(linear, key):
    """Mean f, variance p / (1 - p) times the sum of squared terms."""
    weights, rate = np.array([1.0, -2.0, 0.5, 0.3], np.float32), 0.3
    system = baselines.mc_dropout(linear.problem(), 0.1, rate)
    state, x = system.init(unflat(weights)), jnp.float32(linear.x[:4])
    keys = jax.random.split(key, 4000)
    draws = jax.vmap(lambda k: system.outputs(k, state, x))(keys)[..., 0]
    terms = linear.x[:4] * weights[:-1]
    assert_mean(draws, terms.sum(axis=1) + weights[-1])
    variance = rate / (1 - rate) * (terms**2).sum(axis=1)
    assert_mean((draws - terms.sum(axis=1) - weights[-1]) ** 2, variance)


@pytest.mark.statistical
def test_dropout_has_a_mask_of_its_own_in_each_layer(linear, key):
    """Of a product of two kept shares the square's mean is 1 / (1 - p)^2."""
    problem = dataclasses.replace(
        linear.problem(), features=lambda _params, x, drop: drop(drop(x))
    )
    system = baselines.mc_dropout(problem, 0.1, 0.3)
    state = system.init(unflat(np.float32([1.0, 0.0, 0.0, 0.0])))
    keys = jax.random.split(key, 4000)
    draws = jax.vmap(lambda k: system.outputs(k, state, jnp.ones((1, 3))))(keys)
    assert_mean(draws[:, 0, 0] ** 2, 1 / 0.7**2)


@pytest.mark.statistical
def test_dropout_trains_as_ridge_regression(linear, key):
    """Its expected loss has p / (1 - p) times the squared weights and inputs more."""
    rate, problem = 0.2, linear.problem(epochs=400)
    setting = {"learning_rate": 0.02, "rate": rate}
    keys = jax.random.split(key, 200)
    params, _ = train(baselines.mc_dropout, problem, linear, keys, **setting)
    masked = np.append(np.sum(linear.x**2, axis=0) / NOISE**2, 0)
    ridge = linear.precision + rate / (1 - rate) * np.diag(masked)
    expected = np.linalg.solve(ridge, linear.design.T @ linear.y / NOISE**2)
    assert_mean(flat(params), expected)


@pytest.mark.usefixtures("x64")
def test_laplace_has_the_exact_precision(linear, key):
    """The loss is quadratic, so that it does not depend on the weights."""
    problem = linear.problem(epochs=2)
    setting = {"learning_rate": 0.02, "head_precision": linear.prior_precision}
    _, factor = train(baselines.laplace, problem, linear, key[None], **setting)
    np.testing.assert_allclose(factor[0] @ factor[0].T, linear.precision, rtol=1e-12)


def softmax_laplace(linear):
    """Return a system and its state: three classes, weights (F + 1, 3), and those."""
    problem = dataclasses.replace(
        linear.problem(), loss=optax.softmax_cross_entropy_with_integer_labels
    )
    weights = np.random.default_rng(1).normal(size=(4, 3))
    head = {"w": jnp.asarray(weights[:-1]), "b": jnp.asarray(weights[-1])}
    system = baselines.laplace(problem, 0.1, head_precision=3.0)
    labels = jnp.arange(len(linear.y)) % 3
    state = system.finish((((), head), None), jnp.asarray(linear.x), labels)
    return system, state, weights


def softmax_covariance(design, weights):
    """The covariance of the weights, by class and input, in NumPy."""
    logits = design @ weights
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    blocks = [
        np.kron(np.diag(q) - np.outer(q, q), np.outer(phi, phi))
        for q, phi in zip(p, design, strict=True)
    ]
    return np.linalg.inv(np.sum(blocks, axis=0) + 3.0 * np.eye(12))


@pytest.mark.usefixtures("x64")
def test_laplace_of_classes_is_the_gauss_newton_matrix(linear):
    """The sum of (diag(p) - p p^T), Kronecker's product with the features'."""
    _, (_, factor), weights = softmax_laplace(linear)
    expected = np.linalg.inv(softmax_covariance(linear.design, weights))
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.statistical
def test_laplace_draws_outputs_of_the_linearised_model(linear, key):
    """Their mean is the network's, their covariance J C J^T."""
    system, state, weights = softmax_laplace(linear)
    x, keys = jnp.float32(linear.x[:2]), jax.random.split(key, 4000)
    draws = jax.vmap(lambda k: system.outputs(k, state, x))(keys)
    design = linear.design[:2]
    assert_mean(draws, design @ weights)
    covariance = softmax_covariance(linear.design, weights)
    centred = (np.asarray(draws) - design @ weights).reshape(len(keys), -1)
    products = centred[:, :, None] * centred[:, None]
    jacobian = [np.kron(np.eye(3)[c], phi) for phi in design for c in range(3)]
    assert_mean(products, np.array(jacobian) @ covariance @ np.transpose(jacobian))
