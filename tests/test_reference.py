"""Algorithm 1 in float64 NumPy, written from the paper alone, against the library."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ivon_jax

STEPS = 300


class Reference:
    """Algorithm 1 of the paper for one array; the comments are its line numbers."""

    def __init__(self, m, alpha, lam, h0, beta1, beta2, delta, xi, rescale):
        self.m = np.array(m, np.float64)
        self.h = np.full_like(self.m, h0)
        self.g = np.zeros_like(self.m)
        self.sigma = 1 / np.sqrt(lam * (self.h + delta))
        self.alpha = (lambda t: (h0 + delta) * alpha(t)) if rescale else alpha
        self.lam, self.beta1, self.beta2 = lam, beta1, beta2
        self.delta, self.xi = delta, xi
        self.t = 0

    def step(self, gradient, epsilon):
        self.t += 1  # 1
        theta = self.m + self.sigma * epsilon
        g_hat = gradient(theta)  # 2
        h_hat = g_hat * (theta - self.m) / self.sigma**2  # 3
        self.g = self.beta1 * self.g + (1 - self.beta1) * g_hat  # 4
        correction = (self.h - h_hat) ** 2 / (self.h + self.delta)
        self.h = (
            self.beta2 * self.h
            + (1 - self.beta2) * h_hat
            + 0.5 * (1 - self.beta2) ** 2 * correction
        )  # 5
        g_bar = self.g / (1 - self.beta1**self.t)  # 6
        direction = (g_bar + self.delta * self.m) / (self.h + self.delta)
        if self.xi is not None:
            direction = np.clip(direction, -self.xi, self.xi)
        self.m = self.m - self.alpha(self.t) * direction  # 7
        self.sigma = 1 / np.sqrt(self.lam * (self.h + self.delta))  # 8


def gradient(theta):
    """The gradient of a bumpy bowl, whose curvature lies between -0.5 and 4.

    With steeper bumps and b2 = 0.9 the recursion itself magnifies rounding errors: two
    orders of summation in NumPy then differ by more than 1e-12.
    """
    return np.linspace(0.5, 3.0, theta.size) * theta + np.sin(theta)


def cosine(t):
    """The learning rate of the paper's step t = 1, 2, ..."""
    return 0.1 * 0.5 * (1 + np.cos(np.pi * (t - 1) / STEPS))


def cosine_schedule(count):
    """The same as an optax schedule, whose first count is 0."""
    return 0.1 * 0.5 * (1 + jnp.cos(np.pi * count.astype(float) / STEPS))


CASES = list(
    itertools.product([0.9, 0.999, 0.99999], [1e-8, 10.0], [None, 0.3], [True, False])
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("b2", "weight_decay", "clip_radius", "rescale_lr"), CASES)
def test_agrees_with_the_paper_to_1e_12(b2, weight_decay, clip_radius, rescale_lr):
    """Means, Hessians, momenta and standard deviations, after each of 300 steps."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=8)
    reference = Reference(
        start, cosine, 100.0, 0.7, 0.9, b2, weight_decay, clip_radius, rescale_lr
    )
    tx = ivon_jax.ivon(
        cosine_schedule,
        ess=100,
        hess_init=0.7,
        b1=0.9,
        b2=b2,
        weight_decay=weight_decay,
        clip_radius=clip_radius,
        rescale_lr=rescale_lr,
    )
    params = jnp.asarray(start)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(STEPS):
        epsilon = rng.normal(size=8)
        theta = params + ivon_jax.posterior(params, opt_state).stddev * epsilon
        grads = jnp.asarray(gradient(np.asarray(theta)))
        updates, opt_state = update(grads, opt_state, params, sample=theta)
        params = optax.apply_updates(params, updates)
        reference.step(gradient, epsilon)
        [state] = ivon_jax.find_states(opt_state)
        stddev = ivon_jax.posterior(params, opt_state).stddev
        for ours, theirs in [
            (params, reference.m),
            (state.hess, reference.h),
            (state.momentum, reference.g),
            (stddev, reference.sigma),
        ]:
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
