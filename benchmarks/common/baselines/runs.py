"""Train many runs of a system side by side, and predict with them."""

import operator
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


class Fitted(NamedTuple):
    """The states of all runs, with a leading axis, and the time of one."""

    state: Any
    seconds: float  # of the steps of one run, at the pace of its fastest epoch


def run_functions(system, problem):
    """Return the pure functions that one run consists of."""
    num_batches = problem.num_data // problem.batch_size

    def start(key, setting):
        return system(problem, **setting).init(problem.init(key))

    def shuffle(key, epoch):
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, problem.num_data)
        order = order[: num_batches * problem.batch_size].reshape(num_batches, -1)
        return order, jax.random.split(noise_key, num_batches)

    def steps(state, setting, batches_and_keys, data):
        step = system(problem, **setting).step

        def body(state, batch_and_key):
            batch, key = batch_and_key
            x, y = (array[batch] for array in data)
            if problem.augment:
                key, augment_key = jax.random.split(key)
                x = problem.augment(augment_key, x)
            return step(key, state, x, y), None

        if problem.steps_per_call == 1:
            return body(state, jax.tree.map(lambda a: a[0], batches_and_keys))[0]
        return jax.lax.scan(body, state, batches_and_keys)[0]

    def finish(state, setting, data):
        return system(problem, **setting).finish(state, *data)

    return start, shuffle, steps, finish


def fit(system, problem, keys, settings, data, description="", own_data=False):
    """Train a run for each of `keys` and of the `settings`, trees with that axis.

    With `own_data` the data have it, too.
    """
    axis = 0 if own_data else None
    start, shuffle, steps, finish = run_functions(system, problem)
    num_batches = problem.num_data // problem.batch_size
    chunk = problem.steps_per_call or num_batches
    group = problem.runs_at_once or len(keys)
    side_by_side = jax.vmap if group > 1 else alone
    start = jax.jit(side_by_side(start, 0))
    shuffle = jax.jit(side_by_side(shuffle, (0, None)))
    steps = jax.jit(side_by_side(steps, (0, 0, 0, axis)), donate_argnums=0)
    finish = jax.jit(side_by_side(finish, (0, 0, axis)))
    states, seconds = [], []
    for first in range(0, len(keys), group):
        some_of = operator.itemgetter(np.s_[first : first + group])
        some = jax.tree.map(some_of, settings)
        its_data = jax.tree.map(some_of, data) if own_data else data
        init_keys, epoch_keys = jax.vmap(jax.random.split, out_axes=1)(some_of(keys))
        state = start(init_keys, some)
        for epoch in tqdm(range(problem.epochs), desc=description, leave=False):
            begin = time.perf_counter()
            batches, step_keys = shuffle(epoch_keys, epoch)
            for i in range(0, num_batches, chunk):
                part = batches[:, i : i + chunk], step_keys[:, i : i + chunk]
                state = steps(state, some, part, its_data)
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - begin) / len(epoch_keys))
        states.append(finish(state, some, its_data))
    state = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *states)
    return Fitted(state, min(seconds) * problem.epochs)


def alone(fn, in_axes):
    """As `jax.vmap` of a single run, where a condition skips what it leaves out."""

    def call(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        args = (
            arg if axis is None else jax.tree.map(lambda x: x[0], arg)
            for arg, axis in zip(args, axes, strict=True)
        )
        return jax.tree.map(lambda x: x[None], fn(*args))

    return call


def draws(system, problem, states, keys, settings, x, num_samples):
    """Return outputs (runs, num_samples, N, C), each at a draw of its own."""

    def one_run(run):
        key, state, setting = run
        outputs = system(problem, **setting).outputs
        draw_keys = jax.random.split(key, num_samples)
        return jax.lax.map(lambda k: outputs(k, state, x), draw_keys)

    group = problem.runs_at_once or len(keys)
    map_runs = jax.jit(lambda runs: jax.lax.map(one_run, runs, batch_size=group))
    return map_runs((keys, states, settings))


def predict(*args):
    """Return class probabilities (runs, N, C), the mean over `draws`."""
    return jax.jit(lambda x: jax.nn.softmax(x).mean(axis=1))(draws(*args))
