"""Arrays whose types hold more than shape and dtype.

On explicit meshes it is their sharding, within `jax.shard_map` the axes along which
they vary. Automatic meshes need none of this: there the compiler chooses.
"""

import contextlib
import math

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


def set_mesh_of(tree):
    """A context with the explicit mesh of these arrays, if there is no other.

    Without one, `jax.vmap` of a loop over sharded arrays fails.
    """
    if jax.sharding.get_abstract_mesh().empty:
        for x in jax.tree.leaves(tree):
            sharding = in_type(x)
            if sharding is not None:
                return jax.sharding.use_abstract_mesh(sharding.mesh)
    return contextlib.nullcontext()


def divisible(x, rows):
    """`x`, whole where the devices of its first axis can't share this many rows."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not rows % parts(x, sharding):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


def parts(x, sharding=None):
    """Count the parts into which the type of `x` cuts its first axis."""
    sharding = sharding or in_type(x)
    axes = sharding.spec[:1] if sharding is not None else ()
    names = [n for axis in axes for n in (axis if isinstance(axis, tuple) else (axis,))]
    return math.prod(sharding.mesh.shape[n] for n in names if n is not None)


def back(x, reference):
    """What was made of `whole` arrays, sharded as `reference`."""
    sharding = in_type(reference)
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, sharding)


def alike(tree, *others):
    """Floating-point `tree`, all of which varies over devices if any of `others` does.

    Within `jax.shard_map` the derivative by what is the same on all devices is a sum
    over them. Here each device must have its own.
    """
    zero = sum(_zero(x) for x in jax.tree.leaves((tree, others)))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _zero(x):
    """0, that varies over devices as `x` does."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.zeros((), jnp.float32)  # to look into a key counts as using it
    return jnp.zeros_like(x, shape=(), dtype=jnp.float32)


def positions(x):
    """0, 1, 2, ... along the first axis of `x`, sharded alike."""
    sharding = in_type(x)
    if sharding is None or not any(sharding.spec[:1]):
        return jnp.arange(x.shape[0])
    return jax.sharding.reshard(
        jnp.arange(x.shape[0]), NamedSharding(sharding.mesh, P(sharding.spec[0]))
    )


@jax.jit
def row(x, index):
    """``x[index]``, for any sharding of the first axis, without gathering the rest.

    NaN, zero of integers or False, where there is no such row.
    """
    x, index = jnp.asarray(x), jnp.asarray(index)
    if index.ndim:
        return jax.vmap(lambda i: row(x, i))(index)
    sharding = in_type(x)
    if sharding is None or not any(sharding.spec[:1]):
        found = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    else:
        chosen = jnp.expand_dims(positions(x) == index, range(1, x.ndim))
        found = jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), axis=0, dtype=x.dtype)
    missing = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
    missing = jnp.full_like(found, missing)
    return jnp.where((index >= 0) & (index < len(x)), found, missing)


def zeros_of(fn, args, dtype=lambda output: output.dtype):
    """Shapes and zeros of what ``fn(args)`` returns, for the carry of a loop.

    The zeros have the types of the outputs, with ``dtype(output)`` for their dtypes.
    """
    zeros = []

    def traced(args):
        outputs = fn(args)
        zeros.extend(map(_zeros, jax.tree.leaves(outputs)))
        return outputs

    outputs = jax.eval_shape(traced, args)
    make = iter(zeros)
    return outputs, jax.tree.map(lambda output: next(make)(dtype(output)), outputs)


def _zeros(output):
    """What makes zeros, of a dtype, in the type of a traced output."""
    if jnp.issubdtype(output.dtype, jax.dtypes.prng_key):
        data, impl = _zeros(jax.random.key_data(output)), jax.random.key_impl(output)
        return lambda _: jax.random.wrap_key_data(data(jnp.uint32), impl=impl)
    type_, sharding = jax.typeof(output), in_type(output)

    def make(dtype):
        zeros = jnp.zeros(type_.shape, dtype)
        if sharding is not None and any(sharding.spec):
            zeros = jax.sharding.reshard(zeros, sharding)
        for axis in _varying(type_):
            # Not `pcast`, which older versions call otherwise.
            zeros += jnp.zeros_like(jax.lax.axis_index(axis), dtype)
        return zeros

    return make


def _varying(type_):
    """The manual axes along which an array differs between devices."""
    if hasattr(type_, "vma"):
        return type_.vma
    return type_.manual_axis_type.varying
