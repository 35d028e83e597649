"""The noise: `jax.random.normal`'s, without its buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS_DO, temp_bytes

from ivon_jax._arrays.noise import normal

SHAPES = (), (1,), (7,), (0, 3), (3, 5), (2, 3, 4), (1000, 33)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_has_the_bits_of_jax_random_normal(shape, key):
    key = jax.random.fold_in(key, 1)  # two words that are not zero
    noise = normal(key, shape, jnp.float32)
    np.testing.assert_array_equal(noise, jax.random.normal(key, shape))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_are_left_to_jax(impl):
    key = jax.random.key(0, impl=impl)
    noise = normal(key, (1000, 33), jnp.float32)
    np.testing.assert_array_equal(noise, jax.random.normal(key, (1000, 33)))


@pytest.mark.usefixtures("x64")
def test_float64_is_left_to_jax(key):
    noise = normal(key, (1000, 33), jnp.float64)
    np.testing.assert_array_equal(
        noise, jax.random.normal(key, (1000, 33), jnp.float64)
    )


def test_noise_takes_no_memory_but_its_own(key):
    """Of the parameters' size: jax's loop over rounds has four more such arrays."""
    draw = jax.jit(normal, static_argnums=(1, 2))
    assert temp_bytes(draw.lower(key, (1000, 100), jnp.float32)) < 1000


@pytest.mark.parametrize("shape", [(70_000,), (1, 10_000)], ids=str)
def test_what_is_broadcast_is_drawn_once(shape, key):
    """A bias is: fused, its noise would be drawn for each row of the activations."""
    *_, size = shape

    def add_bias(key):
        noise = normal(key, shape, jnp.float32)
        return jnp.zeros((8, size)) + noise.reshape(1, size)

    text = jax.jit(add_bias).lower(key).compile(AS_USERS_DO).as_text()
    fused = [c for c in text.split("\n}") if "ENTRY" not in c and f"f32[8,{size}]" in c]
    rotations = [computation.count("shift-left(") for computation in fused]
    assert max(rotations) < 20  # the rounds of one Threefry hash
