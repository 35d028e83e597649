"""The numbers that `diagnostics` explains, from the arrays that are trained."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _update_rules
from .._arrays import ranks
from .._optimizer.state import check_settings

SETTINGS = "b1", "one_minus_b2", "hess_init", "clip_radius"


class Trained(NamedTuple):
    """One array that IVON trains, in the default float dtype."""

    mean: jax.Array  # m
    shift: jax.Array  # m - m_0
    variance: jax.Array  # sigma^2
    spread: jax.Array  # the same of coordinates, where h is of coordinates in a basis
    delta: jax.Array  # from the prior's variance
    ess: jax.Array  # (), lambda
    count: jax.Array  # type: ignore[assignment]  # (), t; it hides tuple.count
    momentum: jax.Array | None  # g, if the optimizer has one, as h
    hess: jax.Array | None  # h
    spacings: tuple[float, float]  # of the dtypes of m and h

    @property
    def curvature(self):
        """1 / (h + delta)."""
        return self.ess * self.spread


class Group(NamedTuple):
    """What one state trains, and how; None for a setting that it doesn't have."""

    arrays: list[Trained]
    b1: jax.Array | None
    one_minus_b2: jax.Array | None
    hess_init: jax.Array | None
    clip_radius: jax.Array | None

    @property
    def size(self):
        return size_of(self.arrays)

    @property
    def has_average(self):
        """Return whether h is a moving average that is known from its start."""
        settings = self.hess_init, self.one_minus_b2, self.arrays[0].hess
        return all(x is not None for x in settings)

    @property
    def has_clip(self):
        """Return whether the direction of the last step is known, and clipped."""
        x = self.arrays[0]
        return all(
            v is not None for v in (self.clip_radius, self.b1, x.momentum, x.hess)
        )

    @property
    def log_b2(self):
        return jnp.maximum(jnp.log1p(-self.one_minus_b2), math.log(1e-37))

    @property
    def count(self):
        return jnp.min(jnp.stack([x.count for x in self.arrays]))

    @property
    def learned_share(self):
        """1 - b2**t: how much of h is not `hess_init`."""
        return -jnp.expm1(jnp.maximum(self.count, 1.0) * self.log_b2)


def group(params, state, given):
    """What `state` trains; settings that are `given` are not the state's."""
    check_settings(state)
    q, p = state.posterior_of(params), state.prior_of(params)
    ess, count = (x.astype(float) for x in (state.ess, state.count))

    def array(*values):
        m, m_0, variance, prior_variance, spread, momentum, hess = map(
            _as_float, values
        )
        delta = 1.0 / (ess * prior_variance)
        spacings = _spacing(values[0]), _spacing(values[-1])
        learned = momentum, hess, spacings
        return Trained(m, m - m_0, variance, spread, delta, ess, count, *learned)

    of_hess = getattr(q, "coordinates", q).variance
    trees = [q.mean, p.mean, q.variance, p.variance, of_hess]
    trees = [kept(x, q.trained) for x in trees]
    for name in ("momentum", "hess"):
        learned = jax.tree.leaves(getattr(state, name, None))
        trees.append(learned or [None] * len(trees[0]))
    arrays = [array(*x) for x in zip(*trees, strict=True) if jnp.size(x[0])]
    settings = (given.get(name, getattr(state, name, None)) for name in SETTINGS)
    return Group(arrays, *map(_as_float, settings))


def _as_float(value):
    """In the default float dtype; None stays None."""
    return None if value is None else jnp.asarray(value, float)


def _spacing(value):
    """The spacing of numbers around one in the dtype of `value`, 0 without any."""
    return 0.0 if value is None else float(jnp.finfo(jnp.result_type(value)).eps)


def kept(tree, trained):
    """The arrays of `tree` that are trained."""
    kept = jax.tree.map(lambda t, x: x if t else None, trained, tree)
    return jax.tree.leaves(kept)


def of_weights(groups):
    """Measure what any optimizer with a posterior has."""
    arrays = [x for g in groups for x in g.arrays]
    size = size_of(arrays)
    learned = [v for x in arrays for v in (x.mean, x.hess, x.momentum) if v is not None]
    noise = total([x.variance for x in arrays])
    weights = total([x.mean**2 for x in arrays])
    lost = [x.variance < (x.spacings[0] * x.mean) ** 2 for x in arrays]
    return {
        "count": jnp.min(jnp.stack([x.count for x in arrays])),
        "ess": sum(x.ess * float(x.mean.size) for x in arrays) / size,
        "weight_decay": total([x.delta for x in arrays]) / size,
        "num_params": size,
        "non_finite": total([~jnp.isfinite(v) for v in learned]) / entries(learned),
        "noise_to_weight": jnp.sqrt(noise / weights),
        "rounded": total(lost) / size,
    }


def of_hess(groups, num_steps):
    """Measure h, and how much of it is still `hess_init`."""
    arrays = [x for g in groups for x in g.arrays]
    pairs = [(x.hess, g.hess_init) for g in groups for x in g.arrays]
    hess = [x.hess for x in arrays]
    size = size_of(arrays)

    def mean_of_entries(value):
        return sum(g.size * value(g) for g in groups) / size

    def steps(g):
        return g.count if num_steps is None else num_steps

    def target(g):
        # The mean way of h from hess_init, in which nothing cancels.
        way = total([x.hess - g.hess_init for x in g.arrays]) / g.size
        return g.hess_init + way / g.learned_share

    lowest, highest = _range(hess)
    gamma = total([jnp.maximum(x.hess, 0.0) * x.curvature for x in arrays])
    rounding = [x.spacings[1] / g.one_minus_b2 for g in groups for x in g.arrays]
    peaks = [jnp.max(h, initial=-jnp.inf) / h_0 for h, h_0 in pairs]
    return {
        "hess_median": ranks.lower_median(hess),
        "hess_min": lowest,
        "hess_max": highest,
        "hess_peak": jnp.max(jnp.stack(peaks)),
        "hess_negative": total([h <= 0 for h in hess]) / size,
        "hess_memory": mean_of_entries(lambda g: jnp.exp(steps(g) * g.log_b2)),
        "hess_half_life": mean_of_entries(lambda g: -math.log(2.0) / g.log_b2),
        "hess_drift": ranks.lower_median([jnp.abs(h - h_0) / h_0 for h, h_0 in pairs]),
        "hess_spread": _spread([h / h_0 for h, h_0 in pairs]),
        "hess_target": mean_of_entries(target),
        "hess_decayed": sum(map(_decayed, groups)) / size,
        "hess_rounding": jnp.max(jnp.stack(rounding)),
        "effective_params": gamma,
        "effective_share": gamma / size,
    }


def _spread(arrays):
    """The median distance from the median, relative to it."""
    median = ranks.lower_median(arrays)
    distance = ranks.lower_median([jnp.abs(x - median) for x in arrays])
    return distance / jnp.maximum(jnp.abs(median), jnp.finfo(median.dtype).tiny)


def _decayed(group):
    """Count the entries that are where estimates of zero alone would leave them."""
    hess, hess_init = [x.hess for x in group.arrays], group.hess_init
    share = group.learned_share
    median = ranks.lower_median(hess)
    # The correction of line 5 makes the decay a little slower than b2**t.
    target = (median - hess_init) / share + hess_init
    limit = (0.01 + group.one_minus_b2) * hess_init
    bare = (share > 0.01) & (jnp.abs(target) < limit)
    spacing = 2.0 * float(jnp.finfo(jnp.float32).eps)
    alike = total([jnp.abs(h - median) <= spacing * median for h in hess])
    return jnp.where(bare, alike, 0.0)


def clipped_share(groups):
    """The share of the last direction that was clipped."""

    def clipped(g, x):
        momentum = _update_rules.debiased(x.momentum, g.b1, jnp.maximum(x.count, 1.0))
        direction = _update_rules.direction(momentum, x.shift, x.hess, x.delta)
        return jnp.abs(direction) > g.clip_radius

    arrays = [clipped(g, x) for g in groups for x in g.arrays]
    return total(arrays) / entries(arrays)


def size_of(arrays):
    """P as a float: int32 ends at 2^31."""
    return entries([x.mean for x in arrays])


def entries(arrays):
    return float(sum(x.size for x in arrays))


def total(arrays):
    """The sum over all entries, which counts those that are true."""
    return sum(jnp.sum(x, dtype=float) for x in arrays)


def _range(arrays):
    """The smallest and the largest entry; of an empty array neither counts."""
    lows = [jnp.min(x, initial=jnp.inf) for x in arrays]
    highs = [jnp.max(x, initial=-jnp.inf) for x in arrays]
    return jnp.min(jnp.stack(lows)), jnp.max(jnp.stack(highs))
