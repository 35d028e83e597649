"""Natural parameters, of which a point mass has some, too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._arrays.dtypes import wide


class PointMass(NamedTuple):
    """A point mass in the `quadratic` of `NaturalParameters`, where that is infinite.

    In a product its weight counts the factors, and its `linear` is their sum.

    >>> from ivon_jax import Posterior
    >>> q = Posterior(mean={"w": jnp.ones(2)}, precision={"w": None})
    >>> q.natural_parameters.quadratic["w"].weight.item()
    1.0
    """

    weight: jax.Array  #: (), float32: one for a single Gaussian


class NaturalParameters(NamedTuple):
    r"""Natural parameters of a Gaussian; those of a product of Gaussians add up.

    For a point mass the pair is the mean and a `PointMass` of weight one, in units of
    an infinite precision.

    >>> import jax
    >>> from ivon_jax import Posterior
    >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
    >>> eta = q.natural_parameters
    >>> product = jax.tree.map(jnp.add, eta, eta)  # of q with itself
    >>> print(Posterior.from_natural_parameters(product).precision)
    [8. 8.]
    """

    linear: optax.Params  #: m / sigma^2, shapes of the mean
    quadratic: optax.Params  #: -1 / (2 sigma^2), the same; a `PointMass` where infinite


def summable(mean):
    """The place of a point mass, in a dtype that holds sums of some."""
    mean = jnp.asarray(mean)
    if jnp.issubdtype(mean.dtype, jnp.floating):
        [mean] = wide(mean)
    elif jnp.issubdtype(mean.dtype, jnp.integer):
        mean = mean.astype(jnp.int32) if mean.itemsize < 4 else mean
    return mean


def place(total, weight):
    """The place of a point mass, from its natural parameters."""
    total = jnp.asarray(total)
    if jnp.issubdtype(total.dtype, jnp.floating):
        return total / jnp.asarray(weight, total.dtype)
    if jnp.issubdtype(total.dtype, jnp.integer):
        return total // jnp.round(weight).astype(total.dtype)
    return total
