"""Sums over many examples, against double precision."""

import jax.numpy as jnp
import numpy as np

from ivon_jax import _chunks


def test_a_sum_over_many_chunks_rounds_once():
    """100,000 times 0.1, one by one; plainly added, 1e-4 of it is lost."""
    x = np.full(100_001, 0.1, np.float32)
    result = _chunks.sum_examples(lambda v: v, jnp.asarray(x), chunk_size=1)
    np.testing.assert_allclose(result, x.sum(dtype=np.float64), rtol=1e-7)


def test_an_infinite_sum_is_no_nan():
    x = jnp.array([1.0, jnp.inf, 2.0, 3e38, 3e38])
    assert _chunks.sum_examples(lambda v: v, x, chunk_size=1) == jnp.inf
    assert _chunks.sum_examples(lambda v: v, x[2:], chunk_size=1) == jnp.inf
