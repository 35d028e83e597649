"""Functions of one example over many, in the memory of a chunk of them."""

import jax
import jax.numpy as jnp

from . import _sharding


def map_examples(fn, examples, chunk_size):
    """Map `fn` over the first axes of `examples`, `chunk_size` of them at once."""
    examples = _even(examples, chunk_size)
    count, size, chunk, strided = _cut(examples, chunk_size)

    def join(x):
        return (x.swapaxes(0, 1) if strided else x).reshape(-1, *x.shape[2:])

    with _sharding.set_mesh_of(examples):
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

    def include(j, carry):
        sums, lost = carry
        terms = jax.tree.map(jnp.add, total(chunk(j)), lost)
        new_sums = jax.tree.map(jnp.add, sums, terms)
        return new_sums, jax.tree.map(_rounded, sums, terms, new_sums)

    whole = count * size == _length(examples)
    with _sharding.set_mesh_of(examples):
        start = total(chunk(0) if whole else _after(count * size, examples))
        carry = start, jax.tree.map(jnp.zeros_like, start)
        sums, _ = jax.lax.fori_loop(int(whole), count, include, carry)
    return sums


def _rounded(a, b, total):
    """What rounding took from ``total = a + b``, exactly (Knuth's two-sum)."""
    of_b = total - a
    rounded = (a - (total - of_b)) + (b - of_b)
    return jnp.where(jnp.isfinite(total), rounded, 0)  # not infinity minus infinity


def _even(examples, chunk_size):
    """Examples of which a chunk has as many on each device, or all on every device.

    In the types of an explicit mesh nothing else can be said.
    """
    length = _length(examples)
    size = min(chunk_size, length)

    def even(x):
        fits = length % size == 0 and size % _sharding.parts(x) == 0
        return x if fits else _sharding.whole(x)

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
