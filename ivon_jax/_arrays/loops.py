"""Many evaluations in the memory of one: means, and maps and sums over examples."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import sharding
from .dtypes import wide, wide_dtype

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

    outputs, zeros = sharding.zeros_of(
        lambda xs: of_row(jax.tree.map(lambda x: x[0], xs)), xs, _wide
    )
    sums, _ = jax.lax.scan(step, jax.tree.map(start, zeros), xs)
    return jax.tree.map(mean, outputs, sums)


def scan_log_mean_exp(fn, xs):
    """Return log of the mean of ``exp(fn(x))``, one array, one x at a time.

    No exponential overflows, and not all of them underflow.
    """
    xs, unwrapped = _without_keys(xs)

    def step(total, x):
        return jnp.logaddexp(total, fn(unwrapped(x)).astype(total.dtype)), None

    _, zeros = sharding.zeros_of(
        lambda xs: fn(unwrapped(jax.tree.map(lambda x: x[0], xs))), xs, _wide
    )
    total, _ = jax.lax.scan(step, zeros - jnp.inf, xs)
    return total - math.log(len(jax.tree.leaves(xs)[0]))


def vmap_mean(fn, xs):
    """As `scan_mean`, all x at once: faster where one alone leaves the device idle."""

    def mean(values):
        if is_key(values):
            return jax.random.clone(values)[-1]
        if not _averaged(values):
            return values[-1]
        return jnp.mean(values, axis=0, dtype=_wide(values)).astype(values.dtype)

    return jax.tree.map(mean, jax.vmap(fn)(xs))


def mean_where(values, valid, where):
    """The mean of the `values` that count, NaN if some of these are not valid."""
    [values] = wide(values)
    values = jnp.where(valid, values, jnp.nan)
    if where is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where, dtype=values.dtype)


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
    """The next sum. What rounding takes is added next time (Kahan)."""
    total, lost = so_far
    if lost is None:
        return _Sum(total + term, None)
    term = term + lost
    new_total = total + term
    added = new_total - total
    lost = (total - (new_total - added)) + (term - added)  # exact: Knuth's two-sum
    return _Sum(new_total, jnp.where(jnp.isfinite(lost), lost, 0))


def is_key(x):
    """Whether `x` holds typed random keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _averaged(value):
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _wide(value):
    """The dtype to average `value` in."""
    return wide_dtype(value) if _averaged(value) else value.dtype


def map_examples(fn, examples, chunk_size):
    """Map `fn` over the first axes of `examples`, `chunk_size` of them at once."""
    examples = _even(examples, chunk_size)
    count, size, chunk, strided = _cut(examples, chunk_size)

    def join(x):
        return (x.swapaxes(0, 1) if strided else x).reshape(-1, *x.shape[2:])

    with sharding.set_mesh_of(examples):
        chunks = jax.lax.map(lambda j: jax.vmap(fn)(chunk(j)), jnp.arange(count))
        parts = [jax.tree.map(join, chunks)]
        if count * size < _length(examples):
            parts.append(jax.vmap(fn)(_after(count * size, examples)))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def sum_examples(fn, examples, chunk_size):
    """Sum `fn` over the first axes of `examples`, `chunk_size` of them at once.

    What rounding takes from the sum goes into the next term (Kahan): of ten million
    numbers that are added one by one, a float32 would lose per cents.
    """
    examples = _even(examples, chunk_size)
    count, size, chunk, _ = _cut(examples, chunk_size)

    def total(rows):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(fn)(rows))

    def include(j, sums):
        return jax.tree.map(
            lambda term, so_far: _plus(so_far, term), total(chunk(j)), sums
        )

    whole = count * size == _length(examples)
    with sharding.set_mesh_of(examples):
        start = total(chunk(0) if whole else _after(count * size, examples))
        sums = jax.tree.map(lambda x: _Sum(x, jnp.zeros_like(x)), start)
        sums = jax.lax.fori_loop(int(whole), count, include, sums)
    return jax.tree.map(lambda _, so_far: so_far.total, start, sums)


def _even(examples, chunk_size):
    """Examples of which a chunk has as many on each device, or all on every device.

    In the types of an explicit mesh nothing else can be said.
    """
    length = _length(examples)
    size = min(chunk_size, length)

    def even(x):
        fits = length % size == 0 and size % sharding.parts(x) == 0
        return x if fits else sharding.whole(x)

    return jax.tree.map(even, examples)


def _cut(examples, chunk_size):
    """Return how many whole chunks there are, their size, ``chunk(j)``, how it is cut.

    Where it divides the number of examples, a chunk has the rows ``j::count``, so that
    those of arrays sharded along their first axis are sharded alike: of contiguous
    rows, few of the devices would have any. Elsewhere rows are contiguous: strided ones
    of a part of the examples would take a copy of them.
    """
    length = _length(examples)
    size = min(chunk_size, length)
    count = length // size
    strided = length % size == 0
    if strided:
        examples = jax.tree.map(
            lambda x: x.reshape(size, count, *x.shape[1:]), examples
        )

    def rows(x, j):
        if strided:
            return jax.lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(x, j * size, size)

    def chunk(j):
        return jax.tree.map(lambda x: rows(x, j), examples)

    return count, size, chunk, strided


def _length(examples):
    return len(jax.tree.leaves(examples)[0])


def _after(start, examples):
    return jax.tree.map(lambda x: x[start:], examples)
