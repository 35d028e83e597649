"""Multi-IVON: several posteriors trained at once, by one vmapped program.

    python benchmarks/multi_ivon.py                   # 80 s of CPU time
    python benchmarks/multi_ivon.py --cpu_devices 5   # a member on each of five devices

Five networks learn half of the digits; their Gaussians are one mixture (paper, section
4.2). On five devices the compiled program has no communication. Expected on the other
half, mean ± standard error over three ensembles; single networks are their members:

|                | accuracy      | NLL           | ECE           | Brier         |
| -------------- | ------------- | ------------- | ------------- | ------------- |
| AdamW          | 0.947 ± 0.001 | 0.193 ± 0.005 | 0.023 ± 0.001 | 0.081 ± 0.002 |
| AdamW ensemble | 0.951 ± 0.001 | 0.169 ± 0.004 | 0.019 ± 0.001 | 0.074 ± 0.001 |
| IVON           | 0.950 ± 0.001 | 0.168 ± 0.002 | 0.016 ± 0.000 | 0.075 ± 0.001 |
| Multi-IVON     | 0.951 ± 0.001 | 0.155 ± 0.002 | 0.017 ± 0.003 | 0.071 ± 0.000 |

Multi-IVON has the best NLL and Brier score; in accuracy and ECE it is level with IVON
and with the AdamW ensemble. Settings are those of mlp_digits.py, of 20 each the
best by validation NLL. On turned digits (ensemble.png) IVON is less sure than AdamW,
and an ensemble less than its members. But doubt does not grow steadily with the angle:
at 90 degrees it is less than at 30, and all four are wrong (NLL 13 to 16).

Toy size: `--epochs 2 --seeds 1 --members 2 --num_samples 4 --cpu_devices 2`
"""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flags
from common.flags import Count, Fraction, Picture, Positive
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax
from ivon_jax import metrics, predictive

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
SIZES = 64, 128, 128, 10
ANGLES = range(0, 181, 15)
SCORES = {
    "accuracy": metrics.accuracy,
    "NLL": metrics.negative_log_likelihood,
    "ECE": metrics.expected_calibration_error,
    "Brier": metrics.brier_score,
}
ENSEMBLES = {"AdamW": "AdamW ensemble", "IVON": "Multi-IVON"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    members: Count = 5  # networks of an ensemble
    epochs: Count = 400
    batch_size: Count = 50
    adamw_learning_rate: float = 1e-3
    adamw_weight_decay: float = 0.3
    adamw_b2: Fraction = 0.9999
    ivon_learning_rate: float = 1.0
    ivon_hess_init: Positive = 0.3
    ivon_b2: Fraction = 0.9997
    num_samples: Count = 64  # of IVON, and of all members of Multi-IVON together
    seeds: Count = 3  # ensembles, of other members each
    cpu_devices: Count = 1  # devices to make of this CPU, to spread the members over
    plot: Picture = "ensemble.png"


def load_halves():
    """Images (N, 8, 8) and labels of the first half, to train, and of the second."""
    digits = load_digits()
    images = np.asarray(digits.images / 16, np.float32)
    half = len(images) // 2
    return (images[:half], digits.target[:half]), (images[half:], digits.target[half:])


def init_params(key):
    """Weights and biases of a multilayer perceptron."""
    keys = jax.random.split(key, len(SIZES) - 1)
    he_normal = jax.nn.initializers.he_normal()
    weights = map(he_normal, keys, itertools.pairwise(SIZES))
    return [{"w": w, "b": jnp.zeros(w.shape[1])} for w in weights]


def apply(params, images):
    """Logits of the ten digits, (..., 10), of images (..., 8, 8)."""
    x = images.reshape(*images.shape[:-2], -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def point_mass(params, _opt_state):
    """The posterior of an optimizer without one: a Gaussian of no width."""
    return ivon_jax.Posterior(params, jax.tree.map(lambda _: None, params))


def make_methods(config, num_train):
    """Each method's optimizer, the posterior that it ends with, and samples of it."""
    num_steps = config.epochs * (num_train // config.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(config.adamw_learning_rate, num_steps),
        b2=config.adamw_b2,
        weight_decay=config.adamw_weight_decay,
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(config.ivon_learning_rate, num_steps),
        ess=num_train,
        hess_init=config.ivon_hess_init,
        b2=config.ivon_b2,
    )
    return {
        "AdamW": (optax.with_extra_args_support(adamw), point_mass, 1),
        "IVON": (ivon, ivon_jax.posterior, config.num_samples),
    }


def train_epoch(tx, posterior, batch_size, carry, key, images, labels):
    """Take a step on each batch of an epoch: the program of one member."""
    order_key, noise_key = jax.random.split(key)
    num_batches = len(labels) // batch_size
    order = jax.random.permutation(order_key, len(labels))
    batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)

    def loss_fn(params, batch):
        return cross_entropy(apply(params, images[batch]), labels[batch]).mean()

    def step(carry, batch_and_key):
        params, opt_state = carry
        batch, step_key = batch_and_key
        theta = posterior(params, opt_state).sample(step_key)  # AdamW's is `params`
        grads = jax.grad(loss_fn)(theta, batch)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    step_keys = jax.random.split(noise_key, num_batches)
    return jax.lax.scan(step, carry, (batches, step_keys))[0]


def compile_ensemble(config, tx, posterior):
    """Return ``init(keys)`` and ``epoch(carry, keys, *data)`` of all members."""
    devices = jax.devices()[: math.gcd(config.members, jax.device_count())]
    mesh = jax.sharding.Mesh(np.array(devices), ("members",))
    spread = jax.NamedSharding(mesh, jax.P("members"))

    def init(key):
        params = init_params(key)
        return params, tx.init(params)

    epoch = functools.partial(train_epoch, tx, posterior, config.batch_size)
    epochs = jax.vmap(epoch, in_axes=(0, 0, None, None))
    # Each device has its members' arrays, and all of the data.
    compile_spread = functools.partial(jax.jit, out_shardings=spread)
    return compile_spread(jax.vmap(init)), compile_spread(epochs)


@functools.partial(jax.jit, static_argnames="num_samples")
def evaluate(q, key, images, labels, num_samples):
    """Four scores on upright digits; NLL and uncertainties for each angle."""
    result = predictive.uncertainty(
        lambda theta: jax.nn.softmax(apply(theta, images)), q, key, num_samples
    )
    scores = [score(result.probs[0], labels) for score in SCORES.values()]
    nll = jax.vmap(metrics.negative_log_likelihood, (0, None))(result.probs, labels)
    curves = nll, result.total.mean(axis=1), result.epistemic.mean(axis=1)
    return jnp.stack(scores), jnp.stack(curves)


def mean_and_error(runs):
    """Mean over runs and its standard error, nan of a single run."""
    error = np.std(runs, axis=0) / (len(runs) - 1 or math.nan) ** 0.5
    return np.mean(runs, axis=0), error


def print_table(rows):
    """Print mean ± standard error over the ensembles."""
    print(f"|                | {' | '.join(f'{title:13}' for title in SCORES)} |")
    print("| -------------- " + "| ------------- " * len(SCORES) + "|")
    for name, results in rows.items():
        columns = zip(*mean_and_error([scores for scores, _ in results]), strict=True)
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in columns]
        print(f"| {name:14} | {' | '.join(cells)} |")


def save_plot(path, rows):
    """Draw NLL, entropy and its epistemic part over the angle of the digits."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    colors = "#D55E00", "#CC79A7", "#0072B2", "#009E73"
    for color, (name, results) in zip(colors, rows.items(), strict=True):
        curves, errors = mean_and_error([curves for _, curves in results])
        for axes, mean, error in zip(panels, curves, errors, strict=True):
            axes.plot(ANGLES, mean, color=color, label=name)
            axes.fill_between(
                ANGLES, mean - error, mean + error, color=color, alpha=0.25
            )
    titles = "Test NLL", "Entropy of the prediction", "Epistemic part of it"
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="angle (degrees)", ylabel="nats", ylim=(0, None))
        axes.set_xticks(range(0, 181, 45))
        axes.spines[["top", "right"]].set_visible(False)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main():
    """Train the ensembles; print the table and draw what rotation does."""
    config = flags.parse(Config, __doc__)
    train_data, (images, labels) = load_halves()
    flags.check_batch_size(config.batch_size, len(train_data[1]))
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    turned = [ndimage.rotate(images, a, (2, 1), False, order=1) for a in ANGLES]
    test_data = {"images": np.stack(turned), "labels": labels}
    rows = collections.defaultdict(list)
    for name, method in make_methods(config, len(train_data[1])).items():
        tx, posterior, num_samples = method
        init, epoch = compile_ensemble(config, tx, posterior)
        for seed in range(config.seeds):
            keys = jax.random.split(jax.random.key(seed), 2 + config.epochs)
            init_key, test_key, *epoch_keys = keys
            carry = init(jax.random.split(init_key, config.members))
            for key in tqdm(epoch_keys, desc=name, unit="epoch"):
                carry = epoch(carry, jax.random.split(key, config.members), *train_data)
            ensemble = ivon_jax.Mixture.from_stacked(jax.vmap(posterior)(*carry))
            test = functools.partial(evaluate, key=test_key, **test_data)
            singles = jax.vmap(functools.partial(test, num_samples=num_samples))
            rows[name].append([x.mean(axis=0) for x in singles(ensemble.stacked)])
            # As many samples from all members together; of point masses, one of each.
            num_all = max(num_samples, config.members)
            rows[ENSEMBLES[name]].append(test(ensemble, num_samples=num_all))
    print_table(rows)
    save_plot(config.plot, rows)
    print(f"\nThe picture is {config.plot}.")


if __name__ == "__main__":
    main()
