"""The equations on their own: positivity, extremes, and what each line says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from statistical import assert_at_most

from ivon_jax import _update_rules

EPS = float(jnp.finfo(jnp.float32).eps)
b2s = st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.99999])
hess_hats = st.floats(-1e6, 1e6, width=32)


def f32(x):
    return jnp.asarray(x, jnp.float32)


@given(
    hess=st.floats(1e-6, 1e6),
    weight_decay=st.sampled_from([0.0, 1e-6, 1e-4, 1.0, 100.0]),
    hess_hat=hess_hats,
    b2=b2s,
)
@settings(deadline=None, max_examples=500)
def test_precision_at_most_halves_in_one_step(hess, weight_decay, hess_hat, b2):
    """p' = p (1 + (1 + r)^2) / 2 for a real r, and that is at least p / 2."""
    new = _update_rules.next_hess(f32(hess), f32(hess_hat), b2, weight_decay)
    old_precision, new_precision = hess + weight_decay, float(new) + weight_decay
    rounding = 8 * EPS * (hess + weight_decay + abs(float(new)))
    assert new_precision >= 0.5 * old_precision - rounding


@given(
    hess_hats=st.lists(hess_hats, min_size=1, max_size=50),
    weight_decay=st.sampled_from([0.0, 1e-6, 1e-4, 1.0]),
    b2=b2s,
)
@settings(deadline=None, max_examples=100)
def test_precision_stays_positive_over_any_sequence(hess_hats, weight_decay, b2):
    """By induction over the theorem; floats included."""
    hess = f32(1.0)
    for hess_hat in hess_hats:
        hess = _update_rules.next_hess(hess, f32(hess_hat), b2, weight_decay)
        assert hess + weight_decay > 0


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1.0])
def test_precision_stays_positive_when_every_step_halves_it(weight_decay):
    """With r = -1 each time the real numbers go to zero; the floats must not."""

    def halve(hess, _):
        # b2 = 0 and hess_hat = -weight_decay: s = -(h + weight_decay), r = -1.
        hess = _update_rules.next_hess(hess, f32(-weight_decay), 0.0, weight_decay)
        return hess, hess + weight_decay

    _, precision = jax.lax.scan(halve, f32(1.0), length=300)
    assert jnp.all(precision > 0)
    assert jnp.all(jnp.isfinite(1.0 / jnp.sqrt(precision)))


EXTREMES = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e20, 3.4e38]


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.99999])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-38, 1e-4, 1e18])
@pytest.mark.parametrize("hess", EXTREMES)
def test_no_nan_at_the_extremes_of_float32(hess, weight_decay, b2):
    """Two steps in a row: an overflow in the first would be NaN in the second."""
    hess_hat = f32([sign * x for x in EXTREMES for sign in (1, -1)])
    hess = jnp.full_like(hess_hat, hess)
    for estimate in (hess_hat, -hess_hat, hess_hat[::-1]):
        hess = _update_rules.next_hess(hess, estimate, b2, weight_decay)
        assert jnp.all(jnp.isfinite(hess))
        assert jnp.all(hess + weight_decay > 0)
        assert_at_most(hess, (1 + EPS) * float(jnp.finfo(jnp.float32).max) ** 0.5)
        assert jnp.all(jnp.isfinite(_update_rules.precision(hess, 1e10, weight_decay)))


def test_a_nan_estimate_is_not_hidden():
    """Clipping must not turn a broken gradient into a plausible Hessian."""
    assert jnp.isnan(_update_rules.next_hess(f32(1.0), f32(jnp.nan), 0.9, 1e-4))


def test_smaller_weight_decay_than_before_leaves_no_negative_precision():
    """h > -delta held for the old delta, scheduled down since."""
    hess = _update_rules.next_hess(f32(-0.5), f32(-0.5), 0.999, 0.4)
    assert hess + 0.4 > 0


def test_hessian_moves_at_the_papers_b2_in_float32():
    """10,000 steps at b2 = 0.99999 cover 1 - b2^10000 of the way."""

    def step(hess, _):
        return _update_rules.next_hess(hess, f32(2.0), 0.99999, 0.0), None

    hess, _ = jax.lax.scan(step, f32(0.5), length=10_000)
    np.testing.assert_allclose(hess, 2.0 - 1.5 * 0.99999**10_000, rtol=1e-4)


def test_debiased_momentum_of_a_constant_gradient_is_that_gradient():
    """The weights of a moving average from zero sum to 1 - b1^t."""
    momentum = f32(0.0)
    for t in range(1, 20):
        momentum = _update_rules.next_momentum(momentum, f32(3.0), 0.9)
        np.testing.assert_allclose(
            _update_rules.debiased(momentum, 0.9, f32(t)), 3.0, rtol=1e-5
        )


@pytest.mark.parametrize("hess_hat", [jnp.nan, jnp.inf, -jnp.inf, 1e25, -1e25])
def test_an_estimate_out_of_reach_is_unusable(hess_hat):
    assert not _update_rules.usable(f32(1.0), f32(hess_hat), 0.999, 1e-4)


@pytest.mark.parametrize("hess", [1e-19, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1.0])
def test_estimates_up_to_the_largest_hess_are_usable(hess, weight_decay):
    """The rule is Algorithm 1's exactly as long as h stays below 1e15."""
    hess_hat = hess * f32([0.0, -1.0, 1.0, 0.5, -0.5, -1e3 * (hess < 1e9)])
    assert jnp.all(_update_rules.usable(f32(hess), hess_hat, 0.99999, weight_decay))


@pytest.mark.parametrize("b2", [0.0, 0.999])
@pytest.mark.parametrize(("hess", "weight_decay"), [(1.0, 0.5), (5e14, 1e15)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_usable_is_where_line_5_stays_below_the_largest_hess(
    hess, weight_decay, sign, b2
):
    """h + s + s^2 / 2p = H has the roots s = -p +- sqrt(p^2 + 2p (H - h))."""
    precision = hess + weight_decay
    for share, usable in [(0.98, True), (1.02, False)]:
        more = share * (_update_rules.LARGEST_HESS - hess)
        s = -precision + sign * np.sqrt(precision**2 + 2 * precision * more)
        hess_hat = f32(hess + s / (1 - b2))
        assert _update_rules.usable(f32(hess), hess_hat, b2, weight_decay) == usable


@pytest.mark.parametrize("hess", [0.0, 1.0, 5e14])
def test_no_step_goes_beyond_the_largest_hess(hess):
    moved = _update_rules.next_hess(f32(hess), f32(1e30), 0.9, 1e-4)
    assert_at_most(moved, _update_rules.LARGEST_HESS)


def test_a_hess_below_its_range_can_take_an_estimate():
    """It starts from the least one, as line 5 does."""
    assert _update_rules.usable(f32(-1.0), f32(0.0), 0.999, 1e-4)
