"""Means over many terms, exact and of any leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import _mean

MANY = 2**20


@pytest.mark.parametrize("mean", [_mean.scan_mean, _mean.vmap_mean])
def test_rounding_does_not_grow_with_the_number_of_terms(mean):
    """Each of a million terms is rounded alike: a plain sum is 1 % off."""
    terms = np.full(MANY, 0.1, np.float32)
    found = jax.jit(lambda xs: mean(lambda x: x, xs))(terms)
    np.testing.assert_allclose(found, terms[0], rtol=1e-6)


def test_few_terms_take_no_second_array():
    """A plain sum is exact enough there, and microbatches are few."""

    def temporaries(count):
        xs = jnp.arange(float(count))
        compiled = jax.jit(
            lambda xs: _mean.scan_mean(lambda x: jnp.full(100_000, x), xs)
        )
        return compiled.lower(xs).compile().memory_analysis().temp_size_in_bytes

    few, most = temporaries(2), temporaries(_mean.PLAIN_TERMS)
    assert most - few < 100_000


def test_infinity_stays_infinity():
    """Not NaN, which the compensation of a sum would make of it."""
    terms = jnp.full(_mean.PLAIN_TERMS + 1, jnp.inf)
    assert _mean.scan_mean(lambda x: x, terms) == jnp.inf
