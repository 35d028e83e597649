"""The paper's Table 7 in small: three Hessian estimators on handwritten digits.

    python benchmarks/estimators.py            # 5 min on two CPU cores
    python benchmarks/estimators.py --epochs 2 --seeds 1    # a look

One network, one schedule, and for every estimator the best of the same nine pairs of
learning rate and Hessian initialisation, by NLL on a third of the training half. Memory
is what the compiled training step needs besides its arguments, time that of a step
beside optax.adamw's in the same run. Prints the Markdown table of benchmarks/README.md.
"""

import dataclasses
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, networks, results
from common.flags import Count, Results
from common.scores import DIGITS, over_seeds, scores
from tqdm import tqdm

import ivon_jax

ESTIMATORS = ("squared_gradient", "gauss_newton", "reparameterization")
GRID = tuple(itertools.product((0.1, 0.3, 1.0), (0.1, 0.3, 1.0)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    epochs: Count = 400
    batch_size: Count = 50
    width: Count = 128
    b2: float = 0.9997  # averages the Hessian over half of the 6800 steps
    seeds: Count = 5
    tuning_seeds: Count = 2
    num_samples: Count = 64
    results: Results = "estimators.json"


def init(key, width):
    """Weights of two hidden layers, He's initialisation."""
    sizes = (64, width, width, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "w": jax.random.normal(k, (m, n)) * jnp.sqrt(2.0 / m),
            "b": jnp.zeros(n),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def make_step(tx, estimator):
    """A training step; without an estimator that of plain optax."""

    def step(carry, images, labels, key):
        params, opt_state = carry
        if estimator is None:
            grads = jax.grad(networks.loss)(params, images, labels)
            updates, opt_state = tx.update(grads, opt_state, params)
        else:
            grad_fn = ivon_jax.value_and_grad(networks.loss, hess_estimator=estimator)
            _, estimate = grad_fn(key, params, opt_state, images, labels)
            updates, opt_state = estimate.update(tx, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def make_ivon(config, learning_rate, hess_init, num_train):
    """IVON on a cosine schedule that ends at zero; its numbers may be tracers."""
    num_steps = config.epochs * (num_train // config.batch_size)
    schedule = optax.cosine_decay_schedule(1.0, num_steps)
    return ivon_jax.ivon(
        lambda count: learning_rate * schedule(count),
        ess=num_train,
        hess_init=hess_init,
        b2=config.b2,
    )


def trainer(config, estimator, train, test):
    """A compiled (key, learning rate, h_0) -> scores at the mean and with samples."""
    images, labels = train
    num_batches = len(labels) // config.batch_size

    def run(key, learning_rate, hess_init):
        init_key, train_key, predict_key = jax.random.split(key, 3)
        tx = make_ivon(config, learning_rate, hess_init, len(labels))
        step = make_step(tx, estimator)

        def epoch(carry, epoch_key):
            order_key, noise_key = jax.random.split(epoch_key)
            order = jax.random.permutation(order_key, len(labels))
            batches = order[: num_batches * config.batch_size].reshape(num_batches, -1)

            def body(carry, batch):
                indices, step_key = batch
                return step(carry, images[indices], labels[indices], step_key), None

            keys = jax.random.split(noise_key, num_batches)
            return jax.lax.scan(body, carry, (batches, keys))

        params = init(init_key, config.width)
        carry = params, tx.init(params)
        epoch_keys = jax.random.split(train_key, config.epochs)
        (params, opt_state), _ = jax.lax.scan(epoch, carry, epoch_keys)
        q = ivon_jax.posterior(params, opt_state)
        probs = ivon_jax.predict(
            lambda theta: jax.nn.softmax(networks.apply(theta, test[0])),
            q,
            predict_key,
            config.num_samples,
        )
        return scores(probs, test[1])

    return jax.jit(run)


def tuned(study, config, estimator, train, bar):
    """The (learning rate, h_0) of the lowest NLL on a third of the training half."""
    images, labels = train
    cut = 2 * len(labels) // 3
    run = trainer(
        config, estimator, (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    )
    losses = {}
    for pair in GRID:
        keys = jax.random.split(jax.random.key(1000), config.tuning_seeds)
        losses[pair] = np.mean([run(key, *pair)["NLL"] for key in keys])
        bar.update(config.tuning_seeds)
    settings = [dict(zip(("learning_rate", "hess_init"), p, strict=True)) for p in GRID]
    return GRID[study.trials(estimator, settings, [losses[pair] for pair in GRID])]


def cost(config, estimator, tx, train):
    """Temporary memory (bytes) and median time (s) of one compiled training step."""
    images, labels = (array[: config.batch_size] for array in train)
    params = init(jax.random.key(0), config.width)
    carry, key = (params, tx.init(params)), jax.random.key(1)
    step = jax.jit(make_step(tx, estimator))
    step = step.lower(carry, images, labels, key).compile()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        jax.block_until_ready(step(carry, images, labels, key))
        times.append(time.perf_counter() - start)
    return step.memory_analysis().temp_size_in_bytes, statistics.median(times)


def main():
    """Tune, train and measure."""
    config = flags.parse(Config, __doc__)
    study = results.Study(config)

    train, test = datasets.load_halves()

    _, adamw_time = cost(config, None, optax.adamw(1e-3), train)
    total = len(ESTIMATORS) * (len(GRID) * config.tuning_seeds + config.seeds)
    lines = []
    with tqdm(total=total, unit="run", leave=False) as bar:
        for estimator in ESTIMATORS:
            bar.set_description(estimator)
            pair = tuned(study, config, estimator, train, bar)
            run = trainer(config, estimator, train, test)
            runs = []
            for key in jax.random.split(jax.random.key(0), config.seeds):
                runs.append(run(key, *pair))
                bar.update()
            tx = make_ivon(config, *pair, len(train[1]))
            lines.append(
                (
                    estimator,
                    pair,
                    runs,
                    *cost(config, estimator, tx, train),
                )
            )

    rows = []
    for estimator, (learning_rate, hess_init), runs, memory, seconds in lines:
        row = {"h_hat": estimator, "learning rate": learning_rate, "h_0": hess_init}
        row |= over_seeds(runs) | {"memory, MiB": memory / 2**20}
        rows.append(row | {"time / AdamW": seconds / adamw_time})
    study.table("test", rows, DIGITS | {"memory, MiB": 2, "time / AdamW": 1})


if __name__ == "__main__":
    main()
