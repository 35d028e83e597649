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


def wide_full_like(param: jax.typing.ArrayLike, value: jax.typing.ArrayLike):
    """An array of `value` like `param`, sharded alike, in its `wide_dtype`.

    bfloat16 has 8 bits of precision: the Hessian could not move by 1e-5 of itself.
    """
    dtype = wide_dtype(param)
    # Of a scalar, `full_like` would return `value` itself, which may be the caller's.
    value = jnp.array(value, dtype)
    full = jnp.full_like(param, value, dtype=dtype)
    if not isinstance(param, jax.core.Tracer):
        return full
    # The same value, but one that follows from `param`: otherwise the compiler of a
    # jitted `init` would not shard it alike.
    return jnp.where(param == param, full, full)
