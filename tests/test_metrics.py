"""The metrics against plain loops over examples, scikit-learn, and hand-made cases."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from ivon_jax import metrics

METRICS = {
    "accuracy": metrics.accuracy,
    "top_3_accuracy": lambda probs, labels: metrics.accuracy(probs, labels, k=3),
    "negative_log_likelihood": metrics.negative_log_likelihood,
    "brier_score": metrics.brier_score,
    "expected_calibration_error": metrics.expected_calibration_error,
}


def predictions(seed, shape=(500,), num_classes=7):
    """Random probabilities, from flat to nearly one, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.gamma(1.0, size=(*shape, 1)) * rng.normal(size=(*shape, num_classes))
    probs = np.exp(3 * logits) / np.exp(3 * logits).sum(-1, keepdims=True)
    uniform = rng.uniform(size=(*shape, 1))
    labels = (probs.cumsum(-1) < uniform).sum(-1).clip(max=num_classes - 1)
    return probs.astype(np.float32), labels.astype(np.int32)


def loop_expected_calibration_error(probs, labels, num_bins):
    """The definition, bin by bin, interval by interval."""
    confidence, correct = probs.max(-1), probs.argmax(-1) == labels
    error = 0.0
    for i in range(num_bins):
        low, high = np.float32(i / num_bins), np.float32((i + 1) / num_bins)
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean(dtype=np.float64)
            error += inside.mean() * abs(gap)
    return error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_agree_with_their_definitions(seed):
    probs, labels = predictions(seed)
    rows = np.arange(len(labels))
    one_hot = np.eye(7)[labels]
    expected = {
        "accuracy": np.mean(probs.argmax(1) == labels),
        "top_3_accuracy": sklearn.metrics.top_k_accuracy_score(labels, probs, k=3),
        "negative_log_likelihood": -np.log(
            probs[rows, labels], dtype=np.float64
        ).mean(),
        "brier_score": np.sum((probs - one_hot) ** 2, axis=1).mean(),
        "expected_calibration_error": loop_expected_calibration_error(
            probs, labels, 20
        ),
    }
    for name, metric in METRICS.items():
        np.testing.assert_allclose(metric(probs, labels), expected[name], rtol=1e-5)


@pytest.mark.parametrize("num_bins", [1, 5, 15, 20, 100])
def test_calibration_error_has_the_bins_it_is_asked_for(num_bins):
    probs, labels = predictions(0)
    result = metrics.expected_calibration_error(probs, labels, num_bins)
    expected = loop_expected_calibration_error(probs, labels, num_bins)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("edge", range(11, 20))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(edge):
    """Right and wrong there cancel against the bin below, not the one above."""
    confidence = np.float32(edge / 20)
    inside = np.float32((edge - 0.5) / 20)
    probs = np.stack([[confidence, 1 - confidence], [inside, 1 - inside]])
    labels = np.array([0, 1])
    expected = abs(1 - confidence - inside) / 2
    result = metrics.expected_calibration_error(probs, labels)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_perfect_and_worst_predictions_have_the_best_and_worst_scores():
    probs, labels = np.eye(3, dtype=np.float32), np.arange(3)
    wrong = np.roll(probs, 1, axis=1)
    for name, best, worst in [
        ("accuracy", 1, 0),
        ("negative_log_likelihood", 0, np.inf),
        ("brier_score", 0, 2),
        ("expected_calibration_error", 0, 1),
    ]:
        assert METRICS[name](probs, labels) == best
        assert METRICS[name](wrong, labels) == worst


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_leading_axes_are_all_examples(metric):
    """(4, 5, C) is (20, C)."""
    probs, labels = predictions(0, (4, 5))
    flat = metric(probs.reshape(20, -1), labels.reshape(20))
    np.testing.assert_allclose(metric(probs, labels), flat, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_work_under_jit(metric):
    probs, labels = predictions(0)
    expected = metric(probs, labels)
    np.testing.assert_allclose(jax.jit(metric)(probs, labels), expected, rtol=1e-6)
    closed_over = jnp.asarray(labels)
    result = jax.jit(lambda probs: metric(probs, closed_over))(probs)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_probabilities_are_averaged_in_float32(metric, dtype):
    probs, labels = predictions(0)
    low = jnp.asarray(probs, dtype)
    result = metric(low, labels)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, metric(low.astype(jnp.float32), labels))


def test_a_tie_goes_to_the_lower_class():
    """A constant prediction is not right about everything."""
    probs, labels = np.full((4, 4), 0.25, np.float32), np.arange(4)
    assert metrics.accuracy(probs, labels) == 0.25
    assert metrics.accuracy(probs, labels, k=2) == 0.5


PROBS, LABELS = predictions(0)
BAD_ARRAYS = [
    (PROBS.astype(int), LABELS, TypeError, "`probs` must be floating-point, got"),
    (np.float32(0.5), 0, ValueError, "`probs` must have shape (..., num_classes)"),
    (PROBS[:0], LABELS[:0], ValueError, "at least one example, got shape (0, 7)."),
    (PROBS, LABELS.astype(float), TypeError, "`labels` must be integers, got dtype"),
    (PROBS, LABELS[:3], ValueError, "`labels` must have shape (500,)"),
    (PROBS, LABELS[:, None], ValueError, "got (500, 1)."),
    (PROBS, LABELS - 1, ValueError, "`labels` must be in 0..6, got -1."),
    (PROBS, LABELS + 1, ValueError, "`labels` must be in 0..6, got 7."),
    (2 * PROBS, LABELS, ValueError, "`probs` must sum to one over its last axis, got"),
    (np.log(PROBS), LABELS, ValueError, "`probs` must be non-negative, got -"),
    (np.nan * PROBS, LABELS, ValueError, "got a sum of nan. Training diverged?"),
    (PROBS, np.eye(7)[LABELS], TypeError, "Of one-hot labels pass the argmax."),
]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(("probs", "labels", "error", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_named(metric, probs, labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        metric(probs, labels)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (0, ValueError, "`k` must be in 1..7, got 0."),
        (8, ValueError, "`k` must be in 1..7, got 8."),
        (1.0, TypeError, "`k` must be an integer, got 1.0."),
    ],
)
def test_k_is_a_number_of_classes(bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        metrics.accuracy(PROBS, LABELS, k=bad)


def test_the_number_of_bins_is_positive():
    message = "`num_bins` must be at least 1, got 0."
    with pytest.raises(ValueError, match=re.escape(message)):
        metrics.expected_calibration_error(PROBS, LABELS, num_bins=0)
