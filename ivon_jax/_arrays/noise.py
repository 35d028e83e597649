r"""Standard normal noise in one pass over memory: a short hash, a cheap quantile.

The normal quantile of a uniform :math:`x \in (-1, 1)` is :math:`x \sqrt{Q(w)}` with
:math:`w = -\log(1 - x^2)`. Q grows from :math:`\pi / 2` nearly as :math:`2 w`, so a
polynomial of degree 8 has it to a relative 6.4e-5: noise is right to 3.2e-5 of itself,
its variance to 1e-5. The erf_inv of `jax.random.normal` (Giles, 2011) has two such
polynomials and log1p.

Threefry with 13 rounds is the shortest that passes BigCrush (Salmon et al.). jax has
20, and for CPUs compiles them as a loop over whole arrays, which takes four buffers of
their size. Written out, they fuse with all that follows, down to theta.

References: Giles, Approximating the erfinv Function, GPU Computing Gems, 2011; Salmon
et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from .sharding import in_type

ROUNDS = 13
_ROTATIONS = 13, 15, 26, 6, 17, 29, 16, 24
_PARITY = np.uint32(0x1BD11BDA)
# Q of the least relative error over 0 <= w <= 16; w^0 first.
_SQUARED_SLOPE = (
    1.57089648,
    0.822091078,
    0.147479513,
    0.00531408462,
    -0.00448634262,
    0.000644954614,
    -4.5508788e-05,
    1.63672801e-06,
    -2.3951671e-08,
)


def normal_like(key, x, dtype):
    """Draw standard normal numbers in the shape of `x`; a device draws its own part.

    On explicit meshes they have the sharding of `x`. Without, every device would draw
    the noise of all.
    """
    return normal(key, x.shape, dtype, out_sharding=in_type(x))


def normal(key, shape, dtype, out_sharding=None):
    """Draw standard normal numbers, the same on every mesh; float64 is jax's."""
    if dtype != jnp.float32:
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
    size = math.prod(shape)
    small = len(shape) < 2 or size < 2**15
    threefry2x32 = jax.random.key_impl(key) == "threefry2x32"
    if threefry2x32 and not small and size < 2**32:
        return quantile(_bits(jax.random.key_data(key), shape, out_sharding))
    bits = jax.random.bits(key, shape, jnp.uint32, out_sharding=out_sharding)
    noise = quantile(bits)
    # Small ones and vectors are biases and scales, broadcast over activations. Fused,
    # their noise would be drawn again for every activation. On CPUs jax's loop prevents
    # it, on GPUs the barrier, which would cost large ones a buffer.
    return jax.lax.optimization_barrier(noise) if small else noise


def quantile(bits):
    """The normal quantile of the upper 24 of 32 random bits, in their order.

    That is the order of `jax.random.normal`: of the same bits it has the same numbers,
    to its 23 bits and to the error here.
    """
    steps = jax.lax.bitcast_convert_type(bits >> np.uint32(8), jnp.int32)
    # As many are below zero as above, and none is zero.
    x = (steps.astype(jnp.float32) - (2.0**23 - 0.5)) * 2.0**-23
    w = -jnp.log((1.0 - x) * (1.0 + x))
    *coefficients, squared_slope = _SQUARED_SLOPE
    for coefficient in reversed(coefficients):
        squared_slope = squared_slope * w + coefficient
    return x * jnp.sqrt(squared_slope)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits(key, shape, out_sharding):
    """The two words of one hash for each entry, combined by xor."""
    # After the key: in a loop over keys the compiler would keep the positions.
    zero, key = jax.lax.optimization_barrier((jnp.zeros([], jnp.uint32), key))
    first, second = threefry(key, (zero, positions(shape, out_sharding, zero)))
    return first ^ second


def positions(shape, out_sharding, zero=0):
    """Number the entries in row-major order, modulo 2^32; devices number their own."""
    position = zero
    for axis, size in enumerate(shape):
        index = jax.lax.broadcasted_iota(
            jnp.uint32, shape, axis, out_sharding=out_sharding
        )
        position = position * np.uint32(size) + index
    return position


def threefry(key, counter, rounds=ROUNDS):
    """Threefry-2x32 of a counter of two words."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        rotation = _ROTATIONS[i % 8]
        x = x + y
        y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        if i % 4 == 3:
            group = i // 4 + 1
            x = x + keys[group % 3]
            y = y + keys[(group + 1) % 3] + np.uint32(group)
    return x, y
