"""Trees of arrays: parameters, and what must be shaped like them."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .differences import difference, leaf_in_words
from .scalars import _scalar, extremes


def is_masked(node):
    """Whether `node` stands for parameters that `optax.masked` took away."""
    return isinstance(node, optax.MaskedNode)


def like(name, tree, reference_name, reference):
    """Return `tree` with the structure, masks included, and shapes of `reference`."""
    try:
        tree = jax.tree.map(
            lambda p, x: p if is_masked(p) else x, reference, tree, is_leaf=is_masked
        )
        same = jax.tree.structure(tree) == jax.tree.structure(reference)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"`{name}` must have the tree structure of {reference_name}, "
            + difference(name, tree, reference_name, reference)
        )
    leaves = jax.tree_util.tree_leaves_with_path(reference)
    for (path, p), x in zip(leaves, jax.tree.leaves(tree), strict=True):
        if jnp.shape(x) != jnp.shape(p):
            raise ValueError(
                f"`{name}` must have the shapes of {reference_name}, got "
                f"{jnp.shape(x)} at {name}{jax.tree_util.keystr(path)}, where "
                f"{reference_name} has {jnp.shape(p)}."
            )
    return tree


def is_mask(mask, tree):
    """Whether `mask` is a tree, not a function to call for one."""
    structure = jax.tree.structure(mask)
    if not callable(mask):
        return True
    if jax.tree_util.treedef_is_leaf(structure):
        return False
    try:
        structure.flatten_up_to(tree)
    except ValueError:
        return False
    return True


def same_filter(params, params_of_optimizer, wrt, wrt_of_optimizer):
    """Reject variables to draw that are not those that the optimizer trains."""
    if jax.tree.structure(params) != jax.tree.structure(params_of_optimizer):
        raise ValueError(
            f"`wrt` must be the filter of the optimizer, got {wrt!r} where that has "
            f"{wrt_of_optimizer!r}. Call "
            "`ivon_jax.flax.value_and_grad(loss_fn, wrt=optimizer.wrt)`."
        )


def mask_of(name, mask, tree):
    """Return a tree of booleans like `tree` from one that may be a prefix of it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f"`{name}` must have leaves True or False, got {leaf!r} at "
                f"{name}{jax.tree_util.keystr(path)}."
            )
    try:
        return jax.tree.map(lambda k, t: jax.tree.map(lambda _: k, t), mask, tree)
    except ValueError:
        raise ValueError(
            f"`{name}` must be a tree prefix of the posterior's mean, "
            + difference(name, mask, "the mean", tree, prefix=True)
        ) from None


def keep_like(name, mask, reference_name, reference):
    """Return booleans like `reference`; single ones hold for a whole array."""

    def is_none(node):
        return node is None

    def whole(param, keep):
        single = isinstance(keep, (bool, np.bool_)) or getattr(keep, "shape", 0) == ()
        return param if param is None or single else keep

    def kept(param, keep):
        return None if param is None else keep

    try:
        filled = jax.tree.map(whole, reference, mask, is_leaf=is_none)
    except ValueError:
        filled = mask
    like(name, filled, reference_name, reference)
    for path, keep in jax.tree_util.tree_leaves_with_path(mask):
        if jnp.result_type(keep) != jnp.bool_:
            raise TypeError(
                f"`{name}` must be booleans, True for what is kept, got "
                f"{jnp.result_type(keep)} at {name}{jax.tree_util.keystr(path)}."
            )
    return jax.tree.map(kept, reference, mask, is_leaf=is_none)


def floating_leaves(params):
    """Reject parameters that no Gaussian can have, whole modules among them."""
    if params is None:
        raise TypeError("`params` must be a tree of arrays, got None.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            got = leaf_in_words(leaf)
        elif not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            got = jnp.result_type(leaf)
        else:
            continue
        raise TypeError(
            f"`params` must be real floating-point arrays, got {got} at "
            f"params{jax.tree_util.keystr(path)}. Leave it out: "
            "`nnx.state(model, nnx.Param)` are the parameters of an NNX module, "
            "`eqx.filter(model, eqx.is_inexact_array)` those of an Equinox module. In "
            "other trees use `optax.masked` or `optax.partition`."
        )


def floating_tree(name, tree):
    """Reject a tree with arrays that no difference can be scaled of."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must be real floating-point arrays, got {dtype} at "
                f"{name}{jax.tree_util.keystr(path)}. Pass the parameters alone."
            )


def list_of_trees(name, value, count=None):
    """Reject what is no list of one tree for each model."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"`{name}` must be a list of trees, one for each model, got "
            f"{type(value).__name__}."
        )
    if not value:
        raise ValueError(f"`{name}` must have at least one tree, got none.")
    if count is not None and len(value) != count:
        raise ValueError(
            f"`{name}` must have one tree for each of the {count} models in "
            f"`finetuned`, got {len(value)}."
        )


def scales(name, value, count):
    """Return one finite number for each of `count` models."""

    def one(name, value):
        scale, number = _scalar(name, value)
        if number is not None and math.isnan(number):
            raise ValueError(f"`{name}` must be a number, got nan.")
        return scale

    is_list = isinstance(value, (list, tuple))
    if not is_list and not getattr(value, "ndim", 0):
        return [one(name, value)] * count
    length = len(value)
    if length != count:
        raise ValueError(
            f"`{name}` must be one number, or one for each of the {count} models in "
            f"`finetuned`, got {length}."
        )
    return [one(f"{name}[{i}]", scale) for i, scale in enumerate(value)]


def non_negative_array(name, array):
    """Reject concrete values that are negative, infinite or NaN."""
    low, high = (None if array is None else extremes(jnp.asarray(array))) or (0, 0)
    if not 0 <= low <= high < np.inf:
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {low} to {high}."
        )
