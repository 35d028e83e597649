"""Merge five fine-tuned networks into one by IVON's Hessian, which costs nothing.

    python benchmarks/merged_networks.py            # 45 s of CPU time

One network learns plain digits, then copies of it are fine-tuned on digits that are
turned, shifted, blurred and inverted, and merged (paper, section 4.3.2 and Table 5).
Scales are chosen on validation images. "Passes" are those over a data set besides
training: IVON's Hessians are there when it ends, the squared-gradient Fisher (SG) takes
another pass over each task's data and the base's.

Toy size: `--pretrain_steps 30 --steps 30 --seeds 1`
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flags, networks, results, tables, training
from common.flags import Count, Positive, Results
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    hidden: Count = 128  # units in each of the two hidden layers
    batch_size: Count = 50
    pretrain_steps: Count = 2000
    steps: Count = 1000  # of fine-tuning, for each task
    learning_rate: float = 0.1
    hess_init: Positive = 0.03
    ess_factor: Positive = 10.0  # ess / number of examples, which are few
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


@functools.partial(jax.jit, static_argnames=("num_steps", "config"))
def train(key, params, images, labels, num_steps, config):
    """Train with IVON; return the parameters, and the Hessian by IVON and by SG."""
    num_train, (step_key, label_key) = len(labels), jax.random.split(key)
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(config.learning_rate, num_steps),
        ess=config.ess_factor * num_train,
        hess_init=config.hess_init,
        b2=1 - config.forget / num_steps,
        weight_decay=config.weight_decay,
    )

    method, carry = training.gaussian(tx), (params, tx.init(params))
    step_keys, data = jax.random.split(step_key, num_steps), (images, labels)
    params, opt_state = training.random_steps(
        method, config.batch_size, carry, step_keys, data
    )
    [state] = ivon_jax.find_states(opt_state)
    # `h` is a mean over examples, and its noise may take it a little below zero.
    hess = jax.tree.map(lambda h: num_train * jnp.maximum(h, 0), state.hess)
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


def run(key, config, splits, bar):
    """Return each method's test accuracies, (5,); of a merger, what `merge` returns."""
    (images, labels), validation, test = splits
    init_key, pretrain_key, finetune_key = jax.random.split(key, 3)
    params = networks.init(init_key, (64, config.hidden, config.hidden, 10))
    steps = config.pretrain_steps
    base, *base_hessians = train(pretrain_key, params, images[0], labels, steps, config)
    finetuned, ivon, squares = [], [], []
    for domain in images[1:]:
        steps = config.steps
        params, hess, square = train(finetune_key, base, domain, labels, steps, config)
        finetuned.append(params)
        ivon.append(hess)
        squares.append(square)
        bar.update()

    # All Hessians are zero at pixels that are never inked, but for the prior's.
    prior = config.weight_decay * len(labels)
    ivon_0, squares_0 = jax.tree.map(lambda h: h + prior, base_hessians)
    merged = functools.partial(merge, validation, test, base, finetuned)
    on_all = jnp.stack([accuracies(params, test) for params in finetuned])
    return {
        "base": accuracies(base, test),
        "fine-tuned, all tasks": on_all.mean(0),
        "fine-tuned, own task": jnp.diagonal(on_all),
        "task arithmetic": merged(None, None),
        "SG": merged(squares, squares_0),
        "IVON, h0 by SG": merged(ivon, squares_0),
        "IVON": merged(ivon, ivon_0),
    }


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
    total = config.seeds * len(DOMAINS)
    with tqdm(total=total, unit="network", leave=False) as bar:
        for seed in range(config.seeds):
            for name, values in run(jax.random.key(seed), config, splits, bar).items():
                runs[name].append(np.asarray(values))
    runs = {name: np.stack(seeds) for name, seeds in runs.items()}
    digits = dict.fromkeys((*DOMAINS, "average", "scale"), 1)
    study.table("accuracy %", table_rows(runs), digits)
    averages = {name: runs[name][:, :, 1].mean(-1) for name in MERGERS}
    study.curves("average accuracy % by scale", {"scale": SCALES} | averages)


if __name__ == "__main__":
    main()
