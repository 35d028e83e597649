"""The sample as the trainer's parameters, for trainers that own the gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._arrays.dtypes import wide_dtype
from .._arrays.trees import array_leaves, like
from . import validity
from .estimate import Estimate, check_transformation
from .posterior import posterior
from .state import SampledState, find_states


class _Draw(NamedTuple):
    """Where the trainer took its gradient, and whether that was the mean."""

    theta: optax.Params
    at_mean: jax.Array


def sampled(
    tx: optax.GradientTransformation, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""Make the trainer's parameters a draw :math:`\theta \sim q`, for any trainer.

    Most trainers take an optimizer, differentiate at *their* parameters and call
    ``tx.update(grads, opt_state, params)``: none draws :math:`\theta` or passes
    ``sample=``. Here their parameters are the sample, and the mean lives in the state.
    `update` calls ``tx.update(grads, state, mean, sample=params)``, moves the mean,
    draws the next :math:`\theta'` and returns :math:`\theta' - \theta`, so that the
    trainer's ``optax.apply_updates`` arrives there:

    >>> import ivon_jax
    >>> tx = ivon_jax.sampled(ivon_jax.ivon(0.1, ess=1000), jax.random.key(0))
    >>> params = jnp.ones(3)
    >>> opt_state = tx.init(params)
    >>> for _ in range(20):  # any trainer's loop
    ...     grads = jax.grad(lambda params: jnp.mean(params**2))(params)
    ...     updates, opt_state = tx.update(grads, opt_state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> q = ivon_jax.posterior(params, opt_state)  # around the mean, not the sample
    >>> evaluate_here = ivon_jax.mean(params, opt_state)

    The first gradient is at the mean, where the trainer starts. It tells nothing of the
    curvature: the momentum and the mean take that step, `h` stays as it is.

    Args:
      tx: `ivon`, or any optax transformation with it inside. All that changes weights
        belongs in here, ``sampled(optax.chain(ivon, ...), key)``; what changes
        gradients, such as clipping, may stand on either side.
      key: a JAX random key. The state keeps its data, and every step folds its count
        in: a run that goes on from a checkpoint draws what it would have drawn, and
        under ``jax.vmap`` over ``init`` each member has noise of its own.

    Returns:
      A transformation whose `update` needs the gradients at the parameters alone. It
      also takes ``sample=``, ``hess=`` or an `Estimate`, which are passed on. The mean
      is float32, or wider where a parameter is. Of parameters with fewer bits, or where
      the trainer doesn't pass them, the exact sample is drawn again from its key.

    Raises:
      TypeError, ValueError: `tx` is not a transformation or `key` not a key; in
        `init`, `tx` has no IVON, is `sampled` itself, or has `optax.MultiSteps`, which
        belongs around.
    """
    check_transformation(
        "tx", tx, "ivon_jax.sampled(ivon_jax.ivon(...), jax.random.key(0))"
    )
    key = _checks.random_key("key", key)
    impl = jax.random.key_impl(key)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        array_leaves("params", params)
        mean = jax.tree.map(_mean_of, params)
        inner_state = tx.init(mean)
        validity.inside_sampled(inner_state, find_states(inner_state))
        return SampledState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.copy(jax.random.key_data(key)),
            mean=mean,
            inner_state=inner_state,
        )

    def draw(state):
        at_mean = state.count == 0
        step_key = jax.random.wrap_key_data(state.key, impl=impl)
        step_key = jax.random.fold_in(step_key, state.count)
        theta = posterior(state.mean, state.inner_state).sample(step_key)
        return _Draw(theta, at_mean)

    def current(params, state):
        """The draw that the trainer's parameters are, without its rounding errors."""
        if params is not None and not _rounded(params, state.mean):
            return _Draw(params, state.count == 0)
        theta, at_mean = draw(state)
        theta = jax.tree.map(lambda m, t: jnp.where(at_mean, m, t), state.mean, theta)
        return _Draw(theta, at_mean)

    def update(grads, state, params=None, **extra_args):
        params = validity.params_of_sampled(params, grads, state.mean)
        theta, at_mean = current(params, state)
        if not _has_curvature(grads, extra_args):
            extra_args |= {"sample": theta, "at_mean": at_mean}
        updates, inner_state = tx.update(
            _like_mean(grads, state.mean), state.inner_state, state.mean, **extra_args
        )
        state = state._replace(
            count=optax.safe_increment(state.count),
            mean=optax.apply_updates(state.mean, updates),
            inner_state=inner_state,
        )
        before = theta if params is None else params
        return jax.tree.map(_difference, draw(state).theta, before), state

    # In optax's protocol the first argument is `updates`; it is passed by position.
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _mean_of(param):
    """A copy: the trainer may donate its own. Floats are float32 or wider."""
    dtype = jnp.result_type(param)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.copy(param).astype(wide_dtype(param) if floating else dtype)


def _rounded(params, mean):
    """Return whether any array of `params` has fewer bits than its mean."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mean), strict=True)
    return any(jnp.result_type(p) != m.dtype for p, m in pairs)


def _has_curvature(grads, extra_args):
    """Return whether the caller has drawn samples of its own."""
    given = isinstance(grads, Estimate), extra_args.get("sample") is not None
    return any(given) or extra_args.get("hess") is not None


def _like_mean(grads, mean):
    """Gradients in the dtypes of the mean; an `Estimate` has them already."""
    if isinstance(grads, Estimate):
        return grads

    def cast(grad, mean):
        floating = jnp.issubdtype(jnp.result_type(grad), jnp.floating)
        return jnp.asarray(grad, mean.dtype) if floating else grad

    grads = like("grads", grads, "`params`", mean)
    return jax.tree.map(cast, grads, mean)


def _difference(theta, before):
    """The update that leads to `theta`, in the dtype of the trainer's parameters."""
    dtype = jnp.result_type(before)
    return (theta - jnp.asarray(before, theta.dtype)).astype(dtype)
