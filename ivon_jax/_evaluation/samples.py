"""Means over draws from a posterior, in the memory of one."""

import jax

from .. import _checks
from .._arrays import compiled
from .._arrays.dtypes import wide
from .._arrays.loops import scan_mean
from .._distributions.mixture import Mixture


def mean_over_samples(fn, posterior, key, num_samples, args, of=None):
    """The mean of ``fn(theta, *args)``, any pytree, in the memory of one sample."""
    _checks.function("fn", fn)
    _checks.integer_between("num_samples", num_samples, 1)
    _check_posterior(posterior)
    key = _checks.random_key("key", key)
    _checks.arguments("args", args)

    def run(posterior, key, args):
        def outputs(theta):
            value = _checks.arrays("fn(theta)", fn(theta, *args))
            return jax.tree.map(lambda x: wide(x)[0], value)

        return _scan_samples(outputs, posterior, key, num_samples)

    return compiled.call(run, posterior, key, args, of=of or fn)


def _scan_samples(fn, posterior, key, num_samples):
    if isinstance(posterior, Mixture):
        key, strata_key = jax.random.split(key)
        strata = posterior.strata(strata_key, num_samples)
        keys = jax.random.split(key, num_samples)
        stacked = posterior.stacked  # once, not in every step of the scan
        members = Mixture.from_stacked(stacked)
        return scan_mean(
            lambda x: fn(members.member(x[0]).sample(x[1])), (strata, keys)
        )
    keys = jax.random.split(key, num_samples)
    return scan_mean(lambda k: fn(posterior.sample(k)), keys)


def _check_posterior(posterior):
    """Reject what has no samples, the parameters above all."""
    if not hasattr(posterior, "sample"):
        raise TypeError(
            f"`posterior` must be a posterior, got {type(posterior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`."
        )
