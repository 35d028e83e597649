"""Batches cut into slices, with random keys of their own for each draw."""

import jax
import jax.numpy as jnp

from .._arrays import sharding
from .._arrays.loops import is_key


def cut(name, count, batch):
    """Slices ``j::count`` of the arrays in `batch`, stacked, and the way back to it.

    Strided slices, because those of an array sharded along its first axis are sharded
    alike; contiguous ones would each lie on a few of the devices. No count cuts into
    single examples. Random keys go to every slice, folded with its index.
    """
    length = _batch_size(name, count, batch)
    one_by_one, count = count is not None, count or length
    leaves, structure = jax.tree.flatten(batch)
    shapes = [getattr(x, "shape", ()) for x in leaves]
    arrays = {i: x for i, x in enumerate(leaves) if shapes[i][:1] == (length,)}

    def strided(x):
        rows = length // count
        if one_by_one:
            x = sharding.divisible(x, rows)
        return x.reshape(rows, count, *x.shape[1:]).swapaxes(0, 1)

    def join(one_slice):
        index, rows = one_slice
        whole = structure.unflatten([rows.get(i, x) for i, x in enumerate(leaves)])
        return fold_in(whole, index)

    slices = {i: strided(x) for i, x in arrays.items()}
    return (sharding.positions(next(iter(slices.values()))), slices), join


def fold_in(batch, index):
    """`batch` with its random keys, if any, made those of this draw."""
    return map_keys(lambda key: jax.random.fold_in(key, index), batch)


def map_keys(fn, tree):
    """Map `fn` over every typed random key in `tree`."""

    def leaf(x):
        if not (isinstance(x, jax.Array) and is_key(x)):
            return x
        mapped = fn
        for _ in x.shape:
            mapped = jax.vmap(mapped)
        return mapped(x)

    return jax.tree.map(leaf, tree)


def _batch_size(name, count, batch):
    """Return the one length of the first axes of all arrays that are to be cut.

    Random keys with axes count where there is nothing else.
    """
    what = f"`{name}`"
    if count is None:
        what = f'`hess_estimator`="{name}"'
    leaves = [(p, x) for p, x in _named_leaves(batch) if getattr(x, "ndim", 0)]
    arrays = [(p, x) for p, x in leaves if not is_key(x)] or leaves
    if not arrays:
        raise ValueError(
            f"{what} needs a batch to cut into {count or 'examples'}, got no array "
            "with an axis in `args`."
        )
    (path, array), *rest = arrays
    for other_path, other in rest:
        if len(other) != len(array):
            raise ValueError(
                f"{what} needs one batch, whose arrays have first axes of one length, "
                f"got {len(array)} at {path} and {len(other)} at {other_path}. Let "
                "`loss_fn` close over arrays that are not batches, such as class "
                "weights."
            )
    if len(array) % (count or 1):
        raise ValueError(
            f"{what} must divide the first axis of every array in `args`, got {count} "
            f"for an array of shape {array.shape}."
        )
    if not len(array):
        raise ValueError(f"{what} needs at least one example, got none at {path}.")
    return len(array)


def check_keys(batch):
    """Raise for what may be a legacy random key: it looks like a batch of two."""
    legacy = (4,) if "rbg" in jax.config.jax_default_prng_impl else (2,)
    for path, x in _named_leaves(batch):
        if getattr(x, "dtype", None) == jnp.uint32 and x.shape == legacy:
            raise TypeError(
                "`args` must have typed random keys, so that each draw can get its "
                f"own, got uint32 of shape {x.shape} at {path}, which may be a legacy "
                "key. Pass `jax.random.key(seed)` or `jax.random.wrap_key_data(key)`; "
                "cast data to int32."
            )


def _named_leaves(batch):
    """Paths and leaves of the positional and the keyword arguments."""
    args, kwargs = batch
    leaves = jax.tree_util.tree_leaves_with_path(args)
    named = [(f"args{jax.tree_util.keystr(path)}", x) for path, x in leaves]
    for name, value in kwargs.items():
        leaves = jax.tree_util.tree_leaves_with_path(value)
        named += [(f"{name}{jax.tree_util.keystr(path)}", x) for path, x in leaves]
    return named
