r"""Choose a temperature on held-out data: of the posterior, or of the mean's logits.

The posterior at temperature T has T times the variance, :math:`q^{1/T}`. With T to zero
its samples become the mean; the T with the least NLL on held-out data is therefore at
least as good as the mean there, and tells whether the posterior is too wide or narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._arrays import compiled
from ._arrays.dtypes import wide
from ._arrays.loops import scan_log_mean_exp
from ._distributions.gaussian import Posterior
from ._distributions.mixture import Mixture
from ._evaluation import likelihood, samples, validity

# Decades of temperature. At 1e-7 a standard deviation is 3e-4 of its own: the mean.
FIRST, LAST = -7.0, 2.0
POINTS = 10  # of a round: here one in each decade
ROUNDS = 3  # the last one's points are 8 % apart

_PosteriorOrMixture = TypeVar("_PosteriorOrMixture", Posterior, Mixture)


class CalibrationCurve(NamedTuple):
    """The NLL of held-out data over the temperature, in nats per example.

    >>> curve = CalibrationCurve(
    ...     temperatures=jnp.array([0.1, 1.0, 10.0]),
    ...     nll=jnp.array([0.5, 0.4, 0.9]),
    ...     mean_nll=jnp.array(0.6),
    ...     temperature=jnp.array(1.0),
    ... )
    >>> print(curve.temperatures[curve.nll.argmin()])
    1.0
    """

    temperatures: jax.Array  #: (K,): what was tried, from low to high
    nll: jax.Array  #: (K,): of the average over samples, at each of them
    mean_nll: jax.Array  #: (): at the mean, which T to 0 leads to
    temperature: jax.Array  #: (): the best of them


def calibrate(
    fn: Callable[..., jax.Array],
    posterior: _PosteriorOrMixture,
    labels: jax.typing.ArrayLike | None,
    key: jax.Array,
    *,
    num_samples: int = 16,
    args: tuple[Any, ...] = (),
    where: jax.typing.ArrayLike | None = None,
    temperatures: jax.typing.ArrayLike | None = None,
) -> _PosteriorOrMixture:
    r"""Return the posterior at the temperature with the least NLL on held-out data.

    .. math::
        T = \arg\min_T \, -\frac{1}{N} \sum_i
        \log \frac{1}{S} \sum_s p(y_i \mid \theta_s(T)), \qquad
        \theta_s(T) = m + \sqrt{T} \sigma \epsilon_s

    with the same noise :math:`\epsilon_s` at every temperature. The least temperature
    tried is 1e-7, which is the mean: on these data samples are never worse than the
    mean. Where the mean is best, what is returned is hardly wider than a point.

    The data must be held out: on those of the training the best temperature is too low.
    A few hundred examples do, for it is one number. Without any, keep T = 1: training
    data can't tell. Where a network fits them all, logits shifted by
    `ivon_jax.sensitivity.deviations` (leave-one-out) choose the mean, and the evidence
    lower bound a posterior that is far too wide: benchmarks/temperatures.py.

    With `predict`'s key and number of samples, the NLL of its average is the one that
    was found here. For predictions without samples see
    `ivon_jax.calibration.linearized_curve`.

    >>> q = Posterior(mean=jnp.array(3.0), precision=jnp.array(1e-4))
    >>> def probs(theta):  # sure of class 0, which is the label of two in three
    ...     return jax.nn.softmax(jnp.stack([theta, 0.0]))[None].repeat(3, axis=0)
    >>> labels = jnp.array([0, 0, 1])
    >>> calibrated = calibrate(probs, q, labels, jax.random.key(0), num_samples=64)
    >>> print(f"{q.stddev:.0f} {calibrated.stddev:.0f}")
    100 7

    Args:
      fn: ``fn(theta, *args)``, as `predict` takes it: class probabilities (N, C), or
        (..., C), of held-out examples. Without `labels`, for regression and all other
        likelihoods: the log-density of each target (N,), in nats, such as
        ``lambda theta: jax.scipy.stats.norm.logpdf(y, *mean_and_stddev(theta, x))``.
      posterior: what `ivon_jax.posterior` returns, or a `Mixture`, whose members get
        the same temperature.
      labels: (N,), or (...), integers in 0..C-1. None: see `fn`.
      key: a JAX random key.
      num_samples: S. Choose what you predict with: with few samples, wide posteriors
        are worse. Memory does not grow with it.
      args: a tuple of pytrees, such as ``(x,)``: what `fn` takes after theta.
      where: which examples count, (N,), or booleans that broadcast; None for all.
      temperatures: (K,), two or more to choose from. None searches from 1e-7 to 1e3, in
        30 evaluations: a grid of decades, then two finer ones around the best.

    Returns:
      ``posterior.tempered(T)``.

    Raises:
      TypeError, ValueError: an argument, or what `fn` returns, is not as described, or
        no temperature has a finite NLL. Values go unchecked under ``jit``.

    Reference:
      Wenzel et al., How Good is the Bayes Posterior in Deep Neural Networks Really?,
      ICML 2020.
    """
    curve = calibration_curve(
        *(fn, posterior, labels, key),
        num_samples=num_samples,
        args=args,
        where=where,
        temperatures=temperatures,
    )
    return posterior.tempered(curve.temperature)


def calibration_curve(
    fn: Callable[..., jax.Array],
    posterior: Posterior | Mixture,
    labels: jax.typing.ArrayLike | None,
    key: jax.Array,
    *,
    num_samples: int = 16,
    args: tuple[Any, ...] = (),
    where: jax.typing.ArrayLike | None = None,
    temperatures: jax.typing.ArrayLike | None = None,
) -> CalibrationCurve:
    """Return the NLL over the temperature: what `calibrate` chooses by, to plot.

    All arguments are those of `calibrate`.

    >>> q = Posterior(mean=jnp.array(3.0), precision=jnp.array(1e-4))
    >>> def probs(theta):
    ...     return jax.nn.softmax(jnp.stack([theta, 0.0]))[None].repeat(3, axis=0)
    >>> curve = calibration_curve(
    ...     *(probs, q, jnp.array([0, 0, 1]), jax.random.key(0)),
    ...     num_samples=64,
    ...     temperatures=jnp.array([1e-6, 4e-3, 1.0]),
    ... )
    >>> print([f"{x:.2f}" for x in curve.nll], curve.temperature)
    ['1.05', '0.64', '0.67'] 0.004

    Returns:
      A `CalibrationCurve`.
    """
    key = samples.checked_key(fn, posterior, key, num_samples, args, "tempered")
    temperatures = _candidates(temperatures)
    labels, where = _validated(fn, posterior, labels, where, args)

    def run(posterior, key, labels, where, temperatures, args):
        def log_likelihoods(theta):
            return _log_likelihoods(fn(theta, *args), labels)

        def nll(temperature):
            same = jax.random.clone(key)  # the noise of all temperatures
            draw, xs = samples.draws(posterior.tempered(temperature), same, num_samples)
            return mean(scan_log_mean_exp(lambda x: log_likelihoods(draw(x)), xs))

        def mean(log_likelihoods):
            return -jnp.mean(log_likelihoods, where=where)

        means = samples.means(posterior)
        at_mean = mean(scan_log_mean_exp(log_likelihoods, means))
        outputs = fn(_first(means), *args)
        return _search(nll, temperatures), at_mean, outputs

    tried, mean_nll, outputs = compiled.call(
        run, posterior, key, labels, where, temperatures, args, of=fn
    )
    if labels is not None:
        validity.sum_to_one("fn(theta)", outputs, where)
    return _curve(tried, mean_nll)


def linearized_curve(
    outputs: Any,
    labels: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
    temperatures: jax.typing.ArrayLike | None = None,
) -> CalibrationCurve:
    r"""Return the NLL over the temperature of the linearised model, without samples.

    Choose by it where you predict with `ivon_jax.linearized`, which on small sets of
    digits was as good as samples or a little better: benchmarks/temperatures.py.

    >>> import ivon_jax
    >>> q = Posterior(mean=jnp.array([[3.0, 0.0]]), precision=jnp.full((1, 2), 0.01))
    >>> x, y = jnp.ones((3, 1)), jnp.array([0, 0, 1])
    >>> outputs = ivon_jax.linearized(lambda theta, x: x @ theta, q, x)
    >>> curve = linearized_curve(outputs, y)
    >>> calibrated = q.tempered(curve.temperature)
    >>> print(f"{curve.mean_nll:.2f} {curve.nll.min():.2f}")
    1.05 0.64

    Args:
      outputs: the `ivon_jax.Linearized` of held-out examples: logits, and at
        temperature T their covariance times T.
      labels: (N,), integers in 0..C-1.
      where: which examples count, (N,); None for all.
      temperatures: (K,), as those of `calibrate`.

    Returns:
      A `CalibrationCurve`. For other examples, linearise
      ``posterior.tempered(curve.temperature)``.
    """
    temperatures = _candidates(temperatures)
    validity.logits("outputs.mean", outputs.mean)
    labels, where = _fitting(outputs.mean.shape, labels, where)

    def run(outputs, labels, where, temperatures):
        def nll(temperature):
            covariance = outputs.covariance * temperature.astype(outputs.mean.dtype)
            probs = outputs._replace(covariance=covariance).probs()
            return -jnp.mean(_log_likelihoods(probs, labels), where=where)

        return _search(nll, temperatures), nll(jnp.zeros([]))

    tried, mean_nll = compiled.call(
        run, outputs, labels, where, temperatures, of=linearized_curve
    )
    return _curve(tried, mean_nll)


def temperature_scaling(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Return the temperature of the logits with the least NLL on held-out data.

    .. math::
        \tau = \arg\min_\tau \, -\frac{1}{N} \sum_i
        \log \mathrm{softmax}(f_i / \tau)_{y_i}

    The usual remedy for overconfident networks, which needs no posterior: compare with
    it. Unlike `calibrate` it also sharpens what is unsure. For averages over samples,
    pass ``jnp.log(probs)``; for both together, calibrate
    ``lambda theta: jax.nn.softmax(apply(theta, x) / tau)``.

    >>> logits = jnp.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    >>> tau = temperature_scaling(logits, jnp.array([0, 0, 1]))
    >>> print(f"{tau:.2f} {jax.nn.softmax(logits / tau)[0, 0]:.2f}")
    4.33 0.67

    Args:
      logits: (..., C), of held-out examples.
      labels: (...), integers in 0..C-1.
      where: which examples count, (...); None for all.

    Returns:
      :math:`\tau`, a scalar in 1e-4 to 1e4. It is 1e-4 where every label has the
      largest logit, for then there is no best.

    Raises:
      TypeError, ValueError: an argument is not as described.

    Reference:
      Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    logits = jnp.asarray(logits)
    validity.logits("logits", logits)
    labels, where = _fitting(logits.shape, labels, where)
    return _temperature_scaling(*wide(logits), labels, where)


@jax.jit
def _temperature_scaling(logits, labels, where):
    """Bisect the logarithm of the inverse temperature, in which the NLL is convex."""
    chosen = likelihood.is_label(logits, labels)
    own = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)

    def slope(inverse):
        probs = jax.nn.softmax(inverse * logits)
        expected = jnp.sum(jnp.where(probs > 0, probs * logits, 0), axis=-1)
        return jnp.mean(expected - own, where=where)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        rises = slope(jnp.exp(middle)) > 0
        return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

    limit = jnp.log(jnp.asarray(1e4, logits.dtype))
    low, high = jax.lax.fori_loop(0, 50, halve, (-limit, limit))
    valid = jnp.all(jnp.any(chosen, axis=-1), where=where) & ~jnp.isnan(slope(1.0))
    return jnp.where(valid, jnp.exp(-(low + high) / 2), jnp.nan)


def _search(nll, temperatures):
    """Temperatures and their NLL: of those given, or of a grid that grows finer."""
    if temperatures is not None:
        return temperatures, jax.lax.map(nll, temperatures)

    def next_round(bounds, _):
        # Between the bounds, which the round before has tried, or its neighbours would.
        decades = jnp.linspace(*bounds, POINTS + 2)
        inner = decades[1:-1]
        values = jax.lax.map(nll, 10.0**inner)
        best = _best(values)
        return (decades[best], decades[best + 2]), (10.0**inner, values)

    step = (LAST - FIRST) / (POINTS - 1)
    bounds = jnp.asarray(FIRST - step), jnp.asarray(LAST + step)
    _, tried = jax.lax.scan(next_round, bounds, length=ROUNDS)
    return jax.tree.map(jnp.ravel, tried)


def _curve(tried, mean_nll):
    """Sort the curve by temperature, and find the best one."""
    temperatures, nll = jax.lax.sort(tried, num_keys=1)
    _check_finite(nll)
    best = jnp.where(_any_finite(nll), temperatures[_best(nll)], jnp.nan)
    return CalibrationCurve(temperatures, nll, mean_nll, best)


def _best(nll):
    return jnp.argmin(jnp.where(jnp.isnan(nll), jnp.inf, nll))


def _candidates(temperatures):
    """Checked temperatures, or None."""
    if temperatures is None:
        return None
    [temperatures] = wide(jnp.asarray(temperatures))
    if temperatures.ndim != 1 or len(temperatures) < 2:
        raise ValueError(
            "`temperatures` must have shape (K,), two or more to choose from, got "
            f"shape {temperatures.shape}. With one alone, use "
            "`posterior.tempered(temperature)`."
        )
    low, high = _checks.extremes(temperatures) or (1, 1)
    if not 0 < low <= high < np.inf:
        bad = high if low > 0 else low
        raise ValueError(
            f"`temperatures` must be positive and finite, got {bad}. For the mean, "
            "take a small one, such as 1e-6."
        )
    return temperatures


def _validated(fn, posterior, labels, where, args):
    """Checked labels and mask, of the shape that the outputs of `fn` have."""
    one = jax.eval_shape(lambda q: _first(samples.means(q)), posterior)
    outputs = jax.eval_shape(lambda theta: fn(theta, *args), one)
    validity.one_array("fn(theta)", outputs)
    if labels is None:
        validity.log_likelihoods("fn(theta)", outputs)
        return None, validity.which_count("where", where, outputs.shape)
    validity.distributions("fn(theta)", outputs)
    return _fitting(outputs.shape, labels, where)


def _fitting(outputs_shape, labels, where):
    """Checked labels and mask, for outputs of this shape."""
    *shape, num_classes = outputs_shape
    labels = validity.integers("labels", labels)
    where = validity.which_count("where", where, tuple(shape))
    validity.labels("labels", labels, tuple(shape), num_classes, where)
    return labels, where


def _first(stacked):
    return jax.tree.map(lambda x: x[0], stacked)


def _log_likelihoods(outputs, labels):
    """Return each example's NLL, float32 or wider; NaN where a label is no class."""
    [outputs] = wide(outputs)
    if labels is None:
        return outputs
    return likelihood.of_labels(outputs, labels)


def _check_finite(nll):
    if _checks.known(_any_finite, nll) is False:
        raise ValueError(
            f"`fn(theta)` must have a finite NLL at some temperature, got {nll[0]} at "
            f"the lowest of {len(nll)}. Did training diverge, or does a label have "
            "probability zero?"
        )


@jax.jit
def _any_finite(x):
    return jnp.any(jnp.isfinite(x))
