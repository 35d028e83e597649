"""Predict with the posterior."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._mean import scan_mean
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
      TypeError, ValueError: `num_samples` is not a positive integer, or `posterior`
        has no samples.
    """
    _checks.integer_between("num_samples", num_samples, 1)
    _checks.posterior_to_sample(posterior)

    def outputs(sample_key):
        return jax.tree.map(_at_least_float32, fn(posterior.sample(sample_key)))

    return scan_mean(outputs, jax.random.split(key, num_samples))


def _at_least_float32(x):
    """`x` in a dtype that can hold a mean."""
    x = jnp.asarray(x)
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return x.astype(np.promote_types(x.dtype, np.float32) if inexact else jnp.float32)
