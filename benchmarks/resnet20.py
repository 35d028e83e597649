"""ResNet-20 on CIFAR with Flax NNX and the IVON paper's settings: IVON, AdamW or SGD.

    python benchmarks/resnet20.py                          # downloads CIFAR-10, once
    python benchmarks/resnet20.py --dataset cifar100       # or CIFAR-100
    python benchmarks/resnet20.py --data cifar10_jpeg.npz  # or reads your own file,
    python benchmarks/resnet20.py --data folder            # or common/hub.py's files
    python benchmarks/resnet20.py --preset quick           # 2 minutes of two CPU cores

The defaults are the paper's: ResNet-20 (274,042 parameters) with filter response
normalisation, flips and crops, batches of 50, 200 epochs with a warm-up of 5 and a
cosine to zero, here moved at every step. That is a run for a GPU; the paper's
accuracies after it are 90.0 % (AdamW), 91.9 % (SGD) and 92.7 % (IVON with 64 samples).
`--preset quick` trains a smaller network on 5,000 images for 10 epochs, to see the loop
work, with the best of two learning rates for AdamW (2e-3, 1e-2) and of four for IVON
(0.2, 0.5, 1, 2) on other images: after so few steps the posterior is still its initial
value. IVON@mean predicts with the posterior's mean, IVON with 64 samples of it.

Stop it when you like: the same command continues from the checkpoint of the last epoch.

Toy size: `--data synthetic --depth 2 --epochs 2 --warmup_epochs 1 --num_samples 2`
"""

import dataclasses
import functools
import io
import itertools
import pathlib
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, hub, results
from common.flags import Count, Fraction, Positive, Results, Seed, Text
from common.gpt2 import checkpoint
from common.scores import DIGITS, scores
from flax import nnx
from PIL import Image
from sklearn.datasets import fetch_openml
from tqdm import tqdm
from zoo.resnet import ResNet

import ivon_jax
import ivon_jax.flax
from ivon_jax import metrics

OPENML = {"cifar10": 40927, "cifar100": 41983}
SPLITS = "train", "test"
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
ROWS = {"ivon": "IVON@mean", "adamw": "AdamW", "sgd": "SGD"}
CHOICES = {"optimizer": ROWS, "dataset": OPENML}
# These may differ between a checkpoint and the run that continues from it.
FREE = ("num_samples", "max_to_keep", "checkpoint_dir", "results")


def check_depth(depth):
    """Reject depths that no such network has."""
    if depth < 2 or (depth - 2) % 6:
        raise ValueError("must be 2, 8, 14, 20 or another 6 n + 2")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    optimizer: str = "ivon"
    dataset: str = "cifar10"
    data: str = ""  # a file or folder to read, or "synthetic": noise, to try the code
    num_train: Count = 50_000  # at most
    num_test: Count = 10_000  # at most
    depth: Annotated[int, check_depth] = 20  # 6n + 2
    width: Count = 16  # channels of the first layer
    epochs: Count = 200
    warmup_epochs: int = 5
    batch_size: Count = 50
    ivon_lr: float = 0.2
    ivon_hess_init: Positive = 0.5
    ivon_b2: Fraction = 0.99999
    adamw_lr: float = 0.002
    sgd_lr: float = 0.1
    weight_decay: float = 2e-4
    num_samples: Count = 64  # of the posterior, for the table
    seed: Seed = 0
    max_to_keep: Count = 2  # checkpoints
    checkpoint_dir: Text = "checkpoints/resnet20"
    results: Results = "resnet20.json"


QUICK = dict(
    num_train=5000,
    num_test=1000,
    width=8,
    epochs=10,
    warmup_epochs=1,
    ivon_lr=2.0,
    adamw_lr=0.01,
)
PRESETS = {"paper": {}, "quick": QUICK}  # flags override them


def augment(key, images):
    """Flip each image or not, and crop it out of a margin of four black pixels."""
    flip_key, crop_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 9)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (32, 32, 3))

    return jax.vmap(crop)(padded, corners)


def create_optimizer(model, config, num_train):
    """Return the optimizer; warm-up and cosine move at every step, and end at zero."""
    steps_per_epoch = num_train // config.batch_size
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=getattr(config, f"{config.optimizer}_lr"),
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        decay_steps=config.epochs * steps_per_epoch,
    )
    match config.optimizer:
        case "ivon":
            tx = ivon_jax.ivon(
                schedule,
                ess=num_train,
                hess_init=config.ivon_hess_init,
                b2=config.ivon_b2,
                weight_decay=config.weight_decay,
            )
        case "adamw":
            tx = optax.adamw(schedule, weight_decay=config.weight_decay)
        case "sgd":
            l2 = optax.add_decayed_weights(config.weight_decay)
            tx = optax.chain(l2, optax.sgd(schedule, momentum=0.9))
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss_fn(model, images, labels):
    """Mean cross-entropy of a batch."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def ivon_step(model, optimizer, images, labels, key):
    """Take a step with IVON: the gradient is that of a sample from the posterior."""
    sampled = ivon_jax.flax.sample(key, model, optimizer)
    loss, grads = nnx.value_and_grad(loss_fn)(sampled, images, labels)
    optimizer.update(model, grads, sample=nnx.state(sampled, nnx.Param))
    return loss


def plain_step(model, optimizer, images, labels, key):
    """Take a step with any other optimizer."""
    del key  # it draws nothing
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@functools.partial(nnx.jit, static_argnames="step")
def train_steps(model, optimizer, data, batches, key, step):
    """Take a step on each row of `batches`, indices into `data`; return the mean loss.

    A scan carries arrays, not modules: split the modules once, merge them in every
    step, and write the last state back. Python dispatches once for all steps.
    """
    graphdef, state = nnx.split((model, optimizer))

    def body(state, indices):
        model, optimizer = nnx.merge(graphdef, state)
        step_key = jax.random.fold_in(key, optimizer.step[...])
        augment_key, noise_key = jax.random.split(step_key)
        images, labels = (array[indices] for array in data)
        images = augment(augment_key, images)
        loss = step(model, optimizer, images, labels, noise_key)
        return nnx.state((model, optimizer)), loss

    if len(batches) == 1:  # a loop all the same, in a scan
        state, losses = body(state, batches[0])
    else:
        state, losses = jax.lax.scan(body, state, batches)
    nnx.update((model, optimizer), state)
    return losses.mean()


def steps_per_call(steps_per_epoch):
    """Return how many steps to scan over: the largest divisor of an epoch up to 50.

    On a CPU one, where XLA's gradients of convolutions are ten times slower in a loop.
    """
    most = 1 if jax.default_backend() == "cpu" else 50
    return max(n for n in range(1, most + 1) if steps_per_epoch % n == 0)


def fit(key, model, optimizer, train_data, test_data, config):
    """Train on from the last checkpoint; return a log of every epoch."""
    order_key, step_key = jax.random.split(key)
    num_train, batch_size = len(train_data[1]), config.batch_size
    steps_per_epoch = num_train // batch_size
    chunk = steps_per_call(steps_per_epoch)
    step = ivon_step if config.optimizer == "ivon" else plain_step
    with open_checkpoints(config, train_data, test_data) as folder:
        state, log, _ = folder.restore(nnx.state((model, optimizer)))
        nnx.update((model, optimizer), state)
        done, total = (n * steps_per_epoch for n in (len(log), config.epochs))
        bar = tqdm(desc=config.optimizer, total=total, initial=done, leave=False)
        for epoch in range(len(log), config.epochs):
            start = time.perf_counter()
            # Order, augmentation and noise derive from the seed, the epoch and the
            # step, so that a checkpoint needs no random state.
            epoch_key = jax.random.fold_in(order_key, epoch)
            order = jax.random.permutation(epoch_key, num_train)
            order = order[: steps_per_epoch * batch_size]
            losses = []
            for batches in order.reshape(-1, chunk, batch_size):
                loss = train_steps(
                    model, optimizer, train_data, batches, step_key, step=step
                )
                losses.append(float(loss))
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update(chunk)
                folder.check()
            seconds = time.perf_counter() - start
            test = all_scores(mean_probs(model, test_data[0]), test_data[1])
            # A new list, because Orbax may still be writing the last one.
            entry = {"loss": float(np.mean(losses)), "seconds": seconds} | test
            log = [*log, entry]
            folder.save(len(log), nnx.state((model, optimizer)), log)
        bar.close()
    return log


def open_checkpoints(config, train_data, test_data):
    """Open the folder of this optimizer's checkpoints, one for every epoch."""
    identity = checkpoint.identify(config, FREE, data=[*train_data, *test_data])
    path = pathlib.Path(config.checkpoint_dir, config.optimizer)
    return checkpoint.Folder(path, identity, config.max_to_keep)


def class_probs(model, images):
    """Class probabilities (N, num_classes), in the memory for 500 images."""

    def of_one(image):
        return nnx.softmax(model(image[None])[0])

    return jax.lax.map(of_one, images, batch_size=500)


@nnx.jit
def mean_probs(model, images):
    """Class probabilities (N, num_classes) of one network: the posterior's mean."""
    return class_probs(model, images)


@functools.partial(nnx.jit, static_argnames="num_samples")
def sampled_probs(key, model, optimizer, images, num_samples):
    """Class probabilities (N, num_classes), averaged over samples of the posterior."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def fn(theta):
        return class_probs(nnx.merge(graphdef, theta, rest), images)

    posterior = ivon_jax.flax.posterior(model, optimizer)
    return ivon_jax.predict(fn, posterior, key, num_samples)


def all_scores(probs, labels):
    """Return the columns of the table."""
    top = {"top-5 %": 100 * metrics.accuracy(probs, labels, k=5)}
    return {k: float(v) for k, v in (scores(probs, labels) | top).items()}


def load_data(config):
    """Return (images, labels) to train on and to test on, shuffled, on the device."""
    if config.data == "synthetic":
        splits = synthetic(100), synthetic(20)
    elif pathlib.Path(config.data).is_dir() and config.data:
        splits = read_folder(config.dataset, config.data)
    else:
        num_classes = NUM_CLASSES[config.dataset]
        read = functools.partial(read_npz, config.data, num_classes)
        splits = read() if config.data else download(config.dataset)
    key = jax.random.key(0)  # the same images for every seed
    counts = config.num_train, config.num_test
    for (images, labels), count in zip(splits, counts, strict=True):
        order = np.asarray(jax.random.permutation(key, len(labels))[:count])
        yield jnp.asarray(images[order]), jnp.asarray(labels[order], jnp.int32)


def synthetic(count):
    """Return noise with random labels, to try the code."""
    images_key, labels_key = jax.random.split(jax.random.key(count))
    images = jax.random.bits(images_key, (count, 32, 32, 3), jnp.uint8)
    return images, jax.random.randint(labels_key, (count,), 0, 10)


def download(dataset):
    """Return both splits from OpenML; scikit-learn keeps them for the next run."""
    try:
        # This parser takes minutes; the faster one needs pandas.
        data = fetch_openml(data_id=OPENML[dataset], as_frame=False, parser="liac-arff")
    except (OSError, ValueError) as error:
        sys.exit(
            f"Cannot download `--dataset {dataset}`: {error}. Without a network, pass "
            "`--data FILE.npz`."
        )
    images = data.data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.uint8)
    labels = data.target.astype(np.int32)
    return (images[:50_000], labels[:50_000]), (images[50_000:], labels[50_000:])


def read_folder(dataset, path):
    """Return both splits of a folder of Parquet files or of images."""
    try:
        return [split.arrays(size=32) for split in hub.load(dataset, path)]
    except (ImportError, ValueError) as error:
        sys.exit(f"`--data`: {error}")


def read_npz(path, num_classes=10):
    """Return both splits of a file, or exit and say what it should be."""
    try:
        with np.load(path) as arrays:
            return [read_split(arrays, name, num_classes) for name in SPLITS]
    except Exception as error:  # there are many ways to be no such file
        sys.exit(
            "`--data` must be an npz file with `train_images`, uint8 (N, 32, 32, 3), "
            "or `train_jpeg`, the bytes of N files, and `train_offsets`, where each "
            "starts and the last ends; with `train_labels`, N integers in "
            f"0..{num_classes - 1}; and the same for `test`. Got {path!r}: {error}"
        )


def read_split(arrays, name, num_classes):
    """Return images and labels; decode the images if they are JPEG files."""
    labels = arrays[f"{name}_labels"]
    if f"{name}_jpeg" in arrays:
        jpeg, offsets = arrays[f"{name}_jpeg"], arrays[f"{name}_offsets"]
        files = (io.BytesIO(jpeg[i:j]) for i, j in itertools.pairwise(offsets))
        images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    else:
        images = arrays[f"{name}_images"]
    return datasets.check_images(images, labels, num_classes, (32, 32, 3))


def parse_args():
    """Return the Config of the command line; a flag overrides the preset."""
    parser = flags.create_parser(Config, __doc__, **CHOICES)
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    given = vars(parser.parse_args())
    preset = PRESETS[given.pop("preset")]
    config = flags.checked(parser, Config(**preset | given))
    if config.warmup_epochs >= config.epochs:
        parser.error(
            f"--warmup_epochs must be below --epochs {config.epochs}, got "
            f"{config.warmup_epochs}."
        )
    return config


def main():
    """Train, or finish training; keep the scores and the curve."""
    config = parse_args()
    train_data, (images, labels) = load_data(config)
    flags.check_batch_size(config.batch_size, len(train_data[1]))
    study = results.Study(config)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    init_key, train_key, predict_key = keys
    num_classes = NUM_CLASSES[config.dataset]
    model = ResNet(config.depth, config.width, num_classes, nnx.Rngs(init_key))
    optimizer = create_optimizer(model, config, len(train_data[1]))
    log = fit(train_key, model, optimizer, train_data, (images, labels), config)
    rows = {ROWS[config.optimizer]: all_scores(mean_probs(model, images), labels)}
    if config.optimizer == "ivon":
        probs = sampled_probs(predict_key, model, optimizer, images, config.num_samples)
        rows["IVON"] = all_scores(probs, labels)
    seconds = {"seconds": sum(epoch["seconds"] for epoch in log)}
    rows = [{"system": name} | row | seconds for name, row in rows.items()]
    study.table("test", rows, DIGITS | {"top-5 %": 1})
    study.curves("by epoch", log)


if __name__ == "__main__":
    with checkpoint.ends_at_once():
        main()
