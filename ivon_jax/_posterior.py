"""Read the Gaussian out of an optimizer state, wherever IVON sits in it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _checks, _rules
from ._transform import IVONState


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
        _checks.like("prior.mean", prior.mean, "the posterior's mean", self.mean)
        _checks.same_point_masses(self, prior)

        def divergence(mean, precision, prior_mean, prior_precision):
            means = (mean, prior_mean)
            mean, prior_mean = (jnp.asarray(m, precision.dtype) for m in means)
            ratio = prior_precision / precision
            shift = prior_precision * (mean - prior_mean) ** 2
            return 0.5 * jnp.sum(ratio - jnp.log(ratio) + shift - 1)

        return _total(map_arrays(divergence, self, prior.mean, prior.precision))


def posterior(params: optax.Params, opt_state: optax.OptState) -> Posterior:
    """Return the Gaussian that IVON has trained: mean `params`, precision of the state.

    >>> import ivon_jax
    >>> params = {"w": jnp.ones(2), "b": jnp.zeros(())}
    >>> trained = {"w": True, "b": False}
    >>> tx = optax.masked(ivon_jax.ivon(0.1, ess=99, weight_decay=1.0), trained)
    >>> q = posterior(params, tx.init(params))
    >>> q.precision
    {'b': None, 'w': Array([198., 198.], dtype=float32)}

    Args:
      params: the parameters, as given to ``tx.init``.
      opt_state: the state of `ivon`, or of any optax transformation around it (`chain`,
        `masked`, `partition`, `inject_hyperparams`, `MultiSteps`, ...). Several IVON
        states, as in `partition`, make one posterior.

    Returns:
      A `Posterior` over all of `params`; what no IVON state owns is a point mass.

    Raises:
      ValueError: no IVON state is in `opt_state`, two own the same parameter, or
        `params` is not the tree that the state was made for.
    """
    states = find_states(opt_state)
    _checks.some_state(states)
    precisions = [_precision(params, state) for state in states]
    return Posterior(params, jax.tree.map(_checks.one_owner, params, *precisions))


def sample(
    key: jax.Array, params: optax.Params, opt_state: optax.OptState
) -> optax.Params:
    r"""Draw :math:`\theta \sim q` (Algorithm 1, line 2): where to take the gradient.

    >>> import ivon_jax
    >>> params = jnp.zeros(3)
    >>> opt_state = ivon_jax.ivon(0.1, ess=1000).init(params)
    >>> theta = ivon_jax.sample(jax.random.key(0), params, opt_state)

    Args:
      key: a JAX random key, a fresh one at every step.
      params: the posterior mean.
      opt_state: any optax state with IVON in it; see `posterior`.

    Returns:
      A tree with the structure, shapes and dtypes of `params`. Every array has noise of
      its own, and what no IVON state owns comes back unchanged.

    Raises:
      ValueError: as `posterior`.
    """
    return posterior(params, opt_state).sample(key)


def find_states(opt_state: optax.OptState) -> list[IVONState]:
    """Return every `IVONState` inside `opt_state`, found by type, however nested.

    For monitoring: ``find_states(opt_state)[0].hess`` is `h`, a curvature per example.

    >>> import ivon_jax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), ivon_jax.ivon(0.1, ess=1000))
    >>> [state] = find_states(tx.init(jnp.zeros(2)))
    >>> print(state.hess)
    [1. 1.]
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_ivon)
    return [node for node in nodes if _is_ivon(node)]


def standard_normal(q: Posterior, key: jax.Array) -> optax.Params:
    """Draw noise in `precision`'s dtypes; every array has a key of its own."""
    leaves, structure = jax.tree.flatten(q.mean)
    keys = []
    # With all keys at once, XLA would begin all arrays' noise before it ends any.
    for _ in leaves:
        key, leaf_key = jax.random.split(key)
        keys.append(leaf_key)

    def draw(mean, precision, leaf_key):
        sharding = _sharding_in_type(mean)
        return jax.random.normal(
            leaf_key, mean.shape, precision.dtype, out_sharding=sharding
        )

    return map_arrays(draw, q, structure.unflatten(keys))


def _sharding_in_type(x):
    """Where the mesh is explicit, the sharding to draw noise for `x` in.

    Without it every device would draw the noise of all. An automatic mesh needs no
    word, and an array outside of ``jit`` has no mesh to draw in.
    """
    sharding = jax.typeof(x).sharding
    explicit = isinstance(x, jax.core.Tracer) and not sharding.mesh.empty
    return sharding if explicit else None


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


def _is_ivon(node):
    return isinstance(node, IVONState)


def _precision(params, state):
    """The precision of what `state` owns, a tree like `params`; None elsewhere."""
    _checks.one_state(state)
    _checks.like("params", params, "the optimizer's state", state.hess)

    def precision(h, param):
        if _checks.is_masked(h):
            return jax.tree.map(lambda _: None, param)
        ess, weight_decay = (x.astype(h.dtype) for x in (state.ess, state.weight_decay))
        return _rules.precision(h, ess, weight_decay)

    return jax.tree.map(precision, state.hess, params, is_leaf=_checks.is_masked)


def map_arrays(fn, q, *rest, point_mass=lambda _: None):
    """Map `fn` over mean, precision and `rest`, `point_mass` over the other means."""

    def leaf(mean, precision, *values):
        if precision is None:
            return point_mass(mean)
        return fn(jnp.asarray(mean), precision, *values)

    return jax.tree.map(leaf, q.mean, q.precision, *rest)


def _total(tree):
    """The sum over arrays, zero for none."""
    return sum(jax.tree.leaves(tree), start=jnp.zeros([]))
