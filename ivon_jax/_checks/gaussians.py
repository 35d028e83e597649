"""Gaussians: posteriors, their priors and curvatures."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from .scalars import extremes, known, least_and_greatest, non_negative
from .trees import is_masked, like, non_negative_array


def posterior_to_sample(posterior):
    """Reject what has no samples, the parameters above all."""
    if not hasattr(posterior, "sample"):
        raise TypeError(
            f"`posterior` must be a posterior, got {type(posterior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`."
        )


def gaussian(name, value, posterior_type):
    """Reject what has no divergence to another Gaussian in closed form."""
    if not isinstance(value, posterior_type):
        raise TypeError(
            f"`{name}` must be a Posterior, one Gaussian, got {type(value).__name__}. "
            f"Pass `ivon_jax.{name}(params, opt_state)`."
        )
    precisions(value)


def precision_like_mean(q):
    """Reject a Gaussian whose precision has not the mean's structure and shapes."""
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
    """Reject a mean and a precision that no array of Gaussians has."""
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


def precisions(q, positive=False):
    """Reject a precision that is known not to be one: negative, infinite or NaN."""
    precision_like_mean(q)
    leaves = jax.tree_util.tree_leaves_with_path(q.precision)
    named = [(path, jnp.asarray(x)) for path, x in leaves if jnp.size(x)]
    ranges = known(_ranges, *(x for _, x in named)) or []
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


def same_point_masses(posterior, prior):
    """Reject two Gaussians with a divergence that is infinite by structure."""

    def check(path, _, precision, prior_precision):
        if (precision is None) != (prior_precision is None):
            raise ValueError(
                "`prior.precision` must be None where the posterior's is, got one None "
                f"of two at mean{jax.tree_util.keystr(path)}."
            )

    jax.tree_util.tree_map_with_path(
        check, posterior.mean, posterior.precision, prior.precision
    )


def _ranges(*arrays):
    return [least_and_greatest(x) for x in arrays]


def natural_parameters(natural, point_mass_type):
    """Reject what is of no Gaussian: the quadratic ones are negative."""
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
        if isinstance(leaf, point_mass_type):
            low, high = extremes(jnp.asarray(leaf.weight)) or (1, 1)
            if not 0 < low <= high < np.inf:
                raise ValueError(
                    "`natural.quadratic` must have point masses of positive weight, "
                    f"got {low}. Was more taken out than was there?"
                )
            continue
        low, high = extremes(jnp.asarray(leaf)) or (-1, -1)
        if not -np.inf < low <= high < 0:
            raise ValueError(
                "`natural.quadratic` must be negative, -1 / (2 variance), got "
                f"{high if low > -np.inf else low}. Was more taken out than was there?"
            )


def one_prior(prior, posterior_type, weight_decay, default):
    """Reject a prior that is no Gaussian, or two priors."""
    if prior is None:
        return
    if not isinstance(prior, posterior_type):
        raise TypeError(
            f"`prior` must be a Posterior, got {type(prior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`, or around weights "
            "`ivon_jax.Posterior.isotropic(weights, ess * weight_decay)`."
        )
    if isinstance(weight_decay, float) and weight_decay != default:
        raise ValueError(
            f"`weight_decay` must be left out where `prior` is given, got "
            f"{weight_decay}. To narrow the prior, use `prior.tempered(temperature)`."
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
        non_negative_array(where, None if is_masked(param) else value)
    return like("prior.precision", precision, "`params`", params)


def members(posteriors, posterior_type, stacked_type):
    """Reject what is no mixture: nothing, several trees, or one that is not stacked."""
    if isinstance(posteriors, (posterior_type, stacked_type)):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(posteriors)]
        lengths = {shape[:1] for shape in shapes}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                "`posteriors` must have one leading axis of members in every array, "
                f"got lengths {sorted(lengths)}. Of one posterior, pass a list."
            )
        if isinstance(posteriors, posterior_type) and min(map(len, shapes)) < 2:
            raise ValueError(
                "`posteriors` must be a list, got one Posterior that may be single or "
                f"stacked, with an array of shape {min(shapes, key=len)}. Pass "
                "`Mixture([posterior])`, or `Mixture.from_stacked(posterior)` for "
                "members along the first axes."
            )
        return
    if not isinstance(posteriors, (list, tuple)):
        raise TypeError(
            "`posteriors` must be a list of posteriors, or a stacked one, got "
            f"{type(posteriors).__name__}."
        )
    if not posteriors:
        raise ValueError("`posteriors` must have at least one member, got none.")
    for i, q in enumerate(posteriors):
        if not isinstance(q, posterior_type):
            raise TypeError(
                f"`posteriors[{i}]` must be a posterior, got {type(q).__name__}. Pass "
                "`ivon_jax.posterior(params, opt_state)`."
            )
        like(f"posteriors[{i}]", q, "`posteriors[0]`", posteriors[0])


def member_index(index, count):
    """Return an index of a member in 0..count - 1 where it is known."""
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        low = high = int(index)
    elif getattr(index, "dtype", None) is not None and jnp.issubdtype(
        index.dtype, jnp.integer
    ):
        index = jnp.asarray(index)
        low, high = extremes(index) or (0, 0)
    else:
        raise TypeError(f"`index` must be an integer, got {index!r}.")
    if not -count <= low <= high < count:
        bad = low if low < -count else high
        raise IndexError(f"`index` must be in {-count}..{count - 1}, got {bad}.")
    if isinstance(index, jax.Array):
        return jnp.where(index < 0, index + count, index)
    return low % count


def some_precision(posterior):
    """Reject a posterior with nothing to rank."""
    if not jax.tree.leaves(posterior.precision):
        raise ValueError(
            "`posterior` must have a precision for some array, got point masses alone. "
            "Was it made of the state of `ivon_jax.ivon`?"
        )


def some_entries(arrays):
    """Reject parameters of which IVON trains none."""
    if not sum(x.mean.size for x in arrays):
        raise ValueError(
            "`params` must have an entry that IVON trains, got none: its arrays are "
            "empty, or all left out with `optax.masked`."
        )


def curvature(name, hess, reference_name, reference):
    """Return non-negative `hess` like `reference`, None for None or masked parts."""
    if isinstance(hess, numbers.Real) or getattr(hess, "shape", None) == ():
        number = non_negative(name, hess)
        return jax.tree.map(lambda _: number, reference)

    def unknown(node):
        return node is None or is_masked(node)

    def fill(h, part):
        return part if unknown(h) else h

    try:
        whole = jax.tree.map(fill, hess, reference, is_leaf=unknown)
    except ValueError:
        whole = hess
    like(name, whole, reference_name, reference)
    for path, h in jax.tree_util.tree_leaves_with_path(hess):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(h), jnp.floating):
            raise TypeError(
                f"`{name}` must be real floating-point arrays, got "
                f"{jnp.result_type(h)} at {where}."
            )
        low, high = extremes(jnp.asarray(h)) or (0, 0)
        if not 0 <= low <= high < np.inf:
            bad = high if low >= 0 else low
            raise ValueError(
                f"`{name}` must be non-negative and finite, got {bad} at {where}. "
                "IVON's `h` may fall to minus the weight decay: use the precision of "
                "`ivon_jax.posterior`, or `jnp.maximum(h, 0)`."
            )
    return jax.tree.map(
        lambda h, part: jax.tree.map(lambda _: None, part) if unknown(h) else h,
        hess,
        reference,
        is_leaf=unknown,
    )


def some_curvature(path, total):
    """Reject a sum of Hessians that cannot be divided by."""
    low, high = extremes(total) or (1, 1)
    if not 0 < low <= high < np.inf:
        bad = high if low > 0 else low
        raise ValueError(
            "`base_hessian` plus the sum of `hessians` must be positive and finite, "
            f"got {bad} at base{jax.tree_util.keystr(path)}. Pass a positive "
            "`base_hessian`, such as the prior's precision."
        )
