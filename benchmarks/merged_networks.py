"""Merge five fine-tuned networks into one by IVON's Hessian, which costs nothing.

    python benchmarks/merged_networks.py             # a minute of CPU time
    python benchmarks/merged_networks.py --tune 1    # six: the trials, too

One network learns plain digits, then copies of it are fine-tuned on digits that are
turned, shifted, blurred and inverted, and merged (paper, section 4.3.2 and Table 5).
Scales are chosen on validation images. "Passes" are those over a data set besides
training: IVON's Hessians are there when it ends, the squared-gradient Fisher (SG) takes
another pass over each task's data and the base's. "SGD:" are networks that SGD trained,
from the base on. IVON and SGD each have the best of 16 trials, points of a Sobol
sequence, by validation accuracy of the merged network, with Hessians of its own or SG.

Toy size: `--pretrain_steps 30 --steps 30 --seeds 1`
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import baselines, flags, networks, results, tables, training
from common.flags import Count, Positive, Results, Switch
from scipy import ndimage
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax
from ivon_jax import merging

DOMAINS = {  # what each task does to images, (N, 8, 8)
    "turned left": lambda images: turned(images, 25),
    "turned right": lambda images: turned(images, -25),
    "shifted": lambda images: ndimage.shift(images, (0, 0, 1), order=0),
    "blurred": lambda images: ndimage.gaussian_filter(images, (0, 1, 1)),
    "inverted": lambda images: 1 - images,
}
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)
# Passes over a data set besides training.
MERGERS = {"task arithmetic": 0, "SG": 6, "IVON, h0 by SG": 1, "IVON": 0}
MERGERS |= {"SGD: task arithmetic": 0, "SGD: SG": 6}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    hidden: Count = 128  # units in each of the two hidden layers
    batch_size: Count = 50
    pretrain_steps: Count = 2000
    steps: Count = 1000  # of fine-tuning, for each task
    tune: Switch = 0  # 1: choose the settings anew
    trials: Count = 16  # of each optimizer
    tuning_seeds: Count = 2
    forget: Positive = 3.0  # in the end, exp(-3) of hess_init is left in h
    weight_decay: float = 1e-4
    seeds: Count = 5
    results: Results = "merged_networks.json"


def turned(images, degrees):
    """Turn each image, to the left where `degrees` is positive."""
    return ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1)


def load_splits():
    """Return (images (6, N, 64), labels (N,)) to train, validate and test on.

    The first images are plain digits, the others those of the five domains.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    plain, labels = digits.images[order] / 16, digits.target[order]
    images = np.stack([plain, *(change(plain) for change in DOMAINS.values())])
    images = jnp.asarray(images.reshape(*images.shape[:2], 64), jnp.float32)
    labels, cuts = jnp.asarray(labels, jnp.int32), (900, 1200)
    splits = jnp.split(images, cuts, axis=1), jnp.split(labels, cuts)
    return list(zip(*splits, strict=True))


def ivon(num_train, num_steps, config, learning_rate, hess_init, ess_factor):
    """Return IVON, and how it draws theta."""
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(learning_rate, num_steps),
        ess=ess_factor * num_train,
        hess_init=hess_init,
        b2=1 - config.forget / num_steps,
        weight_decay=config.weight_decay,
    )
    return training.gaussian(tx)


def sgd(_num_train, num_steps, config, learning_rate):
    """Return SGD with momentum, and the same prior."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return training.point_mass(baselines.heavy_ball(schedule, config.weight_decay))


class Optimizer(NamedTuple):
    """How to train, and the merger by which its trials are judged."""

    make: Callable  # num_train, num_steps, config, **setting -> tx, draw
    setting: dict  # the best trial
    ranges: dict
    merger: str


OPTIMIZERS = {
    "IVON": Optimizer(
        ivon,
        {"learning_rate": 0.0177689, "hess_init": 0.0587766, "ess_factor": 3.67299},
        {
            "learning_rate": (0.01, 1.0),
            "hess_init": (0.003, 0.3),
            "ess_factor": (1.0, 100.0),  # ess / number of examples, which are few
        },
        "IVON",
    ),
    "SGD": Optimizer(
        sgd, {"learning_rate": 0.033103}, {"learning_rate": (1e-3, 0.3)}, "SGD: SG"
    ),
}


@functools.partial(jax.jit, static_argnames=("name", "num_steps", "config"))
def train(key, params, images, labels, setting, name, num_steps, config):
    """Train; return the parameters, and the Hessian by IVON (or none) and by SG."""
    num_train, (step_key, label_key) = len(labels), jax.random.split(key)
    method = OPTIMIZERS[name].make(num_train, num_steps, config, **setting)
    carry = params, method[0].init(params)
    step_keys, data = jax.random.split(step_key, num_steps), (images, labels)
    params, opt_state = training.random_steps(
        method, config.batch_size, carry, step_keys, data
    )
    # `h` is a mean over examples, and its noise may take it a little below zero.
    hess = [
        jax.tree.map(lambda h: num_train * jnp.maximum(h, 0), state.hess)
        for state in ivon_jax.find_states(opt_state)
    ]
    # SG needs another pass over the data.
    squares = merging.diagonal_fisher(
        networks.apply, params, label_key, images, chunk_size=100
    )
    return params, hess, squares


@jax.jit
def accuracies(params, split):
    """Accuracy in percent on each of the five domains, (5,)."""
    images, labels = split
    predicted = networks.apply(params, images[1:]).argmax(-1)
    return 100 * jnp.mean(predicted == labels, axis=-1)


@jax.jit
def merge(validation, test, base, finetuned, hessians, base_hessian):
    """Merge at each scale; return validation and test accuracies, (12, 2, 5)."""

    def at(scale):
        if hessians is None:
            merged = merging.task_arithmetic(base, finetuned, scale)
        else:
            merged = merging.merge(base, finetuned, hessians, base_hessian, scale=scale)
        return jnp.stack([accuracies(merged, split) for split in (validation, test)])

    return jax.lax.map(at, jnp.array(SCALES))


def run(key, name, setting, config, splits):
    """Return each method's test accuracies, (5,); of a merger, what `merge` returns."""
    (images, labels), validation, test = splits
    init_key, pretrain_key, finetune_key = jax.random.split(key, 3)
    params = networks.init(init_key, (64, config.hidden, config.hidden, 10))
    rest = labels, setting, name

    steps = config.pretrain_steps
    base, *base_hessians = train(pretrain_key, params, images[0], *rest, steps, config)
    finetuned, hessians, squares = [], [], []
    for domain in images[1:]:
        params, hess, square = train(
            finetune_key, base, domain, *rest, config.steps, config
        )
        finetuned.append(params)
        hessians += hess
        squares.append(square)

    # All Hessians are zero at pixels that are never inked, but for the prior's.
    prior = config.weight_decay * len(labels)
    own_0, squares_0 = jax.tree.map(lambda h: h + prior, base_hessians)
    merged = functools.partial(merge, validation, test, base, finetuned)
    on_all = jnp.stack([accuracies(params, test) for params in finetuned])
    methods = {
        "base": accuracies(base, test),
        "fine-tuned, all tasks": on_all.mean(0),
        "fine-tuned, own task": jnp.diagonal(on_all),
        "task arithmetic": merged(None, None),
        "SG": merged(squares, squares_0),
    }
    if name == "SGD":
        return {f"SGD: {method}": values for method, values in methods.items()}
    by_ivon = merged(hessians, squares_0), merged(hessians, *own_0)
    return methods | dict(zip(("IVON, h0 by SG", "IVON"), by_ivon, strict=True))


def tune(study, name, config, splits, bar):
    """Return the trial whose merged networks are the best on validation images."""
    values = baselines.trials(OPTIMIZERS[name].ranges, config.trials)
    settings = baselines.one_by_one(values)
    errors = []
    for setting in settings:
        found = []
        for seed in range(config.tuning_seeds):
            merged = run(jax.random.key(1000 + seed), name, setting, config, splits)
            found.append(merged[OPTIMIZERS[name].merger][:, 0].mean(-1).max())
            bar.update()
        errors.append(100 - np.mean(found))
    return settings[study.trials(name, settings, errors, "validation error %")]


def at_best_scales(runs):
    """Return each seed's best scale by validation, and its test accuracies there."""
    best = runs[:, :, 0].mean(-1).argmax(1)
    return np.array(SCALES)[best], runs[np.arange(len(best)), best, 1]


def table_rows(runs):
    """Yield each method's test accuracies, and a merger's scales."""
    for name, values in runs.items():
        scales = None
        if name in MERGERS:
            scales, values = at_best_scales(values)
        row = tables.record({"system": name}, DOMAINS, values.T)
        yield row | {
            "average": values.mean(-1),
            "passes": MERGERS.get(name),
            "scale": scales,
        }


def main():
    """Train and merge on every seed."""
    config, splits = flags.parse(Config, __doc__), load_splits()
    flags.check_forget(config.forget, min(config.pretrain_steps, config.steps))
    study, runs = results.Study(config), collections.defaultdict(list)
    trials = config.tune * config.trials * config.tuning_seeds
    total = len(OPTIMIZERS) * (config.seeds + trials)
    with tqdm(total=total, unit="run", leave=False) as bar:
        for name, optimizer in OPTIMIZERS.items():
            setting = optimizer.setting
            if config.tune:
                setting = tune(study, name, config, splits, bar)
            for seed in range(config.seeds):
                key = jax.random.key(seed)
                for row, values in run(key, name, setting, config, splits).items():
                    runs[row].append(np.asarray(values))
                bar.update()
    runs = {name: np.stack(seeds) for name, seeds in runs.items()}
    digits = dict.fromkeys((*DOMAINS, "average", "scale"), 1)
    study.table("accuracy %", table_rows(runs), digits)
    averages = {name: runs[name][:, :, 1].mean(-1) for name in MERGERS}
    study.curves("average accuracy % by scale", {"scale": SCALES} | averages)


if __name__ == "__main__":
    main()
