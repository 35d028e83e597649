"""Better settings than the recommended ones, from a few short runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._distributions.gaussian import Posterior
from ._optimizer.posterior import posterior as posterior_of, sample
from ._optimizer.transform import ivon

SEARCH = {  # factors of the first settings, in which a tuned run often lies
    "learning_rate": (0.3, 3.0),
    "hess_init": (0.1, 10.0),
    "ess": (0.3, 3.0),
    "weight_decay": (0.03, 3.0),
}


def tune(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    data: tuple[Any, ...],
    score: Callable[[Posterior, jax.Array], jax.Array],
    key: jax.Array,
    *,
    settings: Mapping[str, Any],
    num_steps: int,
    batch_size: int,
    num_trials: int = 16,
    num_rungs: int = 3,
    search: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    r"""Return the settings of the best of some runs, all trained at once.

    The first run has `settings` as they are, so that the result is no worse by `score`;
    the others multiply them by factors from a Latin hypercube, uniform in the
    logarithm. All have the same first weights, batches and noise, and train side by
    side under ``jax.vmap``: for models that fit into memory `num_trials` times. It
    compiles once for each rung.
    By successive halving, the better half goes on at each rung: with three, all
    runs take a quarter of the steps, half of them go on to a half, a quarter of them to
    the end. With 16 trials this costs 8 runs.

    >>> def loss_fn(theta, x, y):
    ...     return jnp.mean((x @ theta - y) ** 2)
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = x @ jnp.ones(3)
    >>> best = tune(
    ...     loss_fn,
    ...     jnp.zeros(3),
    ...     (x, y),
    ...     lambda posterior, key: loss_fn(posterior.sample(key), x, y),
    ...     jax.random.key(1),
    ...     settings={"learning_rate": 1e-4, "ess": 64},
    ...     search={"learning_rate": (1.0, 1e3)},
    ...     num_steps=80,
    ...     batch_size=16,
    ... )
    >>> print(best["ess"], best["learning_rate"] > 1e-3)
    64 True

    Args:
      loss_fn: ``loss_fn(theta, *batch)``, the mean loss per example.
      params: the first weights of all runs.
      data: a tuple of pytrees, whose arrays have the N training examples in front.
        Batches are drawn from it at random, with replacement.
      score: ``score(posterior, key)``, lower is better. On held-out data, for one,
        ``negative_log_likelihood(predict(probs, posterior, key, 16, (x,)), y)``;
        without, ``sensitivity.leave_one_out_loss(fn, posterior, x, y)``. The key is the
        same for all runs.
      key: a JAX random key, for batches, noise and factors.
      settings: arguments of `ivon`, such as `recommended` gives. A learning rate may be
        a schedule, whose values are multiplied. `ess` must be N, or what it stands for.
      num_steps: of a whole run, and of the schedule in `settings`.
      batch_size: examples in a batch.
      num_trials: the number of runs.
      num_rungs: how often the runs are compared, at the end the last time. One lets
        all runs go to the end.
      search: for the names of some `settings`, the least and the largest factor. None
        is `SEARCH`, as far as `settings` has its names.

    Returns:
      Arguments of `ivon`: `settings`, with the best factors.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range, or no
        run has a finite score.

    References:
      Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
      Optimization, AISTATS 2016.
    """
    _checks.function("loss_fn", loss_fn)
    _checks.function("score", score)
    num_examples = _num_examples(data)
    _checks.integer_between("num_steps", num_steps, 1)
    _checks.integer_between("batch_size", batch_size, 1, num_examples)
    _checks.integer_between("num_trials", num_trials, 2)
    _checks.integer_between("num_rungs", num_rungs, 1, num_trials.bit_length())
    if search is None:
        search = {name: SEARCH[name] for name in SEARCH if name in settings}
    _check_search(search, settings)
    key = _checks.random_key("key", key)
    factors_key, run_key, score_key = jax.random.split(key, 3)
    start, advance = _training(loss_fn, params, settings, run_key, batch_size)

    @jax.jit
    @jax.vmap
    def scores_of(run):
        return _one_score(score(posterior_of(*run), score_key))

    factors = _latin_hypercube(factors_key, search, num_trials)
    runs, parts = start(factors), 2 ** (num_rungs + 2)
    rungs = [parts // 2**i for i in range(num_rungs)]
    stops = [num_steps * i // parts for i in range(parts + 1)]
    for i in _with_bar(range(1, parts + 1)):
        runs = jax.block_until_ready(
            advance(factors, runs, data, *stops[i - 1 : i + 1])
        )
        if i in rungs:
            better = _better_half(np.asarray(scores_of(runs)))
            factors, runs = jax.tree.map(lambda x, b=better: x[b], (factors, runs))
    return _scaled(settings, {name: float(x[0]) for name, x in factors.items()})


def _training(loss_fn, params, settings, key, batch_size):
    """Return `start` and `advance` of runs, one for each row of their factors."""

    def optimizer(factors):
        return ivon(**_scaled(settings, factors))

    def start(factors):
        return params, optimizer(factors).init(params)

    def advance(factors, run, data, first, last):
        tx = optimizer(factors)

        def step(i, run):
            params, opt_state = run
            rows_key, draw_key = jax.random.split(jax.random.fold_in(key, i))
            rows = jax.random.randint(rows_key, (batch_size,), 0, _num_examples(data))
            batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
            theta = sample(draw_key, params, opt_state)
            grads = jax.grad(loss_fn)(theta, *batch)
            updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(first, last, step, run)

    over_runs = jax.vmap(advance, in_axes=(0, 0, None, None, None))
    return jax.jit(jax.vmap(start)), jax.jit(over_runs, donate_argnums=1)


def _scaled(settings, factors):
    """`settings` times `factors`; of a schedule, all its values."""

    def scaled(value, factor):
        if callable(value):
            return lambda count: factor * value(count)
        return factor * value

    changed = {name: scaled(settings[name], x) for name, x in factors.items()}
    return {**settings, **changed}


def _latin_hypercube(key, search, count):
    """Factors of `count` runs: each name's are in as many strata; the first are one."""
    factors = {}
    for name, (low, high) in search.items():
        key, order_key, place_key = jax.random.split(key, 3)
        strata = jax.random.permutation(order_key, jnp.arange(count, dtype=float))
        place = (strata + jax.random.uniform(place_key, (count,))) / count
        factors[name] = (low * (high / low) ** place).at[0].set(1.0)
    return factors


def _better_half(scores):
    """Indices of the lowest scores, the lowest first."""
    order = np.argsort(np.where(np.isfinite(scores), scores, np.inf))
    if not np.isfinite(scores[order[0]]):
        raise ValueError(
            f"`score` must be finite for one run at least, got {scores}. Lower the "
            "learning rate in `settings`, or raise its hess_init."
        )
    return order[: math.ceil(len(order) / 2)]


def _one_score(value):
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            "`score` must return a real scalar, got shape "
            f"{jnp.shape(value)} and dtype {jnp.result_type(value)}."
        )
    return value


def _num_examples(data):
    """The length of the first axes of all arrays."""
    _checks.arguments("data", data)
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(data)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "`data` must have arrays of one length, the number of examples, got first "
            f"axes {sorted(lengths)}."
        )
    return lengths.pop()[0]


def _check_search(search, settings):
    for name, bounds in search.items():
        if name not in settings:
            raise ValueError(
                f"`search` must name some of `settings`, got {name!r}, where these are "
                f"{sorted(settings)}."
            )
        low, high = (_checks.positive(f"search[{name!r}]", x) for x in bounds)
        if not low < high:
            raise ValueError(
                f"`search[{name!r}]` must be (low, high), got {tuple(bounds)}."
            )


def _with_bar(parts):
    """The same, with a progress bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return parts
    return tqdm(parts, desc="tune", leave=False)
