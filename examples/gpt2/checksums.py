"""Checksums of arrays, on any mesh and larger than the memory, and of records."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def checksum(state):
    """Return the sum of hashes of all entries and places: the same on any mesh."""
    total = jnp.zeros([], jnp.uint32)
    for number, x in enumerate(jax.tree.leaves(state)):
        bits = _bits(x)
        place = jnp.full(bits.shape, number, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * np.uint32(size % 2**32) + along
        total += jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)
    return total


def _bits(x):
    """The bits of an array, as uint32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype != bool:
        widths = {1: jnp.uint8, 2: jnp.uint16}
        unsigned = widths.get(x.dtype.itemsize, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, unsigned)
    return x.astype(jnp.uint32)


def _mixed(x):
    """Hash uint32 one to one: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def describe(arrays):
    """Tell one list of arrays from any other; they may be larger than the memory."""
    count, crc = 0, 0
    for array in map(np.ascontiguousarray, arrays):
        count += len(array)
        crc = zlib.crc32(f"{array.dtype}{array.shape}".encode(), crc)
        crc = zlib.crc32(array, crc)
    return f"{count} entries of CRC-32 {crc:08x}"


def checksum_of_record(record):
    """Return the CRC-32 of a record, as JSON."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
