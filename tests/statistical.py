"""Assertions that a wrong result fails, and so do NaN, infinity and too few draws."""

import jax
import jax.numpy as jnp
import numpy as np

FEWEST = 100  # with fewer draws, their own standard error is too rough for z = 5


def assert_mean(draws, expected, z=5.0):
    """Fail if the mean of `draws` over axis 0 is `z` standard errors off `expected`.

    Draws without spread must be `expected`, to the rounding of their dtype.
    """
    draws, expected = np.asarray(draws), np.asarray(expected, np.float64)
    wide = draws.astype(np.float64)
    assert len(draws) >= FEWEST, f"{len(draws)} draws are too few"
    assert np.all(np.isfinite(wide)), f"{np.mean(~np.isfinite(wide)):.0%} not finite"
    mean, error = wide.mean(axis=0), wide.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.broadcast_shapes(mean.shape, expected.shape) == mean.shape
    rounding = 4 * _epsilon(draws.dtype) * np.abs(expected)
    assert_at_most(np.abs(mean - expected), z * error + rounding)


def assert_at_most(values, bounds):
    """Fail unless all `values` and `bounds` are finite, and no value is the larger."""
    values, bounds = (np.asarray(x, np.float64) for x in (values, bounds))
    assert values.size > 0, "there is nothing to compare"
    for name, array in {"values": values, "bounds": bounds}.items():
        assert np.all(np.isfinite(array)), f"{name} are not all finite: {array}"
    assert np.all(values <= bounds), f"{values} exceeds {bounds}"


def assert_moved(tree, origin):
    """Fail unless every entry of `tree` is finite and another than that of `origin`."""
    for x, y in zip(*map(jax.tree.leaves, (tree, origin)), strict=True):
        moved, start = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.all(np.isfinite(moved)), f"not all finite: {moved}"
        assert np.all(moved != start), f"not all moved: {moved}"


def _epsilon(dtype):
    """The relative rounding of a dtype; integers are exact, bar their mean."""
    exact = not jnp.issubdtype(dtype, jnp.floating)
    return float(jnp.finfo(np.float64 if exact else dtype).eps)
