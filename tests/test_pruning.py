"""Masks against NumPy's argsort, their counts exact, and what pruning costs."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import temp_bytes

import ivon_jax
from ivon_jax import pruning
from ivon_jax._arrays import ranks

MEAN = {"w": (4, 5), "frozen": (3,), "b": (5,), "scale": ()}
CRITERIA = [pruning.by_signal_to_noise, pruning.by_variance]
SPARSITIES = [0.0, 0.01, 0.25, 0.5, 0.62, 0.99, 1.0]


def posterior(seed, dtype=np.float32):
    """With a point mass between other arrays, and a scalar."""
    rng = np.random.default_rng(seed)
    mean = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in MEAN.items()}
    precision = {k: jnp.float32(rng.gamma(2.0, size=s)) for k, s in MEAN.items()}
    return ivon_jax.Posterior(mean, precision | {"frozen": None})


def flat(tree):
    """One NumPy vector, in the order of the tree, without the point mass."""
    leaves = [x for k, x in sorted(tree.items()) if k != "frozen"]
    return np.concatenate([np.ravel(x) for x in leaves])


def lowest_removed(scores, sparsity):
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores, kind="stable")[: round(sparsity * scores.size)]] = False
    return kept


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_signal_to_noise_is_mean_over_stddev(seed):
    q = posterior(seed)
    result = pruning.signal_to_noise(q)
    assert result["frozen"] is None
    expected = np.abs(flat(q.mean)) / flat(q.stddev)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-6)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_agree_with_argsort_over_all_arrays(seed, sparsity):
    q = posterior(seed)
    scores = np.abs(np.float64(flat(q.mean))) * np.sqrt(np.float64(flat(q.precision)))
    kept = flat(pruning.by_signal_to_noise(q, sparsity))
    np.testing.assert_array_equal(kept, lowest_removed(scores, sparsity))
    kept = flat(pruning.by_variance(q, sparsity))
    expected = lowest_removed(-np.float64(flat(q.variance)), sparsity)
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_ties_are_broken_by_position(sparsity):
    """Few values, both zeros among them, as NumPy's stable argsort."""
    rng = np.random.default_rng(0)
    values = np.float32([-np.inf, -1.0, -0.0, 0.0, 2.0])
    scores = {"a": rng.choice(values, (5, 6)), "b": rng.choice(values, 31)}
    kept = flat(pruning.mask(scores, sparsity))
    np.testing.assert_array_equal(kept, lowest_removed(flat(scores), sparsity))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("count", [1, 2, 10, 13])
def test_the_count_is_exact_where_all_scores_are_equal(criterion, count):
    """As before the first step; Python's round, half to even."""
    params = {"w": jnp.ones((2, count)), "b": jnp.ones(count)}
    opt_state = ivon_jax.ivon(0.1, ess=10).init(params)
    q = ivon_jax.posterior(params, opt_state)
    for sparsity in np.arange(0, 1.01, 1 / 8).tolist():
        kept = flat(criterion(q, sparsity))
        assert kept.sum() == 3 * count - round(sparsity * 3 * count)
        assert np.all(np.diff(kept.astype(int)) >= 0)


@pytest.mark.parametrize("count", [2**24 + 1, 10**10 + 1])
def test_the_count_is_exact_beyond_float32_and_int32(count):
    """Which hold neither 2^24 + 1 nor 0.7, and nothing from 2^31 on."""

    def number(pair):
        return int(pair[0]) * 2**16 + int(pair[1])

    assert number(pruning._num_removed(0.7, count)) == round(0.7 * count)
    for one in (1.0, jnp.float32(1)):
        assert number(pruning._num_removed(one, count)) == count
        traced = jax.jit(lambda s: pruning._num_removed(s, count))(one)
        assert number(traced) == count
    half = number(pruning._num_removed(jnp.float32(0.5), count))
    np.testing.assert_allclose(half, count / 2, rtol=1e-7)


def test_arrays_are_cut_where_one_int32_cannot_count_them(monkeypatch):
    """Here at 8 entries, and with pairs of base 4; ties cross the cuts."""
    monkeypatch.setattr(ranks, "_LARGEST", 8)
    monkeypatch.setattr(ranks, "_BASE", 4)
    rng = np.random.default_rng(0)
    shapes = {"a": (1, 7, 3), "b": (11,), "c": (2,), "d": (0, 4), "e": (1, 1, 9)}
    scores = {k: np.float32(rng.integers(0, 3, s)) for k, s in shapes.items()}
    run = jax.jit(lambda removed: pruning._kept.__wrapped__(arrays, removed))
    arrays = [jnp.asarray(x) for x in scores.values()]
    for removed in range(44):
        kept = run(ranks.pair(removed))
        kept = np.concatenate([np.ravel(x) for x in kept])
        expected = lowest_removed(flat(scores), removed / 43)
        np.testing.assert_array_equal(kept, expected)


def test_removal_by_signal_to_noise_costs_least_log_density():
    """Of all ways to remove 3 of 9, by enumeration."""
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=9), jnp.float32)
    q = ivon_jax.Posterior(mean, jnp.asarray(rng.gamma(2.0, size=9), jnp.float32))
    ways = np.ones((84, 9), bool)
    for way, removed in zip(ways, itertools.combinations(range(9), 3), strict=True):
        way[list(removed)] = False
    densities = jax.vmap(lambda way: q.log_prob(pruning.prune(q, way)))(ways)
    best = ways[np.argmax(densities)]
    np.testing.assert_array_equal(pruning.by_signal_to_noise(q, 1 / 3), best)
    cost = q.log_prob(mean) - densities.max()
    expected = np.sum((mean * jnp.sqrt(q.precision))[~best] ** 2) / 2
    np.testing.assert_allclose(cost, expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_point_masses_are_kept_and_do_not_count(criterion):
    q = posterior(0)
    kept = criterion(q, 1.0)
    assert jax.tree.map(jnp.shape, kept) == MEAN
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(bool)}
    assert np.all(kept["frozen"])
    assert not np.any(flat(kept))
    pruned = pruning.prune(q, kept)
    np.testing.assert_array_equal(pruned["frozen"], q.mean["frozen"])
    np.testing.assert_array_equal(flat(pruned), 0)


def test_a_mask_of_scores_has_one_true_for_each_none():
    kept = pruning.mask({"a": jnp.ones(2), "b": None}, 0.5)
    np.testing.assert_array_equal(kept["a"], [False, True])
    assert kept["b"].shape == ()
    pruned = pruning.prune({"a": np.full(2, 7.0), "b": np.full(3, 7.0)}, kept)
    chex.assert_trees_all_equal(pruned, {"a": jnp.float32([0, 7]), "b": jnp.full(3, 7)})


def test_parameters_that_are_no_arrays_stay_so():
    """None in the parameters, as of layers without bias, is no point mass."""
    mean = {"w": jnp.arange(4.0), "bias": None}
    q = ivon_jax.Posterior(mean, {"w": jnp.ones(4), "bias": None})
    kept = pruning.by_signal_to_noise(q, 0.5)
    assert kept["bias"] is None
    for mask in (kept, pruning.mask(pruning.signal_to_noise(q), 0.5)):
        pruned = pruning.prune(q, mask)
        assert pruned["bias"] is None
        np.testing.assert_array_equal(pruned["w"], [0, 0, 2, 3])


def test_prune_takes_parameters_or_their_posterior():
    q = posterior(0)
    kept = pruning.by_variance(q, 0.4)
    pruned = pruning.prune(q, kept)
    chex.assert_trees_all_equal(pruned, pruning.prune(q.mean, kept))
    expected = jax.tree.map(lambda m, k: np.where(k, m, 0), q.mean, kept)
    chex.assert_trees_all_equal(pruned, expected)


def test_what_is_not_finite_can_be_pruned():
    """Not multiplied by zero."""
    pruned = pruning.prune(jnp.array([jnp.nan, jnp.inf, 1.0]), np.arange(3) > 1)
    np.testing.assert_array_equal(pruned, [0, 0, 1])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_are_ranked_in_float32(criterion, dtype):
    q = posterior(0, dtype)
    wide = q._replace(mean=jax.tree.map(lambda x: x.astype(jnp.float32), q.mean))
    kept = criterion(q, 0.5)
    chex.assert_trees_all_equal(kept, criterion(wide, 0.5))
    pruned = pruning.prune(q, kept)
    assert {x.dtype for x in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}
    assert pruning.signal_to_noise(q)["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (jnp.array([2**24 + 1, 2**24]), 2**24 + 1),
        (jnp.array([0, -(2**31)]), -(2**31)),
        (jnp.array([2**32 - 1, 1], jnp.uint32), 2**32 - 1),
        (np.array([2**32, 1]), 2**31 - 1),
    ],
)
def test_integers_that_floats_cannot_tell_apart_are_refused(scores, got):
    """As floats the first two are tied, and the greater one would be removed."""
    message = f"`scores` must be at most {2**24} where they are integers, got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pruning.mask(scores, 0.5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_smaller_integers_are_ranked(dtype):
    kept = pruning.mask(np.array([3, 1, 2, 100], dtype), 0.5)
    np.testing.assert_array_equal(kept, [True, False, False, True])


@pytest.mark.usefixtures("x64")
def test_double_precision_scores_are_ranked_as_such():
    scores = {"a": np.array([1 + 1e-12, 1.0]), "b": np.float32([2, 0])}
    kept = jax.jit(pruning.mask)(scores, 0.5)
    np.testing.assert_array_equal(flat(kept), [True, False, True, False])
    mean = jnp.array([1 + 1e-12, 1.0])
    q = ivon_jax.Posterior(mean, jnp.ones(2))
    assert pruning.signal_to_noise(q).dtype == jnp.float64
    assert pruning.prune(q, pruning.by_signal_to_noise(q, 0.5)).dtype == jnp.float64


@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_are_the_same_under_jit_and_vmap(criterion):
    """With posterior and sparsity traced."""
    q = posterior(0)
    jitted = jax.jit(criterion)
    for sparsity in SPARSITIES:
        expected = criterion(q, sparsity)
        chex.assert_trees_all_equal(jitted(q, sparsity), expected)
        static = jax.jit(lambda q, s=sparsity: criterion(q, s))(q)
        chex.assert_trees_all_equal(static, expected)
    many = jax.vmap(criterion, in_axes=(None, 0))(q, jnp.float32(SPARSITIES))
    for i, sparsity in enumerate(SPARSITIES):
        one = jax.tree.map(lambda x, i=i: x[i], many)
        chex.assert_trees_all_equal(one, criterion(q, sparsity))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_curve_is_the_function_at_each_sparsity(criterion):
    q = posterior(0)

    def fn(params):
        return {"sum": params["w"].sum() + params["b"].sum(), "scale": params["scale"]}

    points = [fn(pruning.prune(q, criterion(q, s))) for s in SPARSITIES]
    expected = jax.tree.map(lambda *xs: np.stack(xs), *points)
    result = pruning.curve(fn, q, SPARSITIES, criterion)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    jitted = jax.jit(lambda q, s: pruning.curve(fn, q, s, criterion))
    result = jitted(q, np.float32(SPARSITIES))
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


def test_the_curve_takes_any_criterion():
    """Magnitudes, say; without one it is the signal-to-noise ratio."""
    q = ivon_jax.Posterior(jnp.array([1.0, 2.0, 4.0]), jnp.array([100.0, 1.0, 1.0]))

    def by_magnitude(q, sparsity):
        return pruning.mask(jnp.abs(q.mean), sparsity)

    result = pruning.curve(jnp.sum, q, [0, 1 / 3, 1], by_magnitude)
    np.testing.assert_array_equal(result, [7, 6, 0])
    result = pruning.curve(jnp.sum, q, [0, 1 / 3, 1])
    np.testing.assert_array_equal(result, [7, 5, 0])


def test_the_function_of_a_curve_takes_arguments():
    q = ivon_jax.Posterior(jnp.array([3.0, 2.0, 1.0]), jnp.ones(3))
    result = pruning.curve(jnp.dot, q, [0.0, 1.0], args=(jnp.ones(3),))
    np.testing.assert_array_equal(result, [6.0, 0.0])
    with pytest.raises(TypeError, match="`args` must be a tuple of arguments"):
        pruning.curve(jnp.dot, q, [0.0, 1.0], args=jnp.ones(3))
    with pytest.raises(
        TypeError, match="must be an array or a pytree of arrays, got N"
    ):
        pruning.curve(lambda _: None, q, [0.0, 1.0])


def test_memory_of_the_curve_does_not_grow_with_the_sparsities():
    """Up to the sparsities and results, 4 bytes each: no stack of parameters."""
    q = ivon_jax.Posterior(jnp.ones(10_000), jnp.ones(10_000))

    def temporaries(count):
        run = jax.jit(lambda q, s: pruning.curve(jnp.sum, q, s))
        return temp_bytes(run.lower(q, jnp.linspace(0, 1, count)))

    few, many = temporaries(2), temporaries(102)
    assert many - few < 100 * 100 < 100 * q.mean.nbytes


def test_a_trained_mask_survives_in_an_optimizer(key):
    """Masked parameters stay at zero where updates are masked alike."""
    params = {"w": jax.random.normal(key, (6,))}
    tx = ivon_jax.ivon(0.1, ess=100)
    opt_state = tx.init(params)
    kept = pruning.by_signal_to_noise(ivon_jax.posterior(params, opt_state), 0.5)
    params = pruning.prune(params, kept)
    theta = ivon_jax.sample(key, params, opt_state)
    updates, _ = tx.update({"w": jnp.ones(6)}, opt_state, params, sample=theta)
    params = optax.apply_updates(params, pruning.prune(updates, kept))
    np.testing.assert_array_equal(params["w"] == 0, ~np.asarray(kept["w"]))


Q = posterior(0)
BAD_SPARSITIES = [
    (-0.1, ValueError, "`sparsity` must be in [0, 1], got -0.1."),
    (50, ValueError, "`sparsity` must be in [0, 1], got 50."),
    (jnp.float32(2), ValueError, "`sparsity` must be in [0, 1], got 2.0."),
    (np.nan, ValueError, "`sparsity` must be in [0, 1], got nan."),
    ("half", TypeError, "`sparsity` must be a number, got 'half'."),
    (jnp.ones(2), TypeError, "`sparsity` must be a real scalar, got an array of shape"),
]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("bad", "error", "message"), BAD_SPARSITIES)
def test_a_sparsity_is_a_share(criterion, bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        criterion(Q, bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.5, -0.5], "`sparsities` must be in [0, 1], got -0.5."),
        ([0.5, 1.5], "`sparsities` must be in [0, 1], got 1.5."),
        ([0.5, np.nan], "`sparsities` must be in [0, 1], got nan."),
        ([], "`sparsities` must be a list of at least one number, got shape (0,)."),
        (0.5, "`sparsities` must be a list of at least one number, got shape ()."),
    ],
)
def test_sparsities_are_shares(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pruning.curve(lambda params: params["w"], Q, bad)


OF_POSTERIORS = [
    pruning.signal_to_noise,
    lambda q: pruning.by_signal_to_noise(q, 0.5),
    lambda q: pruning.by_variance(q, 0.5),
    lambda q: pruning.curve(lambda params: params["w"], q, [0.5]),
]


@pytest.mark.parametrize("fn", OF_POSTERIORS)
def test_parameters_are_no_posterior(fn):
    message = "`posterior` must be a Posterior, one Gaussian, got dict. Pass `ivon_jax."
    with pytest.raises(TypeError, match=re.escape(message)):
        fn(Q.mean)


@pytest.mark.parametrize("fn", OF_POSTERIORS)
def test_point_masses_alone_cannot_be_ranked(fn):
    message = "`posterior` must have a precision for some array, got point masses alone"
    with pytest.raises(ValueError, match=re.escape(message)):
        fn(ivon_jax.Posterior({"w": jnp.ones(3)}, {"w": None}))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"a": None}, ValueError, "`scores` must have at least one entry, got none."),
        (np.zeros(0), ValueError, "`scores` must have at least one entry, got none."),
        (
            {"a": np.float32([1, np.nan])},
            ValueError,
            "`scores['a']` must be numbers, got NaN for 1 of 2. Training diverged?",
        ),
        ({"a": 1j}, TypeError, "`scores['a']` must be real numbers, got dtype complex"),
    ],
)
def test_scores_are_real_numbers(bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pruning.mask(bad, 0.5)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"a": True}, ValueError, "`mask` must have the tree structure of the parame"),
        (
            {"a": True, "b": None},
            ValueError,
            "`mask` must have the tree structure of the parameters, got",
        ),
        (
            {"a": True, "b": np.ones((3, 1), bool)},
            ValueError,
            "`mask` must have the shapes of the parameters, got (3, 1) at mask['b'],",
        ),
        (
            {"a": True, "b": np.ones(3)},
            TypeError,
            "`mask` must be booleans, True for what is kept, got float32 at mask['b'].",
        ),
    ],
)
def test_masks_are_booleans_like_the_parameters(bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pruning.prune({"a": jnp.ones(2), "b": jnp.ones(3)}, bad)
