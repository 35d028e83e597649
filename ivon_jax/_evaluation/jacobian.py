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

from .. import _checks
from .._arrays import sharding
from .._arrays.dtypes import wide_dtype
from .._distributions.gaussian import Posterior


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The Gaussian over one example's outputs, through products with its Jacobian."""

    mean: jax.Array  # (C,), or any other shape of C entries: f_i
    pull: Callable[[jax.Array], Any]  # J^T v, for v of that shape
    push: Callable[[Any], jax.Array]  # J t, for t like the trained parameters
    variance: Any  # sigma^2, like the trained parameters

    def covariance_times(self, vector):
        """V v, for two passes through the model."""
        return self.push(jax.tree.map(jnp.multiply, self.variance, self.pull(vector)))

    def covariance_diagonal(self):
        """The diagonal of V: an output after the other, a backward pass for each."""

        def variance(output):
            gradient = self.pull(self._one_hot(output))
            terms = jax.tree.map(
                lambda s, g: jnp.sum(s * g**2), self.variance, gradient
            )
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
    mean, structure = jax.tree.flatten(q.mean)
    precision = structure.flatten_up_to(q.precision)
    trained = [i for i, p in enumerate(precision) if p is not None]
    center = [jnp.asarray(mean[i]).astype(precision[i].dtype) for i in trained]
    variance = [1.0 / precision[i] for i in trained]

    def of_example(example, *others):
        batch = jax.tree.map(lambda x: x[None], example)
        means = [jnp.asarray(x) for x in mean]
        at = sharding.alike(center, means, variance, example, others)

        def outputs(values):
            leaves = list(mean)
            for i, value in zip(trained, values, strict=True):
                leaves[i] = value.astype(jnp.result_type(mean[i]))
            [output] = fn(structure.unflatten(leaves), batch)
            return sharding.whole(output.astype(wide_dtype(output)))

        output, push = jax.linearize(outputs, at)
        transpose = jax.linear_transpose(push, at)
        return Outputs(output, lambda v: transpose(v)[0], push, variance)

    return of_example


def shape_of_outputs(fn, q, x):
    """(..., C), for a checked `fn`; its shapes alone are evaluated."""

    def one(array):
        return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)

    output = jax.eval_shape(fn, q.mean, jax.tree.map(one, x))
    return _checks.predictions_of_one(output).shape[1:]


def num_outputs(fn, q, x):
    """C, for an `fn` that has no more axes."""
    return _checks.one_axis_of_outputs(shape_of_outputs(fn, q, x))
