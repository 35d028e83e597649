"""Linear regression, whose posterior is exact, as a problem for the baselines."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from common import baselines

NOISE = 0.5  # standard deviation of a target


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear regression with a bias, in NumPy: data and the exact posterior."""

    x: np.ndarray  # (N, F)
    y: np.ndarray  # (N,)
    prior_precision: float = 2.0

    @property
    def design(self):
        """The inputs, and a one for the bias."""
        return np.c_[self.x, np.ones(len(self.x))]

    @property
    def precision(self):
        """Of the exact posterior, (F + 1, F + 1)."""
        gram = self.design.T @ self.design / NOISE**2
        return gram + self.prior_precision * np.eye(len(gram))

    @property
    def mean(self):
        """Of the exact posterior, (F + 1,)."""
        return np.linalg.solve(self.precision, self.design.T @ self.y / NOISE**2)

    def problem(self, epochs=1, **changes):
        """Return what `baselines` learns: all examples in a batch, zeros to begin."""
        zeros = {"w": jnp.zeros((self.x.shape[1], 1)), "b": jnp.zeros(1)}
        return baselines.Problem(
            init=lambda _key: ((), zeros),
            features=lambda _params, x, drop: drop(x),
            loss=lambda outputs, y: 0.5 * ((outputs[:, 0] - y) / NOISE) ** 2,
            num_data=len(self.y),
            batch_size=len(self.y),
            epochs=epochs,
            prior_precision=self.prior_precision,
            **changes,
        )


def example():
    """Return twenty examples of three inputs that are correlated."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)) @ (np.eye(3) + 0.5)
    y = x @ [1.0, -2.0, 0.5] + 0.3 + NOISE * rng.normal(size=20)
    return Linear(x, y)


def flat(params):
    """Weights and bias as one vector; of runs side by side, in the last axis."""
    w, b = params[1]["w"], params[1]["b"]
    return np.concatenate([w[..., 0], b], axis=-1)


def unflat(vector):
    """The parameters of a vector."""
    return (), {"w": jnp.asarray(vector[:-1, None]), "b": jnp.asarray(vector[-1:])}


def train(system, problem, linear, keys, **setting):
    """Return the states of a run for each key."""
    settings = {name: jnp.full(len(keys), value) for name, value in setting.items()}
    data = jnp.asarray(linear.x), jnp.asarray(linear.y)
    return baselines.fit(system, problem, keys, settings, data).state


def steps_of(system, state, keys, linear):
    """Yield the states after each step on all data."""
    step = jax.jit(system.step)
    for key in keys:
        state = step(key, state, jnp.asarray(linear.x), jnp.asarray(linear.y))
        yield state
