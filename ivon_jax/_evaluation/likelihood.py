"""Log-likelihoods of class labels, one for each example."""

import jax.numpy as jnp


def is_label(outputs, labels):
    """Which of the outputs is the label's: a mask, of outputs that may be sharded."""
    classes = jnp.arange(outputs.shape[-1], dtype=labels.dtype)
    return jnp.expand_dims(classes, range(labels.ndim)) == labels[..., None]


def of_labels(probs, labels):
    """The logarithm of each label's probability; NaN for a label of no class.

    >>> print(of_labels(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, -1])))
    [ 0. nan]
    """
    chosen = is_label(probs, labels)
    own = jnp.sum(jnp.where(chosen, probs, 0), axis=-1)
    return jnp.log(jnp.where(jnp.any(chosen, axis=-1), own, jnp.nan))
