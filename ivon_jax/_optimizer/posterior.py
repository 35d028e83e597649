"""Read the Gaussian out of an optimizer state, wherever IVON sits in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from .._arrays.trees import array_leaves
from .._distributions.gaussian import Posterior
from .._distributions.parts import joint
from . import validity
from .state import find_states, nodes


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
      opt_state: any optax state, as for `posterior`.

    Returns:
      A tree with the structure and shapes of `params`. What a `sampled` owns is float32
      or wider, the others are as they are.

    Raises:
      ValueError: `params` is not the tree that the state was made for, or a state.
    """
    validity.params_before_state(find_states(params))

    def first(param, *means):
        _one_owner(param, *(m is not None for m in means))
        return next((m for m in means if m is not None), param)

    means = [state.mean_of(params) for state in nodes(opt_state, "mean_of")]
    return jax.tree.map(first, params, *means)


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
    params = mean(params, opt_state)
    return _joint(params, opt_state, lambda state: state.posterior_of(params))


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
    return _joint(params, opt_state, lambda state: state.prior_of(params))


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


def _joint(params, opt_state, read):
    """What ``read(state)`` says of each array, from the one state that owns it."""
    validity.params_before_state(find_states(params))
    states = find_states(opt_state)
    validity.some_state(states, opt_state)
    parts = [read(state) for state in states]
    array_leaves("params", params)
    jax.tree.map(_one_owner, params, *(part.trained for part in parts))
    return joint(parts)


def _one_owner(param, *owns):
    """Raise if two states own one parameter."""
    if sum(owns) > 1:
        raise ValueError(
            f"`opt_state` must have one IVON state for each parameter, got "
            f"{sum(owns)} for a parameter of shape {jnp.shape(param)}. Keep them "
            "apart with `optax.partition`. A state of your own says which parameters "
            "are its own by a tree like `params` in it: see CONTRIBUTING.md."
        )
