"""Errors about data: probabilities, labels, masks, examples and outputs."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._arrays.dtypes import wide, wide_dtype

SQUARED_ERROR = "lambda f, y: 0.5 * jnp.sum((f - y) ** 2)"


def probabilities(name, probs):
    """Raise unless this is an array of distributions over its last axis."""
    distributions(name, probs)
    sum_to_one(name, probs)


def logits(name, logits):
    """Raise unless this can be logits of two or more classes."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got dtype {logits.dtype}.")
    if not logits.size or logits.shape[-1:] < (2,):
        raise ValueError(
            f"`{name}` must have shape (..., num_classes), two or more classes and at "
            f"least one example, got shape {logits.shape}. For a sigmoid's logit f use "
            "two columns: `jnp.stack([jnp.zeros_like(f), f], axis=-1)`."
        )


def distributions(name, probs):
    """Raise unless type and shape are those of an array of distributions."""
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got dtype {probs.dtype}.")
    if not probs.ndim or not probs.size:
        raise ValueError(
            f"`{name}` must have shape (..., num_classes) and at least one example, "
            f"got shape {probs.shape}."
        )
    if probs.shape[-1] == 1:
        raise ValueError(
            f"`{name}` must have two or more classes in its last axis, got shape "
            f"{probs.shape}. From one sigmoid make two columns: "
            "`jnp.concatenate([1 - p, p], axis=-1)`."
        )


def sum_to_one(name, probs, where=None):
    """Raise unless values that count are distributions over the last axis."""
    least, low, high = _checks.known(_of_distributions, probs, where) or (0, 1, 1)
    if least < 0:
        raise ValueError(
            f"`{name}` must be non-negative, got {least}. Softmax the logits."
        )
    worst = high if high - 1 > 1 - low else low
    if not abs(worst - 1) <= max(1e-2, 4 * float(jnp.finfo(probs.dtype).eps)):
        raise ValueError(
            f"`{name}` must sum to one over its last axis, got a sum of {worst}. "
            + ("Training diverged?" if np.isnan(worst) else "Softmax the logits.")
        )


@jax.jit
def _of_distributions(probs, where):
    """The least probability, and the least and the greatest sum over classes."""
    total = jnp.sum(probs, axis=-1, dtype=wide_dtype(probs))
    least = jnp.min(probs, axis=-1)
    if where is not None:
        least, total = jnp.where(where, least, 0), jnp.where(where, total, 1)
    return jnp.min(least), jnp.min(total), jnp.max(total)


def which_count(name, where, shape):
    """Return a mask as an array of this shape, or None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(
            f"`{name}` must be boolean, true where an example counts, got dtype "
            f"{where.dtype}. Of weights pass `weights > 0`."
        )
    try:
        fits = np.broadcast_shapes(where.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must broadcast to shape {shape}, one boolean for each example, "
            f"got {where.shape}."
        )
    if _checks.known(_any, where) is False:
        raise ValueError(f"`{name}` must be true somewhere: no example would count.")
    return jnp.broadcast_to(where, shape)


@jax.jit
def _any(where):
    return jnp.any(where)


def integers(name, labels, remedy=""):
    """Return integers of 32 bits, or more, so that no number of classes overflows."""
    labels = jnp.asarray(_fitting(labels))
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be integers, got dtype {labels.dtype}. For one-hot labels "
            f"pass the argmax.{remedy}"
        )
    # What does not fit becomes negative.
    return labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)


def _fitting(value):
    """Integers that don't fit become the largest or least that do.

    Of NumPy's 64 bits JAX would keep the lower 32, without x64: 2**32 would be zero.
    """
    if not isinstance(value, np.ndarray) or value.dtype not in (np.int64, np.uint64):
        return value
    limits = np.iinfo(jnp.result_type(int))
    low, high = np.iinfo(value.dtype).min, np.iinfo(value.dtype).max
    return np.clip(value, max(limits.min, low), min(limits.max, high))


def as_array(value):
    """Return an array; a NumPy one of 64 bits as it is, for `integers` to see."""
    return value if isinstance(value, np.ndarray) else jnp.asarray(value)


def classes(name, y, shape, num_classes, where):
    """Return the targets of a classifier as class indices of this shape."""
    remedy = f" For regression pass `loss`, such as `{SQUARED_ERROR}`."
    y = integers(name, one_array(name, y), remedy)
    labels(name, y, shape, num_classes, where, remedy)
    return y


def labels(name, labels, shape, num_classes, where=None, remedy=""):
    """Raise unless the labels that count are class indices of this shape."""
    if labels.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {shape}, one label for each prediction, got "
            f"{labels.shape}.{remedy}"
        )
    low, high = _checks.known(_of_labels, labels, where) or (0, 0)
    if not 0 <= low <= high < num_classes:
        bad = low if low < 0 else high
        raise ValueError(
            f"`{name}` must be in 0..{num_classes - 1}, got {bad}. Say by `where` "
            f"which labels count.{remedy}"
        )


@jax.jit
def _of_labels(labels, where):
    """The least and the greatest label."""
    if where is not None:
        labels = jnp.where(where, labels, 0)
    return jnp.min(labels), jnp.max(labels)


def number_of_examples(**trees):
    """Return the one length of the first axes of all arrays in these arguments."""
    count = None
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        if not leaves:
            raise ValueError(f"`{name}` must have at least one array, got {tree!r}.")
        for path, array in leaves:
            where = f"at {name}{jax.tree_util.keystr(path)}" if path else "of it"
            if not array.shape or not array.shape[0]:
                raise ValueError(
                    f"`{name}` must have one or more examples along the first axis of "
                    f"every array, got shape {array.shape} {where}. Pass arrays, not "
                    "lists."
                )
            count = count or array.shape[0]
            if array.shape[0] != count:
                raise ValueError(
                    f"`{name}` must have {count} examples along the first axis of "
                    f"every array, as the first of `{next(iter(trees))}`, got shape "
                    f"{array.shape} {where}."
                )
    return count


def one_array(name, value):
    """Return the one array that a function must have returned."""
    if not hasattr(value, "shape"):
        raise TypeError(
            f"`{name}` must be one array, got {type(value).__name__}. Return the "
            "predictions alone."
        )
    return value


def predictions_of_one(output):
    """Return the outputs, of any number of axes, of `fn` for a batch of one."""
    one_array("fn(theta, x)", output)
    if output.ndim < 2 or output.shape[0] != 1 or not output.size:
        raise ValueError(
            "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, "
            f"got shape {output.shape} for a batch of one."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(
            f"`fn(theta, x)` must be floating-point, got dtype {output.dtype}. Return "
            "logits, not classes."
        )
    return output


def one_axis_of_outputs(shape):
    """Raise unless this is the shape of one example's outputs along one axis."""
    if len(shape) != 1:
        raise ValueError(
            "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, "
            f"got shape {(1, *shape)} for a batch of one."
        )


def outputs_of_one(output):
    """Raise unless `fn` returned one axis of outputs for a batch of one."""
    one_axis_of_outputs(predictions_of_one(output).shape[1:])


def log_likelihoods(name, output):
    """Raise unless these can be log-likelihoods, one for each example."""
    if not output.ndim or not output.size:
        raise ValueError(
            f"`{name}` must have shape (N,), a log-likelihood for each example, got "
            f"shape {output.shape}. Don't sum over examples. For classes pass `labels`."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got dtype {output.dtype}.")


def mean_and_variance(name, pair):
    """Return the mean and the variance of each target, float32 or wider."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"`{name}` must be a pair, (mean, variance) of the targets, got "
            f"{type(pair).__name__}."
        )
    mean, variance = (real(name, x) for x in pair)
    if variance.ndim and variance.shape != mean.shape:
        raise ValueError(
            f"`{name}` must have a variance for each mean, or one for all, got shapes "
            f"{mean.shape} and {variance.shape}."
        )
    mean, variance = wide(mean, variance)
    return mean, jnp.broadcast_to(variance, mean.shape)


def of_predictions(name, tree, shape):
    """Raise unless there is one target for each prediction."""
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        if array.shape[: len(shape)] != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} or more axes, a target for each "
                f"prediction, got {array.shape} at {name}"
                f"{jax.tree_util.keystr(path)}."
            )


def real(name, value):
    """Return an array of real numbers."""
    array = jnp.asarray(_fitting(as_array(value)))
    if not any(jnp.issubdtype(array.dtype, k) for k in (jnp.floating, jnp.integer)):
        raise TypeError(f"`{name}` must be real numbers, got dtype {array.dtype}.")
    return array


def scores(name, value, where=None):
    """Return numbers to rank, as floating-point ones; none that counts is NaN."""
    array = real(name, value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return _exact_floats(name, array, where)
    missing = _checks.known(_count_nan, array, where)
    if missing:
        raise ValueError(
            f"`{name}` must be numbers, got NaN for {missing} of {array.size}. "
            "Training diverged?"
        )
    return array


def _exact_floats(name, array, where):
    """Integers as floats, which keep their order up to a size."""
    floats = array.astype(float)
    largest = 2 ** (jnp.finfo(floats.dtype).nmant + 1)
    low, high = (
        _checks.known(_counted_range, array, where) if array.size else None
    ) or (0, 0)
    if not -largest <= low <= high <= largest:
        bad = low if low < -largest else high
        raise ValueError(
            f"`{name}` must be at most {largest} where they are integers, got {bad}: "
            f"{floats.dtype} does not tell larger ones apart. Rank them yourself, and "
            "pass the ranks."
        )
    return floats


@jax.jit
def _counted_range(array, where):
    return _checks.least_and_greatest(
        array if where is None else jnp.where(where, array, 0)
    )


@jax.jit
def _count_nan(array, where):
    missing = jnp.isnan(array)
    return jnp.sum(missing if where is None else missing & where)


def not_empty(name, *arrays):
    """Raise if an array is empty."""
    if not sum(array.size for array in arrays):
        raise ValueError(f"`{name}` must have at least one entry, got none.")
