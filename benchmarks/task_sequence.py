"""Five tasks, one after the other: yesterday's posterior is today's prior.

    python benchmarks/task_sequence.py            # 75 s of CPU time
    python benchmarks/task_sequence.py --data mnist.npz

Each task permutes the pixels of the digits in an order of its own; when it is over its
images are gone. Test accuracy in per cent, mean ± standard error over three seeds:

|  | all five, at the end | each, when learned | first, at the end |
| --- | --- | --- | --- |
| AdamW | 52.7 ± 3.7 | 93.0 ± 0.2 | 29.0 ± 3.8 |
| IVON, first prior | 58.8 ± 2.2 | 97.0 ± 0.2 | 29.2 ± 2.4 |
| IVON, isotropic | 70.2 ± 2.2 | 97.3 ± 0.0 | 68.7 ± 1.4 |
| IVON, posterior | 78.9 ± 2.4 | 96.9 ± 0.0 | 67.5 ± 5.2 |
| IVON, joint | 99.0 ± 0.0 | 99.0 ± 0.0 | 99.1 ± 0.2 |

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
from common import data_files, flags
from common.flags import Count, Picture, Positive
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax

NUM_TASKS = 5
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999")  # of the tasks


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
    plot: Picture = "continual.png"


def load_data(path):
    """Return (images, labels) to train on and, a fifth of them, to test on."""
    if path:
        images, labels = data_files.read_images(path)
        images = images / 255
    else:
        digits = load_digits()
        images, labels = digits.images / 16, digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images.reshape(len(labels), -1)[order], jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    cut = 4 * len(labels) // 5
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def permute_pixels(key, images):
    """Return each task's images, (5, N, pixels): the pixels in an order of its own."""
    keys = jax.random.split(key, NUM_TASKS)
    return jnp.stack([jax.random.permutation(k, images, axis=1) for k in keys])


def init(key, num_pixels, hidden):
    """Return the parameters of a network with two hidden layers."""
    shapes = [(num_pixels, hidden), (hidden, hidden), (hidden, 10)]
    draw = jax.nn.initializers.he_normal()
    return [
        {"kernel": draw(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(jax.random.split(key, 3), shapes, strict=True)
    ]


def apply(params, images):
    """Map images to the logits of the ten digits."""
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def loss_fn(params, images, labels):
    """Mean cross-entropy of a batch."""
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracies(params, images, labels):
    """Accuracy in percent on each task, (5,)."""
    return 100 * jnp.mean(apply(params, images).argmax(-1) == labels, axis=-1)


def optimizer(prior, learning_rate, knob, num_train, config):
    """Return an optimizer and how it draws theta: IVON, or AdamW without a prior.

    `knob` is IVON's `hess_init` or AdamW's `weight_decay`.
    """
    num_steps = config.epochs * (num_train // config.batch_size)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    if prior is None:
        # AdamW has no posterior: each draw is the same, and `sample=` is ignored.
        adamw = optax.with_extra_args_support(optax.adamw(schedule, weight_decay=knob))
        return adamw, lambda _key, params, _opt_state: params
    ivon = ivon_jax.ivon(
        schedule,
        ess=num_train,  # of this task: what was learned before is in the prior
        hess_init=knob,
        b2=1 - config.forget / num_steps,
        prior=prior,
    )
    return ivon, ivon_jax.sample


@functools.partial(jax.jit, static_argnames="config")
def learn(key, params, prior, knobs, images, labels, tests, config):
    """Train on a task; return (params, opt_state), each epoch's accuracies on all."""
    num_train = len(labels)
    tx, draw = optimizer(prior, *knobs, num_train, config)

    def step(carry, step_key):
        params, opt_state = carry
        batch_key, noise_key = jax.random.split(step_key)
        rows = jax.random.randint(batch_key, (config.batch_size,), 0, num_train)
        theta = draw(noise_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, images[rows], labels[rows])
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry, step_keys):
        carry, _ = jax.lax.scan(step, carry, step_keys)
        return carry, accuracies(carry[0], *tests)

    keys = jax.random.split(key, (config.epochs, num_train // config.batch_size))
    return jax.lax.scan(epoch, (params, tx.init(params)), keys)


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
    start = init(init_key, num_pixels, config.hidden)
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


def cell(values):
    """Mean ± standard error over seeds; of one seed the error is nan."""
    error = values.std() / (np.sqrt(len(values) - 1) or np.nan)
    return f"{values.mean():.1f} ± {error:.1f}"


def print_table(curves, epochs):
    """Print accuracies on test images after all tasks, and when each was learned."""
    columns = ("all five, at the end", "each, when learned")
    columns = ("", *columns, "first, when learned", "first, at the end")
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for name, seeds in curves.items():  # (seeds, tasks * epochs, tasks)
        end = seeds[:, -1]
        learned = seeds[:, epochs - 1 :: epochs].diagonal(axis1=1, axis2=2)
        learned = end if name == "IVON, joint" else learned
        columns = end.mean(1), learned.mean(1), learned[:, 0], end[:, 0]
        print(f"| {name} | {' | '.join(map(cell, columns))} |")


def draw(path, curves, epochs):
    """Draw each task's accuracy as training goes through the tasks."""
    curves = dict(curves)
    joint = curves.pop("IVON, joint")[:, -1].mean()
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (name, seeds) in zip(panels, curves.items(), strict=True):
        mean = seeds.mean(0)
        time = np.arange(1, len(mean) + 1) / epochs
        for task, color in enumerate(COLORS):
            begun = slice(task * epochs, None)
            axes.plot(
                time[begun], mean[begun, task], color=color, label=f"task {task + 1}"
            )
            axes.axvline(task, color="0.85", lw=0.8, zorder=0)
        axes.axhline(joint, color="black", ls="--", lw=1, label="all tasks at once")
        axes.set(xlim=(0, NUM_TASKS), ylim=(0, 100), xlabel="tasks trained on")
        axes.set_title(f"{name}\n{mean[-1].mean():.0f} % at the end", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Go through the tasks on every seed; print the table and draw the picture."""
    config = flags.parse(Config, __doc__)
    data = load_data(config.data)
    flags.check_batch_size(config.batch_size, len(data[0][1]))
    num_steps = config.epochs * (len(data[0][1]) // config.batch_size)
    flags.check_forget(config.forget, num_steps)
    runs = []
    total = config.seeds * (4 * NUM_TASKS + 1)
    with tqdm(total=total, unit="task", leave=False) as bar:
        for seed in range(config.seeds):
            runs.append(run(jax.random.key(seed), config, *data, bar))
    curves, precisions = zip(*runs, strict=True)
    curves = {name: np.stack([c[name] for c in curves]) for name in curves[0]}
    print_table(curves, config.epochs)
    steps = ", ".join(f"{p:.0f}" for p in np.mean(precisions, axis=0))
    print(f"\nMean precision of IVON's posterior after each task: {steps}.")
    draw(config.plot, curves, config.epochs)
    print(f"The picture is {config.plot}.")


if __name__ == "__main__":
    main()
