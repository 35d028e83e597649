"""Another distribution and another optimizer, a few lines each, in the place of ours.

The distribution is a Gaussian with all covariances; the optimizer is Newton's method
for the mean and a moving average of its precision. On linear regression with known
noise both are exact, and so must be all that reads them.
"""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from statistical import assert_mean

import ivon_jax
from ivon_jax import diagnostics, sensitivity

ESS, DECAY = 30.0, 0.2
KEY = jax.random.key(0)


class Correlated(NamedTuple):
    """N(m, R R^T) over all entries of a tree together."""

    mean: Any
    root: jax.Array

    @property
    def trained(self):
        return jax.tree.map(lambda _: True, self.mean)

    @property
    def variance(self):
        return self._like_mean(jnp.sum(self.root**2, axis=1))

    def noise(self, key):
        return self._like_mean(jax.random.normal(key, self.root.shape[:1]))

    def perturb(self, noise, dtype=None):
        theta = self._like_mean(_flat(self.mean) + self.root @ _flat(noise))
        return optax.tree.cast(theta, dtype)

    def sample(self, key, shape=()):
        if not shape:
            return self.perturb(self.noise(key))
        keys = jax.random.split(key, shape[0])
        return jax.vmap(lambda key: self.sample(key, shape[1:]))(keys)

    def hess_estimate(self, grad, theta):
        whitened = self._whiten(_flat(theta) - _flat(self.mean))
        return self._like_mean(_flat(grad) * jnp.linalg.solve(self.root.T, whitened))

    def covariance_times(self, vector):
        return self._like_mean(self.root @ (self.root.T @ _flat(vector)))

    def log_prob(self, theta):
        noise = self._whiten(_flat(theta) - _flat(self.mean))
        terms = jnp.log(2 * jnp.pi) + noise**2 + 2 * jnp.log(jnp.diag(self.root))
        return -0.5 * jnp.sum(terms)

    def entropy(self):
        return jnp.sum(jnp.log(jnp.diag(self.root)) + 0.5 * jnp.log(2 * np.pi * np.e))

    def kl_divergence(self, prior):
        shift = prior._whiten(_flat(self.mean) - _flat(prior.mean))
        ratio = prior._whiten(self.root)
        terms = jnp.sum(ratio**2) - len(shift) + jnp.sum(shift**2)
        return 0.5 * terms + prior.entropy() - self.entropy()

    def _whiten(self, x):
        return jnp.linalg.solve(self.root, x)

    def _like_mean(self, flat):
        return jax.flatten_util.ravel_pytree(self.mean)[1](flat)


class NewtonState(NamedTuple):
    count: jax.Array
    ess: jax.Array
    weight_decay: jax.Array
    precision: jax.Array  # (P, P)

    def posterior_of(self, params):
        return Correlated(params, jnp.linalg.cholesky(jnp.linalg.inv(self.precision)))

    def prior_of(self, params):
        root = jnp.eye(len(self.precision)) / jnp.sqrt(self.ess * self.weight_decay)
        return Correlated(jax.tree.map(jnp.zeros_like, params), root)


def newton(learning_rate, ess, weight_decay):
    """Newton's method, with ``hess=`` the whole Hessian of the mean loss."""

    def init(params):
        size = len(_flat(params))
        scalars = (jnp.array(x) for x in (ess, weight_decay))
        return NewtonState(jnp.zeros([], jnp.int32), *scalars, jnp.eye(size))

    def update(grads, state, params=None, *, hess):
        target = state.ess * (hess + state.weight_decay * jnp.eye(len(hess)))
        precision = state.precision + learning_rate * (target - state.precision)
        total = _flat(grads) + state.weight_decay * _flat(params)
        step = -learning_rate * state.ess * jnp.linalg.solve(precision, total)
        unravel = jax.flatten_util.ravel_pytree(params)[1]
        return unravel(step), state._replace(count=state.count + 1, precision=precision)

    return optax.GradientTransformationExtraArgs(init, update)


def _flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def fn(theta, x):
    return (x @ theta["w"] + theta["b"])[:, None]


def loss_fn(theta, x, y):
    """The mean negative log-likelihood, for noise of variance one."""
    return 0.5 * jnp.mean((fn(theta, x)[:, 0] - y) ** 2) + 0.5 * jnp.log(2 * jnp.pi)


@pytest.fixture
def trained(x64):  # noqa: ARG001
    """Data, and what Newton's method makes of it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(int(ESS), 3)) @ rng.normal(size=(3, 3)))
    y = jnp.asarray(rng.normal(size=int(ESS)))
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    tx = newton(1.0, ess=ESS, weight_decay=DECAY)
    opt_state = optax.chain(optax.clip_by_global_norm(1e9), tx).init(params)
    tx = optax.chain(optax.clip_by_global_norm(1e9), tx)
    design = design_of(x)
    grads = jax.grad(loss_fn)(params, x, y)
    hess = design.T @ design / ESS
    updates, opt_state = tx.update(grads, opt_state, params, hess=hess)
    return x, y, optax.apply_updates(params, updates), opt_state


def design_of(x):
    """In the order of the tree: b, then w."""
    return jnp.concatenate([jnp.ones((len(x), 1)), x], axis=1)


def exact(x, y):
    design = np.asarray(design_of(x))
    precision = design.T @ design + ESS * DECAY * np.eye(4)
    covariance = np.linalg.inv(precision)
    return covariance @ design.T @ np.asarray(y), covariance, design


def test_posterior_and_samples_are_the_exact_ones(trained):
    x, y, params, opt_state = trained
    mean, covariance, _ = exact(x, y)
    q = ivon_jax.posterior(params, opt_state)
    np.testing.assert_allclose(_flat(q.mean), mean, rtol=1e-9)
    np.testing.assert_allclose(q.root @ q.root.T, covariance, rtol=1e-9)
    draws = jax.vmap(lambda k: _flat(ivon_jax.sample(k, params, opt_state)))(
        jax.random.split(KEY, 1000)
    )
    shifts = np.asarray(draws) - mean
    assert_mean(shifts[:, :, None] * shifts[:, None], covariance)


def test_predictions_are_the_exact_ones(trained):
    x, y, params, opt_state = trained
    mean, covariance, design = exact(x, y)
    q = ivon_jax.posterior(params, opt_state)
    outputs = ivon_jax.linearized(fn, q, x)
    np.testing.assert_allclose(outputs.mean[:, 0], design @ mean, rtol=1e-9)
    expected = np.einsum("np,pq,nq->n", design, covariance, design)
    np.testing.assert_allclose(outputs.covariance[:, 0, 0], expected, rtol=1e-9)
    draws = jax.vmap(lambda k: ivon_jax.predict(lambda t: fn(t, x), q, k, 1))(
        jax.random.split(KEY, 1000)
    )
    assert_mean(draws[:, :, 0], design @ mean)


def test_sensitivities_are_the_exact_ones(trained):
    """V_i e_i; both with all of V_i and its diagonal, which of one output is all."""
    x, y, params, opt_state = trained
    mean, covariance, design = exact(x, y)
    variance = np.einsum("np,pq,nq->n", design, covariance, design)
    expected = np.abs(variance * (design @ mean - np.asarray(y)))
    q = ivon_jax.posterior(params, opt_state)
    for diagonal in (False, True):
        found = sensitivity.sensitivities(
            *(fn, q, x, y[:, None]),
            loss=lambda f, y: 0.5 * jnp.sum((f - y) ** 2),
            diagonal=diagonal,
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_evidence_lower_bound_is_the_evidence(trained):
    """The posterior is exact: the bound is tight, at any sample."""
    x, y, params, opt_state = trained
    q, p = (read(params, opt_state) for read in (ivon_jax.posterior, ivon_jax.prior))
    _, _, design = exact(x, y)
    covariance = np.eye(int(ESS)) + design @ design.T / (ESS * DECAY)
    y = np.asarray(y)
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    evidence = -0.5 * (y @ np.linalg.solve(covariance, y) + log_det)
    bounds = jax.vmap(
        lambda k: ivon_jax.evidence_lower_bound(
            loss_fn, q, p, k, ess=ESS, num_samples=1, args=(x, y)
        )
    )(jax.random.split(KEY, 1000))
    assert_mean(bounds, evidence)


def test_estimates_of_a_gradient_take_its_samples(trained):
    """The mean of the estimates is the Hessian's diagonal, whatever the covariances."""
    x, y, params, opt_state = trained
    grad_fn = ivon_jax.value_and_grad(lambda theta: loss_fn(theta, x, y), mc_samples=2)
    _, (grad, hess) = jax.vmap(lambda k: grad_fn(k, params, opt_state))(
        jax.random.split(KEY, 1000)
    )
    design = design_of(x)
    assert_mean(jax.vmap(_flat)(hess), jnp.mean(design**2, axis=0))
    assert_mean(jax.vmap(_flat)(grad), -DECAY * _flat(params))


def test_diagnostics_measure_what_the_state_has(trained):
    x, y, params, opt_state = trained
    numbers = diagnostics.measure(
        params, opt_state, loss_fn=lambda theta: loss_fn(theta, x, y), key=KEY
    )
    mean, covariance, _ = exact(x, y)
    noise = np.sqrt(np.trace(covariance) / np.sum(mean**2))
    np.testing.assert_allclose(numbers["noise_to_weight"], noise, rtol=1e-9)
    np.testing.assert_allclose(numbers["weight_decay"], DECAY, rtol=1e-9)
    q, p = (read(params, opt_state) for read in (ivon_jax.posterior, ivon_jax.prior))
    np.testing.assert_allclose(numbers["kl_divergence"], q.kl_divergence(p), rtol=1e-9)
    assert numbers["count"] == 1
    assert "hess_median" not in numbers
    given = {"hess_init": 1.0, "b2": 0.9, "b1": 0.9, "clip_radius": 1.0}
    assert diagnostics.measure(params, opt_state, **given).keys() < numbers.keys()
    [advice] = diagnostics.advice(numbers)
    assert advice.startswith("The noise is 3.7 times the weights")
