"""Order statistics over all entries of several arrays: no sort, no copy, no gathering.

They are found by bisection, in as many passes over memory as a number has bits. Counts
are exact beyond 2^31, where one int32 does not hold them: they are pairs of base 2^16.
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import sharding
from .noise import positions

_BASE = 2**16
_LARGEST = 2**31  # entries of one part, which an int32 can count


def lower_median(arrays):
    """The lower median of arrays of one floating-point dtype; NaN if any entry is."""
    parts = [part for x in arrays for part in _parts(x)]
    half = divmod((sum(x.size for x in arrays) + 1) // 2, _BASE)
    _, bound = _smallest_with(parts, half)
    entries = [jnp.max(jnp.where(x <= bound, x, -jnp.inf)) for x in parts if x.size]
    entry = jnp.max(jnp.stack(entries))
    nan = jnp.any(jnp.stack([jnp.any(jnp.isnan(x)) for x in arrays]))
    return jnp.where(nan, jnp.nan, entry)


def without_lowest(arrays, count):
    """Masks of all but the `count` lowest entries, a pair; of equal ones the first."""
    parts = [part for x in arrays for part in _parts(x)]
    below, bound = _smallest_with(parts, count)

    def tied(x):
        return (x <= bound) & ~(x <= below)

    high, low = _counts([x <= below for x in parts])
    ties = jnp.stack([jnp.sum(tied(x), dtype=jnp.int32) for x in parts])
    left = count[0] - high, count[1] - low
    ends = iter(_positions_with(parts, tied, _shares(ties, left)))

    def kept(part):
        first = _positions(part) < next(ends).astype(jnp.uint32)
        return ~((part <= below) | (tied(part) & first))

    return [_by_parts(kept, x) for x in arrays]


def pair(number):
    """An integer, or a traced float that is one, as a pair."""
    if isinstance(number, int):
        return divmod(number, _BASE)
    high = jnp.floor(number / _BASE)
    return high.astype(jnp.int32), (number - high * _BASE).astype(jnp.int32)


def _smallest_with(parts, count):
    """The smallest float with `count` entries at or below it, and the one before."""
    dtype = parts[0].dtype
    integer = jnp.dtype(f"int{8 * dtype.itemsize}")
    top, normal = (
        np.array(x, dtype).view(integer)[()] for x in (np.inf, np.finfo(dtype).tiny)
    )

    def enough(value):
        high, low = _counts([x <= value for x in parts])
        return (high > count[0]) | ((high == count[0]) & (low >= count[1]))

    def value_of(order):
        """Magnitudes are ordered as their bits."""
        magnitude = jax.lax.bitcast_convert_type(jnp.abs(order), dtype)
        # Some devices take denormals for zeros, or do so in some programs.
        magnitude = jnp.where(jnp.abs(order) < normal, 0.0, magnitude)
        return jnp.where(order < 0, -magnitude, magnitude)

    bounds = jnp.asarray(-top), jnp.asarray(top)
    order = _bisected(lambda order: enough(value_of(order)), *bounds)
    return value_of(order - 1), value_of(order)


def _bisected(enough, low, high):
    """The smallest integers where `enough` is true, those of `high` being so."""

    def halve(bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the sum might overflow
        is_enough = enough(middle)
        return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

    return jax.lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, (low, high))[1]


def _counts(masks):
    """How many entries are true, as a pair."""
    counts = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks])
    return _carried(*(jnp.sum(c, dtype=jnp.int32) for c in _pairs(counts)))


def _pairs(counts):
    return counts // _BASE, counts % _BASE


def _carried(high, low):
    return high + low // _BASE, low % _BASE


def _shares(ties, left):
    """How many of each part's `ties` are among the first `left`, a pair."""
    # Less the ties of the parts before.
    high, low = _carried(
        *(
            rest - (jnp.cumsum(own, dtype=jnp.int32) - own)
            for rest, own in zip(left, _pairs(ties), strict=True)
        )
    )
    limit = _LARGEST // _BASE
    some = jnp.clip(high, -1, limit - 1) * _BASE + low
    return jnp.where(high < limit, jnp.clip(some, 0, ties), ties)


def _positions_with(parts, tied, counts):
    """For each part the first position with so many `tied` entries before it."""

    def enough(ends):
        before = [
            jnp.sum(tied(x) & (_positions(x) < end), dtype=jnp.int32)
            for x, end in zip(parts, ends.astype(jnp.uint32), strict=True)
        ]
        return jnp.stack(before) >= counts

    sizes = jnp.asarray([x.size for x in parts], jnp.int32)
    return _bisected(enough, jnp.zeros_like(sizes), sizes)


def _positions(x):
    return positions(x.shape, sharding.in_type(x))


def _parts(x):
    """`x`, cut into parts of fewer than 2^31 entries, in row-major order."""
    if x.size < _LARGEST:
        return [x]
    return [part for half in _halves(x)[0] for part in _parts(half)]


def _by_parts(fn, x):
    """Map an elementwise function over the parts of `x`."""
    if x.size < _LARGEST:
        return fn(x)
    halves, axis = _halves(x)
    return jnp.concatenate([_by_parts(fn, half) for half in halves], axis)


def _halves(x):
    """`x` in two, and along which axis."""
    axis = next(i for i, size in enumerate(x.shape) if size > 1)
    half = x.shape[axis] // 2
    cuts = (0, half), (half, x.shape[axis])
    return [jax.lax.slice_in_dim(x, *cut, axis=axis) for cut in cuts], axis
