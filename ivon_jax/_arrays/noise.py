"""Standard normal noise: the bits of `jax.random.normal`, in one pass over memory.

They are those of `jax_threefry_partitionable`, jax's default.

For CPUs jax compiles the rounds of its Threefry hash as a loop over whole arrays, which
takes four buffers of their size and most of the time of a sample. Written out, they
fuse with all that follows, down to theta.

Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def normal(key, shape, dtype, out_sharding=None):
    """Draw what `jax.random.normal` does; large arrays of CPUs without its loop."""

    def with_loop(key):
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)

    def written_out(key):
        return _normal(jax.random.key_data(key), shape, out_sharding)

    # Small ones and vectors are biases and scales, broadcast over activations. Fused,
    # their noise would be drawn again for every activation; the loop prevents it.
    large = len(shape) > 1 and 2**14 <= math.prod(shape) < 2**32
    threefry = jax.random.key_impl(key) == "threefry2x32"
    if large and threefry and dtype == jnp.float32:
        return jax.lax.platform_dependent(key, cpu=written_out, default=with_loop)
    return with_loop(key)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, out_sharding):
    """The inverse error function of 23 uniform bits for each entry."""
    bits = _threefry(key, positions(shape, out_sharding))
    mantissa = (bits >> np.uint32(9)) | np.float32(1.0).view(np.uint32)
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1.0)
    lowest = np.nextafter(np.float32(-1.0), np.float32(0.0))
    uniform = uniform * (np.float32(1.0) - lowest) + lowest
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(lowest, uniform))


def positions(shape, out_sharding):
    """Number the entries in row-major order, modulo 2^32; devices number their own."""
    position = np.uint32(0)
    for axis, size in enumerate(shape):
        index = jax.lax.broadcasted_iota(
            jnp.uint32, shape, axis, out_sharding=out_sharding
        )
        position = position * np.uint32(size) + index
    return position


def _threefry(key, position):
    """Threefry-2x32 of the counter (0, position), its two words combined by xor."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    x, y = keys[0], position + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x ^ y
