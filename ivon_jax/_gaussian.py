"""The Gaussian over the weights, as a pytree, and its algebra."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _noise, _rules, _sharding


class NaturalParameters(NamedTuple):
    r"""Natural parameters of a Gaussian; those of a product of Gaussians add up."""

    linear: optax.Params  # m / sigma^2, shapes of the mean; the mean of a point mass
    quadratic: optax.Params  # -1 / (2 sigma^2), the same; None for a point mass


class Posterior(NamedTuple):
    r"""The Gaussian :math:`q(\theta) = N(m, \mathrm{diag}(\sigma^2))`, as a pytree.

    Like any pytree of arrays it goes through ``jit``, ``vmap``, sharding, Orbax and
    msgpack. A parameter array that IVON doesn't train is a point mass: its entry of
    `precision` is None, its variance is zero, and densities leave it out.

    >>> q = Posterior(mean={"w": jnp.zeros(2)}, precision={"w": jnp.full(2, 4.0)})
    >>> print(q.stddev["w"])
    [0.5 0.5]

    Attributes:
      mean: the parameters, any pytree of arrays.
      precision: :math:`1 / \sigma^2 = \lambda (h + \delta)`, of the data set: the
        structure and shapes of `mean`, float32 or wider; None for a point mass.
    """

    mean: optax.Params
    precision: optax.Params

    @classmethod
    def isotropic(
        cls, mean: optax.Params, precision: jax.typing.ArrayLike
    ) -> "Posterior":
        r"""Return a Gaussian with one precision everywhere: a prior around `mean`.

        >>> prior = Posterior.isotropic({"w": jnp.ones(2)}, precision=4.0)
        >>> print(prior.stddev["w"])
        [0.5 0.5]

        Args:
          mean: any pytree of arrays, such as pretrained weights. Integers are point
            masses.
          precision: :math:`1 / \sigma^2`, positive, of the data set: IVON's own prior
            has ``ess * weight_decay``.

        Raises:
          TypeError, ValueError: `precision` is no positive number.
        """
        precision = _checks.positive("precision", precision)

        def full(x):
            dtype = jnp.result_type(x)
            if not jnp.issubdtype(dtype, jnp.floating):
                return None
            return jnp.full_like(x, precision, np.promote_types(dtype, jnp.float32))

        return cls(mean, jax.tree.map(full, mean))

    @classmethod
    def from_natural_parameters(cls, natural: NaturalParameters) -> "Posterior":
        r"""Return the Gaussian of these `natural_parameters`.

        Sums of natural parameters are products of Gaussians: how posteriors of several
        data sets are combined, ``sum of the posteriors' - (n - 1) times the prior's``.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> product = jax.tree.map(jnp.add, q.natural_parameters, q.natural_parameters)
        >>> print(Posterior.from_natural_parameters(product).precision)
        [8. 8.]

        Raises:
          ValueError: the trees differ, or a quadratic entry is not negative.
        """
        _checks.natural_parameters(natural)
        q = cls(natural.linear, jax.tree.map(lambda x: -2.0 * x, natural.quadratic))
        return q._replace(mean=map_arrays(lambda x, p: x / p, q, point_mass=_itself))

    @property
    def natural_parameters(self) -> NaturalParameters:
        r""":math:`m / \sigma^2` and :math:`-1 / (2 \sigma^2)`, float32 or wider.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> print(*q.natural_parameters)
        [4. 4.] [-2. -2.]
        """
        return NaturalParameters(
            map_arrays(lambda m, p: p * m.astype(p.dtype), self, point_mass=_itself),
            map_arrays(lambda _, p: -0.5 * p, self),
        )

    def tempered(self, temperature: jax.typing.ArrayLike) -> "Posterior":
        r"""Return :math:`q^{1/T}`, normalised: the variance times the temperature T.

        A posterior at another ess :math:`\lambda'` is ``q.tempered(ess / new_ess)``.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> print(q.tempered(0.25).stddev)
        [0.25 0.25]

        Args:
          temperature: T, positive; below one is a cold, narrower posterior.

        Raises:
          TypeError, ValueError: `temperature` is no positive number.
        """
        temperature = _checks.positive("temperature", temperature)

        def divide(_, precision):
            return precision / jnp.asarray(temperature, precision.dtype)

        return self._replace(precision=map_arrays(divide, self))

    def restricted(
        self, mask: optax.Params | Callable[[optax.Params], optax.Params]
    ) -> "Posterior":
        """Return this posterior over some parameters, the others fixed at their mean.

        For uncertainty of the last layer alone: with its inputs kept, a sample costs no
        more than that layer.

        >>> q = Posterior.isotropic({"body": jnp.ones(2), "head": jnp.ones(2)}, 4.0)
        >>> print(q.restricted({"body": False, "head": True}).precision)
        {'body': None, 'head': Array([4., 4.], dtype=float32)}

        Args:
          mask: a tree of booleans, or a prefix of one, or a function from `mean` to
            it, as for `optax.masked`: True stays as it is.

        Raises:
          ValueError, TypeError: `mask` does not fit, or has other leaves than booleans.
        """
        mask = mask(self.mean) if callable(mask) else mask
        keep = _checks.mask_of("mask", mask, self.mean)
        precision = map_arrays(lambda _, p, kept: p if kept else None, self, keep)
        return self._replace(precision=precision)

    @property
    def variance(self) -> optax.Params:
        r""":math:`\sigma^2`, a tree of `mean`'s structure; zero for a point mass."""
        return map_arrays(lambda _, p: 1.0 / p, self, point_mass=jnp.zeros_like)

    @property
    def stddev(self) -> optax.Params:
        r""":math:`\sigma`, a tree of `mean`'s structure; zero for a point mass."""
        return map_arrays(
            lambda _, p: 1.0 / jnp.sqrt(p), self, point_mass=jnp.zeros_like
        )

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> optax.Params:
        r"""Draw :math:`\theta \sim q`.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.ones(2))
        >>> q.sample(jax.random.key(0), shape=(5,)).shape
        (5, 2)

        Args:
          key: a JAX random key. The same key gives the same draw on any mesh.
          shape: leading axes of independent draws, one key of
            ``jax.random.split(key, shape)`` each.

        Returns:
          A tree of `mean`'s structure and dtypes; each array has shape
          ``shape + mean.shape``. Point masses are their mean.
        """

        def draw(key):
            return drawn(self, standard_normal(self, key))

        for _ in shape:
            draw = jax.vmap(draw)
        return draw(jax.random.split(key, shape) if shape else key)

    def log_prob(self, theta: optax.Params) -> jax.Array:
        r"""Log-density :math:`\log q(\theta)` in nats, without the point masses.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 2 * jnp.pi))
        >>> print(q.log_prob(jnp.zeros(2)))
        0.0
        """
        theta = _checks.like("theta", theta, "the posterior's mean", self.mean)

        def log_density(mean, precision, x):
            x, mean = (jnp.asarray(value, precision.dtype) for value in (x, mean))
            log_scale = jnp.log(precision / (2 * math.pi))
            return 0.5 * jnp.sum(log_scale - precision * (x - mean) ** 2)

        return _total(map_arrays(log_density, self, theta))

    def entropy(self) -> jax.Array:
        r"""Entropy :math:`-E_q[\log q(\theta)]` in nats, without the point masses.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 2 * jnp.pi * jnp.e))
        >>> print(round(float(q.entropy()), 6) + 0.0)
        0.0
        """
        return _total(
            map_arrays(lambda _, p: 0.5 * jnp.sum(1 - jnp.log(p / (2 * math.pi))), self)
        )

    def kl_divergence(self, prior: "Posterior") -> jax.Array:
        r"""Kullback-Leibler divergence :math:`KL(q \| p)` to another Gaussian, in nats.

        With precisions :math:`s_q, s_p` and means :math:`m_q, m_p` it is the sum of
        :math:`[\log(s_q / s_p) + s_p / s_q + s_p (m_q - m_p)^2 - 1] / 2`.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.ones(2))
        >>> prior = Posterior(mean=jnp.zeros(2), precision=jnp.ones(2))
        >>> print(q.kl_divergence(prior))
        1.0

        Args:
          prior: a Gaussian over the same tree. IVON's own has mean zero and precision
            ``ess * weight_decay``. What is a point mass in both is left out.

        Raises:
          ValueError: a parameter is a point mass in one of the two alone, where the
            divergence is infinite.
        """
        _checks.gaussian("prior", prior, Posterior)
        _checks.like("prior.mean", prior.mean, "the posterior's mean", self.mean)
        _checks.same_point_masses(self, prior)

        def divergence(mean, precision, prior_mean, prior_precision):
            means = (mean, prior_mean)
            mean, prior_mean = (jnp.asarray(m, precision.dtype) for m in means)
            excess = (prior_precision - precision) / precision
            shift = prior_precision * (mean - prior_mean) ** 2
            return 0.5 * jnp.sum(excess - jnp.log1p(excess) + shift)

        return _total(map_arrays(divergence, self, prior.mean, prior.precision))


def standard_normal(q: Posterior, key: jax.Array) -> optax.Params:
    """Draw noise in `precision`'s dtypes; every array has a key of its own."""
    leaves, structure = jax.tree.flatten(q.mean)
    keys = []
    # With all keys at once, XLA would begin all arrays' noise before it ends any.
    for _ in leaves:
        key, leaf_key = jax.random.split(key)
        keys.append(leaf_key)

    def draw(mean, precision, leaf_key):
        # Without its sharding every device would draw the noise of all.
        sharding = _sharding.in_type(mean)
        return _noise.normal(
            leaf_key, mean.shape, precision.dtype, out_sharding=sharding
        )

    return map_arrays(draw, q, structure.unflatten(keys))


def drawn(
    q: Posterior, noise: optax.Params, dtype: jax.typing.DTypeLike | None = None
) -> optax.Params:
    """Return theta of standard normal noise, in `dtype` or the parameters' dtypes."""

    def shift(mean, precision, noise):
        theta = mean.astype(precision.dtype) + _rules.perturbation(noise, precision)
        return theta.astype(dtype or mean.dtype)

    def cast(mean):
        return mean if dtype is None else mean.astype(dtype)

    return map_arrays(shift, q, noise, point_mass=cast)


def map_arrays(fn, q, *rest, point_mass=lambda _: None):
    """Map `fn` over mean, precision and `rest`, `point_mass` over the other means."""
    _checks.precision_like_mean(q)

    def leaf(mean, precision, *values):
        if precision is None:
            return point_mass(mean)
        return fn(jnp.asarray(mean), precision, *values)

    return jax.tree.map(leaf, q.mean, q.precision, *rest)


def _itself(x):
    return x


def _total(tree):
    """The sum over arrays, zero for none."""
    return sum(jax.tree.leaves(tree), start=jnp.zeros([]))
