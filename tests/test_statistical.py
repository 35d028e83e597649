import chex
import jax.numpy as jnp
import numpy as np
import pytest
from statistical import FEWEST, assert_at_most, assert_mean, assert_moved

GENERATOR = np.random.default_rng(0)
DRAWS = GENERATOR.normal(2.0, 3.0, (4000, 5))


def fails(draws, expected):
    with pytest.raises(AssertionError):
        assert_mean(draws, expected)


def test_the_true_mean_passes():
    assert_mean(DRAWS, 2.0)
    assert_mean(DRAWS, np.full(5, 2.0))
    assert_mean(jnp.asarray(DRAWS, jnp.bfloat16), jnp.float32(2.0))
    assert_mean(DRAWS > 2.0, 0.5)


@pytest.mark.parametrize("expected", [-2.0, 4.0, 1.0, 0.0, 2.3, 1.7])
def test_a_wrong_mean_fails(expected):
    """The nearest is off by 6.3 standard errors."""
    fails(DRAWS, expected)


def test_one_wrong_entry_fails():
    fails(DRAWS, np.where(np.arange(5) == 3, 2.3, 2.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [np.s_[:], np.s_[:, 2], np.s_[7, 2], np.s_[0]])
def test_draws_that_are_not_finite_fail(bad, where):
    draws = DRAWS.copy()
    draws[where] = bad
    for expected in (2.0, bad):
        fails(draws, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_mean_that_is_not_finite_fails(bad):
    fails(DRAWS, bad)
    fails(np.full((4000, 5), 2.0), bad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32"])
@pytest.mark.parametrize("value", [0.0, 2.0, 3e6])
def test_draws_without_spread_must_be_the_mean(dtype, value):
    draws = np.full((FEWEST, 2), value).astype(jnp.dtype(dtype))
    expected = draws[0].astype(np.float64)
    assert_mean(draws, expected)
    for wrong in (1.05 * expected + 0.01, -expected - 1.0, np.nan):
        fails(draws, wrong)


def test_draws_without_spread_may_round():
    """0.1 in float32 is 1.5e-9 off; a thousandth is not rounding."""
    assert_mean(np.full(FEWEST, 0.1, np.float32), 0.1)
    fails(np.full(FEWEST, 0.1, np.float32), 0.1001)
    fails(np.full(FEWEST, 1e-30), 0.0)


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1])
def test_few_draws_fail_whatever_they_are(count):
    """Two draws' standard error is as often off by a factor of ten as not."""
    fails(DRAWS[:count], 2.0)
    fails(np.full((count, 2), 2.0), 2.0)


def test_nothing_to_compare_fails():
    fails(np.zeros((0, 3)), 0.0)
    fails(np.zeros((4000, 0)), 0.0)
    with pytest.raises(AssertionError):
        assert_at_most([], 1.0)


def test_a_mean_of_other_entries_fails():
    """Broadcast, one mean would be compared with five."""
    fails(DRAWS[:, 0], np.full(5, 2.0))


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        (np.nan, np.nan),
        (np.nan, 1.0),
        (0.0, np.nan),
        (0.0, np.inf),
        (-np.inf, 0.0),
        ([0.0, 2.0], 1.0),
        ([0.0, 2.0], [3.0, 1.0]),
    ],
)
def test_a_bound_holds_for_finite_numbers_alone(values, bounds):
    with pytest.raises(AssertionError):
        assert_at_most(values, bounds)


def test_a_bound_may_be_reached():
    assert_at_most([0.0, 1.0], 1.0)


@pytest.mark.parametrize(
    "compare",
    [
        lambda x, y: np.testing.assert_allclose(x, y),
        lambda x, y: np.testing.assert_allclose(actual=x, desired=y, rtol=1.0),
        lambda x, y: np.testing.assert_array_equal(x, y),
        lambda x, y: chex.assert_trees_all_close({"a": x}, {"a": y}),
        lambda x, y: chex.assert_trees_all_equal({"a": x}, {"a": y}),
    ],
)
def test_in_this_session_nan_equals_nothing(compare):
    """A broken library would agree with itself."""
    compare(np.array([1.0, np.inf]), np.array([1.0, np.inf]))
    compare(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16))
    for x in (np.array([1.0, np.nan]), jnp.array([1.0, jnp.nan], jnp.bfloat16)):
        with pytest.raises(AssertionError):
            compare(x, x)


def test_what_moved_is_finite_and_other_everywhere():
    origin = {"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.ones(1)}
    assert_moved({"a": jnp.ones(2), "b": jnp.zeros(1)}, origin)
    for a, b in (([1.0, 0.0], [0.0]), ([1.0, 1.0], [1.0]), ([1.0, np.nan], [0.0])):
        with pytest.raises(AssertionError):
            assert_moved({"a": np.array(a), "b": np.array(b)}, origin)
