"""How well scores rank examples: in-domain above others, right above wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .._arrays import sharding
from .._arrays.dtypes import wide, wide_dtype
from .._evaluation import validity


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
    """Count the sorted `scores` that are at or above each threshold."""
    return count - jnp.searchsorted(scores, thresholds, side="left")


def _at_most(scores, count, thresholds):
    """Count the sorted `scores` that are at or below each threshold."""
    return jnp.minimum(jnp.searchsorted(scores, thresholds, side="right"), count)


def _scores(name, scores, where_name, where):
    """Checked scores, and a whole mask of them or None."""
    scores = validity.as_array(scores)
    validity.not_empty(name, scores)
    where = validity.which_count(where_name, where, scores.shape)
    return validity.scores(name, scores, where), where


def risk_coverage(
    scores: jax.typing.ArrayLike,
    errors: jax.typing.ArrayLike,
    *,
    max_risk: jax.typing.ArrayLike = 0.05,
    where: jax.typing.ArrayLike | None = None,
) -> dict[str, jax.Array]:
    r"""Measure how well scores tell which predictions to trust: selective prediction.

    The model answers for the k examples with the highest scores and abstains for the
    rest. Its coverage is then :math:`k / N`, its risk :math:`r_k` the mean error of
    those k. Examples with tied scores are in no order: within a tie the risk is the
    expectation over all orders, so that no order of the examples changes a result.

    >>> confidence = jnp.array([0.9, 0.8, 0.7, 0.6])
    >>> wrong = jnp.array([False, False, True, False])
    >>> result = risk_coverage(confidence, wrong)
    >>> print(result["coverage"], [f"{risk:.2f}" for risk in result["risk"]])
    [0.25 0.5  0.75 1.  ] ['0.00', '0.00', '0.33', '0.25']
    >>> print(f"{result['aurc']:.3f} {result['coverage_at_risk']:.3f}")
    0.146 0.500

    Args:
      scores: real, of any shape; a higher score means more sure. Such as the largest
        probability, or minus an uncertainty.
      errors: of the same shape: whether a prediction is wrong, ``probs.argmax(-1) !=
        labels``, or any loss.
      max_risk: for "coverage_at_risk", a number, or an array of several.
      where: which examples count, booleans that broadcast to the scores' shape; None
        for all.

    Returns:
      A dictionary:

      * "coverage" and "risk": (N,), the curve, :math:`k / N` and :math:`r_k` for k in
        1..N. What does not count by `where` repeats the last point, at the end.
      * "aurc": the area under it, :math:`\frac{1}{N} \sum_k r_k`. Lower is better.
      * "e_aurc": less that of the best order, which has the least errors first.
      * "coverage_at_risk": the largest coverage with a risk of at most `max_risk`, at
        a threshold of the scores, which splits no tie; 0 where there is none. It has
        the shape of `max_risk`.

    Raises:
      TypeError, ValueError: scores or errors are empty, NaN, no real numbers, or of
        different shapes.

    Reference:
      Geifman et al., Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers,
      ICLR 2019.
    """
    scores, where = _scores("scores", scores, "where", where)
    losses = _errors(errors, jnp.shape(scores), where)
    return _risk_coverage(scores, losses, where, validity.real("max_risk", max_risk))


@jax.jit
def _risk_coverage(scores, errors, where, max_risk):
    [errors] = wide(errors)
    if where is None:
        where = jnp.ones_like(scores, bool)
    scores, errors, where = (
        jnp.ravel(sharding.whole(x)) for x in (scores, errors, where)
    )
    [scores] = wide(scores)
    scores, errors = jnp.where(where, scores, 0), jnp.where(where, errors, 0)
    count = jnp.sum(where, dtype=jnp.int32)
    total, ends = _selected(scores, errors, where)
    _, least_first, _ = jax.lax.sort((~where, errors, errors), num_keys=2)

    position = jnp.arange(1, scores.size + 1, dtype=jnp.int32)
    covered = jnp.minimum(position, count)
    size = covered.astype(errors.dtype)
    counts = position <= count
    risk, best = total / size, jnp.cumsum(least_first) / size
    coverage = size / jnp.asarray(count, errors.dtype)
    aurc, least = (jnp.mean(x, where=counts) for x in (risk, best))
    thresholds = jnp.where(ends & counts, risk, jnp.inf)

    def at_risk(limit):
        return jnp.max(jnp.where(thresholds <= limit, coverage, 0))

    limits = jnp.ravel(max_risk).astype(errors.dtype)
    result = {
        "coverage": coverage,
        "risk": risk,
        "aurc": aurc,
        "e_aurc": aurc - least,
        "coverage_at_risk": jax.lax.map(at_risk, limits).reshape(max_risk.shape),
    }
    valid = (count > 0) & ~jnp.any(jnp.isnan(scores) | jnp.isnan(errors))
    return {name: jnp.where(valid, x, jnp.nan) for name, x in result.items()}


def _errors(errors, shape, where):
    """Checked errors, as floating-point numbers of this shape."""
    errors = validity.as_array(errors)
    if errors.shape != shape:
        raise ValueError(
            f"`errors` must have the scores' shape {shape}, got {errors.shape}."
        )
    if errors.dtype == bool:
        return jnp.asarray(errors).astype(float)
    return validity.scores("errors", errors, where)


def _selected(scores, errors, where):
    """The expected sum of the k first errors, for each k, and where a tie ends.

    In the order of falling scores, with what doesn't count at the end.
    """
    last, scores, errors = jax.lax.sort((~where, -scores, errors), num_keys=2)
    changes = (scores[1:] != scores[:-1]) | (last[1:] != last[:-1])
    true = jnp.ones(1, bool)
    starts = jnp.concatenate([true, changes])
    ends = jnp.concatenate([changes, true])
    position = jnp.arange(scores.size, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(starts, position, 0))
    end = jax.lax.cummin(jnp.where(ends, position + 1, scores.size), reverse=True)
    sums = jnp.concatenate([jnp.zeros(1, errors.dtype), jnp.cumsum(errors)])
    share = (position + 1 - first) / (end - first)
    before, after = sums[first], sums[end]
    return before + share.astype(errors.dtype) * (after - before), ends
