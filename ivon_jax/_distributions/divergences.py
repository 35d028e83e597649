r"""Divergences, entropies and densities of Gaussians, one array at a time, in nats.

Means and precisions differ by many orders of magnitude, or hardly at all: in float32,
a posterior may be :math:`10^{12}` times as narrow as its prior, or almost equal to it.
No difference below is one of large, nearly equal numbers.
"""

import math

import jax.numpy as jnp

from .._arrays.dtypes import wide


def log_density(x, mean, precision):
    r"""Sum of :math:`[\log(s / 2\pi) - s (x - m)^2] / 2`, s the precision."""
    x, mean, precision = wide(x, mean, precision)
    shift = x - mean
    # In this order the square of a tiny or a huge shift is in range.
    distance = precision * shift * shift
    return 0.5 * jnp.sum(_log_ratio(precision, 2 * math.pi) - distance)


def entropy(precision):
    r"""Sum of :math:`-\log(s / 2 \pi e) / 2`."""
    [precision] = wide(precision)
    return -0.5 * jnp.sum(_log_ratio(precision, 2 * math.pi * math.e))


def kl_divergence(mean, precision, prior_mean, prior_precision):
    r"""Sum of :math:`[\rho - 1 - \log \rho + s_p (m_q - m_p)^2] / 2`, rho = s_p / s_q.

    >>> print(kl_divergence(jnp.zeros(1), jnp.full(1, 1e9), jnp.zeros(1), jnp.ones(1)))
    9.861633
    """
    mean, precision, prior_mean, prior_precision = wide(
        mean, precision, prior_mean, prior_precision
    )
    shift = mean - prior_mean
    distance = prior_precision * shift * shift
    return 0.5 * jnp.sum(_of_variances(precision, prior_precision) + distance)


def _of_variances(precision, prior_precision):
    r""":math:`\rho - 1 - \log \rho` for the ratio of two precisions; NaN for others."""
    excess = (prior_precision - precision) / precision
    # The ratio itself might underflow where the posterior is narrow.
    half_log = jnp.log(jnp.sqrt(prior_precision) / jnp.sqrt(precision))
    # log rho = 2 (u + u^3 / 3 + u^5 / 5 + ...), and rho - 1 - 2 u = (rho - 1) u.
    u = excess / (2.0 + excess)
    series = jnp.zeros_like(u)
    for power in range(25, 1, -2):
        series = series * u**2 + 1.0 / power
    near = excess * u - 2.0 * series * u**3
    return jnp.where(jnp.abs(half_log) < 0.2, near, excess - 2.0 * half_log)


def _log_ratio(x, constant):
    """``log(x / constant)``, also where that is nearly zero."""
    high = x.dtype.type(constant)
    excess = ((x - high) - x.dtype.type(constant - float(high))) / high
    return log_near_one(x / high, excess)


def log_near_one(ratio, excess):
    """``log(ratio)``, from its exact excess over one where that is small."""
    near = jnp.abs(excess) < 0.5
    return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), jnp.log(ratio))
