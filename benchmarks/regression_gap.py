"""One-dimensional regression with a gap in the data: IVON beside AdamW.

    python benchmarks/regression_gap.py      # 20 s on two free CPU cores

A network learns from 100 noisy points in two clusters. AdamW ends with one prediction,
whose only uncertainty is the noise of the targets, constant by construction; IVON ends
with a Gaussian over the weights, whose draws disagree where there are no data: the
paper's Fig. 3(c). They are tested on new points in the clusters. "sd" is the mean
predictive standard deviation in a region, "spread" the same less the noise.

It is not haste that the spread in the gap is modest: 60,000 steps with b2 0.9998 and
learning rate 0.02 gave an sd of 0.125, 0.152 and 0.419. Where the fit needs no bend in
the gap (target ``x * sin(2 * x) / 1.5``), the gap's sd, 0.11, was even below the
data's, 0.13.

Learning rates, AdamW's weight decay and IVON's prior are from nine settings each, by
NLL on other seeds; IVON's prior stayed a standard normal, 0.006 from the best.

Toy size: `--steps 20 --seeds 1`
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from common import flags, results, tables, training
from common.flags import Count, Fraction, Positive, Results, Seed
from flax import nnx
from jax.scipy.stats import norm
from tqdm import tqdm

import ivon_jax

COLUMNS = (
    *("RMSE", "NLL", "sd, data", "sd, gap", "sd, outside"),
    *("spread, data", "spread, gap", "spread, outside"),
)
REGIONS = {"data": (0.6, 1.6), "gap": (0.0, 0.6), "outside": (1.6, 2.6)}  # of |x|
CHUNK = 1000  # steps of one compiled scan, between two moves of the progress bar


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    num_data: Annotated[int, flags.between(2)] = 100  # half on each side of the gap
    noise: Positive = 0.1  # standard deviation of the targets' noise, known to both
    hidden: Count = 32  # units in each of the two hidden layers
    steps: Count = 20_000  # full-batch steps
    adamw_learning_rate: float = 0.01
    adamw_weight_decay: float = 1.0
    ivon_learning_rate: float = 0.05  # a share of the Newton step; 0.1 can diverge
    prior_precision: Positive = 1.0  # a standard normal prior over every parameter
    b2: Fraction = 0.9995  # h forgets in 2,000 steps: 0.9999 is slow, 0.999 diverges
    num_samples: Count = 256  # draws of theta
    seeds: Count = 3  # runs, each with data, initial weights and draws of its own
    seed: Seed = 0
    results: Results = "regression_gap.json"


def target(x):
    """The function to learn."""
    return 0.7 * jnp.sin(2.5 * x)


@functools.partial(jax.jit, static_argnames="num_data")
def make_data(key, num_data, noise):
    """Inputs in two clusters and their noisy targets, (num_data,) each."""
    input_key, noise_key = jax.random.split(key)
    low, high = REGIONS["data"]
    x = jax.random.uniform(input_key, (num_data,), minval=low, maxval=high)
    x = x.at[::2].multiply(-1)
    return x, target(x) + noise * jax.random.normal(noise_key, x.shape)


def make_model(key, hidden):
    """A ReLU network with two hidden layers."""
    rngs = nnx.Rngs(key)
    first = nnx.Linear(1, hidden, rngs=rngs)
    second = nnx.Linear(hidden, hidden, rngs=rngs)
    last = nnx.Linear(hidden, 1, rngs=rngs)
    return nnx.Sequential(first, nnx.relu, second, nnx.relu, last)


def make_methods(cfg):
    """Each method's optimizer, and ``draw(key, params, opt_state)`` of its weights."""
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(cfg.ivon_learning_rate, cfg.steps),
        ess=cfg.num_data,
        hess_init=1 / cfg.noise**2,  # the loss's curvature in the output's bias
        b2=cfg.b2,
        weight_decay=cfg.prior_precision / cfg.num_data,
        rescale_lr=False,
    )
    schedule = optax.cosine_decay_schedule(cfg.adamw_learning_rate, cfg.steps)
    adamw = optax.adamw(schedule, weight_decay=cfg.adamw_weight_decay)
    return {"AdamW": training.point_mass(adamw), "IVON": training.gaussian(ivon)}


@functools.partial(jax.jit, static_argnames=("loss_fn", "tx", "draw"))
def take_steps(loss_fn, tx, draw, carry, data, keys):
    """Take one step for each key."""

    def step(carry, key):
        return training.take_step(loss_fn, tx, draw, carry, data, key), None

    return jax.lax.scan(step, carry, keys)[0]


def train(name, loss_fn, tx, draw, params, data, keys):
    """Return the parameters and the optimizer's state after a step for each key."""
    carry = params, tx.init(params)
    with tqdm(total=len(keys), desc=name, unit="step") as bar:
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            carry = take_steps(loss_fn, tx, draw, carry, data, chunk)
            jax.block_until_ready(carry)
            bar.update(len(chunk))
    return carry


@functools.partial(jax.jit, static_argnames=("apply", "draw"))
def draw_functions(apply, draw, carry, keys, x):
    """Draws of f(x), one for each key on the first axis."""
    return jax.vmap(lambda key: apply(draw(key, *carry), x))(keys)


@jax.jit
def evaluate(f_test, y_test, f_grid, grid, noise):
    """RMSE, NLL, and in each region the mean predictive sd with and without noise."""
    rmse = jnp.sqrt(jnp.mean((f_test.mean(axis=0) - y_test) ** 2))
    # The predictive density is the mean over draws of densities, not of their logs.
    log_density = jax.nn.logsumexp(norm.logpdf(y_test, f_test, noise), axis=0)
    nll = math.log(len(f_test)) - jnp.mean(log_density)
    spread, distance = f_grid.var(axis=0), jnp.abs(grid)
    stddev = jnp.sqrt(spread + noise**2)
    regions = [(low <= distance) & (distance < high) for low, high in REGIONS.values()]
    stddevs = [jnp.mean(stddev, where=region) for region in regions]
    spreads = [jnp.mean(jnp.sqrt(spread), where=region) for region in regions]
    return jnp.stack([rmse, nll, *stddevs, *spreads])


def main():
    """Train both on every run's data; keep where they are how sure."""
    cfg = flags.parse(Config, __doc__)
    init = jax.jit(lambda key: nnx.split(make_model(key, cfg.hidden), nnx.Param)[1])
    graphdef = nnx.graphdef(make_model(jax.random.key(0), cfg.hidden))

    def apply(params, x):
        return nnx.merge(graphdef, params)(x[:, None])[:, 0]

    def loss_fn(params, x, y):
        # In nats per example, with the noise: `ess` times it is the data set's negative
        # log-likelihood where `ess` is N, and IVON's target the true posterior.
        return -jnp.mean(norm.logpdf(y, apply(params, x), cfg.noise))

    methods = make_methods(cfg)
    grid = jnp.linspace(-2.6, 2.6, 521)
    study, scores = results.Study(cfg), {name: [] for name in methods}
    run_keys = jax.random.split(jax.random.key(cfg.seed), cfg.seeds)
    for run_key in run_keys:
        data_key, test_key, init_key, train_key, draw_key = jax.random.split(run_key, 5)
        data = make_data(data_key, cfg.num_data, cfg.noise)
        x_test, y_test = make_data(test_key, 1000, cfg.noise)
        step_keys = jax.random.split(train_key, cfg.steps)  # one theta for each step
        draw_keys = jax.random.split(draw_key, cfg.num_samples)
        for name, (tx, draw) in methods.items():
            carry = train(name, loss_fn, tx, draw, init(init_key), data, step_keys)
            f_grid = draw_functions(apply, draw, carry, draw_keys, grid)
            f_test = draw_functions(apply, draw, carry, draw_keys, x_test)
            score = evaluate(f_test, y_test, f_grid, grid, cfg.noise)
            scores[name].append(score)
    rows = [
        tables.record({"system": name}, COLUMNS, jnp.stack(runs, axis=1))
        for name, runs in scores.items()
    ]
    study.table("test", rows, dict.fromkeys(COLUMNS, 3))


if __name__ == "__main__":
    main()
