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
from ivon_jax import merging, metrics, predictive, pruning, sensitivity

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


def of_examples(q, x, y, chunk_size=4):
    """Along the first axis, what belongs to each example or to all."""
    return {
        "linearized": predictive.linearized(
            linear, q, x, chunk_size=chunk_size
        ).covariance,
        "sensitivities": sensitivity.sensitivities(
            linear, q, x, y, chunk_size=chunk_size
        ),
        "diagonal": sensitivity.deviations(
            linear, q, x, y, diagonal=True, chunk_size=chunk_size
        ),
        "loss": sensitivity.leave_one_out_loss(linear, q, x, y)[None],
        "fisher": merging.diagonal_fisher(
            linear, q.mean, jax.random.key(0), x, chunk_size=chunk_size
        )[None],
    }


HEAD = ivon_jax.Posterior(normal(6, 4), 1 + normal(6, 4) ** 2)


def of_functions(q, x, keys):
    """What takes a function that closes over data, with logits sharded by class."""
    prior = ivon_jax.Posterior(jnp.zeros_like(q.mean), q.precision)

    def probs(theta):
        return jax.nn.softmax(linear(theta, x))

    def loss(theta):
        return -jnp.mean(jax.nn.log_softmax(linear(theta, x)))

    return {
        "predict": ivon_jax.predict(probs, q, keys[0], 3),
        "uncertainty": ivon_jax.uncertainty(probs, q, keys[1], 3),
        "linearized": predictive.linearized(linear, q, x, chunk_size=16),
        "bound": ivon_jax.evidence_lower_bound(
            loss, q, prior, keys[2], ess=64, num_samples=3
        ),
    }


@double_precision
def function_differences():
    """From one device, of sharded parameters and data, with jit and without."""
    q, x = widen((HEAD, X))
    keys = jax.random.split(jax.random.key(0), 3)
    alone = jax.jit(of_functions)(q, x, keys)
    found = {}
    for kind in KINDS:
        mesh = make_mesh(KINDS[kind], 4, 2)
        with jax.set_mesh(mesh):
            gaussian = ivon_jax.Posterior(*place(mesh, tuple(q), P(None, "model")))
            args = gaussian, place(mesh, x, P("data")), keys
            runs = {"eager": of_functions(*args), "jit": jax.jit(of_functions)(*args)}
        for name, run in runs.items():
            for use, value in alone.items():
                found[f"{kind}, {name}, {use}"] = difference(run[use], value)
    return found


@double_precision
def mapped_differences():
    """Of a shard_map over the first axis, with its check of what varies."""
    q, x = widen((HEAD, X))
    slices = [of_examples(q, x[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    alone = jax.tree.map(lambda *parts: np.concatenate(parts), *slices)
    mesh = make_mesh(KINDS["Auto"], 4, 2)
    mapped = jax.shard_map(
        of_examples,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
    )
    run = jax.jit(mapped)(q, x, Y)
    return {name: difference(run[name], alone[name]) for name in alone}


@double_precision
def eager_differences():
    """Of sharded examples, without jit; 8 is a multiple of the devices, 6 is not."""
    q, x = widen((HEAD, X))
    mesh = make_mesh(KINDS["Explicit"], DEVICES)
    found = {}
    for chunk_size in (8, 6):
        alone = of_examples(q, x, Y, chunk_size)
        placed = (place(mesh, tree, P("data")) for tree in (x, Y))
        run = of_examples(ivon_jax.Posterior(*place(mesh, q, P())), *placed, chunk_size)
        found |= {
            f"{name}, {chunk_size}": difference(run[name], alone[name])
            for name in alone
        }
    return found


def all_metrics(probs, labels, where):
    scores = probs.max(axis=-1)
    detected = metrics.out_of_distribution(scores, scores**2, in_where=where)
    return {
        "accuracy": metrics.accuracy(probs, labels, k=2, where=where),
        "nll": metrics.negative_log_likelihood(probs, labels, where=where),
        "brier": metrics.brier_score(probs, labels, where=where),
        "calibration": metrics.expected_calibration_error(probs, labels),
        "auroc": detected["auroc"],
        "fpr": detected["fpr_at_95_tpr"],
        "aupr_out": detected["aupr_out"],
    }


@double_precision
def metric_differences():
    probs = np.asarray(jax.nn.softmax(widen(normal(16, 4, 4))))
    labels, where = np.arange(64).reshape(16, 4) % 4, np.arange(64).reshape(16, 4) > 9
    alone = all_metrics(jnp.asarray(probs), labels, where)
    found = {}
    for kind in KINDS:
        mesh = make_mesh(KINDS[kind], 4, 2)
        for spec in (P("data"), P(None, "data", "model")):
            labels_spec = P(*spec[:2])
            arrays = place(mesh, probs, spec), place(mesh, labels, labels_spec)
            result = all_metrics(*arrays, where)
            for metric, value in alone.items():
                found[f"{kind}, {spec}, {metric}"] = difference(result[metric], value)
    return found


def sent():
    """What devices send each other where each has examples of its own."""
    mesh = make_mesh(KINDS["Auto"], DEVICES)
    return collectives(compiled(results, *placed(mesh, P())))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    facts = [differences, sent, mapped_differences, metric_differences]
    facts.append(function_differences)
    # On an explicit mesh older versions cannot map over sharded examples.
    if jax.__version_info__ >= (0, 10):
        facts += [explicit_differences, eager_differences]
    print(json.dumps({fact.__name__: fact() for fact in facts}))
