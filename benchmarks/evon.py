"""How close do EVON and IVON come to a posterior with correlations, at which cost?

    OPENBLAS_NUM_THREADS=1 python benchmarks/evon.py         # 10 min of one core
    python benchmarks/evon.py --networks mlp --problems linear --seeds 1    # a look

Where other programs run, OpenBLAS's threads wait for each other: with two, a
factorisation of 128 x 128 took half a second in the place of a millisecond.

Three problems with eight correlated inputs and one matrix of weights. "linear" has
three targets: its exact posterior is Gaussian, with one covariance of inputs for every
target, which a basis of its own for each side can hold. "two classes" is logistic
regression, one column of weights. "three classes" has a softmax: there no pair of bases
can hold the covariances, because they differ between classes. What is best for the
last two is the Gaussian with all covariances, by a long optimisation of the bound;
"diagonal" is the best without any.

* covariance: largest difference of two covariances, divided by the largest entry of the
  exact or best one.
* mean: largest difference of means, in standard deviations of the exact or best one.
* gap: nats by which the evidence lower bound is below that of the exact or best one.
  KL(q | exact) in "linear", else a mean over draws, good to the error that is given.

All have the same learning rate, schedule and steps, and b2 of which 1 / (1 - b2) is a
small part of the run. Rows of EVON differ from the first in one setting. At the end
stand time and memory of a whole training step, in the programs of overhead.py.

Toy size: `--steps 20 --rounds 2 --draws 64 --iterations 5 --seeds 1 --networks mlp`
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import overhead
from common import flags, results, tables
from common.flags import Count, Fraction, Positive, Results, Seed
from tqdm import tqdm

import ivon_jax

NUM_INPUTS = 8
COLUMNS = "covariance", "mean", "gap", "its error"
DIGITS = {"covariance": 3, "mean": 3, "gap": 3, "its error": 3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    problems: str = "linear,two classes,three classes"
    num_data: Count = 400
    condition: Positive = 3000.0  # largest over smallest variance of the inputs
    prior_precision: Positive = 0.1  # of each weight
    steps: Count = 12_000
    learning_rate: Positive = 0.1  # at first; it decays to zero
    b2: Fraction = 0.999
    iterations: Count = 400  # of the long optimisation
    draws: Count = 4096  # of one of its iterations; for the bound five times as many
    seeds: Count = 3  # runs on the same data
    seed: Seed = 0  # of the data
    networks: str = "gpt2-tiny,mlp"
    width: Count = 256  # of the mlp
    rounds: Count = 7
    results: Results = "evon.json"


class Problem(NamedTuple):
    """Data, and the mean negative log-likelihood of weights (inputs, columns)."""

    x: jax.Array
    y: jax.Array
    columns: int
    loss: callable  # (outputs, y) -> (N,)

    def nll(self, theta):
        """Per example, in nats, with its constants."""
        theta = theta.reshape(NUM_INPUTS, self.columns)
        return jnp.mean(self.loss(self.x @ theta, self.y))


class Gaussian(NamedTuple):
    """One with all covariances, over the weights in one row."""

    mean: np.ndarray
    covariance: np.ndarray


def make_problem(name, config):
    """Inputs of unequal variance in random directions; labels follow the model."""
    rng = np.random.default_rng(config.seed)
    variances = np.geomspace(1.0, 1.0 / config.condition, NUM_INPUTS)
    turn = np.linalg.qr(rng.normal(size=(NUM_INPUTS, NUM_INPUTS)))[0]
    z = rng.normal(size=(config.num_data, NUM_INPUTS)) * np.sqrt(variances)
    x = jnp.asarray(z @ turn.T, jnp.float32)
    columns = {"linear": 3, "two classes": 1, "three classes": 3}[name]
    outputs = x @ jnp.asarray(rng.normal(size=(NUM_INPUTS, columns)), jnp.float32)
    key = jax.random.key(config.seed)
    if name == "linear":
        y = outputs + jax.random.normal(key, outputs.shape)
        return Problem(x, y, columns, squared_error)
    if name == "two classes":
        y = jax.random.bernoulli(key, jax.nn.sigmoid(outputs[:, 0]))
        return Problem(x, y.astype(jnp.float32), columns, logistic)
    y = jax.random.categorical(key, outputs)
    loss = optax.softmax_cross_entropy_with_integer_labels
    return Problem(x, y, columns, loss)


def squared_error(outputs, y):
    """Negative log-likelihood for noise of variance one."""
    return jnp.sum(0.5 * (outputs - y) ** 2 + 0.5 * jnp.log(2 * jnp.pi), axis=1)


def logistic(outputs, y):
    """Negative log-likelihood of two classes."""
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], y)


def best_gaussian(problem, config, diagonal):
    """Newton's steps for the bound: its exact gradients, as means over draws.

    For precision P and mean m of the Gaussian, the bound is stationary where P is the
    prior's precision plus N E[Hessian], and the gradient is zero. In one iteration half
    of the way is taken, less and less towards the end.
    """
    size, total = NUM_INPUTS * problem.columns, len(problem.x)
    prior = config.prior_precision * jnp.eye(size)
    derivatives = jax.vmap(jax.grad(problem.nll)), jax.vmap(jax.hessian(problem.nll))

    @jax.jit
    def iterate(carry, key_and_rate):
        (mean, precision), (key, rate) = carry, key_and_rate
        root = jnp.linalg.cholesky(jnp.linalg.inv(precision))
        noise = jax.random.normal(key, (config.draws // 16, size))
        theta = mean + jnp.concatenate([noise, -noise]) @ root.T
        grad, hess = (jnp.mean(d(theta), axis=0) for d in derivatives)
        hess = prior + total * hess
        slope = total * grad + config.prior_precision * mean
        mean = mean - rate * jnp.linalg.solve(hess, slope)
        target = jnp.diag(jnp.diag(hess)) if diagonal else hess
        return (mean, precision + rate * (target - precision)), None

    rates = 0.5 * optax.cosine_decay_schedule(1.0, config.iterations)(
        jnp.arange(config.iterations)
    )
    keys = jax.random.split(jax.random.key(1), config.iterations)
    start = jnp.zeros(size), prior + 0.25 * total * jnp.eye(size)
    (mean, precision), _ = jax.lax.scan(iterate, start, (keys, rates))
    return Gaussian(*map(np.float64, (mean, jnp.linalg.inv(precision))))


def exact_gaussian(problem, config):
    """The posterior of linear regression."""
    x = np.asarray(problem.x, np.float64)
    precision = x.T @ x + config.prior_precision * np.eye(NUM_INPUTS)
    mean = np.linalg.solve(precision, x.T @ np.asarray(problem.y, np.float64))
    covariance = np.kron(np.linalg.inv(precision), np.eye(problem.columns))
    return Gaussian(mean.ravel(), covariance)


def systems(config):
    """Return what trains, by name."""
    shared = {
        "learning_rate": optax.cosine_decay_schedule(
            config.learning_rate, config.steps
        ),
        "ess": config.num_data,
        "b2": config.b2,
        "weight_decay": config.prior_precision / config.num_data,
    }
    evon = functools.partial(ivon_jax.evon, **shared)
    return {
        "IVON": ivon_jax.ivon(**shared),
        "EVON": evon(),
        "EVON, bases of the first gradient": evon(basis_every=config.steps + 1),
        "EVON, bases in every step": evon(basis_every=1),
        "EVON, hess_clip 2": evon(hess_clip=2.0),
        "EVON, b2 0.9999": evon(b2=0.9999),
    }


def fit(problem, tx, config):
    """Return the Gaussian of each seed; all examples are in every step."""

    def step(carry, key):
        params, opt_state = carry
        theta = ivon_jax.sample(key, params, opt_state)
        grads = jax.grad(problem.nll)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    def run(key):
        params = jnp.zeros((NUM_INPUTS, problem.columns))
        keys = jax.random.split(key, config.steps)
        params, opt_state = jax.lax.scan(step, (params, tx.init(params)), keys)[0]
        q = ivon_jax.posterior(params, opt_state)

        def covariance_times(row):
            return q.covariance_times(row.reshape(params.shape)).ravel()

        return params.ravel(), jax.vmap(covariance_times)(jnp.eye(params.size))

    # One after the other: side by side, new bases would be made in every step.
    keys = jax.random.split(jax.random.key(2), config.seeds)
    means, covariances = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    return [Gaussian(*map(np.float64, x)) for x in zip(means, covariances, strict=True)]


def bound(problem, q, config):
    """Return draws of the evidence lower bound, in nats, from one set of noise."""
    size, total = len(q.mean), len(problem.x)
    root = jnp.asarray(np.linalg.cholesky(q.covariance), jnp.float32)
    noise = jax.random.normal(jax.random.key(3), (5 * config.draws, size))
    theta = jnp.asarray(q.mean, jnp.float32) + noise @ root.T
    nll = np.float64(jax.jit(lambda t: jax.lax.map(problem.nll, t))(theta))
    precision = config.prior_precision
    quadratic = precision * (np.trace(q.covariance) + q.mean @ q.mean)
    log_ratio = np.linalg.slogdet(q.covariance)[1] + size * np.log(precision)
    return -total * nll - 0.5 * (quadratic - size - log_ratio)


def divergence(q, exact):
    """KL(q | exact), in nats."""
    precision, shift = np.linalg.inv(exact.covariance), q.mean - exact.mean
    dets = [np.linalg.slogdet(g.covariance)[1] for g in (exact, q)]
    trace = np.trace(precision @ q.covariance) + shift @ precision @ shift
    return 0.5 * (trace - len(shift) + dets[0] - dets[1])


def distances(problem, q, best, config):
    """Return a value for each of the columns."""
    difference = np.abs(q.covariance - best.covariance).max()
    shift = np.abs(q.mean - best.mean) / np.sqrt(np.diag(best.covariance))
    if problem.loss is squared_error:
        gap, error = divergence(q, best), 0.0
    else:
        gaps = bound(problem, best, config) - bound(problem, q, config)
        gap, error = gaps.mean(), gaps.std() / np.sqrt(len(gaps))
    return difference / np.abs(best.covariance).max(), shift.max(), gap, error


def compare(study, name, config):
    """Fit all systems to one problem."""
    problem = make_problem(name, config)
    linear = name == "linear"
    best = exact_gaussian(problem, config) if linear else None
    best = best or best_gaussian(problem, config, diagonal=False)
    fitted = {"diagonal": [best_gaussian(problem, config, diagonal=True)]}
    for system, tx in tqdm(systems(config).items(), desc=name):
        fitted[system] = fit(problem, tx, config)
    rows = []
    for system, runs in fitted.items():
        values = [distances(problem, q, best, config) for q in runs]
        rows.append(tables.record({"system": system}, COLUMNS, np.transpose(values)))
    study.table(name, rows, DIGITS)


def time_steps(study, config):
    """Time the training steps of whole networks, in turns."""
    optimizers = [overhead.Optimizer(name) for name in ("IVON", "AdamW", "EVON")]
    sizes = overhead.Config(
        mlp_width=config.width, rounds=config.rounds, models=config.networks
    )
    names = config.networks.split(",")
    rows = []
    with tqdm(total=len(names) * len(optimizers), desc="steps") as bar:
        for name in names:
            problem = overhead.create_problem(name, sizes)
            rows += overhead.compare(problem, optimizers, sizes, bar)
    for row in rows:
        row["time / IVON"] = row.pop("time / AdamW")  # of the first one
    digits = overhead.DIGITS | {"ms": 1, "time / IVON": 2}
    study.table("step", rows, digits)


def main():
    """Compare on all problems, then time."""
    config = flags.parse(Config, __doc__)
    study = results.Study(config)
    for name in config.problems.split(","):
        compare(study, name, config)
    time_steps(study, config)


if __name__ == "__main__":
    main()
