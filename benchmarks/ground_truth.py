"""How close is each system's predictive distribution to the exact posterior's?

    python benchmarks/ground_truth.py              # 12 min, beside other work
    python benchmarks/ground_truth.py --tasks regression --uci wine.txt --noise 0.75
    python benchmarks/ground_truth.py --full 1     # longer chains, ten seeds

This is the paper's Table 14 in small: two networks for which long chains of Hamiltonian
Monte Carlo are the truth. One classifies scikit-learn's digits by their ten principal
components, the other is a regression with Gaussian noise of known size, on its diabetes
data or a UCI set. All systems have the same likelihood and, but for AdamW, the same
Gaussian prior. Each has nine trials and keeps the one with the lowest NLL on a third of
the training data, not the one closest to the truth; ensembles take their members'.

Measured as by Izmailov et al. (2021) and Wilson et al. (2022):

* agreement: for how many inputs is the most probable class the same?
* TV: total variation distance of the class probabilities, averaged over inputs.
* W2: Wasserstein-2 distance between the posterior distributions of the regression
  function, noise excluded, at one input, in standard deviations of the target;
  averaged over inputs. Beside it the function's standard deviation over the exact one.

The last row, one chain against all others, is what can be reached. The shifted inputs
are digits turned by 90 degrees, and regression inputs twice as far from their mean. The
picture has the class probabilities, and the standard deviations of the function.
"""

import dataclasses
import itertools
import operator
import time
from collections.abc import Callable
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import baselines, flags, results, tables
from common.flags import Count, Positive, Results
from sklearn.datasets import load_diabetes, load_digits
from sklearn.decomposition import PCA

from ivon_jax import metrics


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    tasks: str = "digits,regression"
    uci: str = ""  # text, a row per example, the target last; empty: diabetes
    noise: Positive = 0.7  # standard deviation, of a target with one of 1
    components: Count = 10  # of the digits
    width: Count = 16  # of the hidden layer
    prior_precision: Positive = 1.0
    chains: Count = 4
    warmup: Count = 300  # steps of a chain that adapt the sampler
    length: Count = 500  # draws of a chain
    leapfrogs: Count = 150  # gradients of a draw
    batch_size: Count = 50
    steps: Count = 4000  # of training
    tuning_seeds: Count = 2
    seeds: Count = 5
    members: Count = 5  # of an ensemble
    num_samples: Count = 256  # draws of one posterior
    full: int = 0  # 1: 8 chains of 2000 draws, 20000 steps and ten seeds
    results: Results = "ground_truth.json"


class Task(NamedTuple):
    """Data, network, likelihood, and what to measure."""

    train: tuple  # inputs (N, D) and targets
    test: tuple
    shifted: jax.Array  # inputs
    num_outputs: int
    rate: float  # unit of learning rates for gradients that Adam does not scale
    loss: Callable
    predict: Callable  # outputs -> what the measures take
    scores: dict  # name -> function of draws (S, N, C) and targets
    distances: dict  # name -> function of draws and exact draws


def digits(config):
    """Classify digits; the second half, by other writers, is for testing."""
    data = load_digits()
    half = len(data.target) // 2
    pca = PCA(config.components).fit(data.data[:half])
    scale = pca.transform(data.data[:half]).std()
    turned = np.rot90(data.images[half:], axes=(1, 2)).reshape(-1, 64)
    train, test, shifted = (
        jnp.asarray(pca.transform(images) / scale, jnp.float32)
        for images in (data.data[:half], data.data[half:], turned)
    )
    labels = jnp.asarray(data.target, jnp.int32)
    return Task(
        (train, labels[:half]),
        (test, labels[half:]),
        shifted,
        num_outputs=10,
        rate=1.0,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        predict=jax.nn.softmax,
        scores={
            "accuracy %": lambda p, y: 100 * metrics.accuracy(p.mean(axis=0), y),
            "NLL": lambda p, y: metrics.negative_log_likelihood(p.mean(axis=0), y),
        },
        distances={"agreement %": agreement, "TV": total_variation},
    )


def regression(config):
    """Predict a standardised target; a random fifth of the rows is for testing."""
    rows = (
        np.loadtxt(config.uci) if config.uci else np.c_[load_diabetes(return_X_y=True)]
    )
    rows = np.random.default_rng(0).permutation(rows)
    cut = 4 * len(rows) // 5
    rows = (rows - rows[:cut].mean(axis=0)) / rows[:cut].std(axis=0)
    x, y = jnp.asarray(rows[:, :-1], jnp.float32), jnp.asarray(rows[:, -1], jnp.float32)

    def log_density(outputs, y):
        return jax.scipy.stats.norm.logpdf(y, outputs[..., 0], config.noise)

    def mixture(draws, y):
        return jax.nn.logsumexp(log_density(draws, y), axis=0) - jnp.log(len(draws))

    return Task(
        (x[:cut], y[:cut]),
        (x[cut:], y[cut:]),
        2 * x[cut:],
        num_outputs=1,
        rate=config.noise**2 / 4,  # a softmax has at most a quarter of the curvature
        loss=lambda outputs, y: -log_density(outputs, y),
        predict=lambda outputs: outputs,
        scores={
            "RMSE": lambda f, y: jnp.sqrt(jnp.mean((f.mean(axis=0)[:, 0] - y) ** 2)),
            "NLL": lambda f, y: -mixture(f, y).mean(),
        },
        distances={"W2": wasserstein, "stddev / exact": relative_stddev},
    )


def agreement(draws, exact):
    """Return the share of inputs with the same most probable class, in per cent."""
    top, exact_top = (p.mean(axis=0).argmax(axis=-1) for p in (draws, exact))
    return 100 * jnp.mean(top == exact_top)


def total_variation(draws, exact):
    """Return half of the L1 distance of probabilities, averaged over inputs."""
    difference = draws.mean(axis=0) - exact.mean(axis=0)
    return 0.5 * jnp.abs(difference).sum(axis=-1).mean()


def wasserstein(draws, exact):
    """Return the root mean squared distance of quantiles, averaged over inputs."""
    levels = (jnp.arange(200) + 0.5) / 200
    distance = jnp.quantile(draws, levels, axis=0) - jnp.quantile(exact, levels, axis=0)
    return jnp.sqrt((distance**2).mean(axis=0)).mean()


def relative_stddev(draws, exact):
    """Return the standard deviation over the exact one, averaged over inputs."""
    return (draws.std(axis=0) / exact.std(axis=0)).mean()


def make_problem(task, config, num_data):
    """Return the network with one hidden layer, and the length of its training."""
    sizes = task.train[0].shape[1], config.width, task.num_outputs
    epochs = -(-config.steps // (num_data // config.batch_size))
    return baselines.Problem(
        *baselines.mlp(sizes),
        task.loss,
        num_data,
        config.batch_size,
        epochs,
        config.prior_precision,
    )


def sample_exactly(problem, data, key, config):
    """Run chains of Hamiltonian Monte Carlo, each from initial weights of its own.

    Returns weights and blackjax's information, with axes of chains and draws.
    """
    x, y = data

    def log_density(params):
        prior = 0.5 * problem.prior_precision * optax.tree.norm(params, squared=True)
        return -problem.loss(problem.apply(params, x), y).sum() - prior

    def run(key):
        init_key, warmup_key, sample_key = jax.random.split(key, 3)
        adaptation = blackjax.window_adaptation(
            blackjax.hmc,
            log_density,
            target_acceptance_rate=0.85,
            num_integration_steps=config.leapfrogs,
        )
        (state, parameters), _ = adaptation.run(
            warmup_key, problem.init(init_key), num_steps=config.warmup
        )
        _, chain = blackjax.util.run_inference_algorithm(
            sample_key,
            blackjax.hmc(log_density, **parameters),
            num_steps=config.length,
            initial_state=state,
            transform=lambda state, info: (state.position, info),
        )
        return chain

    return jax.jit(jax.vmap(run))(jax.random.split(key, config.chains))


TASKS = {"digits": digits, "regression": regression}
# What is trained, what predicts, and whether all members of an ensemble do.
ROWS = {
    "AdamW": ("AdamW", baselines.adamw, False),
    "SGD": ("SGD", baselines.sgd, False),
    "Laplace": ("Laplace", baselines.laplace, False),
    "SWAG": ("SWAG", baselines.swag, False),
    "BBB": ("BBB", baselines.bbb, False),
    "IVON@mean": ("IVON", baselines.at_mean(baselines.ivon), False),
    "IVON": ("IVON", baselines.ivon, False),
    "EVON": ("EVON", baselines.evon, False),
    "Deep ensemble": ("SGD", baselines.sgd, True),
    "Multi-SWAG": ("SWAG", baselines.swag, True),
    "Multi-IVON": ("IVON", baselines.ivon, True),
}


def grids(task, config):
    """Return nine trials for each system."""
    maximum = {"learning_rate": np.geomspace(0.02, 0.5, 9) * task.rate}
    gaussian = {
        "learning_rate": np.array((0.3, 1.0, 3.0)) * task.rate,
        "hess_init": (0.1, 0.3, 1.0),
    }
    of_values = {
        "AdamW": {
            "learning_rate": (3e-3, 1e-2, 3e-2),
            "weight_decay": (0.1, 0.3, 1.0),
        },
        "SGD": maximum,
        "Laplace": maximum | {"head_precision": (config.prior_precision,)},
        "SWAG": {
            "learning_rate": np.array((0.1, 0.3, 1.0)) * task.rate,
            "swa_ratio": (0.1, 0.3, 1.0),
        },
        "BBB": {
            "learning_rate": (3e-3, 1e-2, 3e-2),
            "hess_init": (0.1, 1.0, 10.0),
        },
        "IVON": gaussian,
        "EVON": gaussian,
    }
    return {
        name: [
            dict(zip(values, map(float, trial), strict=True))
            for trial in itertools.product(*values.values())
        ]
        for name, values in of_values.items()
    }


def stack(settings):
    """Return a tree of arrays of a list of settings."""
    return jax.tree.map(lambda *values: jnp.array(values), *settings)


def tune(task, config, name, trials):
    """Return the validation NLL of all trials, on a third of the training data."""
    x, y = task.train
    cut = 2 * len(y) // 3
    problem, system = make_problem(task, config, cut), ROWS[name][1]
    keys = jax.random.split(jax.random.key(1000), config.tuning_seeds)
    keys = jnp.tile(keys, len(trials))
    settings = stack([t for t in trials for _ in range(config.tuning_seeds)])
    data = x[:cut], y[:cut]
    runs = baselines.fit(system, problem, keys, settings, data, f"tuning {name}")
    arguments = system, problem, runs.state, keys, settings, x[cut:]
    draws = baselines.draws(*arguments, config.num_samples // 4)
    loss = jax.jit(task.scores["NLL"])  # unchecked: a trial may diverge
    losses = [loss(task.predict(run), y[cut:]) for run in draws]
    losses = np.reshape(losses, (len(trials), -1)).mean(axis=1)
    return np.nan_to_num(losses, nan=np.inf)


def measure(task, draws, exact):
    """Return the measures of draws (S, test + shifted inputs, C), one per column."""
    num_test = len(task.shifted)
    scores = [fn(draws[:, :num_test], task.test[1]) for fn in task.scores.values()]
    distances = [
        fn(draws[:, part], exact[:, part])
        for part in np.s_[:num_test, num_test:]
        for fn in task.distances.values()
    ]
    return [float(value) for value in scores + distances]


def predictions(task, config, trials, losses, inputs):
    """Train with the best settings; yield the draws (seeds, S, N, C) of each row."""
    problem = make_problem(task, config, len(task.train[1]))
    keys = jax.random.split(jax.random.key(0), config.seeds * config.members)
    fitted = {}
    for name in trials:
        settings = stack([trials[name][results.best(losses[name])]] * len(keys))
        arguments = ROWS[name][1], problem, keys, settings, task.train
        runs = baselines.fit(*arguments, f"training {name}")
        fitted[name] = runs.state, keys, settings
    for name, (trained, system, ensemble) in ROWS.items():
        # Alone, it is the first member that predicts.
        used = operator.itemgetter(np.s_[:: 1 if ensemble else config.members])
        runs = jax.tree.map(used, fitted[trained])
        arguments = system, problem, *runs, inputs, config.num_samples
        draws = task.predict(baselines.draws(*arguments))
        yield name, draws.reshape(config.seeds, -1, *draws.shape[2:])


def of_chains(params, info, exact, minutes):
    """Say whether the chains agree on predictions (chains, draws, inputs, C)."""
    halves = exact.reshape(2 * len(exact), -1, *exact.shape[2:])
    rhat = np.asarray(blackjax.diagnostics.potential_scale_reduction(halves))
    size = np.asarray(blackjax.diagnostics.effective_sample_size(exact))
    return {
        "weights": sum(x[0, 0].size for x in jax.tree.leaves(params)),
        "chains x draws": f"{exact.shape[0]} x {exact.shape[1]}",
        "acceptance": info.acceptance_rate.mean(),
        "divergent": info.is_divergent.sum(),
        "R-hat: median": np.median(rhat),
        "R-hat: 95th percentile": np.percentile(rhat, 95),
        "R-hat: worst": rhat.max(),
        "ESS: median": np.median(size),
        "ESS: 5th percentile": np.percentile(size, 5),
        "ESS: worst": size.min(),
        "minutes": minutes,
    }


def columns_of(task):
    """Name the measures."""
    columns = [*task.scores, *task.distances]
    return columns + [f"{name}, shifted" for name in task.distances]


def compare(study, name, task, config):
    """Sample, tune, train and measure."""
    begin = time.perf_counter()
    problem = make_problem(task, config, len(task.train[1]))
    params, info = sample_exactly(problem, task.train, jax.random.key(2), config)
    inputs = jnp.concatenate([task.test[0], task.shifted])
    apply = jax.vmap(jax.vmap(problem.apply, (0, None)), (0, None))
    exact = jax.block_until_ready(task.predict(apply(params, inputs)))
    minutes = (time.perf_counter() - begin) / 60
    chains = of_chains(params, info, exact[:, :, : len(task.shifted)], minutes)
    study.table(f"{name}: chains", [chains])

    trials = grids(task, config)
    losses = {system: tune(task, config, system, trials[system]) for system in trials}
    for system in trials:
        study.trials(f"{name}: {system}", trials[system], losses[system])
    pooled = exact.reshape(-1, *exact.shape[2:])
    measured = {
        system: [measure(task, seed, pooled) for seed in draws]
        for system, draws in predictions(task, config, trials, losses, inputs)
    }
    measured["HMC, one chain"] = [
        measure(task, chain, jnp.delete(exact, i, axis=0).reshape(-1, *chain.shape[1:]))
        for i, chain in enumerate(exact)
    ]
    rows = [
        tables.record({"system": system}, columns_of(task), np.transpose(runs))
        for system, runs in measured.items()
    ]
    digits = {column: 1 for column in columns_of(task) if "%" in column}
    study.table(f"{name}: test", rows, digits)


def main():
    """Compare the systems on all tasks; of "HMC, one chain" runs are chains."""
    longer = dict(chains=8, warmup=1000, length=2000, steps=20_000, seeds=10)
    config = flags.parse(Config, __doc__, **longer)
    study = results.Study(config)
    for name in config.tasks.split(","):
        compare(study, name, TASKS[name](config), config)


if __name__ == "__main__":
    main()
