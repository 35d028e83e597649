"""A linen train state that samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from .._distributions.gaussian import Posterior
from .._distributions.parts import beside
from .._optimizer import posterior as readers
from .._optimizer.estimate import Estimate, with_extra_args


class TrainState(train_state.TrainState):
    """Flax's linen train state, with samples of the posterior.

    With a ``tx`` that has no IVON in it, `apply_gradients` is Flax's own. ``tx`` may be
    an `optax.MultiSteps`: then hold one sample over a window, as it averages gradients.
    What Flax overwrites with its gradient (scales of fp8) is a point mass.

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> tx = ivon_jax.ivon(learning_rate=0.1, ess=1000)
    >>> state = ivon_jax.flax.TrainState.create(
    ...     apply_fn=lambda params, x: x @ params, params=jnp.ones(3), tx=tx
    ... )
    >>> theta = state.sample(jax.random.key(0))
    >>> grads = jax.grad(lambda theta: state.apply_fn(theta, jnp.ones(3)))(theta)
    >>> state = state.apply_gradients(grads=grads, sample=theta)
    >>> print(state.step)
    1
    """

    def sample(self, key: jax.Array) -> optax.Params:
        """Draw parameters from the posterior; see `ivon_jax.sample`."""
        return self.posterior().sample(key)

    def posterior(self) -> Posterior:
        """Return the Gaussian over the parameters; see `ivon_jax.posterior`."""
        q = readers.posterior(_trained(self.params), self.opt_state)
        own = _overwritten(self.params)
        return q if own is None else beside(q, lambda x, y: {"params": x} | y, own)

    def apply_gradients(
        self,
        *,
        grads: optax.Updates | Estimate,
        sample: optax.Params | None = None,
        hess: optax.Updates | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """Take one step; IVON needs one of `sample`, `hess` or an `Estimate`.

        Args:
          grads: gradients at `sample`, a tree like ``params``, or the `Estimate` of
            `ivon_jax.value_and_grad`, here within any optax wrapper. (Flax's own train
            state takes an `Estimate`, too, where nothing stands before IVON in ``tx``.)
          sample: what `sample` returned, where `grads` was taken.
          hess: an estimate of the Hessian diagonal of the mean loss.
          **kwargs: other fields of the state to replace, as in Flax.

        Returns:
          The state after the step.

        Raises:
          ValueError: as ``tx.update`` of `ivon_jax.ivon`.
        """
        if isinstance(grads, Estimate) and sample is None and hess is None:
            grads, hess = grads.opened()
        overwritten = _overwritten(grads)
        grads, sample, hess, params = map(_trained, (grads, sample, hess, self.params))
        updates, opt_state = with_extra_args(self.tx).update(
            grads, self.opt_state, params, sample=sample, hess=hess
        )
        params = optax.apply_updates(params, updates)
        params = _with_trained(self.params, params, overwritten)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


def _overwritten(tree):
    """The collection whose gradients are its next values, as Flax has it, or None."""
    if isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree:
        return {OVERWRITE_WITH_GRADIENT: tree[OVERWRITE_WITH_GRADIENT]}
    return None


def _trained(tree):
    """What the optimizer trains: all, or one collection beside the overwritten one."""
    return tree if _overwritten(tree) is None else tree["params"]


def _with_trained(params, trained, rest):
    """`params` with other values for what the optimizer trains, and for the rest."""
    own = _overwritten(params)
    return trained if own is None else {"params": trained} | own | (rest or {})
