"""Five tasks, one after the other: yesterday's posterior is today's prior.

    python benchmarks/task_sequence.py               # two minutes of CPU time
    python benchmarks/task_sequence.py --tune EWC    # with trials of its settings
    python benchmarks/task_sequence.py --data mnist.npz

Each task permutes the pixels of the digits in an order of its own; when it is over its
images are gone.

"First prior" fine-tunes with the weak prior around zero; "isotropic" stays near
yesterday's mean, all weights alike; "posterior" is sequential Bayes. "EWC" has Adam,
and after each task a penalty around its weights, by the Fisher information of all tasks
so far (Kirkpatrick et al., 2017; summed as by Huszár, 2018). "Joint" has all tasks at
once. Precision grows from task to task, as Bayes' rule says. Each method's setting is
the one of 16 trials, points of a Sobol sequence, with the best accuracy at the end on
held-out training images, over two seeds.

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import baselines, datasets, flags, networks, results, tables, training
from common.flags import Count, Positive, Results
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import ivon_jax
from ivon_jax import merging

NUM_TASKS = 5
COLUMNS = (
    *("all five, at the end", "each, when learned"),
    *("first, when learned", "first, at the end"),
)
CURVE = 5  # epochs between two points of the curves that are kept


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # an npz with `images` and `labels`; empty: scikit-learn's digits
    hidden: Count = 128  # units in each of the two hidden layers
    batch_size: Count = 50
    epochs: Count = 50  # on each task
    tune: str = ""  # whose settings to choose anew: names, with ";", or "all"
    trials: Count = 16  # of each method
    tuning_seeds: Count = 2
    forget: Positive = 3.0  # in the end, exp(-3) of hess_init is left in h
    weight_decay: float = 1e-4  # the first prior's precision / number of examples
    seeds: Count = 5  # runs, each with permutations of its own
    results: Results = "task_sequence.json"


def load_data(path):
    """Return (images, labels) to train on and, a fifth of them, to test on."""
    images, labels = datasets.load_images(path)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(len(labels), -1)[order], labels[order]
    cut = 4 * len(labels) // 5
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def permute_pixels(key, images):
    """Return each task's images, (5, N, pixels): the pixels in an order of its own."""
    keys = jax.random.split(key, NUM_TASKS)
    return jnp.stack([jax.random.permutation(k, images, axis=1) for k in keys])


def accuracies(params, images, labels):
    """Accuracy in percent on each task, (5,)."""
    return 100 * jnp.mean(networks.apply(params, images).argmax(-1) == labels, axis=-1)


def ivon(prior, num_train, num_steps, config, learning_rate, hess_init, **_):
    """Return IVON with this prior, and how it draws theta."""
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(learning_rate, num_steps),
        ess=num_train,  # of this task: what was learned before is in the prior
        hess_init=hess_init,
        b2=1 - config.forget / num_steps,
        prior=prior,
    )
    return training.gaussian(tx)


def adamw(_prior, _num_train, num_steps, _config, learning_rate, weight_decay):
    """Return AdamW, which has no prior."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return training.point_mass(optax.adamw(schedule, weight_decay=weight_decay))


def ewc(prior, num_train, num_steps, _config, learning_rate, strength):
    """Return Adam, with the gradient of the prior, a penalty."""
    del strength  # it is in the prior
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)

    def penalise(grads, params):
        pull = prior.precision_times(prior.deviation(params))
        return jax.tree.map(lambda g, x: g + x / num_train, grads, pull)

    return training.point_mass(
        optax.chain(optax.stateless(penalise), optax.adam(schedule))
    )


def fisher_prior(prior, carry, task, key, strength, **_):
    """Return the penalty after a task: around its weights, by all Fishers so far."""
    params, _ = carry
    fisher = merging.diagonal_fisher(
        networks.apply, params, key, task[0], chunk_size=100
    )
    precision = jax.tree.map(lambda p, f: p + strength * f, prior.precision, fisher)
    return ivon_jax.Posterior(params, precision)


class Method(NamedTuple):
    """How to learn a task, and what the next one begins with."""

    optimizer: Callable  # prior, num_train, num_steps, config, **setting -> tx, draw
    setting: dict  # the best trial
    ranges: dict
    next_prior: Callable = lambda prior, *_, **__: prior


IVON = {"learning_rate": (0.01, 3.0), "hess_init": (0.01, 3.0)}
METHODS = {
    "AdamW": Method(
        adamw,
        {"learning_rate": 1e-4, "weight_decay": 0.1},
        {"learning_rate": (3e-5, 1e-2), "weight_decay": (0.01, 10.0)},
    ),
    "EWC": Method(
        ewc,
        {"learning_rate": 0.00961319, "strength": 103.789},
        {"learning_rate": (3e-4, 3e-2), "strength": (1.0, 1e5)},
        fisher_prior,
    ),
    "IVON, first prior": Method(ivon, {"learning_rate": 0.01, "hess_init": 1.0}, IVON),
    "IVON, isotropic": Method(
        ivon,
        # The precision around yesterday's mean is divided by the number of examples.
        {"learning_rate": 0.3, "hess_init": 0.3, "precision": 0.03},
        IVON | {"precision": (0.003, 0.3)},
        lambda _, carry, task, _key, precision, **__: ivon_jax.Posterior.isotropic(
            carry[0], precision * len(task[1])
        ),
    ),
    "IVON, posterior": Method(
        ivon,
        {"learning_rate": 0.3, "hess_init": 0.1},
        IVON,
        lambda _, carry, *__, **___: ivon_jax.posterior(*carry),
    ),
    "IVON, joint": Method(ivon, {"learning_rate": 0.3, "hess_init": 0.3}, IVON),
}


@functools.partial(jax.jit, static_argnames=("name", "config"))
def learn(key, params, prior, setting, task, tests, name, config):
    """Train on a task; return parameters, the next prior, accuracies on all."""
    num_train, (fisher_key, step_key) = len(task[1]), jax.random.split(key)
    num_batches = num_train // config.batch_size
    num_steps = config.epochs * num_batches
    method = METHODS[name]
    optimizer = method.optimizer(prior, num_train, num_steps, config, **setting)

    def epoch(carry, step_keys):
        carry = training.random_steps(
            optimizer, config.batch_size, carry, step_keys, task
        )
        return carry, accuracies(carry[0], *tests)

    keys = jax.random.split(step_key, (config.epochs, num_batches))
    carry = params, optimizer[0].init(params)
    carry, curve = jax.lax.scan(epoch, carry, keys)
    next_prior = method.next_prior(prior, carry, task, fisher_key, **setting)
    return carry[0], next_prior, curve


def run(key, name, setting, config, train, test):
    """Return a method's accuracies in percent, (epochs, tasks), and mean precisions."""
    init_key, order_key, *keys = jax.random.split(key, 2 + NUM_TASKS)
    tests = permute_pixels(order_key, test[0]), test[1]
    images, labels = permute_pixels(order_key, train[0]), train[1]
    num_train, num_pixels = train[0].shape
    params = networks.init(init_key, (num_pixels, config.hidden, config.hidden, 10))
    zeros = jax.tree.map(jnp.zeros_like, params)
    prior = ivon_jax.Posterior.isotropic(zeros, config.weight_decay * num_train)
    everything = [(images.reshape(-1, num_pixels), jnp.tile(labels, NUM_TASKS))]
    in_sequence = [(x, labels) for x in images]
    parts, precisions = [], []
    tasks = everything if name == "IVON, joint" else in_sequence
    for task_key, task in zip(keys, tasks, strict=False):
        params, prior, curve = learn(
            task_key, params, prior, setting, task, tests, name, config
        )
        parts.append(curve)
        precisions.append(ravel_pytree(prior.precision)[0].mean())
    return np.concatenate(parts), np.stack(precisions)


def tune(study, name, config, train, bar):
    """Return the trial with the best accuracy at the end, on a fifth of `train`."""
    values = baselines.trials(METHODS[name].ranges, config.trials)
    settings = baselines.one_by_one(values)
    cut = 4 * len(train[1]) // 5
    parts = [tuple(a[part] for a in train) for part in np.s_[:cut, cut:]]
    errors = []
    for setting in settings:
        ends = []
        for seed in range(config.tuning_seeds):
            curve, _ = run(jax.random.key(1000 + seed), name, setting, config, *parts)
            ends.append(curve[-1].mean())
            bar.update()
        errors.append(100 - np.mean(ends))
    return settings[study.trials(name, settings, errors, "validation error %")]


def table_rows(curves, epochs):
    """Yield accuracies on test images after all tasks, and when each was learned."""
    for name, seeds in curves.items():  # (seeds, tasks * epochs, tasks)
        end = seeds[:, -1]
        learned = seeds[:, epochs - 1 :: epochs].diagonal(axis1=1, axis2=2)
        learned = end if name == "IVON, joint" else learned
        columns = end.mean(1), learned.mean(1), learned[:, 0], end[:, 0]
        yield tables.record({"system": name}, COLUMNS, columns)


def main():
    """Go through the tasks on every seed; keep what is forgotten."""
    config = flags.parse(Config, __doc__)
    train, test = load_data(config.data)
    tuned = METHODS if config.tune == "all" else config.tune.split(";")
    if config.tune and not set(tuned) <= set(METHODS):
        sys.exit(f"`--tune` must be of {'; '.join(METHODS)}, got {config.tune!r}.")
    num_train = 4 * len(train[1]) // 5 if config.tune else len(train[1])
    flags.check_batch_size(config.batch_size, num_train)
    num_steps = config.epochs * (num_train // config.batch_size)
    flags.check_forget(config.forget, num_steps)
    study, curves, precisions = results.Study(config), {}, {}
    trials = config.trials * config.tuning_seeds * sum(n in tuned for n in METHODS)
    total = len(METHODS) * config.seeds + trials
    with tqdm(total=total, unit="run", leave=False) as bar:
        for name, method in METHODS.items():
            setting = method.setting
            if name in tuned:
                setting = tune(study, name, config, train, bar)
            runs = []
            for seed in range(config.seeds):
                runs.append(
                    run(jax.random.key(seed), name, setting, config, train, test)
                )
                bar.update()
            curves[name], precisions[name] = map(np.stack, zip(*runs, strict=True))
    study.table(
        "accuracy %", table_rows(curves, config.epochs), dict.fromkeys(COLUMNS, 1)
    )
    after = [
        {"task": 1 + task, "mean precision": seeds}
        for task, seeds in enumerate(precisions["IVON, posterior"].T)
    ]
    study.table("IVON, posterior", after, {"mean precision": 0})
    means = {name: c.mean(0)[CURVE - 1 :: CURVE] for name, c in curves.items()}
    study.curves(f"mean accuracy %, every {CURVE} epochs", means)


if __name__ == "__main__":
    main()
