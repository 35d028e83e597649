"""CIFAR-10 with ResNet-20: the paper's first table, as far as minutes on a GPU go.

    python benchmarks/cifar.py --data cifar10_jpeg.npz --minutes 9
    python benchmarks/cifar.py --data cifar10_jpeg.npz --pilot_epochs 10   # trials
    python benchmarks/cifar.py --depth 2 --width 2 --epochs 1 --seeds 2 \
        --num_samples 2 --batch_size 90 --systems AdamW,IVON     # a look, on noise

The network and the augmentation are resnet20.py's, the paper's, with batches of 200
instead of 50 and fewer epochs; `--network resnet18` takes another one of zoo/. All
train on nine tenths of the training images. Warm-up is the same share of the run as in
the paper, and 1 - b2 is 2 over the number of steps, so that as much of h_0 is left.

The settings of each system are the best of six trials of ten epochs on an H200
(results/cifar_trials.json): the paper's learning rate times 1, 2 and 4, and two weight
decays, scored by the NLL of the mean on the last tenth of the training images. For all
but SGD that is the largest rate. `--pilot_epochs` has such trials again, and does
nothing else.

"no noise" is IVON with gradients at the mean and h left at h_0: momentum, weight decay
and learning rate are IVON's, the posterior is taken out. "constant noise" is IVON with
h left at h_0; "one variance" predicts with IVON's mean and one variance for all
weights, of the same entropy. "T" marks predictions whose temperature is chosen on the
other half of the test images. "all" averages the probabilities of all seeds, which for
IVON is Multi-IVON. Differences have intervals over seeds and images.
Shifts are those of ablations.py, of each colour.

The runs of a system are one program, in turns, as GPUs are slow with convolutions side
by side; all steps of an epoch are one scan. `--minutes` bounds the whole run: as many
epochs as fit are trained, at most `--epochs`. What was measured is in `--results` at
once, also of a run that is stopped.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resnet20
import zoo
from ablations import SHIFTS
from common import baselines, controls, flags, intervals, results
from common.flags import Count, Positive, Results
from common.scores import losses, over_seeds, right, scores
from flax import nnx
from tqdm import tqdm
from zoo.resnet import ResNet

import ivon_jax
from ivon_jax.calibration import temperature_scaling

FACTORS = 1.0, 2.0, 4.0  # of the paper's learning rates, which are of batches of 50
DECAYS = 2e-4, 1e-3
ivon = baselines.with_prior(functools.partial(baselines.ivon, hess_init=0.5))
without_noise = baselines.with_prior(controls.without_noise)
constant_noise = baselines.with_prior(
    functools.partial(controls.with_constant_noise, hess_init=0.5)
)
bsam = baselines.with_prior(functools.partial(baselines.bsam, rho=0.05, damping=0.1))
SYSTEMS = {  # the system, the paper's rate, weight decays, and those of the best trial
    "AdamW": (baselines.adamw, 0.002, (2e-4, 0.1), (0.008, 0.1)),
    "SGD": (baselines.with_prior(baselines.sgd), 0.1, DECAYS, (0.2, 2e-4)),
    "IVON": (ivon, 0.2, DECAYS, (0.8, 2e-4)),
    "no noise": (without_noise, 0.2, DECAYS, (0.8, 1e-3)),
    "constant noise": (constant_noise, 0.2, DECAYS, (0.8, 1e-3)),
    "bSAM": (bsam, 0.2, DECAYS, (0.8, 1e-3)),
}
PUBLISHED = {  # accuracy and NLL after 200 epochs (Table 2)
    "AdamW": (90.04, 0.589),
    "SGD": (91.86, 0.288),
    "IVON@mean": (92.53, 0.256),
    "IVON": (92.71, 0.219),
}
RESERVED = 10  # epochs for the predictions
SOME = 100.0  # steps, where their number is of no effect
NETWORKS = "resnet20", "resnet18", "preresnet110", "densenet121", "alexnet"
CHUNK = 500  # images in a prediction
DIGITS = {"accuracy %": 2, "NLL": 4, "ECE": 4, "Brier": 4}


def check_systems(names):
    """Reject what is no system."""
    for name in names.split(","):
        if name not in SYSTEMS:
            raise ValueError(f"must be of {', '.join(SYSTEMS)}")


def check_network(name):
    """Reject what is no network for images of 32 pixels."""
    if name not in NETWORKS:
        raise ValueError(f"must be one of {', '.join(NETWORKS)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = "synthetic"  # an npz file as benchmarks/resnet20.py reads it
    systems: Annotated[str, check_systems] = "AdamW,SGD,IVON,no noise"
    pilot_epochs: Annotated[int, flags.between(0)] = 0  # of trials, and nothing else
    epochs: Count = 60  # at most
    seeds: Count = 3
    minutes: Positive = 60.0  # for everything
    batch_size: Count = 200
    network: Annotated[str, check_network] = "resnet20"
    depth: Count = 20  # of a ResNet-20
    width: Count = 16
    num_samples: Count = 64
    eval_every: Count = 4  # epochs
    results: Results = "cifar.json"


@dataclasses.dataclass(frozen=True)
class Problem(baselines.Problem):
    """What to learn, with a number of steps that may be traced.

    One program is for a first epoch, which is timed, and for as many as then fit.
    """

    graphdef: Any = None
    length: Any = None

    @property
    def num_steps(self):
        """Steps of a run."""
        return self.length

    def apply(self, params, x, drop=None):
        """Map images to logits."""
        del drop
        return nnx.merge(self.graphdef, params)(x)

    def schedule(self, peak):
        """Warm up in 2.5 % of the steps, then a cosine to zero."""

        def at(step):
            begin = self.length / 40
            progress = jnp.clip((step - begin) / (self.length - begin), 0.0, 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            return peak * jnp.minimum((step + 1.0) / (begin + 1.0), cosine)

        return at


def create_network(config, rngs):
    """Return a ResNet of this size, or another of the paper's networks."""
    if config.network == "resnet20":
        return ResNet(config.depth, config.width, 10, rngs)
    return zoo.create(config.network, 10, rngs)


def in_turns(fn):
    """As `jax.vmap` of all arguments, but one after the other."""
    return lambda *args: jax.lax.map(lambda xs: fn(*xs), args)


class Runs:
    """The programs of one system: runs along the first axis of everything."""

    def __init__(self, name, num_data, config):
        self.name, self.num_data, self.config = name, num_data, config
        system, rate, decays, chosen = SYSTEMS[name]
        self.prior = "weight_decay" if name == "AdamW" else "prior_precision"
        self.scale = 1.0 if name == "AdamW" else num_data
        rates = [rate * factor for factor in FACTORS]
        self.trials = [*itertools.product(rates, decays)]
        self.chosen = self.setting(*chosen)
        self.rows = self._rows(system, config.num_samples)
        self.graphdef = nnx.graphdef(create_network(config, nnx.Rngs(0)))
        self.system = system
        self.start = jax.jit(in_turns(self._start))
        self.epoch = jax.jit(self._epoch, donate_argnums=0)
        self.probs = jax.jit(self._probs, static_argnums=(0, 1))

    def _rows(self, system, num_samples):
        """Return {row of the table: (how to predict, draws)}; the mean's is first."""
        mean = baselines.at_mean(system)
        if self.name in ("AdamW", "SGD", "no noise"):
            return {self.name: (system, 1)}
        rows = {f"{self.name}@mean": (mean, 1), self.name: (system, num_samples)}
        if self.name == "IVON":
            other = controls.at_constant_precision(system)
            rows["IVON, one variance"] = (other, num_samples)
        return rows

    def setting(self, learning_rate, weight_decay):
        """Return hyperparameters as the system names them."""
        prior = {self.prior: self.scale * weight_decay}
        return {"learning_rate": learning_rate, **prior}

    def problem(self, length):
        """Return what to learn in that many steps."""
        return Problem(
            init=lambda key: nnx.state(create_network(self.config, nnx.Rngs(key))),
            features=None,
            loss=optax.softmax_cross_entropy_with_integer_labels,
            num_data=self.num_data,
            batch_size=self.config.batch_size,
            epochs=0,
            graphdef=self.graphdef,
            length=length,
        )

    def _start(self, key, setting):
        problem = self.problem(SOME)
        return self.system(problem, **setting).init(problem.init(key))

    def _epoch(self, states, keys, settings, epoch, length, data):
        """Train all runs for an epoch."""
        images, labels = data
        size = self.config.batch_size

        def one_run(state, key, setting):
            run = self.system(self.problem(length), **setting)
            order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
            order = jax.random.permutation(order_key, self.num_data)
            order = order[: self.num_data // size * size].reshape(-1, size)

            def step(state, xs):
                indices, key = xs
                augment_key, noise_key = jax.random.split(key)
                batch = resnet20.augment(augment_key, images[indices]), labels[indices]
                return run.step(noise_key, state, *batch), None

            keys = jax.random.split(step_key, len(order))
            return jax.lax.scan(step, state, (order, keys))[0]

        return in_turns(one_run)(states, keys, settings)

    def _probs(self, system, num_samples, states, keys, settings, images):
        """Average the probabilities (N, C) of each run over draws."""

        def one_run(state, key, setting):
            outputs = system(self.problem(SOME), **setting).outputs

            def add(total, key):
                return total + nnx.softmax(outputs(key, state, images)), None

            keys = jax.random.split(key, num_samples)
            total, _ = jax.lax.scan(add, jnp.zeros((len(images), 10)), keys)
            return total / num_samples

        return in_turns(one_run)(states, keys, settings)

    def predict(self, row, states, settings, images):
        """Return probabilities (runs, N, C), with the same draws for all images."""
        system, num_samples = self.rows[row]
        count = len(jax.tree.leaves(settings)[0])
        keys = jax.random.split(jax.random.key(3), count)
        parts = (images[i : i + CHUNK] for i in range(0, len(images), CHUNK))
        probs = [
            self.probs(system, num_samples, states, keys, settings, x) for x in parts
        ]
        return jnp.concatenate(probs, axis=1)


def train(runs, key, settings, epochs, data, bar, keep=lambda _epoch, _states: None):
    """Train all runs; return their states. `keep` sees them after some epochs."""
    init_key, train_key = jax.random.split(key)
    count = len(jax.tree.leaves(settings)[0])
    states = runs.start(jax.random.split(init_key, count), settings)
    keys = jax.random.split(train_key, count)
    length = float(epochs * (runs.num_data // runs.config.batch_size))
    for epoch in range(epochs):
        states = runs.epoch(states, keys, settings, epoch, length, data)
        jax.block_until_ready(states)
        bar.update()
        if epoch + 1 == epochs or (epoch + 1) % runs.config.eval_every == 0:
            keep(epoch + 1, states)
    return states


def temper(probs, labels):
    """Scale logits by the temperature that is best on the other half of the images."""
    odd = jnp.arange(len(labels)) % 2 == 1
    logits = jnp.log(jnp.maximum(probs, 1e-30))
    chosen = jnp.where(
        odd,
        temperature_scaling(logits, labels, where=~odd),
        temperature_scaling(logits, labels, where=odd),
    )
    return jax.nn.softmax(logits / chosen[:, None])


def load(config):
    """Return training and test images with labels."""
    if config.data == "synthetic":
        splits = resnet20.synthetic(1000), resnet20.synthetic(500)
    else:
        splits = resnet20.read_npz(config.data)
    for images, labels in splits:  # the file is sorted by class
        order = np.random.default_rng(0).permutation(len(labels))
        yield np.asarray(images)[order], np.asarray(labels, np.int32)[order]


def shifted(images):
    """Return {(kind, severity): the first images}, with each colour shifted alike."""
    count, height, width, colours = images[:CHUNK].shape
    planes = np.moveaxis(images[:CHUNK] / 255, -1, 1).reshape(-1, height, width)

    def colourful(planes):
        planes = planes.reshape(count, colours, height, width)
        return np.moveaxis(255 * np.clip(planes, 0.0, 1.0), 1, -1).astype(np.uint8)

    return {
        (kind, severity): colourful(shift(planes, severity))
        for kind, shift in SHIFTS.items()
        for severity in range(1, 6)
    }


class Report:
    """Tables of all systems so far; each is kept anew when one more comes."""

    def __init__(self, config, labels, shifts):
        self.kept, self.labels, self.shifts = results.Study(config), labels, shifts
        self.lock, self.logs, self.probs = threading.Lock(), {}, {}

    def log(self, name, entry):
        """Keep the scores after an epoch."""
        with self.lock:
            self.logs.setdefault(name, []).append(entry)
            self.kept.curves("by epoch", self.logs)

    def add(self, probs, states):
        """Keep the predictions of a system, and where its h went."""
        with self.lock:
            self.probs |= probs
            self.kept.table("test", [*self._test()], DIGITS)
            self.kept.table("shifted", [*self._shifted()], DIGITS)
            if "IVON" in probs:
                self.kept.table("quantiles of h over the weights", [spread(states)])

    def compare(self):
        """Keep the differences between IVON and the others."""
        if "IVON" in self.probs:
            digits = {"NLL": 4, "accuracy %": 2}
            self.kept.table("IVON less another", [*self._differences()], digits)

    def _test(self):
        count = len(self.labels)
        for name, probs in self.probs.items():
            probs = probs[:, :count]
            average = probs.mean(axis=0)
            some = {
                "": over_seeds([scores(p, self.labels) for p in probs]),
                "T": over_seeds(
                    [scores(temper(p, self.labels), self.labels) for p in probs]
                ),
                "all": scores(average, self.labels),
                "all, T": scores(temper(average, self.labels), self.labels),
            }
            for variant, columns in some.items():
                published = PUBLISHED.get(name) if not variant else None
                names = "paper, accuracy %", "paper, NLL"
                paper = zip(names, published or (None, None), strict=True)
                title = f"{name}, {variant}" if variant else name
                yield {"system": title, **columns, **dict(paper)}

    def _shifted(self):
        for i, (kind, severity) in enumerate(self.shifts):
            first = len(self.labels) + i * CHUNK
            for name, probs in self.probs.items():
                some = probs[:, first : first + CHUNK]
                row = over_seeds([scores(p, self.labels[:CHUNK]) for p in some])
                yield {"shift": kind, "severity": severity, "system": name, **row}

    def _differences(self):
        count = len(self.labels)

        def measures(probs):
            return losses(probs, self.labels), right(probs, self.labels)

        def variants(probs):
            yield "", probs
            yield ", T", jnp.stack([temper(p, self.labels) for p in probs])

        key, statistic = jax.random.key(2), intervals.paired_mean
        ours = measures(jnp.asarray(self.probs["IVON"][:, :count]))
        for name, probs in self.probs.items():
            for variant, other in variants(jnp.asarray(probs[:, :count])):
                if name + variant == "IVON":
                    continue
                pairs = zip(("NLL", "accuracy %"), ours, measures(other), strict=True)
                yield {"IVON less": name + variant} | {
                    title: intervals.interval(key, statistic, *pair).cell
                    for title, *pair in pairs
                }


def spread(states):
    """Return quantiles of h over the weights of the first run: did it learn?"""
    state = jax.tree.map(lambda x: x[0], ivon_jax.find_states(states[1])[0])
    hess = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.hess)])
    levels = 0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0
    return dict(zip(map(str, levels), np.quantile(hess, levels).tolist(), strict=True))


def main():
    """Have trials, or train with the settings that others chose."""
    config, start = flags.parse(Config, __doc__), time.perf_counter()
    (images, labels), test = load(config)
    cut = len(labels) // 10 * 9
    data = jnp.asarray(images[:cut]), jnp.asarray(labels[:cut])
    systems = [Runs(name, cut, config) for name in config.systems.split(",")]
    if config.pilot_epochs:
        validation = images[cut:], jnp.asarray(labels[cut:])
        pilot(systems, data, validation, config)
    else:
        evaluate(systems, data, test, config, start)


def together(fn, *args):
    """Call ``fn`` for all systems at once: compiling takes longer than training."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(fn, *args))


def pilot(systems, data, validation, config):
    """Have the trials of all systems."""
    study, lock = results.Study(config), threading.Lock()

    def run(runs):
        settings = baselines.stacked([runs.setting(*t) for t in runs.trials], 1)
        args = settings, config.pilot_epochs, data, bar
        states = train(runs, jax.random.key(1), *args)
        probs = runs.predict(next(iter(runs.rows)), states, settings, validation[0])
        nll = [scores(p, validation[1])["NLL"] for p in probs]
        with lock:
            names = "learning rate", "weight decay"
            trials = [dict(zip(names, t, strict=True)) for t in runs.trials]
            study.trials(runs.name, trials, nll)

    total = config.pilot_epochs * len(systems)
    with tqdm(total=total, unit="epoch", leave=False) as bar:
        together(run, systems)


def evaluate(systems, data, test, config, start):
    """Train with other seeds, and keep the scores on the test images."""
    settings = [baselines.stacked([runs.chosen], config.seeds) for runs in systems]
    shifts = shifted(test[0])
    report = Report(config, jnp.asarray(test[1]), shifts)
    everything = np.concatenate([test[0], *shifts.values()])

    def first(runs, setting):
        train(runs, jax.random.key(0), setting, 1, data, bar)

    def run(runs, setting):
        def keep(epoch, states):
            probs = runs.predict(next(iter(runs.rows)), states, setting, test[0])
            row = over_seeds([scores(p, report.labels) for p in probs])
            report.log(runs.name, {"epoch": epoch, **row})

        states = train(runs, jax.random.key(2), setting, epochs, data, bar, keep)
        probs = {
            row: np.asarray(runs.predict(row, states, setting, everything))
            for row in runs.rows
        }
        report.add(probs, states)

    with tqdm(total=2 * len(systems), unit="epoch", leave=False) as bar:
        together(first, systems, settings)  # compiles
        begin = time.perf_counter()
        together(first, systems, settings)
    seconds = time.perf_counter() - begin
    left = 60 * config.minutes - (time.perf_counter() - start)
    epochs = int(np.clip(left / seconds - RESERVED, 1, config.epochs))
    report.kept.table("length", [{"epochs": epochs, "s / epoch": seconds}])
    with tqdm(total=epochs * len(systems), unit="epoch", leave=False) as bar:
        together(run, systems, settings)
    report.compare()


if __name__ == "__main__":
    main()
