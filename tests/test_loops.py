"""Means and sums over many terms, exact and of any leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import temp_bytes

from ivon_jax._arrays import loops

MANY = 2**20


@pytest.mark.parametrize("mean", [loops.scan_mean, loops.vmap_mean])
def test_rounding_does_not_grow_with_the_number_of_terms(mean):
    """Each of a million terms is rounded alike: a plain sum is 1 % off."""
    terms = np.full(MANY, 0.1, np.float32)
    found = jax.jit(lambda xs: mean(lambda x: x, xs))(terms)
    np.testing.assert_allclose(found, terms[0], rtol=1e-6)


@pytest.mark.parametrize("mean", [loops.scan_mean, loops.vmap_mean])
def test_of_integers_booleans_and_keys_the_last_stays(mean):
    keys = jax.random.split(jax.random.key(0), 3)
    xs = {"step": jnp.arange(5, 8), "done": jnp.array([True, False, True]), "key": keys}
    found = jax.jit(lambda xs: mean(lambda x: x, xs))(xs)
    assert (found["step"], found["done"]) == (7, True)
    assert jax.tree.map(jnp.shape, found) == dict.fromkeys(xs, ())
    np.testing.assert_array_equal(
        *map(jax.random.key_data, (found["key"], keys[-1])), strict=True
    )


def test_few_terms_take_no_second_array():
    """A plain sum is exact enough there, and microbatches are few."""

    def temporaries(count):
        xs = jnp.arange(float(count))
        compiled = jax.jit(
            lambda xs: loops.scan_mean(lambda x: jnp.full(100_000, x), xs)
        )
        return temp_bytes(compiled.lower(xs))

    few, most = temporaries(2), temporaries(loops.PLAIN_TERMS)
    assert most - few < 100_000


def test_infinity_stays_infinity():
    """Not NaN, which the compensation of a sum would make of it."""
    terms = jnp.full(loops.PLAIN_TERMS + 1, jnp.inf)
    assert loops.scan_mean(lambda x: x, terms) == jnp.inf


def test_a_sum_over_many_chunks_rounds_once():
    """100,000 times 0.1, one by one; plainly added, 1e-4 of it is lost."""
    x = np.full(100_001, 0.1, np.float32)
    result = loops.sum_examples(lambda v: v, jnp.asarray(x), chunk_size=1)
    np.testing.assert_allclose(result, x.sum(dtype=np.float64), rtol=1e-7)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 99])
def test_chunks_of_any_size_have_each_example_once(chunk_size):
    x = jnp.arange(10.0)
    assert loops.sum_examples(lambda v: v, x, chunk_size) == 45.0
    doubled = loops.map_examples(lambda v: 2.0 * v, x, chunk_size)
    np.testing.assert_array_equal(doubled, 2.0 * x)


def test_an_infinite_sum_is_no_nan():
    x = jnp.array([1.0, jnp.inf, 2.0, 3e38, 3e38])
    assert loops.sum_examples(lambda v: v, x, chunk_size=1) == jnp.inf
    assert loops.sum_examples(lambda v: v, x[2:], chunk_size=1) == jnp.inf
