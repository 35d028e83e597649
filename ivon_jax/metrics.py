r"""How good are predicted class probabilities: accuracy, NLL, Brier score, calibration.

These take ``probs`` of shape (..., C), probabilities of C classes, and integer
``labels`` of shape (...) in 0..C-1, as JAX or NumPy arrays, and return a scalar: the
mean over all N examples. :math:`p_{ic}` is example i's probability of class c,
:math:`y_i` its label. `out_of_distribution` is the exception: it takes two sets of
scores. All work under ``jit``; there, values go unchecked.

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


def out_of_distribution(
    in_scores: jax.typing.ArrayLike, out_scores: jax.typing.ArrayLike
) -> dict[str, jax.Array]:
    r"""Measure how well scores tell in-domain from out-of-domain examples.

    A threshold t takes an example for in-domain, the positive class, if its score is at
    least t. Of n in-domain scores s and m out-of-domain scores s',

    .. math::
        TPR(t) = |\{s \ge t\}| / n, \qquad FPR(t) = |\{s' \ge t\}| / m.

    Counts are exact integers, and tied scores share a threshold, as in scikit-learn.
    Scores are compared in float32 (or wider, with x64 on), where confidences that are
    closer than 6e-8 are tied.

    >>> result = out_of_distribution(jnp.array([0.9, 0.8, 0.6]), jnp.array([0.7, 0.5]))
    >>> for name, value in result.items():
    ...     print(name, round(float(value), 3))
    fpr_at_95_tpr 0.5
    detection_error 0.167
    auroc 0.833
    aupr_in 0.917
    aupr_out 0.833

    Args:
      in_scores: real, of any shape; a higher score means in-domain. The usual score is
        the confidence, an example's largest probability.
      out_scores: the same score of out-of-domain examples, of any shape.

    Returns:
      A dictionary of scalars in [0, 1]:

      * "fpr_at_95_tpr": FPR at the highest threshold where TPR is at least 0.95. The
        paper's Table 3 cannot be compared with it: its script averages FPR over all
        thresholds up to that one, and reports 0.148 where the truth is 0.458 (at an
        AUROC of 0.89).
      * "detection_error": the least :math:`(1 - TPR(t) + FPR(t)) / 2` of any threshold,
        the probability of a mistake with equal priors. Liang et al. define it at the
        threshold of 95 % TPR, as the paper's text does: that is
        :math:`(1 - 0.95 + FPR) / 2`, never below this one and mostly above it. The
        values of the paper's Table 3 are the least of any threshold.
      * "auroc": the area under TPR over FPR, which is the probability that an in-domain
        score is above an out-of-domain one, ties counted half.
      * "aupr_in", "aupr_out": average precision, the step-wise area under precision
        over recall, with in-domain and with out-of-domain as the positive class.

    Raises:
      TypeError, ValueError: scores are empty, NaN or no real numbers.

    Reference: Liang et al., Enhancing the Reliability of Out-of-distribution Image
    Detection in Neural Networks, ICLR 2018.
    """
    inside, outside = _sorted_scores(in_scores, out_scores)
    n, m, dtype = inside.size, outside.size, inside.dtype

    def share(count, total):
        return count.astype(dtype) / jnp.asarray(total, dtype)

    tp, fp = _at_least(inside, inside), _at_least(outside, inside)
    out_at_most, in_at_most = _at_most(outside, outside), _at_most(inside, outside)
    beaten = (m - fp) + _at_most(outside, inside)  # ties once, wins twice
    return {
        # No more than n // 20 scores may lie below: exactly TPR >= 19 / 20.
        "fpr_at_95_tpr": share(fp[n // 20], m),
        "detection_error": jnp.min(share(n - tp, n) + share(fp, m)) / 2,
        "auroc": jnp.mean(share(beaten, 2 * m)),
        "aupr_in": jnp.mean(share(tp, tp + fp)),
        "aupr_out": jnp.mean(share(out_at_most, out_at_most + in_at_most)),
    }


def _at_least(scores, thresholds):
    """How many of the sorted `scores` are at or above each threshold."""
    return scores.size - jnp.searchsorted(scores, thresholds, side="left")


def _at_most(scores, thresholds):
    """How many of the sorted `scores` are at or below each threshold."""
    return jnp.searchsorted(scores, thresholds, side="right")


def _sorted_scores(in_scores, out_scores):
    """Checked scores, flat, in one dtype, float32 or wider, from low to high."""
    scores = {"in_scores": in_scores, "out_scores": out_scores}
    first, second = (_checks.scores(name, x) for name, x in scores.items())
    for name, array in zip(scores, (first, second), strict=True):
        _checks.not_empty(name, array)
    dtype = np.promote_types(np.promote_types(np.float32, first.dtype), second.dtype)
    return (jnp.sort(x.astype(dtype), axis=None) for x in (first, second))


def _validated(probs, labels):
    """Checked arrays; probabilities in float32 or wider."""
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    _checks.probabilities("probs", probs)
    _checks.labels("labels", labels, probs)
    return probs.astype(np.promote_types(probs.dtype, jnp.float32)), labels
