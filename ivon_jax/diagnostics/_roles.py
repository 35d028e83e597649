"""What the arguments and outputs of a training step are, told by their structure."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._optimizer import validity
from .._optimizer.posterior import posterior
from .._optimizer.state import find_states, nodes


class Trained(NamedTuple):
    """Where parameters and their state are, as positions among the leaves of a tree."""

    params: list[int]  # what IVON trains, and what stands beside it
    structure: Any  # the tree of the parameters: jax has no type for it
    opt_state: list[int]


class Rest(NamedTuple):
    """What else a step is given, as positions among the leaves of its arguments."""

    keys: list[int]
    batch: list[int]  # arrays with one row for each example


def of_arguments(args: tuple[Any, ...]) -> Trained:
    """Find the parameters and their state among a step's arguments."""
    validity.some_state(find_states(args), args)
    if any(map(_is_accumulation, jax.tree.leaves(args, is_leaf=_is_accumulation))):
        raise ValueError(
            "`step` must take a step of IVON at each call, got the state of an "
            "`optax.MultiSteps`. Check the step without it."
        )
    found = trained(args)
    if found is None:
        raise ValueError(
            "`args` must have the parameters that the optimizer's state was made for, "
            "got no such tree. Call `check_step(step, params, opt_state, batch, key)`, "
            "with the arguments of your step in its order."
        )
    return found


def rest(args: tuple[Any, ...], found: Trained, returned: Any) -> Rest:
    """Find keys and batch among a step's arguments; `returned` is what it returned."""
    inside = {*found.params, *(i for state in _states(args) for i in state)}
    leaves = enumerate(jax.tree_util.tree_leaves_with_path(args))
    others = [(i, path, x) for i, (path, x) in leaves if i not in inside]
    keys = [i for i, _, x in others if _is_key(x)]
    carried = _names(returned)
    rows = [
        (i, np.shape(x)[0])
        for i, path, x in others
        if i not in keys and np.ndim(x) and not _names_of(path, x) & carried
    ]
    size = next((n for _, n in rows if n > 1), None)
    return Rest(keys, [i for i, n in rows if n == size])


def trained(tree: Any) -> Trained | None:
    """Find the first tree outside of optimizer states that one of them was made for."""
    if not find_states(tree):
        return None
    for first, node in _subtrees(tree):
        if find_states(node):
            continue
        leaves = jax.tree.leaves(node)
        params = jax.tree.map(lambda x: x if _is_floating(x) else None, node)
        try:
            jax.eval_shape(functools.partial(posterior, params, tree))
        except (TypeError, ValueError):  # it is not the tree of the state
            continue
        here = [first + i for i, x in enumerate(leaves) if _is_floating(x)]
        opt_state = [i for state in _states(tree) for i in state]
        return Trained(here, jax.tree.structure(params), opt_state)
    return None


def _subtrees(tree: Any, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield each node, and the position of its first leaf, from the root down."""
    yield first, tree
    if _is_state(tree):
        return
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and children[0] is tree:
        return
    for child in children:
        yield from _subtrees(child, first)
        first += len(jax.tree.leaves(child))


def _states(tree):
    """The positions of the leaves of each state of an optimizer."""
    first = 0
    for node in jax.tree.leaves(tree, is_leaf=_is_state):
        count = len(jax.tree.leaves(node))
        if _is_state(node):
            yield range(first, first + count)
        first += count


def _is_state(node):
    """Return whether `node` is a state of an optax transformation."""
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    return named and type(node).__module__.split(".")[0] in ("optax", "ivon_jax")


def _is_accumulation(node):
    return isinstance(node, optax.MultiStepsState)


def is_sampled(args: Any) -> bool:
    """Return whether `sampled` draws, so that the parameters are the sample."""
    return bool(nodes(args, "mean_of"))


def _names(tree):
    """What all leaves of `tree` are called: batch statistics go in and come out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name for path, x in leaves for name in _names_of(path, x)}


def _names_of(path, x):
    """Name and shape of a leaf within its argument; an argument itself has no name."""
    name = jax.tree_util.keystr(path[1:])
    return {(name, np.shape(x))} if name else set()


def _is_floating(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _is_key(x):
    """Return whether a leaf is a random key, of either kind."""
    if not hasattr(x, "dtype"):
        return False
    raw = x.dtype == jnp.uint32 and np.shape(x) == (2,)
    return raw or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
