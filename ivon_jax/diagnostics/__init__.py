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
  steps. Healthy: up to 0.9; the paper's runs end at 0.13 (ResNets on
  CIFAR, 200k steps), 0.29 (ImageNet), 0.37 (GPT-2), and 0.98 on the smallest GLUE set,
  where h stays what it began as. ``hess_half_life``: the steps in which it halves,
  :math:`-\ln 2 / \ln \beta_2 \approx \ln 2 / (1 - \beta_2)`.
* ``hess_drift``: the median of :math:`|h - h_0| / h_0`. ``hess_target``: the mean of h
  less what is left of h_0, :math:`(\bar h - \beta_2^t h_0) / (1 - \beta_2^t)`, to which
  h is on its way: the mean of the estimates.
* ``hess_decayed``: the share of h that is just :math:`\beta_2^t h_0`, all alike: what
  estimates of zero leave, as where ``sample`` was the mean. Zero until a hundredth
  has decayed. Healthy: up to 0.99.
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

from .. import _checks
from .._arrays import compiled
from .._optimizer.posterior import mean, posterior, prior
from .._optimizer.state import find_states
from . import _measure

DIVERGED = (
    "Training diverged, there are NaNs or infinities: lower the learning rate or warm "
    "it up, raise hess_init or ess, or set clip_radius=1e-3 and rescale_lr=False."
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
    "h stays {hess_memory:.0%} hess_init, unless training goes on: make 1 - b2 about "
    "one over the number of steps, or tune hess_init instead."
)
UNLEARNED = (
    "h only decays from hess_init, {hess_decayed:.0%} of it without any estimate: take "
    "gradients at theta = ivon_jax.sample(key, params, opt_state), not at params."
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
    ("hess_decayed", 0.0, 0.99, UNLEARNED),
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
    >>> diagnose(params, opt_state, num_steps=50_000).advice
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
    values = {name: _measured(name, value) for name, value in numbers.items()}
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
    if values.get("hess_memory") == 1.0:  # the run has yet to begin
        found = [sentence for sentence in found if sentence != MEMORY]
    return [sentence.format(**values) for sentence in found]


def measure(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    hess_init: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    b1: jax.typing.ArrayLike | None = None,
    clip_radius: jax.typing.ArrayLike | None = None,
    num_steps: int | None = None,
    loss_fn: Callable[[optax.Params], jax.Array] | None = None,
    key: jax.Array | None = None,
    num_samples: int = 8,
) -> dict[str, jax.Array]:
    """Measure the numbers above: scalars for a logger, in the default float dtype.

    It compiles once for one program, also outside of ``jax.jit``. Medians take a few
    dozen passes over h, without a sort; a `loss_fn` takes `num_samples` gradients, one
    after the other.

    >>> import ivon_jax
    >>> params = jnp.ones(8)
    >>> opt_state = ivon_jax.ivon(0.1, ess=100, hess_init=0.9).init(params)
    >>> numbers = measure(params, opt_state)
    >>> print(numbers["num_params"], numbers["hess_median"])
    8.0 0.9

    Args:
      params: the posterior mean, or a sample where `sampled` made it one.
      opt_state: any optax state with IVON in it. Of several IVON states, each is
        measured with its own settings. A state of another optimizer gives the numbers
        that it has the fields of `ivon_jax.IVONState` for.
      hess_init: what to measure with in the place of the state's own, as with `b2`,
        `b1` and `clip_radius`. None takes what was given to `ivon`.
      b2: see `hess_init`.
      b1: see `hess_init`.
      clip_radius: see `hess_init`. Where there is none, ``clipped`` is left out.
      num_steps: T, the length of the whole run; None takes the steps until now.
      loss_fn: ``loss_fn(theta)``, the mean loss per example of some batch, a scalar;
        None leaves out what needs it.
      key: a JAX random key, for `loss_fn`.
      num_samples: how many samples to evaluate `loss_fn` at, two or more.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range, or there
        is no IVON state, or nothing that it trains.
    """
    given = _settings(hess_init, b2, b1, clip_radius)
    if num_steps is not None:
        _checks.integer_between("num_steps", num_steps, 1)
    if loss_fn is not None:
        _checks.function("loss_fn", loss_fn)
        _checks.integer_between("num_samples", num_samples, 2)
        _check_key(key)
        key = _checks.random_key("key", key)

    def run(params, opt_state, key):
        params = mean(params, opt_state)
        q, p = posterior(params, opt_state), prior(params, opt_state)
        states = find_states(opt_state)
        groups = [_measure.group(params, state, given) for state in states]
        groups = [g for g in groups if g.arrays]
        _check_some_entries(groups)
        numbers = _measure.of_weights(groups) | {"kl_divergence": q.kl_divergence(p)}
        if all(g.has_average for g in groups):
            numbers |= _measure.of_hess(groups, num_steps)
        if all(g.has_clip for g in groups):
            numbers["clipped"] = _measure.clipped_share(groups)
        if loss_fn is not None:
            keys = jax.random.split(key, num_samples)
            numbers |= _measure.of_loss(groups, params, opt_state, loss_fn, keys)
        return {name: jnp.asarray(value, float) for name, value in numbers.items()}

    return compiled.call(run, params, opt_state, key, of=loss_fn or measure)


def _settings(hess_init, b2, b1, clip_radius):
    """The settings that are given, by their names in a state."""
    given = {}
    if hess_init is not None:
        given["hess_init"] = _checks.positive("hess_init", hess_init)
    if b2 is not None:
        given["one_minus_b2"] = 1.0 - _checks.number("b2", b2, _checks.DECAY_RATE)
    if b1 is not None:
        given["b1"] = _checks.number("b1", b1, _checks.DECAY_RATE)
    if clip_radius is not None:
        given["clip_radius"] = _checks.positive("clip_radius", clip_radius)
    return given


def _check_some_entries(groups):
    """Reject parameters of which IVON trains none."""
    if not groups:
        raise ValueError(
            "`params` must have an entry that IVON trains, got none: its arrays are "
            "empty, or all left out with `optax.masked`."
        )


def _check_key(key):
    """Reject samples without randomness."""
    if key is None:
        raise ValueError(
            "`key` must be a JAX random key where `loss_fn` is given, got None. Pass "
            "`key=jax.random.key(0)`, a new one for each call."
        )


def _measured(name, value):
    """Return a number of `diagnostics.measure` as a Python float."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`numbers` must be known, got a tracer for {name!r}. Call "
            "`diagnostics.advice` on what a jitted `diagnostics.measure` returned."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"`numbers` must be scalars, those of one run, got shape {jnp.shape(value)}"
            f" for {name!r}."
        )
    return float(value)
