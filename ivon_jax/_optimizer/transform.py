"""Algorithm 1 lifted to pytrees: IVON as optax gradient transformations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _update_rules
from .._arrays.dtypes import wide_full_like
from .._arrays.trees import like
from .._distributions.gaussian import Posterior
from .._distributions.parts import over
from . import validity
from .estimate import Estimate
from .state import IVONState, check_settings

B2 = 0.99999
WEIGHT_DECAY = 1e-4
# With h up to 1e15 the precision ess (h + weight_decay), and its inverse, are finite
# in float32.
ESS_RANGE = (1e-15, 1e18)
HESS_RANGE = (1e-15, _update_rules.LARGEST_HESS)
NEW_PRIOR = (
    "The state keeps the prior, so a new one needs a new state: `tx.init(params)`."
)
NEW_CLIP = "Call `tx.init(params)`, or `state._replace(clip_radius=...)`."


class _Step(NamedTuple):
    """Lines 4 to 7 for one parameter array."""

    direction: jax.Array
    momentum: jax.Array
    hess: jax.Array


def scale_by_ivon(
    ess: jax.typing.ArrayLike,
    *,
    hess_init: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = B2,
    weight_decay: jax.typing.ArrayLike = WEIGHT_DECAY,
    prior: Posterior | None = None,
    horizon: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turn gradients into the direction :math:`(\bar g + \delta m) / (h + \delta)`.

    This is Algorithm 1 without its learning rate, for an `optax.chain` of your own;
    `ivon` is the ready optimizer and documents the arguments.

    >>> tx = optax.chain(scale_by_ivon(ess=1000), optax.scale_by_learning_rate(1e-3))

    Returns:
      A transformation whose `update` takes ``sample=`` or ``hess=`` as `ivon`'s does.
      Its updates have the parameters' dtypes.
    """
    b2 = decay_rate(b2, horizon)
    return in_params_dtype(preconditioner(ess, hess_init, b1, b2, weight_decay, prior))


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    ess: jax.typing.ArrayLike,
    *,
    hess_init: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = B2,
    weight_decay: jax.typing.ArrayLike = WEIGHT_DECAY,
    prior: Posterior | None = None,
    clip_radius: jax.typing.ArrayLike | None = None,
    rescale_lr: bool | None = None,
    horizon: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Improved Variational Online Newton: train a Gaussian over the parameters.

    IVON minimises :math:`\lambda E_q[\bar\ell(\theta)] + KL(q \| p)` (Eq. 1) over
    :math:`q = N(m, \mathrm{diag}(\sigma^2))`, where :math:`\bar\ell` is the mean loss
    per example and the prior is :math:`p = N(0, 1 / (\lambda\delta))`. The mean `m` is
    ``params``; :math:`\sigma = 1 / \sqrt{\lambda (h + \delta)}` follows from the state.
    `sample` draws :math:`\theta \sim q`, the gradient :math:`\hat g` is taken there,
    and `update` does the rest of Algorithm 1:

    .. math::
        \hat h &= \hat g (\theta - m) / \sigma^2 \\
        g &\leftarrow \beta_1 g + (1 - \beta_1) \hat g \\
        h &\leftarrow \beta_2 h + (1 - \beta_2) \hat h
            + (1 - \beta_2)^2 (h - \hat h)^2 / (2 (h + \delta)) \\
        m &\leftarrow m - \alpha\, \mathrm{clip}_\xi
            [(g / (1 - \beta_1^t) + \delta m) / (h + \delta)]

    >>> import ivon_jax
    >>> params = {"w": jnp.ones(3)}
    >>> tx = ivon_jax.ivon(learning_rate=0.1, ess=1000)
    >>> opt_state = tx.init(params)
    >>> theta = ivon_jax.sample(jax.random.key(0), params, opt_state)
    >>> grads = jax.grad(lambda theta: jnp.mean(theta["w"] ** 2))(theta)
    >>> updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    >>> params = optax.apply_updates(params, updates)

    Args:
      learning_rate: :math:`\alpha`, a number or an optax schedule of the step.
      ess: :math:`\lambda`, the effective sample size: the number of training examples
        (examples, not batches). A smaller one widens the posterior (a temperature
        above one), a larger one narrows it.
      hess_init: :math:`h_0`, the first `h`, a curvature per example, usually 0.01 to 1.
        With too small a value the first samples are wild, with too large a one the
        posterior stays narrower than it should be.
      b1: :math:`\beta_1`, decay rate of the gradient's moving average, in [0, 1).
      b2: :math:`\beta_2`, decay rate of the Hessian's, in [0, 1), close to one: the
        average is over about ``1 / (1 - b2)`` steps.
      weight_decay: :math:`\delta`, per example: the prior's precision is
        ``ess * weight_decay``. Zero is an improper, flat prior.
      prior: a Gaussian over the parameters in the place of `weight_decay`'s.
        Yesterday's posterior makes training go on where it stopped (sequential Bayes);
        ``Posterior.isotropic(pretrained, ess * weight_decay)`` fine-tunes towards
        pretrained weights. `m` above becomes its distance from the prior's mean,
        :math:`\delta` the prior's precision divided by :math:`\lambda`. `hess_init`
        and `h` are of the new data alone. The state keeps a copy of it: another prior
        needs a new state, ``tx.init(params)``.
      clip_radius: :math:`\xi`, largest absolute value of an entry of the direction,
        before the learning rate; None does not clip. 1e-3 steadies transformers.
      rescale_lr: multiply the learning rate by ``hess_init + weight_decay``, so that
        the first steps are as long as SGD's (with a `prior` by ``hess_init``, so that
        they are shorter where it is narrow). None does so unless `clip_radius` is
        given, as in the paper: it would bound the steps by less than `clip_radius`.
      horizon: T, the number of steps of the run, in the place of `b2`: ``1 - 1 / T``.
        Then `h` is an average over the run, in which `hess_init` keeps a share of
        :math:`e^{-1}`. That share is also what keeps `h` from zero where estimates
        are noisy. `recommended` sets it.

    Returns:
      An `optax.GradientTransformationExtraArgs`. ``update(grads, state, params)`` also
      takes one of

      * ``sample=theta``, the draw at which `grads` was taken. `theta` has the shapes of
        `params`; its rounding error goes into :math:`\hat h`, so keep float32
        parameters and cast to bfloat16 inside the loss. `params` itself is refused for
        `theta`: the Hessian would decay to zero.
      * ``hess=``, any estimate of the Hessian diagonal of the mean loss.

      ``estimate.update(tx, state, params)`` passes an `Estimate` on as both, through
      any transformation around. ``update(estimate, state, params)`` is for trainers
      that know gradients alone: nothing may stand before IVON there.

      State arrays are float32, or wider where a parameter is; updates have the
      parameters' dtypes. An entry of :math:`\hat h` that is not finite, or that would
      carry `h` beyond 1e15 (as a gradient of 1e15 does), counts as a NaN gradient: the
      update and `g` are NaN. Where `g` is NaN, `h` stays what it was. Clip gradients
      that may be so large. `optax.apply_if_finite` skips steps with a gradient that is
      not finite, and with ``estimate.update`` those with such an :math:`\hat h`.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range.

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
      Algorithm 1 and appendix A, https://arxiv.org/abs/2402.17641
    """
    steps, b2 = learning_rate_of(learning_rate, ess), decay_rate(b2, horizon)
    if clip_radius is not None:
        clip_radius = _checks.positive("clip_radius", clip_radius)
    rules = [preconditioner(ess, hess_init, b1, b2, weight_decay, prior, clip_radius)]
    # Of two numbers, optax 0.2.5 says float where arrays may be.
    if clip_radius is not None:
        rules.append(optax.clip(clip_radius))  # type: ignore[arg-type, unused-ignore]
    if rescale_lr is None:
        rescale_lr = clip_radius is None
    if _checks.boolean("rescale_lr", rescale_lr):
        rules.append(rescaled(hess_init, weight_decay, prior))
    return in_params_dtype(optax.chain(*rules, steps))


def learning_rate_of(learning_rate, ess):
    """Multiply directions by minus a checked learning rate."""
    if not callable(learning_rate):
        learning_rate = _checks.number(
            "learning_rate", learning_rate, _checks.NON_NEGATIVE
        )
        validity.arguments_in_order(learning_rate, ess)
    return optax.scale_by_learning_rate(learning_rate)


def decay_rate(b2, horizon):
    """`b2`, or the one for so many steps."""
    if horizon is None:
        return b2
    if isinstance(b2, float) and b2 != B2:
        raise ValueError(
            f"`b2` must be left out where `horizon` is given, got {b2}. For a shorter "
            "average than the run, pass a smaller `horizon`."
        )
    return 1.0 - 1.0 / _checks.number("horizon", horizon, _checks.at_least(1))


def rescaled(hess_init, weight_decay, prior):
    """Multiply directions by `hess_init`, plus the weight decay if it is one number."""
    hess_init = _in_range("hess_init", hess_init, *HESS_RANGE)
    decay = _weight_decay(weight_decay) if prior is None else 0.0
    return optax.scale(hess_init + decay)  # type: ignore[arg-type, unused-ignore]


def preconditioner(ess, hess_init, b1, b2, weight_decay, prior, clip_radius=None):
    """Algorithm 1 without its learning rate; directions are float32 or wider."""
    ess = _in_range("ess", ess, *ESS_RANGE)
    hess_init = _in_range("hess_init", hess_init, *HESS_RANGE)
    b1 = _checks.number("b1", b1, _checks.DECAY_RATE)
    b2 = _checks.number("b2", b2, _checks.DECAY_RATE)
    weight_decay = _weight_decay(weight_decay)
    check_prior(prior, weight_decay, WEIGHT_DECAY)

    settings = {
        "ess": ess,
        "weight_decay": weight_decay,
        "b1": b1,
        "one_minus_b2": 1.0 - b2,
        "hess_init": hess_init,
        "clip_radius": clip_radius,
    }

    def first_settings():
        """Return arrays of our own: nothing that the caller may donate."""
        return {
            name: None if value is None else jnp.array(value, dtype=float)
            for name, value in settings.items()
        }

    def new_settings(state):
        """Return the settings of this step, which may come from a schedule."""

        def new(name, value):
            if value is None:
                return None
            old = getattr(state, name)
            value = jnp.asarray(value, old.dtype)
            # Just `value`, but a state that is donated has no buffer without a use.
            return jnp.where(old == value, old, value)

        return {name: new(name, value) for name, value in settings.items()}

    def init(params):
        validity.floating_leaves(params)
        return IVONState(
            count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(lambda p: wide_full_like(p, 0.0), params),
            hess=jax.tree.map(lambda p: wide_full_like(p, hess_init), params),
            prior=None if prior is None else over(params, prior),
            **first_settings(),
        )

    def update(grads, state, params=None, *, sample=None, hess=None, **extra_args):
        at_mean = extra_args.get("at_mean")  # of `sampled` alone
        validity.same_kind("prior", prior, state.prior, NEW_PRIOR)
        check_settings(state)
        validity.same_kind("clip_radius", clip_radius, state.clip_radius, NEW_CLIP)
        estimate = estimate_of(grads, state, params, sample, hess, at_mean)
        count = optax.safe_increment(state.count)
        state = state._replace(count=count, **new_settings(state))
        distance = params if state.prior is None else _distance(params, state.prior)

        def step(h, g, delta, mean, grad, hess_hat):
            values = (delta, mean, grad, hess_hat, count, b1, b2)
            delta, mean, grad, hess_hat, t, b1_, b2_ = _cast(h.dtype, *values)
            # A select of what goes in costs no memory, one of what comes out does.
            usable = _update_rules.usable(h, hess_hat, b2_, delta)
            grad = jnp.where(usable, grad, jnp.nan)
            g = _update_rules.next_momentum(g, grad, b1_)
            # Asked of the new g, not of `usable`: then whatever reads the old h comes
            # before the new one, and XLA writes it in place. It would copy h otherwise.
            hess_hat = jnp.where(jnp.isnan(g), h, hess_hat)
            h = _update_rules.next_hess(h, hess_hat, b2_, delta)
            g_bar = _update_rules.debiased(g, b1_, t)
            return _Step(_update_rules.direction(g_bar, mean, h, delta), g, h)

        trees = (state.momentum, state.weight_decays, distance, *estimate)
        steps = jax.tree.map(step, state.hess, *trees)
        momentum, hess = _field("momentum", steps), _field("hess", steps)
        state = state._replace(momentum=momentum, hess=hess)
        return _field("direction", steps), state

    return optax.GradientTransformationExtraArgs(init, update)


def _distance(params, prior):
    return jax.tree.map(lambda p, m: jnp.asarray(p, m.dtype) - m, params, prior.mean)


def estimate_of(grads, state, params, sample, hess, at_mean=None):
    """Gradient and Hessian estimate, from whichever way `update` was told them."""
    validity.has_params(params)
    like("params", params, "the optimizer's state", state.hess)
    validity.one_curvature(sample, hess, grads)
    if isinstance(grads, Estimate):
        grads, hess = grads.opened()
    grads = like("grads", grads, "`params`", params)
    if sample is not None:
        sample = like("sample", sample, "`params`", params)
        validity.a_draw(sample, params)
        hess = state.posterior_of(params).hess_estimate(grads, sample)
        if at_mean is not None:  # a gradient there tells nothing of h: it stays
            hess = jax.tree.map(lambda *x: jnp.where(at_mean, *x), state.hess, hess)
        return grads, hess
    return grads, like("hess", hess, "`params`", params)


def in_params_dtype(tx, state_type=IVONState):
    """Round the updates of `tx` to the parameters' dtypes, once, at the end."""

    def update(grads, state, params=None, **extra_args):
        validity.own_state(state, state_type)
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.tree.cast_like(updates, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _cast(dtype, *values):
    """Cast arrays to `dtype`; Python floats stay, so that ``1 - b2`` is exact."""
    return [v if isinstance(v, float) else jnp.asarray(v, dtype) for v in values]


def _field(name, steps):
    """The tree of one field from a tree of `_Step`s."""
    return jax.tree.map(
        lambda step: getattr(step, name), steps, is_leaf=lambda x: isinstance(x, _Step)
    )


def check_prior(prior, weight_decay, default, kinds=(Posterior,)):
    """Raise unless the prior is a Gaussian of these kinds, and the only prior."""
    if prior is None:
        return
    if not isinstance(prior, kinds):
        remedy = "`ivon_jax.posterior(params, opt_state)`, or around weights "
        remedy += "`ivon_jax.Posterior.isotropic(weights, ess * weight_decay)`."
        if hasattr(prior, "marginals"):
            remedy = "`prior.marginals`, or train with `ivon_jax.evon`."
        raise TypeError(
            f"`prior` must be a Posterior, got {type(prior).__name__}. Pass {remedy}"
        )
    if isinstance(weight_decay, float) and weight_decay != default:
        raise ValueError(
            f"`weight_decay` must be left out where `prior` is given, got "
            f"{weight_decay}. To narrow the prior, use `prior.tempered(temperature)`."
        )


def _weight_decay(value):
    most = _checks.at_most(HESS_RANGE[1])
    return _checks.number("weight_decay", value, _checks.NON_NEGATIVE, most)


def _in_range(name, value, low, high):
    return _checks.positive(name, value, _checks.at_least(low), _checks.at_most(high))
