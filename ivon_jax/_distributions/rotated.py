r"""The Gaussian that is diagonal in a basis of its own for each array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._arrays.dtypes import wide, wide_dtype
from .._arrays.trees import like
from . import divergences, validity
from .basis import Basis, into, map_bases, out_of, squared, without
from .gaussian import Posterior, each


class RotatedPosterior(NamedTuple):
    r"""The Gaussian :math:`\theta = M + Q_L (\sigma \odot E) Q_R^\top`, as a pytree.

    E is standard normal. The entries of an array W are correlated, its coordinates
    :math:`Q_L^\top W Q_R` in its basis are not: the covariance is :math:`(Q_R \otimes
    Q_L) \, \mathrm{diag}(\sigma^2) \, (Q_R \otimes Q_L)^\top`, which is never formed.
    Arrays without a basis are as in `Posterior`, to the last bit.

    >>> turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    >>> mean, precision = jnp.zeros((2, 1)), jnp.array([[1.0], [4.0]])
    >>> q = RotatedPosterior(mean, precision, bases=Basis(left=turn))
    >>> print([f"{v:.2f}" for v in q.variance[:, 0]])
    ['0.52', '0.73']

    Attributes:
      mean: the parameters, any pytree of arrays.
      precision: :math:`1 / \sigma^2` of the coordinates, in the shapes of `mean`,
        float32 or wider; None for a point mass.
      bases: a `Basis` in the place of each array of `mean`.
    """

    mean: optax.Params
    precision: optax.Params
    bases: optax.Params

    @classmethod
    def of_diagonal(cls, posterior: Posterior | RotatedPosterior) -> RotatedPosterior:
        """Return a `Posterior` as a member of this family, without bases."""
        if isinstance(posterior, RotatedPosterior):
            return posterior
        return cls(*posterior, without(posterior.mean))

    @property
    def marginals(self) -> Posterior:
        r"""The `Posterior` with the mean and the variances of this one.

        It is the diagonal Gaussian closest to this one, in :math:`KL(q \| \cdot)`, and
        stands for it where no basis is known: as the ``prior=`` of `ivon_jax.ivon`, in
        `ivon_jax.merging`, and for `Posterior.natural_parameters`. What is lost is
        `total_correlation`.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 4.0))
        >>> print(RotatedPosterior.of_diagonal(q).marginals.precision)
        [4. 4.]
        """

        def precision(variance, precision, basis):
            return 1.0 / variance if basis.turns else precision

        trees = self.variance, self.precision, self.bases
        return Posterior(self.mean, jax.tree.map(precision, *trees))

    @property
    def coordinates(self) -> Posterior:
        """The diagonal Gaussian over the coordinates of theta minus the mean.

        A point mass stays one, at its mean.
        """

        def zeros(mean, precision):
            if precision is None:
                return mean
            return jnp.zeros_like(mean, dtype=wide_dtype(mean, precision))

        return Posterior(jax.tree.map(zeros, self.mean, self.precision), self.precision)

    @property
    def variance(self) -> optax.Params:
        r""":math:`(Q_L^2) \sigma^2 (Q_R^2)^\top`, with the squares of all entries.

        It is that of each entry, zero for a point mass.
        """
        self.validate()
        return out_of(squared(self.bases), self._diagonal.variance)

    @property
    def stddev(self) -> optax.Params:
        """The standard deviation of each entry, zero for a point mass."""

        def root(variance, stddev, basis):
            return jnp.sqrt(variance) if basis.turns else stddev

        return jax.tree.map(root, self.variance, self._diagonal.stddev, self.bases)

    @property
    def trained(self) -> optax.Params:
        """Say which arrays are random: a tree of booleans, False for a point mass."""
        return self._diagonal.trained

    def tempered(self, temperature: jax.typing.ArrayLike) -> RotatedPosterior:
        r"""Return :math:`q^{1/T}`, normalised: the covariance times the temperature T.

        See `Posterior.tempered`.
        """
        precision = self._diagonal.tempered(temperature).precision
        return self._replace(precision=precision)

    def restricted(
        self, mask: optax.Params | Callable[[optax.Params], optax.Params]
    ) -> RotatedPosterior:
        """Return this posterior over some parameters, the others fixed at their mean.

        See `Posterior.restricted`. Arrays are independent: what stays is unchanged.
        """
        precision = self._diagonal.restricted(mask).precision

        def kept(_, precision, basis):
            return Basis() if precision is None else basis

        bases = jax.tree.map(kept, self.mean, precision, self.bases)
        return RotatedPosterior(self.mean, precision, bases)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> optax.Params:
        r"""Draw :math:`\theta \sim q`; see `Posterior.sample`.

        Without bases it is that draw of the same key.
        """
        key, shape = _checks.random_key("key", key), _checks.shape("shape", shape)
        self.validate(positive=True)
        return each(lambda key: self.perturb(self.noise(key)), key, shape)

    def noise(self, key: jax.Array) -> optax.Params:
        r"""Draw standard normal :math:`E`; see `Posterior.noise`."""
        return self._diagonal.noise(key)

    def perturb(
        self, noise: optax.Params, dtype: jax.typing.DTypeLike | None = None
    ) -> optax.Params:
        r"""Return :math:`\theta = M + Q_L (\sigma \odot E) Q_R^\top` of this `noise`.

        In `dtype`, or in the dtypes of `mean`. A point mass is its mean.
        """
        turned = out_of(self.bases, self.coordinates.perturb(noise))
        # Of unit precision, the Gaussian adds what it is given to the mean.
        units = jax.tree.map(jnp.ones_like, self.precision)
        return Posterior(self.mean, units).perturb(turned, dtype)

    def hess_estimate(self, grad: optax.Updates, theta: optax.Params) -> optax.Updates:
        r"""Return the estimate of the Hessian's diagonal in the bases.

        It is :math:`\hat G' \odot E' / \sigma^2` of the coordinates :math:`\hat G'` of
        `grad` and :math:`E'` of ``theta - mean``. None for a point mass.
        """
        deviation = into(self.bases, self.deviation(theta))
        return self.coordinates.hess_estimate(into(self.bases, grad), deviation)

    def hess_estimate_of_noise(
        self, grad: optax.Updates, noise: optax.Params
    ) -> optax.Updates:
        r"""Return `hess_estimate` for the theta of `noise`, before it was rounded."""
        return self._diagonal.hess_estimate_of_noise(into(self.bases, grad), noise)

    def squared_gradient(self, grad: optax.Updates) -> optax.Updates:
        """Return the squares of the gradient's coordinates; None for a point mass."""
        return self._diagonal.squared_gradient(into(self.bases, grad))

    def covariance_times(self, vector: optax.Params) -> optax.Params:
        r"""Return :math:`\Sigma v`; None for a point mass, where `v` may be None."""
        return self._in_bases(self._diagonal.covariance_times, vector)

    def precision_times(self, vector: optax.Params) -> optax.Params:
        r"""Return :math:`\Sigma^{-1} v`; None for a point mass."""
        return self._in_bases(self._diagonal.precision_times, vector)

    def deviation(self, theta: optax.Params) -> optax.Params:
        r"""Return :math:`\theta - M`; see `Posterior.deviation`."""
        return self._diagonal.deviation(theta)

    def log_prob(self, theta: optax.Params) -> jax.Array:
        r"""Log-density :math:`\log q(\theta)` in nats, without the point masses."""
        theta = like("theta", theta, "the posterior's mean", self.mean)
        self.validate()
        deviation = self.deviation(theta)
        return self.coordinates.log_prob(into(self.bases, deviation))

    def entropy(self) -> jax.Array:
        r"""Entropy :math:`-E_q[\log q(\theta)]` in nats: that of the coordinates."""
        self.validate()
        return self._diagonal.entropy()

    def total_correlation(self) -> jax.Array:
        r"""Return :math:`KL(q \| \mathrm{marginals}(q))`: what correlations tell, nats.

        By as much the evidence lower bound of `marginals` is lower, but for the loss.

        >>> turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
        >>> mean, precision = jnp.zeros((2, 1)), jnp.array([[1.0], [4.0]])
        >>> q = RotatedPosterior(mean, precision, Basis(turn))
        >>> print(f"{q.total_correlation():.4f}")
        0.2088
        """
        self.validate()
        flatten = jax.tree.structure(self.mean).flatten_up_to  # type: ignore[attr-defined]
        trees = map(flatten, (self.precision, self.bases))
        terms = [
            _total_correlation(precision, basis)
            for precision, basis in zip(*trees, strict=True)
            if precision is not None and basis.turns
        ]
        return jnp.sum(jnp.stack(wide(*terms))) if terms else jnp.zeros([])

    def kl_divergence(self, prior: Posterior | RotatedPosterior) -> jax.Array:
        r"""Kullback-Leibler divergence :math:`KL(q \| p)` to another Gaussian, in nats.

        Args:
          prior: a Gaussian over the same tree, diagonal or in bases of its own. What is
            a point mass in both is left out.

        Raises:
          ValueError: a parameter is a point mass in one of the two alone.
        """
        _checks.distribution("prior", prior, "kl_divergence")
        like("prior.mean", prior.mean, "the posterior's mean", self.mean)
        validity.same_point_masses(self, prior)
        # Where the prior is diagonal, the variances there and `total_correlation` tell
        # all: KL(q | p) = KL(q | marginals) + KL(marginals | p).
        p = RotatedPosterior.of_diagonal(prior)
        shift = into(p.bases, p.deviation(self.mean))
        seen = self.seen_from(p.bases)._replace(mean=shift)
        divergence = seen.marginals.kl_divergence(p.coordinates)
        return jnp.add(*wide(divergence, seen.total_correlation()))

    def seen_from(self, bases: optax.Params) -> RotatedPosterior:
        """Return this distribution over the coordinates in other `bases`."""
        own = map_bases(Basis.seen_from, self.bases, bases)
        return RotatedPosterior(into(bases, self.mean), self.precision, own)

    @property
    def precision_diagonal(self) -> optax.Params:
        r"""The diagonal of :math:`\Sigma^{-1}`, None for a point mass.

        It is not one over the variance: it takes the other entries for known.
        """
        return out_of(squared(self.bases), self.precision)

    def validate(self, *, positive: bool = False) -> None:
        """Raise unless this is a Gaussian; see `Posterior.validate`."""
        self._diagonal.validate(positive=positive)
        validity.bases(self)

    @property
    def _diagonal(self):
        """The diagonal Gaussian of the same noise and entropy, over coordinates."""
        return Posterior(self.mean, self.precision)

    def _in_bases(self, product, vector):
        return out_of(self.bases, product(into(self.bases, vector)))


def _total_correlation(precision, basis):
    r"""Sum of :math:`(\log v - \log \sigma^2) / 2`, v the variances of the entries.

    Where all are almost alike, both logarithms are those of small differences from one
    number: the squares of an orthogonal matrix turn a constant into itself.
    """
    [precision] = wide(precision)
    centre = jnp.exp(jnp.mean(jnp.log(precision)))
    ratio, excess = centre / precision, (centre - precision) / precision
    squares = basis.squared
    after = divergences.log_near_one(squares.out_of(ratio), squares.out_of(excess))
    return 0.5 * jnp.sum(after - divergences.log_near_one(ratio, excess))


def stacked_alike(posteriors):
    """Those of a list as one family, with the same sides in bases, for a stack.

    A side that is in a basis in one of them has the identity in the others.
    """
    if not any(hasattr(q, "bases") for q in posteriors):
        return posteriors
    rotated = list(map(RotatedPosterior.of_diagonal, posteriors))
    filled = functools.partial(_with_sides_of, [q.bases for q in rotated])
    return [q._replace(bases=filled(q.bases)) for q in rotated]


def _with_sides_of(others, bases):
    def fill(basis, *others):
        return Basis(*map(_identity_where_missing, basis, *others))

    return map_bases(fill, bases, *others)


def _identity_where_missing(q, *others):
    found = next((x for x in others if x is not None), None)
    if q is not None or found is None:
        return q
    return jnp.broadcast_to(jnp.eye(found.shape[-1], dtype=found.dtype), found.shape)
