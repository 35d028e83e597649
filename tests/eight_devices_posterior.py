"""Use a posterior on eight devices: a script for `test_sensitivity.py`, printing JSON.

It needs a process of its own, because that of pytest has one device.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import (
    DEVICES,
    KINDS,
    collectives,
    compiled,
    difference,
    double_precision,
    make_mesh,
    normal,
    place,
    widen,
)
from jax.sharding import PartitionSpec as P

import ivon_jax
from ivon_jax import predictive, sensitivity

PARAMS = {"w": normal(6, 32) / 2, "v": normal(32, 4) / 4}
SPECS = {"w": P(None, "model"), "v": P("model", None)}
PRECISION = {name: 50 + 50 * np.abs(x) for name, x in PARAMS.items()}
X, Y = normal(64, 6), np.arange(64) % 4


def fn(theta, x):
    """A small MLP; a sum, where a matrix may be sharded."""
    hidden = jnp.tanh(x @ theta["w"])
    return jnp.sum(hidden[:, :, None] * theta["v"][None], axis=1)


def results(mean, precision, x, y):
    """All that is made of products with the covariance, in chunks."""
    q = ivon_jax.Posterior(mean, precision)
    return {
        "deviations": sensitivity.deviations(fn, q, x, y, chunk_size=16),
        "diagonal": sensitivity.deviations(
            fn, q, x, y, diagonal=True, chunk_size=DEVICES
        ),
        "covariance": predictive.linearized(fn, q, x, chunk_size=16).covariance,
    }


def placed(mesh, specs):
    """The arguments of `results`, with examples sharded over "data"."""
    gaussian = (place(mesh, tree, specs) for tree in widen((PARAMS, PRECISION)))
    return *gaussian, *(place(mesh, rows, P("data")) for rows in (widen(X), Y))


@double_precision
def differences():
    """From one device, relative to the largest entry."""
    alone = jax.jit(results)(*widen((PARAMS, PRECISION, X)), Y)
    found = {}
    # Of older versions, vmap of a maximum's derivative fails on an explicit mesh.
    kinds = KINDS if jax.__version_info__ >= (0, 10) else ["Auto"]
    for kind in kinds:
        for shape, specs in (((8,), P()), ((4, 2), SPECS)):
            mesh = make_mesh(KINDS[kind], *shape)
            with jax.set_mesh(mesh):
                run = jax.jit(results)(*placed(mesh, specs))
            found[f"{kind}, {len(shape)}"] = difference(run, alone)
    return found


def sent():
    """What devices send each other where each has examples of its own."""
    mesh = make_mesh(KINDS["Auto"], DEVICES)
    return collectives(compiled(results, *placed(mesh, P())))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps({fact.__name__: fact() for fact in (differences, sent)}))
