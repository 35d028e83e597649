"""Functions of one example over many, in the memory of a chunk of them."""

import jax
import jax.numpy as jnp

from . import _sharding


def map_examples(fn, examples, chunk_size):
    """Map `fn` over the first axes of `examples`, `chunk_size` of them at once."""
    count, size, chunk, strided = _cut(examples, chunk_size)

    def join(x):
        return (x.swapaxes(0, 1) if strided else x).reshape(-1, *x.shape[2:])

    chunks = jax.lax.map(lambda j: jax.vmap(fn)(chunk(j)), jnp.arange(count))
    parts = [jax.tree.map(join, chunks)]
    if count * size < _length(examples):
        parts.append(jax.vmap(fn)(_after(count * size, examples)))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def sum_examples(fn, examples, chunk_size):
    """Sum `fn` over the first axes of `examples`, `chunk_size` of them at once."""
    count, size, chunk, _ = _cut(examples, chunk_size)

    def total(rows):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(fn)(rows))

    def include(j, sums):
        return jax.tree.map(jnp.add, sums, total(chunk(j)))

    if count * size < _length(examples):
        start = total(_after(count * size, examples))
    else:
        _, start = _sharding.zeros_of(lambda _: total(chunk(0)), None)
    return jax.lax.fori_loop(0, count, include, start)


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
