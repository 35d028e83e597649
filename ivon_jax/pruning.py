r"""Prune by the posterior: set to zero what it is least sure of.

IVON's `h` starts at ``hess_init`` everywhere, so that ties are the rule early in the
training; they are broken by position, the first entry removed first. All functions work
under ``jit``, with the sparsity traced or not; there, values go unchecked.

References:
  Graves, Practical Variational Inference for Neural Networks, NeurIPS 2011, and
  Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015 (signal to noise);
  Cong et al., Improving LoRA with Variational Learning, 2025,
  https://arxiv.org/abs/2506.14280 (variance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._arrays import compiled, ranks
from ._arrays.dtypes import wide
from ._arrays.trees import array_leaves, like
from ._distributions.gaussian import Posterior
from ._evaluation import validity


def signal_to_noise(posterior: Posterior) -> Any:
    r"""Return :math:`|m| / \sigma`, entry by entry; None for a point mass.

    >>> q = Posterior(mean=jnp.array([-2.0, 1.0]), precision=jnp.array([4.0, 9.0]))
    >>> print(signal_to_noise(q))
    [4. 3.]

    Args:
      posterior: what `ivon_jax.posterior` returns.

    Returns:
      A tree of `posterior.mean`'s structure, float32 or wider.

    Raises:
      TypeError, ValueError: `posterior` is not a posterior, or has point masses alone.
    """
    _check(posterior)

    def ratio(mean, stddev, trained):
        return jnp.divide(*wide(jnp.abs(mean), stddev)) if trained else None

    return jax.tree.map(ratio, posterior.mean, posterior.stddev, posterior.trained)


def mask(scores: Any, sparsity: jax.typing.ArrayLike) -> Any:
    r"""Keep all but the lowest scores, ranked over all arrays together.

    Of P scores exactly ``round(sparsity * P)`` are removed. Ties are broken by position
    in the tree: the first are removed first. Any scores will do, such as magnitudes,
    ``jax.tree.map(jnp.abs, params)``.

    >>> print(mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 0.5))
    {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}

    Args:
      scores: a pytree of real arrays; None, as for a point mass, is kept and does not
        count. Integers are ranked as floats, and refused where these can't tell.
      sparsity: the share to remove, in [0, 1]. Where it is traced, its product with P
        is rounded in its own dtype: in float32 exact for P up to 2^24.

    Returns:
      A tree of booleans, True for what is kept, with the structure and shapes of
      `scores`; a single True for None.

    Raises:
      TypeError, ValueError: there is no score, one is NaN, or `sparsity` is not in
        [0, 1].
    """
    array_leaves("scores", scores)
    named, structure = jax.tree_util.tree_flatten_with_path(scores, is_leaf=_is_none)
    arrays = [
        validity.scores(f"scores{jax.tree_util.keystr(path)}", x)
        for path, x in named
        if x is not None
    ]
    validity.not_empty("scores", *arrays)
    size = sum(x.size for x in arrays)
    kept = iter(_kept(arrays, _num_removed(sparsity, size)))
    masks = [jnp.asarray(True) if x is None else next(kept) for _, x in named]
    return jax.tree.unflatten(structure, masks)


def by_signal_to_noise(posterior: Posterior, sparsity: jax.typing.ArrayLike) -> Any:
    r"""Return the `mask` that removes the lowest :math:`|m| / \sigma`.

    No other entries cost less of the posterior's log-density: setting one to zero takes
    :math:`m^2 / (2 \sigma^2)` nats, which near an optimum is what the loss of the data
    set, prior included, rises by.

    >>> q = Posterior(mean=jnp.array([-2.0, 1.0]), precision=jnp.array([4.0, 9.0]))
    >>> print(by_signal_to_noise(q, sparsity=0.5))
    [ True False]

    Args:
      posterior: what `ivon_jax.posterior` returns. Point masses are always kept, and
        do not count.
      sparsity: the share of all other entries to remove; see `mask`.

    Returns:
      A tree of booleans like `posterior.mean`, True for what is kept.

    Raises:
      TypeError, ValueError: as `signal_to_noise` and `mask`.
    """
    return _like_mean(posterior, mask(signal_to_noise(posterior), sparsity))


def by_variance(posterior: Posterior, sparsity: jax.typing.ArrayLike) -> Any:
    r"""Return the `mask` that removes the highest :math:`\sigma^2`, whatever the mean.

    This is for parameters whose neutral value is zero, such as adapters (LoRA).

    >>> q = Posterior(mean=jnp.array([-2.0, 1.0]), precision=jnp.array([4.0, 9.0]))
    >>> print(by_variance(q, sparsity=0.5))
    [False  True]

    Arguments, result and errors are those of `by_signal_to_noise`.
    """
    _check(posterior)

    def narrowness(variance, trained):
        return -variance if trained else None

    scores = jax.tree.map(narrowness, posterior.variance, posterior.trained)
    return _like_mean(posterior, mask(scores, sparsity))


def prune(params: optax.Params | Posterior, mask: Any) -> optax.Params:
    """Set to zero what `mask` does not keep.

    >>> print(prune(jnp.array([1.0, 2.0]), jnp.array([True, False])))
    [1. 0.]

    Args:
      params: the parameters, or a `Posterior`, whose mean is taken.
      mask: booleans, True for what is kept, with the structure of the parameters and
        their shapes, or a single one for an array.

    Returns:
      The parameters, pruned, in their own dtypes.

    Raises:
      TypeError, ValueError: `mask` is not of booleans, or not like the parameters.
    """
    if hasattr(params, "covariance_times"):
        # Of any family: mypy knows one.
        params = params.mean  # type: ignore[union-attr, assignment]
    array_leaves("params", params)
    mask = _whole_mask("mask", mask, "the parameters", params)
    return _pruned(params, mask)


def curve(
    fn: Callable[..., Any],
    posterior: Posterior,
    sparsities: jax.typing.ArrayLike,
    criterion: Callable[[Posterior, jax.Array], Any] = by_signal_to_noise,
    args: tuple[Any, ...] = (),
) -> Any:
    """Evaluate `fn` of the pruned parameters at each sparsity.

    One after the other: memory does not grow with the number of sparsities.

    >>> q = Posterior(mean=jnp.array([3.0, 2.0, 1.0, 4.0]), precision=jnp.ones(4))
    >>> print(curve(jnp.sum, q, [0.0, 0.5, 1.0]))
    [10.  7.  0.]

    Args:
      fn: ``fn(theta, *args)``, a pure function, returning any pytree of arrays, such as
        the accuracy on a validation set.
      posterior: what `ivon_jax.posterior` returns.
      sparsities: (K,), numbers in [0, 1].
      criterion: `by_signal_to_noise`, `by_variance`, or any other function of the
        posterior and a traced sparsity that returns the mask for `prune`.
      args: what `fn` takes after theta; see `ivon_jax.predict`.

    Returns:
      What `fn` returns, with a leading axis of K.

    Raises:
      TypeError, ValueError: `sparsities` are not numbers in [0, 1], or as `criterion`.
    """
    _checks.function("fn", fn)
    _checks.function("criterion", criterion, "posterior and sparsity", "by_variance")
    _check(posterior)
    sparsities = _fractions("sparsities", sparsities)
    _checks.arguments("args", args)

    def run(posterior, sparsities, args):
        def at(sparsity):
            theta = prune(posterior, criterion(posterior, sparsity))
            return _checks.arrays("fn(theta)", fn(theta, *args))

        return jax.lax.map(at, sparsities)

    return compiled.call(run, posterior, sparsities, args, of=fn)


def _check(posterior):
    _checks.distribution("posterior", posterior, "covariance_times")
    if not any(jax.tree.leaves(posterior.trained)):
        raise ValueError(
            "`posterior` must have a precision for some array, got point masses alone. "
            "Was it made of the state of `ivon_jax.ivon`?"
        )


@jax.jit
def _pruned(params, mask):
    def kept(param, keep):
        return jnp.where(keep, param, jnp.zeros_like(param))

    return jax.tree.map(kept, params, mask)


@jax.jit
def _kept(arrays, removed):
    """All but the lowest entries, ranked in a dtype that holds each exactly."""
    return ranks.without_lowest(wide(*arrays), removed)


def _num_removed(sparsity, size):
    """The sparsity times `size`, rounded, as a pair of integers."""
    sparsity = _checks.number("sparsity", sparsity, _checks.FRACTION)
    if isinstance(sparsity, float):
        return ranks.pair(round(sparsity * size))
    rounded = ranks.pair(jnp.round(sparsity * float(size)))
    # float32 does not hold every size.
    choices = zip(rounded, ranks.pair(size), strict=True)
    return [jnp.where(sparsity < 1, *choice) for choice in choices]


def _like_mean(posterior, kept):
    """`kept` in the shapes of the mean, those of point masses included."""

    def whole(mean, keep):
        return None if mean is None else jnp.broadcast_to(keep, jnp.shape(mean))

    return jax.tree.map(whole, posterior.mean, kept, is_leaf=_is_none)


def _is_none(node):
    return node is None


def _fractions(name, value):
    """Return numbers in [0, 1] along one axis."""
    array = jnp.asarray(value, dtype=float)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`{name}` must be a list of at least one number, got shape {array.shape}."
        )
    low, high = _checks.extremes(array) or (0, 1)
    if not 0 <= low <= high <= 1:
        bad = high if low >= 0 else low
        raise ValueError(f"`{name}` must be in [0, 1], got {bad}.")
    return array


def _whole_mask(name, mask, reference_name, reference):
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
