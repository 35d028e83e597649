"""Gaussians over parts of a tree: put in their place, and joined."""

import jax
import jax.numpy as jnp

from .._arrays.dtypes import wide_full_like
from .._arrays.trees import is_masked, like
from . import validity
from .basis import without
from .gaussian import Posterior
from .rotated import RotatedPosterior


def over(params, prior):
    """`prior` over the tree of `params`, in its shapes and sharding; never an alias."""
    if not jax.tree.leaves(params):
        # Such as optax's placeholder for parameters.
        return type(prior)(*[params] * len(prior))
    prior = _boxed(prior, params)
    mean = like("prior.mean", prior.mean, "`params`", params)
    precision = validity.prior_precision(prior.precision, params)

    def copy(param, x):
        zeros = wide_full_like(param, 0.0)
        return zeros + jnp.asarray(x, zeros.dtype)

    copies = [jax.tree.map(copy, params, tree) for tree in (mean, precision)]
    if isinstance(prior, Posterior):
        return Posterior(*copies)
    bases = like_params(prior.bases, params)
    return RotatedPosterior(*copies, jax.tree.map(jnp.copy, bases))


def like_params(bases, params):
    """`bases` where `params` are; what `optax.masked` took away has none."""

    def basis(param, basis):
        return param if is_masked(param) else basis

    return jax.tree.map(basis, params, bases, is_leaf=is_masked)


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

    trees = (structure.unflatten(map(put, boxes, xs)) for xs in columns)
    return type(prior)(*trees)


def joint(parts):
    """One Gaussian of several over one tree, of which each has arrays of its own."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(q, RotatedPosterior) for q in parts):
        parts = list(map(RotatedPosterior.of_diagonal, parts))
    structure = jax.tree.structure(parts[0].mean)
    trees = [[structure.flatten_up_to(tree) for tree in q] for q in parts]
    rows = zip(*(zip(*pair, strict=True) for pair in trees), strict=True)
    owners = [next((x for x in row if x[1] is not None), row[0]) for row in rows]
    columns = zip(*owners, strict=True)
    return type(parts[0])(*map(structure.unflatten, columns))


def beside(q, join, point_masses):
    """`q` in a larger tree, ``join(tree, point_masses)``."""
    nothing = jax.tree.map(lambda _: None, point_masses)
    parts = [join(q.mean, point_masses), join(q.precision, nothing)]
    if isinstance(q, RotatedPosterior):
        parts.append(join(q.bases, without(point_masses)))
    return type(q)(*parts)
