"""From a loss to what `update` needs: gradient and Hessian estimate under q."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._arrays import compiled
from .._arrays.dtypes import wide_dtype
from .._arrays.loops import is_key, scan_mean, vmap_mean
from .batches import check_keys, cut, fold_in, map_keys
from .estimate import Estimate
from .posterior import posterior

ESTIMATORS = ("reparameterization", "squared_gradient", "gauss_newton")


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    mc_samples: int = 1,
    microbatches: int = 1,
    grad_transform: optax.GradientTransformation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    hess_estimator: Literal[
        "reparameterization", "squared_gradient", "gauss_newton"
    ] = "reparameterization",
    compute_dtype: jax.typing.DTypeLike | None = None,
    hess_reduce_dtype: jax.typing.DTypeLike | None = None,
    grad_reduce_dtype: jax.typing.DTypeLike | None = None,
    vectorize: bool = False,
) -> Callable[..., tuple[Any, Estimate]]:
    r"""Estimate value, gradient and Hessian diagonal of a loss over the posterior.

    This is lines 2 and 3 of Algorithm 1 with the paper's averages over samples s and
    devices j (section 3), each with noise of its own:

    .. math::
        \hat g = \frac{1}{JS} \sum_{j,s} \nabla \bar\ell(\theta_j^{(s)}), \qquad
        \hat h = \frac{1}{JS} \sum_{j,s}
            \nabla \bar\ell(\theta_j^{(s)}) (\theta_j^{(s)} - m) / \sigma^2

    The product comes before the mean: the mean gradient times the mean noise would be
    wrong by a factor of JS.

    >>> import ivon_jax
    >>> def loss_fn(theta, x):
    ...     return jnp.mean((x @ theta - 1.0) ** 2)
    >>> tx = ivon_jax.ivon(learning_rate=0.1, ess=1000)
    >>> params, batch = jnp.zeros(2), jnp.ones((8, 2))
    >>> opt_state = tx.init(params)
    >>> grad_fn = ivon_jax.value_and_grad(loss_fn, mc_samples=4, microbatches=2)
    >>> loss, estimate = grad_fn(jax.random.key(0), params, opt_state, batch)
    >>> updates, opt_state = estimate.update(tx, opt_state, params)

    Args:
      loss_fn: ``loss_fn(theta, *args, **kwargs)``, the *mean* loss per example, a
        scalar; with `has_aux` a pair of it and any pytree.
      has_aux: whether `loss_fn` returns a pair. Floating-point leaves of aux come back
        averaged, as the loss does; of others (counters, random keys) the last one comes
        back, each device its own.
      mc_samples: S, how many samples each (micro-)batch is evaluated at.
      microbatches: cut every array in `args` along its first axis into this many
        slices, one after the other, each with fresh noise: memory for one slice. Slice
        j has the rows ``j::microbatches``, so a batch that is sharded over devices
        stays so; on an explicit mesh whose devices can't share a slice's rows evenly,
        each has the whole batch. Scalars go to every slice as they are. Class weights
        and whatever else is no batch are no arguments: let `loss_fn` close over them.
      grad_transform: a stateless optax transformation, such as
        ``optax.clip_by_global_norm(1.0)``, of every sampled gradient before the product
        with its noise, as in the paper's GPT-2 runs.
      axis_name: the axis, or axes, of `jax.shard_map` or `jax.pmap` over which each
        device draws its own noise, from ``jax.random.fold_in(key, axis_index)``, and
        over which all results are averaged.
      hess_estimator: how to estimate the Hessian diagonal (the paper's Table 7):

        * "reparameterization", Eq. 3: unbiased for the Hessian of the smoothed loss,
          may be negative; one product.
        * "squared_gradient": :math:`\hat g^2`, of the mini-batch. Its noise is counted
          as curvature, and near an optimum it is about the Gauss-Newton estimate
          divided by the batch size; one product.
        * "gauss_newton", Eq. 2 (VOGN): the mean of squared gradients of single
          examples, ``loss_fn(theta, *[a[i:i+1] for a in args])``. Unbiased for the
          diagonal of the Fisher information where labels follow the model, never
          negative; a second backward pass, and memory for a gradient for each example
          of a micro-batch. `grad_transform` does not act on these.

      compute_dtype: round theta to this dtype, such as ``jnp.bfloat16``, before
        `loss_fn` sees it. It is the cast of mixed-precision training, in a better
        place: theta exists in this dtype alone. A batch in one piece then takes no more
        memory than with AdamW, whose parameters are cast inside of the loss;
        `microbatches` keep theta and a sum of estimates as well. Gradients come back in
        the parameters' dtypes.
      hess_reduce_dtype: the dtype in which Hessian estimates are summed over
        `axis_name`, instead of their own. With ``jnp.bfloat16`` the reduction is 1.5
        times that of the gradient, not twice. On 8 devices `h` moves by up to 0.002 %
        with b2 = 0.99999, by 0.04 % with 0.999, far less than by its own noise
        (benchmarks/hessian_sync.py).
      grad_reduce_dtype: the same for gradients. With ``compute_dtype=jnp.bfloat16`` and
        both of these the sum over devices is no coarser than that of mixed-precision
        AdamW, whose gradients are those of parameters in bfloat16.
      vectorize: evaluate the `mc_samples` side by side (`jax.vmap`) instead of one
        after the other: faster for small models, memory grows with S.

    Returns:
      A function ``(key, params, opt_state, *args, **kwargs) -> value, Estimate(grad,
      hess)``, where value is the loss, or (loss, aux) with `has_aux`. Integers among
      the parameters pass through, with gradients of zero. With one sample of one batch,
      theta is ``ivon_jax.sample(key, params, opt_state)``. Where theta has
      fewer bits than the posterior (`compute_dtype`, or low-precision params), theta
      minus the mean would take rounding errors for curvature: the exact noise is drawn
      a second time from the same key once the gradient is there, so that no memory
      holds it in the meantime.

      Typed random keys in `args` (``jax.random.key``; for dropout, say, also in the
      state of an NNX model) are new at every draw: ``jax.random.fold_in`` of the
      device, micro-batch, sample and, with "gauss_newton", example. With one draw of
      the whole batch a key stays as it is. Legacy keys look like a batch of two, and
      are refused where there are several draws.

      Where rows count unequally, such as sequences of unequal numbers of tokens, the
      mean over micro-batches is not the mean over all tokens. With this loss it is, for
      value, gradient and the Hessian estimate of "reparameterization"::

          def loss_fn(theta, tokens, mask, scale):
              return scale * jnp.sum(token_losses(theta, tokens) * mask)

          scale = microbatches / mask.sum()  # of all tokens; times devices of an axis

      ``estimate.update(tx, opt_state, params)`` takes the step, through any optax
      transformation.

    Raises:
      TypeError, ValueError: an argument, the loss or a batch is not as described; no
        IVON state is in `opt_state`.

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
      Eqs. 2 and 3, section 3 (multiple GPUs), appendix B.2, C.1.
    """
    _checks.integer_between("mc_samples", mc_samples, 1)
    _checks.integer_between("microbatches", microbatches, 1)
    _checks.choice("hess_estimator", hess_estimator, ESTIMATORS)
    _checks.boolean("has_aux", has_aux)
    _checks.function("loss_fn", loss_fn)
    mean = vmap_mean if _checks.boolean("vectorize", vectorize) else scan_mean
    loss_fn = _with_aux(loss_fn, has_aux)
    if compute_dtype is not None:
        compute_dtype = _floating_dtype("compute_dtype", compute_dtype)
    reduce_dtypes = {"hess": hess_reduce_dtype, "grad": grad_reduce_dtype}
    for name, dtype in reduce_dtypes.items():
        if dtype is not None:
            _floating_dtype(f"{name}_reduce_dtype", dtype)
            _check_axis(f"{name}_reduce_dtype", axis_name)
    one_draw = mc_samples == microbatches == 1 and axis_name is None
    one_draw = one_draw and hess_estimator != "gauss_newton"
    draw = functools.partial(
        _draw, loss_fn, grad_transform, hess_estimator, compute_dtype
    )

    def over_samples(state, key, batch):
        if mc_samples == 1:
            return draw(state, key, batch)
        draws = jax.random.split(key, mc_samples), jnp.arange(mc_samples)
        return mean(lambda x: draw(state, x[0], fold_in(batch, x[1])), draws)

    def over_microbatches(state, key, batch):
        if microbatches == 1:
            return over_samples(state, key, batch)
        slices, join = cut("microbatches", microbatches, batch)
        draws = jax.random.split(key, microbatches), slices
        return scan_mean(lambda x: over_samples(state, x[0], join(x[1])), draws)

    def average(state, key, batch):
        if one_draw:  # no loop to compile
            return over_microbatches(state, key, batch)

        def run(state, key):
            return over_microbatches(state, key, batch)  # its numbers stay numbers

        return compiled.call(run, state, key, of=loss_fn)

    def estimate(key, params, opt_state, *args, **kwargs):
        key, batch = _checks.random_key("key", key), (args, kwargs)
        if not one_draw:
            check_keys(batch)
        state = params, opt_state
        if axis_name is None:
            loss, aux, (grad, hess) = average(state, key, batch)
        else:
            index = _axis_index(axis_name)
            key, batch = jax.random.fold_in(key, index), fold_in(batch, index)
            outputs = over_microbatches(_per_device(state, index), key, batch)
            loss, aux, (grad, hess) = outputs
            loss, aux = _mean_over_devices((loss, aux), axis_name)
            grad = _mean_over_devices(grad, axis_name, grad_reduce_dtype)
            hess = _mean_over_devices(hess, axis_name, hess_reduce_dtype)
        result = Estimate(_with_zeros(grad, params), hess)
        return ((loss, aux) if has_aux else loss), result

    return estimate


def _with_aux(loss_fn, has_aux):
    """`loss_fn` returning a checked (loss, aux), aux None where it has none."""

    def checked(theta, batch):
        args, kwargs = batch
        value = loss_fn(theta, *args, **kwargs)
        loss, aux = _checks.loss_and_aux(value, has_aux)
        return loss, jax.tree.map(jnp.asarray, aux)

    return checked


def _draw(loss_fn, grad_transform, hess_estimator, compute_dtype, state, key, batch):
    """Loss, aux and estimate at one sample of one batch; no gradient of integers."""
    params, opt_state = state
    q = posterior(params, _at_each_draw(opt_state, key))
    theta = q.perturb(q.noise(key), compute_dtype)
    if compute_dtype is None:
        theta = jax.tree.map(_in_dtype, theta, params)
    floating, join = _floating(theta)

    def loss_and_aux(floating):
        return loss_fn(join(floating), batch)

    (loss, aux), grad = jax.value_and_grad(loss_and_aux, has_aux=True)(floating)
    grad = optax.tree.cast_like(grad, _floating(q.mean)[0])
    if grad_transform is not None:
        grad = _transformed(grad_transform, grad, floating)
    match hess_estimator:
        case "reparameterization":
            hess = _reparameterization(q, key, theta, loss, grad)
        case "squared_gradient":
            hess = q.squared_gradient(grad)
        case "gauss_newton":
            hess = _gauss_newton(q, loss_fn, theta, batch)
    return loss, aux, Estimate(grad, hess)


def _at_each_draw(opt_state, key):
    """`opt_state` with its numbers after `key`, and so the precision that they make.

    The compiler would compute the precision once, before a loop over draws, and keep it
    in memory as large as the parameters.
    """

    def after_key(x):
        if jnp.ndim(x) or not _is_floating(x):
            return x
        return jax.lax.optimization_barrier((x, jax.random.clone(key)))[0]

    return jax.tree.map(after_key, opt_state)


def _in_dtype(x, param):
    """`x` in the dtype of its parameter: the mean of `sampled` may be wider."""
    dtype = jnp.result_type(param)
    return x if jnp.result_type(x) == dtype else x.astype(dtype)


def _floating(theta):
    """What of `theta` has a gradient, None for the rest, and the way back to theta."""

    def join(floating):
        return jax.tree.map(lambda x, y: x if y is None else y, theta, floating)

    return jax.tree.map(lambda x: x if _is_floating(x) else None, theta), join


def _is_floating(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _with_zeros(grad, params):
    """`grad` with zeros for integers, so that updates leave them as they are."""

    def fill(param, g):
        if g is not None or is_key(param):
            return g
        return jnp.zeros_like(param)

    return jax.tree.map(fill, params, grad)


def _transformed(grad_transform, grad, theta):
    _check_stateless("grad_transform", grad_transform, theta)
    return grad_transform.update(grad, grad_transform.init(theta), theta)[0]


def _reparameterization(q, key, theta, loss, grad):
    """Eq. 3, without memory for the noise.

    The backward pass keeps theta, so theta minus mean is free. A rounded theta doesn't
    tell; there the noise is drawn again from its key.
    """

    def rounded(mean, theta, trained):
        return trained and theta.dtype != wide_dtype(mean, theta)

    if not any(jax.tree.leaves(jax.tree.map(rounded, q.mean, theta, q.trained))):
        return q.hess_estimate(grad, theta)
    # NaN anyway, where the key is another one: what counts is that this draw needs the
    # loss, or the compiler would keep the first one for it. The clones tell jax's
    # checker that the key is used a second time.
    key = jax.random.clone(key)
    key = jnp.where(jnp.isnan(loss), jax.random.fold_in(key, 0), key)
    return q.hess_estimate_of_noise(grad, q.noise(jax.random.clone(key)))


def _gauss_newton(q, loss_fn, theta, batch):
    """Eq. 2: every example is a micro-batch of one, with random keys of its own."""
    batch = map_keys(jax.random.clone, batch)  # the loss of the batch has used them
    slices, join = cut("gauss_newton", None, batch)
    floating, whole = _floating(theta)

    def of_example(one_slice):
        grad, _ = jax.grad(
            lambda floating: loss_fn(whole(floating), join(one_slice)), has_aux=True
        )(floating)
        return q.squared_gradient(grad)

    return vmap_mean(of_example, slices)


def _per_device(state, index):
    """`state` with arrays typed as differing between devices, as theta does by noise.

    `jax.shard_map` sums gradients over the devices where the parameter is the same on
    all.
    """

    def vary(x):
        dtype = jnp.result_type(x)
        return x + jnp.zeros_like(index, dtype) if _is_floating(x) else x

    return jax.tree.map(vary, state)


def _mean_over_devices(tree, axis_name, dtype=None):
    """The mean of floating-point leaves, summed in `dtype`; others stay as they are."""
    count = jax.lax.psum(1, axis_name)

    def mean(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        total = jax.lax.psum(x.astype(dtype or x.dtype), axis_name)
        return total.astype(x.dtype) / count

    return jax.tree.map(mean, tree)


def _floating_dtype(name, value):
    """Return a floating-point dtype."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating-point dtype such as `jnp.bfloat16`, got "
            f"{value!r}."
        )
    return dtype


def _check_axis(name, axis_name):
    """Raise if an argument needs an axis of devices, and there is none."""
    if axis_name is None:
        raise ValueError(f"`{name}` needs `axis_name`, the axis to reduce over.")


def _axis_index(axis_name):
    """Return this device's index along a mapped axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound by a map around the call, got {axis_name!r}. "
            "Call inside `jax.shard_map` or `jax.pmap` with that axis name."
        ) from None


def _check_stateless(name, transform, params):
    """Raise unless this is an optax transformation without a state."""
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax transformation, such as "
            f"`optax.clip_by_global_norm(1.0)`, got {transform!r}."
        )
    state = jax.eval_shape(transform.init, params)
    if jax.tree.leaves(state):
        raise ValueError(
            f"`{name}` must be stateless, got one with the state {state}. Chain it "
            "before `ivon_jax.ivon` instead."
        )
