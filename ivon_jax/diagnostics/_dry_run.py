r"""A training step, called from outside: with weights, noise, keys and rows of our own.

All that a step does is in what it returns. The momentum was set to zero, so what it is
afterwards is the gradient, :math:`\hat g = g / (1 - \beta_1)`. The precision is known,
so what becomes of `h` says which :math:`\hat h` went in, and with it which sample:
:math:`\theta - m = \hat h \sigma^2 / \hat g`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._optimizer import posterior as readers
from .._optimizer.state import EVONState, IVONState, find_states, owned as own
from . import _roles

FIRM = 1e20  # statistics beside which a gradient's square is below rounding


class Taken(NamedTuple):
    """What one step did, as vectors of all entries that IVON trains, in float64."""

    mean: np.ndarray  # m, after it
    grad: np.ndarray  # g_hat
    noise: np.ndarray  # theta - m, as the optimizer was told
    stddev: np.ndarray  # sigma, before it


class DryRun:
    """A user's step, to be taken again and again, from the leaves of its arguments."""

    def __init__(self, step: Callable[..., Any], args: tuple[Any, ...]):
        self._step = step
        self._structure: Any = jax.tree.structure(args)
        self._found = _roles.of_arguments(args)
        self.leaves = jax.tree.leaves(args)
        self.returned = self._call(self.leaves)
        self.rest = _roles.rest(args, self._found, self.returned)
        self.is_sampled = _roles.is_sampled(args)
        params = self._params(self.leaves)
        # For each state, which of the parameters' arrays it trains.
        self._owned = [_owned_by(state, params) for state in self.states(self.leaves)]

    @property
    def batch_size(self) -> int:
        """The number of rows of the batch; 0 if there is none."""
        batch = self.rest.batch
        return np.shape(self.leaves[batch[0]])[0] if batch else 0

    def same_rows(self, first: np.ndarray, second: np.ndarray) -> bool:
        """Return whether these rows of the batch are the same examples."""
        arrays = [np.asarray(self.leaves[i]) for i in self.rest.batch]
        return all(np.array_equal(x[first], x[second]) for x in arrays)

    def _call(self, leaves):
        """The step, of copies: it may donate what it gets."""
        return self._step(*self._structure.unflatten(map(_copy, leaves)))

    def next_leaves(self, returned: Any) -> list[Any] | None:
        """Return the arguments after a step; None if it lost parameters or state."""
        found = _roles.trained(returned)
        if found is None or len(found.opt_state) != len(self._found.opt_state):
            return None
        new, leaves = jax.tree.leaves(returned), list(self.leaves)
        places = [*self._found.params, *self._found.opt_state]
        for i, source in zip(places, [*found.params, *found.opt_state], strict=True):
            leaves[i] = new[source]
        return leaves

    def again(self, leaves: list[Any]) -> list[Any]:
        """Take a step, and return the leaves of the next one's arguments."""
        # The first call returned parameters and state, so this one does.
        return self.next_leaves(self._call(leaves))  # type: ignore[return-value]

    def carried(self, leaves: list[Any]) -> list[Any]:
        """Return the arrays of parameters and state among the arguments' leaves."""
        return [leaves[i] for i in (*self._found.params, *self._found.opt_state)]

    def states(self, leaves: list[Any]) -> list[IVONState | EVONState]:
        """Return the states of IVON, and of EVON."""
        return find_states(self._structure.unflatten(leaves))

    def _params(self, leaves):
        params = [leaves[i] for i in self._found.params]
        return self._found.structure.unflatten(params)

    def mean(self, leaves: list[Any]) -> np.ndarray:
        """Return the mean of what IVON trains, as a vector."""
        args = self._structure.unflatten(leaves)
        arrays = jax.tree.leaves(readers.mean(self._params(leaves), args))
        return _vector(arrays[j] for owned in self._owned for j in owned)

    def pull(self, leaves: list[Any]) -> np.ndarray:
        r"""Return the gradient of the prior's part, :math:`\delta (m - m_0)`."""
        states = self.states(leaves)
        priors = [
            jax.tree.leaves(s.hess if s.prior is None else s.prior.mean) for s in states
        ]
        centres = [
            np.zeros_like(x) if s.prior is None else x
            for s, arrays in zip(states, priors, strict=True)
            for x in arrays
        ]
        return _vector(map(_decay, states)) * (self.mean(leaves) - _vector(centres))

    def take(
        self,
        leaves: list[Any],
        *,
        mean: np.ndarray | None = None,
        hess: np.ndarray | None = None,
        ess: float | None = None,
        key: int = 0,
        rows: np.ndarray | None = None,
        count: int | None = None,
    ) -> Taken:
        """Take a step from these leaves, with some of them changed; None keeps them.

        Args:
          leaves: those of the arguments.
          mean: the weights.
          hess: h.
          ess: of all states of IVON.
          key: 0 for the keys of the arguments, another number for others.
          rows: which rows of the batch, in which order.
          count: how many steps there were, for schedules.
        """
        leaves = self._changed(list(leaves), mean, key, rows)
        args = _with_count(self._structure.unflatten(leaves), count)
        leaves = jax.tree.leaves(self._with_states(args, hess, ess, key))
        new_leaves = self.again(leaves)
        before, after = self.states(leaves), self.states(new_leaves)
        old, new = (_of_states(lambda s: s.hess, x) for x in (before, after))
        curvature = old + _vector(map(_decay, before))  # h + delta
        precision = curvature * _setting(before, "ess")
        grad = _of_states(lambda s: s.momentum, after) / (1.0 - _setting(after, "b1"))
        # Line 5 of Algorithm 1, solved for its step s: s + s^2 / 2c is the change.
        root = np.sqrt(np.maximum(1.0 + 2.0 * (new - old) / curvature, 0.0))
        hess_hat = old + curvature * (root - 1.0) / _setting(after, "one_minus_b2")
        known = grad != 0
        noise = np.full_like(grad, np.nan)
        noise[known] = hess_hat[known] / (precision * grad)[known]
        return Taken(self.mean(new_leaves), grad, noise, precision**-0.5)

    def _changed(self, leaves, mean, key, rows):
        """The leaves with other weights, keys and rows."""
        if mean is not None:
            here = [self._found.params[j] for owned in self._owned for j in owned]
            pieces = _pieces(mean, [leaves[i] for i in here])
            for i, piece in zip(here, pieces, strict=True):
                leaves[i] = _put(piece, leaves[i])
        for i in self.rest.keys:
            leaves[i] = _other_key(leaves[i], key)
        if rows is not None:
            for i in self.rest.batch:
                leaves[i] = _placed(np.asarray(leaves[i])[rows], leaves[i])
        return leaves

    def _with_states(self, args, hess, ess, key):
        """The arguments with states of IVON without momentum.

        Some steps make their key of the state's count: another key is another count.
        """
        args = jax.tree.map(_on_axes, args, is_leaf=_is_evon)
        arrays = [h for s in find_states(args) for h in jax.tree.leaves(s.hess)]
        pieces = iter(arrays if hess is None else _pieces(hess, arrays))

        def first(node):
            if not _is_ivon(node):
                return node
            return node._replace(
                count=_put(key, node.count),
                ess=node.ess if ess is None else _put(ess, node.ess),
                momentum=jax.tree.map(lambda g: _put(0, g), node.momentum),
                hess=jax.tree.map(lambda h: _put(next(pieces), h), node.hess),
            )

        return jax.tree.map(first, args, is_leaf=_is_ivon)


def _is_evon(node):
    return isinstance(node, EVONState)


def _on_axes(node):
    """A state of EVON with the axes for bases, in which it does what IVON does.

    They are the eigenvectors of statistics so large that no gradient turns them.
    """
    if not _is_evon(node):
        return node

    def scaled(scale, x):
        return _put(scale * np.eye(np.shape(x)[-1]), x)

    return node._replace(
        flat_bases=jax.tree.map(functools.partial(scaled, 1.0), node.flat_bases),
        flat_statistics=jax.tree.map(
            functools.partial(scaled, FIRM), node.flat_statistics
        ),
    )


def _is_ivon(node):
    return isinstance(node, IVONState)


def _of_states(read, states):
    """What ``read(state)`` says of each trained array, as one vector."""
    return _vector(x for state in states for x in jax.tree.leaves(read(state)))


def _owned_by(state, params):
    """The numbers of the arrays of `params` that a state trains."""
    owned = jax.tree.map(lambda _, x: x is not None, params, own(state.hess, params))
    return np.flatnonzero(jax.tree.leaves(owned))


def _decay(state):
    """The weight decay of each entry of a state, as a vector."""
    ess = float(state.ess)
    if state.prior is None:
        decay = float(state.weight_decay)
        return np.full(sum(h.size for h in jax.tree.leaves(state.hess)), decay)
    return _vector(jax.tree.leaves(state.prior.precision)) / ess


def _setting(states, name):
    """A setting of each state, for all of its entries, as a vector."""
    return np.concatenate(
        [np.full_like(_decay(state), float(getattr(state, name))) for state in states]
    )


def _copy(x):
    """An array of its own."""
    is_key = jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
    return x if is_key or not isinstance(x, jax.Array) else _put(np.array(x), x)


def _put(value, like):
    """A value in the shape, dtype and place of an array, without another program."""
    value = np.broadcast_to(np.asarray(value, like.dtype), np.shape(like))
    return _placed(value, like)


def _placed(value, like):
    spread = isinstance(like, jax.Array) and len(like.sharding.device_set) > 1
    return jax.device_put(value, like.sharding if spread else None)


def _vector(arrays: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in arrays])


def _pieces(vector, arrays):
    """A vector in the shapes of `arrays`."""
    ends = np.cumsum([np.size(x) for x in arrays])
    pieces = np.split(vector, ends[:-1])
    return [p.reshape(np.shape(x)) for p, x in zip(pieces, arrays, strict=True)]


def _other_key(key, number):
    """A random key of the same kind and shape: 0 is the key itself."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = _other_key(jax.random.key_data(key), number)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return _placed(np.asarray(key) + np.uint32(number), key)


def _with_count(args, count):
    """The arguments with all counts of steps in optimizer states at `count`."""
    if count is None:
        return args

    def leaf(path, x):
        last = path[-1] if path else None
        named = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "count"
        return _put(count, x) if named else x

    return jax.tree_util.tree_map_with_path(leaf, args)
