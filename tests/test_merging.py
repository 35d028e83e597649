"""Merging against exact fits, and the Fisher information against its closed form."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import temp_bytes
from statistical import assert_mean, assert_moved

import ivon_jax
from ivon_jax import merging

SHAPES = {"w": (2, 3), "b": (3,)}


def tree(seed, dtype=np.float32, positive=False):
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {k: (v**2 + 0.1 if positive else v).astype(dtype) for k, v in values.items()}


BASE = tree(0)
MODELS = [tree(1), tree(2), tree(3)]
HESSIANS = [tree(4, positive=True), tree(5, positive=True), tree(6, positive=True)]
BASE_HESSIAN = tree(7, positive=True)


def merged(base, models, hessians, base_hessian, scales):
    """The equation, in double precision."""
    base, base_hessian = np.float64(base), np.float64(base_hessian)
    total = base_hessian + sum(np.float64(h) for h in hessians)
    result = base.copy()
    for theta, h, scale in zip(models, hessians, scales, strict=True):
        result += scale * (base_hessian + h) / total * (np.float64(theta) - base)
    return result


@pytest.mark.parametrize("scale", [1.0, 0.3, [0.5, -1.0, 2.0], np.arange(3.0)])
def test_merge_is_the_equation_of_section_4_3_2(scale):
    result = merging.merge(BASE, MODELS, HESSIANS, BASE_HESSIAN, scale=scale)
    for name, value in result.items():
        trees = [[tree[name] for tree in trees] for trees in (MODELS, HESSIANS)]
        scales = np.broadcast_to(scale, 3)
        expected = merged(BASE[name], *trees, BASE_HESSIAN[name], scales)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3, [0.5, -1.0, 2.0], jnp.arange(3.0)])
def test_task_arithmetic_adds_the_differences(scale):
    result = merging.task_arithmetic(BASE, MODELS, scale)
    for name, value in result.items():
        base = np.float64(BASE[name])
        scales = np.broadcast_to(scale, 3)
        pairs = zip(scales, MODELS, strict=True)
        expected = base + sum(s * (m[name] - base) for s, m in pairs)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def ridge(designs, targets, center, precision):
    """The minimiser of squared errors / 2 plus precision (theta - center)^2 / 2."""
    hess = sum(x.T @ x for x in designs) + np.diag(precision)
    pairs = zip(designs, targets, strict=True)
    linear = sum(x.T @ y for x, y in pairs) + precision * center
    return np.linalg.solve(hess, linear)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_merge_is_the_pooled_fit_of_orthogonal_linear_regressions(seed):
    """(H0 + Ht) (theta_t - theta_0) is a task's gradient at theta_0; they add up."""
    rng = np.random.default_rng(seed)
    precision, base = rng.gamma(2.0, size=5), rng.normal(size=5)
    designs, targets = [], []
    for rows in (7, 30, 12, 5):
        orthogonal, _ = np.linalg.qr(rng.normal(size=(rows, 5)))
        designs.append(orthogonal * rng.gamma(1.0, size=5))
        targets.append(rng.normal(size=rows))
    pairs = list(zip(designs, targets, strict=True))
    models = [ridge([x], [y], base, precision) for x, y in pairs]
    hessians = [np.sum(x**2, axis=0) for x in designs]
    result = merging.merge(base, models, hessians, precision)
    assert result.dtype == np.float64
    pooled = ridge(designs, targets, base, precision)
    np.testing.assert_allclose(result, pooled, rtol=1e-12, atol=1e-12)
    sums = merging.task_arithmetic(base, models)
    assert np.max(np.abs(sums - pooled)) > 1e-3


def test_models_without_curvature_are_added_up():
    """All weights are h_0 / h_0."""
    zeros = [jax.tree.map(np.zeros_like, BASE)] * 3
    scale = [1.0, 0.5, -1.0]
    expected = merging.task_arithmetic(BASE, MODELS, scale)
    for base_hessian in (BASE_HESSIAN, 0.3):
        result = merging.merge(BASE, MODELS, zeros, base_hessian, scale=scale)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_one_model_is_that_model():
    """Its weight is one, and base + (theta - base) is theta up to rounding."""
    result = merging.merge(BASE, MODELS[:1], HESSIANS[:1], BASE_HESSIAN)
    chex.assert_trees_all_close(result, MODELS[0], atol=1e-6)
    chex.assert_trees_all_close(
        merging.task_arithmetic(BASE, MODELS[:1]), MODELS[0], atol=1e-6
    )


def test_the_order_of_models_does_not_matter():
    result = merging.merge(BASE, MODELS, HESSIANS, 1.0, scale=[1, 2, 3])
    back = MODELS[::-1], HESSIANS[::-1]
    reverse = merging.merge(BASE, *back, 1.0, scale=[3, 2, 1])
    chex.assert_trees_all_close(result, reverse, rtol=1e-5, atol=1e-6)


def test_a_number_is_the_same_curvature_everywhere():
    halves, twos = (jax.tree.map(lambda x, v=v: v + 0 * x, BASE) for v in (0.5, 2.0))
    hessians = [HESSIANS[0], twos, HESSIANS[2]]
    expected = merging.merge(BASE, MODELS, hessians, halves)
    for half, two in ((0.5, 2), (np.float32(0.5), jnp.asarray(2.0))):
        hessians[1] = two
        result = merging.merge(BASE, MODELS, hessians, half)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_the_base_may_have_no_curvature():
    """With h_0 = 0 it is the mean weighted by curvature."""
    result = merging.merge(BASE, MODELS, HESSIANS, 0.0)
    for name, value in result.items():
        weights, thetas = ([x[name] for x in xs] for xs in (HESSIANS, MODELS))
        expected = np.average(thetas, axis=0, weights=weights)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unknown", [None, optax.MaskedNode()], ids=["None", "masked"])
@pytest.mark.parametrize("base_hessian", [0.0, 0.5, "unknown"])
def test_what_no_model_has_a_curvature_of_is_added_up(unknown, base_hessian):
    if base_hessian == "unknown":
        base_hessian = {"w": 0.5 + 0 * BASE["w"], "b": unknown}
    hessians = [{"w": h["w"], "b": unknown} for h in HESSIANS]
    result = merging.merge(BASE, MODELS, hessians, base_hessian)
    expected = merging.task_arithmetic(BASE, MODELS)
    np.testing.assert_allclose(result["b"], expected["b"], rtol=1e-6)
    assert_moved(result["w"], expected["w"])


def test_no_curvature_in_one_model_is_zero_curvature():
    masked = [{"w": HESSIANS[0]["w"], "b": None}, *HESSIANS[1:]]
    zero = [{"w": HESSIANS[0]["w"], "b": 0 * BASE["b"]}, *HESSIANS[1:]]
    result = merging.merge(BASE, MODELS, masked, 0.5)
    chex.assert_trees_all_equal(result, merging.merge(BASE, MODELS, zero, 0.5))


def test_states_of_ivon_with_frozen_layers_merge():
    """The base's value stays where every model was frozen; masks may hide subtrees."""
    base = {"head": BASE, "body": {"w": jnp.ones(4), "b": jnp.ones(2)}}
    tx = optax.masked(ivon_jax.ivon(0.1, ess=10), {"head": True, "body": False})
    models, states, precisions = [], [], []
    for head in MODELS:
        params = base | {"head": head}
        opt_state = tx.init(params)
        models.append(params)
        states.append(ivon_jax.find_states(opt_state)[0].hess)
        precisions.append(ivon_jax.posterior(params, opt_state).precision)
    for hessians in (states, precisions):
        result = merging.merge(base, models, hessians, base_hessian=0.0)
        chex.assert_trees_all_equal(result["body"], base["body"])
        mean = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *MODELS)
        chex.assert_trees_all_close(result["head"], mean, rtol=1e-5, atol=1e-6)


def test_merging_works_under_jit():
    """With everything traced, masks included."""
    hessians = [HESSIANS[0], {"w": HESSIANS[1]["w"], "b": optax.MaskedNode()}]
    scale = jnp.array([0.5, 2.0])
    for base_hessian in (BASE_HESSIAN, 1.0):
        arguments = BASE, MODELS[:2], hessians, base_hessian
        result = jax.jit(merging.merge)(*arguments, scale=scale)
        expected = merging.merge(*arguments, scale=scale)
        chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    result = jax.jit(merging.task_arithmetic)(BASE, MODELS, 0.5)
    expected = merging.task_arithmetic(BASE, MODELS, 0.5)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_models_are_merged_in_float32(dtype):
    """Rounded once, at the end."""
    low = [jax.tree.map(lambda x: jnp.asarray(x, dtype), m) for m in (BASE, *MODELS)]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    for merge in (
        lambda base, *models: merging.merge(base, models, HESSIANS, BASE_HESSIAN),
        lambda base, *models: merging.task_arithmetic(base, models),
    ):
        result, expected = merge(*low), merge(*wide)
        rounded = jax.tree.map(lambda x: x.astype(dtype), expected)
        chex.assert_trees_all_equal(result, rounded)


MISFITS = [
    ({"finetuned": BASE}, TypeError, "`finetuned` must be a list of trees, one for"),
    ({"finetuned": []}, ValueError, "`finetuned` must have at least one tree, got no"),
    (
        {"finetuned": [BASE, {"w": BASE["w"]}, BASE]},
        ValueError,
        "`finetuned[1]` must have the tree structure of `base`, got",
    ),
    (
        {"finetuned": [BASE, BASE, BASE | {"b": BASE["w"]}]},
        ValueError,
        "`finetuned[2]` must have the shapes of `base`, got (2, 3) at finetuned[2]['b'",
    ),
    (
        {"base": BASE | {"b": np.arange(3)}},
        TypeError,
        "`base` must be real floating-point arrays, got int32 at base['b']. Pass the",
    ),
    (
        {"finetuned": [BASE, BASE, BASE | {"b": 1j * BASE["b"]}]},
        TypeError,
        "`finetuned[2]` must be real floating-point arrays, got complex64 at fine",
    ),
    ({"scale": [1.0, 2.0]}, ValueError, "one for each of the 3 models in `finetuned`,"),
    ({"scale": np.ones(4)}, ValueError, "one for each of the 3 models in `finetuned`,"),
    ({"scale": "all"}, TypeError, "`scale` must be a number, got 'all'."),
    ({"scale": [1, np.inf, 1]}, ValueError, "`scale[1]` must be finite, got inf."),
    ({"scale": np.nan}, ValueError, "`scale` must be a number, got nan."),
]
BAD_HESSIANS = [
    ({"hessians": BASE}, TypeError, "`hessians` must be a list of trees, one for each"),
    ({"hessians": []}, ValueError, "`hessians` must have at least one tree, got none."),
    (
        {"hessians": HESSIANS[:2]},
        ValueError,
        "`hessians` must have one tree for each of the 3 models in `finetuned`, got 2.",
    ),
    (
        {"hessians": [{"w": None}, *HESSIANS[1:]]},
        ValueError,
        "`hessians[0]` must have the tree structure of `base`, got",
    ),
    (
        {"hessians": [HESSIANS[0] | {"b": 1.0}, *HESSIANS[1:]]},
        ValueError,
        "`hessians[0]` must have the shapes of `base`, got () at hessians[0]['b'], wh",
    ),
    (
        {"hessians": [HESSIANS[0] | {"b": np.float32([1, -2, 3])}, *HESSIANS[1:]]},
        ValueError,
        "`hessians[0]` must be non-negative and finite, got -2.0 at hessians[0]['b'].",
    ),
    (
        {"hessians": [*HESSIANS[:2], HESSIANS[2] | {"b": np.float32([1, np.inf, 3])}]},
        ValueError,
        "`hessians[2]` must be non-negative and finite, got inf at hessians[2]['b'].",
    ),
    (
        {"hessians": [*HESSIANS[:2], HESSIANS[2] | {"b": np.float32([1, np.nan, 3])}]},
        ValueError,
        "`hessians[2]` must be non-negative and finite, got nan at hessians[2]['b'].",
    ),
    (
        {"hessians": [*HESSIANS[:2], HESSIANS[2] | {"b": np.arange(3)}]},
        TypeError,
        "`hessians[2]` must be real floating-point arrays, got int32 at hessians[2]['b",
    ),
    ({"base_hessian": -1.0}, ValueError, "`base_hessian` must be non-negative, got -1"),
    (
        {"base_hessian": BASE_HESSIAN | {"w": -BASE_HESSIAN["w"]}},
        ValueError,
        "`base_hessian` must be non-negative and finite, got -",
    ),
    (
        {"base_hessian": 0, "hessians": [0.0, 0.0, {"w": BASE["w"] ** 2, "b": None}]},
        ValueError,
        "`base_hessian` plus the sum of `hessians` must be positive and finite, got "
        "0.0 at base['b'].",
    ),
    (
        {"hessians": [3e38, 3e38, 1.0]},
        ValueError,
        "`base_hessian` plus the sum of `hessians` must be positive and finite, got in",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), [*MISFITS, *BAD_HESSIANS])
def test_arguments_that_do_not_fit_are_named(bad, error, message):
    good = {"base": BASE, "finetuned": MODELS, "scale": 1.0}
    curvatures = {"hessians": HESSIANS, "base_hessian": BASE_HESSIAN}
    with pytest.raises(error, match=re.escape(message)):
        merging.merge(**(good | curvatures | bad))
    if not bad.keys() & curvatures.keys():
        with pytest.raises(error, match=re.escape(message)):
            merging.task_arithmetic(**(good | bad))


def linear(theta, x):
    return x["features"] @ theta["w"] + theta["b"][None]


THETA = {"w": tree(8)["w"].T, "b": np.float32([1.0, -0.5])}


def features(size):
    rng = np.random.default_rng(size)
    return {"features": rng.normal(size=(size, 3)).astype(np.float32)}


def probabilities(theta, x):
    logits = linear(jax.tree.map(np.float64, theta), jax.tree.map(np.float64, x))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.statistical
@pytest.mark.parametrize("num_samples", [1, 3])
def test_fisher_of_a_linear_classifier_is_the_closed_form(key, num_samples):
    """Sum over i of x_i^2 p_i (1 - p_i), on average over the labels."""
    x = features(7)

    def fisher(key):
        return merging.diagonal_fisher(
            linear, THETA, key, x, num_samples=num_samples, chunk_size=3
        )

    draws = jax.jit(jax.vmap(fisher))(jax.random.split(key, 2_000))
    probs = probabilities(THETA, x)
    variance = probs * (1 - probs)
    assert_mean(draws["w"], np.square(x["features"]).T @ variance)
    assert_mean(draws["b"], variance.sum(axis=0))


@pytest.mark.statistical
def test_fisher_of_one_logit_is_that_of_a_sigmoid(key):
    """Sum over i of x_i^2 p_i (1 - p_i), on average over the labels."""
    x = features(7)["features"]
    weights = jnp.array([[0.5], [-1.0], [0.2]])

    def fisher(key):
        return merging.diagonal_fisher(lambda w, x: x @ w, weights, key, x)

    draws = jax.jit(jax.vmap(fisher))(jax.random.split(key, 2_000))
    probs = 1 / (1 + np.exp(-x @ np.asarray(weights)))
    assert_mean(draws, np.square(x).T @ (probs * (1 - probs)))


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 12, 100])
def test_fisher_is_the_sum_of_squared_gradients_of_drawn_labels(
    num_samples, chunk_size
):
    """The same labels, whatever the chunks; example by example in NumPy."""
    key, x = jax.random.key(0), features(12)
    result = merging.diagonal_fisher(
        linear, THETA, key, x, num_samples=num_samples, chunk_size=chunk_size
    )
    logits = linear(THETA, x)
    expected = {"w": np.zeros((3, 2)), "b": np.zeros(2)}
    for i, probs in enumerate(probabilities(THETA, x)):
        for k in jax.random.split(jax.random.fold_in(key, i), num_samples):
            error = probs - np.eye(2)[jax.random.categorical(k, logits[i])]
            gradient = np.outer(x["features"][i], error)
            expected["w"] += gradient**2 / num_samples
            expected["b"] += error**2 / num_samples
    chex.assert_trees_all_close(result, expected, rtol=1e-5)


def test_each_example_has_labels_of_its_own(key):
    """Equal examples don't all get equal gradients; nor do samples of one."""
    x = {"features": np.ones((64, 3), np.float32)}
    for count, rows in ((1, 64), (64, 1)):
        few = jax.tree.map(lambda v, rows=rows: v[:rows], x)
        result = merging.diagonal_fisher(linear, THETA, key, few, num_samples=count)
        shares = result["b"] / rows
        squared_errors = np.square(probabilities(THETA, x)[0] - np.eye(2))
        assert np.all(shares > squared_errors.min(axis=0) + 1e-3)
        assert np.all(shares < squared_errors.max(axis=0) - 1e-3)


def test_fisher_of_low_precision_parameters_is_float32(key):
    """1024 squares of 1/4 add up to 256; in bfloat16 the sum would stop at 64."""
    theta = jnp.zeros((1, 2), jnp.bfloat16)
    x = np.ones((1024, 1))
    result = merging.diagonal_fisher(
        lambda w, x: x.astype(w.dtype) @ w, theta, key, x, chunk_size=1
    )
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, [[256, 256]])


@pytest.mark.usefixtures("x64")
def test_fisher_stays_in_double_precision():
    theta, x = jax.tree.map(jnp.float64, (THETA, features(5)))
    result = merging.diagonal_fisher(
        linear, theta, jax.random.key(0), x, num_samples=2, chunk_size=2
    )
    assert {v.dtype for v in result.values()} == {jnp.dtype("float64")}


@pytest.mark.slow
@pytest.mark.parametrize("remainder", [0, 1])
def test_memory_of_the_fisher_does_not_grow_with_the_data(remainder):
    """But for an example's index, also where the last chunk is shorter."""
    key, weights = jax.random.key(0), jnp.ones((200, 100))

    def temporaries(size):
        run = jax.jit(
            lambda w, x: merging.diagonal_fisher(
                lambda w, x: x @ w, w, key, x, chunk_size=4
            )
        )
        shapes = weights, jax.ShapeDtypeStruct((size + remainder, 200), jnp.float32)
        return temp_bytes(run.lower(*shapes))

    few, many = temporaries(40), temporaries(400)
    assert many - few <= 8 * 360


def test_the_fisher_of_a_device_has_no_gradients_of_others(key):
    """`jax.shard_map` would sum them before they are squared, without a word."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()

    def fisher(theta, x):
        result = merging.diagonal_fisher(linear, theta, key, x)
        return jax.tree.map(lambda v: v[None], result)

    mapped = jax.shard_map(fisher, mesh=mesh, in_specs=(whole, spec), out_specs=spec)
    jaxpr = jax.make_jaxpr(mapped)(THETA, features(16))
    assert "psum" not in str(jaxpr)


INPUTS = features(4)
BAD_FISHER = [
    ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0."),
    ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1, got 0."),
    (
        {"params": np.arange(3)},
        TypeError,
        "`params` must be real floating-point arrays",
    ),
    ({"inputs": {}}, ValueError, "`inputs` must have at least one array, got {}."),
    ({"inputs": np.float32(1)}, ValueError, "`inputs` must have one or more examples"),
    ({"inputs": [[1.0], [2.0]]}, ValueError, "inputs[0][0]. Pass arrays, not lists."),
    (
        {"inputs": INPUTS | {"length": np.ones(3)}},
        ValueError,
        "got shape (3,) at inputs['length'].",
    ),
    (
        {"fn": lambda theta, x: linear(theta, x)[0]},
        ValueError,
        "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, got",
    ),
    (
        {"fn": lambda theta, x: (linear(theta, x), None)},
        TypeError,
        "`fn(theta, x)` must be one array, got tuple. Return the",
    ),
    (
        {"fn": lambda theta, x: linear(theta, x) > 0},
        TypeError,
        "`fn(theta, x)` must be floating-point, got dtype bool. Return logits, not",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_FISHER)
def test_arguments_of_the_fisher_that_do_not_fit_are_named(bad, error, message):
    good = {"fn": linear, "params": THETA, "key": jax.random.key(0), "inputs": INPUTS}
    with pytest.raises(error, match=re.escape(message)):
        merging.diagonal_fisher(**(good | bad))
