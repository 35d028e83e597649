"""Errors about Gaussians: their trees, shapes and values."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._arrays.trees import array_leaves, is_masked, like
from .basis import Basis, is_basis
from .natural import PointMass


def check(q, positive):
    """Raise if a precision is known to be negative, infinite or NaN."""
    _precision_like_mean(q)
    leaves = jax.tree_util.tree_leaves_with_path(q.precision)
    named = [(path, jnp.asarray(x)) for path, x in leaves if jnp.size(x)]
    ranges = _checks.known(_ranges, *(x for _, x in named)) or []
    for (path, _), (low, high) in zip(named, ranges, strict=False):
        where = f"precision{jax.tree_util.keystr(path)}"
        if not 0 <= low <= high < np.inf:
            bad = high if low >= 0 else low
            raise ValueError(
                f"`precision` must be non-negative and finite, got {bad} at {where}. "
                "Did training diverge? A point mass has the precision None."
            )
        if positive and not low > 0:
            raise ValueError(
                f"`precision` must be positive to sample, got {low} at {where}: the "
                "distribution is flat there."
            )


def _ranges(*arrays):
    return [_checks.least_and_greatest(x) for x in arrays]


def _precision_like_mean(q):
    """Raise unless the precision has the structure and shapes of the mean."""
    array_leaves("mean", q.mean)
    leaves, structure = jax.tree_util.tree_flatten_with_path(q.mean)
    try:
        precisions = structure.flatten_up_to(q.precision)
        same = jax.tree_util.all_leaves(p for p in precisions if p is not None)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            "`precision` must have the tree structure of `mean`, with None for point "
            f"masses, got\n{jax.tree.structure(q.precision)}\nwhere `mean` has\n"
            f"{structure}."
        )
    for (path, mean), precision in zip(leaves, precisions, strict=True):
        if precision is not None:
            _gaussian_array(jax.tree_util.keystr(path), mean, precision)


def _gaussian_array(path, mean, precision):
    """Raise unless these can be the mean and precision of an array of Gaussians."""
    if jnp.shape(precision) != jnp.shape(mean):
        raise ValueError(
            f"`precision` must have the shapes of `mean`, got {jnp.shape(precision)} "
            f"at precision{path}, where `mean` has {jnp.shape(mean)}."
        )
    dtype = jnp.result_type(mean)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "`mean` must be real floating-point where `precision` is not None, got "
            f"{dtype} at mean{path}. A point mass has the precision None."
        )
    dtype = jnp.result_type(precision)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"`precision` must be real, got {dtype} at precision{path}.")


def bases(q):
    """Raise unless the bases fit the arrays of the Gaussian."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(q.mean)
    try:
        found = structure.flatten_up_to(q.bases)
    except ValueError:
        found = []
    if (not found and leaves) or not all(isinstance(x, Basis) for x in found):
        raise ValueError(
            "`bases` must have the tree structure of `mean`, with an `ivon_jax.Basis` "
            f"for each array, got\n{jax.tree.structure(q.bases, is_leaf=is_basis)}\n"
            f"where `mean` has\n{structure}."
        )
    for (path, mean), basis in zip(leaves, found, strict=True):
        _basis_of_array(jax.tree_util.keystr(path), jnp.shape(mean), basis)


def _basis_of_array(path, shape, basis):
    """Raise unless the matrices multiply with the matrix form of an array."""
    for name, q in zip(("left", "right"), basis, strict=True):
        if q is None:
            continue
        stacked = shape[: max(jnp.ndim(q) - 2, 0)]
        rows = math.prod(shape[len(stacked) : -1])
        side = rows if name == "left" else shape[-1] if shape else None
        if len(shape) < 2 or jnp.shape(q) != (*stacked, side, side):
            raise ValueError(
                f"`bases` must have matrices for the sides of `mean`, got {name} of "
                f"shape {jnp.shape(q)} at bases{path}, where `mean` has {shape}."
            )


def same_point_masses(posterior, prior):
    """Raise unless the two Gaussians have the same point masses."""

    def check(path, _, precision, prior_precision):
        if (precision is None) != (prior_precision is None):
            raise ValueError(
                "`prior.precision` must be None where the posterior's is, got one None "
                f"of two at mean{jax.tree_util.keystr(path)}."
            )

    jax.tree_util.tree_map_with_path(
        check, posterior.mean, posterior.precision, prior.precision
    )


def natural_parameters(natural):
    """Raise unless these are natural parameters: the quadratic ones are negative."""
    structure = jax.tree.structure(natural.linear)
    try:
        leaves = structure.flatten_up_to(natural.quadratic)
    except ValueError:
        raise ValueError(
            "`natural.quadratic` must have the tree structure of `natural.linear`, got"
            f"\n{jax.tree.structure(natural.quadratic)}\nwhere `natural.linear` has\n"
            f"{structure}."
        ) from None
    for leaf in leaves:
        if leaf is None:
            raise ValueError(
                "`natural.quadratic` must be an array or an `ivon_jax.PointMass`, got "
                "None. Take it from `Posterior.natural_parameters`."
            )
        if isinstance(leaf, PointMass):
            low, high = _checks.extremes(jnp.asarray(leaf.weight)) or (1, 1)
            if not 0 < low <= high < np.inf:
                raise ValueError(
                    "`natural.quadratic` must have point masses of positive weight, "
                    f"got {low}. Was more taken out than was there?"
                )
            continue
        low, high = _checks.extremes(jnp.asarray(leaf)) or (-1, -1)
        if not -np.inf < low <= high < 0:
            raise ValueError(
                "`natural.quadratic` must be negative, -1 / (2 variance), got "
                f"{high if low > -np.inf else low}. Was more taken out than was there?"
            )


def prior_precision(precision, params):
    """Return the prior's precision where `params` are, non-negative, nowhere None."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked)
    try:
        values = structure.flatten_up_to(precision)
    except ValueError:
        leaves = values = []  # another tree: `like` will say so
    for (path, param), value in zip(leaves, values, strict=True):
        where = f"prior.precision{jax.tree_util.keystr(path)}"
        if value is None and not is_masked(param):
            raise ValueError(
                "`prior.precision` must be an array for each parameter that IVON "
                f"trains, got None at {where}: it could never move. Leave it out with "
                "`optax.masked`."
            )
        _check_non_negative(where, None if is_masked(param) else value)
    return like("prior.precision", precision, "`params`", params)


def _check_non_negative(name, array):
    """Raise if concrete values are negative, infinite or NaN."""
    low, high = (None if array is None else _checks.extremes(jnp.asarray(array))) or (
        0,
        0,
    )
    if not 0 <= low <= high < np.inf:
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {low} to {high}."
        )
