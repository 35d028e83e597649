"""Multi-IVON: several Gaussians as one posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._arrays.dtypes import wide
from .._arrays.sharding import row
from .._arrays.trees import array_leaves, like
from .gaussian import Posterior, each
from .rotated import RotatedPosterior, stacked_alike

FAMILIES = Posterior, RotatedPosterior


class Stacked(NamedTuple):
    """A posterior whose arrays have a leading axis of members, as the caller says."""

    mean: optax.Params
    precision: optax.Params
    bases: optax.Params | None = None

    @property
    def posterior(self) -> Posterior | RotatedPosterior:
        """All members as one posterior of their family."""
        if self.bases is None:
            return Posterior(self.mean, self.precision)
        return RotatedPosterior(self.mean, self.precision, self.bases)


class Mixture(NamedTuple):
    r"""The equal-weight mixture :math:`q(\theta) = \frac{1}{M} \sum_k q_k(\theta)`.

    Its members are posteriors of independent runs: of other seeds, other data, or one
    program under `jax.vmap`. `predict` and `uncertainty` take it like a `Posterior`,
    and draw as often from each member.

    >>> q = Posterior(mean=jnp.ones(2), precision=jnp.ones(2))
    >>> mixture = Mixture([q, q._replace(mean=-jnp.ones(2))])
    >>> mixture.sample(jax.random.key(0)).shape
    (2,)

    Attributes:
      posteriors: M posteriors over the same tree, in a list. One whose arrays have a
        leading axis of M members, as ``jax.vmap(ivon_jax.posterior)`` returns it, goes
        through `from_stacked`; where no array has one axis alone, here as well.

    Its methods raise TypeError or ValueError if there are no posteriors, or of several
    trees, or if the one given may be a single one.
    """

    posteriors: (
        Posterior | RotatedPosterior | Stacked | Sequence[Posterior | RotatedPosterior]
    )

    @classmethod
    def from_stacked(cls, posterior: Posterior | RotatedPosterior) -> Mixture:
        """Return the mixture of M members along the first axis of every array.

        >>> q = Posterior(mean=jnp.zeros(3), precision=jnp.ones(3))
        >>> Mixture.from_stacked(q).num_members, Mixture([q]).num_members
        (3, 1)

        Args:
          posterior: what ``jax.vmap(ivon_jax.posterior)`` returns, which may be spread
            over devices.
        """
        return cls(Stacked(*posterior))

    @property
    def _is_stacked(self):
        return isinstance(self.posteriors, (*FAMILIES, Stacked))

    @property
    def stacked(self) -> Posterior | RotatedPosterior:
        """All members as one posterior, each array with a leading axis of M."""
        _check_members(self.posteriors)
        if self._is_stacked:
            return Stacked(*self.posteriors).posterior
        return jax.tree.map(_stack, *stacked_alike(self.posteriors))

    @property
    def num_members(self) -> int:
        """M."""
        _check_members(self.posteriors)
        if self._is_stacked:
            return jax.tree.leaves(self.posteriors)[0].shape[0]
        return len(self.posteriors)

    def member(self, index: jax.typing.ArrayLike) -> Posterior | RotatedPosterior:
        """Return the Gaussian of this index, -M to M - 1, which may be an array.

        Raises:
          IndexError, TypeError: there is no such member; if `index` is traced, its
            arrays are NaN.
        """
        index = _index_of(index, self.num_members)
        if isinstance(index, int) and not self._is_stacked:
            return self.posteriors[index]  # type: ignore[return-value]  # a sequence
        return jax.tree.map(lambda x: row(x, index), self.stacked)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> optax.Params:
        r"""Draw :math:`\theta \sim q`, each time from a member drawn at random.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.ones(2))
        >>> Mixture([q, q]).sample(jax.random.key(0), shape=(5,)).shape
        (5, 2)

        Args:
          key: a JAX random key.
          shape: leading axes of independent draws.

        Returns:
          A tree like the mean of a member, each array of ``shape`` and its own.
        """
        key, shape = _checks.random_key("key", key), _checks.shape("shape", shape)
        members = Mixture.from_stacked(self.stacked)  # once, not for every draw
        members.validate(positive=True)

        def draw(key):
            member_key, noise_key = jax.random.split(key)
            index = jax.random.randint(member_key, (), 0, members.num_members)
            return members.member(index).sample(noise_key)

        return each(draw, key, shape)

    def tempered(self, temperature: jax.typing.ArrayLike) -> Mixture:
        r"""Return the mixture of the members' :math:`q_k^{1/T}`: see `Posterior`.

        >>> q = Posterior(mean=jnp.ones(2), precision=jnp.full(2, 4.0))
        >>> print(Mixture([q, q]).tempered(0.25).member(0).stddev)
        [0.25 0.25]
        """
        _check_members(self.posteriors)
        if self._is_stacked:
            arrays = jax.tree.leaves(self.stacked.tempered(temperature))
            return jax.tree.unflatten(jax.tree.structure(self), arrays)
        members = map(self.member, range(self.num_members))
        return Mixture([q.tempered(temperature) for q in members])

    def strata(self, key: jax.Array, num_samples: int) -> jax.Array:
        """Choose members for samples, each as often as the others.

        Where M does not divide `num_samples`, the rest falls to random ones, so that
        means over the samples are unbiased. Stratified means have less variance than
        those of `sample`: none of it comes from the choice of members.

        >>> q = Posterior(mean=jnp.zeros((3, 2)), precision=jnp.ones((3, 2)))
        >>> members = Mixture(q).strata(jax.random.key(0), num_samples=6)
        >>> print(jnp.bincount(members))
        [2 2 2]

        Args:
          key: a JAX random key.
          num_samples: S, at least one.

        Returns:
          Indices of members, of shape (S,).
        """
        _checks.integer_between("num_samples", num_samples, 1)
        key = _checks.random_key("key", key)
        first = jax.random.randint(key, (), 0, self.num_members)
        return (first + jnp.arange(num_samples)) % self.num_members

    def log_prob(self, theta: optax.Params) -> jax.Array:
        r"""Log-density :math:`\log q(\theta)` in nats, without the point masses.

        >>> q = Posterior(mean=jnp.zeros(2), precision=jnp.full(2, 2 * jnp.pi))
        >>> print(f"{Mixture([q, q]).log_prob(jnp.zeros(2)):.6f}")
        0.000000
        """
        self.validate()
        stacked = self.stacked
        densities = jax.vmap(lambda q: q.log_prob(theta))(stacked)
        return jax.nn.logsumexp(densities) - math.log(self.num_members)

    def validate(self, *, positive: bool = False) -> None:
        """Raise unless all members are Gaussians; see `Posterior.validate`."""
        if self._is_stacked:  # all of them at once
            self.stacked.validate(positive=positive)
        else:
            for index in range(self.num_members):
                self.member(index).validate(positive=positive)


def _stack(*arrays):
    """The arrays of all members; in a wide dtype where they have several."""
    several = len({jnp.result_type(x) for x in arrays}) > 1
    return jnp.stack(wide(*arrays) if several else arrays)


def _check_members(posteriors):
    """Raise unless this is a mixture: members, of one tree, stacked."""
    array_leaves("posteriors", posteriors)
    if isinstance(posteriors, (*FAMILIES, Stacked)):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(posteriors)]
        lengths = {shape[:1] for shape in shapes}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                "`posteriors` must have one leading axis of members in every array, "
                f"got lengths {sorted(lengths)}. For one posterior, pass a list."
            )
        if isinstance(posteriors, FAMILIES) and min(map(len, shapes)) < 2:
            raise ValueError(
                "`posteriors` must be a list, got one Posterior that may be single or "
                f"stacked, with an array of shape {min(shapes, key=len)}. Pass "
                "`Mixture([posterior])`, or `Mixture.from_stacked(posterior)` for "
                "members along the first axes."
            )
        return
    if not isinstance(posteriors, (list, tuple)):
        raise TypeError(
            "`posteriors` must be a list of posteriors, or a stacked one, got "
            f"{type(posteriors).__name__}."
        )
    if not posteriors:
        raise ValueError("`posteriors` must have at least one member, got none.")
    for i, q in enumerate(posteriors):
        if not isinstance(q, FAMILIES):
            raise TypeError(
                f"`posteriors[{i}]` must be a posterior, got {type(q).__name__}. Pass "
                "`ivon_jax.posterior(params, opt_state)`."
            )
        # Bases may differ, also in which sides have one.
        pair = Posterior(*q[:2]), Posterior(*posteriors[0][:2])
        like(f"posteriors[{i}]", pair[0], "`posteriors[0]`", pair[1])


def _index_of(index, count):
    """Return an index of a member in 0..count - 1 where it is known."""
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        low = high = int(index)
    elif getattr(index, "dtype", None) is not None and jnp.issubdtype(
        index.dtype, jnp.integer
    ):
        index = jnp.asarray(index)
        low, high = _checks.extremes(index) or (0, 0)
    else:
        raise TypeError(f"`index` must be an integer, got {index!r}.")
    if not -count <= low <= high < count:
        bad = low if low < -count else high
        raise IndexError(f"`index` must be in {-count}..{count - 1}, got {bad}.")
    if isinstance(index, jax.Array):
        return jnp.where(index < 0, index + count, index)
    return low % count
