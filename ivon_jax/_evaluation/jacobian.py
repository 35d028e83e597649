r"""The model linearised at the posterior's mean, one example at a time.

Under :math:`\theta \sim N(m, \mathrm{diag}(\sigma^2))` the outputs of the linearised
model are Gaussian, with mean :math:`f_i(m)` and covariance
:math:`V_i = J_i \, \mathrm{diag}(\sigma^2) J_i^\top`, where :math:`J_i` is their
Jacobian, C x P. Neither is ever formed: a product with :math:`V_i` is one product with
:math:`J_i^\top` (a backward pass) and one with :math:`J_i` (a forward pass).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._arrays import sharding
from .._arrays.dtypes import wide, wide_dtype
from .._distributions.gaussian import Posterior
from . import validity


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The Gaussian over one example's outputs, through products with its Jacobian."""

    mean: jax.Array  # (C,), or any other shape of C entries: f_i
    pull: Callable[[jax.Array], Any]  # J^T v, for v of that shape
    push: Callable[[Any], jax.Array]  # J t, for t like the trained parameters
    spread: Callable[[Any], Any]  # sigma^2 t

    def covariance_times(self, vector):
        """V v, for two passes through the model."""
        return self.push(self.spread(self.pull(vector)))

    def covariance_diagonal(self):
        """The diagonal of V: an output after the other, a backward pass for each."""

        def variance(output):
            gradient = self.pull(self._one_hot(output))
            spread = self.spread(gradient)
            terms = jax.tree.map(lambda s, g: jnp.sum(s * g), spread, gradient)
            return sum(jax.tree.leaves(terms), start=jnp.zeros([], self.mean.dtype))

        diagonal = jax.lax.map(variance, jnp.arange(self.mean.size))
        return diagonal.reshape(self.mean.shape)

    def covariance(self):
        """V, (C, C), of C outputs: one after the other, two passes for each."""

        def row(output):
            return self.covariance_times(self._one_hot(output))

        return jax.lax.map(row, jnp.arange(self.mean.size))

    def _one_hot(self, output):
        one_hot = jax.nn.one_hot(output, self.mean.size, dtype=self.mean.dtype)
        return sharding.alike(one_hot.reshape(self.mean.shape), self.mean)


def linearize(
    fn: Callable[[optax.Params, Any], jax.Array], q: Posterior
) -> Callable[..., Outputs]:
    """Return the map from one example to the Gaussian over its outputs.

    `fn` takes a batch, here of one example. What `pull` is to be multiplied with, such
    as the example's label, goes to the map as well, for `jax.shard_map`. Point masses
    stay as they are: they need no derivative, and may have none. Everything else is in
    float32 or wider; `fn` gets the parameters in their own dtypes.
    """
    means = jax.tree.map(jnp.asarray, q.mean)
    center = jax.tree.map(lambda m, t: wide(m)[0] if t else None, means, q.trained)

    def of_example(example, *others):
        batch = jax.tree.map(lambda x: x[None], example)
        at = sharding.alike(center, q, example, others)

        def parameters(mean, value):
            return mean if value is None else value.astype(mean.dtype)

        def outputs(values):
            [output] = fn(jax.tree.map(parameters, means, values), batch)
            return sharding.whole(output.astype(wide_dtype(output)))

        output, push = jax.linearize(outputs, at)
        transpose = jax.linear_transpose(push, at)
        return Outputs(output, lambda v: transpose(v)[0], push, q.covariance_times)

    return of_example


def shape_of_outputs(fn, q, x):
    """(..., C), for a checked `fn`; its shapes alone are evaluated."""

    def one(array):
        return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)

    output = jax.eval_shape(fn, q.mean, jax.tree.map(one, x))
    return validity.predictions_of_one(output).shape[1:]
