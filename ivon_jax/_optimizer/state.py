r"""What an optimizer remembers, and what it says of the weights' distribution.

A state with a posterior has two methods, by which all others find and read it, wherever
it sits in an optax state:

* ``posterior_of(params)``: the distribution over `params` that it has learned,
* ``prior_of(params)``: the one that it regularises towards.

What it does not own, such as what `optax.masked` left out, is a point mass in both. A
state around it that holds the mean itself has ``mean_of(params)``. `diagnostics` also
reads the fields of `IVONState`, where a state has them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._arrays.trees import is_masked, like
from .._distributions import gaussian
from .._distributions.basis import is_basis, without
from .._distributions.gaussian import Posterior
from .._distributions.rotated import RotatedPosterior


class IVONState(NamedTuple):
    """What IVON remembers between steps; the mean is `params` itself.

    >>> import ivon_jax
    >>> opt_state = ivon_jax.ivon(0.1, ess=1000, hess_init=0.5).init(jnp.zeros(2))
    >>> [state] = ivon_jax.find_states(opt_state)
    >>> print(state.count, state.hess)
    0 [0.5 0.5]
    """

    #: (), int32: t, steps taken; it hides tuple.count, as in optax's states
    count: jax.Array  # type: ignore[assignment]
    ess: jax.Array  #: (), default float dtype: lambda
    weight_decay: jax.Array  #: (), default float dtype: delta
    momentum: optax.Updates  #: shapes of params, float32 or wider: g
    hess: optax.Updates  #: shapes of params, float32 or wider: h > -delta, per example
    prior: Posterior | None  #: shapes of params: the prior, or None for weight_decay's
    b1: jax.Array | None = None  #: (), default float dtype, as the next three: beta_1
    one_minus_b2: jax.Array | None = None  #: 1 - beta_2; float32 rounds beta_2 too much
    hess_init: jax.Array | None = None  #: h_0
    clip_radius: jax.Array | None = None  #: xi, or None for no clip

    @property
    def weight_decays(self) -> optax.Params:
        r""":math:`\delta` for each array: the precision of its prior / ess."""
        if self.prior is not None:
            return gaussian.weight_decay_of(self.prior, self.ess)
        return jax.tree.map(lambda h: self.weight_decay.astype(h.dtype), self.hess)

    def posterior_of(self, params: optax.Params) -> Posterior:
        r"""Return :math:`N(m, 1 / \lambda (h + \delta))`, `params` for its mean."""
        self._check(params)
        q = gaussian.of_curvature(params, self.hess, self.ess, self.weight_decays)
        return q._replace(precision=owned(q.precision, params))

    def prior_of(self, params: optax.Params) -> Posterior:
        r"""Return `prior`, or :math:`N(0, 1 / \lambda\delta)`."""
        self._check(params)
        p = self.prior
        if p is None:
            zeros = jax.tree.map(jnp.zeros_like, self.hess)
            p = gaussian.of_curvature(zeros, zeros, self.ess, self.weight_decays)
        means = owned(p.mean, params)
        means = jax.tree.map(lambda p, m: p if m is None else m, params, means)
        return Posterior(means, owned(p.precision, params))

    def _check(self, params):
        """Raise for a batch of states, and for parameters of another structure."""
        if jnp.shape(self.ess):
            raise ValueError(
                "`opt_state` must be one state, got a batch of shape "
                f"{jnp.shape(self.ess)}. Call under `jax.vmap`."
            )
        like("params", params, "the optimizer's state", self.hess)


class EVONState(NamedTuple):
    """What EVON remembers: IVON's state in the bases, and what these are made of.

    >>> import ivon_jax
    >>> opt_state = ivon_jax.evon(0.1, ess=1000).init({"w": jnp.zeros((2, 3))})
    >>> [state] = ivon_jax.find_states(opt_state)
    >>> state.bases["w"].left.shape, state.bases["w"].right.shape
    ((2, 2), (3, 3))
    """

    ivon: IVONState  #: of coordinates: its momentum, h and prior are theirs
    # Of each array, in the order of the leaves: NNX takes apart what is in a variable.
    flat_bases: Any  #: a `Basis`: Q_L, Q_R
    flat_statistics: Any  #: a `Statistic`: L, R
    own_prior: Posterior | None  #: of coordinates in the next; None: weight_decay's
    flat_prior_bases: Any  #: a `Basis`, or None as well

    @property
    def bases(self) -> optax.Params:
        """A `Basis` in the place of each array."""
        return self._tree(self.flat_bases)

    @property
    def statistics(self) -> optax.Params:
        """A `Statistic` in the place of each array."""
        return self._tree(self.flat_statistics)

    @property
    def prior(self) -> RotatedPosterior | None:
        """The prior, in bases of its own; None where there is `weight_decay` alone."""
        if self.own_prior is None:
            return None
        return RotatedPosterior(*self.own_prior, self._tree(self.flat_prior_bases))

    def _tree(self, flat):
        return jax.tree.unflatten(jax.tree.structure(self.ivon.hess), flat)

    @property
    def count(self) -> jax.Array:  # type: ignore[override]
        """t, steps taken."""
        return self.ivon.count

    @property
    def ess(self) -> jax.Array:
        r""":math:`\lambda`."""
        return self.ivon.ess

    @property
    def weight_decay(self) -> jax.Array:
        r""":math:`\delta`."""
        return self.ivon.weight_decay

    @property
    def momentum(self) -> optax.Updates:
        """g, in the bases."""
        return self.ivon.momentum

    @property
    def hess(self) -> optax.Updates:
        """h, in the bases."""
        return self.ivon.hess

    @property
    def b1(self) -> jax.Array | None:
        r""":math:`\beta_1`."""
        return self.ivon.b1

    @property
    def one_minus_b2(self) -> jax.Array | None:
        r""":math:`1 - \beta_2`."""
        return self.ivon.one_minus_b2

    @property
    def hess_init(self) -> jax.Array | None:
        """:math:`h_0`."""
        return self.ivon.hess_init

    def posterior_of(self, params: optax.Params) -> RotatedPosterior:
        r"""Return :math:`M + Q_L (\sigma \odot E) Q_R^\top`, `params` for its mean."""
        q = self.ivon.posterior_of(params)
        return RotatedPosterior(*q, _owned_bases(self.bases, params))

    def prior_of(self, params: optax.Params) -> Posterior | RotatedPosterior:
        r"""Return `prior`, or :math:`N(0, 1 / \lambda\delta)`."""
        p = self.prior
        if p is None:
            return self.ivon.prior_of(params)
        own = self.ivon._replace(prior=Posterior(p.mean, p.precision))
        return RotatedPosterior(*own.prior_of(params), _owned_bases(p.bases, params))


class SampledState(NamedTuple):
    """What `sampled` remembers: the trainer's parameters are the sample.

    >>> import ivon_jax
    >>> tx = ivon_jax.sampled(ivon_jax.ivon(0.1, ess=1000), jax.random.key(0))
    >>> print(tx.init(jnp.ones(2)).mean)
    [1. 1.]
    """

    #: (), int32: t, steps taken; at 0 the parameters are the mean. It hides tuple.count
    count: jax.Array  # type: ignore[assignment]
    key: jax.Array  #: raw data of the random key, uint32; each draw folds in its count
    mean: optax.Params  #: shapes of params, float32 or wider: m
    inner_state: optax.OptState  #: of the transformation with IVON in it

    def mean_of(self, params: optax.Params) -> optax.Params:
        """Return the mean of what it owns, None for the rest of `params`."""
        like("params", params, "the optimizer's state", self.mean)
        return owned(self.mean, params)


def check_settings(state):
    """Raise if a state of IVON has no settings."""
    if getattr(state, "hess_init", 0.0) is None:
        raise ValueError(
            "`opt_state` must hold the settings of `ivon` since version 0.2, got an "
            "`IVONState` without `hess_init`, of an older checkpoint. Make a new one, "
            "and copy what it learned: `tx.init(params)._replace(count=old.count, "
            "momentum=old.momentum, hess=old.hess)`. See docs/saving.md."
        )


def owned(tree, params):
    """`tree` with None in the place of each parameter that it leaves out."""

    def value(x, param):
        return jax.tree.map(lambda _: None, param) if is_masked(x) else x

    return jax.tree.map(value, tree, params, is_leaf=is_masked)


def flat_like(tree, params):
    """What stands in `tree` for each array of `params`, one after the other."""
    leaves = jax.tree.structure(params).flatten_up_to(tree)
    # Optax's placeholder for parameters has none. Its tree would be one of parameters
    # to `optax.tree.map_params`, a single array is none.
    return tuple(leaves) or jnp.zeros(0)


def _owned_bases(bases, params):
    """`bases`, none in the place of each parameter that they leave out."""

    def basis(x, param):
        return without(param) if is_masked(x) else x

    def is_leaf(x):
        return is_masked(x) or is_basis(x)

    return jax.tree.map(basis, bases, params, is_leaf=is_leaf)


def nodes(opt_state, method):
    """Everything inside `opt_state` that has this method."""

    def found(node):
        return hasattr(type(node), method)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]


def find_states(opt_state: optax.OptState) -> list[Any]:
    """Return every state with a posterior inside `opt_state`, however nested.

    For monitoring: ``find_states(opt_state)[0].hess`` is `h`, a curvature per example.
    Those of `ivon` and `evon` are among them, and those of any other optimizer that has
    the methods of `IVONState`.

    >>> import ivon_jax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), ivon_jax.ivon(0.1, ess=1000))
    >>> [state] = find_states(tx.init(jnp.zeros(2)))
    >>> print(state.hess)
    [1. 1.]
    """
    return nodes(opt_state, "posterior_of")
