"""What a loss is called with, once it is called several times."""

import jax
import jax.numpy as jnp


def batch_size(name, count, batch):
    """Return the one length of the first axes of all arrays that are to be cut.

    Random keys with axes count where there is nothing else.
    """
    what = f"`{name}`"
    if count is None:
        what = f'`hess_estimator`="{name}"'
    leaves = [(p, x) for p, x in _leaves(batch) if getattr(x, "ndim", 0)]
    arrays = [(p, x) for p, x in leaves if not _is_key(x)] or leaves
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
                f"got {len(array)} at {path} and {len(other)} at {other_path}. What is "
                "no batch, such as class weights, is no argument: let `loss_fn` close "
                "over it."
            )
    if len(array) % (count or 1):
        raise ValueError(
            f"{what} must divide the first axis of every array in `args`, got {count} "
            f"for an array of shape {array.shape}."
        )
    if not len(array):
        raise ValueError(f"{what} needs at least one example, got none at {path}.")
    return len(array)


def typed_keys(batch):
    """Reject what may be a legacy random key, which looks like a batch of two."""
    legacy = (4,) if "rbg" in jax.config.jax_default_prng_impl else (2,)
    for path, x in _leaves(batch):
        if getattr(x, "dtype", None) == jnp.uint32 and x.shape == legacy:
            raise TypeError(
                "`args` must have typed random keys, so that each draw can get its "
                f"own, got uint32 of shape {x.shape} at {path}, which may be a legacy "
                "key. Pass `jax.random.key(seed)` or `jax.random.wrap_key_data(key)`; "
                "cast data to int32."
            )


def _leaves(batch):
    """Paths and leaves of the positional and the keyword arguments."""
    args, kwargs = batch
    leaves = jax.tree_util.tree_leaves_with_path(args)
    named = [(f"args{jax.tree_util.keystr(path)}", x) for path, x in leaves]
    for name, value in kwargs.items():
        leaves = jax.tree_util.tree_leaves_with_path(value)
        named += [(f"{name}{jax.tree_util.keystr(path)}", x) for path, x in leaves]
    return named


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
