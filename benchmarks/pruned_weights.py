"""How much of a network can go? Pruning by IVON's uncertainty, beside magnitude.

    python benchmarks/pruned_weights.py            # 60 s of CPU time
    python benchmarks/pruned_weights.py --data mnist.npz

Networks learn half of the digits, and lose weights without further training: those
of the smallest magnitude, signal-to-noise ratio (mean over standard deviation), or
those whose posterior is widest. Accuracy on the other half by the share that is
pruned, mean ± standard error over five runs:

| accuracy %, pruned | 0% | 50% | 80% | 90% | 95% | 98% |
| --- | --- | --- | --- | --- | --- | --- |
| AdamW, magnitude | 94.8±0.1 | 93.5±0.2 | 76.9±2.7 | 57.1±3.8 | 31.0±3.0 | 14.2±2.3 |
| SGD, magnitude | 93.7±0.3 | 93.7±0.3 | 93.7±0.3 | 93.7±0.3 | 93.3±0.1 | 87.4±0.6 |
| IVON, variance | 94.9±0.1 | 93.9±0.3 | 92.4±0.7 | 77.2±2.1 | 32.3±4.6 | 13.1±0.8 |
| IVON, magnitude | 94.9±0.1 | 94.9±0.1 | 94.8±0.0 | 94.0±0.2 | 88.6±1.6 | 63.3±5.7 |
| IVON, signal/noise | 94.9±0.1 | 94.9±0.1 | 94.8±0.0 | 94.0±0.2 | 88.5±1.6 | 62.7±5.5 |

Without loss IVON's network gives up 80 % of its weights, AdamW's not 50 %. But SGD's
gives up 90 %, from an accuracy that is a point lower: its weight decay, which the
gradients' scale does not divide, makes the most room of all, and from 95 % on the best
network is SGD's. The ratio adds nothing to the magnitude here, because h differs little
between weights. Settings are those of 16 each with the best NLL of the whole network,
over three folds of the training images. There is a table of NLL, too.

Toy size: `--epochs 2 --seeds 1`
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data_files, flags
from common.flags import Count, Picture, Positive, Seed
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax
from ivon_jax import metrics, pruning

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
STYLES = {
    "AdamW, magnitude": {"color": "#999999", "marker": "s"},
    "SGD, magnitude": {"color": "#CC79A7", "marker": "D"},
    "IVON, variance": {"color": "#009E73", "marker": "^"},
    "IVON, magnitude": {"color": "#D55E00", "marker": "o", "markersize": 8},
    "IVON, signal/noise": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
}


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
    plot: Picture = "pruning.png"


def load_data(path):
    """Return (images, labels) to train on, and the same to test on.

    Images are (N, pixels) in [0, 1]. The first half of the file trains, the second
    tests: they are not by the same writers.
    """
    if path:
        images, labels = data_files.read_images(path)
        images = images / 255
    else:
        images, labels = load_digits(return_X_y=True)
        images = images / 16
    images = jnp.asarray(images.reshape(len(labels), -1), jnp.float32)
    labels, half = jnp.asarray(labels, jnp.int32), len(labels) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


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
    # These have no posterior: each draw is the same, and `sample=` is ignored.
    point_masses = {
        name: (optax.with_extra_args_support(tx), lambda _key, params, _state: params)
        for name, tx in {"AdamW": adamw, "SGD": sgd}.items()
    }

    return point_masses | {"IVON": (ivon, ivon_jax.sample)}


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
    sizes = data[0].shape[1], cfg.hidden, cfg.hidden, 10

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


@jax.jit
def pruning_curves(adamw, sgd, posteriors, images, labels):
    """Accuracy and NLL at every sparsity, (runs, sparsities) each, for each curve."""

    def evaluate(params):
        probs = jax.nn.softmax(apply(params, images))
        nll = metrics.negative_log_likelihood(probs, labels)
        return metrics.accuracy(probs, labels), nll

    def by_magnitude(q, sparsity):
        return pruning.mask(jax.tree.map(jnp.abs, q.mean), sparsity)

    def one_run(adamw, sgd, q):
        points = [ivon_jax.Posterior.isotropic(params, 1.0) for params in (adamw, sgd)]
        curves = {
            "AdamW, magnitude": (points[0], by_magnitude),
            "SGD, magnitude": (points[1], by_magnitude),
            "IVON, magnitude": (q, by_magnitude),
            "IVON, variance": (q, pruning.by_variance),
            "IVON, signal/noise": (q, pruning.by_signal_to_noise),
        }
        return {
            name: pruning.curve(evaluate, q, SPARSITIES, criterion)
            for name, (q, criterion) in curves.items()
        }

    return jax.vmap(one_run)(adamw, sgd, posteriors)


def mean_and_error(runs):
    """The mean over runs and its standard error, nan for a single run."""
    return runs.mean(axis=0), runs.std(axis=0) / (math.sqrt(len(runs) - 1) or math.nan)


def print_table(title, curves, decimals):
    """Print a row for each curve: mean ± standard error over runs."""
    print(f"\n| {title} | {' | '.join(f'{s:.0%}' for s in SPARSITIES)} |")
    print("| --- " * (1 + len(SPARSITIES)) + "|")
    for name, runs in curves.items():
        pairs = zip(*mean_and_error(runs), strict=True)
        cells = [f"{mean:.{decimals}f}±{error:.{decimals}f}" for mean, error in pairs]
        print(f"| {name} | {' | '.join(cells)} |")


def save_plot(path, panels):
    """Draw the mean over runs ± its standard error, against the share that is kept."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    kept = 1 - np.array(SPARSITIES)
    for axes, (label, curves) in zip(
        figure.subplots(1, 2), panels.items(), strict=True
    ):
        for name, runs in curves.items():
            mean, error = mean_and_error(runs)
            color, band = STYLES[name]["color"], (mean - error, mean + error)
            axes.fill_between(kept, *band, color=color, alpha=0.25, lw=0)
            axes.plot(kept, mean, label=name, **{"markersize": 4} | STYLES[name])
        axes.set(xscale="log", xlim=(1.1, 0.9 * kept[-1]), ylabel=label)
        axes.set_xticks(kept, [f"{s:.0%}" for s in SPARSITIES])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("parameters pruned (log scale of those kept)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="lower left")
    figure.axes[1].set_yscale("log")
    figure.savefig(path, dpi=120)


def main():
    """Train all three; print the tables and save the picture."""
    cfg = flags.parse(Config, __doc__)
    data, test = load_data(cfg.data)
    flags.check_batch_size(cfg.batch_size, len(data[1]))
    # The same keys for both: the same first weights, the same order of the images.
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.seeds)
    carries = {
        name: train(name, tx, draw, keys, data, cfg)
        for name, (tx, draw) in make_methods(cfg, len(data[1])).items()
    }
    posteriors = jax.vmap(ivon_jax.posterior)(*carries["IVON"])
    points = carries["AdamW"][0], carries["SGD"][0]
    curves = pruning_curves(*points, posteriors, *test)
    accuracies = {name: 100 * np.asarray(curves[name][0]) for name in STYLES}
    nlls = {name: np.asarray(curves[name][1]) for name in STYLES}
    print_table("accuracy %, pruned", accuracies, 1)
    print_table("NLL, pruned", nlls, 2)
    save_plot(cfg.plot, {"accuracy (%)": accuracies, "NLL (nats)": nlls})


if __name__ == "__main__":
    main()
