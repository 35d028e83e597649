r"""How much each training example matters: leave-one-out predictions and sensitivities.

The memory-perturbation equation (Nickl et al., 2023) estimates, without training
again, how the outputs of example i would move if it were left out of the training set:

.. math::
    f_i^{\setminus i} - f_i \approx V_i e_i, \qquad
    V_i = J_i \, \mathrm{diag}(\sigma^2) J_i^\top, \qquad
    e_i = \nabla_{f_i} \ell(f_i, y_i)

:math:`f_i` are the C outputs at the posterior's mean, :math:`J_i` their Jacobian
(C x P) with respect to the P parameters, :math:`\sigma^2` the posterior's variance,
:math:`V_i` the covariance of the outputs, and :math:`e_i` the prediction error, for the
cross-entropy :math:`\mathrm{softmax}(f_i) - y_i` with a one-hot :math:`y_i`. A product
with :math:`V_i` is one forward and one backward pass: nothing of size C x P exists.

Where an example has several predictions, as a sequence has tokens, :math:`f_i` are all
its outputs, T x C, and :math:`\ell` is the sum of their losses: the whole sequence is
left out. Predictions that don't count by `where`, such as padding, have no loss and no
deviation, so that they change no norm, sum or mean; `fn` has to keep them from the
others, as attention masks do.

:math:`\sigma^2` must be that of the whole training set, ``ess`` the number of its
examples. Then ``x`` and ``y`` may be any part of it, without augmentation. All
functions work under ``jit``; there, a label that counts and is no class gives NaN.

They share their arguments:

* ``fn``: ``fn(theta, x) -> (N, C)``, logits or other outputs; C = 1 for a sigmoid; or
  (N, ..., C) for several predictions each. It is called with batches of one example, so
  it must treat the examples of a batch independently (batch normalisation in training
  mode does not), and it needs both forward- and reverse-mode derivatives, which a
  ``jax.custom_vjp`` does not have.
* ``posterior``: a `Posterior`. Its point masses have no variance and are constants.
* ``x``: a pytree of arrays, the N examples along their first axes.
* ``y``: (N,) or (N, ...), integer labels in 0..C-1, one for each prediction, 0 or 1 for
  a sigmoid; with a `loss` of your own any pytree with such first axes.
* ``loss``: ``loss(outputs, y) -> scalar``, the negative log-likelihood in nats of *one*
  prediction's outputs, (C,). For regression with noise of standard deviation s:
  ``lambda f, y: 0.5 * jnp.sum((f - y) ** 2) / s**2``.
* ``where``: (N,), booleans, the examples that count, or (N, ...), the predictions; None
  for all. The others may have any label, and any outputs.
* ``diagonal``: whether to take the diagonal alone of :math:`V_i`, so that
  :math:`V_i e_i` is a product of elements, as in the paper's CIFAR-10 runs (appendix
  D.4). It costs C backward passes for each example, not one.
* ``chunk_size``: how many examples to evaluate at once. Memory grows with `chunk_size`
  times P. With `x` sharded over devices, make it a multiple of their number that
  divides N.

Each raises TypeError or ValueError for arguments that do not fit.

References:
  Nickl et al., The Memory Perturbation Equation: Understanding Model's Sensitivity to
  Data, NeurIPS 2023; Shen et al., Variational Learning is Effective for Large Deep
  Networks, ICML 2024, section 4.4, appendices C.5 and D.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks
from ._arrays import compiled
from ._arrays.loops import map_examples
from ._distributions.gaussian import Posterior
from ._evaluation import jacobian, validity


def _cross_entropy(outputs, label):
    """Cross-entropy of a softmax, of one output of a sigmoid; NaN for no class."""
    valid = (label >= 0) & (label < max(2, outputs.size))
    outputs = outputs * jnp.where(valid, 1, jnp.nan)
    if outputs.size == 1:
        return jax.nn.softplus(jnp.where(label == 1, -outputs[0], outputs[0]))
    chosen = jnp.arange(outputs.size, dtype=label.dtype) == label
    return jax.nn.logsumexp(outputs) - jnp.sum(jnp.where(chosen, outputs, 0))


class LeaveOneOut(NamedTuple):
    """What one pass over the examples tells, float32 or wider.

    >>> q = Posterior(mean=jnp.ones((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> result = leave_one_out(lambda theta, x: x @ theta, q, x, y)
    >>> result.logits.shape, result.sensitivities.shape
    ((1, 2), (1,))
    """

    logits: jax.Array  #: (N, C), or like the outputs: f_i + V_i e_i
    deviations: jax.Array  #: the same shape, in units of the outputs: V_i e_i
    sensitivities: jax.Array  #: (N,): the Euclidean norms of the deviations
    loss: jax.Array  #: (): the mean of the losses at `logits`, in nats per prediction


def leave_one_out(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    *,
    loss: Callable[[jax.Array, Any], jax.Array] = _cross_entropy,
    where: jax.typing.ArrayLike | None = None,
    diagonal: bool = False,
    chunk_size: int = 16,
) -> LeaveOneOut:
    r"""Estimate all that the module is about in one pass; see there for the arguments.

    The functions below return a part of this each, for the price of the whole. In
    Bayesian linear regression with noise of variance :math:`s^2` the exact deviation is
    :math:`V_i e_i / (1 - V_i / s^2)`: the estimate leaves the leverage
    :math:`V_i / s^2` out, which is small where no example determines a parameter alone.

    >>> q = Posterior(mean=jnp.ones((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> result = leave_one_out(lambda theta, x: x @ theta, q, x, y)
    >>> print(*result[:3], result.loss.round(2))
    [[0.875 1.125]] [[-0.125  0.125]] [0.17677669] 0.83

    Returns:
      A `LeaveOneOut`.
    """
    _checks.function("fn", fn, "parameters and inputs", "apply")
    _checks.function("loss", loss, "outputs and label", validity.SQUARED_ERROR)
    _checks.distribution("posterior", posterior, "covariance_times")
    _checks.boolean("diagonal", diagonal)
    _checks.integer_between("chunk_size", chunk_size, 1)
    x, y = jax.tree.map(jnp.asarray, x), jax.tree.map(validity.as_array, y)
    count = validity.number_of_examples(x=x, y=y)
    *shape, num_outputs = jacobian.shape_of_outputs(fn, posterior, x)
    where = _which_count(where, (count, *shape))
    if loss is _cross_entropy:
        y = validity.classes("y", y, (count, *shape), max(2, num_outputs), where)
    else:
        validity.of_predictions("y", y, (count, *shape))

    def run(posterior, x, y, where):
        linearized = jacobian.linearize(fn, posterior)

        def of_example(example):
            x, y, counts = example
            outputs = linearized(x, y, counts)
            errors = _of_predictions(jax.grad(_scalar(loss)), outputs.mean)
            error = _masked(errors(outputs.mean, y), counts)
            if diagonal:
                deviation = outputs.covariance_diagonal() * error
            else:
                deviation = outputs.covariance_times(error)
            deviation = _masked(deviation, counts)
            logits = outputs.mean + deviation
            losses = _of_predictions(loss, logits)(logits, y)
            norm = jnp.sqrt(jnp.sum(deviation**2))
            return LeaveOneOut(logits, deviation, norm, losses)

        return map_examples(of_example, (x, y, where), chunk_size)

    result = compiled.call(run, posterior, x, y, where, of=fn)
    return result._replace(loss=_mean(result.loss, where))


def deviations(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    **options: Any,
) -> jax.Array:
    r"""Estimate how each output would move without its example: :math:`V_i e_i`.

    To first order the example's own loss rises, by :math:`e_i^\top V_i e_i \ge 0`.
    Arguments and options are those of the module.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(deviations(lambda theta, x: x @ theta, q, x, y))
    [[-0.125  0.125]]

    Returns:
      Like the outputs, (N, C), and in their units, float32 or wider.
    """
    return leave_one_out(fn, posterior, x, y, **options).deviations


def sensitivities(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    **options: Any,
) -> jax.Array:
    r"""Measure how much the model depends on each example: :math:`\|V_i e_i\|_2`.

    Typical examples have low sensitivities; atypical, ambiguous and mislabelled ones
    have high ones (the paper's Fig. 6). Arguments and options are those of the module.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([0, 0])
    >>> print(sensitivities(lambda theta, x: x @ theta, q, x, y).round(4))
    [0.1768 0.7071]

    Returns:
      (N,), the Euclidean norms of `deviations`.
    """
    return leave_one_out(fn, posterior, x, y, **options).sensitivities


def leave_one_out_logits(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    **options: Any,
) -> jax.Array:
    r"""Estimate each output without its example in the training: :math:`f_i + V_i e_i`.

    Arguments and options are those of the module.

    >>> q = Posterior(mean=jnp.ones((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(leave_one_out_logits(lambda theta, x: x @ theta, q, x, y))
    [[0.875 1.125]]

    Returns:
      Like the outputs, (N, C), float32 or wider.
    """
    return leave_one_out(fn, posterior, x, y, **options).logits


def leave_one_out_loss(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    **options: Any,
) -> jax.Array:
    r"""Estimate the test loss from training examples, by leave-one-out.

    :math:`\frac{1}{N} \sum_i \ell(f_i + V_i e_i, y_i)`, in nats per example, to compare
    with the mean loss on held-out data; the paper's LOO (section 4.4.1) is the sum.
    With a loss that is convex in the outputs, as cross-entropy is, it is never below
    the training loss at the mean. Arguments and options are those of the module.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(leave_one_out_loss(lambda theta, x: x @ theta, q, x, y).round(2))
    0.83

    Returns:
      A scalar, the mean over all predictions that count.
    """
    return leave_one_out(fn, posterior, x, y, **options).loss


def _mean(losses, where):
    """The mean loss of the predictions that count."""
    if where is None:
        return jnp.mean(losses)
    total = jnp.sum(jnp.where(where, losses, 0))
    return total / jnp.sum(where, dtype=losses.dtype)


def _which_count(where, shape):
    """The mask of all predictions, from that of examples or of predictions, or None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    missing = max(0, len(shape) - where.ndim)
    return validity.which_count(
        "where", where.reshape(*where.shape, *[1] * missing), shape
    )


def _of_predictions(fn, outputs):
    """`fn` of one prediction, over all axes of `outputs` but the last."""
    for _ in outputs.shape[:-1]:
        fn = jax.vmap(fn)
    return fn


def _scalar(loss):
    """`loss`, checked."""

    def checked(outputs, y):
        value = loss(outputs, y)
        _check_loss(value)
        return value

    return checked


def _masked(values, counts):
    return values if counts is None else jnp.where(counts[..., None], values, 0)


def _check_loss(value):
    """Raise unless the loss of one prediction is a scalar."""
    if jnp.shape(validity.one_array("loss(outputs, y)", value)) != ():
        raise ValueError(
            "`loss(outputs, y)` must be a scalar, the loss of one prediction, got "
            f"shape {value.shape}. Sum it over the outputs."
        )
