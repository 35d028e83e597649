"""Measure IVON on eight devices: a script for `test_parallel.py`, printing JSON.

It needs a process of its own, because that of pytest has one device.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import AS_USERS_DO, MACHINE_CODE_TOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ivon_jax

DEVICES = 8
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
SHAPES = ((8, 1), (4, 2), (2, 4))
TX = ivon_jax.ivon(0.1, ess=200, hess_init=0.5, b2=0.999)


def root_key():
    """Not a constant: an import must not start JAX, with one device."""
    return jax.random.key(0)


def normal(*shape):
    """Data, the same for the same shape."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


PARAMS = {
    "w1": normal(16, 64) / 4,
    "b1": normal(64) / 8,
    "w2": normal(64, 16) / 8,
    "b2": normal(16) / 8,
}
SPECS = {"w1": P("data", "model"), "b1": P("model"), "w2": P("model", "data")}
SPECS["b2"] = P()
BATCH = normal(64, 16), normal(16, 64).T


def loss_fn(theta, x, y):
    """The mean squared error of a small MLP; sums, where a matrix may be sharded."""
    hidden = jnp.tanh(x @ theta["w1"] + theta["b1"][None])
    return jnp.mean((hidden @ theta["w2"] + theta["b2"][None] - y) ** 2)


def loss_and_aux(theta, x, y):
    """A mean, an array to average, a count that differs and a count that does not."""
    return loss_fn(theta, x, y), {
        "mean": jnp.mean(x, axis=0),
        "positive": jnp.sum(x > 0, dtype=jnp.int32),
        "examples": jnp.int32(len(x)),
    }


def make_mesh(kind, *shape):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def place(mesh, tree, spec):
    """`tree` on `mesh`; one spec for all arrays or a tree of them."""
    if isinstance(spec, P):
        return jax.device_put(tree, NamedSharding(mesh, spec))
    return jax.device_put(tree, {k: NamedSharding(mesh, s) for k, s in spec.items()})


def cut(array):
    """One slice of the batch for each device, stacked."""
    return array.reshape(DEVICES, -1, *array.shape[1:])


def stack(tree):
    return jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tree)


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def difference(tree, reference):
    """The largest difference of two trees, relative to the largest entry of a leaf."""
    pairs = zip(*map(jax.tree.leaves, (tree, reference)), strict=True)
    pairs = [(np.asarray(x, "f8"), np.asarray(y, "f8")) for x, y in pairs]
    return float(np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in pairs]))


def double_precision(fn):
    """Run `fn` where rounding is 1e-16, so that nothing else passes for it."""

    @functools.wraps(fn)
    def run():
        jax.config.update("jax_enable_x64", True)
        try:
            return fn()
        finally:
            jax.config.update("jax_enable_x64", False)

    return run


def widen(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(AS_USERS_DO)


def collectives(executable):
    """Name and floats per device of each collective in the compiled text."""
    names = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    instruction = re.compile(rf" = (.*?) ({names})(?:-start)?\(")
    found = []
    for line in executable.as_text().splitlines():
        if match := instruction.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append([match[2], int(sum(sizes))])
    return found


OPTIONS = {
    "microbatches": 2,
    "mc_samples": 2,
    "grad_transform": optax.clip_by_global_norm(0.5),
}


@double_precision
def one_device():
    """Differences from the mean over eight keys and slices; `b1` is not IVON's."""
    params, batch = widen((PARAMS, BATCH))
    tx = optax.masked(TX, {name: name != "b1" for name in PARAMS})
    args = params, tx.init(params)
    alone = jax.jit(ivon_jax.value_and_grad(loss_fn, **OPTIONS))
    parts = [
        alone(jax.random.fold_in(root_key(), j), *args, *(cut(x)[j] for x in batch))
        for j in range(DEVICES)
    ]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *parts)
    grad_fn = ivon_jax.value_and_grad(loss_fn, axis_name="data", **OPTIONS)
    specs = (P(), P(), P(), P("data"), P("data"))

    def sharded(kind, check_vma):
        mesh = make_mesh(kind, DEVICES)
        with jax.set_mesh(mesh):
            placed = *place(mesh, args, P()), *place(mesh, batch, P("data"))
            mapped = jax.shard_map(
                grad_fn, in_specs=specs, out_specs=P(), check_vma=check_vma
            )
            return jax.jit(mapped)(root_key(), *placed)

    axes = (None, None, None, 0, 0)
    replicas = jax.pmap(grad_fn, "data", in_axes=axes)(
        root_key(), *args, *map(cut, batch)
    )
    return {
        "Auto": difference(sharded(AxisType.Auto, True), expected),
        "Explicit": difference(sharded(AxisType.Explicit, True), expected),
        "unchecked": difference(sharded(AxisType.Auto, False), expected),
        "pmap": np.max(
            [
                difference(jax.tree.map(lambda x, j=j: x[j], replicas), expected)
                for j in range(DEVICES)
            ]
        ),
        "between parts": difference(parts[0], parts[1]),
    }


ROOT = normal(5, 5) / 2
HESSIAN = ROOT @ ROOT.T + np.eye(5, dtype=np.float32)
REPEATS = 4000


def quadratic():
    """Draws of h hat over keys: of eight devices, of one, and the product too late."""
    tx = ivon_jax.ivon(0.1, ess=20, hess_init=2.0)
    params = jnp.linspace(-0.2, 0.3, 5)
    opt_state = tx.init(params)

    def loss(theta):
        return 0.5 * theta @ HESSIAN @ theta

    def draws(**options):
        grad_fn = ivon_jax.value_and_grad(loss, **options)
        return jax.vmap(lambda key: grad_fn(key, params, opt_state)[1].hess)

    def product_too_late(key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(DEVICES))
        theta = jax.vmap(ivon_jax.sample, (0, None, None))(keys, params, opt_state)
        grad = jnp.mean(jax.vmap(jax.grad(loss))(theta), axis=0)
        q = ivon_jax.posterior(params, opt_state)
        return grad * (jnp.mean(theta, axis=0) - params) * q.precision

    mesh = make_mesh(AxisType.Auto, DEVICES)
    on_all = jax.shard_map(
        draws(axis_name="data"), mesh=mesh, in_specs=P(), out_specs=P()
    )
    eight, one = (
        jax.random.split(key, REPEATS) for key in jax.random.split(root_key())
    )
    return {
        "hessian": np.diag(HESSIAN).tolist(),
        "eight": jax.jit(on_all)(eight).tolist(),
        "one": jax.jit(draws())(one).tolist(),
        "product too late": jax.jit(jax.vmap(product_too_late))(eight).tolist(),
    }


def train_on_replicas(params, opt_state, x, y):
    """A hundred steps of one device, on its own copies and its own examples."""
    grad_fn = ivon_jax.value_and_grad(loss_fn, axis_name="data")

    def step(carry, key):
        params, opt_state = carry
        _, estimate = grad_fn(key, params, opt_state, x, y)
        updates, opt_state = TX.update(estimate, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), jax.random.split(root_key(), 100))[0]


def replicas():
    """Arrays, parameters and state, with a replica that differs in any bit."""
    args = stack((PARAMS, TX.init(PARAMS)))
    batch = [cut(x) for x in BATCH]

    def of_shard(*args):
        after = train_on_replicas(*first(args))
        return jax.tree.map(lambda x: x[None], after)

    mesh = make_mesh(AxisType.Auto, DEVICES)
    specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    runs = {
        "pmap": jax.pmap(train_on_replicas, "data"),
        "shard_map": jax.jit(jax.shard_map(of_shard, mesh=mesh, **specs)),
    }
    found = {}
    for name, run in runs.items():
        params, opt_state = jax.tree.map(np.asarray, run(*args, *batch))
        arrays = jax.tree_util.tree_leaves_with_path((params, opt_state))
        found[name] = {
            "differ": [
                jax.tree_util.keystr(path)
                for path, x in arrays
                if any(x[j].tobytes() != x[0].tobytes() for j in range(DEVICES))
            ],
            "moved": difference(first(params), PARAMS),
        }
    return found


WIDE = {"w": normal(256, 512) / 16, "v": normal(512) / 16}
WIDE_SPECS = {"w": P(None, "model"), "v": P("model")}
ROWS = normal(32, 256)


def wide_loss(theta, x):
    """A sum, not a product: on an explicit mesh it may be over a sharded axis."""
    hidden = jnp.tanh(x @ theta["w"])
    return jnp.mean(jnp.sum(hidden * theta["v"][None], axis=1) ** 2)


def sample_on_replica(key, params, opt_state):
    """Draw the theta of one replica, with an axis to stack it along."""
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    theta = ivon_jax.sample(key, params, opt_state)
    return jax.tree.map(lambda x: x[None], theta)


def sum_on_replica(_, params, opt_state):
    """As much in and out as `sample_on_replica`, and no sample."""
    [state] = ivon_jax.find_states(opt_state)
    return jax.tree.map(lambda x, h: (x + h)[None], params, state.hess)


@double_precision
def hybrid():
    """Manual over "data" alone, parameters sharded over "model"."""
    found = {"Auto, {}x{}".format(*shape): _hybrid("Auto", *shape) for shape in SHAPES}
    return found | {"Explicit, 4x2": _hybrid("Explicit", 4, 2)}


def _hybrid(kind, data, model):
    params, rows = widen((WIDE, ROWS))
    alone = jax.jit(ivon_jax.value_and_grad(wide_loss))
    args = params, TX.init(params)
    parts = [
        alone(jax.random.fold_in(root_key(), j), *args, x)
        for j, x in enumerate(np.split(rows, data))
    ]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *parts)
    mesh = make_mesh(KINDS[kind], data, model)
    manual = functools.partial(jax.shard_map, axis_names={"data"})
    grad_fn = ivon_jax.value_and_grad(wide_loss, axis_name="data")
    specs = (P(), P(), P(), P("data"))
    with jax.set_mesh(mesh):
        params = place(mesh, params, WIDE_SPECS)
        args = root_key(), params, TX.init(params)
        batch = place(mesh, rows, P("data"))
        mapped = manual(grad_fn, in_specs=specs, out_specs=P())
        estimate = compiled(mapped, *args, batch)
        sample, entry = (
            compiled(manual(fn, in_specs=P(), out_specs=P("data")), *args)
            for fn in (sample_on_replica, sum_on_replica)
        )
        value, result = estimate(*args, batch)
    return {
        "difference": difference((value, result), expected),
        "floats of a device": sum(
            x.addressable_shards[0].data.size for x in result.hess.values()
        ),
        "collectives": collectives(estimate),
        "collectives of sample": collectives(sample),
        "collectives of entry": collectives(entry),
        "memory of sample": sample.memory_analysis().temp_size_in_bytes,
        "memory of entry": entry.memory_analysis().temp_size_in_bytes,
        "shard": sum(x.size for x in WIDE.values()) // model,
        "rows": len(ROWS) // data,
    }


def train_on_one_sample(params, x, y):
    """Twenty steps, one theta for all devices in each."""

    def step(carry, key):
        params, opt_state = carry
        theta = ivon_jax.sample(key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, x, y)
        updates, opt_state = TX.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(root_key(), 20)
    return jax.lax.scan(step, (params, TX.init(params)), keys)[0]


@double_precision
def shared_sample():
    """Differences of parameters and state between meshes and one device."""
    params, batch = widen((PARAMS, BATCH))
    train = jax.jit(train_on_one_sample)
    alone = train(params, *batch)
    found = {"moved": difference(alone[0], params)}
    for shape in SHAPES:
        mesh = make_mesh(AxisType.Auto, *shape)
        with jax.set_mesh(mesh):
            placed = place(mesh, params, SPECS), *place(mesh, batch, P("data"))
            after = train(*placed)
        found["{}x{}".format(*shape)] = difference(after, alone)
    return found


# What the compiler makes of loops of vectors rounds the last bit by the shard's shape.
LOOPS = {"scalar": {"xla_backend_optimization_level": 0}, "vector": MACHINE_CODE_TOO}


def theta_on_meshes():
    """The largest error of theta from one device's, in its last place or sigma's."""
    return {name: _theta_on_meshes(options) for name, options in LOOPS.items()}


def _theta_on_meshes(options):
    curvature = jax.tree.map(lambda x: 0.5 + np.abs(x), PARAMS)

    @functools.partial(jax.jit, compiler_options=options)
    def theta(params, hess):
        opt_state = optax.tree.set(TX.init(params), hess=hess)
        return ivon_jax.sample(root_key(), params, opt_state)

    def last_places(name, x):
        size = np.maximum(np.abs(alone[name]), np.abs(alone[name] - PARAMS[name]))
        return float(np.max(np.abs(x - alone[name]) / np.spacing(size)))

    alone = jax.device_get(theta(PARAMS, curvature))
    found = {}
    for kind in KINDS:
        for shape in SHAPES:
            mesh = make_mesh(KINDS[kind], *shape)
            with jax.set_mesh(mesh):
                drawn = theta(*(place(mesh, x, SPECS) for x in (PARAMS, curvature)))
            name = "{}, {}x{}".format(kind, *shape)
            found[name] = np.max(
                [last_places(k, x) for k, x in jax.device_get(drawn).items()]
            )
    return found


def communication():
    """What a step of data-parallel training sends, with own and with shared noise."""
    grad_fn = ivon_jax.value_and_grad(loss_and_aux, has_aux=True, axis_name="data")
    mesh = make_mesh(AxisType.Auto, DEVICES)
    specs = (P(), P(), P(), P("data"), P("data"))

    def own_noise(key, params, opt_state, x, y):
        def estimate(*args):
            (loss, aux), estimate = grad_fn(*args)
            return (loss, aux["mean"]), estimate

        mapped = jax.shard_map(estimate, mesh=mesh, in_specs=specs, out_specs=P())
        value, estimate = mapped(key, params, opt_state, x, y)
        updates, opt_state = TX.update(estimate, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def shared_noise(key, params, opt_state, x, y):
        theta = ivon_jax.sample(key, params, opt_state)
        loss, grads = jax.value_and_grad(loss_fn)(theta, x, y)
        updates, opt_state = TX.update(grads, opt_state, params, sample=theta)
        return optax.apply_updates(params, updates), opt_state, loss

    args = root_key(), *place(mesh, (PARAMS, TX.init(PARAMS)), P())
    args += place(mesh, BATCH, P("data"))
    return {
        "parameters": sum(x.size for x in PARAMS.values()),
        "aux": BATCH[0].shape[1],
        "own noise": collectives(compiled(own_noise, *args)),
        "shared noise": collectives(compiled(shared_noise, *args)),
    }


def aux():
    """What comes back of `loss_and_aux` on each device."""
    grad_fn = ivon_jax.value_and_grad(loss_and_aux, has_aux=True, axis_name="data")
    args = PARAMS, TX.init(PARAMS)
    specs = (P(), P(), P(), P("data"), P("data"))
    each = {"mean": P(), "positive": P("data"), "examples": P()}

    def of_shard(*args):
        (_, aux), _ = grad_fn(*args)
        return aux | {"positive": aux["positive"][None]}

    mesh = make_mesh(AxisType.Auto, DEVICES)
    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=each)
    sharded = jax.jit(mapped)(root_key(), *args, *BATCH)
    axes = (None, None, None, 0, 0)
    pmapped = jax.pmap(grad_fn, "data", in_axes=axes)(
        root_key(), *args, *map(cut, BATCH)
    )
    slices = cut(BATCH[0])
    return {
        "mean": np.mean(BATCH[0], axis=0).tolist(),
        "positive": np.sum(slices > 0, axis=(1, 2)).tolist(),
        "examples": slices.shape[1],
        "shard_map": jax.tree.map(lambda x: x.tolist(), sharded),
        "pmap": jax.tree.map(lambda x: x.tolist(), pmapped[0][1]),
    }


FACTS = (
    one_device,
    quadratic,
    replicas,
    hybrid,
    shared_sample,
    theta_on_meshes,
    communication,
    aux,
)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps({fact.__name__: fact() for fact in FACTS}))
