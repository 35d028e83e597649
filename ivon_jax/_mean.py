"""Means over many evaluations, in the memory of one."""

import jax
import jax.numpy as jnp
import numpy as np


def scan_mean(fn, xs):
    """Average ``fn(x)`` over the first axis of `xs`, one x at a time.

    Floating-point leaves are averaged in float32 or wider and keep their dtype; of
    other leaves the last value stays.
    """
    count = len(jax.tree.leaves(xs)[0])

    def include(total, value):
        if not _averaged(value):
            return value
        return total + value.astype(total.dtype) / count

    def step(totals, x):
        return jax.tree.map(include, totals, fn(x)), None

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros_like(s, dtype=_wide(s)), shapes)
    totals, _ = jax.lax.scan(step, zeros, xs)
    return jax.tree.map(lambda total, s: total.astype(s.dtype), totals, shapes)


def vmap_mean(fn, xs):
    """As `scan_mean`, all x at once: faster where one alone leaves the device idle."""

    def mean(values):
        if not _averaged(values):
            return values[-1]
        return jnp.mean(values, axis=0, dtype=_wide(values)).astype(values.dtype)

    return jax.tree.map(mean, jax.vmap(fn)(xs))


def _averaged(value):
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _wide(value):
    """The dtype to average `value` in."""
    dtype = value.dtype
    return np.promote_types(dtype, np.float32) if _averaged(value) else dtype
