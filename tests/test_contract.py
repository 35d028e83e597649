"""The contract of an optax optimizer: wrappers, JAX's transformations, checkpoints."""

import functools
import json
import os
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compilation import OPTIMIZED_PROCESS
from flax import serialization
from statistical import assert_mean, assert_moved

import ivon_jax

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3), "scale": jnp.ones(())}
GRADS = jax.tree.map(jnp.cos, PARAMS)
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
# A float: optax keeps an injected integer weakly typed, which no checkpoint does.
SETTINGS = {"learning_rate": 0.1, "ess": 50.0, "b2": 0.9}


def ivon(**kwargs):
    return ivon_jax.ivon(**SETTINGS | kwargs)


def injected(static_args=(), **kwargs):
    make = optax.inject_hyperparams(ivon_jax.ivon, static_args, jnp.float32)
    return make(**SETTINGS | kwargs)


def masked(tx):
    return optax.masked(tx, {"w": True, "b": True, "scale": False})


def partition(**groups):
    """One group for each parameter; by default two of IVON, and Adam."""
    narrow = ivon(ess=5000, weight_decay=0.1)
    groups = {"w": TX, "b": narrow, "scale": optax.adam(0.1)} | groups
    return optax.partition(groups, {name: name for name in groups})


def step(tx, params, opt_state, key, **extra_args):
    """One step at a sample, with the gradient cos(theta)."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.tree.map(jnp.cos, theta)
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def train(tx, params, keys):
    """A whole run in one scan: the end, and the samples on the way."""

    def body(carry, key):
        return step(tx, *carry, key), ivon_jax.sample(key, *carry)

    return jax.lax.scan(body, (params, tx.init(params)), keys)


TX = ivon()
compiled_train = jax.jit(train, static_argnums=0)
compiled_step = jax.jit(step, static_argnums=0)
WRAPPERS = {
    "bare": ivon,
    "schedule": lambda: ivon(learning_rate=optax.cosine_decay_schedule(0.1, 9)),
    "clip_radius": lambda: ivon(clip_radius=0.5),
    "evon": lambda: ivon_jax.evon(**SETTINGS),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.chain(TX, optax.clip(1.0))),
    "inject_hyperparams": injected,
    "multi_steps": lambda: optax.MultiSteps(TX, 2),
    "if_finite": lambda: optax.apply_if_finite(TX, 2),
    "masked": lambda: masked(TX),
    "partition": partition,
}
in_every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def types_around_a_branch(tx, dtype):
    """Types of parameters and state before and after ``cond(_, step, identity)``.

    The loss, ``value``, is an argument for others that every wrapper takes.
    """
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    before = params, jax.eval_shape(tx.init, params)
    take_step = functools.partial(step, tx, key=KEY, value=1.0)
    after = jax.eval_shape(
        lambda *carry: jax.lax.cond(True, take_step, lambda *c: c, *carry), *before
    )
    return (jax.tree.map(jax.typeof, tree) for tree in (before, after))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@in_every_wrapper
def test_an_update_is_a_branch_of_cond(wrap, dtype):
    """Both branches have the types of `init`, down to weak ones."""
    before, after = types_around_a_branch(wrap(), dtype)
    assert before == after


@pytest.mark.usefixtures("standard_promotion", "x64")
@in_every_wrapper
def test_a_double_precision_update_is_a_branch_of_cond(wrap):
    before, after = types_around_a_branch(wrap(), jnp.float64)
    assert before == after


@pytest.mark.usefixtures("standard_promotion")
def test_arguments_of_a_neighbour_reach_it():
    """`reduce_on_plateau` needs the loss, IVON its sample: both get what is theirs."""
    tx = optax.chain(TX, optax.contrib.reduce_on_plateau())
    params, _ = step(tx, PARAMS, tx.init(PARAMS), KEY, value=1.0)
    expected, _ = step(TX, PARAMS, TX.init(PARAMS), KEY)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [([], [-0.1]), ([2.0], []), ([2.0], [-0.1])],
    ids=["first", "last", "middle"],
)
def test_ivon_stands_anywhere_in_a_chain(before, after):
    """What precedes it scales the gradient, also in h_hat; what follows, the step."""
    rule = ivon_jax.scale_by_ivon(ess=50, b2=0.9)
    inner = optax.chain(*map(optax.scale, before), optax.chain(rule))
    tx = optax.chain(inner, *map(optax.scale, after))
    theta = ivon_jax.sample(KEY, PARAMS, tx.init(PARAMS))
    updates, opt_state = tx.update(GRADS, tx.init(PARAMS), PARAMS, sample=theta)
    grads = jax.tree.map(lambda g: np.prod(before, dtype=np.float32) * g, GRADS)
    direction, state = rule.update(grads, rule.init(PARAMS), PARAMS, sample=theta)
    expected = jax.tree.map(lambda d: np.prod(after, dtype=np.float32) * d, direction)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal(ivon_jax.find_states(opt_state), [state])


@in_every_wrapper
def test_optax_tells_hessian_and_momentum_from_scalars(wrap):
    """`optax.tree.map_params` maps what is like params: to its sharding, say."""
    tx = wrap()
    mapped = optax.tree.map_params(
        tx, lambda _: "param", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    states = ivon_jax.find_states(mapped)
    assert len(states) > 0
    for state in states:
        assert (state.count, state.ess, state.weight_decay) == ("other",) * 3
        learned = [getattr(state, name, None) for name in ("hess", "momentum")]
        assert set(jax.tree.leaves(learned)) == {"param"}


def test_a_scanned_run_is_the_loop():
    expected = PARAMS, TX.init(PARAMS)
    for key in KEYS:
        expected = compiled_step(TX, *expected, key)
    carry, _ = compiled_train(TX, PARAMS, KEYS)
    chex.assert_trees_all_close(carry, expected, rtol=1e-5)


BATCHES = {
    "key": (
        lambda keys: train(TX, PARAMS, keys),
        jnp.stack([KEYS, jax.random.split(KEYS[1], 3)]),
    ),
    "learning_rate": (
        lambda rate: train(ivon(learning_rate=rate), PARAMS, KEYS),
        jnp.array([0.1, 0.4]),
    ),
    "ess": (lambda ess: train(ivon(ess=ess), PARAMS, KEYS), jnp.array([50.0, 5000.0])),
}


@pytest.mark.parametrize(("run", "values"), BATCHES.values(), ids=BATCHES)
def test_vmapped_runs_are_the_runs(run, values):
    """The first of them has the settings of `TX`."""
    together = jax.jit(jax.vmap(run))(values)
    first, second = (jax.tree.map(lambda x, i=i: x[i], together) for i in range(2))
    expected = compiled_train(TX, PARAMS, KEYS)
    chex.assert_trees_all_close(first, expected, rtol=1e-5)
    assert_moved(second[0][0]["w"], first[0][0]["w"])


def test_donated_buffers_are_reused():
    """For the same result, and none of them is of no use, which would warn."""
    donated = jax.tree.map(jnp.copy, PARAMS), TX.init(PARAMS)
    expected = compiled_step(TX, *donated, KEY)
    donating_step = jax.jit(step, static_argnums=0, donate_argnums=(1, 2))
    chex.assert_trees_all_equal(donating_step(TX, *donated, KEY), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


@pytest.mark.parametrize(
    ("static_args", "b2"),
    [((), float(np.float32(0.99999))), (("b1", "b2"), 0.99999)],
    ids=["injected", "static"],
)
def test_a_static_b2_is_exact_and_an_injected_one_has_float32(static_args, b2):
    """The two differ by 1.4e-3 in the first s = (1 - b2)(h_hat - h)."""
    tx = injected(static_args, b2=0.99999, weight_decay=0.0)
    hess = jax.tree.map(lambda p: jnp.full_like(p, 1001.0), PARAMS)
    _, opt_state = tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=hess)
    s = (1.0 - b2) * (1001.0 - 1.0)
    for h in jax.tree.leaves(ivon_jax.find_states(opt_state)[0].hess):
        np.testing.assert_allclose(h - 1.0, s + s**2 / 2, rtol=2e-5)


def test_bfloat16_parameters_train_with_float32_hyperparameters():
    """``hyperparam_dtype=jnp.float32``: then h is as without, and so is the step."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    result, opt_state = compiled_step(tx := injected(), params, tx.init(params), KEY)
    expected, state = compiled_step(TX, params, TX.init(params), KEY)
    chex.assert_trees_all_close(opt_state.inner_state, state, rtol=1e-5)
    chex.assert_trees_all_close(result, expected, rtol=2.0**-7)


HYPERPARAMETERS = {
    "learning_rate": [0.1, 0.3, 0.2],
    "ess": [50.0, 200.0, 800.0],
    "weight_decay": [1e-4, 0.3, 0.1],
    "clip_radius": [0.5, 0.1, 0.3],
}


def scheduled(name, values):
    tx = injected(**{name: lambda count: jnp.array(values)[count]})
    return compiled_train(tx, PARAMS, KEYS)[0]


def overwritten(name, values):
    tx = injected(**{name: values[0]})
    carry = PARAMS, tx.init(PARAMS)
    for value, key in zip(values, KEYS, strict=True):
        carry[1].hyperparams[name] = jnp.asarray(value)
        carry = compiled_step(tx, *carry, key)
    return carry


@pytest.mark.parametrize("run", [scheduled, overwritten])
@pytest.mark.parametrize(("name", "values"), HYPERPARAMETERS.items())
def test_an_injected_hyperparameter_may_be_scheduled_or_overwritten(run, name, values):
    """As a new `ivon` for each step; `rescale_lr` sees the new weight decay, too."""
    expected = PARAMS, ivon(**{name: values[0]}).init(PARAMS)
    for value, key in zip(values, KEYS, strict=True):
        expected = step(ivon(**{name: value}), *expected, key)
    params, opt_state = run(name, values)
    chex.assert_trees_all_close((params, opt_state.inner_state), expected, rtol=1e-5)


def test_the_posterior_follows_the_schedules():
    """Its precision is ess (h + weight_decay) with both as the last update had them."""
    tx = injected(
        ess=lambda count: 50.0 * 2.0 ** count.astype(float),
        weight_decay=lambda count: 0.1 * (1.0 + count.astype(float)),
    )
    (params, opt_state), _ = compiled_train(tx, PARAMS, KEYS)
    hess = ivon_jax.find_states(opt_state)[0].hess
    expected = jax.tree.map(lambda h: 50.0 * 2.0**2 * (h + 0.1 * (1.0 + 2.0)), hess)
    precision = ivon_jax.posterior(params, opt_state).precision
    chex.assert_trees_all_close(precision, expected, rtol=1e-6)


def test_an_estimate_passes_through_inject_hyperparams():
    tx = injected()
    state, estimate = tx.init(PARAMS), ivon_jax.Estimate(GRADS, PARAMS)
    in_two = tx.update(GRADS, state, PARAMS, hess=PARAMS)
    chex.assert_trees_all_equal(tx.update(estimate, state, PARAMS), in_two)


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_with_one_held_sample_are_the_step_of_the_big_batch():
    """Mean gradient times the one noise is the mean of products: h and g are right."""
    tx = optax.MultiSteps(TX, 3)
    opt_state, update = tx.init(PARAMS), jax.jit(tx.update)
    theta = ivon_jax.sample(KEY, PARAMS, opt_state)
    parts = [jax.tree.map(lambda t, i=i: jnp.cos(i * t), theta) for i in range(3)]
    for grads in parts:
        updates, opt_state = update(grads, opt_state, PARAMS, sample=theta)
    mean = jax.tree.map(lambda *grads: sum(grads) / 3, *parts)
    expected = TX.update(mean, TX.init(PARAMS), PARAMS, sample=theta)
    result = updates, opt_state.inner_opt_state
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-7)


CURVATURE, PARTS = jnp.array([0.5, 1.0, 2.0]), 4
QUADRATIC_TX = ivon_jax.ivon(0.1, ess=50, hess_init=4.0, b2=0.9, weight_decay=0.0)


def quadratic(theta, batch):
    return jnp.mean(batch) * jnp.sum(CURVATURE * theta**2) / 2


def by_multi_steps(key, mean):
    """A loop over `sample` and `update`, as for any optimizer: a sample each part."""
    tx = optax.MultiSteps(QUADRATIC_TX, PARTS)

    def part(opt_state, part_key):
        theta = ivon_jax.sample(part_key, mean, opt_state)
        grads = jax.grad(quadratic)(theta, jnp.ones(1))
        return tx.update(grads, opt_state, mean, sample=theta)[1], None

    return jax.lax.scan(part, tx.init(mean), jax.random.split(key, PARTS))[0]


def by_microbatches(key, mean):
    opt_state = QUADRATIC_TX.init(mean)
    grad_fn = ivon_jax.value_and_grad(quadratic, microbatches=PARTS)
    _, estimate = grad_fn(key, mean, opt_state, jnp.ones(PARTS))
    return QUADRATIC_TX.update(estimate, opt_state, mean)[1]


@pytest.mark.statistical
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("accumulate", "share"), [(by_microbatches, 1.0), (by_multi_steps, 1.0 / PARTS)]
)
def test_fresh_samples_need_microbatches_multi_steps_lose_most(accumulate, share, key):
    """E[mean_i(a e_i) e_k] is a / k for the last noise e_k, E[mean_i(a e_i e_i)] is a.

    Line 5 gives h_hat: h' = h (1 + (1 + r)^2) / 2 with r = (1 - b2)(h_hat / h - 1).
    """
    states = jax.jit(jax.vmap(lambda k: accumulate(k, jnp.zeros(3))))(
        jax.random.split(key, 10_000)
    )
    [state] = ivon_jax.find_states(states)
    r = jnp.sqrt(2 * state.hess / 4.0 - 1) - 1
    assert_mean(4.0 * (1 + r / (1 - 0.9)), share * CURVATURE)


@functools.cache
def partitioned_run():
    """End and samples of a run with four groups, one of them frozen."""
    tx = partition(frozen=optax.set_to_zero())
    return compiled_train(tx, PARAMS | {"frozen": jnp.ones(2)}, KEYS)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("w", TX),
        ("b", ivon(ess=5000, weight_decay=0.1)),
        ("scale", optax.with_extra_args_support(optax.adam(0.1))),
    ],
)
def test_a_group_trains_as_alone_with_its_samples(name, alone):
    """Over several steps, with the ess and weight decay of its own."""
    (params, opt_state), samples = partitioned_run()
    expected, state = PARAMS[name], alone.init(PARAMS[name])
    for theta in samples[name]:
        updates, state = alone.update(jnp.cos(theta), state, expected, sample=theta)
        expected = optax.apply_updates(expected, updates)
    group = jax.tree.leaves(opt_state.inner_states[name])
    result, expected = [params[name], *group], [expected, *jax.tree.leaves(state)]
    chex.assert_trees_all_close(result, expected, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_frozen_parameters_are_neither_perturbed_nor_decayed():
    (params, _), samples = partitioned_run()
    np.testing.assert_array_equal(samples["frozen"], 1.0)
    np.testing.assert_array_equal(params["frozen"], 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_training_goes_on():
    """Mean, h and g stay; the next step is that of `ivon` from there."""
    tx = optax.apply_if_finite(TX, max_consecutive_errors=3)
    params, before = compiled_step(tx, PARAMS, tx.init(PARAMS), KEY)
    bad = GRADS | {"b": jnp.array([1.0, jnp.nan, 1.0])}
    updates, after = tx.update(bad, before, params, sample=PARAMS)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    assert after.total_notfinite == 1
    result, opt_state = compiled_step(tx, params, after, KEYS[1])
    expected = compiled_step(TX, params, before.inner_state, KEYS[1])
    chex.assert_trees_all_close((result, opt_state.inner_state), expected, rtol=1e-6)


def saved(tree, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.eval_shape(lambda: target))


STORES = {
    "pickle": lambda tree, *_: pickle.loads(pickle.dumps(tree)),
    "msgpack": lambda tree, target, _: serialization.from_bytes(
        target, serialization.to_bytes(tree)
    ),
    "orbax": saved,
}
in_every_store = pytest.mark.parametrize("restored", STORES.values(), ids=STORES)


@in_every_store
@pytest.mark.parametrize("tx", [TX, masked(injected())], ids=["bare", "nested"])
def test_a_checkpoint_is_exact_and_a_run_goes_on_from_it(tx, restored, tmp_path):
    """Without a second trace: states of `init`, `update` and a file are one to jit.

    So it is with the posterior, also where None stands for a point mass.
    """
    traces = []

    @jax.jit
    def train_step(*carry):
        traces.append(1)
        return step(tx, *carry, KEY)

    start = PARAMS, tx.init(PARAMS)
    carry = train_step(*start)
    stored = carry, ivon_jax.posterior(*carry)
    copy = restored(stored, (start, ivon_jax.posterior(*start)), tmp_path)
    assert jax.tree.structure(copy) == jax.tree.structure(stored)
    chex.assert_trees_all_equal(copy, stored, strict=True)
    chex.assert_trees_all_equal(train_step(*copy[0]), train_step(*carry), strict=True)
    assert len(traces) == 1
    chex.assert_trees_all_equal(copy[1].sample(KEY), stored[1].sample(KEY))


def test_estimates_and_densities_pass_over_empty_leaves():
    """None as in Equinox, an empty tuple, no entries: as if they were not there."""
    full = {"d": jnp.ones(2), "e": jnp.ones(())}
    params = full | {"a": None, "b": (), "c": jnp.ones((0, 3))}
    grad_fn = ivon_jax.value_and_grad(lambda theta: jnp.sum(theta["d"]), mc_samples=2)
    opt_state = TX.init(params)
    _, estimate = grad_fn(KEY, params, opt_state)
    updates, opt_state = TX.update(estimate, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    q = ivon_jax.posterior(params, opt_state)
    p = ivon_jax.Posterior(full, {name: q.precision[name] for name in full})
    np.testing.assert_allclose(q.log_prob(params), p.log_prob(full), rtol=1e-6)
    np.testing.assert_allclose(q.entropy(), p.entropy(), rtol=1e-6)


SHARDED_RUN = """
import json, re
import jax, jax.numpy as jnp, numpy as np
import ivon_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
KEY, TX = jax.random.key(0), ivon_jax.ivon(0.1, ess=50)
SPECS = {"w": P("data", "model"), "b": P("model"), "scale": P()}
PARAMS = {"w": np.ones((256, 512), "f4"), "b": np.ones(8, "f2"), "scale": np.float32(1)}
COLLECTIVE = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"

@jax.jit
def step(params, opt_state):
    theta = ivon_jax.sample(KEY, params, opt_state)
    grads = jax.tree.map(jnp.cos, theta)
    updates, opt_state = TX.update(grads, opt_state, params, sample=theta)
    return theta, (jax.tree.map(jnp.add, params, updates), opt_state)

def same_types(*trees):
    x, y = (jax.tree.leaves(jax.tree.map(jax.typeof, tree)) for tree in trees)
    return x == y

def same_shardings(*trees):
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)

def facts(params, alone):
    before = params, TX.init(params)
    [state] = ivon_jax.find_states(before[1])
    theta, after = step(*before)
    sample = jax.jit(ivon_jax.sample).lower(KEY, *before).compile()
    return {
        "state like params": same_shardings([state.hess, state.momentum], 2 * [params]),
        "jitted init": same_types(jax.jit(TX.init)(params), before[1]),
        "shards of jitted init": same_shardings(
            ivon_jax.find_states(jax.jit(TX.init)(params))[0].hess, params
        ),
        "types stay": same_types(before, after),
        "shardings stay": same_shardings(before, after),
        "sample like params": same_shardings(theta, params),
        "difference": float(np.max([abs(theta[k] - alone[k]).max() for k in SPECS])),
        "collectives": re.findall(COLLECTIVE, step.lower(*before).compile().as_text()),
        "memory of sample": sample.memory_analysis().temp_size_in_bytes,
    }

alone = jax.tree.map(np.asarray, step(PARAMS, TX.init(PARAMS))[0])
found = {}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    with jax.set_mesh(mesh):
        found[kind.name] = facts(jax.device_put(PARAMS, shardings), alone)
print(json.dumps(found))
"""


@functools.cache
def facts_of_eight_devices():
    """From a process of its own, because this one has one device."""
    command = [sys.executable, "-W", "error", "-c", SHARDED_RUN]
    env = os.environ | OPTIMIZED_PROCESS | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["Auto", "Explicit"])
def facts(request):
    return facts_of_eight_devices()[request.param]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fact",
    [
        "state like params",
        "jitted init",
        "shards of jitted init",
        "types stay",
        "shardings stay",
    ],
)
def test_a_sharded_state_is_typed_and_placed_as_its_parameters(fact, facts):
    """From `init` on, under jit or not, and through a step."""
    assert facts[fact]


@pytest.mark.slow
def test_theta_is_sharded_as_params_and_the_same_on_any_mesh(facts):
    """To rounding; it is about 1 with sigma 0.14."""
    assert facts["sample like params"]
    assert facts["difference"] < 1e-6


@pytest.mark.slow
def test_sample_and_update_on_shards_need_no_communication(facts):
    assert facts["collectives"] == []


@pytest.mark.slow
@pytest.mark.parametrize("facts", ["Auto", "Explicit"], indirect=True)
def test_each_device_draws_the_noise_of_its_shard_alone(facts):
    """Its temporaries are smaller than the 256 x 512 floats, eight times its shard."""
    assert facts["memory of sample"] < 4 * 256 * 512
