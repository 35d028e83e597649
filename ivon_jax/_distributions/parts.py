"""Gaussians over parts of a tree: put in their place, and joined."""

import jax
import jax.numpy as jnp

from .._arrays.dtypes import wide_full_like
from .._arrays.trees import is_masked, like
from . import validity
from .gaussian import Posterior


def over(params, prior):
    """`prior` over the tree of `params`, in its shapes and sharding; never an alias."""
    if not jax.tree.leaves(params):
        return Posterior(params, params)  # such as optax's placeholder for parameters
    prior = _boxed(prior, params)
    mean = like("prior.mean", prior.mean, "`params`", params)
    precision = validity.prior_precision(prior.precision, params)

    def copy(param, x):
        zeros = wide_full_like(param, 0.0)
        return zeros + jnp.asarray(x, zeros.dtype)

    copies = [jax.tree.map(copy, params, tree) for tree in (mean, precision)]
    return Posterior(*copies)


def _boxed(prior, params):
    """`prior` with its arrays in the boxes of `params`, such as `flax.nnx.Param`."""
    structure = jax.tree.structure(prior.mean)
    try:
        boxes = structure.flatten_up_to(params)
        columns = [structure.flatten_up_to(tree) for tree in prior]
    except ValueError:
        return prior  # another tree, which the checks will tell

    def put(box, x):
        leaves, box = jax.tree.flatten(box, is_leaf=is_masked)
        return box.unflatten([x]) if len(leaves) == 1 else x

    return Posterior(*(structure.unflatten(map(put, boxes, xs)) for xs in columns))


def joint(parts):
    """One Gaussian of several over one tree, of which each has arrays of its own."""
    if len(parts) == 1:
        return parts[0]
    structure = jax.tree.structure(parts[0].mean)
    trees = [[structure.flatten_up_to(tree) for tree in q] for q in parts]
    rows = zip(*(zip(*pair, strict=True) for pair in trees), strict=True)
    owners = [next((x for x in row if x[1] is not None), row[0]) for row in rows]
    return Posterior(*(structure.unflatten([x[i] for x in owners]) for i in (0, 1)))


def beside(q, join, point_masses):
    """`q` in a larger tree, ``join(tree, point_masses)``."""
    nothing = jax.tree.map(lambda _: None, point_masses)
    return Posterior(join(q.mean, point_masses), join(q.precision, nothing))
