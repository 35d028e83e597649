"""Regression on UCI data: IVON beside AdamW, MC dropout, a deep ensemble and BBB.

    python benchmarks/uci.py --data FOLDER             # about 10 min on two CPU cores
    python benchmarks/uci.py --data FOLDER --full 1    # 20 splits, 400 epochs: hours
    python benchmarks/uci.py --data FOLDER --sets yacht --trials 4 --steps 200  # a look

The standard protocol (Hernández-Lobato and Adams, 2015; Gal and Ghahramani, 2016):
random splits, a tenth of the data for testing, one hidden layer of 50 ReLUs, inputs and
target standardised on the training part; root mean squared error (RMSE) and log-
likelihood (LL) of the test part, in the target's units. FOLDER has a text file for each
set: a row for each example, the target last.

The noise of the observations is a constant. Learnt together with the weights it would
be what is left of the training errors, which says nothing of those to come wherever a
network without a posterior overfits. So validation tunes it for all: each system has
the same number of trials, points of one Sobol sequence in the learning rate, one
hyperparameter more and the noise of the training loss, and the predictive noise comes
from a fine grid. The trial and the noise of the highest log-likelihood on a fifth of
the training part, the mean over all splits, train on all of it and are tested. (What
one split tests another validates on. A choice for each split alone avoids that, but
took learning rates that diverged in the test of some.) The predictive distribution is
the mixture over draws of Gaussians with that noise.

The literature's figures in the tables are those of Table 1 of Lakshminarayanan et al.
(2017), cited from memory, of other splits and lengths of training.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import baselines, flags, results, tables
from common.flags import Count, Results
from scipy.stats import rankdata
from tqdm import tqdm

# Probabilistic backpropagation (PBP), MC dropout and deep ensembles, after Table 1 of
# Lakshminarayanan et al. (2017), who quote the former two from their papers.
CITED = "PBP, cited", "dropout, cited", "ensemble, cited"
LITERATURE = {
    "RMSE": {
        "bostonHousing": (3.01, 2.97, 3.28),
        "concrete": (5.67, 5.23, 6.03),
        "energy": (1.80, 1.66, 2.09),
        "power-plant": (4.12, 4.02, 4.11),
        "wine-quality-red": (0.64, 0.62, 0.64),
        "yacht": (1.02, 1.11, 1.58),
    },
    "LL": {
        "bostonHousing": (-2.57, -2.46, -2.41),
        "concrete": (-3.16, -3.04, -3.06),
        "energy": (-2.04, -1.99, -1.38),
        "power-plant": (-2.84, -2.80, -2.79),
        "wine-quality-red": (-0.97, -0.93, -0.94),
        "yacht": (-1.63, -1.55, -1.18),
    },
}
HESS_INIT = 0.3  # for noise of one
NOISE = (0.05, 0.8)  # standard deviations in training, of a standardised target
PREDICTIVE_NOISE = np.geomspace(0.01, 1.0, 49)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = "uci"  # the folder of the text files
    sets: str = "yacht,bostonHousing,energy,concrete,wine-quality-red,power-plant"
    splits: Count = 10
    trials: Count = 16  # for each system, in each split
    members: Count = 5  # of the deep ensemble
    steps: Count = 2000  # of batches, in as many epochs as that takes
    epochs: int = 0  # so many, if it is not 0
    batch_size: Count = 32
    width: Count = 50
    num_samples: Count = 64  # draws for a prediction
    full: int = 0  # 1: 20 splits and 400 epochs
    results: Results = "uci.json"


class Column(NamedTuple):
    """A column of the tables: how to predict with what a method has trained."""

    name: str
    system: Callable
    draws: int = 1  # of each member
    members: int = 1


class Method(NamedTuple):
    """A way to train, and its hyperparameters besides the noise."""

    system: Callable
    ranges: dict  # name -> (low, high), on a logarithmic scale
    columns: tuple


def adamw(problem, noise, learning_rate, weight_decay):
    """Return AdamW, to which the scale of the loss does not matter."""
    del noise
    return baselines.adamw(problem, learning_rate, weight_decay)


def mc_dropout(problem, noise, learning_rate, rate):
    """Return MC dropout; the loss, and so SGD's steps, go with 1 / noise**2."""
    return baselines.mc_dropout(problem, learning_rate * noise**2, rate)


@baselines.with_prior
def bbb(problem, noise, learning_rate):
    """Return Bayes by Backprop; it starts at the curvature of a narrow posterior."""
    return baselines.bbb(problem, learning_rate, hess_init=HESS_INIT / noise**2)


@baselines.with_prior
def ivon(problem, noise, learning_rate):
    """Return IVON, whose learning rate is SGD's."""
    return baselines.ivon(problem, learning_rate * noise**2, HESS_INIT / noise**2)


def methods(config):
    """Return what is compared."""
    draws, prior = config.num_samples, {"prior_precision": (0.1, 10.0)}
    adam = {"learning_rate": (0.003, 0.1)}
    return (
        Method(
            adamw,
            {**adam, "weight_decay": (0.001, 3.0)},
            (Column("AdamW", adamw), Column("ensemble", adamw, 1, config.members)),
        ),
        Method(
            mc_dropout,
            {"learning_rate": (0.01, 0.2), "rate": (0.002, 0.2)},
            (Column("MC dropout", mc_dropout, draws),),
        ),
        Method(bbb, {**adam, **prior}, (Column("BBB", bbb, draws),)),
        Method(
            ivon,
            {"learning_rate": (0.1, 3.0), **prior},
            (
                Column("IVON@mean", baselines.at_mean(ivon)),
                Column("IVON", ivon, draws),
            ),
        ),
    )


class Data(NamedTuple):
    """All splits of a set, each in an order of its own."""

    inputs: np.ndarray  # (splits, N, D)
    targets: np.ndarray  # (splits, N)

    def standardised(self, num_train):
        """Return both in units of the first rows, and the target's unit (splits, 1)."""

        def moments(x):
            train = x[:, :num_train]
            scale = train.std(axis=1, keepdims=True)
            return train.mean(axis=1, keepdims=True), np.where(scale == 0, 1.0, scale)

        (x_mean, x_unit), (y_mean, unit) = moments(self.inputs), moments(self.targets)
        inputs = (self.inputs - x_mean) / x_unit
        targets = (self.targets - y_mean) / unit
        return inputs.astype("float32"), targets.astype("float32"), unit


def load(config, name):
    """Read a set and shuffle it once for each split."""
    rows = np.loadtxt(pathlib.Path(config.data) / f"{name}.txt")
    generator = np.random.default_rng(0)
    rows = np.stack([generator.permutation(rows) for _ in range(config.splits)])
    return Data(rows[..., :-1], rows[..., -1])


def on_split(system, inputs, targets):
    """Take the rows of a run's own split, and a Gaussian likelihood."""
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)

    def of_run(problem, split, noise, **setting):
        def features(params, rows, drop):
            return problem.features(params, inputs[split, rows], drop)

        def loss(outputs, rows):
            return 0.5 * ((outputs[:, 0] - targets[split, rows]) / noise) ** 2

        own = dataclasses.replace(problem, features=features, loss=loss)
        return system(own, noise=noise, **setting)

    return of_run


def run(config, method, data, num_train, num_rows, settings, seed):
    """Train on the first rows of the splits, and predict those up to `num_rows`.

    `settings` has the hyperparameters and the split of each run. Returns the outputs
    (runs, draws, rows) for each column of the method.
    """
    inputs, targets, _ = data.standardised(num_train)
    own = functools.cache(lambda system: on_split(system, inputs, targets))
    init, features = baselines.mlp((inputs.shape[-1], config.width, 1))
    epochs = config.epochs or -(-config.steps // (num_train // config.batch_size))
    problem = baselines.Problem(
        init, features, None, num_train, config.batch_size, epochs
    )
    runs, members = len(settings["split"]), max(c.members for c in method.columns)
    settings = {name: np.repeat(x, members) for name, x in settings.items()}
    # All trials of a split start from the same weights.
    seeds = settings["split"] * members + np.tile(np.arange(members), runs)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(seeds)
    train, rest = jnp.split(jnp.arange(num_rows), [num_train])
    name = method.columns[0].name
    fitted = baselines.fit(
        own(method.system), problem, keys, settings, (train, train), name
    )

    def predict(column):
        arguments = own(column.system), problem, fitted.state, keys, settings, rest
        outputs = baselines.draws(*arguments, column.draws)
        outputs = outputs.reshape(runs, members, column.draws, -1)
        outputs = outputs[:, : column.members]
        return outputs.reshape(runs, column.members * column.draws, -1)

    return map(predict, method.columns)


@jax.jit
def log_likelihood(outputs, targets, noise):
    """Return the mean log-density (runs,) of the mixture over draws of Gaussians."""

    def of_run(outputs, targets):
        log_density = jax.scipy.stats.norm.logpdf(targets, outputs, noise)
        return jax.nn.logsumexp(log_density, axis=0) - jnp.log(len(outputs))

    return jax.vmap(of_run)(outputs, targets).mean(axis=1)


def in_all_splits(config, settings):
    """Return the runs of each setting in each split, splits first."""
    count = len(settings["noise"])
    runs = {name: np.tile(x, config.splits) for name, x in settings.items()}
    return {**runs, "split": np.repeat(np.arange(config.splits), count)}


def best(config, outputs, targets):
    """Return the index of the best trial and its predictive noise."""

    def with_noise(noise):
        return log_likelihood(outputs, targets, noise)

    scores = np.array(jax.lax.map(with_noise, jnp.float32(PREDICTIVE_NOISE)))
    scores = scores.reshape(len(PREDICTIVE_NOISE), config.splits, -1).mean(axis=1)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    noise, trial = np.unravel_index(scores.argmax(), scores.shape)
    return trial, PREDICTIVE_NOISE[noise]


def evaluate(config, method, data):
    """Tune and test: for each column its RMSE and LL, (splits, 2), and settings."""
    size = data.targets.shape[1]
    num_train = size - round(size / 10)
    num_fit = round(0.8 * num_train)
    settings = baselines.trials({**method.ranges, "noise": NOISE}, config.trials)
    runs = in_all_splits(config, settings)
    outputs = run(config, method, data, num_fit, num_train, runs, seed=0)
    _, targets, _ = data.standardised(num_fit)
    targets = targets[runs["split"], num_fit:num_train]
    winners, noises = zip(
        *(best(config, draws, targets) for draws in outputs), strict=True
    )

    # The winners of all columns train together.
    settings = {name: x[list(winners)] for name, x in settings.items()}
    runs = in_all_splits(config, settings)
    outputs = run(config, method, data, num_train, size, runs, seed=1)
    _, targets, unit = data.standardised(num_train)
    targets, unit = targets[:, num_train:], unit[:, 0]
    measured = {}
    for i, draws in enumerate(outputs):
        draws = draws[i :: len(winners)]
        rmse = jnp.sqrt(((draws.mean(axis=1) - targets) ** 2).mean(axis=1))
        score = log_likelihood(draws, targets, noises[i])
        scores = np.stack([rmse * unit, score - np.log(unit)], axis=1)
        setting = {name: x[i] for name, x in settings.items()}
        setting["predictive noise"] = noises[i]
        measured[method.columns[i].name] = scores, setting
    return measured


def of_scores(measured, measure, index):
    """Yield a record of each set: of every system its splits, and what others had."""
    for name, systems in measured.items():
        scores = {system: scores[:, index] for system, (scores, _) in systems.items()}
        cited = LITERATURE[measure].get(name, (None,) * len(CITED))
        yield tables.record({measure: name, **scores}, CITED, cited)


def of_ranks(measured):
    """Yield mean ranks, and IVON's differences of over two standard errors."""
    columns = list(next(iter(measured.values())))
    scores = np.array(
        [[scores for scores, _ in systems.values()] for systems in measured.values()]
    )
    scores[..., 1] *= -1  # the less the better, as of RMSE
    ranks = rankdata(scores.mean(axis=2), axis=1).mean(axis=0)  # (systems, measures)
    gain = scores - scores[:, [columns.index("IVON")]]  # paired, split by split
    error = gain.std(axis=2, ddof=1) / gain.shape[2] ** 0.5
    wins = (gain.mean(axis=2) > 2 * error).sum(axis=0)
    losses = (gain.mean(axis=2) < -2 * error).sum(axis=0)
    for i, name in enumerate(columns):
        row = {"system": name}
        for m, measure in enumerate(LITERATURE):
            row[f"mean rank, {measure}"] = ranks[i, m]
            row[f"IVON better, {measure}"] = wins[i, m]
            row[f"IVON worse, {measure}"] = losses[i, m]
        yield row


def of_settings(measured):
    """Yield what was chosen; the noises are those of a standardised target."""
    for name in next(iter(measured.values())):
        for data, systems in measured.items():
            yield {"system": name, "set": data, **systems[name][1]}


def main():
    """Tune, train and test."""
    config = flags.parse(Config, __doc__, splits=20, epochs=400)
    study = results.Study(config)
    measured = {}
    for name in tqdm(config.sets.split(","), desc="sets"):
        data = load(config, name)
        measured[name] = {}
        for method in methods(config):
            measured[name].update(evaluate(config, method, data))
    for i, measure in enumerate(LITERATURE):
        digits = dict.fromkeys(CITED, 2)
        study.table(measure, of_scores(measured, measure, i), digits)
    ranks = {f"mean rank, {measure}": 1 for measure in LITERATURE}
    study.table("ranks", of_ranks(measured), ranks)
    study.table("chosen", of_settings(measured))


if __name__ == "__main__":
    main()
