"""One compilation for one program, whichever function brings it.

Outside of ``jit``, JAX compiles a loop anew for each new function object, and keeps
what it compiled: a lambda in a loop costs seconds and megabytes at every call. Here a
function is traced at every call, which is cheap and never serves an old value of what
it closes over. What is compiled is found again by what the trace says, not by whose it
is: arrays that the function closes over are arguments of the program, so they are
neither copied into it nor kept.
"""

import dataclasses
import functools
import math
import numbers
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

MAX_PROGRAMS = 16
# A jitted function has what it closes over within its program. More than this is kept
# no longer than the function itself.
MAX_EMBEDDED_BYTES = 2**20


def call(run: Callable[..., Any], *args: Any, of: Callable[..., Any]) -> Any:
    """Return ``run(*args)``, compiled, but not again if an equal program was before.

    Within ``jit``, ``grad``, ``vmap`` or `jax.shard_map` it is ``run(*args)``: there,
    something else compiles.

    Args:
      run: a pure function.
      *args: pytrees. Arrays and numbers are traced; whatever else, such as strings,
        booleans and functions, `run` gets as it is.
      of: the user's function in `run`.

    Returns:
      What `run` returns, a pytree of arrays.
    """
    leaves, structure = jax.tree.flatten(args)
    traced = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]
    values = [leaves[i] for i in traced]

    def of_values(*values):
        changed = list(leaves)
        for i, value in zip(traced, values, strict=True):
            changed[i] = value
        return run(*structure.unflatten(changed))

    # Before jax 0.12, its configuration gets this name at run time.
    disabled = jax.config.jax_disable_jit  # type: ignore[attr-defined, unused-ignore]
    if disabled or _any_tracer(values):
        return run(*args)
    closed, shapes = jax.make_jaxpr(of_values, return_shape=True)(*values)
    if _any_tracer(closed.consts):
        return run(*args)
    outputs = _program(_of_arguments(closed), of)(*closed.consts, *values)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _of_arguments(closed):
    """The jaxpr in which constants are arguments, the first ones.

    JAX 0.12 has one class for both kinds of jaxpr: its `jaxpr` still holds them.
    """
    jaxpr = closed.jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def _is_traced(leaf):
    if isinstance(leaf, (bool, np.bool_)):
        return False
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, numbers.Number))


def _any_tracer(values):
    return any(isinstance(value, jax.core.Tracer) for value in values)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """A jaxpr that equals all others that compute the same."""

    structure: Hashable
    jaxpr: Jaxpr = dataclasses.field(compare=False)


def _jitted(trace):
    def evaluate(*values):
        return jax.core.eval_jaxpr(trace.jaxpr, (), *values)

    return jax.jit(evaluate)


_recent = functools.lru_cache(MAX_PROGRAMS)(_jitted)
_of_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _program(jaxpr, fn):
    """The function of its values, compiled at its first call."""
    embedded = []
    trace = _Trace(_structure(jaxpr, embedded), jaxpr)
    if sum(map(_num_bytes, embedded)) <= MAX_EMBEDDED_BYTES:
        return _recent(trace)
    try:
        programs = _of_functions.setdefault(fn, functools.lru_cache(4)(_jitted))
    except TypeError:  # it has no hash, or no weak references
        return _jitted(trace)
    return programs(trace)


def _num_bytes(array):
    return math.prod(np.shape(array)) * getattr(array, "itemsize", 8)


class _Same:
    """An object that equals itself alone."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value


def _structure(jaxpr, embedded):
    """All that a jaxpr computes, as a value; collect the arrays within in `embedded`.

    Whatever is unknown here equals itself alone: at worst, a program is compiled twice.
    """
    consts = tuple(getattr(jaxpr, "consts", ()))
    embedded.extend(consts)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    positions = {}

    def variable(v):
        return positions.setdefault(v, len(positions)), v.aval

    def atom(x):
        if isinstance(x, Literal):
            value = np.asarray(x.val)
            return str(value.dtype), value.shape, value.tobytes(), x.aval
        return variable(x)

    def equation(e):
        params = e.params
        if e.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call")):
            # The rules of derivatives, new at each trace: all have been taken by now.
            params = {k: v for k, v in params.items() if isinstance(v, _JAXPRS)}
        return (
            e.primitive,
            tuple(map(atom, e.invars)),
            tuple(map(variable, e.outvars)),
            _parameter(params, embedded),
            e.ctx,
        )

    return (
        tuple(map(_Same, consts)),
        tuple(map(variable, (*jaxpr.constvars, *jaxpr.invars))),
        tuple(map(equation, jaxpr.eqns)),
        tuple(map(atom, jaxpr.outvars)),
    )


_JAXPRS = (Jaxpr, ClosedJaxpr)


def _parameter(value, embedded):
    """A parameter of an equation, as a value that has a hash."""
    if isinstance(value, _JAXPRS):
        return _structure(value, embedded)
    if isinstance(value, dict):
        return tuple((k, _parameter(v, embedded)) for k, v in sorted(value.items()))
    if type(value) in (tuple, list):
        return tuple(_parameter(v, embedded) for v in value)
    if isinstance(value, numbers.Number):
        return type(value), repr(value)  # 1 == 1.0 == True, and 0.0 == -0.0
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value
