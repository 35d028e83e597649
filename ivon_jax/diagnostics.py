r"""Is this run healthy? Numbers to log while IVON trains, and advice in plain words.

`measure` is pure, for ``jax.jit`` and a logger; `advice` reads its numbers on the host;
`diagnose` is both. Symbols are Algorithm 1's. Sums, means and medians go over the P
entries that IVON owns, each with its own prior, :math:`N(m_0, 1 / (\lambda\delta))`.
Curvatures and losses are per example, losses in nats. From the state alone:

* ``count``, ``ess``, ``weight_decay``, ``num_params``: t, :math:`\lambda` and
  :math:`\delta` (the least t, and means over entries, if there are several) and P.
* ``non_finite``: the share of m, h and g that is NaN or infinite. Healthy: 0.
* ``noise_to_weight``: :math:`\sqrt{\sum \sigma^2 / \sum m^2}`. Healthy: 1e-3 to 1. The
  paper's GPT-2 starts at 0.02 (noise 3e-4, weights 0.02), its ResNet-20 at about 0.2.
* ``rounded``: the share of entries with :math:`\sigma < \epsilon |m|`, where the
  spacing :math:`\epsilon` of the parameter's dtype swallows the noise. Healthy: up to
  0.1; about 0 in float32.
* ``hess_median`` (the lower one), ``hess_min``, ``hess_max``: of h, "to see whether a
  reasonable covariance is being learned" (appendix A). ``hess_peak``: the largest over
  ``hess_init``. Healthy: up to 1e4. ``hess_negative``: the share with
  :math:`-\delta < h \leq 0`, where the posterior is as wide as the prior, or wider.
* ``hess_memory``: :math:`\beta_2^T`, the share of h that is still ``hess_init`` after T
  steps. Healthy: up to 0.9; the paper's runs end at 0.13 (ResNets on CIFAR, 200k
  steps), 0.29 (ImageNet), 0.37 (GPT-2), and 0.98 on the smallest GLUE set, where h
  stays what it began as. ``hess_half_life``: the steps in which it halves,
  :math:`-\ln 2 / \ln \beta_2 \approx \ln 2 / (1 - \beta_2)`.
* ``hess_drift``: the median of :math:`|h - h_0| / h_0`. ``hess_target``: the mean of h
  less what is left of h_0, :math:`(\bar h - \beta_2^t h_0) / (1 - \beta_2^t)`, to which
  h is on its way: the mean of the estimates.
* ``hess_rounding``: the spacing of h's dtype over :math:`1 - \beta_2`. Healthy: below
  1, or h cannot move; 0.01 for float32 and the paper's 0.99999.
* ``effective_params``: MacKay's number of well-determined parameters,
  :math:`\gamma = \sum h / (h + \delta) = \sum (1 - \lambda\delta\sigma^2)`, with zero
  for entries of negative h; ``effective_share``: :math:`\gamma / P`.
* ``kl_divergence``: from the prior, in nats, of the data set; infinite if it is flat.
* ``clipped``: the share of the direction :math:`(\bar g + \delta (m - m_0)) / (h +
  \delta)` that ``clip_radius`` clips. Healthy: up to 0.9.

With a loss, from samples :math:`\theta \sim q`:

* ``loss_at_mean``, ``loss_at_samples``, and how much the latter is more, ``loss_gap``.
  Healthy: up to 0.5 nats. ``expected_gap``: :math:`\frac{1}{2} \sum \sigma^2 h`, the
  same for a quadratic loss with Hessian h, and :math:`\gamma / 2\lambda` where no h is
  negative. A gap far below it shows that h is rather ``hess_init`` than curvature.
* ``gradient_snr``: the squared norm of the mean gradient over the variance of one
  sample's, on this batch. It falls while training converges.
* ``zero_gradients``: the share of entries with a gradient of zero at all samples.
  Healthy: up to 0.9; inputs that the batch has not (rare words) have none either.
* ``correction_median``, ``correction_mean``: the term that keeps h positive over the
  step that it corrects, :math:`|s| / (2 (h + \delta))`, :math:`s = (1 - \beta_2)(\hat h
  - h)`, of one sample. Healthy: a mean up to 0.05, a tenth of the precision in a step.
* ``hess_noise``: how far the noise of :math:`\hat h` moves h in the long run, the
  median of :math:`\sqrt{(1 - \beta_2) / 2} |\hat h - h| / (h + \delta)`. Healthy: up
  to 0.3; the term above makes h about its square too large. With a batch of B it is
  some :math:`\sqrt{(1 - \beta_2) \lambda / 2B}`: on CIFAR-10 with B = 50, 0.7 at 0.999,
  of which appendix A warns, and 0.07 at 0.99999.

References: Shen et al., Variational Learning is Effective for Large Deep Networks, ICML
2024, appendix A; MacKay, Bayesian Interpolation, 1992.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _rules
from ._gradients import value_and_grad
from ._mean import scan_mean
from ._posterior import find_states, posterior, prior

DIVERGED = (
    "Training diverged, there are NaNs or infinities: lower the learning rate or warm "
    "it up, raise hess_init or ess, or set clip_radius=1e-3."
)
DEAD = (
    "{zero_gradients:.0%} of the parameters have no gradient, units may be dead: raise "
    "hess_init or ess, bring b2 closer to one, or lower the learning rate."
)
PEAK = (
    "h has been driven to {hess_peak:.1g} times hess_init, training is unstable: raise "
    "hess_init, bring b2 closer to one, or lower the learning rate."
)
WIDE = "The noise is {noise_to_weight:.2g} times the weights: raise ess or hess_init."
GAP = (
    "Samples have {loss_gap:.2g} nats per example more loss than the mean, the "
    "posterior is too wide: raise ess or hess_init, or train longer."
)
NARROW = (
    "The noise is only {noise_to_weight:.1g} of the weights, the posterior is nearly a "
    "point: lower ess (a temperature) or hess_init."
)
MEMORY = (
    "h stays {hess_memory:.0%} hess_init, 1 - b2 is too small for so short a run: make "
    "it about one over the number of steps, or tune hess_init instead (so far, the "
    "estimates of the curvature average {hess_target:.2g})."
)
NOISY = (
    "h fluctuates by {hess_noise:.1g} of itself: bring b2 closer to one, or take more "
    "samples or a larger batch in a step."
)
CORRECTED = (
    "The term that keeps h positive is {correction_mean:.1g} of a step of h: bring b2 "
    "closer to one, or raise hess_init or the batch size."
)
CLIPPED = (
    "clip_radius clips {clipped:.0%} of the step, little more than signs are left: "
    "raise clip_radius and lower the learning rate."
)
ROUNDED = (
    "The parameters' dtype swallows the noise of {rounded:.0%} of them: keep them in "
    "float32, and use value_and_grad(..., compute_dtype=jnp.bfloat16)."
)
STUCK = "1 - b2 is lost in the rounding of h: keep h in float32, or raise 1 - b2."
HEALTHY = (  # number, its lowest and highest value, advice beyond them
    ("non_finite", 0.0, 0.0, DIVERGED),
    ("loss_at_mean", -3e38, 3e38, DIVERGED),
    ("zero_gradients", 0.0, 0.9, DEAD),
    ("hess_peak", -math.inf, 1e4, PEAK),
    ("noise_to_weight", 0.0, 1.0, WIDE),
    ("loss_gap", -math.inf, 0.5, GAP),
    ("noise_to_weight", 1e-3, math.inf, NARROW),
    ("hess_memory", 0.0, 0.9, MEMORY),
    ("hess_noise", 0.0, 0.3, NOISY),
    ("correction_mean", 0.0, 0.05, CORRECTED),
    ("clipped", 0.0, 0.9, CLIPPED),
    ("rounded", 0.0, 0.1, ROUNDED),
    ("hess_rounding", 0.0, 1.0, STUCK),
)


class Diagnosis(NamedTuple):
    """What `diagnose` returns."""

    numbers: dict[str, float]
    advice: list[str]


def diagnose(
    params: optax.Params, opt_state: optax.OptState, **options: Any
) -> Diagnosis:
    """Measure a run and say what is wrong with it, if anything.

    >>> import ivon_jax
    >>> params = jnp.ones(8)
    >>> opt_state = ivon_jax.ivon(0.1, ess=0.1, hess_init=1.0).init(params)
    >>> diagnose(params, opt_state, hess_init=1.0, b2=0.99999, num_steps=50_000).advice
    ['The noise is 3.2 times the weights: raise ess or hess_init.']

    Args:
      params: the posterior mean.
      opt_state: any optax state with IVON in it.
      **options: those of `measure`, which also says what it raises.

    Returns:
      A `Diagnosis`: the numbers of `measure` as Python floats, and their `advice`.
    """
    numbers = measure(params, opt_state, **options)
    return Diagnosis({k: float(v) for k, v in numbers.items()}, advice(numbers))


def advice(numbers: Mapping[str, jax.typing.ArrayLike]) -> list[str]:
    """Return a sentence of advice for each number out of its range in `HEALTHY`.

    >>> advice({"noise_to_weight": 3.0})
    ['The noise is 3 times the weights: raise ess or hess_init.']

    Args:
      numbers: what `measure` returns, outside of ``jit``; any part of it.

    Returns:
      The sentences; none for a healthy run.

    Raises:
      TypeError, ValueError: a number is none, or not known yet.
    """
    values = {name: _checks.measured(name, value) for name, value in numbers.items()}
    found = [
        sentence
        for name, lowest, highest, sentence in HEALTHY
        if name in values and not lowest <= values[name] <= highest
    ]
    if DIVERGED in found:  # whatever else is wrong follows from that
        return [DIVERGED]
    if any(sentence in found for sentence in (DEAD, PEAK, GAP)):
        # Weights that blew up dwarf the noise; less of ess would make matters worse.
        found = [sentence for sentence in found if sentence != NARROW]
    return [sentence.format(**values) for sentence in found]


def measure(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    hess_init: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
    clip_radius: jax.typing.ArrayLike | None = None,
    num_steps: int | None = None,
    loss_fn: Callable[[optax.Params], jax.Array] | None = None,
    key: jax.Array | None = None,
    num_samples: int = 8,
) -> dict[str, jax.Array]:
    """Measure the numbers above: scalars for a logger, in the default float dtype.

    Call it within ``jax.jit``. Medians take a few dozen passes over h, without a sort;
    a `loss_fn` takes `num_samples` gradients, one after the other.

    >>> import ivon_jax
    >>> params = jnp.ones(8)
    >>> opt_state = ivon_jax.ivon(0.1, ess=100, hess_init=0.9).init(params)
    >>> numbers = measure(params, opt_state, hess_init=0.9, b2=0.99999)
    >>> print(numbers["num_params"], numbers["hess_median"])
    8.0 0.9

    Args:
      params: the posterior mean.
      opt_state: any optax state with IVON in it. If it has several that differ in what
        follows, pass them one by one: ``opt_state.inner_states["label"]``.
      hess_init: as given to `ivon`, as are `b2`, `b1` and `clip_radius`.
      b2: the state doesn't tell.
      b1: nor this.
      clip_radius: None leaves out ``clipped``.
      num_steps: T, the length of the whole run, if it isn't over.
      loss_fn: ``loss_fn(theta)``, the mean loss per example of some batch, a scalar;
        None leaves out what needs it.
      key: a JAX random key, for `loss_fn`.
      num_samples: how many samples to evaluate `loss_fn` at, two or more.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range, or there
        is no IVON state, or nothing that it trains.
    """
    hess_init = _number(_checks.positive("hess_init", hess_init))
    b2 = _number(_checks.decay_rate("b2", b2))
    if num_steps is not None:
        _checks.integer_between("num_steps", num_steps, 1)
    q, p = posterior(params, opt_state), prior(params, opt_state)
    arrays = [x for s in find_states(opt_state) for x in _arrays(params, s)]
    _checks.some_entries(arrays)
    numbers = _of_weights(arrays) | {"kl_divergence": q.kl_divergence(p)}
    numbers |= _of_hess(arrays, hess_init, b2, num_steps)
    if clip_radius is not None:
        b1 = _number(_checks.decay_rate("b1", b1))
        clip_radius = _number(_checks.positive("clip_radius", clip_radius))
        numbers["clipped"] = _clipped(arrays, b1, clip_radius)
    if loss_fn is not None:
        _checks.integer_between("num_samples", num_samples, 2)
        _checks.has_key(key)
        keys = jax.random.split(key, num_samples)
        numbers |= _of_loss(arrays, params, opt_state, b2, loss_fn, keys)
    return {name: jnp.asarray(value, float) for name, value in numbers.items()}


def _number(value):
    """A checked number in the default float dtype; a Python float stays exact."""
    return value if isinstance(value, float) else value.astype(float)


class _Array(NamedTuple):
    """One array that IVON trains, in the default float dtype."""

    mean: jax.Array  # m
    shift: jax.Array  # m - m_0
    momentum: jax.Array  # g
    hess: jax.Array  # h
    scale: jax.Array  # h + delta, from the posterior's precision
    delta: jax.Array  # from the prior's precision
    ess: jax.Array  # (), lambda
    count: jax.Array  # (), t
    spacings: tuple[float, float]  # of the dtypes of m and h

    @property
    def variance(self):
        return 1.0 / (self.ess * self.scale)


def _arrays(params, state):
    """What one state trains."""
    q, p = posterior(params, state), prior(params, state)
    ess, count = (x.astype(float) for x in (state.ess, state.count))

    def array(m, m_0, g, h, s, s_0):
        spacings = tuple(float(jnp.finfo(jnp.result_type(x)).eps) for x in (m, h))
        m, m_0, g, h, s, s_0 = (jnp.asarray(x, float) for x in (m, m_0, g, h, s, s_0))
        return _Array(m, m - m_0, g, h, s / ess, s_0 / ess, ess, count, spacings)

    means = (_trained(tree, q.precision) for tree in (q.mean, p.mean))
    others = (state.momentum, state.hess, q.precision, p.precision)
    return list(map(array, *means, *map(jax.tree.leaves, others)))


def _trained(tree, precision):
    """The arrays of `tree` that have a precision."""
    kept = jax.tree.map(lambda x, s: None if s is None else x, tree, precision)
    return jax.tree.leaves(kept)


def _of_weights(arrays):
    """What needs no setting that the state doesn't keep."""
    size = sum(x.mean.size for x in arrays)
    finite = [jnp.isfinite(v) for x in arrays for v in (x.mean, x.hess, x.momentum)]
    noise = _total([x.variance for x in arrays])
    weights = _total([x.mean**2 for x in arrays])
    lost = [x.variance < (x.spacings[0] * x.mean) ** 2 for x in arrays]
    gamma = _total([jnp.maximum(x.hess, 0.0) / x.scale for x in arrays])
    return {
        "count": jnp.min(jnp.stack([x.count for x in arrays])),
        "ess": sum(x.ess * x.mean.size for x in arrays) / size,
        "weight_decay": _total([x.delta for x in arrays]) / size,
        "num_params": size,
        "non_finite": _total([~x for x in finite]) / (3 * size),
        "noise_to_weight": jnp.sqrt(noise / weights),
        "rounded": _total(lost) / size,
        "effective_params": gamma,
        "effective_share": gamma / size,
    }


def _of_hess(arrays, hess_init, b2, num_steps):
    """Where h is, and how much of it is still `hess_init`."""
    hess = [x.hess for x in arrays]
    size = sum(h.size for h in hess)
    count = jnp.min(jnp.stack([x.count for x in arrays]))
    if isinstance(b2, float):
        log_b2 = math.log(max(b2, 1e-37))  # in float32, 0.999999 is 1 % off
    else:
        log_b2 = jnp.log(jnp.maximum(b2, 1e-37))
    drift = [jnp.abs(h - hess_init) / hess_init for h in hess]
    # 1 - b2**t, and the mean way of h from hess_init, in which nothing cancels.
    share = -jnp.expm1(jnp.maximum(count, 1.0) * log_b2)
    way = _total([h - hess_init for h in hess]) / size
    lowest, highest = _range(hess)
    return {
        "hess_median": _median(hess),
        "hess_min": lowest,
        "hess_max": highest,
        "hess_peak": highest / hess_init,
        "hess_negative": _total([h <= 0 for h in hess]) / size,
        "hess_memory": jnp.exp((count if num_steps is None else num_steps) * log_b2),
        "hess_half_life": -math.log(2.0) / log_b2,
        "hess_drift": _median(drift),
        "hess_target": hess_init + way / share,
        "hess_rounding": max(x.spacings[1] for x in arrays) / (1.0 - b2),
    }


def _clipped(arrays, b1, clip_radius):
    """The share of the last direction that was clipped."""

    def clipped(x):
        momentum = _rules.debiased(x.momentum, b1, jnp.maximum(x.count, 1.0))
        direction = _rules.direction(momentum, x.shift, x.hess, x.delta)
        return jnp.abs(direction) > clip_radius

    return _total(map(clipped, arrays)) / sum(x.mean.size for x in arrays)


def _of_loss(arrays, params, opt_state, b2, loss_fn, keys):
    """What takes samples."""
    size, count = sum(x.mean.size for x in arrays), len(keys)

    def loss(theta):
        return _checks.one_loss(loss_fn(theta))

    def at_sample(key):
        value, estimate = value_and_grad(loss)(key, params, opt_state)
        grads, hess_hats = _split(estimate, params, opt_state)
        terms = [
            0.5 * (1.0 - b2) * jnp.abs(hess_hat - x.hess) / x.scale
            for hess_hat, x in zip(hess_hats, arrays, strict=True)
        ]
        norm2 = _total([g**2 for g in grads])
        return value.astype(float), grads, norm2, _median(terms), _total(terms) / size

    loss_at_samples, grads, norm2, median, mean = scan_mean(at_sample, keys)
    loss_at_mean = jnp.asarray(loss(params), float)
    norm2_of_mean = _total([g**2 for g in grads])
    variance = (norm2 - norm2_of_mean) * count / (count - 1)
    signal = jnp.maximum(norm2_of_mean - variance / count, 0.0)
    return {
        "loss_at_mean": loss_at_mean,
        "loss_at_samples": loss_at_samples,
        "loss_gap": loss_at_samples - loss_at_mean,
        "expected_gap": 0.5 * _total([x.variance * x.hess for x in arrays]),
        "gradient_snr": signal / jnp.maximum(variance, jnp.finfo(signal.dtype).tiny),
        "zero_gradients": _total([g == 0 for g in grads]) / size,
        "correction_median": median,
        "correction_mean": mean,
        "hess_noise": median * jnp.sqrt(2.0 / (1.0 - b2)),
    }


def _split(estimate, params, opt_state):
    """Gradients and Hessian estimates in the order of `_arrays`, state by state."""
    precisions = [posterior(params, s).precision for s in find_states(opt_state)]
    return [
        [x.astype(float) for s in precisions for x in _trained(tree, s)]
        for tree in estimate
    ]


def _total(arrays):
    """The sum over all entries, which counts those that are true."""
    return sum(jnp.sum(x, dtype=float) for x in arrays)


def _range(arrays):
    """The smallest and the largest entry; of an empty array neither counts."""
    lows = [jnp.min(x, initial=jnp.inf) for x in arrays]
    highs = [jnp.max(x, initial=-jnp.inf) for x in arrays]
    return jnp.min(jnp.stack(lows)), jnp.max(jnp.stack(highs))


def _median(arrays):
    """The lower median of all entries, by bisection: no copy, no sort, no gathering."""
    size = sum(x.size for x in arrays)
    lowest, highest = _range(arrays)

    def between(low, high):
        return 0.5 * low + 0.5 * high  # high - low may overflow, or be flushed to zero

    def is_half(value):
        return 2.0 * _total([x <= value for x in arrays]) >= size

    def halve(bounds):
        low, high = bounds
        middle = between(low, high)
        enough = is_half(middle)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    def apart(bounds):
        low, high = bounds
        return (low < between(low, high)) & (between(low, high) < high)

    start = lowest, jnp.where(is_half(lowest), lowest, highest)
    return jax.lax.while_loop(apart, halve, start)[1]
