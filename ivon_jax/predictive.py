"""Predict with the posterior: averages over samples, or a linearised model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks
from ._arrays import compiled
from ._arrays.dtypes import wide
from ._arrays.loops import map_examples, scan_mean
from ._distributions.gaussian import Posterior
from ._distributions.mixture import Mixture
from ._evaluation import jacobian, samples, validity
from ._evaluation.samples import mean_over_samples


def predict(
    fn: Callable[..., Any],
    posterior: Posterior | Mixture,
    key: jax.Array,
    num_samples: int = 64,
    args: tuple[Any, ...] = (),
) -> Any:
    r"""Average `fn` over the posterior: :math:`\frac{1}{S} \sum_s f(\theta_s)`.

    With class probabilities for `fn` this is the Bayesian model average, the predictive
    distribution. Average probabilities, not logits. A scan keeps one sample and one
    running mean, so memory does not grow with `num_samples`.

    >>> q = Posterior(mean=jnp.zeros(()), precision=jnp.full((), 1e-2))
    >>> key = jax.random.key(0)
    >>> print(predict(lambda theta: theta > 0, q, key, num_samples=1000).round(1))
    0.5

    Outside of ``jit``, `fn` is traced at each call, but compiled at the first alone:
    in a loop over batches it may close over the batch, or take it from `args`, and may
    be written anew each time. A jitted `fn` saves most of the tracing; what it closes
    over is a constant of its program, as always in JAX, so give it `args`.

    Args:
      fn: ``fn(theta, *args)``, a pure function, returning any pytree of arrays. Without
        `args`: ``lambda theta: jax.nn.softmax(apply(theta, x))``.
      posterior: what `ivon_jax.posterior` returns, or a `Mixture`, each of whose
        members is drawn as often.
      key: a JAX random key. The same key gives the same samples, whatever `fn` is.
      num_samples: :math:`S`. The paper uses 64; the error falls as one over its root.
      args: a tuple of pytrees, such as ``(x,)``: what `fn` takes after theta. Arrays
        and numbers in it are traced, as under ``jit``.

    Returns:
      A tree with the structure and shapes of ``fn(theta)``, in float32 or wider.

    Raises:
      TypeError, ValueError: an argument, or what `fn` returns, is not as described.
    """
    return mean_over_samples(fn, posterior, key, num_samples, args)


class Uncertainty(NamedTuple):
    """Class probabilities and how uncertain they are, in nats for each example.

    >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.ones(2))
    >>> result = uncertainty(jax.nn.softmax, q, jax.random.key(0))
    >>> print(jnp.allclose(result.aleatoric + result.epistemic, result.total))
    True
    """

    probs: jax.Array  #: (..., C): the mean over samples
    total: jax.Array  #: (...): entropy of `probs`
    aleatoric: jax.Array  #: (...): mean entropy of the samples' probabilities
    epistemic: jax.Array  #: (...): the difference, at least 0


def uncertainty(
    fn: Callable[..., jax.Array],
    posterior: Posterior | Mixture,
    key: jax.Array,
    num_samples: int = 64,
    args: tuple[Any, ...] = (),
) -> Uncertainty:
    r"""Split the entropy of the predictive distribution by where it comes from.

    .. math::
        \underbrace{H[\bar p]}_{\text{total}} =
        \underbrace{\tfrac{1}{S} \sum_s H[p_s]}_{\text{aleatoric}} +
        \underbrace{I[y; \theta]}_{\text{epistemic}}, \qquad
        \bar p = \tfrac{1}{S} \sum_s p_s

    :math:`p_s` are the class probabilities at sample s, :math:`H[p] = -\sum_c p_c \log
    p_c` their entropy. What the samples agree on is aleatoric: noise of the labels,
    which more data would not remove. What they disagree on is epistemic, the mutual
    information of label and parameters: high far from the training data, and what
    active learning (BALD) looks for.

    >>> q = Posterior(mean=jnp.zeros(()), precision=jnp.ones(()))
    >>> def probs(theta):
    ...     return jax.nn.softmax(100 * jnp.stack([theta, -theta]))
    >>> result = uncertainty(probs, q, jax.random.key(0), num_samples=1000)
    >>> print(result.total.round(1), result.epistemic.round(1))
    0.7 0.7

    Args:
      fn: ``fn(theta, *args)``, a pure function, returning class probabilities (..., C).
      posterior: what `ivon_jax.posterior` returns, or a `Mixture`.
      key: a JAX random key. The same key gives the samples that `predict` draws.
      num_samples: S. Memory does not grow with it.
      args: what `fn` takes after theta; see `predict`.

    Returns:
      An `Uncertainty`; ``probs`` is what `predict` returns.

    Raises:
      TypeError, ValueError: as `predict`, or `fn` does not return probabilities, whose
        values go unchecked under ``jit``.

    References:
      Houlsby et al., Bayesian Active Learning for Classification and Preference
      Learning, 2011; Depeweg et al., Decomposition of Uncertainty in Bayesian Deep
      Learning for Efficient and Risk-sensitive Learning, ICML 2018.
    """
    _checks.function("fn", fn)

    def outputs(theta, *args):
        probs = jnp.asarray(validity.one_array("fn(theta)", fn(theta, *args)))
        validity.probabilities("fn(theta)", probs)
        return probs, _entropy(*wide(probs))

    means = mean_over_samples(outputs, posterior, key, num_samples, args, of=fn)
    probs, aleatoric = means
    validity.probabilities("fn(theta)", probs)
    total = _entropy(probs)
    return Uncertainty(probs, total, aleatoric, jnp.maximum(total - aleatoric, 0.0))


class Moments(NamedTuple):
    """Mean and variance of the predicted targets, and where the variance is from."""

    mean: jax.Array  #: (...): E[y]
    variance: jax.Array  #: (...): Var[y], the sum of the two below
    aleatoric: jax.Array  #: (...): of the noise, the mean of the samples' variances
    epistemic: jax.Array  #: (...): of the parameters, the variance of their means

    def interval(
        self, level: jax.typing.ArrayLike = 0.95
    ) -> tuple[jax.Array, jax.Array]:
        r"""Return the ends of the central interval that holds a target with `level`.

        :math:`m \pm \Phi^{-1}((1 + level) / 2) \sqrt{v}`, as of a Gaussian.

        >>> moments = Moments(*jnp.array([0.0, 4.0, 3.0, 1.0]))
        >>> print(*(f"{end:.2f}" for end in moments.interval(0.95)))
        -3.92 3.92
        """
        level = _checks.number("level", level, _checks.INSIDE)
        # Of the lower tail: 1 + level would be rounded.
        tail = jnp.asarray((1 - level) / 2, self.variance.dtype)
        radius = -jax.scipy.special.ndtri(tail) * jnp.sqrt(self.variance)
        return self.mean - radius, self.mean + radius


def predict_moments(
    fn: Callable[..., tuple[jax.Array, jax.Array]],
    posterior: Posterior | Mixture,
    key: jax.Array,
    num_samples: int = 64,
    args: tuple[Any, ...] = (),
) -> Moments:
    r"""Predict mean and variance of targets: `uncertainty` for regression.

    .. math::
        E[y] = \frac{1}{S} \sum_s f_s, \qquad
        Var[y] = \underbrace{\tfrac{1}{S} \sum_s v_s}_{\text{aleatoric}} +
        \underbrace{\tfrac{1}{S} \sum_s (f_s - E[y])^2}_{\text{epistemic}}

    :math:`f_s, v_s` are mean and variance of the targets at sample s, and this is the
    law of total variance, for the mixture of the S Gaussians. The first part is noise,
    which more data would not remove; the second is large where the samples disagree,
    far from the training data.

    >>> q = Posterior(mean=jnp.zeros(()), precision=jnp.ones(()))
    >>> def mean_and_variance(theta, x):
    ...     return theta * x, jnp.ones_like(x)  # the noise has variance 1
    >>> moments = predict_moments(
    ...     *(mean_and_variance, q, jax.random.key(0), 10_000), args=(jnp.arange(3.0),)
    ... )
    >>> print(moments.aleatoric, moments.epistemic.round(1))
    [1. 1. 1.] [0. 1. 4.]

    Args:
      fn: ``fn(theta, *args) -> (mean, variance)``, a pure function: of each target,
        two arrays of one shape (...), or one number for all variances, as where the
        noise is known.
      posterior: what `ivon_jax.posterior` returns, or a `Mixture`.
      key: a JAX random key. The same key gives the samples that `predict` draws.
      num_samples: S. Memory does not grow with it.
      args: what `fn` takes after theta; see `predict`.

    Returns:
      A `Moments`, whose first two are what `ivon_jax.metrics.gaussian_nll`, ``crps``
      and ``interval_coverage`` take.

    Raises:
      TypeError, ValueError: as `predict`, or `fn` does not return such a pair.
    """
    key = samples.checked_key(fn, posterior, key, num_samples, args)

    def run(posterior, key, args):
        def outputs(theta):
            return validity.mean_and_variance("fn(theta)", fn(theta, *args))

        first = jax.tree.map(lambda x: x[0], samples.means(posterior))
        center, _ = outputs(first)

        def terms(theta):
            mean, variance = outputs(theta)
            return mean - center, (mean - center) ** 2, variance

        draw, xs = samples.draws(posterior, key, num_samples)
        shift, square, aleatoric = scan_mean(lambda x: terms(draw(x)), xs)
        # Squares of what is left of the mean: those of the mean itself would cancel.
        epistemic = jnp.maximum(square - shift**2, 0.0)
        return Moments(center + shift, aleatoric + epistemic, aleatoric, epistemic)

    return compiled.call(run, posterior, key, args, of=fn)


class Linearized(NamedTuple):
    """The Gaussian over the C outputs of each of N examples."""

    mean: jax.Array  #: (N, C): f_i(m)
    covariance: jax.Array  #: (N, C, C): V_i

    def probs(self) -> jax.Array:
        r"""Class probabilities of Gaussian logits, approximately.

        :math:`\mathrm{softmax}(f_i / \sqrt{1 + \tfrac{\pi}{8} v_i})`, element by
        element, with the variances :math:`v_i` on the diagonal of :math:`V_i`: MacKay's
        (1992) approximation of a sigmoid by a probit, class by class. It needs no
        samples, but leaves covariances between logits out. Of one logit, C = 1, it is
        the sigmoid, the probability of class 1.

        >>> logits = Linearized(jnp.array([[2.0, 0.0]]), 10 * jnp.eye(2)[None])
        >>> print(jax.nn.softmax(logits.mean).round(2), logits.probs().round(2))
        [[0.88 0.12]] [[0.71 0.29]]

        Returns:
          (N, C).
        """
        variance = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        logits = self.mean / jnp.sqrt(1.0 + math.pi / 8.0 * variance)
        one = logits.shape[-1] == 1
        return jax.nn.sigmoid(logits) if one else jax.nn.softmax(logits)


def linearized(
    fn: Callable[[optax.Params, Any], jax.Array],
    posterior: Posterior,
    x: Any,
    *,
    chunk_size: int = 16,
) -> Linearized:
    r"""Predict without samples, by the model linearised at the posterior's mean.

    With :math:`J_i` (C x P) the Jacobian of the outputs :math:`f_i` at the mean m,
    :math:`f_i(m) + J_i (\theta - m)` is Gaussian under the posterior, with mean
    :math:`f_i(m)` and covariance
    :math:`V_i = J_i \, \mathrm{diag}(\sigma^2) J_i^\top`. It costs C forward and
    backward passes for each example, one class at a time; no Jacobian is formed.

    >>> q = Posterior(mean=jnp.zeros((1, 2)), precision=jnp.full((1, 2), 4.0))
    >>> outputs = linearized(lambda theta, x: x @ theta, q, jnp.array([[2.0]]))
    >>> print(outputs.mean, outputs.covariance)
    [[0. 0.]] [[[1. 0.]
      [0. 1.]]]

    Args:
      fn: ``fn(theta, x) -> (N, C)``, logits or other outputs. It is called with batches
        of one example, must treat examples independently, and needs derivatives of both
        modes; see `ivon_jax.sensitivity`.
      posterior: what `ivon_jax.posterior` returns; point masses have no variance.
      x: a pytree of arrays, the N examples along their first axes.
      chunk_size: how many examples to evaluate at once. Memory grows with `chunk_size`
        times P. With `x` sharded over devices, make it a multiple of their number
        that divides N.

    Returns:
      A `Linearized`: ``mean`` (N, C) and ``covariance`` (N, C, C), float32 or wider.
      For regression, add the variance of the noise to the diagonal.

    Raises:
      TypeError, ValueError: an argument is not as described.

    Reference:
      Immer et al., Improving Predictions of Bayesian Neural Nets via Local
      Linearization, AISTATS 2021.
    """
    _checks.function("fn", fn)
    _checks.distribution("posterior", posterior, "covariance_times")
    _checks.integer_between("chunk_size", chunk_size, 1)
    x = jax.tree.map(jnp.asarray, x)
    validity.number_of_examples(x=x)

    def run(posterior, x):
        shape = jacobian.shape_of_outputs(fn, posterior, x)
        validity.one_axis_of_outputs(shape)
        of_example = jacobian.linearize(fn, posterior)

        def moments(example):
            outputs = of_example(example)
            return Linearized(outputs.mean, outputs.covariance())

        return map_examples(moments, x, chunk_size)

    return compiled.call(run, posterior, x, of=fn)


def _entropy(probs):
    """Entropy over the last axis in nats, where 0 log 0 is 0."""
    # Not `entr`, whose derivative at 0 is infinite.
    positive = jnp.where(probs > 0, probs, 1.0)
    return -jnp.sum(probs * jnp.log(positive), axis=-1)
