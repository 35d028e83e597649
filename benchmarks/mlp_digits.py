"""Handwritten digits with AdamW and with IVON: which of the two knows when it errs?

    python benchmarks/mlp_digits.py           # 25 s on two CPU cores
    python benchmarks/mlp_digits.py --tune    # 3 min: the trials behind the defaults

A small network learns 898 digits and is tested on 899 others. Each optimizer has the
best of 20 settings, by accuracy on a third of the training half after all 400 epochs:
learning rate by weight decay for AdamW, by Hessian initialisation for IVON, then b2 for
both. IVON@mean predicts with the posterior's mean, IVON with 64 samples of it.

The settings of `--adamw_lr 1e-3 --adamw_weight_decay 0.3 --adamw_b2 0.9999 --ivon_b2
0.9997` are the best by validation NLL. IVON takes longer here because the gradients of
so small a network cost less than the noise of a sample. Shuffled digits are those whose
pixels are in an order of its own for each image: the same ink, and no digit.

Toy size: `--epochs 2 --seeds 1`
"""

import collections
import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, results
from common.flags import Count, Fraction, Positive, Results
from common.scores import DIGITS, over_seeds, scores
from flax import nnx
from tqdm import tqdm

import ivon_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    epochs: Count = 400
    batch_size: Count = 50
    seeds: Count = 3
    adamw_lr: float = 3e-3
    adamw_weight_decay: float = 0.1
    adamw_b2: Fraction = 0.999
    ivon_lr: float = 1.0
    ivon_hess_init: Positive = 0.3
    ivon_b2: Fraction = 0.9999  # averages the Hessian over more than the 6800 steps
    num_samples: Count = 64
    results: Results = "mlp_digits.json"


SURE = "% of shuffled digits, over 90 % sure"


class Network(nnx.Module):
    """Two hidden layers of 128 units."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.last = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        """Map images, (N, 64), to the logits of the ten digits, (N, 10)."""
        hidden = nnx.relu(self.first(images))
        return self.last(nnx.relu(self.second(hidden)))


def optimizers(config, num_train):
    """Return AdamW and IVON, both on a cosine schedule that ends at zero."""
    num_steps = config.epochs * (num_train // config.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(config.adamw_lr, num_steps),
        b2=config.adamw_b2,
        weight_decay=config.adamw_weight_decay,
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(config.ivon_lr, num_steps),
        ess=num_train,
        hess_init=config.ivon_hess_init,
        b2=config.ivon_b2,
    )
    return adamw, ivon


def loss_fn(params, graphdef, batch):
    """Mean cross-entropy of a batch."""
    images, labels = batch
    logits = nnx.merge(graphdef, params)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def adamw_step(tx, params, opt_state, graphdef, batch, key):
    """Take a step, with any optax optimizer."""
    del key  # AdamW draws nothing
    loss, grads = jax.value_and_grad(loss_fn)(params, graphdef, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def ivon_step(tx, params, opt_state, graphdef, batch, key):
    """Take a step with IVON: the gradient is that of a sample from the posterior."""
    theta = ivon_jax.sample(key, params, opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(theta, graphdef, batch)
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state, loss


@functools.partial(jax.jit, static_argnames=("step", "tx", "batch_size"))
def train_epoch(key, params, opt_state, graphdef, data, *, step, tx, batch_size):
    """Shuffle the data and take a step on each batch, all in one compiled loop."""
    order_key, noise_key = jax.random.split(key)
    num_batches = len(data[1]) // batch_size
    order = jax.random.permutation(order_key, len(data[1]))
    batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)

    def body(carry, batch_and_key):
        indices, step_key = batch_and_key
        batch = jax.tree.map(lambda array: array[indices], data)
        params, opt_state, loss = step(tx, *carry, graphdef, batch, step_key)
        return (params, opt_state), loss

    step_keys = jax.random.split(noise_key, num_batches)
    carry, losses = jax.lax.scan(body, (params, opt_state), (batches, step_keys))
    return *carry, losses.mean()


def fit(key, step, tx, data, config, bar):
    """Train a new network; return (graphdef, params, opt_state, seconds)."""
    init_key, *epoch_keys = jax.random.split(key, 1 + config.epochs)
    graphdef, params = nnx.split(Network(nnx.Rngs(init_key)), nnx.Param)
    opt_state = tx.init(params)
    epoch = functools.partial(
        train_epoch, data=data, step=step, tx=tx, batch_size=config.batch_size
    )
    # Compile off the clock. Nothing of this call is kept, so its key may come again.
    jax.block_until_ready(epoch(epoch_keys[0], params, opt_state, graphdef))
    bar.set_description(step.__name__)
    start = time.perf_counter()
    for epoch_key in epoch_keys:
        params, opt_state, loss = epoch(epoch_key, params, opt_state, graphdef)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
    return graphdef, params, opt_state, time.perf_counter() - start


@jax.jit
def class_probs(params, graphdef, images):
    """Class probabilities (N, 10) of one network."""
    return jax.nn.softmax(nnx.merge(graphdef, params)(images))


@functools.partial(jax.jit, static_argnames="num_samples")
def sampled_probs(key, posterior, graphdef, images, num_samples):
    """Class probabilities (N, 10), averaged over networks drawn from the posterior."""

    def fn(theta):
        return class_probs(theta, graphdef, images)

    return ivon_jax.predict(fn, posterior, key, num_samples)


def compare(config, data, images):
    """Train both on every seed; return {row: [(probabilities, seconds), ...]}."""
    adamw, ivon = optimizers(config, len(data[1]))
    rows = collections.defaultdict(list)
    with tqdm(total=2 * config.seeds * config.epochs, unit="epoch", leave=False) as bar:
        for seed in range(config.seeds):
            # One key for both: the same first weights, the same order of the images.
            fit_key, predict_key = jax.random.split(jax.random.key(seed))

            trained = fit(fit_key, adamw_step, adamw, data, config, bar)
            graphdef, params, _, seconds = trained
            rows["AdamW"].append((class_probs(params, graphdef, images), seconds))

            trained = fit(fit_key, ivon_step, ivon, data, config, bar)
            graphdef, params, opt_state, seconds = trained
            q = ivon_jax.posterior(params, opt_state)
            probs = class_probs(q.mean, graphdef, images)
            rows["IVON@mean"].append((probs, seconds))
            probs = sampled_probs(predict_key, q, graphdef, images, config.num_samples)
            rows["IVON"].append((probs, seconds))
    return rows


def table_rows(rows, labels):
    """Yield a record of each system's seeds."""
    for name, runs in rows.items():
        records = []
        for probs, seconds in runs:
            digits, shuffled = jnp.split(probs, 2)
            sure = 100 * jnp.mean(shuffled.max(-1) > 0.9)
            records.append(scores(digits, labels) | {"seconds": seconds, SURE: sure})
        yield {"system": name, **over_seeds(records)}


def tune(config, data, study):
    """Try 20 settings of each on the last third of the training half."""
    adamw, ivon = ("adamw_lr", "adamw_weight_decay"), ("ivon_lr", "ivon_hess_init")
    grid = itertools.product((3e-4, 1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0, 3.0))
    trials = [dict(zip(adamw, values, strict=True)) for values in grid]
    grid = itertools.product((0.1, 0.3, 1.0, 3.0), (0.1, 0.3, 1.0, 3.0))
    for trial, values in zip(trials, grid, strict=True):
        trial.update(zip(ivon, values, strict=True))
    adamw_b2s = (0.999, 0.9, 0.99, 0.9999, 0.99999)
    ivon_b2s = (0.9997, 0.999, 0.9995, 0.9999, 0.99999)
    pairs = zip(adamw_b2s, ivon_b2s, strict=True)
    b2s = [{"adamw_b2": first, "ivon_b2": second} for first, second in pairs]
    log = []
    config = best_of(dataclasses.replace(config, **b2s[0]), data, trials, log)
    print(best_of(config, data, b2s, log))
    study.table("trials", log, DIGITS)


def best_of(config, data, trials, log):
    """Return `config` with the trial of the best validation accuracy for each."""
    images, labels = data
    cut = 2 * len(labels) // 3
    best = {"AdamW": 0.0, "IVON": 0.0}
    winner = config
    for trial in trials:
        candidate = dataclasses.replace(config, **trial)
        rows = compare(candidate, (images[:cut], labels[:cut]), images[cut:])
        for name in best:
            knobs = {k: v for k, v in trial.items() if k.startswith(name.lower())}
            seeds = over_seeds([scores(probs, labels[cut:]) for probs, _ in rows[name]])
            accuracy, nll = (float(np.mean(seeds[k])) for k in ("accuracy %", "NLL"))
            log.append({"system": name, **knobs, "accuracy %": accuracy, "NLL": nll})
            if accuracy > best[name]:
                best[name] = accuracy
                winner = dataclasses.replace(winner, **knobs)
    return winner


def shuffle_pixels(key, images):
    """Give each image an order of its own: the same ink, and no digit."""
    keys = jax.random.split(key, len(images))
    return jax.vmap(jax.random.permutation)(keys, images)


def main():
    """Train and keep the table; or tune."""
    config, tuning = flags.parse_or_tune(Config, __doc__)
    train_data, (images, labels) = datasets.load_halves()
    num_train = len(train_data[1])
    flags.check_batch_size(
        config.batch_size, 2 * num_train // 3 if tuning else num_train
    )
    study = results.Study(config)
    if tuning:
        tune(config, train_data, study)
        return
    non_digits = shuffle_pixels(jax.random.key(config.seeds), images)
    rows = compare(config, train_data, jnp.concatenate([images, non_digits]))
    study.table("test", table_rows(rows, labels), DIGITS | {SURE: 1})


if __name__ == "__main__":
    main()
