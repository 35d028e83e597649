"""Intervals of what differs between two systems: over seeds and over test examples.

A result of S seeds on N test examples is uncertain for two reasons: other seeds would
give other networks, and other examples another test. Errors over seeds alone leave out
the second, which is often the larger one, as all seeds share the test set.

    interval(key, paired_mean, losses_of_a, losses_of_b)

is the difference of the means of (S, N) losses, and its 95 % interval. The examples are
resampled, the same ones for both systems and all seeds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    estimate: float
    low: float
    high: float

    @property
    def cell(self):
        """Return the value of a table's cell."""
        return {"difference": self.estimate, "low": self.low, "high": self.high}


def paired_mean(a, b):
    """Return the difference of two systems' means."""
    return jnp.mean(a) - jnp.mean(b)


def interval(key, statistic, *arrays, level=0.95, resamples=400):
    r"""Return an `Interval` of the mean over seeds of ``statistic(*arrays)``.

    With effects of seeds, of examples and of both together, the variance of the mean is
    :math:`v_s / S + v_n + v_e / S`: the variances of the statistic over seeds, over
    resampled examples alike for all seeds, and what is left of each seed's. Over seeds
    alone one sees :math:`(v_s + v_e) / S`, over examples alone :math:`v_n + v_e / S`;
    so both are added and the last is taken off. (Resampling both at once would count it
    thrice.) As few seeds tell a variance roughly, the quantile is Student's, with
    Satterthwaite's degrees of freedom.

    Args:
      key: a JAX random key.
      statistic: a function of as many arrays, (N, ...), to a number.
      *arrays: (S, N, ...), of the same seeds and examples.
      level: of the interval.
      resamples: how often the examples are drawn.
    """
    keys = jax.random.split(key, resamples)
    values, resampled = _resampled(statistic, keys, *arrays)
    return _student(*(np.asarray(x, float) for x in (values, resampled)), level)


@functools.partial(jax.jit, static_argnums=0)
def _resampled(statistic, keys, *arrays):
    """Return the statistic of each seed, (S,), and at resampled examples, (R, S)."""
    num_examples = arrays[0].shape[1]
    of_seeds = jax.vmap(statistic)

    def resample(key):
        rows = jax.random.randint(key, (num_examples,), 0, num_examples)
        return of_seeds(*(array[:, rows] for array in arrays))

    return of_seeds(*arrays), jax.lax.map(resample, keys)


def over_seeds(values, level=0.95):
    """Return Student's interval of a mean of numbers, one for each seed."""
    values = np.asarray(values, float)
    mean = float(np.mean(values))
    radius = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - radius, mean + radius)


def _student(values, resampled, level):
    """Combine values of seeds, (S,), and those at resampled examples, (R, S)."""
    num_seeds = len(values)
    common = resampled.mean(axis=1, keepdims=True)
    # The mean of S residuals is left out of each: of their squares (S - 1) / S is left.
    rest = np.var(resampled - common, axis=0).sum() / (num_seeds - 1)
    seeds = np.var(values, ddof=1) / num_seeds
    examples = max(np.var(common, ddof=1) - rest / num_seeds, 0.0)
    variance = seeds + examples
    if variance == 0:
        return Interval(*[float(values.mean())] * 3)
    freedom = (num_seeds - 1) / max(seeds / variance, 1e-6) ** 2
    radius = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    mean = float(values.mean())
    return Interval(mean, mean - float(radius), mean + float(radius))
