"""Errors that many rooms raise: about numbers, keys, functions and distributions.

A number that is a Python or NumPy number comes back as a Python float; one that is a
JAX array comes back as a floating-point one, checked unless it is a tracer (``jit``,
``vmap``).
"""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Limit(NamedTuple):
    """What a number must be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Limit("positive", lambda x: x > 0)
NON_NEGATIVE = Limit("non-negative", lambda x: x >= 0)
DECAY_RATE = Limit("in [0, 1)", lambda x: 0 <= x < 1)
INSIDE = Limit("in (0, 1)", lambda x: 0 < x < 1)
FRACTION = Limit("in [0, 1]", lambda x: 0 <= x <= 1)


def at_least(low):
    """Return the limit of numbers from `low` on."""
    return Limit(f"at least {low:.2g}", lambda x: x >= low)


def at_most(high):
    """Return the limit of numbers up to `high`."""
    return Limit(f"at most {high:.2g}", lambda x: x <= high)


def number(name, value, *limits):
    """Return a finite real scalar, within these limits where it is known."""
    result, known_value = scalar(name, value)
    for limit in limits:
        if known_value is not None and not limit.holds(known_value):
            raise ValueError(f"`{name}` must be {limit.words}, got {value}.")
    return result


def positive(name, value, *limits):
    """Return a positive scalar, also in the default float dtype."""
    tiny = float(jnp.finfo(jnp.result_type(float)).tiny)
    return number(name, value, POSITIVE, at_least(tiny), *limits)


def boolean(name, value):
    """Return True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def integer_between(name, value, low, high=math.inf):
    """Raise unless this is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")


def choice(name, value, allowed):
    """Return one of a closed set of strings."""
    if value not in allowed:
        options = " or ".join(f'"{option}"' for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def random_key(name, value):
    """Return one typed random key, made of a legacy one where that is given."""
    if not isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a JAX random key, got {value!r}. Pass "
            "`jax.random.key(0)`."
        )
    if value.dtype == jnp.uint32 and value.ndim:
        value = jax.random.wrap_key_data(value)
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.ndim:
        raise TypeError(
            f"`{name}` must be one JAX random key, got {value.dtype} of shape "
            f"{value.shape}. Pass `jax.random.key(0)`; several go one by one, or under "
            "`jax.vmap`."
        )
    return value


def shape(name, value):
    """Return a shape as a tuple."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"`{name}` must be a tuple of integers, got {value!r}. For 5 draws, pass "
            f"`{name}=(5,)`."
        )
    for size in value:
        integer_between(f"{name}", size, 0)
    return tuple(int(size) for size in value)


def function(name, value, of="the parameters", example="lambda theta: apply(theta, x)"):
    """Raise unless this can be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function of {of}, got {type(value).__name__}. Pass "
            f"`{example}`."
        )


def arguments(name, value):
    """Raise if an array is in the place of a tuple of arguments."""
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


def loss_and_aux(value, has_aux):
    """Return loss and aux of what a loss function returned, None for no aux."""
    hint = "Pass `has_aux=True` if it returns (loss, aux)."
    if not has_aux:
        return scalar_loss(value, hint), None
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            "`loss_fn` must return (loss, aux) with has_aux=True, got "
            f"{type(value).__name__}."
        )
    loss, aux = value
    return scalar_loss(loss, hint), aux


def scalar_loss(value, hint="Drop what it returns besides."):
    """Return a loss to which a gradient, and that of the mean, belongs."""
    if value is None:
        raise TypeError(
            "`loss_fn` must return a scalar, the mean loss per example, got None. Does "
            "it return its result?"
        )
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, numbers.Number)):
        raise TypeError(
            "`loss_fn` must return a scalar, the mean loss per example, got "
            f"{type(value).__name__}. {hint}"
        )
    if jnp.shape(value) != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean loss per example, got shape "
            f"{jnp.shape(value)}. Take its mean."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            "`loss_fn` must return a real floating-point scalar, got dtype "
            f"{jnp.result_type(value)}. Has it been cast, or a real part not taken?"
        )
    return value


def distribution(name, value, verb):
    """Raise unless this offers `verb`, and its values are those of a distribution."""
    if not hasattr(value, verb):
        raise TypeError(
            f"`{name}` must be a Posterior, one Gaussian, got {type(value).__name__}. "
            f"Pass `ivon_jax.{name}(params, opt_state)`."
        )
    if hasattr(value, "validate"):
        value.validate()


def extremes(array):
    """Return the least and the greatest value of `array`, where they are known.

    Both are NaN if any is. None of a tracer, of what other hosts hold, of no values.
    """
    return known(least_and_greatest, array) if array.size else None


def known(fn, *arrays):
    """Return ``fn(*arrays)`` on the host if all `arrays` are concrete, else None.

    The arrays stay on their devices. Within ``jit``, where even the minimum of a
    constant is a tracer, and on any mesh, `fn` is evaluated at once: it must be jitted.
    """
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return None
    meshes = [jax.sharding.AbstractMesh((), ())]
    for x in leaves:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return None
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            meshes.append(sharding.mesh.abstract_mesh)
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(meshes[-1]):
        return jax.tree.map(lambda x: x.item(), jax.device_get(fn(*arrays)))


@jax.jit
def least_and_greatest(x):
    return jnp.min(x), jnp.max(x)


def scalar(name, value):
    """Return `value` for computing, and as a finite number where it is known."""
    if isinstance(value, np.ndarray) and not value.shape:
        value = value[()]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = _finite(name, value)
        return number, number
    if not isinstance(value, jax.Array):
        hint = " To schedule it, use `optax.inject_hyperparams`." * callable(value)
        raise TypeError(f"`{name}` must be a number, got {value!r}.{hint}")
    kinds = (jnp.integer, jnp.floating)
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(
            f"`{name}` must be a real scalar, got an array of shape {value.shape} and "
            f"dtype {value.dtype}."
        )
    if value.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(
            f"`{name}` must be float32 or wider, got {value.dtype}, where 0.99999 is "
            "1. With `optax.inject_hyperparams`, use `hyperparam_dtype=jnp.float32`."
        )
    concrete = not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
    known_value = _finite(name, value) if concrete else None
    if jnp.issubdtype(value.dtype, jnp.integer):  # whose sums might overflow
        value = value.astype(float)
    return value, known_value


def _finite(name, value):
    """Return `value` as a Python float, if the default float dtype can hold it."""
    number = value if isinstance(value, int) else float(value)  # 10**400 is no float
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    if abs(number) == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if abs(number) > largest:
        raise ValueError(f"`{name}` must be at most {largest:.2g}, got {value}.")
    return float(number)
