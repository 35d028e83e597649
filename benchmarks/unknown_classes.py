r"""Digits of classes that it never saw: does the network notice? IVON beside AdamW.

    python benchmarks/unknown_classes.py                          # 45 s of CPU time
    python benchmarks/unknown_classes.py --data mnist.npz --epochs 40 \
        --adamw_learning_rate 1e-2 --adamw_weight_decay 1 \
        --ivon_learning_rate 1 --ivon_hess_init 0.3 --ivon_weight_decay 1e-3

Networks learn the digits 0 to 6 of half of the images; 7, 8 and 9 of the other half
are out of domain (the paper's Table 3 and Fig. 3, in small). Images with a confident
prediction, or one of low entropy, are taken to be in domain. Settings are those of 16
each with the best NLL in cross-validation.

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses
import functools
import math
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, networks, results, training
from common.flags import Count, Positive, Results, Seed
from jax.scipy.special import entr

import ivon_jax
from ivon_jax import metrics, predictive

DETECTION = {  # the columns of the paper's Table 3
    "FPR@95": "fpr_at_95_tpr",
    "det. err.": "detection_error",
    "AUROC": "auroc",
    "AUPR-in": "aupr_in",
    "AUPR-out": "aupr_out",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # .npz with `images` and `labels`; empty for scikit-learn's digits
    num_known: Annotated[int, flags.between(1, 9)] = 7  # 0 to 6 are in domain
    hidden: Count = 128  # units in each of the two hidden layers
    epochs: Count = 400
    batch_size: Count = 50
    adamw_learning_rate: float = 1e-3
    adamw_weight_decay: float = 0.3
    ivon_learning_rate: float = 0.3
    ivon_hess_init: Positive = 3.0
    ivon_weight_decay: float = 1e-4
    num_samples: Count = 64  # draws of theta for a prediction
    seeds: Count = 5  # runs, each with initial weights, batches and draws of its own
    seed: Seed = 0
    results: Results = "unknown_classes.json"


def load_data(path, num_known):
    """Return (images, labels) to train on, the same to test on, and unknown images."""
    (images, labels), (x, y) = datasets.load_halves(path)
    inside, outside = y < num_known, y >= num_known
    if not (inside.any() and outside.any()):
        sys.exit("`--data` must have known and unknown classes in its second half.")
    known = labels < num_known
    return (images[known], labels[known]), (x[inside], y[inside]), x[outside]


def make_methods(cfg, num_train):
    """Each method's (tx, draw)."""
    steps = cfg.epochs * (num_train // cfg.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(cfg.adamw_learning_rate, steps),
        weight_decay=cfg.adamw_weight_decay,
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(cfg.ivon_learning_rate, steps),
        ess=num_train,
        hess_init=cfg.ivon_hess_init,
        b2=1 - 1 / steps,
        weight_decay=cfg.ivon_weight_decay,
    )
    return {"AdamW": training.point_mass(adamw), "IVON": training.gaussian(ivon)}


@functools.partial(jax.jit, static_argnames="num_samples")
def predict(keys, adamw, posteriors, images, num_samples):
    """Class probabilities of AdamW and of IVON's mean, and IVON's `Uncertainty`."""

    def one_run(key, params, q):
        def probs(theta):
            return jax.nn.softmax(networks.apply(theta, images))

        ivon = predictive.uncertainty(probs, q, key, num_samples)
        return probs(params), probs(q.mean), ivon

    return jax.vmap(one_run)(keys, adamw, posteriors)


def in_domain(probs, labels):
    """Accuracy in percent and NLL of every run."""
    accuracy = jax.vmap(metrics.accuracy, in_axes=(0, None))(probs, labels)
    nll = jax.vmap(metrics.negative_log_likelihood, in_axes=(0, None))(probs, labels)
    return {"accuracy %": 100 * accuracy, "NLL": nll}


def detection(scores, num_inside):
    """The columns of the paper's Table 3, in percent, of every run."""
    inside, outside = scores[:, :num_inside], scores[:, num_inside:]
    result = jax.vmap(metrics.out_of_distribution)(inside, outside)
    return {title: 100 * result[name] for title, name in DETECTION.items()}


def shares(entropies, num_inside, num_known):
    """Percentages of images by entropy, in domain and out of it, as in Fig. 3."""
    edges, found = np.linspace(0, math.log(num_known), 24), {"edges": None}
    for name, entropy in entropies.items():
        parts = np.split(entropy, [num_inside], axis=1)
        for where, part in zip(("inside", "outside"), parts, strict=True):
            share = 100 * np.histogram(part, edges)[0] / part.size
            found[f"{name}, {where}"] = share
    return found | {"edges": edges}


def main():
    """Train both on the known classes; keep how they tell the others."""
    cfg = flags.parse(Config, __doc__)
    data, (inside, labels), outside = load_data(cfg.data, cfg.num_known)
    flags.check_batch_size(cfg.batch_size, len(data[1]))
    study = results.Study(cfg)
    train_key, predict_key = jax.random.split(jax.random.key(cfg.seed))
    # The same keys for both: the same first weights, the same order of the images.
    train_keys = jax.random.split(train_key, cfg.seeds)
    sizes = data[0].shape[1], cfg.hidden, cfg.hidden, cfg.num_known
    carries = {
        name: training.train_networks(name, method, sizes, train_keys, data, cfg)
        for name, method in make_methods(cfg, len(data[1])).items()
    }
    adamw, mean, ivon = predict(
        jax.random.split(predict_key, cfg.seeds),
        carries["AdamW"][0],
        jax.vmap(ivon_jax.posterior)(*carries["IVON"]),
        jnp.concatenate([inside, outside]),
        cfg.num_samples,
    )

    n = len(labels)
    probs = {"AdamW": adamw, "IVON@mean": mean, "IVON": ivon.probs}
    rows = [{"system": s, **in_domain(p[:, :n], labels)} for s, p in probs.items()]
    study.table("in domain", rows, {"accuracy %": 1, "NLL": 3})
    entropies = {name: entr(p).sum(axis=-1) for name, p in probs.items()}
    # A score is high for what looks in domain.
    scores = {(name, "confidence"): p.max(axis=-1) for name, p in probs.items()}
    scores |= {(name, "entropy"): -entropy for name, entropy in entropies.items()}
    scores |= {("IVON", "epistemic"): -ivon.epistemic}
    rows = [
        {"system": system, "score": kind, **detection(score, n)}
        for (system, kind), score in scores.items()
    ]
    study.table("out of domain", rows, dict.fromkeys(DETECTION, 1))
    study.curves("share of images by entropy", shares(entropies, n, cfg.num_known))


if __name__ == "__main__":
    main()
