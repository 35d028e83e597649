"""Check a training step from outside, by a dry run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _checks
from ._advice import FEWEST_EXAMPLES, Diagnosis, advice
from ._step import of_step


def check_step(
    step: Callable[..., Any],
    *args: Any,
    num_examples: int | None = None,
    num_steps: int | None = None,
) -> Diagnosis:
    r"""Take your training step some twenty times, and say what is wrong with it.

    It is called as you call it, and again with other keys, rows, weights and noise.
    What it does is read off what it returns; your arrays stay as they are, also where
    the step donates them. It compiles twice, once for a batch of twice the size.

    >>> import ivon_jax, jax, jax.numpy as jnp, optax
    >>> from ivon_jax import diagnostics
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> tx = ivon_jax.ivon(0.1, ess=800)
    >>> def step(params, opt_state, x, key):
    ...     theta = ivon_jax.sample(key, params, opt_state)
    ...     grads = jax.grad(lambda params: jnp.sum(jnp.tanh(x @ params)))(theta)
    ...     updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    ...     return optax.apply_updates(params, updates), opt_state
    >>> params = jnp.ones(4)
    >>> args = params, tx.init(params), x, jax.random.key(1)
    >>> [advice] = diagnostics.check_step(step, *args, num_examples=800).advice
    >>> print(advice[:60], "...")
    The gradient of a batch twice as large is 2 times as large: ...

    Args:
      step: a function that takes one step of training. Among what it returns are the
        new parameters and the new state of the optimizer, anywhere.
      *args: its arguments, in its order: anywhere in them the parameters, the
        optimizer's state, and whatever else it takes. Random keys are told by their
        dtype, a batch by the first axis that its arrays share. A train state or a
        carry with several of these is fine.
      num_examples: how many the training set has (tokens, for a language model).
      num_steps: T, the length of the whole run; None takes 1 / (1 - b2).

    Returns:
      A `Diagnosis`. Its numbers are those of the module's docstring, in host memory and
      float64: use a small model of the same code where that is too much. Of `evon`
      with a prior, and of an optimizer of your own, there are only a few.

    Raises:
      TypeError, ValueError: there are no parameters or no state in `args`, the step
        takes several steps at once, an argument is out of range, or what `step` raises.
    """
    if not callable(step):
        raise TypeError(
            f"`step` must be your training step, a function, got "
            f"{type(step).__name__}. Call `check_step(step, params, opt_state, ...)`."
        )
    for name, value in {"num_examples": num_examples, "num_steps": num_steps}.items():
        if value is not None:
            _checks.integer_between(name, value, 1)
    numbers, dry = of_step(step, args, num_steps)
    if num_examples is not None and dry.batch_size >= FEWEST_EXAMPLES:
        ess = np.mean([float(state.ess) for state in dry.states(dry.leaves)])
        numbers["ess"] = float(ess)
        numbers["ess_in_batches"] = float(ess * dry.batch_size / num_examples)
    return Diagnosis(numbers, advice(numbers))
