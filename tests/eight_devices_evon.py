"""Measure EVON on eight devices: a script for `test_parallel.py`, printing JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import AS_USERS_DO
from eight_devices import (
    KINDS,
    PARAMS,
    SPECS,
    collectives,
    difference,
    make_mesh,
    place,
)

import ivon_jax

TX = ivon_jax.evon(0.1, ess=200, hess_init=0.5, b2=0.9)


def step(params, opt_state, key):
    """One step at a sample, with the gradient cos(theta); and the sample."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.tree.map(jnp.cos, theta)
    updates, opt_state = TX.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state, theta


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def facts(kind, begun, expected):
    """A step from a state that one device has made, on a mesh of 2 x 4."""
    mesh = make_mesh(kind, 2, 4)
    with jax.set_mesh(mesh):
        params = place(mesh, begun[0], SPECS)
        empty = TX.init(params)
        state = jax.tree.map(
            lambda x, y: jax.device_put(x, y.sharding), begun[1], empty
        )
        key = jax.random.key(8)
        program = jax.jit(step).lower(params, state, key).compile(AS_USERS_DO)
        new_params, new_state, theta = program(params, state, key)
        sample = jax.jit(ivon_jax.sample).lower(key, params, state).compile(AS_USERS_DO)
    hess = [s[0].hess for s in (new_state, expected[1])]
    shardings = [
        state[0].hess[name].sharding.is_equivalent_to(x.sharding, x.ndim)
        for state in (empty, new_state)
        for name, x in params.items()
    ]
    return {
        "theta": difference(theta, expected[2]),
        "params": difference(new_params, expected[0]),
        "hess": difference(*hess),
        "types stay": jax.tree.map(jax.typeof, new_state)
        == jax.tree.map(jax.typeof, state),
        "sharded as parameters": all(shardings),
        "of a sample": collectives(sample),
        "of a step": collectives(program),
    }


def main():
    """Two steps on one device, and the third on both kinds of meshes as well."""
    carry = jax.tree.map(jnp.asarray, PARAMS), TX.init(PARAMS)
    for i in range(2):
        *carry, _ = jax.jit(step)(*carry, jax.random.key(i))
    begun = on_host(tuple(carry))
    expected = on_host(jax.jit(step)(*carry, jax.random.key(8)))
    found = {name: facts(kind, begun, expected) for name, kind in KINDS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main()
