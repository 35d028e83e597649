"""The numbers that `diagnostics` explains, from samples of the weights."""

import jax.numpy as jnp

from .. import _checks
from .._arrays import ranks
from .._arrays.loops import scan_mean
from .._evaluation import likelihood, validity
from .._optimizer.gradients import value_and_grad
from .._optimizer.posterior import sample
from .._optimizer.state import find_states
from ._measure import kept, size_of, total

TIMES = 3.0  # how many standard errors a difference must have


def of_loss(groups, params, prior_mean, opt_state, loss_fn, keys):
    """Measure the numbers that need samples of a loss."""
    arrays = [x for g in groups for x in g.arrays]
    size, count = size_of(arrays), len(keys)
    has_hess = all(g.has_average for g in groups)

    def loss(theta):
        return _checks.scalar_loss(loss_fn(theta))

    def corrections(hess_hats):
        hess_hats = iter(hess_hats)
        terms = [
            0.5 * g.one_minus_b2 * jnp.abs(next(hess_hats) - x.hess) * x.curvature
            for g in groups
            for x in g.arrays
        ]
        return ranks.lower_median(terms), total(terms) / size

    def at_sample(key):
        value, estimate = value_and_grad(loss)(key, params, opt_state)
        grads, hess_hats = _split(estimate, params, opt_state)
        norm2 = total([g**2 for g in grads])
        terms = corrections(hess_hats) if has_hess else None
        return value.astype(float), grads, norm2, terms

    loss_at_samples, grads, norm2, terms = scan_mean(at_sample, keys)
    loss_at_mean = jnp.asarray(loss(params), float)
    norm2_of_mean = total([g**2 for g in grads])
    variance = (norm2 - norm2_of_mean) * count / (count - 1)
    signal = jnp.maximum(norm2_of_mean - variance / count, 0.0)
    gap = loss_at_samples - loss_at_mean
    numbers = {
        "loss_at_mean": loss_at_mean,
        "loss_at_samples": loss_at_samples,
        "loss_gap": gap,
        "loss_gain": jnp.asarray(loss(prior_mean), float) - loss_at_samples,
        "felt_params": 2.0 * gap * sum(g.size * g.arrays[0].ess for g in groups) / size,
        "gradient_snr": signal / jnp.maximum(variance, jnp.finfo(signal.dtype).tiny),
        "zero_gradients": total([g == 0 for g in grads]) / size,
    }
    if not has_hess:
        return numbers
    median, mean = terms
    step = sum(g.size * g.one_minus_b2 for g in groups) / size
    return numbers | {
        "expected_gap": 0.5 * total([x.spread * x.hess for x in arrays]),
        "correction_median": median,
        "correction_mean": mean,
        "hess_noise": median * jnp.sqrt(2.0 / step),
    }


def _split(estimate, params, opt_state):
    """Gradients and Hessian estimates, in the order of the groups' arrays."""
    trained = [state.posterior_of(params).trained for state in find_states(opt_state)]
    return [
        [x.astype(float) for t in trained for x in kept(tree, t) if x.size]
        for tree in estimate
    ]


def of_predictions(fn, labels, params, opt_state, keys):
    """Measure the numbers that need held-out probabilities and labels."""
    labels = validity.integers("labels", labels)

    def probs_at(theta):
        probs = jnp.asarray(validity.one_array("fn(theta)", fn(theta)))
        validity.distributions("fn(theta)", probs)
        if jnp.shape(probs)[:-1] != jnp.shape(labels):
            raise ValueError(
                "`labels` must have the shape of `fn(theta)` without its last axis, "
                f"that of classes, got {jnp.shape(labels)} and {jnp.shape(probs)}."
            )
        validity.labels("labels", labels, labels.shape, probs.shape[-1])
        return jnp.asarray(probs, float)

    def nll(probs):
        tiny = jnp.finfo(probs.dtype).tiny
        return -likelihood.of_labels(jnp.maximum(probs, tiny), labels)

    at_mean = probs_at(params)
    averaged = scan_mean(lambda key: probs_at(sample(key, params, opt_state)), keys)
    before, after = nll(at_mean), nll(averaged)
    right = (jnp.argmax(averaged, -1) == labels).astype(float)
    sure = jnp.max(averaged, -1)
    nll_at_mean = jnp.mean(before)
    return {
        "nll_at_mean": nll_at_mean,
        "nll_of_samples": jnp.mean(after),
        "nll_excess": _at_least(after - before) / nll_at_mean,
        "accuracy": jnp.mean(right),
        "confidence": jnp.mean(sure),
        "confidence_gap": _at_least(right - sure),
    }


def _at_least(differences):
    """The mean, less what it may be off by."""
    error = jnp.std(differences) / jnp.sqrt(float(differences.size))
    return jnp.mean(differences) - TIMES * error
