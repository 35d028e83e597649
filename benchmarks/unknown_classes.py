r"""Digits of classes that it never saw: does the network notice? IVON beside AdamW.

    python benchmarks/unknown_classes.py                          # 45 s of CPU time
    python benchmarks/unknown_classes.py --data mnist.npz --epochs 40 \
        --adamw_learning_rate 1e-2 --adamw_weight_decay 1 \
        --ivon_learning_rate 1 --ivon_hess_init 0.3 --ivon_weight_decay 1e-3

Networks learn the digits 0 to 6 of half of the images; 7, 8 and 9 of the other half
are out of domain (the paper's Table 3 and Fig. 3, in small). Images with a confident
prediction, or one of low entropy, are taken to be in domain. In per cent, mean ±
standard error over five runs, by entropy, on scikit-learn's digits and on MNIST's:

| digits | NLL in domain | FPR@95 | det. err. | AUROC | AUPR-in | AUPR-out |
| --- | --- | --- | --- | --- | --- | --- |
| AdamW | 0.136±0.005 | 48.4±1.4 | 11.0±0.4 | 93.5±0.3 | 97.5±0.1 | 81.4±0.8 |
| IVON@mean | 0.228±0.013 | 62.5±0.8 | 12.8±0.2 | 91.5±0.2 | 96.8±0.1 | 74.7±0.6 |
| IVON | 0.202±0.012 | 59.9±1.5 | 12.8±0.3 | 91.7±0.2 | 96.8±0.1 | 75.8±0.7 |

| MNIST | NLL in domain | FPR@95 | det. err. | AUROC | AUPR-in | AUPR-out |
| --- | --- | --- | --- | --- | --- | --- |
| AdamW | 0.124±0.001 | 54.9±0.8 | 18.9±0.1 | 88.0±0.1 | 94.3±0.1 | 74.3±0.3 |
| IVON@mean | 0.146±0.005 | 57.5±0.6 | 18.7±0.3 | 88.1±0.3 | 94.5±0.2 | 74.1±0.4 |
| IVON | 0.130±0.004 | 53.9±0.3 | 17.8±0.3 | 88.9±0.2 | 94.9±0.2 | 75.7±0.2 |

IVON detects more on MNIST, AdamW on the digits, which are few and easy: there the
settings with the best NLL in cross-validation, of 16 for each, do badly for IVON on
the writers of the other half, and others would have done as well as AdamW's. The
histograms of ood.png show what Fig. 3 does: AdamW is sure of much that is unknown.

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses
import functools
import itertools
import math
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data_files, flags
from common.flags import Count, Picture, Positive, Seed
from jax.scipy.special import entr
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax
from ivon_jax import metrics, predictive


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
    plot: Picture = "ood.png"  # histograms over all runs


def load_data(path, num_known):
    """Return (images, labels) to train on, the same to test on, and unknown images.

    Images are (N, pixels) in [0, 1]. The first half of the file trains, the second
    tests: they are not by the same writers.
    """
    if path:
        images, labels = data_files.read_images(path)
        images = images / 255
    else:
        images, labels = load_digits(return_X_y=True)
        images = images / 16
    images = images.reshape(len(labels), -1).astype(np.float32)
    known, test = labels < num_known, np.arange(len(labels)) >= len(labels) // 2
    train, inside, outside = known & ~test, known & test, ~known & test
    if not (inside.any() and outside.any()):
        sys.exit("`--data` must have known and unknown classes in its second half.")
    pairs = [(images[part], labels[part]) for part in (train, inside)]
    return jax.tree.map(jnp.asarray, (*pairs, images[outside]))


def init(key, sizes):
    """Weights and biases of a network with layers of these sizes."""
    normal = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return [
        {"w": normal(k, shape), "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def apply(params, images):
    """Map images (N, pixels) to logits (N, classes)."""
    *hidden_layers, last = params
    for layer in hidden_layers:
        images = jax.nn.relu(images @ layer["w"] + layer["b"])
    return images @ last["w"] + last["b"]


def loss_fn(params, images, labels):
    """Mean cross-entropy of a batch."""
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_methods(cfg, num_train):
    """Each method's optimizer, and ``draw(key, params, opt_state)`` of its weights."""
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
    # AdamW has no posterior: each of its draws is the same, and `sample=` is ignored.
    point_mass = (
        optax.with_extra_args_support(adamw),
        lambda _key, params, _state: params,
    )
    return {"AdamW": point_mass, "IVON": (ivon, ivon_jax.sample)}


@functools.partial(jax.jit, static_argnames=("tx", "draw", "batch_size"))
def train_epoch(keys, carry, data, tx, draw, batch_size):
    """Take a step on each batch of the shuffled data, in every run."""
    num_batches = len(data[1]) // batch_size

    def step(carry, indices_and_key):
        params, opt_state = carry
        indices, key = indices_and_key
        theta = draw(key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, *(array[indices] for array in data))
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    def one_run(key, carry):
        order_key, draw_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(data[1]))
        batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)
        draw_keys = jax.random.split(draw_key, num_batches)
        return jax.lax.scan(step, carry, (batches, draw_keys))[0]

    return jax.vmap(one_run)(keys, carry)


def train(name, tx, draw, keys, data, cfg):
    """Return the parameters and the optimizer's state of every run, stacked."""
    sizes = data[0].shape[1], cfg.hidden, cfg.hidden, cfg.num_known

    def start(key):
        params = init(key, sizes)
        return params, tx.init(params)

    init_keys, *epoch_keys = jax.vmap(
        lambda key: jax.random.split(key, 1 + cfg.epochs), out_axes=1
    )(keys)
    carry = jax.jit(jax.vmap(start))(init_keys)
    for key in tqdm(epoch_keys, desc=name, unit="epoch"):
        carry = train_epoch(key, carry, data, tx, draw, cfg.batch_size)
        jax.block_until_ready(carry)
    return carry


@functools.partial(jax.jit, static_argnames="num_samples")
def predict(keys, adamw, posteriors, images, num_samples):
    """Class probabilities of AdamW and of IVON's mean, and IVON's `Uncertainty`."""

    def one_run(key, params, q):
        def probs(theta):
            return jax.nn.softmax(apply(theta, images))

        ivon = predictive.uncertainty(probs, q, key, num_samples)
        return probs(params), probs(q.mean), ivon

    return jax.vmap(one_run)(keys, adamw, posteriors)


def in_domain(probs, labels):
    """Accuracy in percent and NLL of every run."""
    accuracy = jax.vmap(metrics.accuracy, in_axes=(0, None))(probs, labels)
    nll = jax.vmap(metrics.negative_log_likelihood, in_axes=(0, None))(probs, labels)
    return 100 * accuracy, nll


def detection(scores, num_inside):
    """The columns of the paper's Table 3, in percent, of every run."""
    inside, outside = scores[:, :num_inside], scores[:, num_inside:]
    result = jax.vmap(metrics.out_of_distribution)(inside, outside)
    names = "fpr_at_95_tpr", "detection_error", "auroc", "aupr_in", "aupr_out"
    return [100 * result[name] for name in names]


def print_table(titles, rows, decimals):
    """Print mean ± standard error over runs; of one run the error is nan."""
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    for labels, columns in rows:
        cells = list(labels)
        for runs, digits in zip(columns, decimals, strict=True):
            error = np.std(runs) / (math.sqrt(len(runs) - 1) or math.nan)
            cells.append(f"{np.mean(runs):.{digits}f}±{error:.{digits}f}")
        print(f"| {' | '.join(cells)} |")


def save_plot(path, entropies, num_inside, num_known):
    """Draw how undecided the predictions are, in domain and out of it, as Fig. 3."""
    edges, top = np.linspace(0, math.log(num_known), 24), 32
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(entropies), sharey=True)
    for axes, (name, entropy) in zip(panels, entropies.items(), strict=True):
        inside, outside = np.split(entropy, [num_inside], axis=1)
        pairs = (inside, "#0072B2", "in domain"), (outside, "#D55E00", "out of domain")
        for y, (values, color, label) in zip((0.94, 0.86), pairs, strict=True):
            share = 100 * np.histogram(values, edges)[0] / values.size
            axes.stairs(share, edges, color=color, fill=True, alpha=0.4)
            axes.stairs(share, edges, color=color, lw=1.5, label=label)
            if share[0] > top:
                note = f"↑ {share[0]:.0f} %"
                axes.text(edges[1] + 0.03, y * top, note, color=color, va="center")
        axes.set(title=name, xlabel="predictive entropy (nats)", ylim=(0, top))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of images (%)")
    panels[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Train both on the known classes; print the tables and save the picture."""
    cfg = flags.parse(Config, __doc__)
    data, (inside, labels), outside = load_data(cfg.data, cfg.num_known)
    flags.check_batch_size(cfg.batch_size, len(data[1]))
    train_key, predict_key = jax.random.split(jax.random.key(cfg.seed))
    # The same keys for both: the same first weights, the same order of the images.
    train_keys = jax.random.split(train_key, cfg.seeds)
    carries = {
        name: train(name, tx, draw, train_keys, data, cfg)
        for name, (tx, draw) in make_methods(cfg, len(data[1])).items()
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
    rows = [((name,), in_domain(p[:, :n], labels)) for name, p in probs.items()]
    print_table(["in domain", "accuracy %", "NLL"], rows, (1, 3))
    entropies = {name: entr(p).sum(axis=-1) for name, p in probs.items()}
    # A score is high for what looks in domain.
    scores = {(name, "confidence"): p.max(axis=-1) for name, p in probs.items()}
    scores |= {(name, "entropy"): -entropy for name, entropy in entropies.items()}
    scores |= {("IVON", "epistemic"): -ivon.epistemic}
    rows = [(labels, detection(score, n)) for labels, score in scores.items()]
    titles = ["out of domain", "score", "FPR@95", "det. err."]
    titles += ["AUROC", "AUPR-in", "AUPR-out"]
    print()
    print_table(titles, rows, (1,) * 5)
    del entropies["IVON@mean"]
    save_plot(cfg.plot, entropies, n, cfg.num_known)


if __name__ == "__main__":
    main()
