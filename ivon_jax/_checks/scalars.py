"""Scalars and settings: numbers, counts, dtypes, choices, axes.

A number that is a Python or NumPy number comes back as a Python float; one that is a
JAX array comes back as it is, checked unless it is a tracer (``jit``, ``vmap``).
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np


def positive(name, value):
    """Return a scalar that is positive and finite, also in the default float dtype."""
    scalar, number = _scalar(name, value)
    if number is not None and not number > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    tiny = float(jnp.finfo(jnp.result_type(float)).tiny)
    if number is not None and number < tiny:
        raise ValueError(f"`{name}` must be at least {tiny:.2g}, got {value}.")
    return scalar


def non_negative(name, value):
    """Return a scalar that is finite and at least zero."""
    scalar, number = _scalar(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"`{name}` must be non-negative, got {value}.")
    return scalar


def bounded(name, value, low, high):
    """Return a scalar in [low, high], which are positive, or zero where low is."""
    check = positive if low else non_negative
    scalar = check(name, value)
    number = _scalar(name, scalar)[1]
    if number is not None and number < low:
        raise ValueError(f"`{name}` must be at least {low:.2g}, got {value}.")
    if number is not None and number > high:
        raise ValueError(f"`{name}` must be at most {high:.2g}, got {value}.")
    return scalar


def arguments_in_order(learning_rate, ess):
    """Reject a learning rate and a number of examples in each other's place."""
    known = not callable(learning_rate)
    rate = _scalar("learning_rate", learning_rate)[1] if known else None
    size = 1.0 if callable(ess) else _scalar("ess", ess)[1]
    if None not in (rate, size) and rate >= 10.0 and 0.0 < size <= 1.0:
        raise ValueError(
            "`learning_rate` must come first, then `ess`, the number of examples, got "
            f"{learning_rate} and {ess}. Call `ivon(learning_rate=..., ess=...)`."
        )


def decay_rate(name, value):
    """Return a scalar in [0, 1)."""
    scalar, number = _scalar(name, value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
    return scalar


def fraction(name, value):
    """Return a scalar in [0, 1], as a Python float where it is known."""
    scalar, number = _scalar(name, value)
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
    return scalar if number is None else number


def fractions(name, value):
    """Return numbers in [0, 1] along one axis."""
    array = jnp.asarray(value, dtype=float)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`{name}` must be a list of at least one number, got shape {array.shape}."
        )
    low, high = extremes(array) or (0, 1)
    if not 0 <= low <= high <= 1:
        bad = high if low >= 0 else low
        raise ValueError(f"`{name}` must be in [0, 1], got {bad}.")
    return array


def boolean(name, value):
    """Return True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def integer_between(name, value, low, high=math.inf):
    """Reject anything but an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")


def floating_dtype(name, value):
    """Return a floating-point dtype."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating-point dtype such as `jnp.bfloat16`, got "
            f"{value!r}."
        )
    return dtype


def choice(name, value, allowed):
    """Return one of a closed set of strings."""
    if value not in allowed:
        options = " or ".join(f'"{option}"' for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def has_axis(name, axis_name):
    """Reject what is about several devices where there is no axis of them."""
    if axis_name is None:
        raise ValueError(f"`{name}` needs `axis_name`, the axis to reduce over.")


def axis_index(axis_name):
    """Return this device's index along a mapped axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound by a map around the call, got {axis_name!r}. "
            "Call inside `jax.shard_map` or `jax.pmap` with that axis name."
        ) from None


def has_key(key):
    """Reject samples without randomness."""
    if key is None:
        raise ValueError(
            "`key` must be a JAX random key where `loss_fn` is given, got None. Pass "
            "`key=jax.random.key(0)`, a new one for each call."
        )


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


def measured(name, value):
    """Return a number of `diagnostics.measure` as a Python float."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`numbers` must be known, got a tracer for {name!r}. Call "
            "`diagnostics.advice` on what a jitted `diagnostics.measure` returned."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"`numbers` must be scalars, those of one run, got shape {jnp.shape(value)}"
            f" for {name!r}."
        )
    return float(value)


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


def _scalar(name, value):
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
    return value, _finite(name, value) if concrete else None


def _finite(name, value):
    """Return `value` as a Python float, if the default float dtype can hold it."""
    number = value if isinstance(value, int) else float(value)  # 10**400 is no float
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    if abs(number) == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if abs(number) > largest:
        raise ValueError(f"`{name}` must be at most {largest:.2g}, got {value}.")
    return float(number)
