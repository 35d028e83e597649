"""MNIST with Flax linen: AdamW beside IVON, in a training loop that survives a kill.

    python benchmarks/mnist.py                            # downloads MNIST, once
    python benchmarks/mnist.py --dataset fashion_mnist    # or Fashion-MNIST
    python benchmarks/mnist.py --data mnist10k.npz        # or reads a file of yours

A file has `images`, uint8 (N, 28, 28), and `labels`, and its last fifth is the test
set. `--dataset digits` needs neither network nor file: scikit-learn's 1,797 digits of
8x8 pixels, enlarged. The last command takes a minute on two CPU cores, with MNIST's
10,000 test images: 8,000 to train on.

IVON@mean predicts with the posterior's mean, IVON with 64 samples of it. Each optimizer
was tuned by NLL on a fifth of the training set, with 36 trials of learning rate, weight
decay and, for IVON, hess_init, and with two more seeds for the best five. (hess_init=3
was as good, but is above the paper's range.)

Stop it when you like, also by force: the same command continues from the checkpoint of
the last epoch and, on a CPU, ends with the very bits of a run without a stop. `--fresh`
deletes the checkpoints and starts again.

Toy size: `--dataset digits --epochs 2 --curve_samples 4 --num_samples 4`
"""

import dataclasses
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, results
from common.flags import Count, Fraction, Positive, Results, Seed, Text
from common.gpt2 import checkpoint
from common.scores import DIGITS, scores
from flax import linen as nn
from sklearn.datasets import fetch_openml, load_digits
from tqdm import tqdm

import ivon_jax.flax
from ivon_jax import metrics

OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
ROWS = {"adamw": ["AdamW"], "ivon": ["IVON@mean", "IVON"]}  # of the table
CHOICES = {"optimizer": [*ROWS, "both"], "dataset": [*OPENML, "digits"]}
# These may differ between a checkpoint and the run that continues from it.
FREE = ("optimizer", "dataset", "num_samples", "checkpoint_dir", "results")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    optimizer: str = "both"
    dataset: str = "mnist"
    data: str = ""  # an npz file, to read in the place of `dataset`
    epochs: Count = 30
    batch_size: Count = 50
    width: Count = 16  # channels of the first layer
    adamw_lr: float = 0.012
    adamw_weight_decay: float = 0.5
    ivon_lr: float = 1.0
    ivon_weight_decay: float = 3e-3
    ivon_hess_init: Positive = 1.0
    ivon_b2: Fraction = 0.9996  # averages the Hessian over half of 4800 steps
    seed: Seed = 0
    curve_samples: Count = 8  # from the posterior, for the test NLL after each epoch
    num_samples: Count = 64  # from the posterior, for the table
    checkpoint_dir: Text = "checkpoints/mnist"
    results: Results = "mnist.json"


class Network(nn.Module):
    """Two convolutions, with strides in the place of pooling; no batch norm."""

    width: int

    @nn.compact
    def __call__(self, images):
        """Map images, (N, 28, 28, 1), to the logits of the ten classes, (N, 10)."""
        hidden = nn.relu(nn.Conv(self.width, (5, 5), strides=2)(images))
        hidden = nn.relu(nn.Conv(2 * self.width, (5, 5), strides=2)(hidden))
        return nn.Dense(10)(hidden.reshape(len(hidden), -1))


def load_data(config):
    """Return (images, labels) to train on, and (images, labels) to test on."""
    parts = 5  # of which the last is the test set
    if config.data:
        images, labels = datasets.read_images(config.data, shape=(28, 28))
    elif config.dataset == "digits":
        digits = load_digits()
        # 8x8 pixels in 0..16: enlarge each to 3x3 pixels, and add a margin of 2.
        images = np.kron(digits.images * 255 / 16, np.ones((1, 3, 3)))
        images, labels = np.pad(images, ((0, 0), (2, 2), (2, 2))), digits.target
    else:
        images, labels = download(config.dataset)
        parts = 7
    cut = len(labels) - len(labels) // parts
    if cut == len(labels):
        sys.exit(f"`--data` must have at least {parts} images, got {cut}.")
    flags.check_batch_size(config.batch_size, cut)
    images = np.asarray(images[..., None] / 255, np.float32)
    labels = np.asarray(labels, np.int32)
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def download(dataset):
    """Return images and labels from OpenML; scikit-learn keeps them on disk."""
    try:
        # The other parser needs pandas.
        data = fetch_openml(
            OPENML[dataset], version=1, as_frame=False, parser="liac-arff"
        )
    except (OSError, ValueError) as error:
        sys.exit(
            f"Cannot download `--dataset {dataset}`: {error}. Without a network, pass "
            "`--data FILE.npz`, or `--dataset digits`, which scikit-learn brings along."
        )
    return data.data.reshape(-1, 28, 28), data.target


def create_state(key, name, config, num_train):
    """Return the first state, of either optimizer, on a cosine schedule to zero."""
    num_steps = config.epochs * (num_train // config.batch_size)
    if name == "adamw":
        tx = optax.adamw(
            optax.cosine_decay_schedule(config.adamw_lr, num_steps),
            weight_decay=config.adamw_weight_decay,
        )
    else:
        tx = ivon_jax.ivon(
            optax.cosine_decay_schedule(config.ivon_lr, num_steps),
            ess=num_train,
            hess_init=config.ivon_hess_init,
            b2=config.ivon_b2,
            weight_decay=config.ivon_weight_decay,
        )
    network = Network(config.width)
    params = network.init(key, jnp.zeros((1, 28, 28, 1)))["params"]
    return ivon_jax.flax.TrainState.create(apply_fn=network.apply, params=params, tx=tx)


def loss_fn(params, apply_fn, batch):
    """Mean cross-entropy of a batch."""
    images, labels = batch
    logits = apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def adamw_step(state, batch, key):
    """Take a step, with any optax optimizer."""
    del key  # AdamW draws nothing
    loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, batch)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def ivon_step(state, batch, key):
    """Take a step with IVON: the gradient is that of a sample from the posterior."""
    theta = state.sample(jax.random.fold_in(key, state.step))
    loss, grads = jax.value_and_grad(loss_fn)(theta, state.apply_fn, batch)
    return state.apply_gradients(grads=grads, sample=theta), loss


def train_epoch(step, state, data, batches, key):
    """Take a step on each batch, rows of `data`; return the state and the mean loss."""
    images, labels = data
    losses = []
    for rows in batches:
        state, loss = step(state, (images[rows], labels[rows]), key)
        losses.append(loss)
    return state, float(np.mean(jax.device_get(losses)))


def fit(key, name, config, train_data, test_data, fresh):
    """Train on from the last checkpoint; return the state and a log of every epoch.

    Order and noise derive from the key, the epoch and the step, so that no random state
    is in a checkpoint.
    """
    init_key, order_key, noise_key, curve_key = jax.random.split(key, 4)
    num_train = len(train_data[1])
    num_batches = num_train // config.batch_size
    step = adamw_step if name == "adamw" else ivon_step
    state = create_state(init_key, name, config, num_train)
    with open_checkpoints(name, config, train_data, test_data) as folder:
        if fresh:
            folder.delete_all()
        state, log, _ = folder.restore(state)
        if len(log) < config.epochs:
            # Compile off the clock. Nothing of this call is kept.
            train_epoch(step, state, train_data, [range(config.batch_size)], noise_key)
        epochs = range(len(log), config.epochs)
        bar = tqdm(epochs, name, config.epochs, initial=len(log), unit="epoch")
        for epoch in bar:
            start = time.perf_counter()
            epoch_key = jax.random.fold_in(order_key, epoch)
            order = np.asarray(jax.random.permutation(epoch_key, num_train))
            batches = order[: num_batches * config.batch_size].reshape(num_batches, -1)
            state, loss = train_epoch(step, state, train_data, batches, noise_key)
            folder.check()
            seconds = time.perf_counter() - start

            epoch_key = jax.random.fold_in(curve_key, epoch)
            rows = predict(epoch_key, name, state, test_data[0], config.curve_samples)
            nll = [
                float(metrics.negative_log_likelihood(probs, test_data[1]))
                for probs in rows
            ]
            # A new list, because Orbax may still be writing the last one.
            log = [*log, {"loss": loss, "test_nll": nll, "seconds": seconds}]
            folder.save(len(log), state, log)
            bar.set_postfix(loss=f"{loss:.4f}", test_nll=f"{nll[-1]:.4f}")
    return state, log


def open_checkpoints(name, config, train_data, test_data):
    """Open the folder of one optimizer's checkpoints, of which there may be none."""
    other = "ivon_" if name == "adamw" else "adamw_"
    fields = (field.name for field in dataclasses.fields(config))
    free = FREE + tuple(field for field in fields if field.startswith(other))
    identity = checkpoint.identify(config, free, data=[*train_data, *test_data])
    return checkpoint.Folder(pathlib.Path(config.checkpoint_dir, name), identity)


@functools.partial(jax.jit, static_argnames=("name", "num_samples"))
def predict(key, name, state, images, num_samples):
    """Return class probabilities (N, 10), at the mean and, with IVON, over samples."""

    def probs(params):
        def of_one(image):
            return jax.nn.softmax(state.apply_fn({"params": params}, image[None])[0])

        return jax.lax.map(of_one, images, batch_size=500)  # in memory at a time

    if name == "adamw":
        return [probs(state.params)]
    sampled = ivon_jax.predict(probs, state.posterior(), key, num_samples)
    return [probs(state.params), sampled]


def parse_args():
    """Return the Config of the command line, and whether to start afresh."""
    parser = flags.create_parser(Config, __doc__, **CHOICES)
    parser.add_argument("--fresh", action="store_true", help="delete the checkpoints")
    given = vars(parser.parse_args())
    fresh = given.pop("fresh")
    return flags.checked(parser, Config(**given)), fresh


def main():
    """Train, or finish training; keep the scores and the curves."""
    config, fresh = parse_args()
    train_data, (images, labels) = load_data(config)
    # One key for both: the same first weights, the same order of the images.
    fit_key, predict_key = jax.random.split(jax.random.key(config.seed))
    study, rows, logs = results.Study(config), [], {}
    for name in ROWS if config.optimizer == "both" else [config.optimizer]:
        state, log = fit(fit_key, name, config, train_data, (images, labels), fresh)
        predictions = predict(predict_key, name, state, images, config.num_samples)
        for row, probs in zip(ROWS[name], predictions, strict=True):
            seconds = sum(epoch["seconds"] for epoch in log)
            values = scores(probs, labels) | {"seconds": seconds}
            rows.append({"system": row, **values})
        logs[name] = log
    study.table("test", rows, DIGITS | {"accuracy %": 2})
    study.curves("by epoch", logs)


if __name__ == "__main__":
    with checkpoint.ends_at_once():
        main()
