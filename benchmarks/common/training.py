"""The training loop of the studies: IVON, or any optimizer at the parameters alone."""

import jax
import optax
from tqdm import tqdm

import ivon_jax
from common import networks


def point_mass(tx):
    """Return (tx, draw) of an optimizer without a posterior: each draw is the same."""
    tx = optax.with_extra_args_support(tx)  # ignores `sample=`
    return tx, lambda _key, params, _opt_state: params


def gaussian(tx):
    """Return (tx, draw) of IVON."""
    return tx, ivon_jax.sample


def take_step(loss_fn, tx, draw, carry, batch, key):
    """Take a step; `draw` says at which weights the gradient is taken."""
    params, opt_state = carry
    theta = draw(key, params, opt_state)
    grads = jax.grad(loss_fn)(theta, *batch)
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


def train_epoch(loss_fn, method, batch_size, carry, key, data):
    """Take a step on each batch of the shuffled data."""
    order_key, draw_key = jax.random.split(key)
    count = len(jax.tree.leaves(data)[0])
    num_batches = count // batch_size
    order = jax.random.permutation(order_key, count)
    batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)

    def step(carry, rows_and_key):
        rows, step_key = rows_and_key
        batch = jax.tree.map(lambda array: array[rows], data)
        return take_step(loss_fn, *method, carry, batch, step_key), None

    draw_keys = jax.random.split(draw_key, num_batches)
    return jax.lax.scan(step, carry, (batches, draw_keys))[0]


def random_steps(method, batch_size, carry, keys, data):
    """Train a small network, for each key on a batch drawn with replacement."""

    def step(carry, key):
        batch_key, draw_key = jax.random.split(key)
        rows = jax.random.randint(batch_key, (batch_size,), 0, len(data[1]))
        batch = jax.tree.map(lambda array: array[rows], data)
        return take_step(networks.loss, *method, carry, batch, draw_key), None

    return jax.lax.scan(step, carry, keys)[0]


def split_each(keys, count):
    """Split the key of each run: (count, runs) keys."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def train_runs(name, init, epoch, keys, num_epochs, shared_data=(), own_data=()):
    """Yield (params, opt_state) of all runs, stacked, after each epoch.

    `init(key)` is the first one; ``epoch(carry, key, *data)`` takes an epoch, on data
    that all runs share and on those of each run alone.
    """
    init_keys, *epoch_keys = split_each(keys, 1 + num_epochs)
    carry = jax.jit(jax.vmap(init))(init_keys)
    axes = 0, 0, *(None for _ in shared_data), *(0 for _ in own_data)
    epochs = jax.jit(jax.vmap(epoch, in_axes=axes))
    for key in tqdm(epoch_keys, desc=name, unit="epoch", leave=False):
        carry = jax.block_until_ready(epochs(carry, key, *shared_data, *own_data))
        yield carry


def train_networks(name, method, sizes, keys, data, config):
    """Return (params, opt_state) of a small network for each key, stacked."""

    def init(key):
        params = networks.init(key, sizes)
        return params, method[0].init(params)

    def epoch(carry, key, *data):
        batch_size = config.batch_size
        return train_epoch(networks.loss, method, batch_size, carry, key, data)

    *_, last = train_runs(name, init, epoch, keys, config.epochs, data)
    return last
