"""Small networks of ReLU layers, as lists of weights and biases."""

import itertools

import jax
import jax.numpy as jnp
import optax


def init(key, sizes):
    """Draw the weights of layers of these sizes; biases are zero."""
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return [
        {"w": draw(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, shapes, strict=True)
    ]


def apply(params, x):
    """Map inputs (..., sizes[0]) to logits (..., sizes[-1])."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def losses(params, x, labels):
    """Cross-entropy of each example."""
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss(params, x, labels):
    """Mean cross-entropy of a batch."""
    return losses(params, x, labels).mean()
