"""Means over draws from a posterior, in the memory of one."""

import jax
import jax.numpy as jnp

from .. import _checks
from .._arrays import compiled
from .._arrays.dtypes import wide
from .._arrays.loops import scan_mean
from .._distributions.mixture import Mixture


def mean_over_samples(fn, posterior, key, num_samples, args, of=None):
    """The mean of ``fn(theta, *args)``, any pytree, in the memory of one sample."""
    key = checked_key(fn, posterior, key, num_samples, args)

    def run(posterior, key, args):
        def outputs(theta):
            value = _checks.arrays("fn(theta)", fn(theta, *args))
            return jax.tree.map(lambda x: wide(x)[0], value)

        draw, xs = draws(posterior, key, num_samples)
        return scan_mean(lambda x: outputs(draw(x)), xs)

    return compiled.call(run, posterior, key, args, of=of or fn)


def checked_key(fn, posterior, key, num_samples, args, verb="sample"):
    """Raise unless `fn` can be sampled with these arguments; return the key."""
    _checks.function("fn", fn)
    _checks.integer_between("num_samples", num_samples, 1)
    check_posterior(posterior, verb)
    key = _checks.random_key("key", key)
    _checks.arguments("args", args)
    return key


def draws(posterior, key, num_samples):
    """A function and what to map it over, for the samples of all that averages."""
    if isinstance(posterior, Mixture):
        key, strata_key = jax.random.split(key)
        strata = posterior.strata(strata_key, num_samples)
        keys = jax.random.split(key, num_samples)
        stacked = posterior.stacked  # once, not in every step of the scan
        members = Mixture.from_stacked(stacked)
        return lambda x: members.member(x[0]).sample(x[1]), (strata, keys)
    return posterior.sample, jax.random.split(key, num_samples)


def means(posterior):
    """The means of all members, along first axes."""
    if isinstance(posterior, Mixture):
        return posterior.stacked.mean
    return jax.tree.map(lambda x: jnp.asarray(x)[None], posterior.mean)


def check_posterior(posterior, verb="sample"):
    """Raise unless this can be sampled; parameters, for example, cannot."""
    if not hasattr(posterior, verb):
        raise TypeError(
            f"`posterior` must be a posterior, got {type(posterior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`."
        )
    if hasattr(posterior, "validate"):
        posterior.validate(positive=True)
