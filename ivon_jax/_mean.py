"""Means over many evaluations, in the memory of one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _sharding

# A plain sum of n terms in float32 is off by n * 6e-8 at worst: here below 1e-5.
PLAIN_TERMS = 128


class _Sum(NamedTuple):
    """A sum, and of many terms also what rounding took from it."""

    total: jax.Array
    lost: jax.Array | None


def scan_mean(fn, xs):
    """Average ``fn(x)`` over the first axis of `xs`, one x at a time.

    Floating-point leaves are averaged in float32 or wider and keep their dtype; of
    other leaves, random keys among them, the last value stays.
    """
    count = len(jax.tree.leaves(xs)[0])
    xs, unwrapped = _without_keys(xs)

    def of_row(row):
        return fn(unwrapped(row))

    def start(zero):
        return _Sum(zero, zero if _averaged(zero) and count > PLAIN_TERMS else None)

    def include(value, so_far):
        if not _averaged(value):
            return _Sum(value, None)
        return _plus(so_far, value.astype(so_far.total.dtype) / count)

    def step(sums, x):
        return jax.tree.map(include, of_row(x), sums), None

    def mean(output, result):
        total, lost = result
        total = total if lost is None else total + lost
        return total.astype(output.dtype) if _averaged(output) else total

    outputs, zeros = _sharding.zeros_of(
        lambda xs: of_row(jax.tree.map(lambda x: x[0], xs)), xs, _wide
    )
    sums, _ = jax.lax.scan(step, jax.tree.map(start, zeros), xs)
    return jax.tree.map(mean, outputs, sums)


def vmap_mean(fn, xs):
    """As `scan_mean`, all x at once: faster where one alone leaves the device idle."""

    def mean(values):
        if is_key(values):
            return jax.random.clone(values)[-1]
        if not _averaged(values):
            return values[-1]
        return jnp.mean(values, axis=0, dtype=_wide(values)).astype(values.dtype)

    return jax.tree.map(mean, jax.vmap(fn)(xs))


def _without_keys(xs):
    """`xs` with the data of random keys, and the way back to keys.

    Under `jax.vmap`, jax's checker takes a scan over keys for their second use.
    """
    impls = jax.tree.map(lambda x: jax.random.key_impl(x) if is_key(x) else "", xs)

    def wrap(x, impl):
        return jax.random.wrap_key_data(x, impl=impl) if impl else x

    data = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, xs)
    return data, lambda row: jax.tree.map(wrap, row, impls)


def _plus(so_far, term):
    """The next sum. What rounding takes, by Knuth's two-sum, is added next time."""
    total, lost = so_far
    if lost is None:
        return _Sum(total + term, None)
    term = term + lost
    new_total = total + term
    added = new_total - total
    lost = (total - (new_total - added)) + (term - added)
    return _Sum(new_total, jnp.where(jnp.isfinite(lost), lost, 0))


def is_key(x):
    """Whether `x` holds typed random keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _averaged(value):
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _wide(value):
    """The dtype to average `value` in."""
    dtype = value.dtype
    return np.promote_types(dtype, np.float32) if _averaged(value) else dtype
