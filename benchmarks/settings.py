"""Does IVON need tuning? The recommended settings beside the best of 16 trials.

    python benchmarks/settings.py                  # digits and a recurrent network
    python benchmarks/settings.py --data FOLDER    # also MNIST's digits and UCI's sets

Half a minute to two of one core for each run. FOLDER has mnist10k.npz and uci/.

`recommended` sets IVON from the number of examples, steps and the batch; nothing is
tuned. Beside it: the best of 16 trials of IVON around these settings, the first trial
being they themselves; AdamW at optax's defaults; and AdamW's best of 16. All have a
cosine schedule. A regression is of the mean and the standard deviation. A seed
shuffles the examples into those of training, of validation and of test. All trials
train with all seeds, and the lowest mean NLL on the validation examples is the best: of
AdamW with temperature scaling, of IVON with samples.

The same examples set temperatures: of the mean's outputs by temperature scaling, of the
posterior by `calibrate`. In regression the former multiplies the variance of the noise.

Two controls have the recommended settings. "constant precision" keeps h at h_0; "no
noise" does, too, and takes its gradients at the mean. What they lose is what the
learned variance, and the noise of training, add.

Ratios are of test NLLs, seed by seed, below 1 where the first is better. NLLs of
densities may be negative, so there a ratio is the exponential of the difference: as
two Gaussians' standard deviations.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recurrent
from common import baselines, flags, results, tables
from common.datasets import load_images
from common.flags import Count, Results, Text
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm

import ivon_jax
from ivon_jax.calibration import calibrate, temperature_scaling
from ivon_jax.tuning import SEARCH

ADAMW = {"learning_rate": (1e-4, 3e-2), "weight_decay": (1e-3, 3.0)}
DEFAULT = {"learning_rate": 1e-3, "weight_decay": 1e-4}  # optax's decay
SWITCHES = {  # of IVON at the recommended settings
    "IVON": {"noise": 1.0, "learns": 1.0},
    "constant precision": {"noise": 1.0, "learns": 0.0},
    "no noise": {"noise": 0.0, "learns": 0.0},
}
SETS = {"yacht": 200, "concrete": 700}  # of UCI, and N
RATIOS = {  # of a system with a prediction, to another: the goal is to be below
    "IVON / its best of 16": (("IVON", "samples"), ("IVON, best of 16", "samples")),
    "IVON / default AdamW": (("IVON", "samples"), ("AdamW, default", "mean")),
    "IVON / tuned AdamW, both tempered": (
        ("IVON", "calibrated"),
        ("AdamW, best of 16", "mean, scaled"),
    ),
    "samples / mean": (("IVON", "samples"), ("IVON", "mean")),
    "calibrated / mean": (("IVON", "calibrated"), ("IVON", "mean")),
    "calibrated / mean, scaled": (("IVON", "calibrated"), ("IVON", "mean, scaled")),
    "constant precision / IVON": (
        ("constant precision", "calibrated"),
        ("IVON", "calibrated"),
    ),
    "no noise / IVON": (("no noise", "calibrated"), ("IVON", "calibrated")),
}
GOALS = {"IVON / its best of 16": 1.05}  # of all others 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # the folder
    tasks: Text = "digits,uci,mnist,gru"
    sizes: Count = 5  # of each task, at most
    trials: Count = 16  # of AdamW, and of IVON
    seeds: Count = 5
    num_samples: Count = 16
    results: Results = "settings.json"


class Task(NamedTuple):
    """Examples, network and likelihood; and which runs there are."""

    inputs: jax.Array
    targets: jax.Array
    network: tuple  # init, features
    runs: tuple  # (N, epochs, batch size)
    kind: str = "classification"


def digits(_config):
    """Take scikit-learn's digits."""
    images, labels = load_images()
    runs = (100, 30, 50), (300, 30, 50), (1200, 5, 50), (1200, 30, 50), (100, 300, 50)
    network = baselines.mlp((64, 64, 64, 10))
    return {"digits": Task(scaled_pixels(images), labels, network, runs)}


def mnist(config):
    """Take MNIST's test images."""
    if not config.data:
        return {}
    images, labels = load_images(pathlib.Path(config.data, "mnist10k.npz"))
    runs = (300, 30, 50), (3000, 5, 100)
    network = baselines.mlp((784, 32, 10))
    return {"MNIST": Task(scaled_pixels(images), labels, network, runs)}


def uci(config):
    """Take small sets of UCI's; the target is last."""
    if not config.data:
        return {}
    found = {}
    for name, num_train in SETS.items():
        table = np.loadtxt(pathlib.Path(config.data, "uci", f"{name}.txt"))
        table = (table - table.mean(0)) / np.maximum(table.std(0), 1e-6)
        *inputs, targets = jnp.asarray(table, jnp.float32).T
        network = baselines.mlp((len(inputs), 50, 2))
        runs = tuple((num_train, epochs, 50) for epochs in (30, 150))
        found[name] = Task(jnp.stack(inputs, 1), targets, network, runs, "regression")
    return found


def gru(_config):
    """Take excerpts of the standard library, and recurrent.py's network."""
    settings = recurrent.Config(vocabulary=500, length=16, per_package=150)
    task = recurrent.load_task(settings)
    inputs, targets = (
        jnp.concatenate([jnp.asarray(x), jnp.asarray(y)])
        for x, y in zip(task.train, task.test, strict=True)
    )
    return {"GRU": Task(inputs, targets, task.network, ((400, 15, 50),))}


TASKS = {"digits": digits, "uci": uci, "mnist": mnist, "gru": gru}


def scaled_pixels(images):
    """Return images as vectors, of mean zero and variance one over all pixels."""
    return ((images - images.mean()) / images.std()).reshape(len(images), -1)


def gaussian_nll(outputs, targets):
    """Return the NLL of each target, of outputs (N, 2)."""
    mean, spread = outputs.T
    return -norm.logpdf(targets, mean, noise_of(spread))


def noise_of(spread):
    """Return a standard deviation; targets have one of 1."""
    return 0.01 + jax.nn.softplus(spread)


class Likelihood(NamedTuple):
    """What a kind of task needs."""

    loss: Callable  # outputs (N, C), targets -> (N,), in nats
    temperature: Callable  # outputs, targets of validation -> T
    scaled_loss: Callable  # outputs, targets, T -> (N,)
    ratio: Callable  # NLL, NLL -> how much larger the first is


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def squared_error(outputs, targets):
    """Return it in units of the predicted variance, (N,)."""
    return ((targets - outputs[:, 0]) / noise_of(outputs[:, 1])) ** 2


def scaled_gaussian_nll(outputs, targets, temperature):
    """Multiply the variance of the noise by the temperature."""
    log_noise = jnp.log(noise_of(outputs[:, 1])) + jnp.log(2 * jnp.pi) / 2
    half = squared_error(outputs, targets) / (2 * temperature)
    return half + log_noise + jnp.log(temperature) / 2


LIKELIHOODS = {
    "classification": Likelihood(
        cross_entropy,
        temperature_scaling,
        lambda outputs, targets, t: cross_entropy(outputs / t, targets),
        lambda a, b: a / b,
    ),
    "regression": Likelihood(
        gaussian_nll,
        lambda outputs, targets: squared_error(outputs, targets).mean(),
        scaled_gaussian_nll,
        lambda a, b: np.exp(a - b),
    ),
}


class Splits(NamedTuple):
    """Rows of the examples, (seeds, N) each."""

    train: Any
    validation: Any
    test: Any


def split(task, num_train, seeds):
    """Return rows for each seed: a third as many to validate, at most 500."""
    total = len(task.targets)
    validation = min(max(100, num_train // 3), 500, (total - num_train) // 2)
    test = min(2000, total - num_train - validation)
    orders = [np.random.default_rng(seed).permutation(total) for seed in range(seeds)]
    ends = np.cumsum([num_train, validation, test])
    return Splits(*np.split(jnp.stack(orders)[:, : ends[-1]], ends[:-1], axis=1))


@dataclasses.dataclass(frozen=True)
class FlatProblem(baselines.Problem):
    """Its parameters are one vector, for programs that compile in less time."""

    unravel: Callable = None  # vector -> body and linear head

    def apply(self, params, x, drop=lambda x: x):
        """Map inputs to outputs, (N, C)."""
        return super().apply(self.unravel(params), x, drop)


def make_problem(task, num_train, epochs, batch_size):
    """Return what `baselines.fit` trains."""
    init, features = task.network
    return FlatProblem(
        init=lambda key: ravel_pytree(init(key))[0],
        features=features,
        loss=LIKELIHOODS[task.kind].loss,
        num_data=num_train,
        batch_size=batch_size,
        epochs=epochs,
        unravel=ravel_pytree(init(jax.random.key(0)))[1],
    )


def on_rows(system, task):
    """Let a run have training examples of its own, given by their rows."""

    def with_rows(problem, rows, **setting):
        base = system(problem, **setting)

        def step(key, state, batch, _):
            chosen = rows[batch]
            return base.step(key, state, task.inputs[chosen], task.targets[chosen])

        return base._replace(step=step)

    return with_rows


def ivon(task, problem):
    """Return IVON at the recommended settings times factors, and its controls."""
    recommended = ivon_jax.recommended(
        *(problem.num_data, problem.num_steps, problem.batch_size),
        task=task.kind,
        params=problem.init(jax.random.key(0)),
    )

    def system(problem, noise, learns, learning_rate, **factors):
        settings = {k: recommended[k] * factor for k, factor in factors.items()}
        settings["learning_rate"] = lambda count: (
            learning_rate * recommended["learning_rate"](count)
        )
        settings["b2"] = 1 - learns * (1 - recommended["b2"])
        tx = ivon_jax.ivon(**recommended | settings)

        def step(key, state, x, y):
            params, opt_state = state
            theta = ivon_jax.sample(key, params, opt_state)
            theta = jax.tree.map(lambda m, t: m + noise * (t - m), params, theta)
            grads = jax.grad(problem.mean_loss)(theta, x, y)
            updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
            return optax.apply_updates(params, updates), opt_state

        return baselines.gaussian(
            problem, posterior_of, lambda params: (params, tx.init(params)), step
        )

    return system


def posterior_of(state):
    """Return what a run of IVON has learned."""
    return ivon_jax.posterior(*state)


def train(system, problem, settings, splits, title):
    """Return states, (settings, seeds, ...), of all settings with all seeds."""
    seeds, count = len(splits.train), len(settings)
    stacked = {
        name: jnp.repeat(jnp.array([s[name] for s in settings], jnp.float32), seeds)
        for name in settings[0]
    }
    stacked["rows"] = jnp.tile(splits.train, (count, 1))
    # The same first weights, batches and noise for all settings.
    keys = jnp.tile(jax.random.split(jax.random.key(1), seeds), count)
    indices = (jnp.arange(problem.num_data),) * 2
    states = baselines.fit(system, problem, keys, stacked, indices, title).state
    return jax.tree.map(lambda x: x.reshape(count, seeds, *x.shape[1:]), states)


def over_runs(function):
    """Map a function of (state, split, key) over settings and seeds."""
    return jax.jit(jax.vmap(jax.vmap(function), (0, None, None)))


def predictions(task, problem, num_samples):
    """Return functions of (state, split, key): NLLs of validation and of test."""
    likelihood = LIKELIHOODS[task.kind]

    def examples(rows):
        return task.inputs[rows], task.targets[rows]

    def mean(state, rows, _key):
        """NLLs of the mean; the last has a temperature from the validation."""
        (x, y), (test_x, test_y) = examples(rows.validation), examples(rows.test)
        outputs, test_outputs = (problem.apply(state[0], x) for x in (x, test_x))
        temperature = likelihood.temperature(outputs, y)
        return {
            "validation": likelihood.scaled_loss(outputs, y, temperature).mean(),
            "mean": likelihood.loss(test_outputs, test_y).mean(),
            "mean, scaled": likelihood.scaled_loss(
                test_outputs, test_y, temperature
            ).mean(),
        }

    def log_likelihood(theta, x, y):
        return -likelihood.loss(problem.apply(theta, x), y)

    def nll(posterior, key, data):
        keys = jax.random.split(key, num_samples)
        logs = jax.lax.map(lambda k: log_likelihood(posterior.sample(k), *data), keys)
        return -jnp.mean(jax.nn.logsumexp(logs, axis=0) - jnp.log(num_samples))

    def validation(state, rows, key):
        return nll(posterior_of(state), key, examples(rows.validation))

    def samples(state, rows, key):
        test_key, calibration_key = jax.random.split(key)
        posterior, data = posterior_of(state), examples(rows.test)
        calibrated = calibrate(
            *(log_likelihood, posterior, None, calibration_key),
            num_samples=num_samples,
            args=examples(rows.validation),
        )
        return mean(state, rows, key) | {
            "samples": nll(posterior, test_key, data),
            "calibrated": nll(calibrated, test_key, data),
        }

    return map(over_runs, (mean, validation, samples))


def trial_settings(ranges, count, first=None):
    """Return settings from a Sobol sequence, `first` in the place of its first."""
    values = baselines.trials(ranges, count)
    settings = baselines.one_by_one(values)
    return settings if first is None else [first, *settings[1:]]


def measure(study, config, task, name, run):
    """Train and test all systems; return {system: {prediction: NLLs of the seeds}}."""
    problem = make_problem(task, *run)
    splits = split(task, run[0], config.seeds)
    keys = jax.random.split(jax.random.key(2), config.seeds)
    mean, validation, samples = predictions(task, problem, config.num_samples)
    title = f"{name}, N {run[0]}, {run[1]} epochs"

    trials = trial_settings(ADAMW, config.trials)
    system = on_rows(baselines.adamw, task)
    states = train(system, problem, [DEFAULT, *trials], splits, title)
    nll = mean(states, splits, keys)
    losses = np.asarray(nll.pop("validation"))[1:].mean(1)
    best = 1 + study.trials(f"AdamW: {title}", trials, losses)
    found = {
        system: {k: np.asarray(v)[i] for k, v in nll.items()}
        for system, i in (("AdamW, default", 0), ("AdamW, best of 16", best))
    }

    trials = trial_settings(SEARCH, config.trials, dict.fromkeys(SEARCH, 1.0))
    learned, *controls = SWITCHES.values()
    settings = [trial | learned for trial in trials]
    settings += [trials[0] | control for control in controls]
    system = on_rows(ivon(task, problem), task)
    states = train(system, problem, settings, splits, title)
    losses = validation(states, splits, keys)[: len(trials)].mean(1)
    best = study.trials(f"IVON: {title}", trials, np.asarray(losses))
    chosen = jnp.array([0, best, *range(len(trials), len(settings))])
    nll = samples(jax.tree.map(lambda x: x[chosen], states), splits, keys)
    del nll["validation"]
    names = "IVON", "IVON, best of 16", *list(SWITCHES)[1:]
    return found | {
        system: {k: np.asarray(v)[i] for k, v in nll.items()}
        for i, system in enumerate(names)
    }


def ratios(task, found):
    """Return a list of one for each seed, for each of `RATIOS`."""
    ratio = LIKELIHOODS[task.kind].ratio
    return {
        title: ratio(found[system][prediction], found[other][its])
        for title, ((system, prediction), (other, its)) in RATIOS.items()
    }


def verdicts(rows):
    """Count the rows that keep their goal, or miss it by two standard errors."""
    for title in RATIOS:
        goal = GOALS.get(title, 1.0)
        lists = [np.asarray(row[title]).tolist() for row in rows]
        mean, error = np.transpose([tables.mean_and_error(x) for x in lists])
        yield {
            "ratio": title,
            "goal": goal,
            "geometric mean": float(np.exp(np.mean(np.log(mean)))),
            "least": mean.min(),
            "largest": mean.max(),
            "rows": len(rows),
            "at most the goal": int((mean <= goal).sum()),
            "surely below": int((mean + 2 * error < goal).sum()),
            "surely above": int((mean - 2 * error > goal).sum()),
        }


def all_runs(config):
    """Return (task's name, task, run), the first run of each task first."""
    tasks, families = {}, config.tasks.split(",")
    if not set(families) <= set(TASKS):
        sys.exit(f"`--tasks` must be some of {','.join(TASKS)}, got {config.tasks}.")
    for family in families:
        tasks |= TASKS[family](config)
    rounds = itertools.zip_longest(
        *(task.runs[: config.sizes] for task in tasks.values())
    )
    return [
        (name, task, run)
        for runs in rounds
        for (name, task), run in zip(tasks.items(), runs, strict=True)
        if run
    ]


def main():
    """Train, test and print, run after run."""
    config = flags.parse(Config, __doc__)
    study, summary, nlls = results.Study(config), [], []
    for name, task, run in all_runs(config):
        labels = {"task": name, "N": run[0], "epochs": run[1]}
        found = measure(study, config, task, name, run)
        nlls += [labels | {"system": k} | v for k, v in found.items()]
        summary.append(labels | ratios(task, found))
        study.table("test NLL", nlls)
        study.table("ratios", summary)
        study.table("verdicts", list(verdicts(summary)))


if __name__ == "__main__":
    main()
