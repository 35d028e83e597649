"""Trees that must be like others: filled, compared, and what differs in words."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
import optax

NOTHING = object()
REMEDIES = (
    (
        "flax.nnx",
        "\nFor NNX models and optimizers, use `ivon_jax.flax.posterior`, `.prior` and "
        "`.sample`, and `nnx.state(sampled, nnx.Param)` for `sample=`. Other functions "
        "take `ivon_jax.flax.arrays` of both trees.",
    ),
    (
        "equinox",
        "\nFor an Equinox module, pass `eqx.filter(model, eqx.is_inexact_array)`, as "
        "to `tx.init`.",
    ),
)


FILTERS = (
    "`nnx.state(model, nnx.Param)` are the parameters of an NNX module, "
    "`eqx.filter(model, eqx.is_inexact_array)` those of an Equinox module."
)


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


def array_leaves(name, tree):
    """Reject a tree with other leaves than arrays and numbers, as of a whole module."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf):
            raise TypeError(
                f"`{name}` must be a tree of arrays, got {leaf_in_words(leaf)} at "
                f"{name}{jax.tree_util.keystr(path)}. Leave it out: {FILTERS}"
            )


def is_array(leaf):
    """Whether `leaf` is an array, a number, or stands for one."""
    return hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)


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


def difference(name, tree, reference_name, reference, prefix=False):
    """Return the first difference in words; `prefix`: leaves stand for subtrees."""
    path, trail = _first("", [], tree, reference, prefix)
    got, wanted = (_in_words(node) for node in trail[-1])
    if got == wanted:
        wanted = "one with other static fields"
    return f"got {got} at {name}{path}, where {reference_name} has {wanted}." + _remedy(
        trail
    )


def _first(path, trail, tree, reference, prefix):
    """The path of the first difference, and the pairs of nodes on the way to it.

    None where there is no difference.
    """
    trail = [*trail, (tree, reference)]
    if jax.tree.structure(tree) == jax.tree.structure(reference):
        return None
    if prefix and _is_leaf(tree):
        return None
    if type(tree) is not type(reference) or _is_leaf(tree):
        return path, trail
    children, wanted = _children(tree), _children(reference)
    for key in [*wanted, *children]:
        pair = children.get(key, NOTHING), wanted.get(key, NOTHING)
        if NOTHING in pair:
            return path + key, [*trail, pair]
        found = _first(path + key, trail, *pair, prefix)
        if found:
            return found
    return path, trail


def _children(node):
    """The parts of a node by their keys in a path."""
    parts, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    return {jax.tree_util.keystr(path): part for path, part in parts}


def _is_leaf(node):
    return jax.tree_util.all_leaves([node])


def _in_words(node):
    if node is NOTHING:
        return "nothing"
    if node is None:
        return "None"
    if not _is_leaf(node):
        return type(node).__name__
    return leaf_in_words(node)


def leaf_in_words(leaf):
    """What stands where an array is expected."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"an array of shape {jnp.shape(leaf)}"
    if callable(leaf):
        return f"the function {getattr(leaf, '__name__', type(leaf).__name__)}"
    return f"the {type(leaf).__name__} {leaf!r:.40}"


def _remedy(trail):
    """What to pass, by the libraries whose types stand on the way."""
    nodes = [node for pair in trail for node in pair]
    modules = [t.__module__ + "." for x in nodes for t in type(x).__mro__]
    for library, remedy in REMEDIES:
        if any(module.startswith(library + ".") for module in modules):
            return remedy
    return ""
