"""Which training examples does a network depend on? Finding wrong labels with IVON.

    python benchmarks/wrong_labels.py                 # half a minute of CPU time
    python benchmarks/wrong_labels.py --data mnist10k.npz --epochs 20     # the same

A small network learns digits, 5 % of them with a wrong label. At the end, each training
example's sensitivity is one product with IVON's variances, no second training (paper,
section 4.4.2, Fig. 6). Precision P and recall R are those of the wrong labels. Of nine
settings (learning rate by hess_init, on seed 100) the defaults have the least test
loss.

Toy size: `--epochs 2 --seeds 2 --hidden 16`
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from common import datasets, flags, networks, results, tables, training
from common.flags import Count, Fraction, Positive, Results, Seed

import ivon_jax
from ivon_jax import sensitivity

COLUMNS = "top 1 %: P", "top 5 %: P = R", "times random", "top 10 %: R"
DIGITS = dict.fromkeys((*COLUMNS, "accuracy %"), 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # an npz file with `images` (N, side, side), uint8, and `labels`
    flip: Annotated[float, flags.positive, flags.below_one] = 0.05  # of the labels
    hidden: Count = 128  # units in each of the two hidden layers
    epochs: Count = 100
    batch_size: Count = 50
    learning_rate: float = 0.3
    hess_init: Positive = 0.2
    b2: Fraction = 0.9997
    weight_decay: float = 1e-3
    seeds: Count = 3  # runs, each with a split, flips, weights and noise of its own
    seed: Seed = 0
    results: Results = "wrong_labels.json"


def train(cfg, keys, images, labels):
    """Train all runs at once, along the first axes; return their posteriors."""
    num_train = labels.shape[1]
    num_steps = cfg.epochs * (num_train // cfg.batch_size)
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(cfg.learning_rate, num_steps),
        ess=num_train,
        hess_init=cfg.hess_init,
        b2=cfg.b2,
        weight_decay=cfg.weight_decay,
    )
    sizes = images.shape[-1], cfg.hidden, cfg.hidden, 10

    def init(key):
        params = networks.init(key, sizes)
        return params, tx.init(params)

    def epoch(carry, key, *data):
        method, batch_size = training.gaussian(tx), cfg.batch_size
        return training.train_epoch(networks.loss, method, batch_size, carry, key, data)

    own_data = images, labels
    *_, last = training.train_runs("IVON", init, epoch, keys, cfg.epochs, (), own_data)
    return jax.vmap(ivon_jax.posterior)(*last)


def make_run(key, images, labels, flip):
    """Split off a fifth to test; give a share of the rest any other label as well."""
    split_key, flip_key, label_key = jax.random.split(key, 3)
    order = jax.random.permutation(split_key, len(labels))
    train, test = jnp.split(order, [4 * len(labels) // 5])
    flipped = jax.random.permutation(flip_key, len(train)) < round(flip * len(train))
    wrong = (labels[train] + jax.random.randint(label_key, train.shape, 1, 10)) % 10
    given = jnp.where(flipped, wrong, labels[train])
    return (images[train], labels[train], given), (images[test], labels[test])


@jax.jit
def examine(posteriors, images, labels):
    """Sensitivities, and losses at the mean, of each run's examples."""

    def of_run(run):
        q, images, labels = run
        sensitivities = sensitivity.sensitivities(networks.apply, q, images, labels)
        return sensitivities, networks.losses(q.mean, images, labels)

    return jax.lax.map(of_run, (posteriors, images, labels))


def share_of_top(ranking, flipped, num_top):
    """Percentage of flipped ones among those that each run ranks highest."""
    top = jnp.argsort(-ranking, axis=1)[:, :num_top]
    return 100 * jnp.take_along_axis(flipped, top, axis=1).mean(axis=1)


def table_rows(rankings, flipped):
    """Yield a record for each ranking: precision P and recall R in percent."""
    num_flipped, num_train = int(flipped[0].sum()), flipped.shape[1]
    for name, ranking in rankings.items():
        # Where as many are looked at as are wrong, precision and recall are the same.
        top, tenth = share_of_top(ranking, flipped, num_flipped), num_train // 10
        columns = (
            share_of_top(ranking, flipped, num_train // 100),
            top,
            top / 100 * num_train / num_flipped,
            share_of_top(ranking, flipped, tenth) * tenth / num_flipped,
        )
        yield tables.record({"ranked by": name}, COLUMNS, columns)


def main():
    """Train on some wrong labels; keep how many of them each ranking finds."""
    cfg = flags.parse(Config, __doc__)
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.seeds)
    data_keys, train_keys, random_keys = training.split_each(keys, 3)
    make_runs = jax.vmap(functools.partial(make_run, flip=cfg.flip), (0, None, None))
    images, labels = datasets.load_images(cfg.data)
    images = images.reshape(len(labels), -1)
    flags.check_batch_size(cfg.batch_size, 4 * len(labels) // 5)
    study = results.Study(cfg)
    train_data, (test_x, test_y) = make_runs(data_keys, images, labels)
    images, labels, given = train_data
    posteriors = train(cfg, train_keys, images, given)
    sensitivities, losses = examine(posteriors, images, given)
    rankings = {
        "sensitivity": sensitivities,
        "loss at the mean": losses,
        "random": jax.vmap(jax.random.uniform, (0, None))(random_keys, given.shape[1:]),
    }
    study.table("rankings", table_rows(rankings, given != labels), DIGITS)
    predicted = jax.vmap(networks.apply)(posteriors.mean, test_x).argmax(-1)
    accuracy = 100 * (predicted == test_y).mean(axis=1)
    study.table("test", [{"system": "IVON@mean", "accuracy %": accuracy}], DIGITS)


if __name__ == "__main__":
    main()
