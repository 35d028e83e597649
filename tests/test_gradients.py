"""One estimator: unbiased, averaged in the right order, in the memory of one sample."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import AS_USERS_DO, temp_bytes
from jax.sharding import AxisType, PartitionSpec as P
from statistical import assert_at_most, assert_mean

import ivon_jax

# A quadratic in two leaves, with a full and known Hessian.
_ROOT = np.random.default_rng(0).normal(size=(5, 5)) / 2
HESSIAN = jnp.asarray(_ROOT @ _ROOT.T + np.eye(5), jnp.float32)
PARAMS = {"a": jnp.array([0.1, -0.2, 0.3]), "b": jnp.array([[0.2], [0.1]])}
DIAGONAL = {"a": jnp.diag(HESSIAN)[:3], "b": jnp.diag(HESSIAN)[3:, None]}
BATCH = jax.random.normal(jax.random.key(99), (12, 5))
TX = ivon_jax.ivon(0.1, ess=20, hess_init=2.0)
STATE = TX.init(PARAMS)
REPEATS = 2000


def flat(theta):
    return jnp.concatenate([theta["a"], theta["b"].ravel()])


def loss_fn(theta, batch):
    """The mean over the batch of (theta - x)' H (theta - x) / 2."""
    residual = flat(theta)[None] - batch
    return 0.5 * jnp.mean(jnp.sum((residual @ HESSIAN) * residual, axis=1))


def estimates(key, count=REPEATS, **options):
    """Independent estimates, stacked."""
    grad_fn = ivon_jax.value_and_grad(loss_fn, **options)
    draw = jax.jit(jax.vmap(lambda k: grad_fn(k, PARAMS, STATE, BATCH)))
    return draw(jax.random.split(key, count))


OPTIONS = {
    "one_sample": {},
    "scan": {"mc_samples": 3},
    "vmap": {"mc_samples": 3, "vectorize": True},
    "microbatches": {"microbatches": 4},
    "both": {"mc_samples": 2, "microbatches": 3},
}


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_and_hessian_are_unbiased(options, key):
    """On a quadratic the smoothed loss has the gradient at m and the Hessian itself."""
    _, estimate = estimates(key, **options)
    gradient = jax.grad(loss_fn)(PARAMS, BATCH)
    for name in PARAMS:
        assert_mean(estimate.grad[name], gradient[name])
        assert_mean(estimate.hess[name], DIAGONAL[name])


@pytest.mark.statistical
def test_value_is_the_loss_under_the_posterior(key):
    """E[loss] = loss(m) + tr(H diag(sigma^2)) / 2."""
    loss, _ = estimates(key, mc_samples=2)
    variance = flat(ivon_jax.posterior(PARAMS, STATE).variance)
    assert_mean(loss, loss_fn(PARAMS, BATCH) + 0.5 * jnp.sum(flat(DIAGONAL) * variance))


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("option", ["mc_samples", "microbatches"])
def test_variance_of_the_hessian_falls_as_one_over_samples(option, count, key):
    """Fresh noise each: were it shared, the variance would stay. z = 5 on its log.

    With every row of the batch alike a micro-batch differs by its noise alone.
    """
    batch = jnp.broadcast_to(BATCH[:1], BATCH.shape)

    def variances(repeats_key, **options):
        grad_fn = ivon_jax.value_and_grad(loss_fn, **options)
        draw = jax.jit(jax.vmap(lambda k: grad_fn(k, PARAMS, STATE, batch)[1].hess))
        draws = jax.vmap(flat)(draw(jax.random.split(repeats_key, REPEATS)))
        hess = np.asarray(draws, np.float64)
        centred = (hess - hess.mean(axis=0)) ** 2
        variance = centred.mean(axis=0)
        return variance, centred.std(axis=0) / np.sqrt(REPEATS) / variance

    one, error_one = variances(key)
    many, error_many = variances(jax.random.fold_in(key, 1), **{option: count})
    tolerance = 5 * np.sqrt(error_one**2 + error_many**2)
    assert_at_most(np.abs(np.log(one / many / count)), tolerance)


def test_the_product_comes_before_the_mean(key):
    """Mean gradient times mean noise is an eighth of the Hessian."""
    _, estimate = estimates(key, mc_samples=8)
    for name in PARAMS:
        assert jnp.all(estimate.hess[name].mean(axis=0) > 0.75 * DIAGONAL[name])


def test_one_sample_is_sample_and_value_and_grad(key):
    loss, estimate = ivon_jax.value_and_grad(loss_fn)(key, PARAMS, STATE, BATCH)
    theta = ivon_jax.sample(key, PARAMS, STATE)
    expected_loss, grads = jax.value_and_grad(loss_fn)(theta, BATCH)
    chex.assert_trees_all_close(
        (loss, estimate.grad), (expected_loss, grads), rtol=1e-6
    )
    at_sample = TX.update(grads, STATE, PARAMS, sample=theta)
    chex.assert_trees_all_close(
        TX.update(estimate, STATE, PARAMS), at_sample, rtol=1e-5, atol=1e-7
    )


def test_scan_and_vmap_agree(key):
    results = [
        ivon_jax.value_and_grad(loss_fn, mc_samples=5, vectorize=vectorize)(
            key, PARAMS, STATE, BATCH
        )
        for vectorize in (False, True)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 6, 12])
def test_microbatches_without_noise_equal_the_big_batch(microbatches):
    """At an enormous ess theta is m, and the mean of means is the mean."""
    opt_state = ivon_jax.ivon(0.1, ess=1e18).init(PARAMS)
    grad_fn = ivon_jax.value_and_grad(loss_fn, microbatches=microbatches)
    loss, estimate = grad_fn(jax.random.key(0), PARAMS, opt_state, BATCH)
    expected = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    chex.assert_trees_all_close((loss, estimate.grad), expected, rtol=1e-5)


def test_every_slice_is_seen_once_with_noise_of_its_own(key):
    """aux of a slice cannot be averaged away: rows are summed with distinct weights."""

    def loss_with_rows(theta, rows):
        return loss_fn(theta, BATCH), {"rows": rows, "noise": theta["a"]}

    rows = jnp.arange(12.0)
    grad_fn = ivon_jax.value_and_grad(loss_with_rows, has_aux=True, microbatches=3)
    (_, aux), _ = grad_fn(key, PARAMS, STATE, rows)
    np.testing.assert_allclose(aux["rows"], rows.reshape(4, 3).mean(axis=1), rtol=1e-6)
    q = ivon_jax.posterior(PARAMS, STATE)
    thetas = [q.sample(k)["a"] for k in jax.random.split(key, 3)]
    np.testing.assert_allclose(aux["noise"], sum(thetas) / 3, rtol=1e-5)


def test_aux_keeps_dtypes_averages_floats_and_keeps_the_last_of_others(key):
    def loss_with_aux(theta, x):
        aux = {
            "float": x.mean(),
            "bfloat16": x.mean().astype(jnp.bfloat16),
            "int": x.sum().astype(int),
        }
        return jnp.sum(theta["a"]), aux

    x = jnp.array([0.0, 1.0, 2.0, 3.0])
    for options in ({"mc_samples": 2}, {"mc_samples": 2, "vectorize": True}):
        grad_fn = ivon_jax.value_and_grad(
            loss_with_aux, has_aux=True, microbatches=2, **options
        )
        (_, aux), _ = grad_fn(key, PARAMS, STATE, x)
        assert aux["float"] == 1.5
        assert aux["bfloat16"] == jnp.asarray(1.5, jnp.bfloat16)
        assert aux["bfloat16"].dtype == jnp.bfloat16
        assert aux["int"] == 1 + 3


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mc_samples", "microbatches"])
def test_memory_does_not_grow_with(option):
    """Temporaries of the compiled program; the keys alone may grow."""
    params = jnp.ones(10_000)
    tx = ivon_jax.ivon(0.1, ess=20)
    batch = jnp.ones((64, 10_000))

    def temporaries(count):
        grad_fn = ivon_jax.value_and_grad(
            lambda theta, x: jnp.mean(jnp.sin(x @ theta)), **{option: count}
        )
        args = jax.random.key(0), params, tx.init(params), batch
        return jax.jit(grad_fn).lower(*args).compile(AS_USERS_DO).memory_analysis()

    few, many = (temporaries(count).temp_size_in_bytes for count in (2, 64))
    assert many - few < params.nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("option", ["mc_samples", "microbatches"])
def test_a_loop_over_draws_keeps_sums_and_one_draw(option, dtype):
    """The sums are the outputs. Of a draw there are theta and one array of float32."""
    params, width = jnp.ones((512, 512)), jnp.dtype(dtype).itemsize
    tx = ivon_jax.ivon(0.1, ess=20)
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x: jnp.mean(jnp.sin(x @ theta).astype(jnp.float32)),
        compute_dtype=dtype,
        **{option: 4},
    )
    batch = jnp.ones((8, 512), dtype)
    args = jax.random.key(0), params, tx.init(params), batch
    assert temp_bytes(jax.jit(grad_fn).lower(*args)) < 1.05 * params.size * (4 + width)


def test_the_clip_acts_before_the_product(key):
    """ĝ is cut to norm 1e-3, so ĥ is cut by the same factor, sample by sample."""
    clip = optax.clip_by_global_norm(1e-3)
    grad_fn = ivon_jax.value_and_grad(loss_fn, grad_transform=clip)
    _, free = ivon_jax.value_and_grad(loss_fn)(key, PARAMS, STATE, BATCH)
    _, cut = grad_fn(key, PARAMS, STATE, BATCH)
    factor = 1e-3 / jnp.linalg.norm(flat(free.grad))
    expected = [jax.tree.map(lambda x: factor * x, tree) for tree in free]
    chex.assert_trees_all_close(list(cut), expected, rtol=1e-4)


def test_the_clip_acts_on_each_sampled_gradient(key):
    """Then the mean of clipped gradients is shorter than the clip radius."""
    clip = optax.clip_by_global_norm(1e-3)
    options = {"mc_samples": 3, "microbatches": 2, "grad_transform": clip}
    _, estimate = ivon_jax.value_and_grad(loss_fn, **options)(key, PARAMS, STATE, BATCH)
    norms = []
    for batch, keys in zip(
        (BATCH[0::2], BATCH[1::2]), jax.random.split(key, 2), strict=True
    ):
        for sample_key in jax.random.split(keys, 3):
            theta = ivon_jax.sample(sample_key, PARAMS, STATE)
            norms.append(clip.update(jax.grad(loss_fn)(theta, batch), None)[0])
    expected = jax.tree.map(lambda *grads: sum(grads) / 6, *norms)
    chex.assert_trees_all_close(estimate.grad, expected, rtol=1e-4, atol=1e-9)
    assert jnp.linalg.norm(flat(estimate.grad)) < 0.99e-3


def test_squared_gradient_is_the_square_of_the_minibatch_gradient(key):
    options = {"hess_estimator": "squared_gradient", "microbatches": 2}
    _, estimate = ivon_jax.value_and_grad(loss_fn, **options)(key, PARAMS, STATE, BATCH)
    squares = []
    for j, sample_key in enumerate(jax.random.split(key, 2)):
        theta = ivon_jax.sample(sample_key, PARAMS, STATE)
        grads = jax.grad(loss_fn)(theta, BATCH[j::2])
        squares.append(jax.tree.map(jnp.square, grads))
    expected = jax.tree.map(lambda x, y: (x + y) / 2, *squares)
    chex.assert_trees_all_close(estimate.hess, expected, rtol=1e-5)


def test_gauss_newton_is_the_mean_of_squared_gradients_of_single_examples(key):
    options = {"hess_estimator": "gauss_newton"}
    _, estimate = ivon_jax.value_and_grad(loss_fn, **options)(key, PARAMS, STATE, BATCH)
    theta = ivon_jax.sample(key, PARAMS, STATE)
    grads = [jax.grad(loss_fn)(theta, x[None]) for x in BATCH]
    expected = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / len(gs), *grads)
    chex.assert_trees_all_close(estimate.hess, expected, rtol=1e-5)


LOW_PRECISION = [
    (jnp.bfloat16, None),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32),
]


@pytest.mark.statistical
@pytest.mark.parametrize(("dtype", "compute_dtype"), LOW_PRECISION)
def test_low_precision_does_not_bias_the_hessian(dtype, compute_dtype, key):
    """bfloat16 rounds theta - m by up to half of sigma; h_hat has the noise itself.

    With the rounded perturbation the mean would be 8 % too high.
    """
    params = jnp.full(4, 1.0, dtype)
    spacing = 2.0**-7
    tx = ivon_jax.ivon(0.1, ess=1.0, hess_init=spacing**-2, weight_decay=0.0)
    opt_state = tx.init(params)

    def quadratic(theta):
        return jnp.sum((theta.astype(jnp.float32) - 1.0) ** 2)

    def hess(key):
        grad_fn = ivon_jax.value_and_grad(quadratic, compute_dtype=compute_dtype)
        return grad_fn(key, params, opt_state)[1].hess

    draws = jax.jit(jax.vmap(hess))(jax.random.split(key, 20_000))
    assert draws.dtype == jnp.float32
    assert_mean(draws, 2.0)


@pytest.mark.parametrize("raw", [False, True])
def test_theta_is_rounded_and_its_noise_is_not(raw, key):
    """The loss sees bfloat16 of the usual draw; gradients come back in float32."""
    key = jax.random.key_data(key) if raw else key
    dtypes = []

    def loss(theta, x):
        dtypes.extend(leaf.dtype for leaf in jax.tree.leaves(theta))
        return loss_fn(optax.tree.cast(theta, jnp.float32), x)

    grad_fn = ivon_jax.value_and_grad(loss, compute_dtype=jnp.bfloat16)
    _, estimate = grad_fn(key, PARAMS, STATE, BATCH)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    theta = ivon_jax.sample(key, PARAMS, STATE)
    rounded = optax.tree.cast(theta, jnp.bfloat16)
    grads = optax.tree.cast(jax.grad(loss)(rounded, BATCH), jnp.float32)
    chex.assert_trees_all_equal(estimate.grad, grads, strict=True)
    chex.assert_trees_all_equal_dtypes(estimate.grad, grads)  # Chex widens bfloat16
    precision = ivon_jax.posterior(PARAMS, STATE).precision
    expected = jax.tree.map(
        lambda g, t, m, p: g * (t - m) * p, grads, theta, PARAMS, precision
    )
    chex.assert_trees_all_close(estimate.hess, expected, rtol=1e-4)


def test_noise_that_is_drawn_again_takes_no_memory():
    """Temporaries are the rounded theta, which the backward pass keeps, and no more."""
    params, x = jnp.ones((500, 500)), jnp.ones((4, 500), jnp.bfloat16)
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x: jnp.mean(jnp.sin(x @ theta).astype(jnp.float32)),
        compute_dtype=jnp.bfloat16,
    )
    args = jax.random.key(0), params, ivon_jax.ivon(0.1, ess=20).init(params), x
    memory = jax.jit(grad_fn).lower(*args).compile(AS_USERS_DO).memory_analysis()
    kept = 0.6 if jax.__version_info__ >= (0, 10) else 1.1  # XLA kept more before
    assert memory.temp_size_in_bytes < kept * params.nbytes


def test_theta_of_the_second_draw_is_nan_only_where_the_loss_is(key):
    """A loss that is not a number changes the key, and its gradient is no number."""
    grad_fn = ivon_jax.value_and_grad(
        lambda theta: jnp.sum(theta["a"] * jnp.nan).astype(jnp.float32),
        compute_dtype=jnp.bfloat16,
    )
    _, estimate = grad_fn(key, PARAMS, STATE)
    assert jnp.isnan(estimate.hess["a"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_loss_sees_the_compute_dtype(dtype, key):
    seen = []

    def loss_fn(theta):
        seen.append(theta.dtype)
        return jnp.sum(theta.astype(jnp.float32) ** 2)

    params = jnp.ones(3)
    grad_fn = ivon_jax.value_and_grad(loss_fn, compute_dtype=dtype)
    grad_fn(key, params, ivon_jax.ivon(0.1, ess=10).init(params))
    assert set(seen) == {jnp.dtype(dtype)}


@pytest.mark.parametrize("value", [jnp.int32, "wide", 16])
def test_compute_dtype_must_be_a_float(value):
    message = "`compute_dtype` must be a floating-point dtype such as `jnp.bfloat16`, "
    with pytest.raises(TypeError, match=re.escape(f"{message}got {value!r}.")):
        ivon_jax.value_and_grad(loss_fn, compute_dtype=value)


@pytest.mark.parametrize("field", ["hess", "grad"])
def test_estimates_are_summed_in_the_dtype_asked_for(field, key):
    """Each summand is rounded to 2**-8 of itself; those of the other field are not."""

    def over_axis(**options):
        grad_fn = ivon_jax.value_and_grad(loss_fn, axis_name="data", **options)
        in_axes = (None, None, None, 0)
        return jax.vmap(grad_fn, in_axes, axis_name="data")

    args = key, PARAMS, STATE, BATCH.reshape(4, 3, 5)
    low = over_axis(**{f"{field}_reduce_dtype": jnp.bfloat16})
    _, exact = over_axis()(*args)
    _, result = low(*args)
    [other] = {"hess", "grad"} - {field}
    chex.assert_trees_all_equal(getattr(result, other), getattr(exact, other))
    rounded, whole = getattr(result, field), getattr(exact, field)
    scale = np.max([jnp.abs(x).max() for x in jax.tree.leaves(whole)])
    chex.assert_trees_all_close(rounded, whole, atol=20 * scale * 2.0**-8)
    assert any(
        bool((x != y).any())
        for x, y in zip(*map(jax.tree.leaves, (rounded, whole)), strict=True)
    )
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["hess_reduce_dtype", "grad_reduce_dtype"])
def test_a_reduction_needs_an_axis(name):
    message = f"`{name}` needs `axis_name`, the axis to reduce over."
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.value_and_grad(loss_fn, **{name: jnp.bfloat16})


@pytest.mark.parametrize("options", [{"mc_samples": 2}, {"microbatches": 2}])
def test_python_numbers_are_aux(options, key):
    """They come back as arrays, as from `jax.jit`."""

    def loss(theta, x):
        return loss_fn(theta, x), {"count": 3, "rate": 0.5}

    grad_fn = ivon_jax.value_and_grad(loss, has_aux=True, **options)
    (_, aux), _ = grad_fn(key, PARAMS, STATE, BATCH)
    assert aux == {"count": 3, "rate": 0.5}


@pytest.mark.parametrize(
    "options", [{}, {"mc_samples": 2}, {"axis_name": "data"}], ids=str
)
@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
def test_parameters_may_be_numbers(options, compute_dtype, key):
    """They give what arrays do, a point mass among them."""
    tx = optax.masked(ivon_jax.ivon(0.1, ess=20), {"a": True, "b": True, "c": False})
    numbers = {"a": 0.5, "b": jnp.ones(2), "c": 2.0}

    def loss(theta, x):
        scale = jnp.mean(x).astype(theta["b"].dtype)
        return theta["c"] * jnp.sum(theta["b"] ** 2) * theta["a"] * scale

    grad_fn = ivon_jax.value_and_grad(loss, compute_dtype=compute_dtype, **options)

    def estimate(params, x):
        return grad_fn(key, params, tx.init(params), x)

    def run(params):
        estimate_of = functools.partial(estimate, params)
        if "axis_name" in options:
            mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
            specs = {"in_specs": P("data"), "out_specs": P()}
            estimate_of = jax.jit(jax.shard_map(estimate_of, mesh=mesh, **specs))
        return estimate_of(jnp.ones(4))

    arrays = jax.tree.map(jnp.asarray, numbers)
    chex.assert_trees_all_close(run(numbers), run(arrays))
    chex.assert_trees_all_close(
        *(ivon_jax.sample(key, p, tx.init(p)) for p in (numbers, arrays))
    )


def test_point_masses_have_a_gradient_and_no_hessian(key):
    """What Adam trains is not sampled, and its gradient is averaged as the others'."""
    tx = optax.partition(
        {"bayes": ivon_jax.ivon(0.1, ess=20), "point": optax.sgd(0.1)},
        {"a": "bayes", "b": "point"},
    )
    opt_state = tx.init(PARAMS)
    grad_fn = ivon_jax.value_and_grad(loss_fn, mc_samples=2)
    _, estimate = grad_fn(key, PARAMS, opt_state, BATCH)
    assert estimate.hess["b"] is None
    updates, _ = tx.update(estimate.grad, opt_state, PARAMS, hess=estimate.hess)
    chex.assert_trees_all_close(updates["b"], -0.1 * estimate.grad["b"])


def test_scalars_and_other_objects_reach_every_slice(key):
    """A dropout key, a flag, None: what has no axis is not cut."""

    def loss(theta, batch, scale, dropout_key, options):
        assert options == {"training": True, "mask": None}
        jax.random.bits(dropout_key)
        return scale * loss_fn(theta, batch)

    options = {"training": True, "mask": None}
    grad_fn = ivon_jax.value_and_grad(loss, microbatches=3)
    grad_fn(key, PARAMS, STATE, BATCH, 2.0, jax.random.key(0), options)


def test_an_axis_of_devices_is_so_many_samples(key):
    """By vmap here: the mean over the axis of what each folded key gives."""
    grad_fn = ivon_jax.value_and_grad(loss_fn, axis_name="data")
    mapped = jax.vmap(
        lambda batch: grad_fn(key, PARAMS, STATE, batch), axis_name="data"
    )(BATCH.reshape(4, 3, 5))
    alone = ivon_jax.value_and_grad(loss_fn)
    parts = [
        alone(jax.random.fold_in(key, i), PARAMS, STATE, BATCH[3 * i : 3 * i + 3])
        for i in range(4)
    ]
    expected = jax.tree.map(lambda *xs: sum(xs) / 4, *parts)
    for i in range(4):
        replica = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(replica, expected, rtol=1e-4, atol=1e-5)


BAD_OPTIONS = [
    ({"mc_samples": 0}, ValueError, "`mc_samples` must be at least 1, got 0."),
    ({"mc_samples": 2.0}, TypeError, "`mc_samples` must be an integer, got 2.0."),
    ({"microbatches": -1}, ValueError, "`microbatches` must be at least 1, got -1."),
    ({"vectorize": 1}, TypeError, "`vectorize` must be True or False, got 1."),
    ({"has_aux": "no"}, TypeError, "`has_aux` must be True or False, got 'no'."),
    (
        {"hess_estimator": "hutchinsn"},
        ValueError,
        '`hess_estimator` must be "reparameterization" or "squared_gradient" or '
        "\"gauss_newton\", got 'hutchinsn'.",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_a_bad_option_is_named(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ivon_jax.value_and_grad(loss_fn, **options)


def per_example(theta, batch):
    return jnp.sum((flat(theta)[None] - batch) ** 2, axis=1)


def pair(theta, batch):
    return loss_fn(theta, batch), batch


BAD_CALLS = {
    "vector_loss": (per_example, {}, ValueError, "scalar, the mean loss per example"),
    "pair": (pair, {}, TypeError, "got tuple. Pass `has_aux=True`"),
    "no_pair": (loss_fn, {"has_aux": True}, TypeError, "must return (loss, aux) with"),
    "nothing": (lambda *_: None, {}, TypeError, "got None. Does it return its result?"),
    "integer": (
        lambda theta, x: jnp.int32(loss_fn(theta, x)),
        {},
        TypeError,
        "`loss_fn` must return a real floating-point scalar, got dtype int32.",
    ),
    "complex": (
        lambda theta, x: jnp.complex64(loss_fn(theta, x)),
        {},
        TypeError,
        "`loss_fn` must return a real floating-point scalar, got dtype complex64.",
    ),
    "indivisible": (
        loss_fn,
        {"microbatches": 5},
        ValueError,
        "`microbatches` must divide the first axis of every array in `args`, got 5 for "
        "an array of shape (12, 5).",
    ),
    "stateful": (
        loss_fn,
        {"grad_transform": optax.trace(0.9)},
        ValueError,
        "`grad_transform` must be stateless",
    ),
    "no_transform": (
        loss_fn,
        {"grad_transform": 1.0},
        TypeError,
        "`grad_transform` must be an optax transformation",
    ),
    "unbound": (
        loss_fn,
        {"axis_name": "data"},
        ValueError,
        "`axis_name` must be bound by a map around the call, got 'data'.",
    ),
}


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS
)
def test_a_bad_call_says_what_to_do(loss, options, error, message):
    grad_fn = ivon_jax.value_and_grad(loss, **options)
    with pytest.raises(error, match=re.escape(message)):
        grad_fn(jax.random.key(0), PARAMS, STATE, BATCH)


def test_microbatches_without_a_batch_say_so(key):
    grad_fn = ivon_jax.value_and_grad(
        lambda theta: loss_fn(theta, BATCH), microbatches=2
    )
    message = "`microbatches` needs a batch to cut into 2, got no array"
    with pytest.raises(ValueError, match=re.escape(message)):
        grad_fn(key, PARAMS, STATE)


def test_gauss_newton_needs_one_batch_size(key):
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x, _: loss_fn(theta, x), hess_estimator="gauss_newton"
    )
    with pytest.raises(ValueError, match=r"got 12 at args\[0\] and 3 at args\[1\]"):
        grad_fn(key, PARAMS, STATE, BATCH, jnp.ones(3))


@pytest.mark.parametrize("weights", [{"w": jnp.ones(10)}, {"w": np.ones((24, 1))}])
def test_what_is_no_batch_is_not_cut(weights):
    """Neither a length that `microbatches` divides, nor another one."""
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x, **_: loss_fn(theta, x), microbatches=2
    )
    length = len(weights["w"])
    message = (
        "`microbatches` needs one batch, whose arrays have first axes of one length, "
        f"got 12 at args[0] and {length} at weights['w']. Let `loss_fn` close over "
        "arrays that are not batches, such as class weights."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        grad_fn(jax.random.key(0), PARAMS, STATE, BATCH, weights=weights)


def test_an_empty_batch_is_an_error():
    grad_fn = ivon_jax.value_and_grad(loss_fn, microbatches=2)
    message = "`microbatches` needs at least one example, got none at args[0]."
    with pytest.raises(ValueError, match=re.escape(message)):
        grad_fn(jax.random.key(0), PARAMS, STATE, BATCH[:0])


DRAWS = {
    "samples": ({"mc_samples": 3}, 3),
    "side_by_side": ({"mc_samples": 3, "vectorize": True}, 3),
    "microbatches": ({"microbatches": 4}, 4),
    "both": ({"mc_samples": 2, "microbatches": 2}, 4),
    "examples": ({"hess_estimator": "gauss_newton"}, 13),
    "devices": ({"axis_name": "data"}, 2),
}


@pytest.mark.parametrize(("options", "count"), DRAWS.values(), ids=DRAWS)
def test_random_keys_are_new_at_every_draw(options, count):
    """In a tree, and one for each example; jax's checker finds none used twice."""
    seen = []

    def loss(theta, batch, rngs):
        data = jax.random.key_data(rngs["dropout"])
        jax.debug.callback(lambda x: seen.append(x.tobytes()), data)
        each = jax.vmap(jax.random.bits)(rngs["each"])
        jax.debug.callback(lambda x: seen.extend(map(bytes, x[:, None])), each)
        return loss_fn(theta, batch)

    axes = (None, None, None, 0, {"dropout": None, "each": 0})
    grad_fn = ivon_jax.value_and_grad(loss, **options)
    rngs = {
        "dropout": jax.random.key(5),
        "each": jax.random.split(jax.random.key(6), 12),
    }
    args = jax.random.key(0), PARAMS, STATE, BATCH, rngs
    rows = 12 * options.get("mc_samples", 1)
    if "axis_name" in options:
        grad_fn = jax.vmap(grad_fn, axes, axis_name="data")
        halves = [x.reshape(2, 6, *x.shape[1:]) for x in (BATCH, rngs["each"])]
        args = *args[:3], halves[0], rngs | {"each": halves[1]}
    if "hess_estimator" in options:
        rows += 12
    with jax.debug_key_reuse(True):
        jax.jit(grad_fn)(*args)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == count + rows


@pytest.mark.parametrize("estimator", ["reparameterization", "gauss_newton"])
def test_one_draw_has_the_key_itself(estimator, key):
    """As without `value_and_grad`, so that adding it changes no result."""

    def loss(theta, batch, dropout):
        return loss_fn(theta, batch), jax.random.key_data(dropout)

    grad_fn = ivon_jax.value_and_grad(loss, True, hess_estimator=estimator)
    (_, data), _ = grad_fn(key, PARAMS, STATE, BATCH, jax.random.key(5))
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(5)))


@pytest.mark.parametrize("options", [options for options, _ in DRAWS.values()])
def test_a_legacy_key_is_not_taken_for_a_batch(options):
    """It looks like a batch of two; with one draw of the whole batch it may pass."""

    def loss(theta, batch, rngs):
        return loss_fn(theta, batch) + 0.0 * jax.random.normal(rngs["dropout"])

    args = PARAMS, STATE, BATCH, {"dropout": jax.random.PRNGKey(0)}
    ivon_jax.value_and_grad(loss)(jax.random.key(0), *args)
    message = (
        "got uint32 of shape (2,) at args[1]['dropout'], which may be a legacy key"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        ivon_jax.value_and_grad(loss, **options)(jax.random.key(0), *args)


@pytest.mark.parametrize(
    "options",
    [{"mc_samples": 2}, {"microbatches": 2}, {"mc_samples": 2, "vectorize": True}],
)
def test_keys_are_aux(options, key):
    """Such as the random state of a network with dropout: the last one stays."""

    def loss(theta, batch, dropout):
        jax.random.bits(dropout)
        return loss_fn(theta, batch), {"rngs": jax.random.clone(dropout)}

    grad_fn = ivon_jax.value_and_grad(loss, True, **options)
    with jax.debug_key_reuse(True):
        (_, aux), _ = jax.jit(grad_fn)(key, PARAMS, STATE, BATCH, jax.random.key(5))
    expected = jax.random.fold_in(jax.random.key(5), 1)
    assert aux["rngs"] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"compute_dtype": jnp.bfloat16},
        {"compute_dtype": jnp.bfloat16, "mc_samples": 2, "microbatches": 2},
    ],
)
def test_the_noise_that_is_drawn_again_passes_the_checker_of_keys(options):
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x: loss_fn(optax.tree.cast(theta, jnp.float32), x), **options
    )
    with jax.debug_key_reuse(True):
        jax.jit(jax.vmap(grad_fn, (0, None, None, None)))(
            jax.random.split(jax.random.key(0), 2), PARAMS, STATE, BATCH
        )


def test_the_recipe_for_token_means_is_exact():
    """Rows of 1 to 12 tokens: gradient, and the Hessian of a quadratic, of them all."""
    tokens, k = jnp.arange(12)[:, None] >= jnp.arange(12)[None], 3
    mask = tokens.astype(jnp.float32)

    def losses(theta, x):
        residual = flat(theta)[None] - x
        return 0.5 * jnp.sum((residual @ HESSIAN) * residual, axis=1)[:, None]

    def mean_of_tokens(theta):
        return jnp.sum(losses(theta, BATCH) * mask) / jnp.sum(mask)

    def sum_of_tokens(theta, x, mask, scale):
        return scale * jnp.sum(losses(theta, x) * mask)

    opt_state = ivon_jax.ivon(0.1, ess=1e18).init(PARAMS)
    grad_fn = ivon_jax.value_and_grad(sum_of_tokens, microbatches=k)
    args = PARAMS, opt_state, BATCH, mask, k / jnp.sum(mask)
    loss, estimate = grad_fn(jax.random.key(0), *args)
    expected = jax.value_and_grad(mean_of_tokens)(PARAMS)
    chex.assert_trees_all_close((loss, estimate.grad), expected, rtol=1e-5)
    draw = jax.jit(jax.vmap(lambda k: grad_fn(k, PARAMS, STATE, *args[2:])[1].hess))
    hess = draw(jax.random.split(jax.random.key(1), REPEATS))
    for name in PARAMS:
        assert_mean(hess[name], DIAGONAL[name])


INTEGERS = {"steps": jnp.arange(3), "on": jnp.array([True, False])}


@pytest.mark.parametrize(
    "options",
    [
        {"compute_dtype": jnp.bfloat16},
        {"mc_samples": 2, "grad_transform": optax.clip(1.0)},
    ],
)
def test_integers_pass_through(options, key):
    """Left out with `optax.masked`, as `init` advises: no gradient, no update."""
    params = PARAMS | INTEGERS
    tx = optax.masked(TX, {name: name in PARAMS for name in params})
    opt_state = tx.init(params)

    def loss(theta, x):
        for name, expected in INTEGERS.items():
            assert theta[name].dtype == expected.dtype
        theta = optax.tree.cast({k: theta[k] for k in PARAMS}, jnp.float32)
        return loss_fn(theta, x)

    grad_fn = ivon_jax.value_and_grad(loss, **options)
    _, estimate = grad_fn(key, params, opt_state, BATCH)
    updates, _ = tx.update(estimate.grad, opt_state, params, hess=estimate.hess)
    after = optax.apply_updates(params, updates)
    for name, x in INTEGERS.items():
        assert estimate.hess[name] is None
        np.testing.assert_array_equal(after[name], x, strict=True)
    assert not np.array_equal(after["a"], PARAMS["a"])


def test_arguments_may_have_names(key):
    """As for `jax.value_and_grad`; they are cut like the others."""
    grad_fn = ivon_jax.value_and_grad(loss_fn, microbatches=3)
    named = grad_fn(key, PARAMS, STATE, batch=BATCH)
    chex.assert_trees_all_equal(named, grad_fn(key, PARAMS, STATE, BATCH))


@pytest.mark.parametrize("bad_key", [None, 0, jnp.float32(0), "seed"])
def test_a_bad_key_is_named(bad_key):
    grad_fn = ivon_jax.value_and_grad(loss_fn)
    with pytest.raises(TypeError, match=r"`key` must be (a|one) JAX random key, got"):
        grad_fn(bad_key, PARAMS, STATE, BATCH)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["reparameterization", "gauss_newton"])
def test_float32_parameters_stay_float32_under_x64(estimator, key):
    """With samples and micro-batches; ess and the loss are float64."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    opt_state = TX.init(params)
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x: loss_fn(theta, x).astype(jnp.float64),
        mc_samples=2,
        microbatches=2,
        hess_estimator=estimator,
    )
    loss, estimate = jax.jit(grad_fn)(key, params, opt_state, BATCH)
    assert loss.dtype == jnp.float64
    assert {x.dtype for x in jax.tree.leaves(estimate)} == {jnp.dtype(jnp.float32)}


def test_no_ivon_in_the_state_is_an_error(key):
    grad_fn = ivon_jax.value_and_grad(loss_fn)
    with pytest.raises(ValueError, match="`opt_state` must contain the state of"):
        grad_fn(key, PARAMS, optax.sgd(0.1).init(PARAMS), BATCH)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_slices_that_the_devices_of_an_explicit_mesh_cannot_share(microbatches):
    """Four rows, or one, on eight devices; abstract devices will do for types."""
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=kinds)
    spec = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
    tx, params = ivon_jax.ivon(0.1, ess=10), jnp.ones(4)
    opt_state, key = tx.init(params), jax.random.key(0)
    grad_fn = ivon_jax.value_and_grad(
        lambda theta, x: jnp.mean((x @ theta) ** 2), microbatches=microbatches
    )
    with jax.sharding.use_abstract_mesh(mesh):
        _, estimate = jax.eval_shape(lambda x: grad_fn(key, params, opt_state, x), x)
    assert estimate.grad.shape == params.shape
