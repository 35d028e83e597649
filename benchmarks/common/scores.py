"""What the tables of classifiers show."""

import jax.numpy as jnp

from ivon_jax import metrics

DIGITS = {"accuracy %": 1, "NLL": 3, "ECE": 3, "Brier": 3, "seconds": 1}


def scores(probs, labels):
    """Return accuracy in per cent, NLL, ECE and Brier score, of (N, C) and (N,)."""
    return {
        "accuracy %": 100 * metrics.accuracy(probs, labels),
        "NLL": metrics.negative_log_likelihood(probs, labels),
        "ECE": metrics.expected_calibration_error(probs, labels),
        "Brier": metrics.brier_score(probs, labels),
    }


def losses(probs, labels):
    """Return the NLL of each example, (runs, N), of (runs, N, C) and (N,)."""
    own = jnp.take_along_axis(probs, labels[None, :, None], axis=2)[..., 0]
    return -jnp.log(jnp.maximum(own, jnp.finfo(own.dtype).tiny))


def right(probs, labels):
    """Return 100 where the likeliest class is the label, else 0: (runs, N)."""
    return 100.0 * (probs.argmax(-1) == labels)


def over_seeds(runs):
    """Turn the records of all seeds into one of lists, in the order of the tables."""
    names = [*(name for name in DIGITS if name in runs[0]), *runs[0]]
    return {name: [float(run[name]) for run in runs] for name in dict.fromkeys(names)}
