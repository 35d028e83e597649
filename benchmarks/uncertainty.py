"""The paper's Tables 2 and 3 in small: who knows when it errs?

    python benchmarks/uncertainty.py                         # scikit-learn's digits
    python benchmarks/uncertainty.py --mnist mnist10k.npz    # 10,000 digits of MNIST
    python benchmarks/uncertainty.py --cifar cifar10.npz     # a small ResNet
    python benchmarks/uncertainty.py --cifar cifar10.npz --full 1    # the paper's size

Twenty minutes of one core for the digits or MNIST's. CIFAR-10 is for a GPU, and takes
36 with three systems, eight trials, three seeds and three members.

Every system has the same number of trials, points of a Sobol sequence in its learning
rate, the precision of its prior (or weight decay) and what else it has, and keeps the
one of the lowest NLL on a third of the training images. The ranges are wide ones around
what a first grid, with one prior for most, had found best on the digits. Then five
seeds train on all of them. The first table has the trials, the second is tested on
other images, the third measures how well the entropy of a prediction tells them from
images that are none of the classes: the same ones, turned by 90 degrees, and patches of
the two photographs that scikit-learn carries. The plot has NLL and AUROC. Time is that
of training, from the trials: as many runs, side by side, for all. The last table has
intervals of 95 %, over seeds and test images together, of IVON less another system.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resnet20
from common import baselines, controls, flags, intervals, results
from common.flags import Count, Results
from common.scores import losses, right
from flax import nnx
from jax.scipy.special import entr
from sklearn.datasets import load_digits, load_sample_images
from zoo.layers import normalize
from zoo.resnet import ResNet

from ivon_jax import metrics

RATES = {"learning_rate": (0.03, 0.6)}  # of SGD
PRIOR = {"prior_precision": (0.03, 30.0)}
ADAMW = {"learning_rate": (1e-4, 3e-2), "weight_decay": (0.03, 3.0)}
LARGER = {"learning_rate": (0.1, 10.0)}  # momentum is an average, so ten times SGD's
GAUSSIAN = LARGER | {"hess_init": (0.3, 30.0)} | PRIOR
SYSTEMS = {  # how to train, and the ranges of its hyperparameters
    "AdamW": (baselines.adamw, ADAMW),
    "Muon": (
        baselines.muon,
        {"learning_rate": (1e-3, 0.1), "weight_decay": (0.01, 1.0)},
    ),
    "AdamW stopped early": (
        baselines.stopped_early(baselines.adamw),
        ADAMW | {"share": (0.03, 1.0)},
    ),
    "SGD": (baselines.with_prior(baselines.sgd), RATES | PRIOR),
    "bSAM": (
        baselines.with_prior(baselines.bsam),
        LARGER | {"rho": (0.01, 10.0), "damping": (0.1, 30.0)} | PRIOR,
    ),
    "AdaHessian": (
        baselines.adahessian,
        {"learning_rate": (0.05, 0.7), "weight_decay": (3e-3, 0.1)},
    ),
    "BBB": (
        baselines.with_prior(baselines.bbb),
        {"learning_rate": (1e-3, 3e-2), "hess_init": (10.0, 1000.0)} | PRIOR,
    ),
    "Laplace": (
        baselines.with_prior(baselines.laplace),
        RATES | {"head_precision": (1.0, 300.0)} | PRIOR,
    ),
    "MC dropout": (
        baselines.with_prior(baselines.mc_dropout),
        RATES | {"rate": (0.02, 0.6)} | PRIOR,
    ),
    "SWAG": (
        baselines.with_prior(baselines.swag),
        RATES | {"swa_ratio": (0.1, 1.0)} | PRIOR,
    ),
    "VOGN": (baselines.with_prior(baselines.vogn), GAUSSIAN),
    "IVON without noise": (
        baselines.with_prior(controls.without_noise),
        LARGER | PRIOR,
    ),
    "IVON with constant noise": (
        baselines.with_prior(controls.with_constant_noise),
        GAUSSIAN,
    ),
    "IVON with squared gradients": (
        baselines.with_prior(controls.squared_gradient),
        GAUSSIAN,
    ),
    "EVON": (baselines.with_prior(baselines.evon), GAUSSIAN),
    "IVON": (baselines.with_prior(baselines.ivon), GAUSSIAN),
}
OF_MATRICES = "Muon", "EVON"  # left out unless named
ALONE = ("EVON",)  # side by side, each step would calculate bases
POINTS = (
    "AdamW",
    "Muon",
    "AdamW stopped early",
    "SGD",
    "AdaHessian",
    "IVON without noise",
)
ENSEMBLES = {"SGD": "Deep ensemble", "IVON": "Multi-IVON"}
AT_MEAN = {"EVON": "EVON@mean", "IVON": "IVON@mean"}
ROWS = (*list(SYSTEMS)[:-1], *AT_MEAN.values(), "IVON", *ENSEMBLES.values())
SCORES = {
    "accuracy %": lambda probs, y: 100 * metrics.accuracy(probs, y),
    "top-5 %": lambda probs, y: 100 * metrics.accuracy(probs, y, k=5),
    "NLL": metrics.negative_log_likelihood,
    "ECE": metrics.expected_calibration_error,
    "Brier": metrics.brier_score,
}
DETECTION = {
    "FPR@95 %": "fpr_at_95_tpr",
    "detection error %": "detection_error",
    "AUROC %": "auroc",
    "AUPR-in %": "aupr_in",
    "AUPR-out %": "aupr_out",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    mnist: str = ""  # .npz with `images` and `labels`
    cifar: str = ""  # .npz as benchmarks/resnet20.py reads it
    full: int = 0  # 1: the paper's network and length for CIFAR-10
    epochs: int = 0  # 0: what the data set below has
    systems: str = ",".join(name for name in SYSTEMS if name not in OF_MATRICES)
    trials: Count = 16  # of each system
    seeds: Count = 5
    members: Count = 5  # of an ensemble
    tuning_seeds: int = 0  # 0: what the data set below has
    num_samples: Count = 64
    results: Results = "uncertainty.json"


class Task(NamedTuple):
    """Data, network and length of training."""

    train: tuple  # images (N, ...) and labels
    test: tuple
    size: int  # pixels on a side
    network: tuple  # init, features
    length: dict  # fields of Problem
    tuning_seeds: int


def digits_task(_config):
    """Take the first half of scikit-learn's digits to train, the second to test."""
    digits = load_digits()
    images = np.asarray(digits.images / 16, np.float32)
    half = len(images) // 2
    network = baselines.mlp((64, 128, 128, 10))
    length = dict(epochs=200, batch_size=50)
    train, test = ((images[part], digits.target[part]) for part in np.s_[:half, half:])
    return Task(train, test, 8, network, length, tuning_seeds=2)


def mnist_task(config):
    """Take the first 8,000 of MNIST's test images to train, the last 2,000 to test."""
    with np.load(config.mnist) as archive:
        images, labels = archive["images"], archive["labels"]
    images = np.asarray(images / 255, np.float32)
    network = baselines.mlp((784, 128, 128, 10))
    length = dict(epochs=15, batch_size=100)
    train, test = ((images[part], labels[part]) for part in np.s_[:8000, 8000:])
    return Task(train, test, 28, network, length, tuning_seeds=1)


def cifar_task(config):
    """Take CIFAR-10 and the paper's ResNet-20, or less of both."""
    pairs = resnet20.read_npz(config.cifar)
    rng = np.random.default_rng(0)  # the file may be sorted by class
    orders = [rng.permutation(len(labels)) for _, labels in pairs]
    if config.full:
        depth, width, sizes = 20, 16, (50_000, 10_000)
        length = dict(epochs=200, runs_at_once=1)
    else:
        depth, width, sizes = 8, 8, (2_000, 1_000)
        length = dict(epochs=10, runs_at_once=1)
    if jax.default_backend() == "cpu":
        length |= dict(steps_per_call=1)
    train, test = (
        (images[order[:n]], labels[order[:n]])
        for (images, labels), order, n in zip(pairs, orders, sizes, strict=True)
    )
    length |= dict(batch_size=50, augment=resnet20.augment)
    return Task(train, test, 32, resnet(depth, width), length, tuning_seeds=1)


def resnet(depth, width):
    """Return ``init`` and ``features`` of resnet20's network; dropout after blocks."""

    def create(key):
        model = ResNet(depth, width, 10, rngs=nnx.Rngs(params=key))
        return nnx.split(model, nnx.PathContains("head"), ...)

    graphdef, unused_head, _ = create(jax.random.key(0))

    def init(key):
        _, head, body = create(key)
        head = head["head"]
        return body, {"w": head["kernel"][...], "b": head["bias"][...]}

    def features(params, images, drop):
        model = nnx.merge(graphdef, unused_head, params[0])
        x = model.stem(normalize(images))
        for block in model.blocks.layers:
            x = drop(block(x))
        return x.mean(axis=(1, 2))

    return init, features


def photographs(size, shape, number):
    """Cut patches, (number, *shape), out of scikit-learn's photographs."""
    scale = max(2, 32 // size)  # pixels of the photograph for one of a patch
    rng = np.random.default_rng(0)
    patches = []
    for photo, _ in zip(itertools.cycle(load_sample_images().images), range(number)):
        rows, columns = (
            rng.integers(n - scale * size + 1) + np.arange(scale * size)
            for n in photo.shape[:2]
        )
        patch = photo[np.ix_(rows, columns)].reshape(size, scale, size, scale, 3)
        patches.append(patch.mean(axis=(1, 3)))
    patches = np.stack(patches)
    return patches if shape == (size, size, 3) else patches.mean(axis=-1) / 255


def make_problem(task, config, num_data, name=""):
    """Return the task with this many examples of it to train a system on."""
    init, features = task.network
    length = task.length | ({"epochs": config.epochs} if config.epochs else {})
    if name in ALONE:
        length |= {"runs_at_once": 1}
    return baselines.Problem(
        init=init,
        features=features,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        num_data=num_data,
        **length,
    )


def tune(study, name, task, config):
    """Return a system's best setting, and the seconds of a run."""
    settings, nll, seconds = validate(name, task, config)
    return settings[study.trials(name, settings, nll)], seconds


def validate(name, task, config):
    """Return settings, their NLL on the last third, and the seconds of a run."""
    system, ranges = SYSTEMS[name]
    settings = baselines.one_by_one(baselines.trials(ranges, config.trials))
    cut = 2 * len(task.train[1]) // 3
    problem = make_problem(task, config, cut, name)
    seeds = config.tuning_seeds or task.tuning_seeds
    keys = jax.random.split(jax.random.key(1000), (2, seeds))
    # The same keys for all settings: the same first weights and order of the images.
    train_keys, test_keys = keys[:, jnp.arange(seeds * len(settings)) % seeds]
    stack = baselines.stacked(settings, seeds)
    data = [jnp.asarray(array[:cut]) for array in task.train]
    runs = baselines.fit(
        system, problem, train_keys, stack, data, f"{name}, {len(test_keys)} trials"
    )
    samples = 1 if name in POINTS else config.num_samples
    images, labels = (jnp.asarray(array[cut:]) for array in task.train)
    arguments = system, problem, runs.state, test_keys, stack, images, samples
    probs = baselines.predict(*arguments)
    nll = jax.jit(jax.vmap(metrics.negative_log_likelihood, (0, None)))(probs, labels)
    nll = np.asarray(nll).reshape(len(settings), seeds).mean(axis=1)
    return settings, np.nan_to_num(nll, nan=np.inf), runs.seconds


def test(name, setting, task, config, images):
    """Train on all examples; return rows of probabilities (seeds, N, C) of `images`."""
    system, _ = SYSTEMS[name]
    problem = make_problem(task, config, len(task.train[1]), name)
    members = config.members if name in ENSEMBLES else 1
    keys = jax.random.split(jax.random.key(0), (2, config.seeds * members))
    stack = baselines.stacked([setting], keys.shape[1])
    data = [jnp.asarray(array) for array in task.train]
    runs = baselines.fit(system, problem, keys[0], stack, data, f"{name}, seeds")

    def predict(system, first, num_samples):
        some = jax.tree.map(lambda a: a[first], (runs.state, keys[1], stack))
        return baselines.predict(system, problem, *some, images, num_samples)

    singles, everyone = np.s_[::members], np.s_[:]
    if name in POINTS:
        rows = {name: predict(system, singles, 1)}
    else:
        rows = {name: predict(system, singles, config.num_samples)}
    if name in AT_MEAN:
        rows[AT_MEAN[name]] = predict(baselines.at_mean(system), singles, 1)
    if members > 1:
        samples = 1 if name in POINTS else -(-config.num_samples // members)
        probs = predict(system, everyone, samples)
        probs = probs.reshape(config.seeds, members, *probs.shape[1:])
        rows[ENSEMBLES[name]] = probs.mean(axis=1)
    return rows


def score(probs, labels, num_others):
    """Return the scores of both tables, (seeds,) each, the second's for every set."""
    inside, outside = jnp.split(probs, [len(labels)], axis=1)
    labels = jnp.asarray(labels)
    columns = {
        title: jax.jit(jax.vmap(metric, (0, None)))(inside, labels)
        for title, metric in SCORES.items()
    }
    # A score is high for what looks in domain.
    inside, *outside = (
        -entr(part).sum(axis=-1)
        for part in (inside, *jnp.split(outside, num_others, axis=1))
    )
    detect = jax.jit(jax.vmap(metrics.out_of_distribution))
    results = [detect(inside, part) for part in outside]
    return columns, [
        {title: 100 * result[key] for title, key in DETECTION.items()}
        for result in results
    ]


def differences(probs, labels):
    """Yield how much more NLL and accuracy IVON has than each other system."""
    labels = jnp.asarray(labels)

    def measures(probs):  # (seeds, N) each
        inside = probs[:, : len(labels)]
        return losses(inside, labels), right(inside, labels)

    ours = measures(probs["IVON"])
    for name in (name for name in ROWS if name in probs and name != "IVON"):
        pairs = zip(("NLL", "accuracy %"), ours, measures(probs[name]), strict=True)
        key, difference = jax.random.key(2), intervals.paired_mean
        yield {"IVON less": name} | {
            title: intervals.interval(key, difference, *pair).cell
            for title, *pair in pairs
        }


def main():
    """Tune, train, test and print."""
    config = flags.parse(Config, __doc__)
    make_task = mnist_task if config.mnist else digits_task
    task = (cifar_task if config.cifar else make_task)(config)
    images, labels = task.test
    others = {
        "turned": np.rot90(images, axes=(1, 2)),
        "photographs": photographs(task.size, images.shape[1:], len(images)),
    }
    images = np.concatenate([images, *others.values()]).astype(images.dtype)
    study = results.Study(config)
    seconds, probs, names = {}, {}, config.systems.split(",")
    for name in names:
        setting, duration = tune(study, name, task, config)
        rows = test(name, setting, task, config, images)
        probs |= rows
        seconds |= dict.fromkeys(rows, duration)
        if ENSEMBLES.get(name) in rows:
            seconds[ENSEMBLES[name]] *= config.members
    scores = {
        name: score(probs[name], labels, len(others)) for name in ROWS if name in probs
    }

    times = {name: seconds[name] / seconds[names[0]] for name in scores}
    rows = [
        {"system": name, **inside, f"time / {names[0]}": times[name]}
        for name, (inside, _) in scores.items()
    ]
    study.table("in domain", rows, {f"time / {names[0]}": 1})
    for i, other in enumerate(others):
        rows = [{"system": name, **outside[i]} for name, (_, outside) in scores.items()]
        study.table(other, rows)
    if "IVON" in probs:
        rows = list(differences(probs, labels))
        study.table("IVON less another", rows, {"NLL": 3, "accuracy %": 2})


if __name__ == "__main__":
    main()
