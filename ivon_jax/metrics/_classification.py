"""How good class probabilities are: accuracy, NLL, Brier score, calibration."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._arrays.dtypes import wide
from .._arrays.loops import mean_where
from .._evaluation import validity


def accuracy(
    probs: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    k: int = 1,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Share of examples whose label is among the `k` most probable classes.

    Ties go to the lower class, as in ``jnp.argmax``.

    >>> probs, labels = jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), jnp.array([0, 1])
    >>> print(accuracy(probs, labels), accuracy(probs, labels, k=2))
    0.5 1.0

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
      k: how many classes count, 1 to C. The paper's "Top-5 Acc." has 5.
      where: which examples count, (...); None for all.
    """
    arrays = _validated(probs, labels, where)
    _checks.integer_between("k", k, 1, arrays[0].shape[-1])
    return _accuracy(*arrays, k)


@functools.partial(jax.jit, static_argnames="k")
def _accuracy(probs, labels, where, k):
    probs, offsets, valid = _prepared(probs, labels, where)
    return mean_where(_is_among(k, probs, offsets), valid, where)


def negative_log_likelihood(
    probs: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Negative log-likelihood :math:`-\frac{1}{N} \sum_i \log p_{i y_i}`, in nats.

    It is infinite if a label has probability zero, as float32 gives below 1e-45.

    >>> print(negative_log_likelihood(jnp.array([[0.5, 0.5]]), jnp.array([0])).round(4))
    0.6931

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
      where: which examples count, (...); None for all.
    """
    return _negative_log_likelihood(*_validated(probs, labels, where))


@jax.jit
def _negative_log_likelihood(probs, labels, where):
    probs, offsets, valid = _prepared(probs, labels, where)
    return -mean_where(jnp.log(_of_label(probs, offsets)), valid, where)


def brier_score(
    probs: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Brier score :math:`\frac{1}{N} \sum_i \sum_c (p_{ic} - [c = y_i])^2`, in [0, 2].

    The sum over classes, not their mean: for two classes it is twice
    ``sklearn.metrics.brier_score_loss``.

    >>> print(brier_score(jnp.array([[0.5, 0.5]]), jnp.array([0])))
    0.5

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
      where: which examples count, (...); None for all.
    """
    return _brier_score(*_validated(probs, labels, where))


@jax.jit
def _brier_score(probs, labels, where):
    probs, offsets, valid = _prepared(probs, labels, where)
    error = probs - (offsets == 0).astype(probs.dtype)
    return mean_where(jnp.sum(error**2, axis=-1), valid, where)


def expected_calibration_error(
    probs: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    num_bins: int = 20,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Expected calibration error :math:`\sum_b \frac{n_b}{N} |acc_b - conf_b|`.

    An example's confidence is its largest probability. Bin b of B holds the
    :math:`n_b` examples with confidence in :math:`(b/B, (b+1)/B]`; :math:`acc_b` is the
    share of them classified correctly, :math:`conf_b` their mean confidence. Zero is
    perfect, one the worst.

    >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> print(expected_calibration_error(probs, jnp.array([0, 1])))
    0.25

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
      num_bins: B; the paper uses 20.
      where: which examples count, (...); None for all.
    """
    arrays = _validated(probs, labels, where)
    _checks.integer_between("num_bins", num_bins, 1)
    return _expected_calibration_error(*arrays, num_bins)


@functools.partial(jax.jit, static_argnames="num_bins")
def _expected_calibration_error(probs, labels, where, num_bins):
    probs, offsets, valid = _prepared(probs, labels, where)
    confidence = jnp.max(probs, axis=-1)
    correct = _is_among(1, probs, offsets).astype(probs.dtype)
    edges = np.arange(1, num_bins) / num_bins
    lows = jnp.asarray([-np.inf, *edges], probs.dtype)
    highs = jnp.asarray([*edges, np.inf], probs.dtype)

    # A bin after the other: a scattered sum would add an example after the other, and
    # lose 5 % of five million.
    def share(bounds):
        low, high = bounds
        inside = (confidence > low) & (confidence <= high)
        return mean_where(jnp.where(inside, correct - confidence, 0), valid, where)

    return jnp.sum(jnp.abs(jax.lax.map(share, (lows, highs))))


def _validated(probs, labels, where):
    """Checked arrays: labels of 32 bits or more, and a whole mask or None."""
    probs, labels = jnp.asarray(probs), validity.integers("labels", labels)
    validity.distributions("probs", probs)
    where = validity.which_count("where", where, probs.shape[:-1])
    validity.labels("labels", labels, probs.shape[:-1], probs.shape[-1], where)
    validity.sum_to_one("probs", probs, where)
    return probs, labels, where


def _prepared(probs, labels, where):
    """Return float32 probabilities, each class minus the label, and what is valid."""
    num_classes = probs.shape[-1]
    [probs] = wide(probs)
    if where is not None:
        probs = jnp.where(where[..., None], probs, 1)
        labels = jnp.where(where, labels, 0)
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    offsets = jnp.expand_dims(classes, range(labels.ndim)) - labels[..., None]
    valid = (labels >= 0) & (labels < num_classes)
    return probs, offsets, valid & ~jnp.isnan(jnp.sum(probs, axis=-1))


def _of_label(probs, offsets):
    """The probability of each label: a sum, which may be sharded over classes."""
    return jnp.sum(jnp.where(offsets == 0, probs, 0), axis=-1)


def _is_among(k, probs, offsets):
    """Return whether each label is among the k most probable classes."""
    own = _of_label(probs, offsets)[..., None]
    ahead = (probs > own) | ((probs == own) & (offsets < 0))
    return jnp.sum(ahead, axis=-1) < k
