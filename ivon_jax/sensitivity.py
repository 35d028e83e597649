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

:math:`\sigma^2` must be that of the whole training set, ``ess`` the number of its
examples. Then ``x`` and ``y`` may be any part of it, without augmentation. All
functions work under ``jit``; there, the values of labels go unchecked.

They share their arguments:

* ``fn``: ``fn(theta, x) -> (N, C)``, logits or other outputs. It is called with batches
  of one example, so it must treat the examples of a batch independently (batch
  normalisation in training mode does not), and it needs both forward- and reverse-mode
  derivatives, which a ``jax.custom_vjp`` does not have.
* ``posterior``: a `Posterior`. Its point masses have no variance and are constants.
* ``x``: a pytree of arrays, the N examples along their first axes.
* ``y``: (N,), integer labels in 0..C-1; with a `loss` of your own any such pytree.
* ``loss``: ``loss(outputs, y) -> scalar``, the negative log-likelihood in nats of *one*
  example's outputs, (C,). For regression with noise of standard deviation s:
  ``lambda f, y: 0.5 * jnp.sum((f - y) ** 2) / s**2``.
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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _checks, _chunks, _jacobian
from ._gaussian import Posterior

_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def deviations(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    *,
    loss: Callable[[jax.Array, Any], jax.Array] = _cross_entropy,
    diagonal: bool = False,
    chunk_size: int = 16,
) -> jax.Array:
    r"""Estimate how each output would move without its example: :math:`V_i e_i`.

    To first order the example's own loss rises, by :math:`e_i^\top V_i e_i \ge 0`.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(deviations(lambda theta, x: x @ theta, q, x, y))
    [[-0.125  0.125]]

    Args:
      fn: outputs of a batch; for this and the other arguments see the module.
      posterior: what `ivon_jax.posterior` returns.
      x: the examples.
      y: their labels.
      loss: of one example.
      diagonal: whether to use the diagonal of :math:`V_i` alone.
      chunk_size: examples to evaluate at once.

    Returns:
      (N, C), in the units of the outputs, float32 or wider.
    """

    def result(_outputs, deviation, _y):
        return deviation

    return _evaluate(result, fn, posterior, x, y, loss, diagonal, chunk_size)


def sensitivities(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    *,
    loss: Callable[[jax.Array, Any], jax.Array] = _cross_entropy,
    diagonal: bool = False,
    chunk_size: int = 16,
) -> jax.Array:
    r"""Measure how much the model depends on each example: :math:`\|V_i e_i\|_2`.

    Typical examples have low sensitivities; atypical, ambiguous and mislabelled ones
    have high ones (the paper's Fig. 6).

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([0, 0])
    >>> print(sensitivities(lambda theta, x: x @ theta, q, x, y).round(4))
    [0.1768 0.7071]

    Args:
      fn: outputs of a batch; for this and the other arguments see the module.
      posterior: what `ivon_jax.posterior` returns.
      x: the examples.
      y: their labels.
      loss: of one example.
      diagonal: whether to use the diagonal of :math:`V_i` alone.
      chunk_size: examples to evaluate at once.

    Returns:
      (N,), the Euclidean norms of `deviations`.
    """

    def result(_outputs, deviation, _y):
        return jnp.linalg.norm(deviation)

    return _evaluate(result, fn, posterior, x, y, loss, diagonal, chunk_size)


def leave_one_out_logits(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    *,
    loss: Callable[[jax.Array, Any], jax.Array] = _cross_entropy,
    diagonal: bool = False,
    chunk_size: int = 16,
) -> jax.Array:
    r"""Estimate each output without its example in the training: :math:`f_i + V_i e_i`.

    In Bayesian linear regression with noise of variance :math:`s^2` the exact deviation
    is :math:`V_i e_i / (1 - V_i / s^2)`: the estimate leaves the leverage
    :math:`V_i / s^2` out, which is small where no example determines a parameter alone.

    >>> q = Posterior(mean=jnp.ones((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(leave_one_out_logits(lambda theta, x: x @ theta, q, x, y))
    [[0.875 1.125]]

    Args:
      fn: outputs of a batch; for this and the other arguments see the module.
      posterior: what `ivon_jax.posterior` returns.
      x: the examples.
      y: their labels.
      loss: of one example.
      diagonal: whether to use the diagonal of :math:`V_i` alone.
      chunk_size: examples to evaluate at once.

    Returns:
      (N, C), like the outputs, float32 or wider.
    """

    def result(outputs, deviation, _y):
        return outputs + deviation

    return _evaluate(result, fn, posterior, x, y, loss, diagonal, chunk_size)


def leave_one_out_loss(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    y: Any,
    *,
    loss: Callable[[jax.Array, Any], jax.Array] = _cross_entropy,
    diagonal: bool = False,
    chunk_size: int = 16,
) -> jax.Array:
    r"""Estimate the test loss from training examples, by leave-one-out.

    :math:`\frac{1}{N} \sum_i \ell(f_i + V_i e_i, y_i)`, in nats per example, to compare
    with the mean loss on held-out data; the paper's LOO (section 4.4.1) is the sum.
    With a loss that is convex in the outputs, as cross-entropy is, it is never below
    the training loss at the mean.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> x, y = jnp.ones((1, 1)), jnp.array([0])
    >>> print(leave_one_out_loss(lambda theta, x: x @ theta, q, x, y).round(2))
    0.83

    Args:
      fn: outputs of a batch; for this and the other arguments see the module.
      posterior: what `ivon_jax.posterior` returns.
      x: the examples.
      y: their labels.
      loss: of one example.
      diagonal: whether to use the diagonal of :math:`V_i` alone.
      chunk_size: examples to evaluate at once.

    Returns:
      A scalar, the mean over examples.
    """

    def result(outputs, deviation, y):
        return loss(outputs + deviation, y)

    losses = _evaluate(result, fn, posterior, x, y, loss, diagonal, chunk_size)
    return jnp.mean(losses)


def _evaluate(result, fn, posterior, x, y, loss, diagonal, chunk_size):
    """Map ``result(outputs, deviation, y)`` over the examples."""
    _checks.gaussian("posterior", posterior, Posterior)
    _checks.boolean("diagonal", diagonal)
    _checks.integer_between("chunk_size", chunk_size, 1)
    x, y = jax.tree.map(jnp.asarray, (x, y))
    count = _checks.number_of_examples(x=x, y=y)
    num_outputs = _jacobian.num_outputs(fn, posterior, x)
    if loss is _cross_entropy:
        labels = _checks.integers("y", _checks.one_array("y", y))
        _checks.labels("y", labels, (count,), num_outputs)
    linearized = _jacobian.linearize(fn, posterior)

    def of_example(example):
        x, y = example
        outputs = linearized(x)
        _checks.loss_of_example(loss(outputs.mean, y))
        error = jax.grad(loss)(outputs.mean, y)
        if diagonal:
            return result(outputs.mean, outputs.covariance_diagonal() * error, y)
        return result(outputs.mean, outputs.covariance_times(error), y)

    return _chunks.map_examples(of_example, (x, y), chunk_size)
