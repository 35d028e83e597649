"""The Gaussian in a basis, beside one with the same dense covariance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.flatten_util import ravel_pytree
from scipy import stats
from statistical import assert_mean

import ivon_jax
from ivon_jax import Basis, Posterior, RotatedPosterior, sensitivity

KEY = jax.random.key(0)
SHAPES = {"w": (3, 4), "b": (4,), "conv": (2, 1, 2, 3), "layers": (2, 3, 2), "s": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
FIXED = {"w": True, "b": True, "conv": False, "layers": True, "s": False}


def gaussian(seed):
    """A matrix, a vector, a convolution with one basis, two layers, a scalar."""
    rng = np.random.default_rng(seed)

    def orthogonal(*shape):
        return jnp.asarray(np.linalg.qr(rng.normal(size=shape))[0])

    bases = dict.fromkeys(SHAPES, Basis()) | {
        "w": Basis(orthogonal(3, 3), orthogonal(4, 4)),
        "conv": Basis(left=orthogonal(4, 4)),
        "layers": Basis(orthogonal(2, 3, 3), orthogonal(2, 2, 2)),
    }
    mean = {k: jnp.asarray(rng.normal(size=s)) for k, s in SHAPES.items()}
    precision = {k: jnp.asarray(rng.uniform(0.5, 9.0, s)) for k, s in SHAPES.items()}
    return RotatedPosterior(mean, precision, bases)


@pytest.fixture
def q(x64):  # noqa: ARG001
    return gaussian(0)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def unflat(vector):
    return ravel_pytree({k: jnp.zeros(s) for k, s in SHAPES.items()})[1](vector)


def covariance(q):
    """By Kronecker products of the bases, in the order of `ravel_pytree`."""
    blocks = []
    for name in sorted(SHAPES):
        shape, basis = SHAPES[name], q.bases[name]
        stacks, variance = 1, 1 / np.asarray(q.precision[name])
        if basis.turns:
            first = next(x for x in basis if x is not None)
            stacks = first.shape[0] if first.ndim == 3 else 1
            columns = shape[-1]
        else:
            columns = max(np.prod(shape, dtype=int), 1)
        rows = variance.size // stacks // columns
        variance = variance.reshape(stacks, -1)
        for i in range(stacks):
            sides = [
                np.eye(n) if x is None else np.asarray(x).reshape(stacks, n, n)[i]
                for x, n in zip(basis, (rows, columns), strict=True)
            ]
            root = np.kron(*sides)
            blocks.append(root @ np.diag(variance[i]) @ root.T)
    dense, start = np.zeros((SIZE, SIZE)), 0
    for block in blocks:
        stop = start + len(block)
        dense[start:stop, start:stop] = block
        start = stop
    return dense


def divergence(mean, cov, prior_mean, prior_cov):
    precision, shift = np.linalg.inv(prior_cov), mean - prior_mean
    log_ratio = np.linalg.slogdet(prior_cov)[1] - np.linalg.slogdet(cov)[1]
    trace = np.trace(precision @ cov)
    return 0.5 * (trace - len(mean) + shift @ precision @ shift + log_ratio)


def test_products_with_the_covariance_and_its_inverse(q):
    vector = unflat(jnp.asarray(np.random.default_rng(1).normal(size=SIZE)))
    dense = covariance(q)
    product = flat(q.covariance_times(vector))
    np.testing.assert_allclose(product, dense @ flat(vector), rtol=1e-10)
    product = flat(q.precision_times(vector))
    expected = np.linalg.solve(dense, flat(vector))
    np.testing.assert_allclose(product, expected, rtol=1e-10)


def test_variances_are_the_diagonals(q):
    dense = covariance(q)
    np.testing.assert_allclose(flat(q.variance), np.diag(dense), rtol=1e-10)
    np.testing.assert_allclose(flat(q.stddev), np.sqrt(np.diag(dense)), rtol=1e-10)
    inverse = np.diag(np.linalg.inv(dense))
    np.testing.assert_allclose(flat(q.precision_diagonal), inverse, rtol=1e-10)


def test_density_and_entropy(q):
    theta = jax.tree.map(lambda m: m + 0.3, q.mean)
    dense = stats.multivariate_normal(flat(q.mean), covariance(q))
    log_prob = dense.logpdf(flat(theta))
    np.testing.assert_allclose(q.log_prob(theta), log_prob, rtol=1e-10)
    np.testing.assert_allclose(q.entropy(), dense.entropy(), rtol=1e-10)


@pytest.mark.parametrize("prior", ["rotated", "diagonal"])
@pytest.mark.parametrize("posterior", ["rotated", "diagonal"])
def test_divergences_between_all_kinds(q, posterior, prior):
    """In bases of their own, or in none."""
    p = gaussian(1)
    q = q if posterior == "rotated" else q.marginals
    p = p if prior == "rotated" else p.marginals
    moments = [
        (flat(x.mean), covariance(RotatedPosterior.of_diagonal(x))) for x in (q, p)
    ]
    expected = divergence(*moments[0], *moments[1])
    np.testing.assert_allclose(q.kl_divergence(p), expected, rtol=1e-10)


def test_the_divergence_from_itself_is_zero(q):
    np.testing.assert_allclose(q.kl_divergence(q), 0.0, atol=1e-10)


def test_the_marginals_lose_the_total_correlation(q):
    dense, mean = covariance(q), flat(q.mean)
    marginals = q.marginals
    np.testing.assert_allclose(flat(marginals.variance), np.diag(dense), rtol=1e-10)
    expected = divergence(mean, dense, mean, np.diag(np.diag(dense)))
    np.testing.assert_allclose(q.total_correlation(), expected, rtol=1e-10)


SPREADS = [1.01, 4.0, 1e6]  # of the precisions around the ratio


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("ratio", [1e-12, 1.001, 1e12])
def test_no_ratio_of_precisions_cancels(ratio, spread):
    """In float32, of bases that are orthogonal to its rounding, against float64."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(40, n, n)))[0] for n in (5, 4)]
    mean = np.float32(rng.normal(size=(40, 5, 4)))
    exponents = rng.uniform(-0.5, 0.5, mean.shape)
    precision = np.float32(ratio * spread**exponents)
    q = RotatedPosterior(mean, precision, Basis(*map(jnp.float32, bases)))
    terms = 1 / np.float64(precision)
    left, right = (x**2 for x in bases)
    variance = np.einsum("nij,njk,nlk->nil", left, terms, right)
    correlation = np.sum(np.log(variance) - np.log(terms)) / 2
    np.testing.assert_allclose(q.total_correlation(), correlation, rtol=1e-5)
    shift = np.sum(np.float64(mean) ** 2)
    expected = (np.sum(terms - 1 - np.log(terms)) + shift) / 2
    prior = Posterior(jnp.zeros_like(mean), jnp.ones_like(mean))
    np.testing.assert_allclose(q.kl_divergence(prior), expected, rtol=1e-5)


def test_a_diagonal_one_loses_nothing(q):
    diagonal = RotatedPosterior.of_diagonal(q.marginals)
    assert diagonal.total_correlation() == 0.0
    for name, precision in diagonal.marginals.precision.items():
        np.testing.assert_array_equal(precision, q.marginals.precision[name])


@pytest.mark.statistical
@pytest.mark.usefixtures("x64")
def test_samples_have_mean_and_covariance(key):
    q = gaussian(0)
    draws = np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(q.sample(key, (4000,))))
    assert_mean(draws, flat(q.mean))
    shift = draws - flat(q.mean)
    assert_mean(shift[:, :, None] * shift[:, None], covariance(q))


def test_without_bases_it_is_the_diagonal_one_to_the_bit(key):
    """Samples, densities, estimates; in float32."""
    p = jax.tree.map(jnp.float32, gaussian(0).marginals)
    q = RotatedPosterior.of_diagonal(p)
    theta, noise = p.sample(key), p.noise(key)
    grad = jax.tree.map(jnp.cos, theta)
    for read in (
        lambda q: q.sample(key, (2,)),
        lambda q: q.log_prob(theta),
        lambda q: q.entropy(),
        lambda q: q.variance,
        lambda q: q.stddev,
        lambda q: q.hess_estimate(grad, theta),
        lambda q: q.hess_estimate_of_noise(grad, noise),
        lambda q: q.squared_gradient(grad),
        lambda q: q.covariance_times(grad),
        lambda q: q.kl_divergence(p),
        lambda q: q.tempered(0.3).precision,
    ):
        for ours, theirs in zip(*map(jax.tree.leaves, (read(q), read(p))), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_estimates_of_the_hessian_are_of_its_diagonal_in_the_basis(q):
    """g' e' / sigma^2, and g'^2, of the coordinates; both ways to know the noise."""
    noise = q.noise(KEY)
    theta = q.perturb(noise)
    grad = jax.tree.map(jnp.cos, theta)
    left, right = q.bases["w"]
    rotated = left.T @ grad["w"] @ right
    deviation = left.T @ (theta["w"] - q.mean["w"]) @ right
    expected = rotated * deviation * q.precision["w"]
    for hess in (q.hess_estimate(grad, theta), q.hess_estimate_of_noise(grad, noise)):
        np.testing.assert_allclose(hess["w"], expected, rtol=1e-10)
    squares = q.squared_gradient(grad)["w"]
    np.testing.assert_allclose(squares, rotated**2, rtol=1e-10)


def test_tempering_divides_the_precision(q):
    cold = covariance(q.tempered(0.25))
    np.testing.assert_allclose(cold, 0.25 * covariance(q), rtol=1e-10)


def test_what_is_fixed_is_a_point_mass(q):
    fixed = q.restricted(FIXED)
    assert fixed.trained == FIXED
    draw = fixed.sample(KEY)
    for name, random in FIXED.items():
        still = np.all(draw[name] == q.mean[name])
        assert bool(still) is not random
        zero = np.all(fixed.variance[name] == 0)
        assert bool(zero) is not random
        expected = 0 * q.mean[name] if random else q.mean[name]
        np.testing.assert_array_equal(fixed.coordinates.mean[name], expected)
    assert fixed.covariance_times(q.mean)["conv"] is None
    kept = {k: v for k, v in q.mean.items() if FIXED[k]}
    part = RotatedPosterior(*({k: tree[k] for k in kept} for tree in q))
    for read in (lambda q, t: q.log_prob(t), lambda q, _: q.entropy()):
        theta = jax.tree.map(jnp.cos, q.mean)
        expected = read(part, {k: theta[k] for k in kept})
        np.testing.assert_allclose(read(fixed, theta), expected, rtol=1e-12)
    np.testing.assert_allclose(
        fixed.kl_divergence(gaussian(1).restricted(FIXED)),
        part.kl_divergence(
            RotatedPosterior(*({k: tree[k] for k in kept} for tree in gaussian(1)))
        ),
        rtol=1e-12,
    )


def test_seen_from_other_bases_it_is_the_same_distribution(q):
    """Theta's coordinates there have the density that theta has."""
    bases = gaussian(1).bases
    theta = jax.tree.map(jnp.cos, q.mean)
    rotated = {k: b.into(theta[k]) for k, b in bases.items()}
    density = q.seen_from(bases).log_prob(rotated)
    np.testing.assert_allclose(density, q.log_prob(theta), rtol=1e-12)


def fn(theta, x):
    """Two outputs, linear in all parameters."""
    matrix = jnp.concatenate([theta["w"], theta["conv"].reshape(3, 4)], axis=1)
    offset = theta["b"][:2] + theta["layers"][0, 0] + theta["s"]
    return (x @ matrix)[:, :2] + (x @ matrix)[:, 2:4] + offset[None]


def jacobian(q, x):
    """(N, C, P)."""
    tree = jax.jacobian(fn)(q.mean, x)
    leaves = [v.reshape(len(x), 2, -1) for _, v in sorted(tree.items())]
    return np.concatenate(leaves, axis=-1)


def test_linearized_predictions_are_the_exact_ones(q):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    outputs = ivon_jax.linearized(fn, q, x)
    j, dense = jacobian(q, x), covariance(q)
    expected = np.einsum("ncp,pq,ndq->ncd", j, dense, j)
    np.testing.assert_allclose(outputs.covariance, expected, rtol=1e-10)


def test_sensitivities_and_leave_one_out_use_all_covariances(q):
    """V_i e_i, with V_i = J_i S J_i^T."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    y = jnp.array([0, 1, 1, 0, 1])
    j, dense = jacobian(q, x), covariance(q)
    v = np.einsum("ncp,pq,ndq->ncd", j, dense, j)
    logits = np.asarray(fn(q.mean, x))
    errors = np.asarray(jax.nn.softmax(logits)) - np.eye(2)[np.asarray(y)]
    moved = np.einsum("ncd,nd->nc", v, errors)
    found = sensitivity.sensitivities(fn, q, x, y)
    np.testing.assert_allclose(found, np.linalg.norm(moved, axis=1), rtol=1e-10)
    found = sensitivity.leave_one_out_logits(fn, q, x, y)
    np.testing.assert_allclose(found, logits + moved, rtol=1e-10)


@pytest.mark.statistical
@pytest.mark.usefixtures("x64")
def test_predictions_are_means_over_samples(key):
    q, x = gaussian(0), jnp.ones((1, 3))
    draws = jax.vmap(
        lambda k: ivon_jax.predict(lambda theta: fn(theta, x), q, k, num_samples=2)
    )(jax.random.split(key, 500))
    assert_mean(draws, fn(q.mean, x))


def test_it_is_saved_as_any_pytree(q):
    data = serialization.to_bytes(q)
    empty = jax.tree.map(jnp.zeros_like, q)
    restored = serialization.from_bytes(empty, data)
    assert jax.tree.structure(restored) == jax.tree.structure(q)
    for ours, theirs in zip(*map(jax.tree.leaves, (restored, q)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


BAD_BASES = {
    "structure": lambda q: q.bases | {"more": Basis()},
    "arrays": lambda q: q.bases | {"w": q.bases["w"].left},
    "left": lambda q: q.bases | {"w": Basis(left=q.bases["w"].right)},
    "right": lambda q: q.bases | {"conv": Basis(right=q.bases["w"].right)},
    "vector": lambda q: q.bases | {"b": Basis(right=q.bases["w"].right)},
    "scalar": lambda q: q.bases | {"s": Basis(left=jnp.ones((1, 1)))},
    "stack": lambda q: q.bases | {"layers": Basis(left=q.bases["w"].left)},
}


@pytest.mark.parametrize("bad", BAD_BASES.values(), ids=BAD_BASES)
def test_bases_that_do_not_fit_are_told(q, bad):
    with pytest.raises(ValueError, match="`bases` must have "):
        q._replace(bases=bad(q)).sample(KEY)


def test_values_are_checked_as_those_of_a_diagonal_one(q):
    bad = q._replace(precision=jax.tree.map(lambda p: -p, q.precision))
    for read in (lambda q: q.entropy(), lambda q: q.variance, lambda q: q.sample(KEY)):
        with pytest.raises(ValueError, match="`precision` must be non-negative"):
            read(bad)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        q.tempered(0.0)
    with pytest.raises(ValueError, match="`theta` must have the tree structure"):
        q.log_prob({"w": q.mean["w"]})


def test_a_point_mass_in_one_alone_is_told(q):
    message = re.escape("`prior.precision` must be None where the posterior's is")
    for p in (gaussian(1).restricted(FIXED), gaussian(1).restricted(FIXED).marginals):
        with pytest.raises(ValueError, match=message):
            q.kl_divergence(p)
        with pytest.raises(ValueError, match=message):
            Posterior(q.mean, q.precision).kl_divergence(p)


MEMBERS = {
    "rotated": lambda: [gaussian(0), gaussian(1)],
    "mixed": lambda: [gaussian(0), gaussian(1).marginals],
    "stacked": lambda: jax.tree.map(
        lambda *x: jnp.stack(x), *(gaussian(seed) for seed in range(2))
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_a_mixture_may_have_such_members(members):
    """Also beside diagonal ones, which then stand in identity bases."""
    members = members()
    is_list = isinstance(members, list)
    make = ivon_jax.Mixture if is_list else ivon_jax.Mixture.from_stacked
    mixture = make(members)
    singles = members if is_list else [gaussian(0), gaussian(1)]
    theta = jax.tree.map(jnp.cos, singles[0].mean)
    densities = [np.exp(q.log_prob(theta)) for q in singles]
    density = np.exp(mixture.log_prob(theta))
    np.testing.assert_allclose(density, np.mean(densities), rtol=1e-10)
    drawn = mixture.sample(KEY, (3,))
    assert {k: v.shape for k, v in drawn.items()} == {
        k: (3, *s) for k, s in SHAPES.items()
    }
    last = mixture.member(jnp.array(1))
    draws = last.sample(KEY), singles[1].sample(KEY)
    np.testing.assert_allclose(*map(flat, draws), rtol=1e-10)
    np.testing.assert_allclose(last.log_prob(theta), np.log(densities[1]), rtol=1e-10)


def test_pruning_uses_the_variances_of_entries(q):
    scores = ivon_jax.pruning.signal_to_noise(q)
    expected = ivon_jax.pruning.signal_to_noise(q.marginals)
    for name, score in scores.items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-10)
    mask = ivon_jax.pruning.by_variance(q, 0.5)
    pruned = ivon_jax.pruning.prune(q, mask)
    zero = sum(float(jnp.sum(x == 0)) for x in jax.tree.leaves(pruned))
    assert zero == SIZE // 2
