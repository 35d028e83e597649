"""Read the Gaussian out of an optimizer state, wherever IVON sits in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _rules
from .._distributions.gaussian import Posterior
from .transform import IVONState, weight_decays


class SampledState(NamedTuple):
    """What `sampled` remembers: the trainer's parameters are the sample."""

    count: jax.Array  # (), int32: t, steps taken; at 0 the parameters are the mean
    key: jax.Array  # raw data of the random key, uint32; each draw folds in its count
    mean: optax.Params  # shapes of params, float32 or wider: m
    inner_state: optax.OptState  # of the transformation with IVON in it


def mean(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """Return the posterior mean, where to evaluate a network without samples.

    It is `params` itself, unless `sampled` made these a sample: then the mean is in the
    state. The counterpart of `optax.contrib.schedule_free_eval_params`.

    >>> import ivon_jax
    >>> tx = ivon_jax.sampled(ivon_jax.ivon(0.1, ess=1000), jax.random.key(0))
    >>> params, grads = jnp.ones(2), jnp.zeros(2)
    >>> updates, opt_state = tx.update(grads, tx.init(params), params)
    >>> theta = optax.apply_updates(params, updates)
    >>> print(mean(theta, opt_state).round(2))
    [1. 1.]

    Args:
      params: the trainer's parameters.
      opt_state: any optax state, found by type as in `posterior`.

    Returns:
      A tree with the structure and shapes of `params`. What a `sampled` owns is float32
      or wider, the others are as they are.

    Raises:
      ValueError: `params` is not the tree that the state was made for, or a state.
    """
    _checks.params_before_state(find_states(params))
    states = _nodes(opt_state, SampledState)

    def owned(state):
        _checks.like("params", params, "the optimizer's state", state.mean)
        return _unmasked(state.mean, params)

    means = jax.tree.map(_checks.one_owner, params, *map(owned, states))
    return jax.tree.map(lambda p, m: p if m is None else m, params, means)


def posterior(params: optax.Params, opt_state: optax.OptState) -> Posterior:
    """Return the Gaussian that IVON has trained: mean `params`, precision of the state.

    Where `sampled` made `params` a sample, the mean is that of the state, as in `mean`.

    >>> import ivon_jax
    >>> params = {"w": jnp.ones(2), "b": jnp.zeros(())}
    >>> trained = {"w": True, "b": False}
    >>> tx = optax.masked(ivon_jax.ivon(0.1, ess=99, weight_decay=1.0), trained)
    >>> q = posterior(params, tx.init(params))
    >>> q.precision
    {'b': None, 'w': Array([198., 198.], dtype=float32)}

    Args:
      params: the parameters, as given to ``tx.init``.
      opt_state: the state of `ivon`, or of any optax transformation around it (`chain`,
        `masked`, `partition`, `inject_hyperparams`, `MultiSteps`, ...). Several IVON
        states, as in `partition`, make one posterior.

    Returns:
      A `Posterior` over all of `params`; what no IVON state owns is a point mass. Its
      mean is `params`, not a copy: where a later step donates `params` or `opt_state`,
      keep ``jax.tree.map(jnp.copy, q)``.

    Raises:
      ValueError: no IVON state is in `opt_state`, two own the same parameter, or
        `params` is not the tree that the state was made for.
    """
    precision = _merged(params, opt_state, _precision)
    return Posterior(mean(params, opt_state), precision)


def prior(params: optax.Params, opt_state: optax.OptState) -> Posterior:
    r"""Return the Gaussian that IVON regularises towards, for the KL divergence.

    Its mean is zero and its precision ``ess * weight_decay``, unless `ivon` was given
    a `prior`. With `weight_decay` zero it is flat, and every divergence infinite.

    >>> import ivon_jax
    >>> params = jnp.ones(2)
    >>> opt_state = ivon_jax.ivon(0.1, ess=100, weight_decay=0.5).init(params)
    >>> print(prior(params, opt_state).precision)
    [50. 50.]
    >>> q = ivon_jax.posterior(params, opt_state)
    >>> print(q.kl_divergence(prior(params, opt_state)).round())
    50.0

    Args:
      params: the parameters, as given to ``tx.init``.
      opt_state: any optax state with IVON in it; see `posterior`.

    Returns:
      A `Posterior` over all of `params`; what no IVON state owns is a point mass.

    Raises:
      ValueError: as `posterior`.
    """
    params = mean(params, opt_state)
    means = _merged(params, opt_state, _prior_mean)
    means = jax.tree.map(lambda p, m: p if m is None else m, params, means)
    return Posterior(means, _merged(params, opt_state, _prior_precision))


def sample(
    key: jax.Array, params: optax.Params, opt_state: optax.OptState
) -> optax.Params:
    r"""Draw :math:`\theta \sim q` (Algorithm 1, line 2): where to take the gradient.

    >>> import ivon_jax
    >>> params = jnp.zeros(3)
    >>> opt_state = ivon_jax.ivon(0.1, ess=1000).init(params)
    >>> theta = ivon_jax.sample(jax.random.key(0), params, opt_state)

    Args:
      key: a JAX random key, a fresh one at every step.
      params: the posterior mean, or a sample where `sampled` made it one.
      opt_state: any optax state with IVON in it; see `posterior`.

    Returns:
      A tree with the structure, shapes and dtypes of `params`. Every array has noise of
      its own, and what no IVON state owns comes back unchanged.

    Raises:
      ValueError: as `posterior`.
    """
    theta = posterior(params, opt_state).sample(key)

    def cast(x, param):
        return x if x is param else x.astype(jnp.result_type(param))

    return jax.tree.map(cast, theta, params)


def find_states(opt_state: optax.OptState) -> list[IVONState]:
    """Return every `IVONState` inside `opt_state`, found by type, however nested.

    For monitoring: ``find_states(opt_state)[0].hess`` is `h`, a curvature per example.

    >>> import ivon_jax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), ivon_jax.ivon(0.1, ess=1000))
    >>> [state] = find_states(tx.init(jnp.zeros(2)))
    >>> print(state.hess)
    [1. 1.]
    """
    return _nodes(opt_state, IVONState)


def _nodes(opt_state, cls):
    """Every `cls` inside `opt_state`."""

    def found(node):
        return isinstance(node, cls)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]


def _unmasked(tree, params):
    """`tree` with None in the place of each parameter that it leaves out."""

    def value(x, param):
        return jax.tree.map(lambda _: None, param) if _checks.is_masked(x) else x

    return jax.tree.map(value, tree, params, is_leaf=_checks.is_masked)


def _merged(params, opt_state, values):
    """The trees ``values(state)`` in one like `params`, None for a point mass."""
    _checks.params_before_state(find_states(params))
    states = find_states(opt_state)
    _checks.some_state(states, opt_state)

    def owned(state):
        _checks.one_state(state)
        _checks.like("params", params, "the optimizer's state", state.hess)
        return _unmasked(values(state), params)

    return jax.tree.map(_checks.one_owner, params, *map(owned, states))


def _precision(state):
    """Line 8 for each array."""

    def precision(h, delta):
        return _rules.precision(h, state.ess.astype(h.dtype), delta)

    return jax.tree.map(precision, state.hess, weight_decays(state))


def _prior_mean(state):
    if state.prior is None:
        return jax.tree.map(jnp.zeros_like, state.hess)
    return state.prior.mean


def _prior_precision(state):
    if state.prior is not None:
        return state.prior.precision

    def precision(h):
        ess, weight_decay = (x.astype(h.dtype) for x in (state.ess, state.weight_decay))
        return jnp.full_like(h, ess * weight_decay)

    return jax.tree.map(precision, state.hess)
