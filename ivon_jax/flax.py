"""IVON in Flax: a linen `TrainState` that samples, and NNX models drawn from q."""

from typing import Any, TypeVar

import jax
import optax
from flax import nnx
from flax.training import train_state

from . import _posterior
from ._transform import Estimate

Model = TypeVar("Model", bound=nnx.Module)


class TrainState(train_state.TrainState):
    """Flax's linen train state, with samples of the posterior.

    With a ``tx`` that has no IVON in it, `apply_gradients` is Flax's own.

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
        return _posterior.sample(key, self.params, self.opt_state)

    def posterior(self) -> _posterior.Posterior:
        """Return the Gaussian over the parameters; see `ivon_jax.posterior`."""
        return _posterior.posterior(self.params, self.opt_state)

    def apply_gradients(
        self,
        *,
        grads: optax.Updates | Estimate,
        sample: optax.Params | None = None,
        hess: optax.Updates | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Take one step; IVON needs one of `sample`, `hess` or an `Estimate`.

        Args:
          grads: gradients at `sample`, a tree like ``params``, or the `Estimate` of
            `ivon_jax.value_and_grad`, here within any optax wrapper.
          sample: what `sample` returned, where `grads` was taken.
          hess: an estimate of the Hessian diagonal of the mean loss.
          **kwargs: other fields of the state to replace, as in Flax.

        Returns:
          The state after the step.

        Raises:
          ValueError: as ``tx.update`` of `ivon_jax.ivon`.
        """
        if isinstance(grads, Estimate) and sample is None and hess is None:
            grads, hess = grads
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, sample=sample, hess=hess
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


def sample(key: jax.Array, model: Model, optimizer: nnx.Optimizer) -> Model:
    """Return `model` with the parameters of `optimizer` drawn from the posterior.

    Take the gradient of the loss at what this returns, and tell the optimizer of it:

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> tx = ivon_jax.ivon(learning_rate=0.1, ess=1000)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> sampled = ivon_jax.flax.sample(jax.random.key(0), model, optimizer)
    >>> grads = nnx.grad(lambda model: model(jnp.ones(3)).sum())(sampled)
    >>> updates = optimizer.update(
    ...     model, grads, sample=nnx.state(sampled, nnx.Param)
    ... )

    Args:
      key: a JAX random key, a fresh one at every step.
      model: any NNX module; it stays the posterior mean.
      optimizer: made for `model`, with IVON anywhere in its transformation. Only the
        variables of its ``wrt`` are drawn.

    Returns:
      A model of the same kind. Its other variables (batch statistics, dropout's random
      state, frozen parameters) are `model`'s own, not copies: what a forward pass
      writes to one is seen by both.

    Raises:
      ValueError: no IVON state is in the optimizer.
    """
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    opt_state = arrays(optimizer.opt_state)
    return nnx.merge(graphdef, _posterior.sample(key, arrays(params), opt_state), rest)


def posterior(model: nnx.Module, optimizer: nnx.Optimizer) -> _posterior.Posterior:
    """Return the Gaussian over the parameters of `optimizer` in `model`.

    Its samples are states for `nnx.merge`:

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, ivon_jax.ivon(0.1, ess=1000), wrt=nnx.Param)
    >>> q = ivon_jax.flax.posterior(model, optimizer)
    >>> graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    >>> def probs(theta):
    ...     return nnx.softmax(nnx.merge(graphdef, theta, rest)(jnp.ones(3)))
    >>> ivon_jax.predict(probs, q, jax.random.key(0)).shape
    (2,)

    Args:
      model: any NNX module.
      optimizer: made for `model`, with IVON anywhere in its transformation.

    Returns:
      A `Posterior` over ``nnx.state(model, optimizer.wrt)``, with arrays as leaves. It
      may be the ``prior=`` of another optimizer of `model`.

    Raises:
      ValueError: no IVON state is in the optimizer.
    """
    params = arrays(nnx.state(model, optimizer.wrt))
    return _posterior.posterior(params, arrays(optimizer.opt_state))


def prior(model: nnx.Module, optimizer: nnx.Optimizer) -> _posterior.Posterior:
    """Return the prior over the parameters of `optimizer` in `model`.

    Both arguments, the result and the errors are as for `posterior`.
    """
    params = arrays(nnx.state(model, optimizer.wrt))
    return _posterior.prior(params, arrays(optimizer.opt_state))


def arrays(tree: Any) -> Any:
    """Return `tree` with the array of each NNX variable in its place.

    For functions of parameters and state, such as `diagnostics.diagnose`:

    >>> import ivon_jax.flax
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, ivon_jax.ivon(0.1, ess=1000), wrt=nnx.Param)
    >>> params, opt_state = nnx.state(model, nnx.Param), optimizer.opt_state
    >>> numbers = ivon_jax.diagnostics.measure(*arrays((params, opt_state)))
    >>> print(numbers["num_params"])
    8.0

    Args:
      tree: any pytree; what has no variables comes back as it is.
    """

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    return jax.tree.map(
        lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable
    )
