"""The numbers of a run, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._arrays import compiled
from .._optimizer.posterior import mean, posterior, prior
from .._optimizer.state import find_states
from . import _measure, _samples
from ._advice import FEWEST_EXAMPLES, Diagnosis, advice


def diagnose(
    params: optax.Params, opt_state: optax.OptState, **options: Any
) -> Diagnosis:
    """Measure a run and say what is wrong with it, if anything.

    >>> import ivon_jax
    >>> params = jnp.ones(8)
    >>> opt_state = ivon_jax.ivon(0.1, ess=0.1, hess_init=1.0).init(params)
    >>> diagnose(params, opt_state, num_steps=50_000).advice
    ['The noise is 3.2 times the weights: raise ess or hess_init.']

    Args:
      params: the posterior mean.
      opt_state: any optax state with IVON in it.
      **options: those of `measure`, which also says what it raises.

    Returns:
      A `Diagnosis`: the numbers of `measure` as Python floats, and their `advice`.
    """
    numbers = measure(params, opt_state, **options)
    return Diagnosis({k: float(v) for k, v in numbers.items()}, advice(numbers))


def measure(
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    hess_init: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    b1: jax.typing.ArrayLike | None = None,
    clip_radius: jax.typing.ArrayLike | None = None,
    num_steps: int | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    loss_fn: Callable[[optax.Params], jax.Array] | None = None,
    fn: Callable[[optax.Params], jax.Array] | None = None,
    labels: jax.Array | None = None,
    key: jax.Array | None = None,
    num_samples: int = 8,
) -> dict[str, jax.Array]:
    """Measure the numbers above: scalars for a logger, in the default float dtype.

    It compiles once for one program, also outside of ``jax.jit``. Medians take a few
    dozen passes over h, without a sort; a `loss_fn` takes `num_samples` gradients, one
    after the other.

    >>> import ivon_jax
    >>> params = jnp.ones(8)
    >>> opt_state = ivon_jax.ivon(0.1, ess=100, hess_init=0.9).init(params)
    >>> numbers = measure(params, opt_state)
    >>> print(numbers["num_params"], numbers["hess_median"])
    8.0 0.9

    Args:
      params: the posterior mean, or a sample where `sampled` made it one.
      opt_state: any optax state with IVON in it. If it has several IVON states, each is
        measured with its own settings. A state of another optimizer gives the numbers
        that it has the fields of `ivon_jax.IVONState` for.
      hess_init: what to measure with in the place of the state's own, as with `b2`,
        `b1` and `clip_radius`. None takes what was given to `ivon`.
      b2: see `hess_init`.
      b1: see `hess_init`.
      clip_radius: see `hess_init`. Where there is none, ``clipped`` is left out.
      num_steps: T, the length of the whole run; None takes the steps until now.
      num_examples: how many examples the training set has (tokens, for a language
        model), with `batch_size`; None leaves out what needs it.
      batch_size: how many a batch has.
      loss_fn: ``loss_fn(theta)``, the mean loss per example of some batch, a scalar;
        None leaves out what needs it.
      fn: ``fn(theta)``, the probabilities of the classes of held-out examples, (N, C),
        with `labels`; None leaves out what needs them.
      labels: which classes these have, integers, (N,).
      key: a JAX random key, for `loss_fn` and `fn`.
      num_samples: how many samples to evaluate them at, two or more.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range, or there
        is no IVON state, or nothing that it trains.
    """
    given = _settings(hess_init, b2, b1, clip_radius)
    if num_steps is not None:
        _checks.integer_between("num_steps", num_steps, 1)
    functions = {"loss_fn": loss_fn, "fn": fn}
    for name, function in functions.items():
        if function is not None:
            _checks.function(name, function)
            _checks.integer_between("num_samples", num_samples, 2)
            _check_key(name, key)
            key = _checks.random_key("key", key)
    _check_pair({"fn": fn, "labels": labels})
    _check_pair({"num_examples": num_examples, "batch_size": batch_size})
    for name, value in {"num_examples": num_examples, "batch_size": batch_size}.items():
        if value is not None:
            _checks.integer_between(name, value, 1)

    def run(params, opt_state, key):
        params = mean(params, opt_state)
        q, p = posterior(params, opt_state), prior(params, opt_state)
        states = find_states(opt_state)
        groups = [_measure.group(params, state, given) for state in states]
        groups = [g for g in groups if g.arrays]
        _check_some_entries(groups)
        numbers = _measure.of_weights(groups) | {"kl_divergence": q.kl_divergence(p)}
        if all(g.has_average for g in groups):
            numbers |= _measure.of_hess(groups, num_steps)
        if all(g.has_clip for g in groups):
            numbers["clipped"] = _measure.clipped_share(groups)
        if num_examples is not None and batch_size >= FEWEST_EXAMPLES:
            numbers["ess_in_batches"] = numbers["ess"] * (batch_size / num_examples)
        keys = None if key is None else jax.random.split(key, num_samples)
        if loss_fn is not None:
            at = _in_dtypes(p.mean, params)
            numbers |= _samples.of_loss(groups, params, at, opt_state, loss_fn, keys)
        if fn is not None:
            numbers |= _samples.of_predictions(fn, labels, params, opt_state, keys)
        return {name: jnp.asarray(value, float) for name, value in numbers.items()}

    return compiled.call(run, params, opt_state, key, of=loss_fn or fn or measure)


def _in_dtypes(tree, params):
    """A tree in the dtypes of the parameters."""
    return jax.tree.map(lambda x, p: jnp.asarray(x, jnp.result_type(p)), tree, params)


def _check_pair(arguments):
    """Raise if only one of two arguments is given."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) == 1:
        [missing] = arguments.keys() - set(given)
        raise ValueError(f"`{missing}` must be given with `{given[0]}`, got None.")


def _settings(hess_init, b2, b1, clip_radius):
    """The settings that are given, by their names in a state."""
    given = {}
    if hess_init is not None:
        given["hess_init"] = _checks.positive("hess_init", hess_init)
    if b2 is not None:
        given["one_minus_b2"] = 1.0 - _checks.number("b2", b2, _checks.DECAY_RATE)
    if b1 is not None:
        given["b1"] = _checks.number("b1", b1, _checks.DECAY_RATE)
    if clip_radius is not None:
        given["clip_radius"] = _checks.positive("clip_radius", clip_radius)
    return given


def _check_some_entries(groups):
    """Raise if IVON trains none of the parameters."""
    if not groups:
        raise ValueError(
            "`params` must have an entry that IVON trains, got none: its arrays are "
            "empty, or all left out with `optax.masked`."
        )


def _check_key(name, key):
    """Raise if samples lack a random key."""
    if key is None:
        raise ValueError(
            f"`key` must be a JAX random key where `{name}` is given, got None. Pass "
            "`key=jax.random.key(0)`, a new one for each call."
        )
