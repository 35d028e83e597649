"""The Gaussian's algebra, against NumPy in float64, and its way to disk and back."""

import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

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


def test_natural_parameters_keep_point_masses():
    q = gaussian(precision=PRECISION | {"b": None})
    natural = q.natural_parameters
    np.testing.assert_array_equal(natural.linear["b"], q.mean["b"])
    back = ivon_jax.Posterior.from_natural_parameters(natural)
    assert back.precision["b"] is None
    np.testing.assert_array_equal(back.mean["b"], q.mean["b"])


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


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_restricted_samples_move_what_the_mask_has_alone(mask, key):
    q = gaussian()
    theta = q.restricted(mask).sample(key)
    np.testing.assert_array_equal(theta["w"], q.mean["w"])
    assert np.all(theta["b"] != q.mean["b"])


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


def test_the_divergence_of_close_gaussians_does_not_cancel():
    """Half of the sum of r - log(1 + r), r = 1e-4, the precisions' relative gap."""
    ones = jnp.ones(1000)
    q, prior = (ivon_jax.Posterior(ones, p * ones) for p in (1.0, 1.0 + 1e-4))
    gap = np.float64(np.float32(1 + 1e-4)) - 1
    expected = 500 * (gap - np.log1p(gap))
    np.testing.assert_allclose(q.kl_divergence(prior), expected, rtol=1e-2)


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
