"""The Gaussian's algebra, against NumPy in float64, and its way to disk and back."""

import re

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from statistical import assert_mean, assert_moved

import ivon_jax

RNG = np.random.default_rng(0)
MEAN = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
PRECISION = {"w": RNG.uniform(1, 9, size=(3, 2)), "b": RNG.uniform(1, 9, size=2)}


def gaussian(mean=MEAN, precision=PRECISION):
    return ivon_jax.Posterior(*jax.tree.map(jnp.asarray, (mean, precision)))


@pytest.mark.usefixtures("x64")
def test_natural_parameters_of_a_product_of_gaussians_add_up():
    """The product of N(m, 1/s) and N(n, 1/t) is N((sm + tn)/(s + t), 1/(s + t))."""
    q = gaussian()
    other = gaussian(jax.tree.map(lambda m: m + 1, MEAN))
    total = jax.tree.map(jnp.add, q.natural_parameters, other.natural_parameters)
    product = ivon_jax.Posterior.from_natural_parameters(total)
    for name in MEAN:
        np.testing.assert_allclose(product.mean[name], MEAN[name] + 0.5, rtol=1e-12)
        expected = 2 * PRECISION[name]
        np.testing.assert_allclose(product.precision[name], expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_natural_parameters_and_back_is_the_same_gaussian():
    """And in between, exp(linear x + quadratic x^2) is its density but for a factor."""
    q = gaussian()
    natural = q.natural_parameters
    for name in MEAN:
        sigma2 = 1 / PRECISION[name]
        np.testing.assert_allclose(natural.linear[name], MEAN[name] / sigma2)
        np.testing.assert_allclose(natural.quadratic[name], -1 / (2 * sigma2))
    back = ivon_jax.Posterior.from_natural_parameters(natural)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-14), back, q)


NATURAL = {
    "as they are": lambda a, _: a,
    "a square": lambda a, _: jax.tree.map(jnp.add, a, a),
    "a product": lambda a, b: jax.tree.map(jnp.add, a, b),
    "a power": lambda a, _: jax.tree.map(lambda x: 0.3 * x, a),
    "posteriors over priors": lambda a, b: jax.tree.map(
        lambda x, y: x + x + x - 2.0 * y, a, b
    ),
    "field by field": lambda a, b: ivon_jax.NaturalParameters(
        jax.tree.map(jnp.add, a.linear, b.linear),
        jax.tree.map(jnp.add, a.quadratic, b.quadratic),
    ),
}


@pytest.mark.parametrize("combine", NATURAL.values(), ids=NATURAL)
def test_no_combination_of_natural_parameters_moves_a_point_mass(combine):
    """Nor of frozen weights, in any dtype; what is no parameter stays None."""
    mean = {
        "w": jnp.ones(2),
        "frozen": jnp.array([1.7, -3.1], jnp.bfloat16),
        "bias": None,
    }
    precision = {"w": jnp.full(2, 8.0), "frozen": None, "bias": None}
    q = ivon_jax.Posterior(mean, precision)
    prior = q._replace(precision=precision | {"w": jnp.full(2, 2.0)})
    natural = combine(q.natural_parameters, prior.natural_parameters)
    for run in (lambda f: f, jax.jit):
        back = run(ivon_jax.Posterior.from_natural_parameters)(natural)
        assert back.precision["frozen"] is None
        assert back.mean["bias"] is None
        frozen = np.float64(mean["frozen"])
        np.testing.assert_allclose(back.mean["frozen"], frozen, rtol=1e-6)
        np.testing.assert_allclose(back.mean["w"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, bool])
def test_natural_parameters_keep_integers(dtype):
    """Sums do not wrap: a uint8 of 200, twice."""
    value = jnp.array([100, 0]).astype(dtype)
    q = ivon_jax.Posterior({"n": value}, {"n": None})
    product = jax.tree.map(jnp.add, q.natural_parameters, q.natural_parameters)
    back = ivon_jax.Posterior.from_natural_parameters(product)
    np.testing.assert_array_equal(back.mean["n"], value)


@pytest.mark.parametrize("value", [1.5, 3])
def test_a_point_mass_may_be_a_number(value):
    """And so may be the sum of two."""
    q = ivon_jax.Posterior({"n": value}, {"n": None})
    two = {"n": ivon_jax.PointMass(jnp.array(2.0))}
    for natural in (
        q.natural_parameters,
        ivon_jax.NaturalParameters({"n": 2 * value}, two),
    ):
        back = ivon_jax.Posterior.from_natural_parameters(natural)
        np.testing.assert_array_equal(back.mean["n"], value)


def test_a_point_mass_that_was_taken_out_is_an_error():
    natural = gaussian(precision={"w": None, "b": None}).natural_parameters
    none = jax.tree.map(jnp.subtract, natural, natural)
    message = "`natural.quadratic` must have point masses of positive weight, got 0.0"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.Posterior.from_natural_parameters(none)
    natural = natural._replace(quadratic={"w": None, "b": None})
    message = "`natural.quadratic` must be an array or an `ivon_jax.PointMass`, got N"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.Posterior.from_natural_parameters(natural)


def test_more_taken_out_than_was_there_is_an_error():
    q = gaussian()
    natural = jax.tree.map(lambda x, y: x - 2 * y, *[q.natural_parameters] * 2)
    with pytest.raises(ValueError, match=r"`natural\.quadratic` must be negative"):
        ivon_jax.Posterior.from_natural_parameters(natural)
    natural = q.natural_parameters._replace(quadratic={"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"must have the tree structure of `natural\.linear`"
    ):
        ivon_jax.Posterior.from_natural_parameters(natural)


def test_a_posterior_at_another_ess_is_a_tempered_one():
    """Both scale the precision, ess (h + delta), of one and the same state."""
    params = jnp.ones(3)
    posteriors = []
    for ess in (1000, 10):
        opt_state = ivon_jax.ivon(0.1, ess=ess, hess_init=0.3).init(params)
        posteriors.append(ivon_jax.posterior(params, opt_state))
    tempered = posteriors[0].tempered(1000 / 10)
    np.testing.assert_allclose(tempered.precision, posteriors[1].precision, rtol=1e-6)


def test_temperature_scales_the_log_density():
    """log q^(1/T) is that of the tempered Gaussian but for a constant."""
    q, x = gaussian(), jax.tree.map(lambda m: jnp.asarray(m) + 0.3, MEAN)
    y = jax.tree.map(lambda m: jnp.asarray(m) - 0.7, MEAN)
    expected = (q.log_prob(x) - q.log_prob(y)) / 4.0
    tempered = q.tempered(4.0)
    actual = tempered.log_prob(x) - tempered.log_prob(y)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


MASKS = {
    "tree": {"w": False, "b": True},
    "function": lambda mean: jax.tree.map(lambda x: x.ndim == 1, mean),
}


@pytest.mark.statistical
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_restricted_samples_move_what_the_mask_has_alone(mask, key):
    q = gaussian()
    theta = q.restricted(mask).sample(key)
    np.testing.assert_array_equal(theta["w"], q.mean["w"])
    assert_moved(theta["b"], q.mean["b"])


def test_restricted_takes_a_prefix_and_keeps_point_masses():
    q = ivon_jax.Posterior(
        {"body": MEAN, "head": MEAN},
        {"body": PRECISION, "head": {"w": PRECISION["w"], "b": None}},
    )
    restricted = q.restricted({"body": False, "head": True}).precision
    assert restricted["body"] == {"w": None, "b": None}
    assert restricted["head"]["b"] is None
    np.testing.assert_array_equal(restricted["head"]["w"], PRECISION["w"])


def test_isotropic_is_a_point_mass_where_no_gaussian_can_be():
    q = ivon_jax.Posterior.isotropic({"w": jnp.ones(2, jnp.bfloat16), "n": 3}, 4.0)
    assert q.precision["n"] is None
    assert q.precision["w"].dtype == jnp.float32
    np.testing.assert_array_equal(q.stddev["w"], 0.5)


BAD = {
    "temperature": lambda q: q.tempered(0.0),
    "precision": lambda q: ivon_jax.Posterior.isotropic(q.mean, -1.0),
}


@pytest.mark.parametrize("name", BAD)
def test_scales_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got"):
        BAD[name](gaussian())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            {"w": 1.0, "b": True},
            TypeError,
            "`mask` must have leaves True or False, got",
        ),
        (
            {"v": True},
            ValueError,
            "`mask` must be a tree prefix of the posterior's mean",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error(mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gaussian().restricted(mask)


@jax.tree_util.register_pytree_node_class
class Layer:
    """A pytree that can be called, as an Equinox module."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        return x @ self.w + self.b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_mask_that_can_be_called_is_a_tree_like_the_mean_all_the_same():
    layer = Layer(jnp.ones((2, 2)), jnp.ones(2))
    q = ivon_jax.Posterior.isotropic(layer, 4.0)
    assert q.restricted(Layer(False, True)).precision.w is None
    np.testing.assert_array_equal(q.restricted(Layer(False, True)).precision.b, 4.0)
    nested = ivon_jax.Posterior.isotropic({"a": layer, "b": layer}, 4.0)
    restricted = nested.restricted({"a": Layer(True, False), "b": False}).precision
    assert restricted["a"].b is restricted["b"].w is None
    of_mean = jax.tree_util.Partial(lambda on, _: Layer(on, False), True)
    assert q.restricted(of_mean).precision.b is None
    with pytest.raises(TypeError, match="`mask` must have leaves True or False, got"):
        q.restricted(layer)


POSTERIORS = {
    "gaussian": lambda: gaussian(),
    "point mass": lambda: gaussian(precision=PRECISION | {"b": None}),
    "mixture": lambda: ivon_jax.Mixture([gaussian(), gaussian()]),
}


@pytest.mark.parametrize("make", POSTERIORS.values(), ids=POSTERIORS)
def test_msgpack_gives_the_same_bits_back(make):
    q = make()
    restored = flax.serialization.from_bytes(q, flax.serialization.to_bytes(q))
    assert jax.tree.structure(restored) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, restored, q)


@pytest.mark.parametrize("make", POSTERIORS.values(), ids=POSTERIORS)
def test_orbax_gives_the_same_bits_back(make, tmp_path):
    q = make()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", q)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "q", q)
    assert jax.tree.structure(restored) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, restored, q)


def test_natural_parameters_may_be_numpys():
    q = ivon_jax.Posterior.from_natural_parameters(
        ivon_jax.NaturalParameters(np.ones(2), np.float32([-1, -2]))
    )
    np.testing.assert_allclose(q.precision, [2, 4])


def exact_divergence(m, s, m0, s0):
    """In float64, r - log(1 + r) by its series where that cancels."""
    m, s, m0, s0 = (np.float64(x) for x in (m, s, m0, s0))
    r = (s0 - s) / s
    small = np.abs(r) < 1e-3
    series = r**2 / 2 - r**3 / 3 + r**4 / 4 - r**5 / 5
    log = np.log(np.where(small, 1.0, s0)) - np.log(np.where(small, 1.0, s))
    return 0.5 * np.sum(np.where(small, series, r - log) + s0 * (m - m0) ** 2)


RATIOS = {
    "far": np.logspace(-12, 12, 97),
    "beyond": np.array([1e-33, 1e-30, 1e-20, 1e20, 1e30]),
    "near": 1 + np.append(np.logspace(-6, 0, 97), -np.logspace(-6, -1e-3, 97)),
}


@pytest.mark.parametrize("ratios", RATIOS.values(), ids=RATIOS)
def test_no_ratio_of_precisions_cancels_in_the_divergence(ratios):
    """Entry by entry in float32, to 1e-5 of the value in float64."""
    divergence = jax.jit(jax.vmap(lambda q, prior: q.kl_divergence(prior)))
    for precision in np.float32([1e-3, 1.0, 7e5]):
        prior = np.float32(precision * ratios)
        q = np.full_like(prior, precision)
        zero = np.zeros_like(q)
        expected = [exact_divergence(0, *x) for x in zip(q, zero, prior, strict=True)]
        actual = divergence(
            ivon_jax.Posterior(zero, q), ivon_jax.Posterior(zero, prior)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [1e-30, 1e-22, 1e-7, 1.0, 1e7, 1e20])
def test_no_shift_is_lost_in_the_divergence_or_the_density(shift):
    """Between means far apart, or neighbours; squares alone would leave float32."""
    precision = np.float32([1e-30, 1.0, 1e20])
    mean = np.zeros(3, np.float32)
    other = np.float32(mean + shift)
    q, prior = (ivon_jax.Posterior(m, precision) for m in (mean, other))
    expected = exact_divergence(mean, precision, other, precision)
    if 1e-37 < expected < 1e38:
        np.testing.assert_allclose(q.kl_divergence(prior), expected, rtol=1e-5)
        density = q.log_prob(mean) - q.log_prob(other)
        logs = np.abs(np.log(np.float64(precision) / (2 * np.pi))).sum()
        np.testing.assert_allclose(density, expected, rtol=1e-5, atol=1e-6 * logs)


def test_means_close_together_keep_their_distance():
    """Neighbours in float32, 1e-7 apart, at 1e14 times the precision of that."""
    mean = np.float32([1.0, -3.0, 1e4])
    prior_mean = np.nextafter(mean, np.float32(0))
    precision = np.full(3, 1e14, np.float32)
    q, prior = (ivon_jax.Posterior(m, precision) for m in (mean, prior_mean))
    expected = exact_divergence(mean, precision, prior_mean, precision)
    np.testing.assert_allclose(q.kl_divergence(prior), expected, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e-4, -1e-3, 0.1, -0.9, 1e6, 1e12])
def test_entropy_and_density_do_not_cancel_where_they_are_nearly_zero(offset):
    """Around the precisions 2 pi e and 2 pi, of entropy and log-density zero."""
    for constant, value in (
        (2 * np.pi * np.e, lambda q: -q.entropy()),
        (2 * np.pi, lambda q: q.log_prob(q.mean)),
    ):
        precision = np.full(3, constant * (1 + offset), np.float32)
        expected = 1.5 * np.log1p(np.float64(precision[0]) / constant - 1)
        q = ivon_jax.Posterior(np.zeros(3, np.float32), precision)
        np.testing.assert_allclose(value(q), expected, rtol=1e-5, atol=1e-14)


@pytest.mark.slow
def test_sums_over_many_entries_and_arrays_are_those_of_float64():
    """Ten arrays with 1e7 entries; the same value everywhere, which rounds alike."""
    x = np.full(10**6, 0.1, np.float32)
    leaf = np.full(10**6, 0.7, np.float32)
    q = ivon_jax.Posterior([x] * 10, [leaf] * 10)
    prior = ivon_jax.Posterior([0 * x] * 10, [np.float32(1e-9) * leaf] * 10)
    theta, p, p0 = (np.float64(a[0]) for a in (x, leaf, prior.precision[0]))
    expected = {
        "log_prob": 1e7 * 0.5 * (np.log(p / (2 * np.pi)) - p * theta**2),
        "entropy": 1e7 * 0.5 * (1 - np.log(p / (2 * np.pi))),
        "divergence": 1e7 * exact_divergence(theta, p, 0.0, p0),
    }
    actual = {
        "log_prob": q.log_prob(prior.mean),
        "entropy": q.entropy(),
        "divergence": q.kl_divergence(prior),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_float32_parameters_work_with_x64_and_means_in_double_precision():
    """Strictly promoted; what is in double precision is not rounded to single."""
    q = gaussian(*jax.tree.map(np.float32, (MEAN, PRECISION)))
    prior = gaussian()
    assert q.kl_divergence(q).dtype == q.entropy().dtype == jnp.float32
    expected = sum(
        exact_divergence(np.float32(MEAN[k]), np.float32(PRECISION[k]), MEAN[k], p)
        for k, p in PRECISION.items()
    )
    np.testing.assert_allclose(q.kl_divergence(prior), expected, rtol=1e-6)
    mean = 1.0 + 1e-12 * jnp.arange(3.0)
    mixed = ivon_jax.Posterior(mean, jnp.full(3, 1e24, jnp.float32))
    theta = mixed.sample(jax.random.key(0))
    assert theta.dtype == jnp.float64
    np.testing.assert_allclose(theta - mean, 0, atol=1e-11)
    assert np.all(theta != mean)
    assert ivon_jax.Mixture([q, q]).log_prob(q.mean).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_precision_in_few_bits_is_computed_with_in_float32(dtype):
    precision = jnp.full(300, 3).astype(dtype)
    q = ivon_jax.Posterior(jnp.ones(300), precision)
    wide = ivon_jax.Posterior(jnp.ones(300), jnp.full(300, 3.0))
    zeros = jnp.zeros(300)
    assert q.log_prob(zeros) == wide.log_prob(zeros)
    assert q.kl_divergence(wide) == 0.0
    np.testing.assert_array_equal(q.variance, wide.variance)
    key = jax.random.key(0)
    np.testing.assert_array_equal(q.sample(key), wide.sample(key))


METHODS = {
    "sample": lambda q: q.sample(jax.random.key(0)),
    "log_prob": lambda q: q.log_prob(q.mean),
    "entropy": lambda q: q.entropy(),
    "kl_divergence": lambda q: q.kl_divergence(q),
    "to another": lambda q: ivon_jax.Posterior.isotropic(q.mean, 1.0).kl_divergence(q),
    "variance": lambda q: q.variance,
    "stddev": lambda q: q.stddev,
    "tempered": lambda q: q.tempered(2.0).variance,
    "natural_parameters": lambda q: q.natural_parameters.linear,
    "restricted": lambda q: q.restricted(True).variance,
}
READERS = {
    "mixture": lambda q: ivon_jax.Mixture([q, q]).sample(jax.random.key(0)),
    "mixture's density": lambda q: ivon_jax.Mixture([q, q]).log_prob(q.mean),
    "predict": lambda q: ivon_jax.predict(lambda _: 1.0, q, jax.random.key(0), 2),
    "uncertainty": lambda q: ivon_jax.uncertainty(
        lambda _: jnp.full(2, 0.5), q, jax.random.key(0), 2
    ),
    "predict of a mixture": lambda q: ivon_jax.predict(
        lambda _: 1.0, ivon_jax.Mixture([q, q]), jax.random.key(0), 2
    ),
}


@pytest.mark.parametrize(
    "method", [*METHODS.values(), *READERS.values()], ids=[*METHODS, *READERS]
)
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_precision_that_is_none_is_an_error(method, bad):
    q = ivon_jax.Posterior({"w": jnp.ones(2)}, {"w": jnp.array([1.0, bad])})
    message = f"`precision` must be non-negative and finite, got {bad} at precision['w"
    with pytest.raises(ValueError, match=re.escape(message)):
        method(q)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"natural_parameters"}))
@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_precision_that_is_none_gives_nan_under_jit(method, bad):
    """Nothing finite: not a negative variance, not the divergence of two of them."""
    q = ivon_jax.Posterior(jnp.ones(2), jnp.array([1.0, bad]))
    result = np.asarray(jax.jit(METHODS[method])(q))
    assert np.isnan(result.ravel()[-1])


def test_a_flat_gaussian_has_no_samples():
    q = ivon_jax.Posterior(jnp.ones(2), jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="`precision` must be positive to sample, got"):
        q.sample(jax.random.key(0))
    proper = ivon_jax.Posterior(jnp.ones(2), jnp.ones(2))
    assert proper.kl_divergence(q) == np.inf
    np.testing.assert_array_equal(q.variance, [1.0, np.inf])


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_only_real_numbers_are_gaussian(dtype):
    q = ivon_jax.Posterior({"n": jnp.ones(2, dtype)}, {"n": jnp.ones(2)})
    message = (
        "`mean` must be real floating-point where `precision` is not None, got "
        f"{jnp.dtype(dtype)} at mean['n']."
    )
    for run in (lambda f: f, jax.jit):
        with pytest.raises(TypeError, match=re.escape(message)):
            run(lambda q: q.sample(jax.random.key(0)))(q)
    q = ivon_jax.Posterior(jnp.ones(2), jnp.ones(2, bool))
    with pytest.raises(TypeError, match="`precision` must be real, got bool"):
        q.entropy()


@pytest.mark.parametrize(
    ("key", "shape", "error", "message"),
    [
        (None, (), TypeError, "`key` must be a JAX random key, got None. Pass `jax"),
        (0, (), TypeError, "`key` must be a JAX random key, got 0. Pass `jax"),
        (1.5, (), TypeError, "`key` must be a JAX random key, got 1.5. Pass `jax"),
        (
            jnp.ones(2),
            (),
            TypeError,
            "`key` must be one JAX random key, got float32 of",
        ),
        (
            jax.random.split(jax.random.key(0)),
            (),
            TypeError,
            "`key` must be one JAX random key, got key<fry> of shape (2,)",
        ),
        ("key", 5, TypeError, "`shape` must be a tuple of integers, got 5."),
        ("key", None, TypeError, "`shape` must be a tuple of integers, got None."),
        ("key", (2.0,), TypeError, "`shape` must be an integer, got 2.0"),
        ("key", (-1,), ValueError, "`shape` must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("make", [lambda q: q, lambda q: ivon_jax.Mixture([q, q])])
def test_a_sample_takes_a_key_and_a_shape(make, key, shape, error, message):
    q = make(ivon_jax.Posterior(jnp.ones(2), jnp.ones(2)))
    key = jax.random.key(0) if isinstance(key, str) else key
    with pytest.raises(error, match=re.escape(message)):
        q.sample(key, shape)


def test_a_legacy_key_and_a_list_for_a_shape_are_fine():
    q = ivon_jax.Posterior(jnp.ones(2), jnp.ones(2))
    expected = q.sample(jax.random.key(3), (2, 1))
    np.testing.assert_array_equal(q.sample(jax.random.PRNGKey(3), [2, 1]), expected)
    assert q.sample(jax.random.key(3), (0, 3)).shape == (0, 3, 2)


@pytest.mark.parametrize("make", [lambda q: q, lambda q: ivon_jax.Mixture([q, q])])
def test_no_key_is_used_twice(make):
    """By jax's own checker."""
    q = make(gaussian(*jax.tree.map(np.float32, (MEAN, PRECISION))))
    with jax.debug_key_reuse(True):
        jax.jit(lambda key: q.sample(key, (3,)))(jax.random.key(0))
        q.sample(jax.random.key(1))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (jnp.float32(2), "`precision` must have the shapes of `mean`, got () at"),
        (jnp.ones((5, 2)), "`precision` must have the shapes of `mean`, got (5, 2) at"),
        ({"w": jnp.ones(2)}, "`precision` must have the tree structure of `mean`"),
    ],
)
def test_a_precision_unlike_the_mean_is_an_error(precision, message):
    """Not broadcast, which would give another density."""
    q = ivon_jax.Posterior(jnp.zeros(2), precision)
    good = ivon_jax.Posterior(jnp.zeros(2), jnp.ones(2))
    calls = (
        q.entropy,
        lambda: q.sample(jax.random.key(0)),
        lambda: good.kl_divergence(q),
        lambda: ivon_jax.predictive.linearized(lambda w, x: x @ w[:, None], q, good),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_the_divergence_to_no_gaussian_is_an_error():
    q = ivon_jax.Posterior(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(TypeError, match="`prior` must be a Posterior, one Gaussian"):
        q.kl_divergence(ivon_jax.Mixture([q]))


def test_arguments_of_every_method_may_be_numbers():
    """Alone or in a tree, they give what arrays do."""
    q = ivon_jax.Posterior({"w": 2.0, "v": jnp.ones(3)}, {"w": 4.0, "v": jnp.ones(3)})
    number = {"w": 0.5, "v": jnp.full(3, 0.5)}
    array = jax.tree.map(jnp.asarray, number)
    for method, count in {
        "perturb": 1,
        "hess_estimate": 2,
        "hess_estimate_of_noise": 2,
        "squared_gradient": 1,
        "covariance_times": 1,
        "log_prob": 1,
    }.items():
        call = getattr(q, method)
        chex.assert_trees_all_equal(call(*[number] * count), call(*[array] * count))
    np.testing.assert_array_equal(q.hess_estimate(number, number)["w"], 0.5 * -1.5 * 4)


def test_estimates_and_perturbations_are_lines_2_and_3():
    """Each method by its equation, in float64; a point mass has none of them."""
    rng = np.random.default_rng(0)
    mean, other = rng.normal(size=(2, 4))
    grad, noise = rng.normal(size=(2, 4))
    precision = rng.uniform(0.5, 9.0, size=4)
    q = ivon_jax.Posterior(
        {"w": jnp.float32(mean), "f": 7.0}, {"w": precision, "f": None}
    )
    g, n, t = ({"w": jnp.float32(x), "f": None} for x in (grad, noise, other))
    results = {
        "perturb": (q.perturb(n), mean + noise / np.sqrt(precision)),
        "hess_estimate": (q.hess_estimate(g, t), grad * (other - mean) * precision),
        "of noise": (q.hess_estimate_of_noise(g, n), grad * noise * np.sqrt(precision)),
        "squared_gradient": (q.squared_gradient(g), grad**2),
        "covariance_times": (q.covariance_times(g), grad / precision),
    }
    for name, (result, expected) in results.items():
        np.testing.assert_allclose(result["w"], expected, rtol=2e-5, err_msg=name)
        assert result["f"] == (7.0 if name == "perturb" else None)


@pytest.mark.statistical
def test_noise_is_standard_normal_whatever_the_gaussian_is(key):
    """Mean 0, variance 1, and another for each array."""
    wide = jnp.full(4000, 1e-4)
    q = ivon_jax.Posterior({"a": wide, "b": wide}, {"a": wide, "b": 4 * wide})
    a, b = q.noise(key)["a"], q.noise(key)["b"]
    for draws in (a, b):
        assert_mean(draws, 0.0)
        assert_mean(draws**2, 1.0)
    assert_mean(a * b, 0.0)
