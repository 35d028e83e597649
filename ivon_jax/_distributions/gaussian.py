"""The Gaussian over the weights, as a pytree, and its algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _update_rules
from .._arrays.dtypes import wide, wide_dtype
from .._arrays.noise import normal_like
from .._arrays.trees import array_leaves, is_mask, like, mask_of
from . import divergences, validity
from .natural import NaturalParameters, PointMass, place, summable


class Posterior(NamedTuple):
    r"""The Gaussian :math:`q(\theta) = N(m, \mathrm{diag}(\sigma^2))`, as a pytree.

    Like any pytree of arrays it goes through ``jit``, ``vmap``, sharding, Orbax and
    msgpack. A parameter array that IVON doesn't train is a point mass: its entry of
    `precision` is None, its variance is zero, and densities leave it out.

    Outside of ``jit`` every method checks the values. Within it, what a precision that
    is negative or NaN leads to is NaN.

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
    ) -> Posterior:
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
          TypeError, ValueError: `precision` is not a positive number.
        """
        precision = _checks.positive("precision", precision)
        array_leaves("mean", mean)

        def full(x):
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                return None
            return jnp.full_like(x, precision, wide_dtype(x))

        return cls(mean, jax.tree.map(full, mean))

    @classmethod
    def from_natural_parameters(cls, natural: NaturalParameters) -> Posterior:
        r"""Return the Gaussian of these `natural_parameters`.

        Sums of natural parameters are products of Gaussians: how posteriors of several
        data sets are combined, ``sum of the posteriors' - (n - 1) times the prior's``.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> product = jax.tree.map(jnp.add, q.natural_parameters, q.natural_parameters)
        >>> print(Posterior.from_natural_parameters(product).precision)
        [8. 8.]

        A point mass stays where it is, if that is the same in all factors; of several
        places the result is the mean.

        Raises:
          ValueError: the trees differ, or a quadratic entry is not negative.
        """
        validity.natural_parameters(natural)

        def gaussian(linear, quadratic):
            if isinstance(quadratic, PointMass):
                return place(linear, quadratic.weight), None
            linear, quadratic = wide(linear, quadratic)
            precision = -2.0 * quadratic
            return linear / precision, precision

        pairs = jax.tree.map(gaussian, natural.linear, natural.quadratic)
        return cls(*(_part(pairs, natural.linear, i) for i in range(2)))

    @property
    def natural_parameters(self) -> NaturalParameters:
        r""":math:`m / \sigma^2` and :math:`-1 / (2 \sigma^2)`, float32 or wider.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> print(*q.natural_parameters)
        [4. 4.] [-2. -2.]
        """
        self.validate()

        def linear(mean, precision):
            mean, precision = wide(mean, precision)
            return precision * mean

        def point_mass(_):
            return PointMass(jnp.ones([]))

        return NaturalParameters(
            _map(linear, self, point_mass=summable),
            _map(lambda _, p: -0.5 * p, self, point_mass=point_mass),
        )

    def tempered(self, temperature: jax.typing.ArrayLike) -> Posterior:
        r"""Return :math:`q^{1/T}`, normalised: the variance times the temperature T.

        A posterior at another ess :math:`\lambda'` is ``q.tempered(ess / new_ess)``.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> print(q.tempered(0.25).stddev)
        [0.25 0.25]

        Args:
          temperature: T, positive; below one is a cold, narrower posterior.

        Raises:
          TypeError, ValueError: `temperature` is not a positive number.
        """
        temperature = _checks.positive("temperature", temperature)
        self.validate()

        def divide(_, precision):
            return precision / jnp.asarray(temperature, precision.dtype)

        return self._replace(precision=_map(divide, self))

    def restricted(
        self, mask: optax.Params | Callable[[optax.Params], optax.Params]
    ) -> Posterior:
        """Return this posterior over some parameters, the others fixed at their mean.

        For uncertainty of the last layer alone: with its inputs kept, a sample costs no
        more than that layer.

        >>> q = Posterior.isotropic({"body": jnp.ones(2), "head": jnp.ones(2)}, 4.0)
        >>> print(q.restricted({"body": False, "head": True}).precision)
        {'body': None, 'head': Array([4., 4.], dtype=float32)}

        Args:
          mask: a tree of booleans, or a prefix of one, or a function from `mean` to
            it, as for `optax.masked`: True stays as it is. What can be called and has
            the structure of `mean`, as an Equinox module, is a tree.

        Raises:
          ValueError, TypeError: `mask` does not fit, or has other leaves than booleans.
        """
        self.validate()
        if not is_mask(mask, self.mean):
            mask = mask(self.mean)  # type: ignore[operator]  # no tree, so a function
        keep = mask_of("mask", mask, self.mean)

        def kept(_, precision, keep):
            return precision if keep else None

        precision = jax.tree.map(kept, self.mean, self.precision, keep)
        return self._replace(precision=precision)

    @property
    def variance(self) -> optax.Params:
        r""":math:`\sigma^2`, a tree of `mean`'s structure; zero for a point mass."""
        self.validate()

        return _map(lambda _, p: _variance(p), self, point_mass=jnp.zeros_like)

    @property
    def stddev(self) -> optax.Params:
        r""":math:`\sigma`, a tree of `mean`'s structure; zero for a point mass."""
        self.validate()
        return _map(lambda _, p: 1.0 / jnp.sqrt(p), self, point_mass=jnp.zeros_like)

    @property
    def trained(self) -> optax.Params:
        """Say which arrays are random: a tree of booleans, False for a point mass."""
        return _map(lambda _m, _p: True, self, point_mass=lambda _: False)

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

        Raises:
          TypeError, ValueError: `key` is not a key, `shape` is not a shape, or a
            precision is zero.
        """
        key, shape = _checks.random_key("key", key), _checks.shape("shape", shape)
        self.validate(positive=True)
        return each(lambda key: self.perturb(self.noise(key)), key, shape)

    def noise(self, key: jax.Array) -> optax.Params:
        r"""Draw standard normal :math:`\epsilon`, a key of its own for each array.

        A tree like `mean`, float32 or wider; None for a point mass.
        """
        leaves, structure = jax.tree.flatten(self.mean)
        keys = []
        # With all keys at once, XLA would begin all arrays' noise before it ends any.
        for _ in leaves:
            key, leaf_key = jax.random.split(key)
            keys.append(leaf_key)

        def draw(mean, precision, leaf_key):
            return normal_like(leaf_key, mean, precision.dtype)

        return _map(draw, self, jax.tree.unflatten(structure, keys))

    def perturb(
        self, noise: optax.Params, dtype: jax.typing.DTypeLike | None = None
    ) -> optax.Params:
        r"""Return :math:`\theta = m + \sigma \epsilon` of this `noise` (line 2).

        In `dtype`, or in the dtypes of `mean`. A point mass is its mean.
        """

        def shift(mean, precision, noise):
            perturbation = _update_rules.perturbation(noise, precision)
            theta = jnp.add(*wide(mean, perturbation))
            return theta.astype(dtype or mean.dtype)

        def cast(mean):
            floating = jnp.issubdtype(jnp.result_type(mean), jnp.inexact)
            return jnp.asarray(mean, dtype) if dtype is not None and floating else mean

        return _map(shift, self, noise, point_mass=cast)

    def hess_estimate(self, grad: optax.Updates, theta: optax.Params) -> optax.Updates:
        r"""Return :math:`\hat h = \hat g (\theta - m) / \sigma^2` (line 3).

        `grad` was taken at `theta`, a draw. Float32 or wider; None for a point mass.
        """

        def estimate(mean, precision, grad, theta):
            mean, grad, theta = (x.astype(precision.dtype) for x in (mean, grad, theta))
            return _update_rules.hess_estimate(grad, theta - mean, precision)

        return _map(estimate, self, grad, theta)

    def hess_estimate_of_noise(
        self, grad: optax.Updates, noise: optax.Params
    ) -> optax.Updates:
        r"""Return `hess_estimate` for the theta of `noise`, before it was rounded."""

        def estimate(_, precision, grad, noise):
            grad = grad.astype(precision.dtype)
            return _update_rules.hess_estimate_of_noise(grad, noise, precision)

        return _map(estimate, self, grad, noise)

    def squared_gradient(self, grad: optax.Updates) -> optax.Updates:
        r"""Return :math:`\hat g^2`, float32 or wider; None for a point mass."""

        def square(_, precision, grad):
            return _update_rules.squared_gradient(grad.astype(precision.dtype))

        return _map(square, self, grad)

    def covariance_times(self, vector: optax.Params) -> optax.Params:
        r"""Return :math:`\sigma^2 v`; None for a point mass, where `v` may be None."""

        def product(_, precision, vector):
            return jnp.multiply(*wide(vector, _variance(precision)))

        return _map(product, self, vector)

    def precision_times(self, vector: optax.Params) -> optax.Params:
        r"""Return :math:`v / \sigma^2`; None for a point mass, whatever `v` is."""

        def product(_, precision, vector):
            return jnp.multiply(*wide(vector, precision))

        return _map(product, self, vector)

    def deviation(self, theta: optax.Params) -> optax.Params:
        r"""Return :math:`\theta - m`, float32 or wider; point masses as they are."""

        def difference(mean, precision, theta):
            mean, theta, _ = wide(mean, theta, precision)
            return theta - mean

        return _map(difference, self, theta, point_mass=lambda mean: mean)

    def log_prob(self, theta: optax.Params) -> jax.Array:
        r"""Log-density :math:`\log q(\theta)` in nats, without the point masses.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 2 * jnp.pi))
        >>> print(f"{q.log_prob(jnp.zeros(2)):.6f}")
        0.000000
        """
        theta = like("theta", theta, "the posterior's mean", self.mean)
        self.validate()

        def log_density(mean, precision, x):
            return divergences.log_density(x, mean, precision)

        return _total(_map(log_density, self, theta))

    def entropy(self) -> jax.Array:
        r"""Entropy :math:`-E_q[\log q(\theta)]` in nats, without the point masses.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 2 * jnp.pi * jnp.e))
        >>> print(f"{abs(q.entropy()):.6f}")
        0.000000
        """
        self.validate()
        return _total(_map(lambda _, p: divergences.entropy(p), self))

    def kl_divergence(self, prior: Posterior) -> jax.Array:
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
        _checks.distribution("prior", prior, "kl_divergence")
        like("prior.mean", prior.mean, "the posterior's mean", self.mean)
        validity.same_point_masses(self, prior)
        self.validate()
        wider_family = getattr(prior, "of_diagonal", None)
        if wider_family is not None:
            return wider_family(self).kl_divergence(prior)
        divergence = divergences.kl_divergence
        return _total(_map(divergence, self, prior.mean, prior.precision))

    def validate(self, *, positive: bool = False) -> None:
        """Raise unless this is a Gaussian, and outside of ``jit`` its values are.

        Args:
          positive: raise for a flat Gaussian, of precision zero, too.

        Raises:
          TypeError, ValueError: mean and precision differ in structure or shape, or a
            precision is negative, infinite or NaN.
        """
        validity.check(self, positive)


def each(draw, key, shape):
    """One ``draw(key)`` for each index of `shape`, which leads in the result."""
    for _ in shape:
        draw = jax.vmap(draw)
    return draw(jax.random.split(key, shape) if shape else key)


def _variance(precision):
    """Return 1 / `precision`, NaN where it is negative or NaN."""
    return 1.0 / jnp.where(precision >= 0, precision, jnp.nan)


def of_curvature(mean, hess, ess, weight_decay):
    """The Gaussian of line 8; `weight_decay` is a tree like `hess`."""

    def precision(h, delta):
        return _update_rules.precision(h, ess.astype(h.dtype), delta)

    return Posterior(mean, jax.tree.map(precision, hess, weight_decay))


def weight_decay_of(prior, ess):
    r""":math:`\delta` of each array: the precision of its prior / ess."""
    return jax.tree.map(lambda p: p / ess.astype(p.dtype), prior.precision)


def _map(fn, q, *rest, point_mass=lambda _: None):
    """Map `fn` over mean, precision and `rest`, `point_mass` over the other means."""

    def leaf(mean, precision, *values):
        if precision is None:
            return point_mass(mean)
        [precision] = wide(precision)
        return fn(jnp.asarray(mean), precision, *map(jnp.asarray, values))

    return jax.tree.map(leaf, q.mean, q.precision, *rest)


def _total(tree):
    """The sum over arrays, zero for none."""
    totals = jax.tree.leaves(tree)
    return jnp.sum(jnp.stack(wide(*totals))) if totals else jnp.zeros([])


def _part(pairs, reference, index):
    """The first or the second of each pair in a tree like `reference`."""
    return jax.tree.map(lambda _, pair: pair[index], reference, pairs)
