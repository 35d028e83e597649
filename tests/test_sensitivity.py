"""Leave-one-out estimates: the formula written out, and exact refits."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import AS_USERS_DO, QUICK_PROCESS, temp_bytes
from statistical import assert_at_most

import ivon_jax
from ivon_jax import sensitivity

SCRIPT = Path(__file__).with_name("eight_devices_posterior.py")
ROUNDING = 1e-13  # of double precision, for sums of hundreds of terms
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
NAMES = "deviations", "sensitivities", "leave_one_out_logits", "leave_one_out_loss"


@functools.partial(jax.jit, static_argnames=("fn", "diagonal", "chunk_size", "loss"))
def estimates(fn, q, x, y, **options):
    """All that the module has, each from the pass over the examples that has all."""
    found = sensitivity.leave_one_out(fn, q, x, y, **options)
    return dict(zip(NAMES, (found[i] for i in (1, 2, 0, 3)), strict=True))


def softmax(logits):
    unnormalised = np.exp(logits - logits.max(-1, keepdims=True))
    return unnormalised / unnormalised.sum(-1, keepdims=True)


def linear(theta, x):
    return x @ theta


def linear_problem(seed, n=21, d=5, c=4):
    """Double precision; not a multiple of the chunks."""
    rng = np.random.default_rng(seed)
    q = ivon_jax.Posterior(rng.normal(size=(d, c)), rng.uniform(2, 20, size=(d, c)))
    return q, rng.normal(size=(n, d)), rng.integers(0, c, size=n)


def network(theta, x):
    """Two layers, with a tree of parameters and a scalar among them."""
    hidden = jnp.tanh(x @ theta["w"] + theta["b"][None]) * theta["scale"]
    return hidden @ theta["v"]


def network_problem(seed, n=13):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 6), "b": (6,), "scale": (), "v": (6, 4)}
    mean = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    precision = {
        name: jnp.asarray(rng.uniform(5, 50, size=s)) for name, s in shapes.items()
    }
    x, y = rng.normal(size=(n, 3)), rng.integers(0, 4, size=n)
    return ivon_jax.Posterior(mean, precision), x, y


def tagger(theta, x):
    """Causal: a prediction for each token, of the mean of those until there."""
    count = jnp.arange(1.0, x.shape[1] + 1).astype(x.dtype)[None, :, None]
    return jnp.tanh(jnp.cumsum(x, axis=1) / count) @ theta


def sequences(dtype):
    """Three of 4, 2 and 3 tokens, padded to 5."""
    q, x, _ = linear_problem(0, n=15)
    where = np.arange(5) < np.array([[4], [2], [3]])
    y = np.random.default_rng(0).integers(0, 4, size=(3, 5))
    q, x = jax.tree.map(lambda v: jnp.asarray(v, dtype), (q, x.reshape(3, 5, 5)))
    return q, x, jnp.asarray(np.where(where, y, -100)), where


def covariances(fn, q, x):
    """V of every example, from whole Jacobians."""
    jacobian = jax.jacobian(lambda mean: fn(mean, x))(q.mean)

    def product(j, precision):
        j = np.asarray(j).reshape(*j.shape[:2], -1)
        return np.einsum("icp,p,idp->icd", j, 1 / np.ravel(precision), j)

    return sum(jax.tree.leaves(jax.tree.map(product, jacobian, q.precision)))


@pytest.mark.usefixtures("x64")
def test_each_name_is_its_part_of_the_one_pass():
    q, x, y = linear_problem(0)
    together = estimates(linear, q, x, y)
    for name in NAMES:
        alone = getattr(sensitivity, name)(linear, q, x, y)
        np.testing.assert_allclose(alone, together[name], rtol=ROUNDING)


def test_all_together_cost_what_one_does():
    """A linearisation and two products for each example, not four times."""
    q, x, y = network_problem(0)

    def flops(read):
        def one(q, x, y):
            return read(sensitivity.leave_one_out(network, q, x, y, chunk_size=13))

        cost = jax.jit(one).lower(q, x, y).compile(AS_USERS_DO).cost_analysis()
        return cost["flops"]

    assert flops(lambda found: found) < 1.3 * flops(lambda found: found.deviations)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("x64")
def test_estimates_of_a_linear_model_are_the_formula_written_out(seed):
    """With J = x kron I."""
    q, x, y = linear_problem(seed)
    logits = x @ q.mean
    errors = softmax(logits) - np.eye(4)[y]
    deviations = []
    for row, error in zip(x, errors, strict=True):
        jacobian = np.kron(row, np.eye(4))
        deviations.append(
            jacobian @ np.diag(1 / q.precision.ravel()) @ jacobian.T @ error
        )
    expected = {
        "deviations": np.array(deviations),
        "sensitivities": np.sqrt(np.square(deviations).sum(1)),
        "leave_one_out_logits": logits + deviations,
        "leave_one_out_loss": -np.mean(
            np.log(softmax(logits + deviations)[np.arange(len(y)), y])
        ),
    }
    chex.assert_trees_all_close(estimates(linear, q, x, y), expected, rtol=ROUNDING)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("x64")
def test_estimates_of_a_network_are_those_of_its_jacobian(seed, diagonal):
    q, x, y = network_problem(seed)
    logits = np.asarray(network(q.mean, x))
    errors = softmax(logits) - np.eye(4)[y]
    v = covariances(network, q, x)
    products = np.einsum("icc,ic->ic" if diagonal else "icd,id->ic", v, errors)
    expected = {
        "deviations": products,
        "sensitivities": np.linalg.norm(products, axis=1),
        "leave_one_out_logits": logits + products,
        "leave_one_out_loss": -np.mean(
            np.log(softmax(logits + products)[np.arange(len(y)), y])
        ),
    }
    result = estimates(network, q, x, y, diagonal=diagonal)
    chex.assert_trees_all_close(result, expected, rtol=1e-10)


NOISE = 0.7  # standard deviation
PRIOR_PRECISION = 3.0


def refit(features, targets):
    """Bayesian linear regression on one-hot rows, where the posterior is diagonal."""
    precision = PRIOR_PRECISION + (features**2).sum(0) / NOISE**2
    mean = features.T @ targets / NOISE**2 / precision
    return mean, precision


def regression_problem(repeats):
    """Each row has one entry that is not zero."""
    rng = np.random.default_rng(repeats)
    features = np.tile(np.eye(4), (repeats, 1)) * rng.normal(size=(4 * repeats, 1))
    return features, features @ rng.normal(size=4) + NOISE * rng.normal(
        size=len(features)
    )


def exact_and_estimated(repeats):
    """Deviations by training again without each example, by estimate; leverages."""
    features, targets = regression_problem(repeats)
    mean, precision = refit(features, targets)
    rows = np.arange(len(targets))
    exact = [
        row @ (refit(features[rows != i], targets[rows != i])[0] - mean)
        for i, row in enumerate(features)
    ]
    q = ivon_jax.Posterior(mean[:, None], precision[:, None])
    estimate = sensitivity.deviations(
        linear,
        q,
        features,
        targets[:, None],
        loss=lambda f, y: 0.5 * jnp.sum((f - y) ** 2) / NOISE**2,
    )
    return np.array(exact), estimate[:, 0], features**2 @ (1 / precision) / NOISE**2


@pytest.mark.parametrize("repeats", [2, 5, 40])
@pytest.mark.usefixtures("x64")
def test_in_linear_regression_only_the_leverage_is_missing(repeats):
    """Without x, y the normal equations give x(m' - m) = V e / (1 - V / s^2).

    They are (P - x'x / s^2)(m' - m) = x'(x m - y) / s^2 = x' e; multiply from the left
    by x / P, with V = x x' / P.
    """
    exact, estimate, leverage = exact_and_estimated(repeats)
    np.testing.assert_allclose(estimate, (1 - leverage) * exact, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_estimate_approaches_the_refit_as_the_leverage_vanishes():
    """Ten times the data: about a tenth of the error, the sum of leverages being 4."""

    def error(repeats):
        exact, estimate, leverage = exact_and_estimated(repeats)
        assert leverage.sum() < 4
        return np.abs(estimate - exact).sum() / np.abs(exact).sum()

    few, many = error(10), error(1000)
    assert many < few / 50
    assert many < 5e-3


@pytest.mark.parametrize("diagonal", [False, True])
def test_leaving_an_example_out_never_lowers_its_cross_entropy(diagonal):
    """A convex loss is above its tangent, which rises by e'V e >= 0."""
    q, x, y = single_precision(network_problem(0, n=100))
    logits = estimates(network, q, x, y, diagonal=diagonal)["leave_one_out_logits"]
    without, within = CROSS_ENTROPY(logits, y), CROSS_ENTROPY(network(q.mean, x), y)
    assert np.all(without >= within * (1 - 1e-6))
    assert without.mean() > within.mean()


def single_precision(problem):
    """The arrays of `problem` in JAX's default dtypes."""
    return jax.tree.map(jnp.asarray, problem)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 13, 14, 1000])
@pytest.mark.usefixtures("x64")
def test_the_size_of_chunks_changes_nothing(chunk_size):
    """Of 13 examples, in their order: a divisor, a remainder, more than there are."""
    q, x, y = network_problem(0)
    rows = [slice(i, i + 1) for i in range(13)]
    alone = [estimates(network, q, x[i], y[i])["deviations"] for i in rows]
    result = estimates(network, q, x, y, chunk_size=chunk_size)["deviations"]
    np.testing.assert_allclose(result, np.concatenate(alone), rtol=1e-10)


def test_inputs_and_targets_may_be_trees():
    """One of the targets as a weight of the example."""
    q, x, y = single_precision(network_problem(0))
    weights = jnp.linspace(0.5, 2.0, len(y))
    result = sensitivity.deviations(
        lambda theta, x: network(theta, jnp.concatenate([x["left"], x["right"]], 1)),
        q,
        {"left": x[:, :1], "right": x[:, 1:]},
        {"label": y, "weight": weights},
        loss=lambda f, y: y["weight"] * CROSS_ENTROPY(f, y["label"]),
    )
    expected = weights[:, None] * sensitivity.deviations(network, q, x, y)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_all_are_the_same_under_jit_and_vmap():
    """Over posteriors, examples and labels; and without either."""
    problems = [network_problem(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *problems)
    results = jax.vmap(functools.partial(estimates, network))(*stacked)
    for i, problem in enumerate(problems):
        one = jax.tree.map(lambda x, i=i: x[i], results)
        chex.assert_trees_all_close(one, estimates(network, *problem), rtol=1e-10)
    for name, result in estimates(network, *problems[0]).items():
        eager = getattr(sensitivity, name)(network, *problems[0])
        np.testing.assert_allclose(result, eager, rtol=1e-10)


def test_point_masses_are_constants():
    """One of integers, which has no derivative, and one of floating-point numbers."""
    q, x, y = single_precision(network_problem(0))
    columns = jnp.array([2, 0, 1])

    def permuted(theta, x):
        return network(theta, x[:, theta["columns"]])

    mean = q.mean | {"columns": columns}
    partial = ivon_jax.Posterior(mean, q.precision | {"columns": None, "b": None})
    result = sensitivity.deviations(permuted, partial, x, y)
    certain = q._replace(precision=q.precision | {"b": jnp.full(6, 1e30)})
    expected = sensitivity.deviations(network, certain, x[:, columns], y)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-7)
    everything = sensitivity.deviations(network, q, x[:, columns], y)
    assert np.abs(everything - expected).max() > 1e-3


def test_with_nothing_but_point_masses_no_example_counts():
    q, x, y = single_precision(linear_problem(0))
    q = q._replace(precision=None)
    for diagonal in (False, True):
        result = estimates(linear, q, x, y, diagonal=diagonal)
        np.testing.assert_array_equal(result["sensitivities"], np.zeros(len(y)))


def test_bfloat16_parameters_give_float32_estimates():
    """To the 2^-8 of each of the four roundings on the way; `fn` sees bfloat16."""
    q, x, y = single_precision(linear_problem(0))
    mean = q.mean.astype(jnp.bfloat16)
    low = x.astype(jnp.bfloat16), y

    def run(mean, x, y):
        q_low = ivon_jax.Posterior(mean, q.precision)
        return sensitivity.deviations(linear, q_low, x, y)

    result = run(mean, *low)
    assert result.dtype == jnp.float32
    expected = run(mean.astype(jnp.float32), low[0].astype(jnp.float32), y)
    error = np.linalg.norm(result - expected, axis=1)
    assert np.all(error < 4 * 2**-8 * np.linalg.norm(expected, axis=1))


@pytest.mark.usefixtures("x64")
def test_double_precision_stays():
    q, x, y = linear_problem(0)
    assert sensitivity.leave_one_out_logits(linear, q, x, y).dtype == jnp.float64


WIDE = ivon_jax.Posterior(jnp.ones((100, 50)), jnp.full((100, 50), 100.0))


def temporaries(n, diagonal, chunk_size=4):
    """Bytes that `sensitivities` needs besides its arguments and results."""

    def run(x, y):
        return sensitivity.sensitivities(
            linear, WIDE, x, y, diagonal=diagonal, chunk_size=chunk_size
        )

    x, y = jnp.ones((n, 100)), jnp.zeros(n, jnp.int32)
    return temp_bytes(jax.jit(run).lower(x, y))


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("remainder", [0, 1])
def test_memory_does_not_grow_with_examples(diagonal, remainder):
    """But for two numbers each; an example has 100 inputs and 50 outputs."""
    few, many = (temporaries(n + remainder, diagonal) for n in (100, 800))
    assert many - few < 4 * 2 * 700


@pytest.mark.parametrize("diagonal", [False, True])
def test_no_jacobian_needs_memory(diagonal):
    """It would be that of 50 x P for each example."""
    p = WIDE.mean.nbytes
    assert temporaries(8, diagonal, chunk_size=1) < 3 * p
    assert temporaries(8, diagonal, chunk_size=4) < 3 * 4 * p


@functools.cache
def run_on_eight_devices():
    """In a process of its own, because this one has one device."""
    command = [sys.executable, "-W", "error", SCRIPT]
    env = os.environ | QUICK_PROCESS | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def facts_of(name):
    done = run_on_eight_devices()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[name]


@pytest.mark.slow
def test_examples_and_parameters_may_be_sharded():
    """Over eight devices, and over four times two."""
    differences = facts_of("differences")
    assert len(differences) >= 2
    assert_at_most(list(differences.values()), ROUNDING)


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="cannot map over sharded examples there"
)
def test_explicit_meshes_may_shard_members_classes_and_examples():
    assert_at_most(list(facts_of("explicit_differences").values()), ROUNDING)


@pytest.mark.slow
def test_each_device_of_a_shard_map_has_derivatives_of_its_own():
    """Not those of all examples, which `jax.shard_map` would sum without a word."""
    differences = facts_of("mapped_differences")
    assert len(differences) >= 5
    assert max(differences.values()) < ROUNDING


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="cannot map over sharded examples there"
)
def test_sharded_examples_of_explicit_meshes_need_no_jit():
    """In chunks that fall on the devices evenly, and in others."""
    differences = facts_of("eager_differences")
    assert max(differences.values()) < ROUNDING


def test_functions_of_sharded_parameters_and_data_need_no_jit():
    """Predictions, uncertainties and the bound; it is the same under it."""
    differences = facts_of("function_differences")
    assert len(differences) == 2 * 2 * 4
    assert max(differences.values()) < ROUNDING


def test_metrics_take_arrays_of_any_mesh():
    """Sharded by example, by token and by class."""
    differences = facts_of("metric_differences")
    assert len(differences) == 2 * 2 * 7
    assert max(differences.values()) < ROUNDING


def test_devices_with_examples_of_their_own_send_nothing():
    assert facts_of("sent") == []


GOOD = {"fn": linear, "posterior": WIDE, "x": np.ones((3, 100)), "y": np.arange(3)}

BAD = {
    "parameters": (
        {"posterior": {"w": 1}},
        "`posterior` must be a Posterior, one Gaussian, got dict. Pass "
        "`ivon_jax.posterior(params, opt_state)`.",
    ),
    "no label for some": (
        {"y": np.arange(2)},
        "`y` must have 3 examples along the first axis of every array, as the first of "
        "`x`, got shape (2,) of it.",
    ),
    "inputs of several lengths": (
        {"x": {"a": np.ones((3, 1)), "b": np.ones(4)}},
        "`x` must have 3 examples along the first axis of every array, as the first of "
        "`x`, got shape (4,) at x['b'].",
    ),
    "no axis": (
        {"x": np.float32(1)},
        "`x` must have one or more examples along the first axis of every array, got "
        "shape () of it.",
    ),
    "lists": (
        {"x": [1.0, 2.0, 3.0]},
        "`x` must have one or more examples along the first axis of every array, got "
        "shape () at x[0]. Pass arrays, not lists.",
    ),
    "no examples": (
        {"x": np.ones((0, 100))},
        "`x` must have one or more examples along the first axis of every array, got "
        "shape (0, 100) of it.",
    ),
    "no array": ({"x": {}}, "`x` must have at least one array, got {}."),
    "one output without an axis": (
        {"fn": lambda theta, x: (x @ theta)[:, 0]},
        "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, got "
        "shape (1,) for a batch of one.",
    ),
    "outputs and more": (
        {"fn": lambda theta, x: (x @ theta, x)},
        "`fn(theta, x)` must be one array, got tuple. Return the predictions alone.",
    ),
    "classes": (
        {"fn": lambda theta, x: (x @ theta > 0).astype(jnp.int32)},
        "`fn(theta, x)` must be floating-point, got dtype int32. Return logits, not "
        "classes.",
    ),
    "one-hot labels": (
        {"y": np.eye(3, 50, dtype=np.float32)},
        "`y` must be integers, got dtype float32. For one-hot labels pass the argmax.",
    ),
    "a column of labels": (
        {"y": np.arange(3)[:, None]},
        "`y` must have shape (3,), one label for each prediction, got (3, 1).",
    ),
    "a tree of labels": (
        {"y": {"label": np.arange(3)}},
        "`y` must be one array, got dict.",
    ),
    "a label that is no class": (
        {"y": np.array([0, 50, 1])},
        "`y` must be in 0..49, got 50.",
    ),
    "targets of no example": (
        {"y": np.ones((3, 5)), "fn": tagger, "x": np.ones((3, 4, 100), np.float32)}
        | {"loss": lambda f, y: jnp.sum((f - y) ** 2)},
        "`y` must have shape (3, 4) or more axes, a target for each prediction, got "
        "(3, 5) at y.",
    ),
    "a mask of something else": (
        {"where": np.ones(4, bool)},
        "`where` must broadcast to shape (3,), one boolean for each example, got (4,).",
    ),
    "a loss for each output": (
        {"loss": lambda f, _: f**2},
        "`loss(outputs, y)` must be a scalar, the loss of one prediction, got shape "
        "(50,). Sum it over the outputs.",
    ),
    "a loss and more": (
        {"loss": lambda f, _: (f.sum(), f)},
        "`loss(outputs, y)` must be one array, got tuple.",
    ),
    "no size of chunks": (
        {"chunk_size": 0},
        "`chunk_size` must be at least 1, got 0.",
    ),
    "a broken size of chunks": (
        {"chunk_size": 2.5},
        "`chunk_size` must be an integer, got 2.5.",
    ),
    "a diagonal that is an array": (
        {"diagonal": "yes"},
        "`diagonal` must be True or False, got 'yes'.",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        sensitivity.sensitivities(**GOOD | change)


def test_under_jit_a_label_of_no_class_gives_nan():
    """Of its example alone; the mean loss is of all."""
    q, x, y = single_precision(network_problem(0))
    for bad in (-1, 4, -100, 2**31 - 1):
        result = estimates(network, q, x, y.at[2].set(bad))
        wrong = np.isnan(result["sensitivities"])
        np.testing.assert_array_equal(wrong, np.arange(13) == 2)
        assert np.isnan(result["leave_one_out_loss"])


@pytest.mark.parametrize("fill", [-1, 7])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_masked_example_has_no_deviation_and_no_loss(fill, diagonal):
    """As if it were not there: its inputs are NaN, its label no class."""
    q, x, y = single_precision(network_problem(0))
    where = np.arange(13) % 3 > 0
    expected = estimates(network, q, x[where], y[where], diagonal=diagonal)
    x = jnp.where(where[:, None], x, jnp.nan)
    y = jnp.where(where, y, fill)
    result = estimates(network, q, x, y, diagonal=diagonal, where=where)
    assert not result["sensitivities"][~where].any()
    assert not result["deviations"][~where].any()
    result = {k: v[where] if v.shape else v for k, v in result.items()}
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.usefixtures("x64")
def test_padding_changes_no_estimate_of_a_sequence(diagonal):
    """Each is one example of T x C outputs, as if it had no padding."""
    q, x, y, where = sequences(float)
    result = estimates(tagger, q, x, y, where=where, diagonal=diagonal)
    losses = []
    for i, length in enumerate(where.sum(axis=1)):

        def flat(theta, x):
            return tagger(theta, x).reshape(1, -1)

        def loss(f, y):
            return CROSS_ENTROPY(f.reshape(len(y), 4), y).sum()

        row = slice(i, i + 1)
        short = x[row, :length], y[row, :length]
        alone = estimates(flat, q, *short, loss=loss, diagonal=diagonal)
        deviation = result["deviations"][i]
        expected = alone["deviations"].reshape(length, 4)
        np.testing.assert_allclose(deviation[:length], expected, rtol=1e-10)
        np.testing.assert_array_equal(deviation[length:], 0)
        norm = result["sensitivities"][i]
        np.testing.assert_allclose(norm, alone["sensitivities"][0], rtol=1e-10)
        losses.append(alone["leave_one_out_loss"])
    mean = sum(losses) / float(where.sum())
    np.testing.assert_allclose(result["leave_one_out_loss"], mean, rtol=1e-10)


def test_one_boolean_is_a_mask_of_all():
    """Of Python's too, outside of `jit`."""
    q, x, y = single_precision(network_problem(0))
    expected = sensitivity.sensitivities(network, q, x, y)
    result = sensitivity.sensitivities(network, q, x, y, where=True)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_mask_of_examples_is_one_of_whole_sequences():
    q, x, y, _ = sequences(jnp.float32)
    examples = np.array([True, False, True])
    y = jnp.maximum(y, 0)
    result = estimates(tagger, q, x, y, where=examples)
    expected = estimates(tagger, q, x[examples], y[examples])
    np.testing.assert_allclose(
        result["leave_one_out_loss"], expected["leave_one_out_loss"], rtol=1e-6
    )
    assert result["sensitivities"][1] == 0


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.usefixtures("x64")
def test_one_output_is_the_logit_of_a_sigmoid(diagonal):
    """A softmax over 0 and the logit."""
    q, x, y = linear_problem(0, c=1)
    y = y % 2 if y.any() else np.arange(len(y)) % 2

    def two(theta, x):
        return jnp.concatenate([jnp.zeros((len(x), 1)), x @ theta], axis=1)

    result = estimates(linear, q, x, y, diagonal=diagonal)
    expected = estimates(two, q, x, y, diagonal=diagonal)
    assert np.all(result["sensitivities"] > 0)
    for name in ("deviations", "leave_one_out_logits"):
        np.testing.assert_allclose(result[name], expected[name][:, 1:], rtol=1e-10)
    for name in ("sensitivities", "leave_one_out_loss"):
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-10)


def test_regression_is_told_to_pass_a_loss():
    """Float targets, counts, and targets of several outputs."""
    remedy = "For regression pass `loss`, such as `lambda f, y: 0.5 * jnp.sum((f - y) "
    q = ivon_jax.Posterior(jnp.ones((2, 1)), jnp.ones((2, 1)))
    for y in (np.ones(3, np.float32), np.array([0, 7, 1]), np.ones((3, 1), np.int32)):
        with pytest.raises((TypeError, ValueError), match=re.escape(remedy)):
            sensitivity.sensitivities(linear, q, np.ones((3, 2), np.float32), y)


def test_labels_of_a_loss_of_ones_own_are_its_own():
    """No class indices: float, and of another shape."""
    result = sensitivity.sensitivities(
        **GOOD | {"y": np.ones((3, 50))}, loss=lambda f, y: jnp.sum((f - y) ** 2)
    )
    assert result.shape == (3,)
