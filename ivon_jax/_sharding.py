"""Arrays of explicit meshes, whose types hold their sharding.

Automatic meshes need none of this: there the compiler chooses.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P


def in_type(x):
    """The sharding in the type of `x`, None without a mesh.

    Within ``jit`` alone: an array outside has no mesh to compute in.
    """
    sharding = jax.typeof(x).sharding
    traced = isinstance(x, jax.core.Tracer) and not sharding.mesh.empty
    return sharding if traced else None


def whole(x):
    """`x`, all of it on every device."""
    sharding = in_type(x)
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


def back(x, reference):
    """What was made of `whole` arrays, sharded as `reference`."""
    sharding = in_type(reference)
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, sharding)


def positions(x):
    """0, 1, 2, ... along the first axis of `x`, sharded alike."""
    sharding = in_type(x)
    if sharding is None or not any(sharding.spec[:1]):
        return jnp.arange(x.shape[0])
    return jax.sharding.reshard(
        jnp.arange(x.shape[0]), NamedSharding(sharding.mesh, P(sharding.spec[0]))
    )


def row(x, index):
    """``x[index]``, for any sharding of the first axis, without gathering the rest.

    NaN, or zero of integers, where there is no such row.
    """
    x = jnp.asarray(x)
    if isinstance(index, int):
        index = jnp.asarray(index)
    if index.ndim:
        return jax.vmap(lambda i: row(x, i))(index)
    sharding = in_type(x)
    if sharding is None or not any(sharding.spec[:1]):
        found = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    else:
        chosen = jnp.expand_dims(positions(x) == index, range(1, x.ndim))
        found = jnp.sum(jnp.where(chosen, x, 0), axis=0, dtype=x.dtype)
    missing = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
    return jnp.where((index >= 0) & (index < len(x)), found, missing).astype(x.dtype)
