"""CIFAR-10 with ResNet-20: the paper's first table, as far as minutes on a GPU go.

    python benchmarks/cifar.py --data cifar10_jpeg.npz           # 8 min on an H200
    python benchmarks/cifar.py --depth 2 --width 2 --epochs 1 --pilot_epochs 1 \
        --num_samples 2 --batch_size 90 --systems IVON           # a look, on noise

The network, the augmentation and the settings are resnet20.py's, the paper's, with
batches of 200 instead of 50 and fewer epochs; `--network resnet18` takes another one of
zoo/. Warm-up is the same share of the run, and 1 - b2 is 2 over the number of steps, so
that as much of h_0 is left at the end as in the paper. All train on nine tenths of the
training images. Each system first does so for `--pilot_epochs` with the paper's
learning rate times 1, 2 and 4; the rate with the least NLL on the last tenth is that of
the table, with other seeds.

The members (learning rates or seeds) of a system are one program, in turns, as grouped
convolutions are slow (`--vectorize 1`); all steps of an epoch are one scan. "frozen" is
IVON without noise and with h left at h_0: momentum, weight decay and learning rate are
IVON's, the posterior is taken out. "T" marks predictions whose temperature is chosen on
the other half of the test images. "x3" averages the probabilities of the three seeds,
which for IVON is Multi-IVON.

`--minutes` bounds the whole run: as many epochs as fit are trained, at most `--epochs`.
What was measured is in `--results` at once, also of a run that is stopped. On one
H200 an epoch of all four systems, three networks each, takes ten seconds.
"""

import concurrent.futures
import dataclasses
import threading
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resnet20
import zoo
from common import flags, results
from common.flags import Count, Positive, Results
from common.scores import over_seeds, scores
from flax import nnx
from tqdm import tqdm
from zoo.resnet import ResNet

import ivon_jax
from ivon_jax.calibration import temperature_scaling

PAPER = {"AdamW": 0.002, "SGD": 0.1, "IVON": 0.2, "frozen": 0.2}  # rates, batches of 50
PUBLISHED = {  # accuracy and NLL after 200 epochs (Table 2)
    "AdamW": (90.04, 0.589),
    "SGD": (91.86, 0.288),
    "IVON@mean": (92.53, 0.256),
    "IVON": (92.71, 0.219),
}
FACTORS = (1.0, 2.0, 4.0)
RESERVE = 90  # seconds for the predictions
NETWORKS = "resnet20", "resnet18", "preresnet110", "densenet121", "alexnet"
DIGITS = {"accuracy %": 2, "NLL": 4, "ECE": 4, "Brier": 4}


def check_network(name):
    """Reject what is no network for images of 32 pixels."""
    if name not in NETWORKS:
        raise ValueError(f"must be one of {', '.join(NETWORKS)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = "synthetic"  # an npz file as benchmarks/resnet20.py reads it
    systems: str = "AdamW,SGD,IVON,frozen"
    epochs: Count = 40  # at most
    pilot_epochs: Count = 8
    minutes: Positive = 60.0  # for everything
    warmup: float = 0.025  # share of the steps
    batch_size: Count = 200
    network: Annotated[str, check_network] = "resnet20"
    depth: Count = 20  # of a ResNet-20
    width: Count = 16
    hess_init: Positive = 0.5
    weight_decay: float = 2e-4
    num_samples: Count = 64
    vectorize: int = 0  # 0: one member after the other, in a loop
    eval_every: Count = 4  # epochs
    results: Results = "cifar.json"


def create_network(config, rngs):
    """Return a ResNet of this size, or another of the paper's networks."""
    if config.network == "resnet20":
        return ResNet(config.depth, config.width, 10, rngs)
    return zoo.create(config.network, 10, rngs)


def create_optimizer(system, schedule, b2, num_train, config):
    """Return the optimizer of a system; its hyperparameters may be traced."""
    if system == "AdamW":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    if system == "SGD":
        l2 = optax.add_decayed_weights(config.weight_decay)
        return optax.chain(l2, optax.sgd(schedule, momentum=0.9))
    return ivon_jax.ivon(
        schedule,
        ess=num_train,
        hess_init=config.hess_init,
        b2=b2,
        weight_decay=config.weight_decay,
    )


def warmup_cosine(peak, num_steps, warmup):
    """Return a schedule whose peak and length may be traced."""

    def schedule(step):
        begin = warmup * num_steps
        progress = jnp.clip((step - begin) / (num_steps - begin), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * jnp.minimum((step + 1.0) / (begin + 1.0), cosine)

    return schedule


class Study:
    """The programs of one system: members along the first axis of everything."""

    def __init__(self, system, graphdef, config):
        self.system, self.graphdef, self.config = system, graphdef, config
        self.epoch = jax.jit(self._epoch, donate_argnums=0)
        self.mean_probs = jax.jit(self._mean_probs)
        self.sampled_probs = jax.jit(self._sampled_probs)

    def members(self, fn, *args):
        """Map over members, all at once or one after the other."""
        if self.config.vectorize:
            return jax.vmap(fn)(*args)
        return jax.lax.map(lambda xs: fn(*xs), args)

    def init(self, keys, num_train):
        """Return parameters and optimizer state of each member."""

        def one(key):
            config = self.config
            model = create_network(config, nnx.Rngs(key))
            params = nnx.state(model)
            tx = create_optimizer(self.system, lambda _: 0.0, 0.5, num_train, config)
            return params, tx.init(params)

        return jax.jit(jax.vmap(one))(keys)

    def _epoch(self, states, keys, peaks, epoch, num_steps, data):
        """Train for an epoch; return the states and the mean losses."""
        config, (images, labels) = self.config, data
        num_train, size = len(labels), config.batch_size
        schedules = [num_steps, config.warmup]

        def one(state, key, peak):
            schedule = warmup_cosine(peak, *schedules)
            b2 = 1.0 - 2.0 / num_steps
            tx = create_optimizer(self.system, schedule, b2, num_train, config)
            key = jax.random.fold_in(key, epoch)
            order_key, step_key = jax.random.split(key)
            order = jax.random.permutation(order_key, num_train)
            order = order[: num_train // size * size].reshape(-1, size)

            def step(state, xs):
                indices, key = xs
                augment_key, noise_key = jax.random.split(key)
                batch = resnet20.augment(augment_key, images[indices]), labels[indices]
                return self._step(tx, state, batch, noise_key)

            keys = jax.random.split(step_key, len(order))
            state, losses = jax.lax.scan(step, state, (order, keys))
            return state, losses.mean()

        return self.members(one, states, keys, peaks)

    def _step(self, tx, state, batch, key):
        params, opt_state = state
        theta, extra = params, {}
        if self.system == "IVON":
            theta = ivon_jax.sample(key, params, opt_state)
            extra = {"sample": theta}
        if self.system == "frozen":
            extra = {"hess": ivon_jax.find_states(opt_state)[0].hess}
        loss, grads = jax.value_and_grad(self._loss)(theta, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), opt_state), loss

    def _loss(self, params, images, labels):
        return resnet20.loss_fn(nnx.merge(self.graphdef, params), images, labels)

    def _probs(self, params, images):
        model = nnx.merge(self.graphdef, params)
        count = min(1000, len(images))
        parts = images.reshape(-1, count, *images.shape[1:])
        return jax.lax.map(lambda x: nnx.softmax(model(x)), parts).reshape(-1, 10)

    def _mean_probs(self, states, images):
        return jax.lax.map(lambda params: self._probs(params, images), states[0])

    def _sampled_probs(self, states, images, keys):
        def one(args):
            (params, opt_state), key = args
            q = ivon_jax.posterior(params, opt_state)
            count = self.config.num_samples
            return ivon_jax.predict(lambda t: self._probs(t, images), q, key, count)

        return jax.lax.map(one, (states, keys))

    def tables(self, states, test):
        """Return the scores of the mean, of the average over samples, and h."""
        name = "IVON@mean" if self.system == "IVON" else self.system
        result = {"test": {name: tabulate(self.mean_probs(states, test[0]), test[1])}}
        if self.system == "IVON":
            keys = jax.random.split(jax.random.key(3), len(FACTORS))
            probs = self.sampled_probs(states, test[0], keys)
            result["test"]["IVON"] = tabulate(probs, test[1])
            result["hess"] = spread(states)
        return result


def train(study, key, peaks, epochs, data, test, bar, keep):
    """Train all members; return their states, and the seconds of the fastest epoch.

    Every few epochs `keep` gets the training losses, and the scores on `test`.
    """
    init_key, train_key = jax.random.split(key)
    members = len(peaks)
    states = study.init(jax.random.split(init_key, members), len(data[1]))
    keys = jax.random.split(train_key, members)
    num_steps = float(epochs * (len(data[1]) // study.config.batch_size))
    fastest = float("inf")
    for epoch in range(epochs):
        begin = time.perf_counter()
        states, losses = study.epoch(states, keys, peaks, epoch, num_steps, data)
        jax.block_until_ready(losses)
        fastest = min(fastest, time.perf_counter() - begin)
        bar.update()
        if epoch + 1 == epochs or (epoch + 1) % study.config.eval_every == 0:
            probs = study.mean_probs(states, test[0])
            row = over_seeds([scores(p, test[1]) for p in probs])
            keep({"epoch": epoch + 1, "loss": losses.tolist(), "mean": row})
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


def tabulate(probs, labels):
    """Return the scores of each member, tempered too, and of their average."""
    average = jnp.mean(probs, axis=0)
    return {
        "": over_seeds([scores(p, labels) for p in probs]),
        "T": over_seeds([scores(temper(p, labels), labels) for p in probs]),
        "x3": scores(average, labels),
        "x3, T": scores(temper(average, labels), labels),
    }


def load(config):
    """Return training and test images with labels, on the device."""
    if config.data == "synthetic":
        splits = resnet20.synthetic(200), resnet20.synthetic(40)
    else:
        splits = resnet20.read_npz(config.data)
    order = np.random.default_rng(0).permutation(len(splits[0][1]))
    train_data = [np.asarray(x)[order] for x in splits[0]]
    return [
        (jnp.asarray(x), jnp.asarray(y, jnp.int32)) for x, y in (train_data, splits[1])
    ]


def run(config, kept):
    """Keep whatever was measured at once."""
    start, lock, rates, logs, rows = time.perf_counter(), threading.Lock(), {}, {}, []
    train_data, test = load(config)
    cut = len(train_data[1]) // 10 * 9
    data = tuple(x[:cut] for x in train_data)
    validation = tuple(x[cut:] for x in train_data)
    model = create_network(config, nnx.Rngs(0))
    studies = [Study(s, nnx.graphdef(model), config) for s in config.systems.split(",")]

    def pilot(study):
        peaks = PAPER[study.system] * jnp.array(FACTORS)
        log, args = [], (config.pilot_epochs, data, validation, bar)
        _, seconds = train(study, jax.random.key(1), peaks, *args, log.append)
        settings = [{"learning rate": peak} for peak in peaks.tolist()]
        with lock:
            best = kept.trials(study.system, settings, log[-1]["mean"]["NLL"])
        rates[study.system] = peaks[best]
        return seconds

    def final(study):
        def keep(entry):
            with lock:
                logs.setdefault(study.system, []).append(entry)
                kept.curves("by epoch", logs)

        peaks = jnp.full(len(FACTORS), rates[study.system])
        states, _ = train(
            study, jax.random.key(2), peaks, epochs, data, test, bar, keep
        )
        found = study.tables(states, test)
        with lock:
            rows.extend(rows_of(found["test"]))
            kept.table("test", rows, DIGITS)
            if "hess" in found:
                kept.table("quantiles of h over the weights", [found["hess"]])

    # Together, because compiling takes longer than training.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        total = config.pilot_epochs * len(studies)
        with tqdm(total=total, unit="epoch", leave=False) as bar:
            seconds = list(pool.map(pilot, studies))
        left = 60 * config.minutes - (time.perf_counter() - start) - RESERVE
        epochs = int(max(1, min(config.epochs, left / max(seconds))))
        kept.table("length", [{"epochs": epochs}])
        with tqdm(total=epochs * len(studies), unit="epoch", leave=False) as bar:
            list(pool.map(final, studies))


def spread(states):
    """Return quantiles of h over the weights of the first member: did it learn?"""
    state = jax.tree.map(lambda x: x[0], ivon_jax.find_states(states[1])[0])
    hess = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.hess)])
    levels = 0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0
    return dict(zip(map(str, levels), np.quantile(hess, levels).tolist(), strict=True))


def rows_of(found):
    """Yield a record of each way to predict; the paper's are of 200 epochs."""
    for name, variants in found.items():
        for variant, columns in variants.items():
            paper = PUBLISHED.get(name, (None, None)) if not variant else (None, None)
            published = dict(
                zip(("paper, accuracy %", "paper, NLL"), paper, strict=True)
            )
            yield {"system": f"{name} {variant}".strip(), **columns, **published}


def main():
    """Train, and keep what comes."""
    config = flags.parse(Config, __doc__)
    run(config, results.Study(config))


if __name__ == "__main__":
    main()
