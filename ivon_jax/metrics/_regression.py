"""How good Gaussian predictions of numbers are: NLL, CRPS, coverage of intervals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from .. import _checks
from .._arrays.dtypes import wide
from .._arrays.loops import mean_where
from .._evaluation import validity


def gaussian_nll(
    mean: jax.typing.ArrayLike,
    variance: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Negative log-likelihood of targets under a Gaussian for each, in nats.

    :math:`\frac{1}{N} \sum_i \frac{1}{2} \left[\log(2 \pi v_i) + (y_i - m_i)^2 / v_i
    \right]`, with its constant, for mean :math:`m_i`, variance :math:`v_i` and target
    :math:`y_i`. Of targets that were divided by s, add log(s).

    >>> nll = gaussian_nll(jnp.zeros(2), jnp.ones(2), jnp.array([0.0, 1.0]))
    >>> print(f"{nll:.4f}")
    1.1689

    Args:
      mean: (...), of the predictions.
      variance: (...), or one number for all, positive. It holds the noise of the
        targets and the uncertainty of the mean: see
        `ivon_jax.predict_moments`.
      targets: (...), numbers.
      where: which examples count, (...); None for all.
    """
    return _gaussian_nll(*_validated(mean, variance, targets, where))


@jax.jit
def _gaussian_nll(mean, variance, targets, where):
    mean, variance, targets = _prepared(mean, variance, targets, where)
    squares = (targets - mean) ** 2 / variance
    nll = 0.5 * (math.log(2 * math.pi) + jnp.log(variance) + squares)
    return _mean(nll, variance, where)


def crps(
    mean: jax.typing.ArrayLike,
    variance: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Continuous ranked probability score of a Gaussian, in the targets' units.

    .. math::
        \mathrm{CRPS}(F, y) = \int (F(t) - [t \ge y])^2 dt = \sigma \left[
        z (2 \Phi(z) - 1) + 2 \varphi(z) - 1 / \sqrt{\pi} \right], \quad
        z = (y - m) / \sigma

    and the mean over examples. It is a proper score, the mean absolute error where
    :math:`\sigma` is zero, and an outlier costs its distance, not the distance's
    square as in the NLL.

    >>> print(f"{crps(jnp.zeros(1), jnp.ones(1), jnp.zeros(1)):.4f}")
    0.2337

    Args:
      mean: (...), of the predictions.
      variance: (...), or one number for all, positive.
      targets: (...), numbers.
      where: which examples count, (...); None for all.

    Reference:
      Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation,
      JASA 2007.
    """
    return _crps(*_validated(mean, variance, targets, where))


@jax.jit
def _crps(mean, variance, targets, where):
    mean, variance, targets = _prepared(mean, variance, targets, where)
    stddev = jnp.sqrt(variance)
    z = (targets - mean) / stddev
    density = math.sqrt(2 / math.pi) * jnp.exp(-0.5 * z**2)
    score = z * jax.lax.erf(z * math.sqrt(0.5)) + density - 1 / math.sqrt(math.pi)
    return _mean(stddev * score, variance, where)


def interval_coverage(
    mean: jax.typing.ArrayLike,
    variance: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    level: float = 0.95,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Share of targets in their central interval, which should be `level`.

    That of a Gaussian is :math:`m_i \pm z \sigma_i` with
    :math:`z = \Phi^{-1}((1 + level) / 2)`, 1.96 for 95 %. Fewer targets in it: the
    predictions are too sure. Its standard error is
    :math:`\sqrt{level (1 - level) / N}`.

    >>> targets = jnp.array([0.0, 1.0, -1.5, 3.0])
    >>> print(interval_coverage(jnp.zeros(4), jnp.ones(4), targets))
    0.75

    Args:
      mean: (...), of the predictions.
      variance: (...), or one number for all, positive.
      targets: (...), numbers.
      level: the probability of the interval, in (0, 1).
      where: which examples count, (...); None for all.
    """
    arrays = _validated(mean, variance, targets, where)
    level = _checks.number("level", level, _checks.INSIDE)
    # Of the lower tail: 1 + level would be rounded.
    return _interval_coverage(*arrays, (1 - level) / 2)


@jax.jit
def _interval_coverage(mean, variance, targets, where, tail):
    mean, variance, targets = _prepared(mean, variance, targets, where)
    z = -jax.scipy.special.ndtri(jnp.asarray(tail, variance.dtype))
    error = jnp.abs(targets - mean)
    inside = (error <= z * jnp.sqrt(variance)).astype(error.dtype)
    return _mean(jnp.where(jnp.isnan(error), jnp.nan, inside), variance, where)


def _validated(mean, variance, targets, where):
    """Checked arrays of one shape, but for one variance, and a mask or None."""
    mean = validity.real("mean", mean)
    variance = validity.real("variance", variance)
    targets = validity.real("targets", targets)
    validity.not_empty("targets", targets)
    for name, array in {"mean": mean, "variance": variance}.items():
        if array.shape != targets.shape and (name == "mean" or array.ndim):
            raise ValueError(
                f"`{name}` must have the targets' shape {targets.shape}, got "
                f"{array.shape}. Nothing is broadcast."
            )
    where = validity.which_count("where", where, targets.shape)
    arrays = mean, variance, targets, where
    least, *sizes = _checks.known(_extremes, *arrays) or (1, 0, 0)
    for name, size in zip(("mean", "targets"), sizes, strict=True):
        if not size < math.inf:
            raise ValueError(f"`{name}` must be finite, got {size}. Training diverged?")
    if not least > 0:
        raise ValueError(
            f"`variance` must be positive, got {least}. It is the square of the "
            "standard deviation, not its logarithm."
        )
    return arrays


@jax.jit
def _extremes(mean, variance, targets, where):
    """The least variance, and the largest absolute mean and target, that count."""
    mean, variance, targets = _prepared(mean, variance, targets, where)
    return jnp.min(variance), jnp.max(jnp.abs(mean)), jnp.max(jnp.abs(targets))


def _prepared(mean, variance, targets, where):
    """Arrays in float32 or wider, with harmless values where none counts."""
    mean, variance, targets = wide(mean, variance, targets)
    if where is not None:
        mean, targets = (jnp.where(where, x, 0) for x in (mean, targets))
        variance = jnp.where(where, variance, 1)
    return mean, variance, targets


def _mean(values, variance, where):
    """Return the mean over examples; NaN if a variance that counts is not positive."""
    return mean_where(values, (variance > 0) & ~jnp.isnan(values), where)
