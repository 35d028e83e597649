"""NNX models, drawn from the posterior of their optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from .. import _checks
from .._distributions.gaussian import Posterior
from .._optimizer import gradients, posterior as readers
from .._optimizer.estimate import Estimate

_Model = TypeVar("_Model", bound=nnx.Module)


def sample(key: jax.Array, model: _Model, optimizer: nnx.Optimizer) -> _Model:
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
      model: any NNX module; it stays as it is.
      optimizer: made for `model`, with IVON anywhere in its transformation. Only the
        variables of its ``wrt`` are drawn.

    Returns:
      A model of the same kind. Its other variables (batch statistics, dropout's random
      state, frozen parameters) are `model`'s own, not copies: what a forward pass
      writes to one is seen by both.

    Raises:
      TypeError: the arguments are of other kinds, or in another order.
      ValueError: no IVON state is in the optimizer.
    """
    _check_arguments("sample(key, model, optimizer)", model, optimizer)
    graphdef, params, *rest = nnx.split(model, optimizer.wrt, ...)
    opt_state = arrays(optimizer.opt_state)
    return nnx.merge(graphdef, readers.sample(key, arrays(params), opt_state), *rest)


def mean(model: _Model, optimizer: nnx.Optimizer) -> _Model:
    """Return `model` at the posterior mean: where to evaluate without samples.

    It differs from `model` where `ivon_jax.sampled` makes its parameters a sample:

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> tx = ivon_jax.sampled(ivon_jax.ivon(0.1, ess=1000), jax.random.key(0))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer):  # a trainer that knows nothing of IVON
    ...     grads = nnx.grad(lambda model: model(jnp.ones(3)).sum())(model)
    ...     optimizer.update(model, grads)
    >>> train_step(model, optimizer)
    >>> evaluate_here = ivon_jax.flax.mean(model, optimizer)

    Args:
      model: any NNX module.
      optimizer: made for `model`.

    Returns:
      A model of the same kind. Its other variables are `model`'s own, as in `sample`;
      the mean of parameters with few bits is float32.
    """
    _check_arguments("mean(model, optimizer)", model, optimizer)
    graphdef, params, *rest = nnx.split(model, optimizer.wrt, ...)
    means = readers.mean(arrays(params), arrays(optimizer.opt_state))
    return nnx.merge(graphdef, means, *rest)


def value_and_grad(
    loss_fn: Callable[..., Any], wrt: Any = nnx.Param, **options: Any
) -> Callable[..., tuple[Any, Estimate]]:
    """Estimate value, gradient and Hessian diagonal of an NNX loss over the posterior.

    This is `ivon_jax.value_and_grad` for models: with several samples, micro-batches,
    bfloat16, replicas. In a training step under ``nnx.jit``:

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> def loss_fn(model, x):
    ...     return jnp.mean(model(x) ** 2)
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, ivon_jax.ivon(0.1, ess=1000), wrt=nnx.Param)
    >>> grad_fn = ivon_jax.flax.value_and_grad(loss_fn, mc_samples=2, microbatches=2)
    >>> @nnx.jit
    ... def train_step(key, model, optimizer, x):
    ...     loss, estimate = grad_fn(key, model, optimizer, x)
    ...     optimizer.update(model, estimate.grad, hess=estimate.hess)
    ...     return loss
    >>> loss = train_step(jax.random.key(0), model, optimizer, jnp.ones((8, 3)))

    Args:
      loss_fn: ``loss_fn(model, *args)``, the *mean* loss per example, a scalar; with
        ``has_aux=True`` a pair of it and any pytree.
      wrt: the filter of the variables to draw and to differentiate by, that of the
        optimizer.
      **options: those of `ivon_jax.value_and_grad`: `has_aux`, `mc_samples`,
        `microbatches`, `grad_transform`, `compute_dtype`, ...

    Returns:
      A function ``(key, model, optimizer, *args) -> value, Estimate``. The parameters
      of `model` stay as they are. Its other variables change once, as in a plain step,
      however many draws there are: each draw starts from the old ones, floating-point
      variables that `loss_fn` changes (batch statistics) become their mean over the
      draws, and of others (the counts of random streams) the last draw's stay. Each
      draw has random keys, so dropout masks, of its own. Variables that `loss_fn`
      creates, such as sown intermediates, are not kept: return them as aux. An
      `nnx.Rngs` belongs in the model; for an argument take a key.

    Raises:
      TypeError, ValueError: as `ivon_jax.value_and_grad`; `wrt` is not the optimizer's.
    """
    has_aux = options.pop("has_aux", False)
    example = "lambda model, x: jnp.mean(model(x) ** 2)"
    _checks.function("loss_fn", loss_fn, "the model", example)

    def estimate(key, model, optimizer, *args, **kwargs):
        order = "(key, model, optimizer, *args)"
        _check_arguments(order, model, optimizer)
        _reject_streams(args, kwargs)
        of_optimizer = nnx.state(model, optimizer.wrt)
        graphdef, params, keys, rest = nnx.split(model, wrt, nnx.RngKey, ...)
        _check_filter(params, of_optimizer, wrt, optimizer.wrt)

        def loss_of_draw(theta, keys, *args, **kwargs):
            draw = nnx.merge(graphdef, theta, keys, rest, copy=True)
            value = loss_fn(draw, *args, **kwargs)
            loss, aux = _checks.loss_and_aux(value, has_aux)
            return loss, (aux, _changed(rest, nnx.split(draw, wrt, nnx.RngKey, ...)[3]))

        grad_fn = gradients.value_and_grad(loss_of_draw, has_aux=True, **options)
        opt_state = arrays(optimizer.opt_state)
        outputs = grad_fn(key, arrays(params), opt_state, arrays(keys), *args, **kwargs)
        (loss, (aux, changed)), (grad, hess) = outputs
        nnx.update(model, nnx.from_flat_state(_by_path(rest, changed)))
        result = Estimate(*(_in_variables(params, tree) for tree in (grad, hess)))
        return ((loss, aux) if has_aux else loss), result

    return estimate


def _reject_streams(args, kwargs):
    """Raise for random streams: no draw can change their counts in a derivative."""

    def is_stream(node):
        return isinstance(node, (nnx.Rngs, nnx.RngStream, nnx.RngState))

    named = jax.tree_util.tree_leaves_with_path((args, kwargs), is_leaf=is_stream)
    for (which, *path), node in named:
        if is_stream(node):
            name = ("args", "kwargs")[which.idx] + jax.tree_util.keystr(tuple(path))
            raise TypeError(
                f"`args` must have no stream of random keys, got {type(node).__name__} "
                f"at {name}: each draw needs keys of its own. Give it to the model, as "
                "`nnx.Dropout(0.1, rngs=rngs)` does, or pass `rngs.dropout()`, a key."
            )


def _in_variables(params, tree):
    """`tree` as `nnx.grad` returns it: the optimizer filters that by its `wrt`."""

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    return jax.tree.map(lambda p, x: p.replace(x), params, tree, is_leaf=is_variable)


def _changed(before, after):
    """The arrays that a forward pass has written, by their number in `before`."""
    after = dict(nnx.to_flat_state(arrays(after)))
    flat = enumerate(nnx.to_flat_state(arrays(before)))
    return {i: after[path] for i, (path, x) in flat if after[path] is not x}


def _by_path(state, arrays_by_number):
    """`arrays_by_number` with the paths of `state`."""
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return {paths[i]: x for i, x in arrays_by_number.items()}


def posterior(model: nnx.Module, optimizer: nnx.Optimizer) -> Posterior:
    """Return the Gaussian over the parameters of `optimizer` in `model`.

    Its samples are states for `nnx.merge`:

    >>> import ivon_jax.flax
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, ivon_jax.ivon(0.1, ess=1000), wrt=nnx.Param)
    >>> q = ivon_jax.flax.posterior(model, optimizer)
    >>> model.eval()  # dropout and batch normalisation write to a model in training
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
      TypeError: the arguments are of other kinds, or in another order.
      ValueError: no IVON state is in the optimizer.
    """
    _check_arguments("posterior(model, optimizer)", model, optimizer)
    params = arrays(nnx.state(model, optimizer.wrt))
    return readers.posterior(params, arrays(optimizer.opt_state))


def prior(model: nnx.Module, optimizer: nnx.Optimizer) -> Posterior:
    """Return the prior over the parameters of `optimizer` in `model`.

    Both arguments, the result and the errors are as for `posterior`.

    >>> import ivon_jax.flax
    >>> model = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    >>> tx = ivon_jax.ivon(0.1, ess=1000, weight_decay=0.01)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> print(ivon_jax.flax.prior(model, optimizer).precision["bias"])
    [10. 10.]
    """
    _check_arguments("prior(model, optimizer)", model, optimizer)
    params = arrays(nnx.state(model, optimizer.wrt))
    return readers.prior(params, arrays(optimizer.opt_state))


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

    def inside(node):
        if not is_variable(node):
            return node
        [value] = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        return node[...] if hasattr(value, "shape") else value  # masked, or None

    return jax.tree.map(inside, tree, is_leaf=is_variable)


def _check_arguments(call, model, optimizer):
    """Raise if the NNX model and its optimizer are in the wrong places."""
    if not (hasattr(optimizer, "opt_state") and hasattr(optimizer, "wrt")):
        name, value, kind = "optimizer", optimizer, "an `nnx.Optimizer`"
    elif hasattr(model, "opt_state") or isinstance(model, (jax.Array, np.ndarray)):
        name, value, kind = "model", model, "an NNX module"
    else:
        return
    raise TypeError(
        f"`{name}` must be {kind}, got {type(value).__name__}. The order is `{call}`."
    )


def _check_filter(params, params_of_optimizer, wrt, wrt_of_optimizer):
    """Raise unless the variables to draw are those that the optimizer trains."""
    if jax.tree.structure(params) != jax.tree.structure(params_of_optimizer):
        raise ValueError(
            f"`wrt` must be the filter of the optimizer, got {wrt!r} where that has "
            f"{wrt_of_optimizer!r}. Call "
            "`ivon_jax.flax.value_and_grad(loss_fn, wrt=optimizer.wrt)`."
        )
