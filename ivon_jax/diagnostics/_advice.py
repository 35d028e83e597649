"""What to do about a number, in plain words, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
UNTRAINED = (
    "Samples have no less loss than the prior's mean, such as weights of zero: nothing "
    "was learned yet. Raise the learning rate if it is small, lower it if training "
    "blew up, raise ess or hess_init if noise drowns the weights."
)
IDLE = (
    "h is alike for all parameters, and more than all of their curvature together: "
    "samples predict as the mean does, with a constant precision. Lower hess_init."
)
WORSE = (
    "Averaged over samples, the held-out NLL is at least {nll_excess:.0%} more than at "
    "the mean, the posterior is too wide: temper it, raise ess or hess_init, or train "
    "longer."
)
UNSURE = (
    "Averaged over samples, {accuracy:.0%} are right with a confidence of "
    "{confidence:.0%}: raise the learning rate or train longer, or raise ess or "
    "hess_init."
)
BATCHES = (
    "ess is {ess:.0f}, which is {ess_in_batches:.1g} times the number of batches: make "
    "it the number of training examples (of tokens, for a language model)."
)
STATE_LOST = (
    "The step doesn't return the parameters with IVON's new state, whose count goes "
    "up: return both that `tx.update` and `optax.apply_updates` made, and pass them on."
)
RECOMPILED = (
    "{recompiled:.0f} arrays of the parameters or the state come back with another "
    "shape, dtype or weak type, and the next step compiles again: make them arrays of "
    "one dtype, as `jnp.asarray(x, jnp.float32)` does."
)
NO_GRADIENT = (
    "No parameter has a gradient: compute the loss from the sample that you "
    "differentiate by, not from other parameters."
)
SUMMED = (
    "The gradient of a batch twice as large is {loss_scale:.2g} times as large: take "
    "the mean of the losses, not their sum."
)
NO_BATCH = (
    "The gradient is the same for any examples: compute the loss from the step's own "
    "arguments, not from arrays outside of it."
)
COUPLED = (
    "The gradient of one example depends on the others of its batch, as with batch "
    "normalisation: use layer, group or filter response normalisation."
)
SLOW = (
    "All steps of the run together lead no further than {reach:.1g} of the weights' "
    "norm: raise the learning rate, and return what `optax.apply_updates` returned."
)
UPHILL = (
    "The step climbs: apply updates with `optax.apply_updates(params, updates)`, which "
    "adds them."
)
UNSTABLE = (
    "The step is {overshoot:.2g} times as long as the curvature along it allows: lower "
    "the learning rate, or warm it up."
)
FROM_THETA = (
    "The parameters move by the noise: apply updates to params, the mean, as in "
    "`optax.apply_updates(params, updates)`, not to theta."
)
NO_NOISE = (
    "`sample=` is the mean, not a draw: pass the theta of "
    "`ivon_jax.sample(key, params, opt_state)`, at which you took the gradient."
)
ONE_KEY = (
    "Another key leaves the noise as it is: draw with the key that the step is given, "
    "and give it a new one each time, `jax.random.fold_in(key, i)`."
)
AT_MEAN = (
    "The gradient is that of the mean, whatever the sample: take it at theta = "
    "ivon_jax.sample(key, params, opt_state), not at params."
)
OTHER_SAMPLE = (
    "The gradient was taken elsewhere than `sample=` says: draw theta once, take the "
    "gradient there, and pass the same theta to `tx.update`."
)
# With fewer examples in a batch, a temperature may as well be why `ess` is small.
FEWEST_EXAMPLES = 8
ALIKE = 0.02  # `hess_spread`: standard deviations that differ by a hundredth
SATURATED = 0.01  # nats, of a loss whose curvature went with it
HEALTHY = (  # number, its lowest and highest value, advice beyond them
    ("non_finite", 0.0, 0.0, DIVERGED),
    ("loss_at_mean", -3e38, 3e38, DIVERGED),
    ("zero_gradients", 0.0, 0.9, DEAD),
    ("hess_peak", -math.inf, 1e4, PEAK),
    ("noise_to_weight", 0.0, 0.7, WIDE),
    ("loss_gap", -math.inf, 0.5, GAP),
    ("loss_gain", 0.01, math.inf, UNTRAINED),
    ("felt_params", 1.0, math.inf, IDLE),
    ("nll_excess", -math.inf, 0.1, WORSE),
    ("confidence_gap", -math.inf, 0.1, UNSURE),
    ("ess_in_batches", 1.5, math.inf, BATCHES),
    ("noise_to_weight", 1e-3, math.inf, NARROW),
    ("hess_memory", 0.0, 0.9, MEMORY),
    ("hess_decayed", 0.0, 0.99, UNLEARNED),
    ("hess_noise", 0.0, 0.3, NOISY),
    ("correction_mean", 0.0, 0.05, CORRECTED),
    ("clipped", 0.0, 0.9, CLIPPED),
    ("rounded", 0.0, 0.1, ROUNDED),
    ("hess_rounding", 0.0, 1.0, STUCK),
)
HEALTHY_STEP = (  # the same, of `check_step`
    ("state_moves", 1.0, 1.0, STATE_LOST),
    ("no_gradient", 0.0, 0.0, NO_GRADIENT),
    ("loss_scale", -math.inf, 1.5, SUMMED),
    ("batch_effect", 1e-6, math.inf, NO_BATCH),
    ("batch_coupling", 0.0, 0.01, COUPLED),
    ("sample_noise", 1e-4, math.inf, NO_NOISE),
    ("key_effect", 1e-4, math.inf, ONE_KEY),
    ("sample_effect", 1e-6, math.inf, AT_MEAN),
    ("sample_error", 0.0, 0.3, OTHER_SAMPLE),
    ("noise_in_params", 0.0, 0.1, FROM_THETA),
    ("descent", -0.3, math.inf, UPHILL),
    ("reach", 0.01, math.inf, SLOW),
    ("overshoot", -math.inf, 1.0, UNSTABLE),
    ("recompiled", 0.0, 0.0, RECOMPILED),
)


class Diagnosis(NamedTuple):
    """What `diagnose` and `check_step` return; print it to read it.

    >>> print(Diagnosis({"loss_gap": 0.02}, []))
    Nothing is wrong with these numbers:
      loss_gap 0.02
    """

    numbers: dict[str, float]
    advice: list[str]

    def __str__(self) -> str:
        """Say the advice, a line each, and the numbers below."""
        head = self.advice or ["Nothing is wrong with these numbers:"]
        width = max(map(len, self.numbers), default=0)
        lines = [f"  {k:{width}} {v:.3g}" for k, v in self.numbers.items()]
        return "\n".join([*head, *lines])


def advice(numbers: Mapping[str, jax.typing.ArrayLike]) -> list[str]:
    """Return a sentence of advice for each number out of its range.

    The ranges are `HEALTHY`, and of `check_step` `HEALTHY_STEP`.

    >>> advice({"noise_to_weight": 3.0})
    ['The noise is 3 times the weights: raise ess or hess_init.']

    Args:
      numbers: what `measure` returns, outside of ``jit``, or those of `check_step`; any
        part of them.

    Returns:
      The sentences; none for a healthy run.

    Raises:
      TypeError, ValueError: a number is not a number, or not known yet.
    """
    values = {name: _measured(name, value) for name, value in numbers.items()}
    found = [
        sentence
        for name, lowest, highest, sentence in (*HEALTHY, *HEALTHY_STEP)
        if name in values and not lowest <= values[name] <= highest
    ]
    told = dict.fromkeys(x for x in found if not _is_explained(x, found, values))
    return [sentence.format(**values) for sentence in told]


def _is_explained(sentence, found, values):
    """Return whether a sentence repeats others, or says what isn't known."""
    others = set(found) - {UNTRAINED, IDLE}
    alike = values.get("hess_spread", 1.0) < ALIKE
    saturated = 0.0 <= values.get("loss_at_mean", 1.0) < SATURATED
    if DIVERGED in found:  # whatever else is wrong follows from that
        return sentence != DIVERGED
    if values.get("hess_memory") == 1.0 and sentence in (MEMORY, UNTRAINED, IDLE):
        return True  # the run has yet to begin
    # Weights that blew up dwarf the noise; less of ess would make matters worse.
    # A probe of the sample has one example again and again.
    return {
        NARROW: bool({DEAD, PEAK, GAP} & others),
        OTHER_SAMPLE: COUPLED in found,
        UNTRAINED: bool(others),
        IDLE: bool(others) or UNTRAINED in found or saturated or not alike,
    }.get(sentence, False)


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
