"""Controls of IVON: each has all but one of the things that IVON has.

If a control does as well, what it lacks gave nothing. Those that train are systems as
those of baselines.py, for as many trials:

* `without_noise`: no noise, h frozen. IVON's step is then momentum.
* `with_constant_noise`: noise in training and prediction, of the variance of h_0.
* `squared_gradient`: h from squared gradients of batches.

The others only predict otherwise, with what is trained already: `at_constant_precision`
has IVON's noise without its shape, `temperature_scaled` has no posterior but a number
chosen on held-out data, as `calibrated` has, and `ensembled` has points.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ivon_jax
from common import baselines


def frozen(tx, hess_init):
    """Return IVON's `tx` with an h that stays `hess_init`, whatever is estimated."""

    def update(grads, state, params, **_):
        hess = jax.tree.map(lambda p: jnp.full_like(p, hess_init), params)
        return tx.update(grads, state, params, hess=hess)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def without_noise(problem, learning_rate):
    """Return IVON's step with gradients at the mean: any h_0 gives the same one."""
    tx = baselines.ivon_optimizer(problem, learning_rate, hess_init=1.0)
    return baselines.point(problem, frozen(tx, 1.0))


def with_constant_noise(problem, learning_rate, hess_init):
    """Return IVON with an h that stays `hess_init`: one variance for all weights."""
    tx = baselines.ivon_optimizer(problem, learning_rate, hess_init)
    return baselines.trained_by(problem, frozen(tx, hess_init))


squared_gradient = functools.partial(baselines.ivon, hess_estimator="squared_gradient")


def constant_precision(posterior):
    """Return the Gaussian of the same mean and entropy with one variance for all."""
    logs = jax.tree.leaves(jax.tree.map(jnp.log, posterior.precision))
    mean_log = sum(jnp.sum(x) for x in logs) / sum(x.size for x in logs)
    precision = jax.tree.map(
        lambda p: jnp.full_like(p, jnp.exp(mean_log)), posterior.precision
    )
    return ivon_jax.Posterior(posterior.mean, precision)


def predicting_with(change, system):
    """Predict by draws of ``change(posterior)``, for a system with IVON's state."""

    def changed(problem, **setting):
        return system(problem, **setting)._replace(
            outputs=lambda key, state, x: problem.apply(
                change(ivon_jax.posterior(*state)).sample(key), x
            )
        )

    return changed


at_constant_precision = functools.partial(predicting_with, constant_precision)


def tempered(system):
    """Make the temperature of the posterior in predictions a hyperparameter."""

    def with_temperature(problem, temperature, **setting):
        def change(posterior):
            return posterior.tempered(temperature)

        return predicting_with(change, system)(problem, **setting)

    return with_temperature


def temperatures(problem, states, keys, held_out, num_samples, change=lambda q: q):
    """Return each run's best temperature of ``change(posterior)`` on held-out data."""
    x, labels = held_out

    def probs(theta, x):
        return jax.nn.softmax(problem.apply(theta, x))

    def of_run(run):
        state, key = run
        curve = ivon_jax.calibration_curve(
            *(probs, change(ivon_jax.posterior(*state)), labels, key),
            num_samples=num_samples,
            args=(x,),
        )
        return curve.temperature

    return jax.jit(lambda runs: jax.lax.map(of_run, runs))((states, keys))


@jax.jit
def temperature_scaled(held_out_probs, labels, probs):
    """Scale each run's log-probabilities, (runs, N, C), to the least held-out NLL."""

    def logits(probs):
        return jnp.log(jnp.maximum(probs, 1e-30))

    def of_run(held_out_probs, probs):
        tau = ivon_jax.calibration.temperature_scaling(logits(held_out_probs), labels)
        return jax.nn.softmax(logits(probs) / tau)

    return jax.vmap(of_run)(held_out_probs, probs)


def ensembled(probs, members):
    """Average probabilities (runs * members, N, C) of members that are neighbours."""
    return jnp.reshape(probs, (-1, members, *np.shape(probs)[1:])).mean(axis=1)


def of_equal_cost(problem, members):
    """Return the problem of a member, if all together may take the steps of one."""
    shares = {
        length: max(1, getattr(problem, length) // members)
        for length in ("epochs", "steps")
        if getattr(problem, length)
    }
    return dataclasses.replace(problem, **shares)
