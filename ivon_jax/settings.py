"""Settings for `ivon` from what its user knows of the run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._distributions.gaussian import Posterior


class _Scale(NamedTuple):
    """How far the weights go, and how uncertain they are at first."""

    step: float  # s: the longest step of a weight, in a run of 1,000 steps
    stddev: float  # the most noise at first; weights are some 0.1
    hess: float  # h_0 of one example; it falls as the root of their number
    weight_decay: float  # delta of one example; likewise


_FROM_SCRATCH = _Scale(step=2e-3, stddev=0.045, hess=16.0, weight_decay=0.04)
SCALES = {
    "classification": _FROM_SCRATCH,
    # Gaussians that fit well are narrow: much curvature, and longer ways to go.
    "regression": _Scale(step=5e-3, stddev=0.032, hess=32.0, weight_decay=0.1),
    "language_model": _FROM_SCRATCH,
    # From weights that are good already, as the paper's appendix C.4.
    "fine_tuning": _FROM_SCRATCH._replace(step=2e-4, stddev=0.01),
}
WINDOW = 2.0  # epochs, at least, over which h is an average
MOST_NOISE = 1.0  # of the weights' norm


def recommended(
    num_examples: int,
    num_steps: int,
    batch_size: int,
    *,
    task: str = "classification",
    params: optax.Params | None = None,
    loss_fn: Callable[..., jax.Array] | None = None,
    batch: tuple[Any, ...] = (),
) -> dict[str, Any]:
    r"""Return arguments of `ivon` for a run of T steps over N examples.

    >>> import ivon_jax
    >>> settings = recommended(num_examples=1_000, num_steps=1_000, batch_size=50)
    >>> tx = ivon_jax.ivon(**settings)
    >>> print({name: settings[name] for name in ("ess", "b2", "clip_radius")})
    {'ess': 1000.0, 'b2': 0.999, 'clip_radius': 0.002}

    No settings are the best for every network. These are a start from which few runs
    need to go on:

    * ``learning_rate`` is Newton's, 1, and decays to 0 as a cosine. ``clip_radius``
      bounds a weight's step, as AdamW's learning rate does:
      :math:`\xi = 0.002 \sqrt{1000 / T}`. Without it, what is stable depends on the
      scale of the inputs, and h must first be learned. Steps are not rescaled.
    * ``ess`` is N: the posterior is Bayes'. `calibrate` tempers it afterwards.
    * ``b2`` is :math:`1 - 1 / T`: h is an average over the run, in which h_0 keeps a
      third. In a faster one h can fall to zero, and its noise, some
      :math:`\sqrt{N (1 - b_2) / 2B}` of itself, is larger. It is an average over two
      epochs at least.
    * ``hess_init`` is :math:`16 / \sqrt{N}`, and so much that the first noise is not
      above 0.045. The paper's runs have 0.5 at N = 5e4, 0.05 at 1.3e6, 0.001 at 9e9.
    * ``weight_decay`` is :math:`0.04 / \sqrt{N}`: at N = 1,000 the prior's standard
      deviation is 0.9. The paper has 2e-4 at 5e4, 5e-5 at 1.3e6, 1e-6 at 9e9. Most of
      what is left to win is here: noisy labels want more of it, clean ones less, and
      `tune` finds out.

    The numbers were chosen by hand on small networks. benchmarks/README.md has how they
    do on twelve runs of classification and regression; for language models and
    fine-tuning they follow from the paper's, and were not measured.

    Args:
      num_examples: N, the terms of which the loss of the training set is a mean:
        examples, not batches; for a language model, tokens.
      num_steps: T, of the whole run.
      batch_size: B, as `num_examples` counts: for a language model, tokens.
      task: "classification" or "language_model". "regression", by a Gaussian's negative
        log-likelihood of targets of standard deviation one: steps are longer,
        the first noise has half the variance, and the prior is narrower; no gradient,
        however large, makes a step longer than `clip_radius`. "fine_tuning", from
        pretrained `params`, which it needs: steps are a tenth as long, the first noise
        is not above 0.01, and the prior is around `params`, in place of `weight_decay`.
      params: the first parameters. Where they are small, `hess_init` grows until the
        first noise is no larger than they are.
      loss_fn: ``loss_fn(params, *batch)``, to see whether it is a mean; it needs
        `params` and `batch`.
      batch: some examples, a tuple of pytrees of arrays.

    Returns:
      Arguments of `ivon`, to be changed at will.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind, out of range or missing.

    Warns:
      UserWarning: the loss is a sum over the batch, or not finite.

    References:
      Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
      appendices A and C, https://arxiv.org/abs/2402.17641
    """
    scale = SCALES[_checks.choice("task", task, tuple(SCALES))]
    _check_counts(num_examples, num_steps, batch_size)
    if loss_fn is not None:
        _check_mean(loss_fn, params, batch)
    n = float(num_examples)
    decay = scale.weight_decay / math.sqrt(n)
    least_precision = 1.0 / scale.stddev**2
    if params is not None:
        least_precision = max(least_precision, _precision_of(params))
    window = max(num_steps, WINDOW * num_examples / batch_size)
    settings = {
        "learning_rate": _cosine(num_steps),
        "ess": n,
        "hess_init": max(scale.hess / math.sqrt(n), least_precision / n),
        "b2": 1.0 - 1.0 / window,
        "weight_decay": decay,
        "clip_radius": scale.step * math.sqrt(1_000 / num_steps),
    }
    if task == "fine_tuning":
        if params is None:
            raise ValueError(
                "`params` must be the pretrained ones for fine-tuning, got None."
            )
        del settings["weight_decay"]
        settings["prior"] = Posterior.isotropic(params, n * decay)
    return settings


def _cosine(num_steps):
    """Decay from 1 to 0; optax's takes no integer under strict promotion."""
    schedule = optax.cosine_decay_schedule(1.0, num_steps)
    return lambda count: schedule(jnp.asarray(count, float))


def _check_counts(num_examples, num_steps, batch_size):
    _checks.integer_between("num_steps", num_steps, 1)
    _checks.integer_between("num_examples", num_examples, 1)
    _checks.integer_between("batch_size", batch_size, 1)
    if batch_size > num_examples:
        raise ValueError(
            f"`batch_size` must be at most `num_examples`, {num_examples}, got "
            f"{batch_size}. Count examples, not batches; for a language model, tokens."
        )


def _precision_of(params):
    """The precision of noise that is as large as the parameters."""
    leaves = [x for x in jax.tree.leaves(params) if jnp.size(x)]
    squares = sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in leaves)
    count = sum(jnp.size(x) for x in leaves)
    return count / (MOST_NOISE**2 * squares) if squares else 0.0


def _check_mean(loss_fn, params, batch):
    """Warn of a loss that doubles with twice the batch."""
    _checks.function("loss_fn", loss_fn)
    _checks.arguments("batch", batch)
    for name, value in {"params": params, "batch": batch or None}.items():
        if value is None:
            raise ValueError(f"`{name}` must be given with `loss_fn`, got {value}.")
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    once, twice = (float(loss_fn(params, *x)) for x in (batch, twice))
    if not np.isfinite(once):
        warnings.warn(f"`loss_fn` is {once} of this batch.", stacklevel=3)
    elif once and twice / once > 1.5:
        warnings.warn(
            f"`loss_fn` must be a mean over examples, but is {once:.3g} of a batch and "
            f"{twice:.3g} of the same batch twice. Take its mean.",
            stacklevel=3,
        )
