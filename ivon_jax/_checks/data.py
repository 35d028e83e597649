"""Data and functions of it: probabilities, labels, examples, outputs, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .scalars import extremes, known


def probabilities(name, probs):
    """Reject what is no array of distributions over its last axis."""
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got dtype {probs.dtype}.")
    if not probs.ndim or not probs.size:
        raise ValueError(
            f"`{name}` must have shape (..., num_classes) and at least one example, "
            f"got shape {probs.shape}."
        )
    least, low, high = known(_of_distributions, probs) or (0, 1, 1)
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
def _of_distributions(probs):
    """The least probability, and the least and the greatest sum over classes."""
    total = jnp.sum(probs, axis=-1, dtype=np.promote_types(probs.dtype, np.float32))
    return jnp.min(probs), jnp.min(total), jnp.max(total)


def labels(name, labels, probs):
    """Reject what are no class indices for `probs`."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be integers, got dtype {labels.dtype}. Of one-hot labels "
            "pass the argmax."
        )
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"`{name}` must have shape {probs.shape[:-1]}, one label for each row of "
            f"`probs`, got {labels.shape}."
        )
    num_classes = probs.shape[-1]
    low, high = extremes(labels) or (0, 0)
    if not 0 <= low <= high < num_classes:
        bad = low if low < 0 else high
        raise ValueError(f"`{name}` must be in 0..{num_classes - 1}, got {bad}.")


def labels_of_examples(name, y, count, num_classes):
    """Reject what are no class indices, one for each of `count` examples."""
    one_array(name, y)
    if jnp.issubdtype(y.dtype, jnp.integer) and y.shape != (count,):
        raise ValueError(
            f"`{name}` must have shape {(count,)}, one label for each example, got "
            f"{y.shape}."
        )
    labels(name, y, jax.ShapeDtypeStruct((count, num_classes), jnp.float32))


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


def outputs_of_one(output):
    """Return the number of outputs, of what `fn` returned for a batch of one."""
    one_array("fn(theta, x)", output)
    if output.ndim != 2 or output.shape[0] != 1 or not output.shape[1]:
        raise ValueError(
            "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, "
            f"got shape {output.shape} for a batch of one."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(
            f"`fn(theta, x)` must be floating-point, got dtype {output.dtype}. Return "
            "logits, not classes."
        )
    return output.shape[1]


def scores(name, value):
    """Return numbers to rank, as floating-point ones."""
    array = jnp.asarray(value)
    if not any(jnp.issubdtype(array.dtype, k) for k in (jnp.floating, jnp.integer)):
        raise TypeError(f"`{name}` must be real numbers, got dtype {array.dtype}.")
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(float)
    missing = known(_count_nan, array)
    if missing:
        raise ValueError(
            f"`{name}` must be numbers, got NaN for {missing} of {array.size}. "
            "Training diverged?"
        )
    return array


@jax.jit
def _count_nan(array):
    return jnp.sum(jnp.isnan(array))


def not_empty(name, *arrays):
    """Reject arrays without a single entry."""
    if not sum(array.size for array in arrays):
        raise ValueError(f"`{name}` must have at least one entry, got none.")


def scalar_loss(value, has_aux):
    """Reject a loss to which no gradient, or not that of the mean, belongs."""
    if has_aux and not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            "`loss_fn` must return (loss, aux) with has_aux=True, got "
            f"{type(value).__name__}."
        )
    loss = value[0] if has_aux else value
    if isinstance(loss, (tuple, list, dict)):
        raise TypeError(
            f"`loss_fn` must return a scalar, got {type(loss).__name__}. Pass "
            "`has_aux=True` if it returns (loss, aux)."
        )
    if jnp.shape(loss) != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean loss per example, got shape "
            f"{jnp.shape(loss)}. Take its mean."
        )


def one_loss(value):
    """Return a loss that is a scalar and nothing else."""
    if isinstance(value, (tuple, list, dict)):
        raise TypeError(
            "`loss_fn` must return a scalar, the mean loss per example, got "
            f"{type(value).__name__}. Drop what it returns besides."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean loss per example, got shape "
            f"{jnp.shape(value)}. Take its mean."
        )
    return value


def loss_of_example(value):
    """Reject a loss that is no scalar for one example."""
    if jnp.shape(one_array("loss(outputs, y)", value)) != ():
        raise ValueError(
            "`loss(outputs, y)` must be a scalar, the loss of one example, got shape "
            f"{value.shape}. Sum it over the outputs."
        )


def stateless(name, transform, params):
    """Reject what is no optax transformation, or one that would need its state kept."""
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax transformation, such as "
            f"`optax.clip_by_global_norm(1.0)`, got {transform!r}."
        )
    state = jax.eval_shape(transform.init, params)
    if jax.tree.leaves(state):
        raise ValueError(
            f"`{name}` must be stateless, got one with the state {state}. Chain it "
            "before `ivon_jax.ivon` instead."
        )
