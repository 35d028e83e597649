"""Bayesian linear regression: the exact mean-field posterior is found.

With loss ``(y - x theta)^2 / 2`` per example (unit noise) and prior precision
``N weight_decay``, the best Gaussian of diagonal covariance has the mean of the exact
posterior and precision ``N (diag(X'X / N) + weight_decay)``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes
from statistical import assert_at_most

import ivon_jax

WEIGHT_DECAY = 0.1
B2 = 0.9999
STEPS = 100_000  # ten times 1 / (1 - B2)


def diabetes():
    """The 442 patients: inputs of unequal scale, standardised target."""
    x, y = load_diabetes(return_X_y=True)
    x = x / x.std(axis=0) * np.linspace(0.5, 1.5, x.shape[1])
    return x.astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)


X, Y = diabetes()
N = len(Y)
HESSIAN = (X.T @ X / N).astype(np.float64)
EXACT_HESS = np.diag(HESSIAN)
EXACT_MEAN = np.linalg.solve(HESSIAN + WEIGHT_DECAY * np.eye(10), X.T @ Y / N)


def train(key, dtype, hess_init):
    """Full-batch IVON; returns the posterior and h, averaged over the last half."""
    tx = ivon_jax.ivon(
        optax.linear_schedule(0.05, 0.0, STEPS),
        ess=N,
        hess_init=hess_init,
        b2=B2,
        weight_decay=WEIGHT_DECAY,
        rescale_lr=False,
    )

    def loss_fn(theta):
        return 0.5 * jnp.mean((Y - X @ theta.astype(jnp.float32)) ** 2)

    def step(carry, step_key):
        params, opt_state = carry
        theta = ivon_jax.sample(step_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        carry = optax.apply_updates(params, updates), opt_state
        return carry, ivon_jax.find_states(opt_state)[0].hess

    params = jnp.zeros(10, dtype)
    with jax.numpy_dtype_promotion("standard"):
        (params, opt_state), hess = jax.jit(
            lambda carry, keys: jax.lax.scan(step, carry, keys)
        )((params, tx.init(params)), jax.random.split(key, STEPS))
    return ivon_jax.posterior(params, opt_state), hess[STEPS // 2 :].mean(axis=0)


def estimate_variance():
    """The variance of a single draw of h_hat when m is the exact mean.

    It is ``sum_j A_ij sigma_j e_j e_i / sigma_i``, where e is standard normal, and has
    variance ``A_ii^2 + sum_j A_ij^2 sigma_j^2 / sigma_i^2``.
    """
    precision = EXACT_HESS + WEIGHT_DECAY
    return EXACT_HESS**2 + precision * ((HESSIAN**2) @ (1 / precision))


@pytest.mark.statistical
def test_mean_and_precision_are_those_of_the_exact_posterior(key):
    """The mean to a tenth of the posterior's stddev, Hessians to 5 standard errors."""
    q, average_hess = train(key, jnp.float32, hess_init=3.0)
    exact_stddev = (N * (EXACT_HESS + WEIGHT_DECAY)) ** -0.5
    assert_at_most(np.abs(q.mean - EXACT_MEAN), 0.1 * exact_stddev)
    error_of_average = np.sqrt(estimate_variance() / (STEPS / 2))
    assert_at_most(np.abs(average_hess - EXACT_HESS), 5 * error_of_average)
    # A moving average of decay rate b2 has (1 - b2) / (1 + b2) of the variance.
    error_of_last = np.sqrt((1 - B2) / (1 + B2) * estimate_variance())
    last_hess = q.precision / N - WEIGHT_DECAY
    assert_at_most(np.abs(last_hess - EXACT_HESS), 5 * error_of_last)


def test_the_hessian_reaches_the_truth_with_bfloat16_parameters(key):
    """Kept in bfloat16, h would stay at hess_init: its increments round away."""
    _, average_hess = train(key, jnp.bfloat16, hess_init=0.5)
    np.testing.assert_allclose(average_hess, EXACT_HESS, rtol=0.05)
