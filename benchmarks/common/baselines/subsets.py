"""Train runs that each have some of the examples, and labels of their own.

One program for any number of examples: a batch is drawn with replacement from those
that a run has, for `Problem.steps` steps, and their number is a hyperparameter.
"""

import dataclasses

import jax
import jax.numpy as jnp

CHECKS = 20  # of the held-out loss, in a run


def with_size(system):
    """Make the number of training examples a hyperparameter of `system`."""

    def of_size(problem, size, **setting):
        size = jnp.asarray(size, float)
        return system(dataclasses.replace(problem, num_data=size), **setting)

    return of_size


def fit_subsets(
    system, problem, keys, settings, inputs, rows, labels, held_out=None, runs_at_once=0
):
    """Return the states of all runs, of a system `with_size`.

    Args:
      system: a function of a problem and a setting.
      problem: what to learn; its `steps` are those of a run.
      keys: (R,), one for each run.
      settings: {name: (R,)}; "size" says how many of its examples a run has.
      inputs: (M, ...), of all examples.
      rows: (R, N), which of them a run has, in an order of its own.
      labels: (R, N), what it is told of them.
      held_out: inputs and targets; a run's state is then the one of the least loss
        there, of 20 in equal distance.
      runs_at_once: 0 for all.
    """

    def one_run(run):
        return train(system, problem, *run, inputs, held_out)

    size = runs_at_once or len(keys)
    map_runs = jax.jit(lambda runs: jax.lax.map(one_run, runs, batch_size=size))
    return map_runs((keys, settings, rows, labels))


def train(system, problem, key, setting, rows, labels, inputs, held_out=None):
    """Return the state after a run, or its best one."""
    init_key, steps_key = jax.random.split(key)
    run = system(problem, **setting)

    def step(state, key):
        batch_key, noise_key = jax.random.split(key)
        batch = jax.random.randint(batch_key, (problem.batch_size,), 0, setting["size"])
        return run.step(noise_key, state, inputs[rows[batch]], labels[batch]), None

    def stage(carry, keys):
        state, (least, best) = carry
        state, _ = jax.lax.scan(step, state, keys)
        if held_out is None:
            return (state, (least, state)), None
        x, y = held_out
        loss = problem.loss(run.outputs(keys[0], state, x), y).mean()
        kept = jax.tree.map(lambda a, b: jnp.where(loss < least, a, b), state, best)
        return (state, (jnp.fmin(loss, least), kept)), None

    state = run.init(problem.init(init_key))
    stages = CHECKS if held_out else 1
    keys = jax.random.split(steps_key, (stages, problem.steps // stages))
    (_, (_, best)), _ = jax.lax.scan(stage, (state, (jnp.inf, state)), keys)
    return best
