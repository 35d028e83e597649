"""The metrics against plain loops over examples, scikit-learn, and hand-made cases."""

import functools
import re
import tracemalloc

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import strategies as st
from jax.experimental import checkify

from ivon_jax import metrics

METRICS = {
    "accuracy": metrics.accuracy,
    "top_3_accuracy": functools.partial(metrics.accuracy, k=3),
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


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_checks_copy_no_array_to_the_host(metric):
    """8 MB of probabilities, in the 100 kB that the first call of a function takes."""
    probs, labels = jnp.full((500_000, 4), 0.25), jnp.zeros(500_000, jnp.int32)
    metric(probs, labels)
    tracemalloc.start()
    metric(probs, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_constants_are_checked_under_jit():
    above = jnp.asarray(LABELS) + 1
    with pytest.raises(ValueError, match=r"`labels` must be in 0..6, got 7."):
        jax.jit(lambda probs: metrics.brier_score(probs, above))(PROBS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(("padding", "shape"), [(-1, (60,)), (-100, (6, 10))])
def test_what_is_masked_changes_neither_value_nor_gradient(metric, padding, shape):
    """As if it were not there, whatever it is."""
    probs, labels = predictions(0, shape)
    where = np.random.default_rng(1).uniform(size=shape) < 0.7
    expected, gradient = jax.value_and_grad(metric)(probs[where], labels[where])
    padded = np.where(where[..., None], probs, np.nan)
    labels = np.where(where, labels, padding)
    for run in (metric, jax.jit(metric)):
        result, grads = jax.value_and_grad(run)(padded, labels, where=where)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        np.testing.assert_allclose(grads[where], gradient, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(grads[~where], 0)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_what_is_masked_is_no_error_to_checkify(metric):
    """No NaN and no division by zero on the way, whatever the padding is."""
    probs, labels = predictions(0, (3,))
    where = np.array([True, True, False])
    padded = np.where(where[:, None], probs, np.nan)
    labels = jnp.asarray(np.where(where, labels, -100))
    gradient = jax.value_and_grad(lambda probs: metric(probs, labels, where=where))
    checked = checkify.checkify(gradient, errors=checkify.float_checks)
    error, _ = jax.jit(checked)(padded)
    error.throw()


def test_a_mask_broadcasts_to_the_labels():
    """Whole rows of tokens, and a mask for all batches."""
    probs, labels = predictions(0, (3, 4))
    for where in (np.array([[True], [False], [True]]), np.arange(4) < 3):
        whole = np.broadcast_to(where, labels.shape)
        expected = metrics.brier_score(probs[whole], labels[whole])
        result = metrics.brier_score(probs, labels, where=where)
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_under_jit_what_is_wrong_and_counts_is_nan(metric):
    """A label of no class, a NaN, no example at all: not a number that looks right."""
    probs, labels = predictions(0, (5,))
    run = jax.jit(metric)
    assert np.isfinite(run(probs, labels))
    for bad in (-1, -7, -100, 7, 2**31 - 1, -(2**31)):
        assert np.isnan(run(probs, labels.clip(bad, bad)))
        assert np.isnan(run(probs, np.append(labels[:4], np.int32(bad))))
    probs[1, (labels[1] + 1) % 7] = np.nan
    assert np.isnan(run(probs, labels))
    assert np.isnan(run(PROBS, LABELS, where=np.zeros(500, bool)))


INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_may_be_integers_of_any_type(dtype):
    """Of 300 classes, more than 8 bits can count."""
    probs, labels = predictions(0, (60,), 300)
    labels = labels % 128
    for name, metric in METRICS.items():
        for typed in (labels.astype(dtype), jnp.asarray(labels.astype(dtype))):
            np.testing.assert_array_equal(
                metric(probs, typed), metric(probs, labels), err_msg=name
            )


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.usefixtures("x64")
def test_the_greatest_integer_of_any_type_is_no_class(dtype):
    """Nor does it become one where it is cast."""
    probs, labels = predictions(0, (2,), 300)
    labels = np.array([labels[0], np.iinfo(dtype).max], dtype)
    result = jax.jit(metrics.brier_score)(probs, labels)
    assert np.isnan(result) == (labels[1] >= 300)


@pytest.mark.parametrize("label", [2**32, 2**32 + 1, -(2**32), 2**63 - 1])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_labels_beyond_32_bits_are_no_classes(metric, label):
    """Their lower 32 bits are."""
    message = re.escape("`labels` must be in 0..6, got ")
    with pytest.raises(ValueError, match=message):
        metric(PROBS[:2], np.array([0, label]))


@pytest.fixture(scope="module")
def millions():
    """Two classes, and probabilities that are a tenth too confident."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, size=3_000_000).astype(np.float32)
    labels = (rng.uniform(size=confidence.size) > 0.9 * confidence).astype(np.int8)
    return np.stack([confidence, 1 - confidence], axis=-1), labels


@pytest.mark.slow
def test_sums_over_millions_of_examples_are_exact(millions):
    """To 1e-6 of double precision, which adding one by one in float32 is not."""
    probs, labels = millions
    confidence, own = probs[:, 0], np.where(labels == 0, *probs.T).astype(np.float64)
    gaps = (labels == 0).astype(np.float64) - confidence
    expected = {
        "accuracy": np.mean(labels == 0),
        "negative_log_likelihood": -np.log(own).mean(),
        "brier_score": 2 * np.mean((1 - own) ** 2),
    }
    for name, value in expected.items():
        result = METRICS[name](probs, labels)
        np.testing.assert_allclose(result, value, rtol=1e-6, err_msg=name)
    result = metrics.expected_calibration_error(probs, labels, num_bins=1)
    np.testing.assert_allclose(result, np.abs(gaps.mean()), rtol=1e-6)
    result = metrics.accuracy(probs, labels, where=confidence > 0.6)
    expected = np.mean(labels[confidence > 0.6] == 0)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


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
    (PROBS, np.eye(7)[LABELS], TypeError, "For one-hot labels pass the argmax."),
    (PROBS, LABELS - 1, ValueError, "Say by `where` which labels count."),
    (
        PROBS[:, :1],
        LABELS,
        ValueError,
        "must have two or more classes in its last axis,",
    ),
    (PROBS[:, :1], LABELS, ValueError, "`jnp.concatenate([1 - p, p], axis=-1)`."),
]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(("probs", "labels", "error", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_named(metric, probs, labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        metric(probs, labels)


BAD_MASKS = [
    (np.ones(500), TypeError, "`where` must be boolean, true where an example counts,"),
    (LABELS, TypeError, "got dtype int32. Of weights pass `weights > 0`."),
    (LABELS[:3] > 0, ValueError, "`where` must broadcast to shape (500,), one boolean"),
    (LABELS[:, None] > 0, ValueError, "for each example, got (500, 1)."),
    (LABELS < 0, ValueError, "`where` must be true somewhere: no example would count."),
]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(("where", "error", "message"), BAD_MASKS)
def test_masks_that_do_not_fit_are_named(metric, where, error, message):
    with pytest.raises(error, match=re.escape(message)):
        metric(PROBS, LABELS, where=where)


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


def sklearn_out_of_distribution(in_scores, out_scores):
    """The same five from scikit-learn, in double precision."""
    scores = np.concatenate([np.ravel(in_scores), np.ravel(out_scores)]).astype(float)
    is_in = np.arange(scores.size) < np.size(in_scores)
    fpr, tpr, _ = sklearn.metrics.roc_curve(is_in, scores, drop_intermediate=False)
    return {
        "fpr_at_95_tpr": fpr[np.argmax(tpr >= 0.95)],
        "detection_error": np.min(1 - tpr + fpr) / 2,
        "auroc": sklearn.metrics.roc_auc_score(is_in, scores),
        "aupr_in": sklearn.metrics.average_precision_score(is_in, scores),
        "aupr_out": sklearn.metrics.average_precision_score(~is_in, -scores),
    }


def assert_agrees_with_sklearn(in_scores, out_scores, rtol=2e-6):
    result = metrics.out_of_distribution(in_scores, out_scores)
    expected = sklearn_out_of_distribution(in_scores, out_scores)
    assert list(result) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol, rtol, err_msg=name)


TIED = st.sampled_from(np.float32([-2, -0.0, 0.0, 0.25, 0.5, 1]))
DISTINCT = st.floats(-1, 1, width=32, allow_subnormal=False)


@pytest.mark.parametrize("elements", [TIED, DISTINCT], ids=["tied", "distinct"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 7), (20, 1), (20, 20), (41, 30)])
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_out_of_distribution_agrees_with_sklearn(sizes, elements, data):
    in_scores, out_scores = (
        data.draw(hypothesis.extra.numpy.arrays(np.float32, size, elements=elements))
        for size in sizes
    )
    assert_agrees_with_sklearn(in_scores, out_scores)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("decimals", [2, 7])
def test_out_of_distribution_of_confidences_agrees_with_sklearn(seed, decimals):
    """With and without ties among 5,000 scores."""
    rng = np.random.default_rng(seed)
    in_scores, out_scores = (
        np.round(rng.beta(a, 2, size=size), decimals).astype(np.float32)
        for a, size in [(6, (40, 50)), (3, (3, 10, 100))]
    )
    assert_agrees_with_sklearn(in_scores, out_scores)


@pytest.mark.parametrize("size", [1, 19, 20, 21, 39, 40, 41, 100, 999, 1000, 2020])
def test_a_true_positive_rate_of_19_in_20_is_at_least_95_percent(size):
    """At the first of k true positives with 20 k >= 19 n, k - 1 scores are between."""
    in_scores = np.arange(size, dtype=np.float32)
    first = next(k for k in range(size + 1) if 20 * k >= 19 * size)
    result = metrics.out_of_distribution(in_scores, in_scores + 0.5)
    np.testing.assert_allclose(result["fpr_at_95_tpr"], first / size, rtol=1e-6)


@pytest.mark.parametrize(
    ("in_scores", "out_scores", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0, 1.0, 0.0], [0, 0, 1, 1, 1]),
        ([0.0, 0.0], [1.0, 1.0], [1, 0.5, 0, 0.5, 0.5]),
        ([0.5, 0.5, 0.5], [0.5], [1, 0.5, 0.5, 0.75, 0.25]),
        ([np.inf, 0.0], [-np.inf, -np.inf], [0, 0, 1, 1, 1]),
    ],
    ids=["separated", "reversed", "equal", "infinite"],
)
def test_out_of_distribution_of_extreme_scores(in_scores, out_scores, expected):
    """Exactly."""
    result = metrics.out_of_distribution(np.array(in_scores), np.array(out_scores))
    assert [float(value) for value in result.values()] == expected


def test_out_of_distribution_works_under_jit_and_vmap():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, size=(2, 4, 30)).astype(np.float32)
    result = jax.jit(jax.vmap(metrics.out_of_distribution))(*scores)
    for i, pair in enumerate(zip(*scores, strict=True)):
        expected = metrics.out_of_distribution(*pair)
        for name, value in expected.items():
            np.testing.assert_allclose(result[name][i], value, rtol=1e-6)


def test_masked_scores_are_as_if_they_were_not_there():
    """Also where others are infinite, and where the masked ones are NaN."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, size=(2, 50)).astype(np.float32)
    scores[:, :3], scores[:, 3:5] = np.inf, -np.inf
    where = rng.uniform(size=(2, 50)) < 0.5
    expected = metrics.out_of_distribution(
        *(x[w] for x, w in zip(scores, where, strict=True))
    )
    masks = dict(zip(("in_where", "out_where"), where, strict=True))
    for fill in (np.nan, np.inf, -np.inf, 4.0):
        filled = np.where(where, scores, np.float32(fill))
        for run in (metrics.out_of_distribution, jax.jit(metrics.out_of_distribution)):
            result = run(*filled, **masks)
            for name, value in expected.items():
                np.testing.assert_allclose(result[name], value, rtol=1e-6)


@pytest.mark.parametrize("name", ["in_where", "out_where"])
def test_masks_of_scores_are_checked_and_without_a_score_nan(name):
    none = {name: np.zeros(5, bool)}
    with pytest.raises(ValueError, match=f"`{name}` must be true somewhere"):
        metrics.out_of_distribution(SCORES, SCORES, **none)
    result = jax.jit(metrics.out_of_distribution)(SCORES, SCORES, **none)
    assert np.isnan(list(result.values())).all()


@pytest.mark.parametrize("which", [0, 1])
def test_under_jit_scores_that_are_nan_give_nan(which):
    scores = [SCORES, SCORES]
    scores[which] = np.where(SCORES > 0, SCORES, np.nan)
    result = jax.jit(metrics.out_of_distribution)(*scores)
    assert np.isnan(list(result.values())).all()


@pytest.mark.parametrize(
    "dtypes",
    [
        (jnp.bfloat16, jnp.float16),
        (jnp.float16, jnp.float32),
        (jnp.int32, jnp.bfloat16),
        (jnp.int8, jnp.uint8),
    ],
)
def test_scores_of_any_real_dtypes_are_compared_in_float32(dtypes):
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 9, size=30).astype(np.float32) for _ in dtypes]
    arrays = [jnp.asarray(s, dtype) for s, dtype in zip(scores, dtypes, strict=True)]
    result = metrics.out_of_distribution(*arrays)
    assert {value.dtype for value in result.values()} == {jnp.dtype("float32")}
    assert_agrees_with_sklearn(*scores)
    for name, value in metrics.out_of_distribution(*scores).items():
        assert result[name] == value


def test_integers_that_floats_cannot_tell_apart_are_refused_where_they_count():
    scores, where = np.array([2**40, 5]), np.array([False, True])
    with pytest.raises(ValueError, match="`out_scores` must be at most 16777216 where"):
        metrics.out_of_distribution(scores % 7, scores)
    result = metrics.out_of_distribution(np.array([3, 4]), scores, out_where=where)
    assert result["auroc"] == 0.0


@pytest.mark.usefixtures("x64")
def test_double_precision_scores_stay_so():
    """Apart by less than float32 can tell."""
    in_scores, out_scores = 1 - np.array([1e-10, 3e-10]), 1 - np.array([2e-10, 4e-10])
    assert_agrees_with_sklearn(in_scores, out_scores, rtol=1e-15)
    result = metrics.out_of_distribution(in_scores, out_scores)
    assert result["auroc"].dtype == jnp.float64
    assert result["auroc"] == 0.75


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtypes", [(np.float32, float), (float, np.float32)])
def test_scores_of_two_precisions_are_compared_in_the_wider(dtypes):
    """In float32 they would be tied."""
    in_scores, out_scores = (np.ones(1, dtype) for dtype in dtypes)
    if out_scores.dtype == np.float64:
        out_scores -= 1e-10
    else:
        in_scores += 1e-10
    assert metrics.out_of_distribution(in_scores, out_scores)["auroc"] == 1


def test_scores_may_be_numbers():
    """One in-domain example and one other."""
    assert metrics.out_of_distribution(0.9, 0.5)["auroc"] == 1


SCORES = np.linspace(0, 1, 5, dtype=np.float32)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (SCORES[:0], ValueError, "`{}` must have at least one entry, got none."),
        (SCORES * 1j, TypeError, "`{}` must be real numbers, got dtype complex64."),
        (SCORES > 0, TypeError, "`{}` must be real numbers, got dtype bool."),
        (
            np.where(SCORES > 0, SCORES, np.nan),
            ValueError,
            "`{}` must be numbers, got NaN for 1 of 5. Tr",
        ),
    ],
    ids=["empty", "complex", "boolean", "nan"],
)
def test_scores_are_real_numbers(bad, error, message):
    with pytest.raises(error, match=re.escape(message.format("in_scores"))):
        metrics.out_of_distribution(bad, SCORES)
    with pytest.raises(error, match=re.escape(message.format("out_scores"))):
        metrics.out_of_distribution(SCORES, bad)
