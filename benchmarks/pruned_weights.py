"""How much of a network can go? Pruning by IVON's uncertainty, beside magnitude.

    python benchmarks/pruned_weights.py            # 60 s of CPU time
    python benchmarks/pruned_weights.py --data mnist.npz

Networks learn half of the digits, and lose weights without further training: those
of the smallest magnitude, signal-to-noise ratio (mean over standard deviation), or
those whose posterior is widest. They are tested on the other half. Settings are those
of 16 each with the best NLL of the whole network, over three folds of the training
images.

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses

import jax
import numpy as np
import optax
from common import datasets, flags, networks, results, tables, training
from common.flags import Count, Positive, Results, Seed

import ivon_jax
from ivon_jax import metrics, pruning

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # .npz with `images` and `labels`; empty for scikit-learn's digits
    hidden: Count = 128  # units in each of the two hidden layers
    epochs: Count = 400
    batch_size: Count = 50
    adamw_learning_rate: float = 1e-3
    adamw_weight_decay: float = 1.0
    sgd_learning_rate: float = 0.3
    sgd_weight_decay: float = 3e-3
    ivon_learning_rate: float = 1.0
    ivon_hess_init: Positive = 1.0
    ivon_weight_decay: float = 1e-3
    seeds: Count = 5  # runs, each with initial weights, batches and draws of its own
    seed: Seed = 0
    results: Results = "pruned_weights.json"


def make_methods(cfg, num_train):
    """Each method's (tx, draw)."""
    steps = cfg.epochs * (num_train // cfg.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(cfg.adamw_learning_rate, steps),
        weight_decay=cfg.adamw_weight_decay,
    )
    sgd = optax.chain(
        optax.add_decayed_weights(cfg.sgd_weight_decay),
        optax.sgd(
            optax.cosine_decay_schedule(cfg.sgd_learning_rate, steps), momentum=0.9
        ),
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(cfg.ivon_learning_rate, steps),
        ess=num_train,
        hess_init=cfg.ivon_hess_init,
        b2=1 - 1 / steps,
        weight_decay=cfg.ivon_weight_decay,
    )
    points = {"AdamW": training.point_mass(adamw), "SGD": training.point_mass(sgd)}
    return points | {"IVON": training.gaussian(ivon)}


@jax.jit
def pruning_curves(adamw, sgd, posteriors, images, labels):
    """Accuracy and NLL at every sparsity, (runs, sparsities) each, for each curve."""

    def evaluate(params):
        probs = jax.nn.softmax(networks.apply(params, images))
        nll = metrics.negative_log_likelihood(probs, labels)
        return 100 * metrics.accuracy(probs, labels), nll

    def by_magnitude(q, sparsity):
        return pruning.mask(jax.tree.map(abs, q.mean), sparsity)

    def one_run(adamw, sgd, q):
        points = [ivon_jax.Posterior.isotropic(params, 1.0) for params in (adamw, sgd)]
        curves = {
            "AdamW, magnitude": (points[0], by_magnitude),
            "SGD, magnitude": (points[1], by_magnitude),
            "IVON, variance": (q, pruning.by_variance),
            "IVON, magnitude": (q, by_magnitude),
            "IVON, signal/noise": (q, pruning.by_signal_to_noise),
        }
        return {
            name: pruning.curve(evaluate, q, SPARSITIES, criterion)
            for name, (q, criterion) in curves.items()
        }

    return jax.vmap(one_run)(adamw, sgd, posteriors)


def main():
    """Train all three; keep what is left of them at every sparsity."""
    cfg = flags.parse(Config, __doc__)
    data, test = datasets.load_halves(cfg.data)
    flags.check_batch_size(cfg.batch_size, len(data[1]))
    study = results.Study(cfg)
    # The same keys for all: the same first weights, the same order of the images.
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.seeds)
    sizes = data[0].shape[1], cfg.hidden, cfg.hidden, 10
    carries = {
        name: training.train_networks(name, method, sizes, keys, data, cfg)
        for name, method in make_methods(cfg, len(data[1])).items()
    }
    posteriors = jax.vmap(ivon_jax.posterior)(*carries["IVON"])
    points = carries["AdamW"][0], carries["SGD"][0]
    curves = pruning_curves(*points, posteriors, *test)
    for i, (title, digits) in enumerate({"accuracy %": 1, "NLL": 2}.items()):
        columns = [f"{sparsity:.0%}" for sparsity in SPARSITIES]
        rows = [
            tables.record({"pruned by": name}, columns, np.asarray(curves[name][i]).T)
            for name in sorted(curves)
        ]
        study.table(title, rows, dict.fromkeys(columns, digits))


if __name__ == "__main__":
    main()
