"""The numbers that `diagnostics` explains, from the arrays that IVON trains."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _rules
from .._arrays import ranks
from .._arrays.loops import scan_mean
from .._optimizer.gradients import value_and_grad
from .._optimizer.posterior import find_states, posterior, prior


class Trained(NamedTuple):
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


def trained_arrays(params, state):
    """What one state trains."""
    q, p = posterior(params, state), prior(params, state)
    ess, count = (x.astype(float) for x in (state.ess, state.count))

    def array(m, m_0, g, h, s, s_0):
        spacings = tuple(float(jnp.finfo(jnp.result_type(x)).eps) for x in (m, h))
        m, m_0, g, h, s, s_0 = (jnp.asarray(x, float) for x in (m, m_0, g, h, s, s_0))
        return Trained(m, m - m_0, g, h, s / ess, s_0 / ess, ess, count, spacings)

    means = (_trained(tree, q.precision) for tree in (q.mean, p.mean))
    others = (state.momentum, state.hess, q.precision, p.precision)
    return list(map(array, *means, *map(jax.tree.leaves, others)))


def _trained(tree, precision):
    """The arrays of `tree` that have a precision."""
    kept = jax.tree.map(lambda x, s: None if s is None else x, tree, precision)
    return jax.tree.leaves(kept)


def of_weights(arrays):
    """What needs no setting that the state doesn't keep."""
    size = _size(arrays)
    finite = [jnp.isfinite(v) for x in arrays for v in (x.mean, x.hess, x.momentum)]
    noise = _total([x.variance for x in arrays])
    weights = _total([x.mean**2 for x in arrays])
    lost = [x.variance < (x.spacings[0] * x.mean) ** 2 for x in arrays]
    gamma = _total([jnp.maximum(x.hess, 0.0) / x.scale for x in arrays])
    return {
        "count": jnp.min(jnp.stack([x.count for x in arrays])),
        "ess": sum(x.ess * float(x.mean.size) for x in arrays) / size,
        "weight_decay": _total([x.delta for x in arrays]) / size,
        "num_params": size,
        "non_finite": _total([~x for x in finite]) / (3 * size),
        "noise_to_weight": jnp.sqrt(noise / weights),
        "rounded": _total(lost) / size,
        "effective_params": gamma,
        "effective_share": gamma / size,
    }


def of_hess(arrays, hess_init, b2, num_steps):
    """Where h is, and how much of it is still `hess_init`."""
    hess = [x.hess for x in arrays]
    size = _size(arrays)
    count = jnp.min(jnp.stack([x.count for x in arrays]))
    if isinstance(b2, float):
        log_b2 = math.log(max(b2, 1e-37))  # in float32, 0.999999 is 1 % off
    else:
        log_b2 = jnp.log(jnp.maximum(b2, 1e-37))
    steps = count if num_steps is None else num_steps
    drift = [jnp.abs(h - hess_init) / hess_init for h in hess]
    # 1 - b2**t, and the mean way of h from hess_init, in which nothing cancels.
    share = -jnp.expm1(jnp.maximum(count, 1.0) * log_b2)
    way = _total([h - hess_init for h in hess]) / size
    lowest, highest = _range(hess)
    median = ranks.lower_median(hess)
    return {
        "hess_median": median,
        "hess_min": lowest,
        "hess_max": highest,
        "hess_peak": highest / hess_init,
        "hess_negative": _total([h <= 0 for h in hess]) / size,
        "hess_memory": jnp.exp(steps * log_b2),
        "hess_half_life": -math.log(2.0) / log_b2,
        "hess_drift": ranks.lower_median(drift),
        "hess_target": hess_init + way / share,
        "hess_decayed": _decayed(hess, median, hess_init, b2, share) / size,
        "hess_rounding": max(x.spacings[1] for x in arrays) / (1.0 - b2),
    }


def _decayed(hess, median, hess_init, b2, share):
    """How many entries are where estimates of zero alone would have left them."""
    # The correction of line 5 makes the decay a little slower than b2**t.
    target = (median - hess_init) / share + hess_init
    bare = (share > 0.01) & (jnp.abs(target) < (1.01 - b2) * hess_init)
    spacing = 2.0 * float(jnp.finfo(jnp.float32).eps)
    alike = _total([jnp.abs(h - median) <= spacing * median for h in hess])
    return jnp.where(bare, alike, 0.0)


def clipped_share(arrays, b1, clip_radius):
    """The share of the last direction that was clipped."""

    def clipped(x):
        momentum = _rules.debiased(x.momentum, b1, jnp.maximum(x.count, 1.0))
        direction = _rules.direction(momentum, x.shift, x.hess, x.delta)
        return jnp.abs(direction) > clip_radius

    return _total(map(clipped, arrays)) / _size(arrays)


def of_loss(arrays, params, opt_state, b2, loss_fn, keys):
    """What takes samples."""
    size, count = _size(arrays), len(keys)

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
        return (
            value.astype(float),
            grads,
            norm2,
            ranks.lower_median(terms),
            _total(terms) / size,
        )

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
    """Gradients and Hessian estimates, in the order of `trained_arrays`."""
    precisions = [posterior(params, s).precision for s in find_states(opt_state)]
    return [
        [x.astype(float) for s in precisions for x in _trained(tree, s)]
        for tree in estimate
    ]


def _size(arrays):
    """P as a float: int32 ends at 2^31."""
    return float(sum(x.mean.size for x in arrays))


def _total(arrays):
    """The sum over all entries, which counts those that are true."""
    return sum(jnp.sum(x, dtype=float) for x in arrays)


def _range(arrays):
    """The smallest and the largest entry; of an empty array neither counts."""
    lows = [jnp.min(x, initial=jnp.inf) for x in arrays]
    highs = [jnp.max(x, initial=-jnp.inf) for x in arrays]
    return jnp.min(jnp.stack(lows)), jnp.max(jnp.stack(highs))
