r"""How good are predicted class probabilities: accuracy, NLL, Brier score, calibration.

Every metric takes ``probs`` of shape (..., C), probabilities of C classes, and integer
``labels`` of shape (...) in 0..C-1, as JAX or NumPy arrays, and returns a scalar: the
mean over all N examples. :math:`p_{ic}` is example i's probability of class c,
:math:`y_i` its label. All work under ``jit``; there, values go unchecked.

Each raises TypeError or ValueError for arguments that do not fit: shapes, labels that
are no integers or out of range, probabilities that are negative or do not sum to one.

Reference: Snoek et al., Can You Trust Your Model's Uncertainty?, NeurIPS 2019, whose
metrics the paper uses (appendix C.3).
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks


def accuracy(
    probs: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, k: int = 1
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
    """
    probs, labels = _validated(probs, labels)
    _checks.integer_between("k", k, 1, probs.shape[-1])
    _, top = jax.lax.top_k(probs, k)
    correct = jnp.any(top == labels[..., None], axis=-1)
    return jnp.mean(correct.astype(probs.dtype))


def negative_log_likelihood(
    probs: jax.typing.ArrayLike, labels: jax.typing.ArrayLike
) -> jax.Array:
    r"""Negative log-likelihood :math:`-\frac{1}{N} \sum_i \log p_{i y_i}`, in nats.

    It is infinite if a label has probability zero, as float32 gives below 1e-45.

    >>> print(negative_log_likelihood(jnp.array([[0.5, 0.5]]), jnp.array([0])).round(4))
    0.6931

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
    """
    probs, labels = _validated(probs, labels)
    likelihood = jnp.take_along_axis(probs, labels[..., None], axis=-1)
    return -jnp.mean(jnp.log(likelihood))


def brier_score(probs: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> jax.Array:
    r"""Brier score :math:`\frac{1}{N} \sum_i \sum_c (p_{ic} - [c = y_i])^2`, in [0, 2].

    The sum over classes, not their mean: for two classes it is twice
    ``sklearn.metrics.brier_score_loss``.

    >>> print(brier_score(jnp.array([[0.5, 0.5]]), jnp.array([0])))
    0.5

    Args:
      probs: (..., C), probabilities.
      labels: (...), integers in 0..C-1.
    """
    probs, labels = _validated(probs, labels)
    error = probs - jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    return jnp.mean(jnp.sum(error**2, axis=-1))


def expected_calibration_error(
    probs: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, num_bins: int = 20
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
    """
    probs, labels = _validated(probs, labels)
    _checks.integer_between("num_bins", num_bins, 1)
    confidence = jnp.max(probs, axis=-1).ravel()
    correct = (jnp.argmax(probs, axis=-1) == labels).ravel()
    edges = jnp.asarray(np.arange(1, num_bins) / num_bins, probs.dtype)
    bins = jnp.searchsorted(edges, confidence, side="left")
    gaps = correct.astype(probs.dtype) - confidence
    return jnp.sum(jnp.abs(jax.ops.segment_sum(gaps, bins, num_bins))) / gaps.size


def _validated(probs, labels):
    """Checked arrays; probabilities in float32 or wider."""
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    _checks.probabilities("probs", probs)
    _checks.labels("labels", labels, probs)
    return probs.astype(np.promote_types(probs.dtype, jnp.float32)), labels
