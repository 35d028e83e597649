"""Predict with the posterior."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._posterior import Posterior


def predict(
    fn: Callable[[optax.Params], Any],
    posterior: Posterior,
    key: jax.Array,
    num_samples: int = 64,
) -> Any:
    r"""Average `fn` over the posterior: :math:`\frac{1}{S} \sum_s f(\theta_s)`.

    With class probabilities for `fn` this is the Bayesian model average, the predictive
    distribution. Average probabilities, not logits. A scan keeps one sample and one
    running mean, so memory does not grow with `num_samples`.

    >>> q = Posterior(mean=jnp.zeros(()), precision=jnp.full((), 1e-2))
    >>> key = jax.random.key(0)
    >>> print(predict(lambda theta: theta > 0, q, key, num_samples=1000).round(1))
    0.5

    Args:
      fn: a pure function of the parameters, returning any pytree of arrays. Close over
        the inputs: ``lambda theta: jax.nn.softmax(apply(theta, x))``.
      posterior: what `ivon_jax.posterior` returns.
      key: a JAX random key. The same key gives the same samples, whatever `fn` is.
      num_samples: :math:`S`. The paper uses 64; the error falls as one over its root.

    Returns:
      A tree with the structure and shapes of ``fn(theta)``, in float32 or wider.

    Raises:
      TypeError, ValueError: `num_samples` is not a positive integer.
    """
    _checks.integer_between("num_samples", num_samples, 1)

    def average(mean, numbered_key):
        number, sample_key = numbered_key
        value = fn(posterior.sample(sample_key))
        return jax.tree.map(lambda m, v: _running_mean(m, v, number), mean, value), None

    shapes = jax.eval_shape(lambda: fn(posterior.sample(key)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _mean_dtype(s.dtype)), shapes)
    numbers = jnp.arange(1, num_samples + 1)
    keys = jax.random.split(key, num_samples)
    mean, _ = jax.lax.scan(average, zeros, (numbers, keys))
    return mean


def _running_mean(mean, value, number):
    """The mean of `number` values, from the mean of all but the last."""
    return mean + (value.astype(mean.dtype) - mean) / number.astype(mean.dtype)


def _mean_dtype(dtype):
    """float32 or wider, and complex for complex."""
    floating = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    return np.promote_types(floating, jnp.float32)
