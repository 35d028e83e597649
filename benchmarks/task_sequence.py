"""Five tasks, one after the other: yesterday's posterior is today's prior.

    python benchmarks/task_sequence.py            # 75 s of CPU time
    python benchmarks/task_sequence.py --data mnist.npz

Each task permutes the pixels of the digits in an order of its own; when it is over its
images are gone.

"First prior" fine-tunes with the weak prior around zero; "isotropic" stays near
yesterday's mean, all weights alike; "posterior" is sequential Bayes. "Joint" has all
tasks at once. Precision grows from task to task, as Bayes' rule says. Learning rates,
Hessians and the isotropic precision were chosen for accuracy at the end on held-out
training images (15 trials for AdamW, 14 to 19 for IVON, two seeds).

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, networks, results, tables, training
from common.flags import Count, Positive, Results
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import ivon_jax

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
    adamw_learning_rate: float = 1e-4
    adamw_weight_decay: float = 0.1
    first_learning_rate: float = 0.01
    first_hess_init: Positive = 1.0
    isotropic_learning_rate: float = 0.3
    isotropic_hess_init: Positive = 0.3
    isotropic_precision: Positive = 0.03  # around yesterday's mean / number of examples
    posterior_learning_rate: float = 0.3
    posterior_hess_init: Positive = 0.1
    joint_learning_rate: float = 0.3
    joint_hess_init: Positive = 0.3
    forget: Positive = 3.0  # in the end, exp(-3) of hess_init is left in h
    weight_decay: float = 1e-4  # the first prior's precision / number of examples
    seeds: Count = 3  # runs, each with permutations of its own
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


def optimizer(prior, learning_rate, knob, num_train, config):
    """Return an optimizer and how it draws theta: IVON, or AdamW without a prior.

    `knob` is IVON's `hess_init` or AdamW's `weight_decay`.
    """
    num_steps = config.epochs * (num_train // config.batch_size)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    if prior is None:
        return training.point_mass(optax.adamw(schedule, weight_decay=knob))
    ivon = ivon_jax.ivon(
        schedule,
        ess=num_train,  # of this task: what was learned before is in the prior
        hess_init=knob,
        b2=1 - config.forget / num_steps,
        prior=prior,
    )
    return training.gaussian(ivon)


@functools.partial(jax.jit, static_argnames="config")
def learn(key, params, prior, knobs, images, labels, tests, config):
    """Train on a task; return (params, opt_state), each epoch's accuracies on all."""
    num_train = len(labels)
    method = optimizer(prior, *knobs, num_train, config)

    def epoch(carry, step_keys):
        data = images, labels
        carry = training.random_steps(method, config.batch_size, carry, step_keys, data)
        return carry, accuracies(carry[0], *tests)

    keys = jax.random.split(key, (config.epochs, num_train // config.batch_size))
    return jax.lax.scan(epoch, (params, method[0].init(params)), keys)


def make_methods(config, first, num_train):
    """Return each method's knobs, and how it makes a prior of yesterday's posterior."""
    precision = config.isotropic_precision * num_train
    return {
        "AdamW": ((config.adamw_learning_rate, config.adamw_weight_decay), None),
        "IVON, first prior": (
            (config.first_learning_rate, config.first_hess_init),
            lambda _: first,
        ),
        "IVON, isotropic": (
            (config.isotropic_learning_rate, config.isotropic_hess_init),
            lambda q: ivon_jax.Posterior.isotropic(q.mean, precision),
        ),
        "IVON, posterior": (
            (config.posterior_learning_rate, config.posterior_hess_init),
            lambda q: q,
        ),
        "IVON, joint": ((config.joint_learning_rate, config.joint_hess_init), None),
    }


def run(key, config, train, test, bar):
    """Return each method's accuracies in percent, (epochs, tasks), and precisions."""
    init_key, order_key, *keys = jax.random.split(key, 2 + NUM_TASKS)
    tests = permute_pixels(order_key, test[0]), test[1]
    images, labels = permute_pixels(order_key, train[0]), train[1]
    num_train, num_pixels = train[0].shape
    start = networks.init(init_key, (num_pixels, config.hidden, config.hidden, 10))
    zeros = jax.tree.map(jnp.zeros_like, start)
    first = ivon_jax.Posterior.isotropic(zeros, config.weight_decay * num_train)
    everything = [(images.reshape(-1, num_pixels), jnp.tile(labels, NUM_TASKS))]
    in_sequence = [(x, labels) for x in images]
    curves, precisions = {}, []
    for name, (knobs, make_prior) in make_methods(config, first, num_train).items():
        params, prior, parts = start, None if name == "AdamW" else first, []
        tasks = everything if name == "IVON, joint" else in_sequence
        for task_key, task in zip(keys, tasks, strict=False):
            carry, curve = learn(task_key, params, prior, knobs, *task, tests, config)
            params, _ = carry
            parts.append(curve)
            if make_prior:
                q = ivon_jax.posterior(*carry)
                prior = make_prior(q)
            if name == "IVON, posterior":
                precisions.append(ravel_pytree(q.precision)[0].mean())
            bar.update()
        curves[name] = np.concatenate(parts)
    return curves, np.stack(precisions)


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
    data = load_data(config.data)
    flags.check_batch_size(config.batch_size, len(data[0][1]))
    num_steps = config.epochs * (len(data[0][1]) // config.batch_size)
    flags.check_forget(config.forget, num_steps)
    study, runs = results.Study(config), []
    total = config.seeds * (4 * NUM_TASKS + 1)
    with tqdm(total=total, unit="task", leave=False) as bar:
        for seed in range(config.seeds):
            runs.append(run(jax.random.key(seed), config, *data, bar))
    curves, precisions = zip(*runs, strict=True)
    curves = {name: np.stack([c[name] for c in curves]) for name in curves[0]}
    study.table(
        "accuracy %", table_rows(curves, config.epochs), dict.fromkeys(COLUMNS, 1)
    )
    after = [
        {"task": 1 + task, "mean precision": seeds}
        for task, seeds in enumerate(np.transpose(precisions))
    ]
    study.table("IVON, posterior", after, {"mean precision": 0})
    means = {name: c.mean(0)[CURVE - 1 :: CURVE] for name, c in curves.items()}
    study.curves(f"mean accuracy %, every {CURVE} epochs", means)


if __name__ == "__main__":
    main()
