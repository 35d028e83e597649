"""Call everything within `jax.shard_map`: a script for `test_parallel.py`, with JSON.

It needs a process of its own, because that of pytest has one device.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import KINDS, difference, double_precision, normal, place, widen
from jax.sharding import PartitionSpec as P

import ivon_jax
from ivon_jax import diagnostics, merging, predictive

TX = ivon_jax.ivon(0.1, ess=200, hess_init=0.5, b2=0.999)
PARAMS = {"w": normal(6, 4) / 2, "b": normal(4)}
X, Y = normal(48, 6), np.arange(48) % 4

# Samples, micro-batches, estimator, side by side; every pair of them is there.
OPTIONS = (
    (1, 1, "reparameterization", False),
    (1, 2, "gauss_newton", False),
    (3, 1, "gauss_newton", True),
    (3, 2, "reparameterization", False),
    (3, 2, "squared_gradient", True),
)
# Axis types, devices along data and model, check_vma; manual over data alone.
MAPS = (
    ("Auto", (4, 2), True),
    ("Auto", (4, 2), False),
    ("Explicit", (4, 2), True),
    ("Explicit", (8,), True),
)


def make_mesh(kind, shape):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


def apply(theta, x):
    """Logits (N, C), by a sum: on an explicit mesh it may be over a sharded axis."""
    return jnp.sum(x[:, :, None] * theta["w"][None], axis=1) + theta["b"][None]


def loss_fn(theta, x, y, key):
    """A cross-entropy with dropout; the key comes back with its last value."""
    kept = jax.random.bernoulli(key, 0.5, (x.shape[1],))
    logits = apply(theta, x * kept.astype(x.dtype)[None])
    labels = jax.nn.one_hot(y, 4, dtype=x.dtype)
    loss = -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))
    return loss, (loss, jax.random.clone(key))


def estimate(options, axis_name=None):
    """`value_and_grad` with these options, of raw key data, without the key of aux."""
    mc_samples, microbatches, hess_estimator, vectorize = options
    grad_fn = ivon_jax.value_and_grad(
        loss_fn,
        has_aux=True,
        mc_samples=mc_samples,
        microbatches=microbatches,
        hess_estimator=hess_estimator,
        vectorize=vectorize,
        axis_name=axis_name,
    )

    def run(folds, params, opt_state, x, y):
        keys = jax.random.key(0), jax.random.key(1)
        if axis_name is None:
            keys = [jax.random.fold_in(key, folds) for key in keys]
        (loss, aux), result = grad_fn(keys[0], params, opt_state, x, y, keys[1])
        return loss, aux[0], result

    return run


def mapped(fn, kind, shape, check_vma, *args):
    """`fn` on a mesh, manual over "data", with examples sharded over it."""
    mesh = make_mesh(kind, shape)
    with jax.set_mesh(mesh):
        placed = *place(mesh, args[:-2], P()), *place(mesh, args[-2:], P("data"))
        specs = (P(),) * len(placed[:-2]) + (P("data"), P("data"))
        run = jax.shard_map(
            fn,
            in_specs=specs,
            out_specs=P(),
            axis_names={"data"},
            check_vma=check_vma,
        )
        return jax.jit(run)(*placed)


def name_of(kind, shape, check_vma):
    return f"{kind}, {len(shape)}, {check_vma}"


@double_precision
def estimates():
    """Differences from the mean over keys and slices of one device."""
    params, x = widen((PARAMS, X))
    args = params, TX.init(params)
    found = {}
    for i, options in enumerate(OPTIONS):
        alone = jax.jit(estimate(options))
        for maps in MAPS[i % 2 :: 2]:  # half of them each, in turn
            count = maps[1][0]
            slices = zip(np.split(x, count), np.split(Y, count), strict=True)
            parts = [alone(j, *args, *xy) for j, xy in enumerate(slices)]
            expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *parts)
            result = mapped(estimate(options, "data"), *maps, 0, *args, x, Y)
            found[f"{options}, {name_of(*maps)}"] = difference(result, expected)
    return found


def of_posterior(params, opt_state, x, y):
    """What takes means over samples or sums over examples, of one device's examples."""
    q, prior = ivon_jax.posterior(params, opt_state), ivon_jax.prior(params, opt_state)
    key = jax.random.key(0)

    def probs(theta):
        return jax.nn.softmax(apply(theta, x))

    def loss(theta):
        return loss_fn(theta, x, y, jax.random.key(1))[0]

    mixture = ivon_jax.Mixture([q, q])
    numbers = diagnostics.measure(
        params, opt_state, loss_fn=loss, key=key, hess_init=0.5, b2=0.9, num_samples=3
    )
    return {
        "predict": ivon_jax.predict(probs, q, key, 3),
        "many": ivon_jax.predict(probs, q, key, 200),
        "mixture": ivon_jax.predict(probs, mixture, key, 3),
        "uncertainty": ivon_jax.uncertainty(probs, q, key, 3),
        "bound": ivon_jax.evidence_lower_bound(
            loss, q, prior, key, ess=9, num_samples=3
        ),
        "measure": numbers["loss_at_samples"],
        "fisher": merging.diagonal_fisher(apply, params, key, x, num_samples=3),
        "linearized": predictive.linearized(apply, q, x, chunk_size=3),
    }


@double_precision
def posteriors():
    """Differences from the mean over the results of the slices on one device."""
    params, x = widen((PARAMS, X))
    args = params, TX.init(params)
    alone = jax.jit(of_posterior)

    def mean_over_devices(*args):
        return jax.lax.pmean(of_posterior(*args), "data")

    slices = zip(np.split(x, 4), np.split(Y, 4), strict=True)
    parts = [alone(*args, *xy) for xy in slices]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *parts)
    result = mapped(mean_over_devices, *MAPS[0], *args, x, Y)
    return {name: difference(result[name], expected[name]) for name in expected}


FACTS = (estimates, posteriors)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps({fact.__name__: fact() for fact in FACTS}))
