"""Thompson sampling: one draw of IVON's posterior for each decision.

    python benchmarks/bandit.py        # five minutes of a core

The wheel of Riquelme et al. (2018, Deep Bayesian Bandits Showdown): a context is a
point of the unit disc, and one of five actions is chosen. The first is worth 1.2, the
others 1, but outside of the radius delta one of these, another in each quadrant, is
worth 50. The wider the wheel, the rarer these are, and the more it takes to find them.

A network learns the rewards, a step on a batch of what it has seen after each decision.
IVON decides by a draw of its posterior, the ensemble by one of its networks, dropout by
one mask. "IVON, greedy" trains as IVON and decides by its mean, "constant noise" keeps
h at h_0: one variance for all weights. The number of IVON's examples grows with the
decisions, and a hyperparameter, the standard deviation of rewards, divides it.

Each system has the same number of trials, on two wheels of their own for each delta,
and the one of least regret then decides on other wheels, the same for all systems. The
ranges of IVON's hyperparameters, and no others, were moved after a first run, to around
the best of eight trials that were mostly too fast to learn. Regret is in per cent of
that of choosing at random, and what is less than IVON's is shown with its 95 % interval
over the wheels.

Toy size: `--decisions 40 --trials 2 --tuning_wheels 1 --wheels 2 --deltas 0.5`
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import baselines, flags, intervals, networks, results, tables
from common.flags import Count, Results, Text
from tqdm import tqdm

import ivon_jax

ACTIONS, LARGEST, SPREAD = 5, 50.0, 0.01
LAYERS = 2, 50, 50, ACTIONS
MEMBERS = 5
WINDOW = 500  # steps, of which h is an average


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    deltas: Text = "0.5,0.9,0.95"
    decisions: Count = 2000
    batch_size: Count = 32
    trials: Count = 8  # of each system
    tuning_wheels: Count = 2
    wheels: Count = 16  # as many as trials by wheels: one program for both
    results: Results = "bandit.json"


class Agent(NamedTuple):
    """How to learn rewards and to decide by them."""

    init: Callable  # key -> state
    step: Callable  # key, state, rows, batch, number of decisions before -> state
    values: Callable  # key, state, x -> what the actions seem worth, (ACTIONS,)


class Batch(NamedTuple):
    """Contexts (B, 2), actions and rewards (B,)."""

    x: Any
    action: Any
    reward: Any


def loss(params, batch, weights=1.0, apply=networks.apply):
    """Return half the mean squared error of what the actions were thought worth."""
    values = apply(params, batch.x)
    own = jnp.take_along_axis(values, batch.action[:, None], axis=1)[:, 0]
    return 0.5 * jnp.mean(weights * (own - batch.reward) ** 2)


def uniform():
    """Return the agent that learns nothing."""
    return Agent(
        init=lambda _key: (),
        step=lambda _key, state, *_batch: state,
        values=lambda key, _state, _x: jax.random.uniform(key, (ACTIONS,)),
    )


def point(learning_rate, values, loss):
    """Return an agent that trains with Adam, by random values and losses."""
    tx = optax.adam(learning_rate)

    def init(key):
        params = networks.init(key, LAYERS)
        return params, tx.init(params)

    def step(key, state, _rows, batch, _count):
        grads = jax.grad(lambda p: loss(key, p, batch))(state[0])
        updates, opt_state = tx.update(grads, state[1])
        return optax.apply_updates(state[0], updates), opt_state

    return Agent(init, step, lambda key, state, x: values(key, state[0], x))


def epsilon_greedy(learning_rate, epsilon):
    """Return the agent that now and then decides at random."""

    def values(key, params, x):
        often, which = jax.random.split(key)
        chance = jax.random.uniform(which, (ACTIONS,))
        at_random = jax.random.bernoulli(often, epsilon)
        return jnp.where(at_random, chance, networks.apply(params, x))

    return point(learning_rate, values, lambda _key, p, batch: loss(p, batch))


def dropout(learning_rate, rate):
    """Return the agent that decides by one mask of the units, and learns so."""

    def apply(key, params, x):
        *hidden, last = params
        for i, layer in enumerate(hidden):
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
            x = jnp.where(keep, x / (1 - rate), 0.0)
        return x @ last["w"] + last["b"]

    def dropped(key, params, batch):
        return loss(params, batch, apply=functools.partial(apply, key))

    return point(learning_rate, apply, dropped)


def ensemble(learning_rate, keep):
    """Return the agent of networks that each learn from some of the decisions."""
    tx = optax.adam(learning_rate)

    def init(key):
        init_key, keep_key = jax.random.split(key)
        keys = jax.random.split(init_key, MEMBERS)
        params = jax.vmap(lambda key: networks.init(key, LAYERS))(keys)
        return (params, jax.vmap(tx.init)(params)), keep_key

    def step(_key, state, rows, batch, _count):
        members, keep_key = state

        def of_member(state, member):
            def is_kept(row):
                its = jax.random.fold_in(jax.random.fold_in(keep_key, member), row)
                return jax.random.bernoulli(its, keep)

            weights = jax.vmap(is_kept)(rows) / keep
            grads = jax.grad(loss)(state[0], batch, weights)
            updates, opt_state = tx.update(grads, state[1])
            return optax.apply_updates(state[0], updates), opt_state

        return jax.vmap(of_member)(members, jnp.arange(MEMBERS)), keep_key

    def values(key, state, x):
        member = jax.random.randint(key, (), 0, MEMBERS)
        params = jax.tree.map(lambda a: a[member], state[0][0])
        return networks.apply(params, x)

    return Agent(init, step, values)


def ivon(learning_rate, hess_init, stddev, frozen=False, greedy=False):
    """Return the agent that decides by a draw of IVON's posterior.

    It is that of rewards with noise of `stddev`, in units of the largest one, for as
    many examples as there were decisions; the prior has precision one.
    """

    def optimizer(count):
        ess = (count + 1.0) / stddev**2
        return ivon_jax.ivon(
            *(learning_rate, ess),
            hess_init=hess_init,
            weight_decay=1 / ess,
            horizon=WINDOW,
        )

    def init(key):
        params = networks.init(key, LAYERS)
        return params, optimizer(0).init(params)

    def step(key, state, _rows, batch, count):
        params, opt_state = state
        theta = ivon_jax.sample(key, params, opt_state)
        grads = jax.grad(loss)(theta, batch)
        how = {"sample": theta}
        if frozen:
            how = {"hess": jax.tree.map(lambda p: jnp.full_like(p, hess_init), params)}
        updates, opt_state = optimizer(count).update(grads, opt_state, params, **how)
        return optax.apply_updates(params, updates), opt_state

    def values(key, state, x):
        theta = state[0] if greedy else ivon_jax.sample(key, *state)
        return networks.apply(theta, x)

    return Agent(init, step, values)


RATE = {"learning_rate": (1e-4, 3e-2)}  # of Adam
GAUSSIAN = {
    "learning_rate": (0.02, 0.6),
    "hess_init": (0.01, 3.0),
    "stddev": (0.001, 0.1),
}
SYSTEMS = {
    "epsilon-greedy": (epsilon_greedy, RATE | {"epsilon": (1e-3, 0.3)}),
    "dropout": (dropout, RATE | {"rate": (0.01, 0.5)}),
    "bootstrap ensemble": (ensemble, RATE | {"keep": (0.3, 1.0)}),
    "IVON, greedy": (lambda **setting: ivon(**setting, greedy=True), GAUSSIAN),
    "constant noise": (lambda **setting: ivon(**setting, frozen=True), GAUSSIAN),
    "IVON": (ivon, GAUSSIAN),
}


def worth(x, delta):
    """Return the mean reward of each action at a context."""
    quadrant = 1 + 2 * (x[0] < 0).astype(int) + (x[1] < 0).astype(int)
    inside = jnp.ones(ACTIONS).at[0].set(1.2)
    outside = inside.at[quadrant].set(LARGEST)
    return jnp.where(jnp.linalg.norm(x) > delta, outside, inside)


def draw_context(key):
    """Return a point of the unit disc."""
    radius_key, angle_key = jax.random.split(key)
    radius = jnp.sqrt(jax.random.uniform(radius_key))
    angle = 2 * jnp.pi * jax.random.uniform(angle_key)
    return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def run(make_agent, key, setting, delta, config):
    """Return the regret of every decision, (decisions,), of one wheel."""
    agent = make_agent(**setting)
    wheel_key, init_key, agent_key = jax.random.split(key, 3)
    size = config.decisions
    memory = Batch(jnp.zeros((size, 2)), jnp.zeros(size, jnp.int32), jnp.zeros(size))

    def decide(carry, i):
        state, memory = carry
        context_key, reward_key = jax.random.split(jax.random.fold_in(wheel_key, i))
        act_key, batch_key, step_key = jax.random.split(
            jax.random.fold_in(agent_key, i), 3
        )
        x = draw_context(context_key)
        means = worth(x, delta)
        action = jnp.argmax(agent.values(act_key, state, x))
        reward = means[action] + SPREAD * jax.random.normal(reward_key)
        seen = x, action, reward / LARGEST
        memory = jax.tree.map(lambda m, new: m.at[i].set(new), memory, Batch(*seen))
        rows = jax.random.randint(batch_key, (config.batch_size,), 0, i + 1)
        batch = jax.tree.map(lambda m: m[rows], memory)
        state = agent.step(step_key, state, rows, batch, i)
        return (state, memory), means.max() - means[action]

    carry = agent.init(init_key), memory
    _, regret = jax.lax.scan(decide, carry, jnp.arange(size))
    return regret


@functools.partial(jax.jit, static_argnums=(0, 4))
def run_all(make_agent, keys, settings, deltas, config):
    """Return regrets (runs, decisions)."""

    def one(key, setting, delta):
        return run(make_agent, key, setting, delta, config)

    return jax.vmap(one)(keys, settings, deltas)


def tune(name, deltas, config):
    """Return the best setting for each delta, {name: (deltas,)}, and all trials."""
    make_agent, ranges = SYSTEMS[name]
    values = baselines.trials(ranges, config.trials)
    keys = jax.random.split(jax.random.key(1000), config.tuning_wheels)
    shape = len(deltas), config.trials, config.tuning_wheels
    index = np.indices(shape).reshape(3, -1)
    settings = {k: jnp.asarray(v)[index[1]] for k, v in values.items()}
    arguments = keys[index[2]], settings, jnp.array(deltas)[index[0]], config
    regret = np.asarray(run_all(make_agent, *arguments)).mean(axis=1)
    regret = np.nan_to_num(regret, nan=np.inf).reshape(shape).mean(axis=2)
    rows = [
        {"system": name, "delta": delta, **{k: v[i] for k, v in values.items()}}
        | {"mean regret": found[i]}
        for delta, found in zip(deltas, regret, strict=True)
        for i in range(config.trials)
    ]
    best = [results.best(found) for found in regret]
    return {k: v[best] for k, v in values.items()}, rows


def main():
    """Tune all systems, and let them decide."""
    config = flags.parse(Config, __doc__)
    deltas = fractions(config.deltas)
    study = results.Study(config)
    keys = jax.random.split(jax.random.key(0), config.wheels)
    keys, where = (
        jnp.tile(keys, len(deltas)),
        jnp.repeat(jnp.array(deltas), config.wheels),
    )
    found, trials = {"uniform": run_all(uniform, keys, {}, where, config)}, []
    for name in tqdm(SYSTEMS, leave=False):
        best, rows = tune(name, deltas, config)
        trials += rows
        settings = {
            k: jnp.repeat(jnp.asarray(v), config.wheels) for k, v in best.items()
        }
        found[name] = run_all(SYSTEMS[name][0], keys, settings, where, config)
    study.table("trials", tables.padded(trials))
    shape = len(deltas), config.wheels, config.decisions
    found = {name: np.asarray(regret).reshape(shape) for name, regret in found.items()}
    study.table("regret", regret_rows(found, deltas), {"regret %": 1, "less IVON": 1})
    ends = np.linspace(0, config.decisions, 51).astype(int)[1:] - 1
    curves = {"decisions": ends + 1} | {
        f"{name}, {delta}": regret[i].cumsum(axis=1).mean(axis=0)[ends]
        for name, regret in found.items()
        for i, delta in enumerate(deltas)
    }
    study.curves("cumulative regret", curves)


def regret_rows(found, deltas):
    """Yield a record for each delta and system, per cent of choosing at random."""
    for i, delta in enumerate(deltas):
        chance = found["uniform"][i].sum(axis=1)
        shares = {
            n: 100 * regret[i].sum(axis=1) / chance for n, regret in found.items()
        }
        for name, share in shares.items():
            less = intervals.over_seeds(share - shares["IVON"]).cell
            yield {"delta": str(delta), "system": name, "regret %": share} | {
                "less IVON": less
            }


def fractions(text):
    """Return the numbers of a flag, or exit."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < delta < 1 for delta in found):
        sys.exit(f"`--deltas` must be numbers between 0 and 1, got {text}.")
    return found


if __name__ == "__main__":
    main()
