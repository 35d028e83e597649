"""Means over many evaluations, in the memory of one."""

import jax
import jax.numpy as jnp
import numpy as np


def scan_mean(fn, xs):
    """Average ``fn(x)`` over the first axis of `xs`, one x at a time.

    Floating-point leaves are averaged in float32 or wider and keep their dtype; of
    other leaves the last value stays.
    """

    def step(means, numbered):
        number, x = numbered
        return jax.tree.map(lambda m, v: _include(m, v, number), means, fn(x)), None

    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(fn, first)
    means = jax.tree.map(lambda s: jnp.zeros_like(s, dtype=_wide(s.dtype)), shapes)
    numbers = jnp.arange(1, 1 + len(jax.tree.leaves(xs)[0]))
    means, _ = jax.lax.scan(step, means, (numbers, xs))
    return jax.tree.map(lambda m, s: m.astype(s.dtype), means, shapes)


def vmap_mean(fn, xs):
    """As `scan_mean`, all x at once: faster where one alone leaves the device idle."""

    def mean(values):
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values[-1]
        return jnp.mean(values, axis=0, dtype=_wide(values.dtype)).astype(values.dtype)

    return jax.tree.map(mean, jax.vmap(fn)(xs))


def _include(mean, value, number):
    """The mean of `number` values, from the mean of all but the last and the last."""
    if not jnp.issubdtype(mean.dtype, jnp.inexact):
        return value
    return mean + (value.astype(mean.dtype) - mean) / number.astype(mean.dtype)


def _wide(dtype):
    """The dtype to average `dtype` in."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return np.promote_types(dtype, np.float32) if inexact else dtype
