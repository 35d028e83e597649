"""Assertions whose tolerances come from the standard error."""

import numpy as np


def assert_mean(draws, expected, z=5.0):
    """Fail if the mean of `draws` over axis 0 is `z` standard errors off `expected`."""
    draws = np.asarray(draws, np.float64)
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - expected), z * error)
