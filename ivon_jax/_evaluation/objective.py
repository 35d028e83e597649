"""What IVON maximises, so that runs and settings can be compared by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .._arrays.dtypes import wide
from .._distributions.gaussian import Posterior
from .samples import mean_over_samples


def evidence_lower_bound(
    loss_fn: Callable[..., jax.Array],
    posterior: Posterior,
    prior: Posterior,
    key: jax.Array,
    *,
    ess: jax.typing.ArrayLike,
    num_samples: int = 64,
    args: tuple[Any, ...] = (),
) -> jax.Array:
    r"""Estimate the evidence lower bound, in nats, of the data set: minus Eq. 1.

    .. math::
        -\mathcal{L}(q) = -\lambda E_q[\bar\ell(\theta)] - KL(q \| p)

    Where :math:`\bar\ell` is a mean negative log-likelihood, with all its constants,
    and :math:`\lambda` the number of examples, this is at most the log marginal
    likelihood of the data, :math:`\log p(D)`, by the divergence from `posterior` to the
    exact one: the higher, the better the posterior, and the model. With another
    :math:`\lambda` it is what IVON maximises all the same.

    The expectation is a mean over samples, one at a time; its standard error is
    ``ess`` times the loss's standard deviation over samples / sqrt(num_samples).

    >>> q = Posterior(mean=jnp.ones(2), precision=jnp.ones(2))
    >>> prior = Posterior(mean=jnp.zeros(2), precision=jnp.ones(2))
    >>> def loss_fn(theta):
    ...     return 0.5 + 0.0 * theta.sum()
    >>> key = jax.random.key(0)
    >>> print(evidence_lower_bound(loss_fn, q, prior, key, ess=100))
    -51.0

    Args:
      loss_fn: ``loss_fn(theta, *args)``, the mean loss per example of the data set, in
        nats, a scalar. That of a random batch makes the estimate noisier, not biased.
      posterior: what `ivon_jax.posterior` returns.
      prior: a Gaussian over the same tree; IVON's own is
        ``ivon_jax.prior(params, opt_state)``. Under a flat one (``weight_decay=0``) the
        bound is minus infinity.
      key: a JAX random key. The same key gives the same samples.
      ess: :math:`\lambda`, as given to `ivon`.
      num_samples: how many samples to average over.
      args: what `loss_fn` takes after theta; see `predict`.

    Returns:
      A scalar, float32 or wider. Divide it by `ess` for nats per example.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range, or the
        loss is not a scalar.

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
      Eq. 1; with ``ess`` the number of examples it is the standard evidence lower bound
      (appendix A).
    """
    ess = _checks.positive("ess", ess)
    _checks.distribution("posterior", posterior, "kl_divergence")
    _checks.distribution("prior", prior, "kl_divergence")

    _checks.function("loss_fn", loss_fn)

    def loss(theta, *args):
        return _checks.scalar_loss(loss_fn(theta, *args))

    expected = mean_over_samples(loss, posterior, key, num_samples, args, of=loss_fn)
    divergence = posterior.kl_divergence(prior)
    expected, divergence = wide(expected, divergence)
    ess = jnp.asarray(ess, expected.dtype)
    return -(ess * expected + divergence)
