"""Functions of the user: what they are called with, and what they return."""

import jax
import numpy as np


def function(name, value):
    """Reject what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function of the parameters, got "
            f"{type(value).__name__}. Pass `lambda theta: apply(theta, x)`."
        )


def arguments(name, value):
    """Reject an array in the place of a tuple, whose rows would be the arguments."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"`{name}` must be a tuple of arguments, got {type(value).__name__}. Of "
            f"one argument, pass `{name}=(x,)`."
        )


def arrays(name, value):
    """Return a pytree that has arrays, and nothing else."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise TypeError(
            f"`{name}` must be an array or a pytree of arrays, got {_short(value)}. "
            "Does the function return its result?"
        )
    for path, leaf in leaves:
        where = f" at {name}{jax.tree_util.keystr(path)}" if path else ""
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            raise TypeError(
                f"`{name}` must be an array or a pytree of arrays, got "
                f"{type(leaf).__name__}{where}. Return the predictions alone."
            )
    return value


def _short(value):
    """A value that fits on a line, or its type."""
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__
