"""CIFAR-10 with ResNet-20: the paper's first table, as far as minutes on a GPU go.

    python benchmarks/cifar.py --data cifar10_jpeg.npz           # 8 min on an H200
    python benchmarks/cifar.py --depth 2 --width 2 --epochs 1 --pilot_epochs 1 \
        --num_samples 2 --batch_size 90 --systems AdamW,IVON     # a look, on noise

The network and the augmentation are resnet20.py's, the paper's, with batches of 200
instead of 50 and fewer epochs; `--network resnet18` takes another one of zoo/. All
train on nine tenths of the training images. Warm-up is the same share of the run as in
the paper, and 1 - b2 is 2 over the number of steps, so that as much of h_0 is left.
Each system first has six trials of `--pilot_epochs`: the paper's learning rate times 1,
2 and 4, and two weight decays. That of the least NLL of its mean on the last tenth is
the one of the table, with other seeds.

"no noise" is IVON with gradients at the mean and h left at h_0: momentum, weight decay
and learning rate are IVON's, the posterior is taken out. "constant noise" is IVON with
h left at h_0; "one variance" predicts with IVON's mean and one variance for all
weights, of the same entropy. "T" marks predictions whose temperature is chosen on the
other half of the test images. "all" averages the probabilities of all seeds, which for
IVON is Multi-IVON. Differences have intervals over seeds and images.

The runs of a system are one program, side by side; all steps of an epoch are one scan.
Convolutions are matrix products, in bfloat16 (zoo/layers.py says why); parameters,
normalisations, the loss and optimizers are float32. `--minutes` bounds the whole run:
as many epochs as fit are trained, at most `--epochs`. What was measured is in
`--results` at once, also of a run that is stopped.
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
from common import baselines, controls, flags, intervals, results
from common.flags import Count, Positive, Results
from common.scores import losses, over_seeds, right, scores
from flax import nnx
from scipy import ndimage
from tqdm import tqdm
from zoo.layers import by_products
from zoo.resnet import ResNet

import ivon_jax
from ivon_jax.calibration import temperature_scaling

FACTORS = 1.0, 2.0, 4.0  # of the paper's learning rates, which are of batches of 50
ivon = baselines.with_prior(functools.partial(baselines.ivon, hess_init=0.5))
constant_noise = functools.partial(controls.with_constant_noise, hess_init=0.5)
bsam = functools.partial(baselines.bsam, rho=0.05, damping=0.1)
SYSTEMS = {  # name: the system, its learning rate, and weight decays
    "AdamW": (baselines.adamw, 0.002, (2e-4, 0.1)),
    "SGD": (baselines.with_prior(baselines.sgd), 0.1, (2e-4, 1e-3)),
    "IVON": (ivon, 0.2, (2e-4, 1e-3)),
    "no noise": (baselines.with_prior(controls.without_noise), 0.2, (2e-4, 1e-3)),
    "constant noise": (baselines.with_prior(constant_noise), 0.2, (2e-4, 1e-3)),
    "bSAM": (baselines.with_prior(bsam), 0.2, (2e-4, 1e-3)),
}
ONE_VARIANCE = "IVON, one variance"
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
SHIFTS = {  # of images in [0, 255], by severity 1 to 5
    "noise": lambda x, s, rng: x + rng.normal(0.0, 6.0 * s, x.shape),
    "blur": lambda x, s, _: ndimage.gaussian_filter(x, (0, 0.3 * s, 0.3 * s, 0)),
}
DIGITS = {"accuracy %": 2, "NLL": 4, "ECE": 4, "Brier": 4}


def check_network(name):
    """Reject what is no network for images of 32 pixels."""
    if name not in NETWORKS:
        raise ValueError(f"must be one of {', '.join(NETWORKS)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = "synthetic"  # an npz file as benchmarks/resnet20.py reads it
    systems: str = ",".join(SYSTEMS)
    epochs: Count = 60  # at most
    pilot_epochs: Count = 10
    minutes: Positive = 60.0  # for everything
    batch_size: Count = 200
    network: Annotated[str, check_network] = "resnet20"
    depth: Count = 20  # of a ResNet-20
    width: Count = 16
    num_samples: Count = 64
    eval_every: Count = 4  # epochs
    predictions: str = ""  # an npz file to keep all probabilities in
    results: Results = "cifar.json"


@dataclasses.dataclass(frozen=True)
class Problem(baselines.Problem):
    """What to learn, with a number of steps that may be traced."""

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
        model = ResNet(config.depth, config.width, 10, rngs)
    else:
        model = zoo.create(config.network, 10, rngs)
    return by_products(model, jnp.bfloat16)


class Runs:
    """The programs of one system: runs along the first axis of everything."""

    def __init__(self, name, num_data, config):
        self.name, self.num_data, self.config = name, num_data, config
        system, rate, decays = SYSTEMS[name]
        self.prior = "weight_decay" if name == "AdamW" else "prior_precision"
        scale = 1.0 if name == "AdamW" else num_data
        self.trials = [
            {"learning_rate": rate * factor, self.prior: scale * decay}
            for factor, decay in itertools.product(FACTORS, decays)
        ]
        self.rows = self._rows(system, config.num_samples)
        self.graphdef = nnx.graphdef(create_network(config, nnx.Rngs(0)))
        self.system = system
        self.start = jax.jit(jax.vmap(self._start))
        self.epoch = jax.jit(
            jax.vmap(self._epoch, in_axes=(0, 0, 0, None, None, None)), donate_argnums=0
        )
        self.probs = jax.jit(
            jax.vmap(self._probs, (None, None, 0, 0, 0, None)), static_argnums=(0, 1)
        )

    def _rows(self, system, num_samples):
        """Return {row of the table: (how to predict, draws)}; the mean's is first."""
        mean = baselines.at_mean(system)
        if self.name in ("AdamW", "SGD", "no noise"):
            return {self.name: (system, 1)}
        rows = {f"{self.name}@mean": (mean, 1), self.name: (system, num_samples)}
        if self.name == "IVON":
            other = controls.at_constant_precision(system)
            rows[ONE_VARIANCE] = (other, num_samples)
        return rows

    def describe(self, setting):
        """Return what a table says of a setting."""
        decay = setting[self.prior] / (1.0 if self.name == "AdamW" else self.num_data)
        return {"learning rate": setting["learning_rate"], "weight decay": decay}

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

    def _epoch(self, state, key, setting, epoch, length, data):
        """Train for an epoch."""
        images, labels = data
        run = self.system(self.problem(length), **setting)
        order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
        size = self.config.batch_size
        order = jax.random.permutation(order_key, self.num_data)
        order = order[: self.num_data // size * size].reshape(-1, size)

        def step(state, xs):
            indices, key = xs
            augment_key, noise_key = jax.random.split(key)
            batch = resnet20.augment(augment_key, images[indices]), labels[indices]
            return run.step(noise_key, state, *batch), None

        keys = jax.random.split(step_key, len(order))
        return jax.lax.scan(step, state, (order, keys))[0]

    def _probs(self, system, num_samples, state, key, setting, images):
        """Average the probabilities (N, C) over draws."""
        outputs = system(self.problem(SOME), **setting).outputs

        def add(total, key):
            return total + nnx.softmax(outputs(key, state, images)), None

        keys = jax.random.split(key, num_samples)
        total, _ = jax.lax.scan(add, jnp.zeros((len(images), 10)), keys)
        return total / num_samples

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


def train(runs, key, settings, epochs, data, test, bar, keep):
    """Train all runs; return their states, and the seconds of the fastest epoch.

    Every few epochs `keep` gets the scores of the means on `test`.
    """
    init_key, train_key = jax.random.split(key)
    count = len(jax.tree.leaves(settings)[0])
    states = runs.start(jax.random.split(init_key, count), settings)
    keys = jax.random.split(train_key, count)
    length = float(epochs * (runs.num_data // runs.config.batch_size))
    fastest = float("inf")
    for epoch in range(epochs):
        begin = time.perf_counter()
        states = runs.epoch(states, keys, settings, epoch, length, data)
        jax.block_until_ready(states)
        fastest = min(fastest, time.perf_counter() - begin)
        bar.update()
        if epoch + 1 == epochs or (epoch + 1) % runs.config.eval_every == 0:
            probs = runs.predict(next(iter(runs.rows)), states, settings, test[0])
            row = over_seeds([scores(p, test[1]) for p in probs])
            keep({"epoch": epoch + 1, **row})
    return states, fastest


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
    """Return {(kind, severity): the first images, with noise or blur}."""
    images = images[:CHUNK].astype(np.float32)
    return {
        (kind, severity): np.clip(
            shift(images, severity, np.random.default_rng(0)), 0.0, 255.0
        ).astype(np.uint8)
        for kind, shift in SHIFTS.items()
        for severity in range(1, 6)
    }


class Report:
    """Tables of all systems so far; each is kept anew when one more comes."""

    def __init__(self, config, labels, shifts):
        self.kept, self.labels, self.shifts = results.Study(config), labels, shifts
        self.lock, self.logs, self.probs = threading.Lock(), {}, {}
        self.file = config.predictions

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
            if self.file:
                np.savez(self.file, **self.probs)

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
    """Choose the settings, train, and keep what comes."""
    config, start = flags.parse(Config, __doc__), time.perf_counter()
    (images, labels), test = load(config)
    shifts = shifted(test[0])
    report = Report(config, jnp.asarray(test[1]), shifts)
    everything = np.concatenate([test[0], *shifts.values()])
    cut = len(labels) // 10 * 9
    data = jnp.asarray(images[:cut]), jnp.asarray(labels[:cut])
    validation = images[cut:], jnp.asarray(labels[cut:])
    systems = [Runs(name, cut, config) for name in config.systems.split(",")]

    def stacked(settings, repeats):
        return baselines.stacked(settings, repeats)

    def pilot(runs):
        log, settings = [], stacked(runs.trials, 1)
        _, seconds = train(
            runs, jax.random.key(1), settings, config.pilot_epochs, data, validation,
            bar, log.append,
        )  # fmt: skip
        settings = [runs.describe(setting) for setting in runs.trials]
        with report.lock:
            best = report.kept.trials(runs.name, settings, log[-1]["NLL"])
        return runs.trials[best], seconds

    def final(runs, setting):
        settings = stacked([setting], len(runs.trials))
        states, _ = train(
            runs, jax.random.key(2), settings, epochs, data, test, bar,
            functools.partial(report.log, runs.name),
        )  # fmt: skip
        probs = {
            row: np.asarray(runs.predict(row, states, settings, everything))
            for row in runs.rows
        }
        report.add(probs, states)

    def compile_all(runs):
        settings = stacked(runs.trials, 1)
        args = settings, 1, data, validation, bar, lambda _: None
        train(runs, jax.random.key(0), *args)

    # Together, because compiling takes longer than training.
    with concurrent.futures.ThreadPoolExecutor(len(systems)) as pool:
        total = (1 + config.pilot_epochs) * len(systems)
        with tqdm(total=total, unit="epoch", leave=False) as bar:
            list(pool.map(compile_all, systems))
            print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
            chosen, seconds = zip(*pool.map(pilot, systems), strict=True)
        left = 60 * config.minutes - (time.perf_counter() - start)
        epochs = int(np.clip(left / max(seconds) - RESERVED, 1, config.epochs))
        report.kept.table("length", [{"epochs": epochs, "s / epoch": max(seconds)}])
        with tqdm(total=epochs * len(systems), unit="epoch", leave=False) as bar:
            list(pool.map(final, systems, chosen))
    report.compare()


if __name__ == "__main__":
    main()
