r"""How good are predicted class probabilities: accuracy, NLL, Brier score, calibration.

These take ``probs`` of shape (..., C), probabilities of C classes, and integer
``labels`` of shape (...) in 0..C-1, as JAX or NumPy arrays, and return a scalar: the
mean over all N examples. :math:`p_{ic}` is example i's probability of class c,
:math:`y_i` its label. `out_of_distribution` is the exception: it takes two sets of
scores.

``where``, booleans that broadcast to the labels' shape, says which examples count: the
mean is over those. The others, padding, may have any label, such as -1 or -100, and
any probabilities, NaN among them.

All work under ``jit``. There, values go unchecked: a label out of range or a NaN that
counts makes the result NaN, as does a mask without any example. Elsewhere each raises
TypeError or ValueError for arguments that do not fit: shapes, labels that are no
integers or out of range, probabilities that are negative or do not sum to one.

Reference: Snoek et al., Can You Trust Your Model's Uncertainty?, NeurIPS 2019, whose
metrics the paper uses (appendix C.3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._arrays import sharding
from ._arrays.dtypes import wide, wide_dtype
from ._evaluation import validity


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
    return _mean(_is_among(k, probs, offsets), valid, where)


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
    return -_mean(jnp.log(_of_label(probs, offsets)), valid, where)


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
    return _mean(jnp.sum(error**2, axis=-1), valid, where)


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
        return _mean(jnp.where(inside, correct - confidence, 0), valid, where)

    return jnp.sum(jnp.abs(jax.lax.map(share, (lows, highs))))


def out_of_distribution(
    in_scores: jax.typing.ArrayLike,
    out_scores: jax.typing.ArrayLike,
    *,
    in_where: jax.typing.ArrayLike | None = None,
    out_where: jax.typing.ArrayLike | None = None,
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
      in_where: which in-domain scores count, booleans that broadcast to their shape;
        None for all. The others may be anything.
      out_where: the same for out-of-domain scores.

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
    inside = _scores("in_scores", in_scores, "in_where", in_where)
    outside = _scores("out_scores", out_scores, "out_where", out_where)
    names = "fpr_at_95_tpr", "detection_error", "auroc", "aupr_in", "aupr_out"
    return dict(zip(names, _out_of_distribution(inside, outside), strict=True))


@jax.jit
def _out_of_distribution(inside, outside):
    dtype = wide_dtype(inside[0], outside[0])
    (inside, n), (outside, m) = (_sorted(dtype, *x) for x in (inside, outside))

    def share(count, total):
        return count.astype(dtype) / jnp.asarray(total, dtype)

    # Masked scores are at the end; as thresholds they don't count.
    is_in, is_out = (
        jnp.arange(x.size, dtype=jnp.int32) < c for x, c in ((inside, n), (outside, m))
    )
    tp, fp = _at_least(inside, n, inside), _at_least(outside, m, inside)
    out_at_most, in_at_most = (
        _at_most(outside, m, outside),
        _at_most(inside, n, outside),
    )
    beaten = (m - fp) + _at_most(outside, m, inside)  # ties once, wins twice
    mistakes = share(n - tp, n) + share(fp, m)
    result = (
        # No more than n // 20 scores may lie below: exactly TPR >= 19 / 20.
        share(fp[n // 20], m),
        jnp.min(mistakes, where=is_in, initial=2.0) / 2,
        jnp.mean(share(beaten, m), where=is_in) / 2,
        jnp.mean(share(tp, tp + fp), where=is_in),
        jnp.mean(share(out_at_most, out_at_most + in_at_most), where=is_out),
    )
    some = (n > 0) & (m > 0) & ~jnp.isnan(inside[-1]) & ~jnp.isnan(outside[-1])
    return [jnp.where(some, x, jnp.nan) for x in result]


def _sorted(dtype, scores, where):
    """Scores from low to high, those that don't count as if infinite; their number."""
    scores = scores.astype(dtype)
    if where is None:
        count = scores.size
    else:
        scores, count = (
            jnp.where(where, scores, jnp.inf),
            jnp.sum(where, dtype=jnp.int32),
        )
    return jnp.sort(sharding.whole(scores), axis=None), count


def _at_least(scores, count, thresholds):
    """How many of `count` sorted `scores` are at or above each threshold."""
    return count - jnp.searchsorted(scores, thresholds, side="left")


def _at_most(scores, count, thresholds):
    """How many of `count` sorted `scores` are at or below each threshold."""
    return jnp.minimum(jnp.searchsorted(scores, thresholds, side="right"), count)


def _scores(name, scores, where_name, where):
    """Checked scores, and a whole mask of them or None."""
    scores = validity.as_array(scores)
    validity.not_empty(name, scores)
    where = validity.which_count(where_name, where, scores.shape)
    return validity.scores(name, scores, where), where


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
    """Whether each label is among the k most probable classes."""
    own = _of_label(probs, offsets)[..., None]
    ahead = (probs > own) | ((probs == own) & (offsets < 0))
    return jnp.sum(ahead, axis=-1) < k


def _mean(values, valid, where):
    """The mean of what counts, NaN if some of it is not valid."""
    [values] = wide(values)
    values = jnp.where(valid, values, jnp.nan)
    if where is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where, dtype=values.dtype)
