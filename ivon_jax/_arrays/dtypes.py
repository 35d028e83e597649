"""The dtype to compute in: float32, or wider where an array is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def wide_dtype(*values: jax.typing.ArrayLike) -> np.dtype:
    """float32, or wider if one of the floating-point `values` is."""
    dtypes = map(jnp.result_type, values)
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return functools.reduce(np.promote_types, floats, np.dtype(np.float32))


def wide(*values: jax.typing.ArrayLike) -> list[jax.Array]:
    """The values as arrays of their `wide_dtype`."""
    dtype = wide_dtype(*values)
    return [jnp.asarray(value).astype(dtype) for value in values]
