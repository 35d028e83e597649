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
from ivon_jax import merging, predictive, pruning, sensitivity

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


def linear(theta, x):
    return x @ theta


def of_the_rest(q, members, head, x, keys):
    """What else must find its way through shardings in the types of arrays."""
    fisher = merging.diagonal_fisher
    mixture = ivon_jax.Mixture(members)
    return {
        "kept": pruning.prune(q, pruning.by_variance(q, 0.3)),
        "curve": pruning.curve(lambda theta: theta["w"].sum(), q, [0.2, 0.5]),
        "fisher": fisher(linear, jnp.ones((6, 4)), keys[0], x, chunk_size=16),
        "drawn": mixture.sample(keys[1], (3,)),
        "mean": ivon_jax.predict(lambda theta: theta, mixture, keys[2], 16),
        "sensitivities": sensitivity.sensitivities(linear, head, widen(X), Y),
        "linearized": predictive.linearized(linear, head, widen(X)).mean,
    }


@double_precision
def explicit_differences():
    """From one device: sharded members, and outputs that are sharded by class."""
    mesh = make_mesh(KINDS["Explicit"], DEVICES)
    gaussians = widen(
        (
            ivon_jax.Posterior(PARAMS, PRECISION),
            ivon_jax.Posterior(normal(8, 6, 4), 1 + normal(8, 6, 4) ** 2),
            ivon_jax.Posterior(normal(6, 16), 1 + normal(6, 16) ** 2),
        )
    )
    keys = jax.random.split(jax.random.key(0), 3)
    alone = jax.jit(of_the_rest)(*gaussians, widen(X), keys)
    q, members, head = gaussians
    q = [place(mesh, tree, {"w": P(None, "data"), "v": P("data")}) for tree in q]
    members, head = (
        ivon_jax.Posterior(*place(mesh, tuple(pair), spec))
        for pair, spec in ((members, P("data")), (head, P(None, "data")))
    )
    with jax.set_mesh(mesh):
        x = place(mesh, widen(X), P("data"))
        run = jax.jit(of_the_rest)(ivon_jax.Posterior(*q), members, head, x, keys)
    return {name: difference(run[name], alone[name]) for name in alone}


def sent():
    """What devices send each other where each has examples of its own."""
    mesh = make_mesh(KINDS["Auto"], DEVICES)
    return collectives(compiled(results, *placed(mesh, P())))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    facts = [differences, sent]
    # On an explicit mesh older versions cannot map over sharded examples.
    facts += [explicit_differences] * (jax.__version_info__ >= (0, 10))
    print(json.dumps({fact.__name__: fact() for fact in facts}))
