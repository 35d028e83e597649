"""CIFAR-10 with ResNet-20: the paper's first table, as far as minutes on a GPU go.

    python benchmarks/cifar.py --data cifar10_jpeg.npz           # minutes on an H100
    python benchmarks/cifar.py --depth 2 --width 2 --epochs 1 --pilot_epochs 1 \
        --num_samples 2 --batch_size 90 --systems IVON           # a look, on noise

The network, the augmentation and the settings are examples/nnx_cifar.py's, the paper's,
with batches of 200 instead of 50 and fewer epochs. Warm-up is the same share of the
run, and 1 - b2 is 2 over the number of steps, so that as much of h_0 is left at the end
as in the paper. Each system first trains for `--pilot_epochs` on nine tenths of the
images with the paper's learning rate times 1, 2 and 4; the rate with the least NLL on
the last tenth is that of the table, for which all images are trained on, with other
seeds.

The members (learning rates or seeds) of a system are one program; all steps of an epoch
are one scan. "frozen" is IVON without noise and with h left at h_0: momentum, weight
decay and learning rate are IVON's, the posterior is taken out. "T" marks predictions
whose temperature is chosen on the other half of the test images. "x3" averages the
probabilities of the three seeds, which for IVON is Multi-IVON.

`--minutes` bounds the whole run: as many epochs as fit are trained, at most `--epochs`.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import ivon_jax
from ivon_jax import metrics

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
import nnx_cifar

PAPER = {  # learning rate at batches of 50; accuracy and NLL after 200 epochs (Table 2)
    "AdamW": (0.002, 90.04, 0.589),
    "SGD": (0.1, 91.86, 0.288),
    "IVON": (0.2, 92.53, 0.256),
    "frozen": (0.2, None, None),
}
FACTORS = (1.0, 2.0, 4.0)
COLUMNS = "accuracy %", "NLL", "ECE", "Brier"
DIGITS = 2, 4, 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = "synthetic"  # an npz file as examples/nnx_cifar.py reads it
    systems: str = "AdamW,SGD,IVON,frozen"
    epochs: report.Count = 40  # at most
    pilot_epochs: report.Count = 8
    minutes: report.Positive = 60.0  # for everything
    warmup: float = 0.025  # share of the steps
    batch_size: report.Count = 200
    depth: report.Count = 20
    width: report.Count = 16
    hess_init: report.Positive = 0.5
    weight_decay: float = 2e-4
    num_samples: report.Count = 64
    vectorize: int = 1  # 0: one member after the other, in a loop
    eval_every: report.Count = 4  # epochs
    json: str = "cifar.json"
    plot: report.Picture = "cifar.png"


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
            model = nnx_cifar.ResNet(config.depth, config.width, 10, nnx.Rngs(key))
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
                batch = nnx_cifar.augment(augment_key, images[indices]), labels[indices]
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
        return nnx_cifar.loss_fn(nnx.merge(self.graphdef, params), images, labels)

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


def train(study, key, peaks, epochs, data, test, bar):
    """Train all members; return their states, and a log of test or validation NLL."""
    init_key, train_key = jax.random.split(key)
    members = len(peaks)
    states = study.init(jax.random.split(init_key, members), len(data[1]))
    keys = jax.random.split(train_key, members)
    num_steps = float(epochs * (len(data[1]) // study.config.batch_size))
    log, seconds = [], []
    for epoch in range(epochs):
        begin = time.perf_counter()
        states, losses = study.epoch(states, keys, peaks, epoch, num_steps, data)
        jax.block_until_ready(losses)
        seconds.append(time.perf_counter() - begin)
        last = epoch + 1 == epochs
        if last or (epoch + 1) % study.config.eval_every == 0:
            probs = study.mean_probs(states, test[0])
            row = [scores(p, test[1]) for p in probs]
            losses = np.asarray(losses).tolist()
            log.append({"epoch": epoch + 1, "loss": losses, "mean": row})
        bar.update()
        bar.set_postfix_str(f"{study.system}, {seconds[-1]:.1f} s")
    return states, log, seconds


def scores(probs, labels):
    """Return the columns of the table."""
    values = (
        100 * metrics.accuracy(probs, labels),
        metrics.negative_log_likelihood(probs, labels),
        metrics.expected_calibration_error(probs, labels),
        metrics.brier_score(probs, labels),
    )
    return dict(zip(COLUMNS, map(float, values), strict=True))


def temper(probs, labels):
    """Scale logits by the temperature that is best on the other half of the images."""
    temperatures = jnp.exp(jnp.linspace(-1.0, 1.5, 101))
    halves = jnp.arange(len(labels)) % 2
    logits = jnp.log(jnp.maximum(probs, 1e-30))

    def loss(temperature, half):
        log_probs = jax.nn.log_softmax(logits / temperature)
        nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(halves == half, nll, 0.0))

    def best(half):
        return temperatures[
            jnp.argmin(jax.lax.map(lambda t: loss(t, half), temperatures))
        ]

    chosen = jnp.where(halves == 0, best(1), best(0))
    return jax.nn.softmax(logits / chosen[:, None])


def tabulate(probs, labels):
    """Return the scores of each member, tempered too, and of their average."""
    average = jnp.mean(probs, axis=0)
    return {
        "": [scores(p, labels) for p in probs],
        "T": [scores(temper(p, labels), labels) for p in probs],
        "x3": [scores(average, labels)],
        "x3, T": [scores(temper(average, labels), labels)],
    }


def load(config):
    """Return training and test images with labels, on the device."""
    if config.data == "synthetic":
        splits = nnx_cifar.synthetic(200), nnx_cifar.synthetic(40)
    else:
        splits = nnx_cifar.read_npz(config.data)
    order = np.random.default_rng(0).permutation(len(splits[0][1]))
    train_data = tuple(np.asarray(x)[order] for x in splits[0])
    return jax.tree.map(jnp.asarray, (train_data, tuple(splits[1])))


def run(config):
    """Return everything that was measured."""
    start = time.perf_counter()
    data, test = load(config)
    data, test = ((x, y.astype(jnp.int32)) for x, y in (data, test))
    cut = len(data[1]) // 10 * 9
    graphdef = nnx.graphdef(
        nnx_cifar.ResNet(config.depth, config.width, 10, nnx.Rngs(0))
    )
    systems = config.systems.split(",")
    studies = {s: Study(s, graphdef, config) for s in systems}
    result = {"pilot": {}, "rates": {}, "test": {}, "log": {}, "seconds": {}}
    pilot = [tuple(x[:cut] for x in data), tuple(x[cut:] for x in data)]
    bar = tqdm(total=config.pilot_epochs * len(systems), unit="epoch", leave=False)
    for system, study in studies.items():
        peaks = PAPER[system][0] * jnp.array(FACTORS)
        args = peaks, config.pilot_epochs, *pilot, bar
        _, log, seconds = train(study, jax.random.key(1), *args)
        losses = [row["NLL"] for row in log[-1]["mean"]]
        rate = float(peaks[int(np.nanargmin(losses))])
        result["pilot"][system] = dict(zip(map(float, peaks), losses, strict=True))
        result["rates"][system], result["seconds"][system] = rate, min(seconds)
    bar.close()
    spent = time.perf_counter() - start
    epoch_seconds = sum(result["seconds"].values()) * len(data[1]) / cut
    # A minute for compiling again, for the other number of images, and predicting.
    left = 60 * config.minutes - spent - 60
    epochs = int(max(1, min(config.epochs, left / epoch_seconds)))
    result |= {"epochs": epochs, "pilot_minutes": spent / 60}
    print(f"{epochs} epochs after {spent / 60:.1f} minutes of pilots", file=sys.stderr)
    bar = tqdm(total=epochs * len(systems), unit="epoch", leave=False)
    for system, study in studies.items():
        peaks = jnp.full(len(FACTORS), result["rates"][system])
        args = peaks, epochs, data, test, bar
        states, log, seconds = train(study, jax.random.key(2), *args)
        result["log"][system], result["seconds"][system] = log, seconds
        name = "IVON@mean" if system == "IVON" else system
        result["test"][name] = tabulate(study.mean_probs(states, test[0]), test[1])
        if system == "IVON":
            keys = jax.random.split(jax.random.key(3), len(FACTORS))
            probs = study.sampled_probs(states, test[0], keys)
            result["test"]["IVON"] = tabulate(probs, test[1])
            result["hess"] = spread(states)
    bar.close()
    return result


def spread(states):
    """Return quantiles of h over the weights of the first member: did it learn?"""
    state = jax.tree.map(lambda x: x[0], ivon_jax.find_states(states[1])[0])
    hess = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.hess)])
    levels = 0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0
    return dict(zip(map(str, levels), np.quantile(hess, levels).tolist(), strict=True))


def print_results(result, config):
    """Print the table, the learning rates and the spread of h."""
    rows = []
    for name, variants in result["test"].items():
        for variant, members in variants.items():
            columns = zip(COLUMNS, DIGITS, strict=True)
            cells = [cell([m[c] for m in members], digits) for c, digits in columns]
            _, accuracy, nll = PAPER.get(name.partition("@")[0])
            if variant or name == "frozen":
                accuracy = nll = ""
            elif name == "IVON":
                accuracy, nll = 92.71, 0.219
            rows.append((f"{name} {variant}".strip(), *cells, accuracy, nll))
    report.print_table(("", *COLUMNS, "paper, accuracy %", "NLL"), rows)
    rows = [
        (system, *(f"{rate:.3g}: {nll:.4f}" for rate, nll in trials.items()))
        for system, trials in result["pilot"].items()
    ]
    names = [f"rate x {factor:g}: validation NLL" for factor in FACTORS]
    report.print_table(("", *names), rows)
    seconds = ", ".join(f"{s} {np.median(x):.2f}" for s, x in result["seconds"].items())
    print(
        f"{result['epochs']} epochs; seconds for an epoch of three members: {seconds}."
    )
    quantiles = ", ".join(
        f"{float(q):.0%} {h:.3g}" for q, h in result.get("hess", {}).items()
    )
    print(f"h at the end, from h_0 = {config.hess_init}, by quantiles: {quantiles}.")


def cell(values, digits):
    """Return a cell of one value, or of several with their standard error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return report.mean_and_error(values, digits)


def draw(path, result):
    """Draw the NLL at the mean after every few epochs, and the average's at the end."""
    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes = figure.subplots()
    for system, log in result["log"].items():
        epochs = [entry["epoch"] for entry in log]
        nll = np.array([[m["NLL"] for m in entry["mean"]] for entry in log])
        axes.plot(epochs, nll.mean(axis=1), label=f"{system} (one network)")
    if "IVON" in result["test"]:
        nll = [m["NLL"] for m in result["test"]["IVON"][""]]
        axes.plot(
            result["epochs"],
            np.mean(nll),
            "*",
            markersize=12,
            label="IVON (64 samples)",
        )
    axes.set(xlabel="epoch", ylabel="test NLL", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    """Train, print, save."""
    config = report.parse_args(Config, __doc__)
    report.print_conditions(config)
    result = run(config)
    environment = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    record = {"config": dataclasses.asdict(config), "environment": environment} | result
    pathlib.Path(config.json).write_text(json.dumps(record, indent=1) + "\n")
    print_results(result, config)
    draw(config.plot, result)


if __name__ == "__main__":
    main()
