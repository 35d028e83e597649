"""What is learned, and what a system is: three or four pure functions."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import qmc


@dataclasses.dataclass(frozen=True)
class Problem:
    """What to learn, and for how long; `params` is a pair of body and linear head."""

    init: Callable  # key -> params, where params[1] is {"w": (F, C), "b": (C,)}
    features: Callable  # params, x, drop -> (N, F); drop(activations) is for dropout
    loss: Callable  # outputs (N, C), targets -> (N,): negative log-likelihoods
    num_data: int
    batch_size: int
    epochs: int
    prior_precision: float = 1.0  # of every weight
    augment: Callable | None = None  # key, x -> x
    # Steps in one scan, 0 for an epoch; 1 where XLA is slow with convolutions in a
    # loop, as on a CPU.
    steps_per_call: int = 0
    runs_at_once: int = 0  # 0: all, side by side
    steps: int = 0  # 0: of all epochs, without what does not fill a batch

    @property
    def num_steps(self):
        """Steps of a run."""
        return self.steps or self.epochs * (self.num_data // self.batch_size)

    @property
    def weight_decay(self):
        """The prior's share of one example."""
        return self.prior_precision / self.num_data

    @property
    def b2(self):
        """The Hessian is averaged over half of the run, as in the paper."""
        return 1 - 2 / self.num_steps

    def apply(self, params, x, drop=lambda x: x):
        """Map inputs to outputs, (N, C)."""
        return self.features(params, x, drop) @ params[1]["w"] + params[1]["b"]

    def mean_loss(self, params, x, y):
        """Return the mean negative log-likelihood of a batch."""
        return self.loss(self.apply(params, x), y).mean()

    def schedule(self, peak):
        """Warm up in 2.5 % of the steps, as in the paper, then a cosine to zero."""
        warmup = self.num_steps // 40
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.num_steps)
        return lambda count: peak * shape(count)


class System(NamedTuple):
    """How to train and to predict, for settings already chosen."""

    init: Callable  # params -> state
    step: Callable  # key, state, x, y -> state
    outputs: Callable  # key, state, x -> the outputs (N, C) of one draw
    finish: Callable = lambda state, _x, _y: state  # state, all data -> state


def with_prior(system):
    """Make the precision of the prior a hyperparameter of `system`."""

    def with_precision(problem, prior_precision, **setting):
        problem = dataclasses.replace(problem, prior_precision=prior_precision)
        return system(problem, **setting)

    return with_precision


def stopped_early(system):
    """Make a hyperparameter of `system` of the share of its steps that it takes.

    Its schedule is that of all steps, as where one goes back to an earlier epoch.
    """

    def with_share(problem, share, **setting):
        base = system(problem, **setting)

        def step(key, state, x, y):
            old, count = state
            goes_on, new = count < share * problem.num_steps, base.step(key, old, x, y)
            new = jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), new, old)
            return new, count + 1

        return System(
            init=lambda params: (base.init(params), jnp.zeros([], jnp.int32)),
            step=step,
            outputs=lambda key, state, x: base.outputs(key, state[0], x),
            finish=lambda state, x, y: (base.finish(state[0], x, y), state[1]),
        )

    return with_share


def trials(ranges, count):
    """Return settings {name: (count,)}, a Sobol sequence in log(low) to log(high)."""
    low, high = np.log(list(ranges.values())).T
    points = qmc.Sobol(len(ranges), seed=0).random(count)
    points = np.exp(low + points * (high - low)).astype("float32")
    return dict(zip(ranges, points.T, strict=True))


def one_by_one(values):
    """Return `trials` as a list of settings."""
    columns = zip(*values.values(), strict=True)
    return [dict(zip(values, map(float, row), strict=True)) for row in columns]


def stacked(settings, repeats):
    """Return a list of settings as arrays, with each as often as that."""
    return {
        name: jnp.repeat(jnp.array([s[name] for s in settings]), repeats)
        for name in settings[0]
    }


def mlp(sizes):
    """Return ``init`` and ``features`` of a multilayer perceptron with ReLUs."""
    he_normal = jax.nn.initializers.he_normal()

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        weights = map(he_normal, keys, itertools.pairwise(sizes))
        *body, head = ({"w": w, "b": jnp.zeros(w.shape[1])} for w in weights)
        return body, head

    def features(params, x, drop):
        x = x.reshape(len(x), -1)
        for layer in params[0]:
            x = drop(jax.nn.relu(x @ layer["w"] + layer["b"]))
        return x

    return init, features
