"""Diagnostics: the numbers are their formulas, the advice comes when it is due."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st
from sklearn.datasets import load_digits
from statistical import assert_mean

import ivon_jax
from ivon_jax import diagnostics, pruning
from ivon_jax._arrays import ranks
from ivon_jax.diagnostics import _advice

HESS_INIT, B1, B2 = 0.5, 0.8, 0.99
SETTINGS = {"hess_init": HESS_INIT, "b1": B1, "b2": B2, "clip_radius": 0.7}
GROUPS = {"w": "wide", "b": "narrow", "scale": "adam", "empty": "narrow"}
PRIOR_MEAN, PRIOR_PRECISION = 0.3, 8.0


def start():
    """Parameters of the default float dtype, two arrays of them trained."""
    values = np.random.default_rng(0).normal(size=6)
    return {
        "w": jnp.asarray(values.reshape(2, 3)),
        "b": jnp.asarray(values[:2] - 1.0),
        "scale": jnp.ones(()),
        "empty": jnp.zeros((0, 3)),
    }


def ivon(**kwargs):
    hyperparameters = {"hess_init": HESS_INIT, "b1": B1, "b2": B2}
    return ivon_jax.ivon(0.1, **(hyperparameters | kwargs))


def single():
    tx = ivon(ess=20.0, weight_decay=0.2)
    trained = {name: group != "adam" for name, group in GROUPS.items()}
    return optax.chain(optax.clip(100.0), optax.masked(tx, trained))


def groups():
    """ "wide" comes after "narrow" in the state, and its array after b in params."""
    transforms = {
        "wide": ivon(ess=5.0, weight_decay=0.1),
        "narrow": ivon(ess=90.0, weight_decay=0.4),
        "adam": optax.adam(1e-3),
    }
    return optax.partition(transforms, GROUPS)


def with_prior():
    params = start()
    prior = ivon_jax.Posterior.isotropic(
        jax.tree.map(lambda p: jnp.full_like(p, PRIOR_MEAN), params), PRIOR_PRECISION
    )
    transforms = {"ivon": ivon(ess=20.0, prior=prior), "adam": optax.adam(1e-3)}
    labels = {name: "adam" if g == "adam" else "ivon" for name, g in GROUPS.items()}
    return optax.partition(transforms, labels)


# What each knows of (w, b): ess, delta, the prior's mean.
SETUPS = {
    "single": (single, ((20.0, 0.2, 0.0), (20.0, 0.2, 0.0))),
    "groups": (groups, ((5.0, 0.1, 0.0), (90.0, 0.4, 0.0))),
    "prior": (with_prior, ((20.0, PRIOR_PRECISION / 20.0, PRIOR_MEAN),) * 2),
}


def trained(tx, params, steps=3):
    """A state after a few steps, with Hessians above and below zero."""
    opt_state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: p + i, params)
        hess = jax.tree.map(lambda p: 20.0 * p, params)
        _, opt_state = tx.update(grads, opt_state, params, hess=hess)
    return opt_state


def expected_arrays(params, opt_state, settings):
    """(m, m - m_0, g, h, delta, ess) of w and b, as written by Algorithm 1."""
    states = ivon_jax.find_states(opt_state)
    rows = []
    for name, (ess, delta, prior_mean) in zip(("w", "b"), settings, strict=True):
        [state] = [s for s in states if isinstance(s.hess[name], jax.Array)]
        m, g, h = (
            np.asarray(x[name], np.float64)
            for x in (params, state.momentum, state.hess)
        )
        rows.append((m, m - prior_mean, g, h, delta, ess))
    return rows


def flat(arrays):
    return np.concatenate([np.broadcast_to(x, y.shape).ravel() for x, y in arrays])


def columns(rows):
    return [flat([(row[i], row[0]) for row in rows]) for i in range(6)]


def state_numbers(m, shift, g, h, delta, ess, t):
    """The numbers without a loss, in NumPy."""
    variance = 1 / (ess * (h + delta))
    direction = (g / (1 - B1**t) + delta * shift) / (h + delta)
    ratio = delta / (h + delta)
    gamma = np.sum(np.maximum(h, 0) / (h + delta))
    share = B2**t
    return {
        "count": t,
        "ess": ess.mean(),
        "weight_decay": delta.mean(),
        "num_params": m.size,
        "non_finite": 0.0,
        "noise_to_weight": np.sqrt(variance.sum() / np.sum(m**2)),
        "rounded": 0.0,
        "hess_median": np.sort(h)[(m.size - 1) // 2],
        "hess_min": h.min(),
        "hess_max": h.max(),
        "hess_peak": h.max() / HESS_INIT,
        "hess_negative": np.mean(h <= 0),
        "hess_memory": share,
        "hess_half_life": np.log(0.5) / np.log(B2),
        "hess_drift": np.sort(np.abs(h - HESS_INIT) / HESS_INIT)[(m.size - 1) // 2],
        "hess_spread": spread(h),
        "hess_target": (h.mean() - share * HESS_INIT) / (1 - share),
        "hess_decayed": 0.0,
        "hess_rounding": np.finfo(np.float64).eps / (1 - B2),
        "effective_params": gamma,
        "effective_share": gamma / m.size,
        "kl_divergence": 0.5
        * np.sum(ratio - np.log(ratio) + ess * delta * shift**2 - 1),
        "clipped": np.mean(np.abs(direction) > 0.7),
    }


def spread(h):
    """Of odd and even numbers of entries alike: the lower medians."""
    middle = (h.size - 1) // 2
    median = np.sort(h)[middle]
    return np.sort(np.abs(h - median))[middle] / np.abs(median)


def assert_numbers(numbers, expected, rtol=1e-9):
    assert sorted(numbers) == sorted(expected)
    for name, value in expected.items():
        assert numbers[name].shape == ()
        np.testing.assert_allclose(numbers[name], value, rtol=rtol, err_msg=name)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(("make", "settings"), SETUPS.values(), ids=SETUPS)
def test_numbers_of_the_state_are_their_formulas(make, settings):
    """In float64, over what IVON owns alone, with each array's own ess and prior."""
    params = start()
    opt_state = trained(make(), params)
    rows = columns(expected_arrays(params, opt_state, settings))
    assert 0 < np.mean(rows[3] <= 0) < 1  # some Hessians are negative
    numbers = jax.jit(lambda p, s: diagnostics.measure(p, s, **SETTINGS))(
        params, opt_state
    )
    assert_numbers(numbers, state_numbers(*rows, t=3))
    assert {x.dtype for x in numbers.values()} == {jnp.dtype("float64")}


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(("make", "settings"), SETUPS.values(), ids=SETUPS)
def test_clipped_are_the_entries_beyond_the_radius(make, settings):
    """Between two neighbouring entries of the direction, wherever that is."""
    params = start()
    opt_state = trained(make(), params)
    _, shift, g, h, delta, _ = columns(expected_arrays(params, opt_state, settings))
    direction = np.sort(np.abs((g / (1 - B1**3) + delta * shift) / (h + delta)))
    clipped = jax.jit(
        lambda radius: diagnostics.measure(
            params, opt_state, **(SETTINGS | {"clip_radius": radius})
        )["clipped"]
    )
    for i in range(1, 8):
        assert clipped(direction[i - 1] * (1 + 1e-9)) == (8 - i) / 8
        assert clipped(direction[i] * (1 - 1e-9)) == (8 - i) / 8


def loss_fn(theta):
    """Neither quadratic nor separable; b[1] has no gradient, adam's scale has."""
    return jnp.sum(jnp.sin(theta["w"])) * jnp.cos(theta["b"][0]) * theta["scale"]


def gradient(w, b):
    """That of `loss_fn` at scale 1, in the order of `columns`."""
    by_b = np.array([-np.sin(w).sum() * np.sin(b[0]), 0.0])
    return np.concatenate([(np.cos(w) * np.cos(b[0])).ravel(), by_b])


def loss_numbers(m, shift, h, delta, ess, thetas):
    """The numbers of a loss at given samples, in NumPy."""
    variance = 1 / (ess * (h + delta))
    grads = np.array([gradient(theta[:6], theta[6:]) for theta in thetas])
    losses = [np.sin(t[:6]).sum() * np.cos(t[6]) for t in thetas]
    at_mean, at_prior = (
        np.sin(t[:6]).sum() * np.cos(t[6]) for t in (m, np.subtract(m, shift))
    )
    step = (1 - B2) * (grads * (thetas - m) / variance - h)
    terms = np.sort(np.abs(step) / (2 * (h + delta)), axis=1)
    noise = np.sum(grads.var(axis=0, ddof=1))
    signal = np.sum(grads.mean(axis=0) ** 2) - noise / len(grads)
    median = terms[:, (m.size - 1) // 2].mean()
    return {
        "loss_at_mean": at_mean,
        "loss_at_samples": np.mean(losses),
        "loss_gap": np.mean(losses) - at_mean,
        "loss_gain": at_prior - np.mean(losses),
        "felt_params": 2 * np.mean(ess) * (np.mean(losses) - at_mean),
        "expected_gap": 0.5 * np.sum(variance * h),
        "gradient_snr": max(signal, 0) / noise,
        "zero_gradients": 1 / 8,
        "correction_median": median,
        "correction_mean": terms.mean(),
        "hess_noise": median * np.sqrt(2 / (1 - B2)),
    }


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(("make", "settings"), SETUPS.values(), ids=SETUPS)
def test_numbers_of_a_loss_are_their_formulas_at_the_samples_of_split_keys(
    make, settings, key
):
    params = start()
    opt_state = trained(make(), params)
    m, shift, _, h, delta, ess = columns(expected_arrays(params, opt_state, settings))
    numbers = jax.jit(
        lambda p, s, k: diagnostics.measure(
            p, s, **SETTINGS, loss_fn=loss_fn, key=k, num_samples=5
        )
    )(params, opt_state, key)
    thetas = [ivon_jax.sample(k, params, opt_state) for k in jax.random.split(key, 5)]
    thetas = np.array([np.concatenate([t["w"].ravel(), t["b"]]) for t in thetas])
    without = diagnostics.measure(params, opt_state, **SETTINGS)
    expected = loss_numbers(m, shift, h, delta, ess, thetas)
    assert_numbers({k: numbers[k] for k in set(numbers) - set(without)}, expected)
    assert_numbers({k: numbers[k] for k in without}, without)


def test_numbers_of_predictions_are_their_formulas(key):
    params, opt_state = small()
    inputs = jax.random.normal(jax.random.key(8), (50, 4))
    labels = (inputs[:, 1] > 0).astype(int)

    def probs(theta):
        return jax.nn.softmax(jnp.stack([inputs @ theta, inputs @ theta[::-1]], 1))

    numbers = diagnostics.measure(
        params, opt_state, fn=probs, labels=labels, key=key, num_samples=3
    )
    keys = jax.random.split(key, 3)
    averaged = np.mean(
        [probs(ivon_jax.sample(k, params, opt_state)) for k in keys], axis=0
    )
    rows = np.arange(50)
    before, after = (-np.log(p[rows, labels]) for p in (probs(params), averaged))
    right, sure = averaged.argmax(1) == np.asarray(labels), averaged.max(1)

    def at_least(x):
        return x.mean() - 3 * x.std() / np.sqrt(50)

    expected = {
        "nll_at_mean": before.mean(),
        "nll_of_samples": after.mean(),
        "nll_excess": at_least(after - before) / before.mean(),
        "accuracy": right.mean(),
        "confidence": sure.mean(),
        "confidence_gap": at_least(right - sure),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.statistical
def test_the_gap_of_a_quadratic_loss_is_the_expected_one(key):
    """E[l(theta)] - l(m) = sum sigma^2 h / 2 = gamma / 2 ess where h is the Hessian."""
    hess = jnp.linspace(0.5, 2.0, 4)
    params, opt_state = small(hess=hess, ess=10.0)

    def gap(k):
        numbers = diagnostics.measure(
            params,
            opt_state,
            **HEALTHY_SETTINGS,
            loss_fn=lambda theta: 0.5 * jnp.sum(hess * (theta - 0.1) ** 2),
            key=k,
            num_samples=2,
        )
        return numbers["loss_gap"], numbers["expected_gap"], numbers["effective_params"]

    gaps, expected, gamma = jax.jit(jax.vmap(gap))(jax.random.split(key, 1000))
    assert_mean(gaps, expected[0])
    np.testing.assert_allclose(expected, gamma / 20.0, rtol=1e-6)


@given(
    arrays=st.lists(
        st.lists(
            st.sampled_from([-1e30, -2.0, 0.0, 1e-30, 0.1, 1.0, 1.5, 7.0, 1e30])
            | st.floats(-10, 10, width=32).map(lambda x: x * (abs(x) > 1e-35)),
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ).filter(any)
)
@example(arrays=[[-2.0, 1.0, 2.4939376309121963e-32]])
@example(arrays=[[-3e38, 3e38, 2e38, 1e38]])
@example(arrays=[[np.inf, 1.0, 2.0]])
@example(arrays=[[-np.inf, 1.0, 2.0], [5.0, np.inf]])
@example(arrays=[[-np.inf, np.inf, np.inf]])
@example(arrays=[[0.0, -1.0, 0.0, 1.0]])
@settings(max_examples=30, deadline=None)
def test_the_median_without_a_sort_is_that_of_a_sort(arrays):
    """Of several arrays, empty ones too; with ties and outliers."""
    entries = np.sort(np.concatenate([np.asarray(x, np.float32) for x in arrays]))
    median = ranks.lower_median([jnp.asarray(x, jnp.float32) for x in arrays])
    np.testing.assert_array_equal(median, entries[(len(entries) - 1) // 2])


@pytest.mark.parametrize("size", [1, 2, 9_999, 10_000])
def test_the_median_of_many_is_exact(size, key):
    entries = jax.random.normal(key, (size,)) ** 3
    expected = np.sort(entries)[(size - 1) // 2]
    np.testing.assert_array_equal(ranks.lower_median([entries]), expected)


def test_every_function_of_the_posterior_lowers_with_1e10_parameters():
    """Where int32 ends at 2e9, and three times the size at 7e8."""
    shapes = {"w": (100_000, 99_999), "b": (10**5,), "one": ()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }
    tx = ivon_jax.ivon(0.1, ess=1e6)

    def everything(params, key, sparsity):
        opt_state = tx.init(params)
        q, prior = (f(params, opt_state) for f in (ivon_jax.posterior, ivon_jax.prior))
        numbers = diagnostics.measure(
            params,
            opt_state,
            clip_radius=1.0,
            loss_fn=lambda theta: theta["one"],
            key=key,
        )
        mixture = ivon_jax.Mixture([q, q])
        kept = pruning.by_variance(q, 0.5), pruning.by_signal_to_noise(q, sparsity)
        curve = pruning.curve(lambda theta: theta["one"], q, [0.1, 0.2])
        values = q.log_prob(params), q.entropy(), q.kl_divergence(prior)
        trees = q.sample(key), q.natural_parameters, q.tempered(2.0).variance
        of_members = mixture.sample(key), mixture.log_prob(params), mixture.member(1)
        return numbers, kept, curve, values, trees, of_members

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    jax.jit(everything).lower(params, key, jax.ShapeDtypeStruct((), jnp.float32))


def test_a_median_with_a_nan_is_nan_and_ends():
    assert jnp.isnan(ranks.lower_median([jnp.array([1.0, jnp.nan, 2.0])]))


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.999])
def test_memory_and_target_are_those_of_the_moving_average(b2):
    """h = b2^t hess_init + (1 - b2^t) c for estimates c, where the correction is tiny:
    here for estimates that lie within 1 % of h."""
    params = jnp.ones(5)
    tx = ivon_jax.ivon(0.1, ess=10, hess_init=1.0, b2=b2)
    opt_state = tx.init(params)
    target = 1.0 + jnp.linspace(0.0, 0.01, 5)
    for _ in range(4):
        _, opt_state = tx.update(params, opt_state, params, hess=target)
    numbers = diagnostics.measure(params, opt_state, hess_init=1.0, b2=b2)
    np.testing.assert_allclose(numbers["hess_memory"], b2**4, rtol=1e-6)
    np.testing.assert_allclose(numbers["hess_target"], target.mean(), atol=1e-4)


@pytest.mark.parametrize("b2", [0.999999, 0.99999999])
def test_memory_of_a_long_average_is_not_rounded(b2):
    """In float32, 1 - 0.999999 is 1.3 % off, and 0.99999999 is one."""
    params, opt_state = small(count=10**6)
    numbers = diagnostics.measure(params, opt_state, hess_init=1.0, b2=b2)
    np.testing.assert_allclose(numbers["hess_memory"], b2**1e6, rtol=1e-6)
    half_life = np.log(2) / (1 - b2)
    np.testing.assert_allclose(numbers["hess_half_life"], half_life, rtol=1e-5)


def test_hyperparameters_may_be_arrays():
    """As `optax.inject_hyperparams` keeps them."""
    params, opt_state = small(count=100)
    numbers = {"hess_init": 1.0, "b2": 0.999, "b1": 0.9, "clip_radius": 0.01}
    arrays = jax.tree.map(jnp.asarray, numbers)
    one = diagnostics.measure(params, opt_state, **numbers)
    other = jax.jit(lambda x: diagnostics.measure(params, opt_state, **x))(arrays)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.usefixtures("standard_promotion")
def test_the_states_of_a_partition_can_be_measured_one_by_one():
    """Each over its own arrays; the effective parameters of all add up."""
    params = start()
    opt_state = trained(groups(), params)
    whole = diagnostics.measure(params, opt_state, **SETTINGS)
    wide, narrow = (
        diagnostics.measure(params, opt_state.inner_states[label], **SETTINGS)
        for label in ("wide", "narrow")
    )
    assert (wide["num_params"], narrow["num_params"]) == (6, 2)
    assert (wide["ess"], narrow["ess"]) == (5, 90)
    total = wide["effective_params"] + narrow["effective_params"]
    np.testing.assert_allclose(whole["effective_params"], total, rtol=1e-6)


def test_an_ensemble_is_measured_by_vmap(key):
    params = jnp.ones((3, 4)) * jnp.arange(1.0, 4.0)[:, None]
    tx = ivon_jax.ivon(0.1, ess=10)
    opt_state = jax.vmap(tx.init)(params)

    def measure(p, s, k):
        return diagnostics.measure(p, s, **HEALTHY_SETTINGS, loss_fn=jnp.sum, key=k)

    keys = jax.random.split(key, 3)
    many = jax.jit(jax.vmap(measure))(params, opt_state, keys)
    for i in range(3):
        one = jax.jit(measure)(params[i], tx.init(params[i]), keys[i])
        for name, value in one.items():
            np.testing.assert_allclose(many[name][i], value, rtol=1e-5, err_msg=name)


# A state about which nothing is to be said, and settings to spoil it with.
HEALTHY_SETTINGS = {"hess_init": 1.0, "b2": 0.99999}


def small(*, params=(1.0, -1.0, 2.0, 0.5), dtype=None, hess=1.0, ess=100.0, **fields):
    """A state of four parameters in the middle of a run."""
    params = jnp.asarray(params, dtype)
    fields = {"count": 50_000} | fields
    state = ivon_jax.scale_by_ivon(ess=ess, hess_init=1.0).init(params)
    h = jnp.broadcast_to(jnp.asarray(hess, state.hess.dtype), params.shape)
    replaced = {
        k: jnp.asarray(v, jnp.result_type(getattr(state, k))) for k, v in fields.items()
    }
    return params, state._replace(hess=h, **replaced)


def quadratic(theta):
    """A loss that is least at the parameters of `small`."""
    distance = theta.astype(jnp.float32) - jnp.array([1.0, -1.0, 2.0, 0.5])
    return 0.5 * jnp.sum(distance**2)


NO_LABELS = jnp.zeros(50, int)


def two_classes(right):
    """Probabilities of fifty examples, of the first class and of the other."""
    return jnp.broadcast_to(jnp.stack([right, 1.0 - right]), (50, 2))


def fragile(theta):
    """Probabilities that noise takes away."""
    return two_classes(0.6 * jnp.exp(-200.0 * (theta[0] - 1.0) ** 2))


def unsure(theta):
    return two_classes(0.6 + 0.0 * theta[0])


CASES = {
    "nan_mean": ({"params": [1.0, np.nan, 1.0, 1.0]}, {}, "DIVERGED"),
    "inf_momentum": ({"momentum": [0.0, 0.0, np.inf, 0.0]}, {}, "DIVERGED"),
    "nan_hessian": ({"hess": [1.0, 1.0, 1.0, np.nan]}, {}, "DIVERGED"),
    "nan_loss": ({}, {"loss_fn": lambda t: jnp.log(-(t[0] ** 2))}, "DIVERGED"),
    "inf_loss": ({}, {"loss_fn": lambda t: jnp.sum(t) / 0.0}, "DIVERGED"),
    "dead": ({}, {"loss_fn": lambda t: jnp.maximum(t[0], 50.0)}, "DEAD"),
    "peak": ({"hess": [1.0, 1.0, 2e4, 1.0]}, {}, "PEAK"),
    "wide": ({"ess": 0.2}, {"loss_fn": lambda t: 0.01 * quadratic(t)}, "WIDE"),
    "wide_at_zero": ({"params": [0.0] * 4}, {}, "WIDE"),
    "gap": ({}, {"loss_fn": lambda t: 100.0 * quadratic(t)}, "GAP"),
    "gap_to_infinity": (
        {"ess": 4.0},
        {"loss_fn": lambda t: jnp.where(t[0] > 1.0, jnp.inf, t[0])},
        "GAP",
    ),
    "untrained": ({}, {"loss_fn": lambda t: 0.5 * jnp.sum(t**2)}, "UNTRAINED"),
    "idle": ({}, {"loss_fn": lambda t: 1.0 + 0.01 * quadratic(t)}, "IDLE"),
    "worse": ({}, {"fn": fragile, "labels": NO_LABELS}, "WORSE"),
    "unsure": ({}, {"fn": unsure, "labels": NO_LABELS}, "UNSURE"),
    "batches": ({}, {"num_examples": 1600, "batch_size": 16}, "BATCHES"),
    "narrow": ({"ess": 1e9}, {}, "NARROW"),
    "memory": ({"count": 2_000}, {}, "MEMORY"),
    "memory_of_the_whole_run": ({}, {"num_steps": 2_000}, "MEMORY"),
    "unlearned": ({"hess": 0.99999**50_000}, {}, "UNLEARNED"),
    "noisy": ({}, {"b2": 0.99, "loss_fn": lambda t: 0.8 * jnp.sum(t)}, "NOISY"),
    "corrected": ({}, {"b2": 0.9, "loss_fn": lambda t: 10.0 * t[0]}, "CORRECTED"),
    "clipped": ({"momentum": 1.0}, {"clip_radius": 1e-3}, "CLIPPED"),
    "rounded": ({"dtype": jnp.bfloat16, "ess": 1e5}, {}, "ROUNDED"),
    "stuck": ({"count": 10**9}, {"b2": 1.0 - 1e-9}, "STUCK"),
}


def advice_of(state, settings, key):
    params, opt_state = small(**state)
    settings = HEALTHY_SETTINGS | {"loss_fn": quadratic, "key": key} | settings
    return diagnostics.diagnose(params, opt_state, **settings, num_samples=16).advice


@pytest.mark.parametrize(("state", "settings", "name"), CASES.values(), ids=CASES)
def test_each_rule_is_provoked_alone(state, settings, name, key):
    [sentence] = advice_of(state, settings, key)
    beginning = getattr(_advice, name).split("{")[0]
    assert sentence.startswith(beginning)
    assert "{" not in sentence


def test_every_rule_is_provoked_and_of_a_number_that_is_measured():
    sentences = {sentence for _, _, _, sentence in diagnostics.HEALTHY}
    assert sentences == {getattr(_advice, name) for _, _, name in CASES.values()}
    params, opt_state = small()
    numbers = diagnostics.measure(
        params,
        opt_state,
        **HEALTHY_SETTINGS,
        clip_radius=1.0,
        loss_fn=quadratic,
        fn=unsure,
        labels=NO_LABELS,
        num_examples=1600,
        batch_size=16,
        key=jax.random.key(0),
    )
    assert {name for name, _, _, _ in diagnostics.HEALTHY} <= set(numbers)
    for name in numbers:
        assert f"``{name}``" in diagnostics.__doc__


def test_the_numbers_of_a_dead_network_are_no_nans():
    params, opt_state = small()
    settings = HEALTHY_SETTINGS | {"loss_fn": lambda t: 0.0 * t[0]}
    numbers = diagnostics.measure(params, opt_state, **settings, key=jax.random.key(0))
    assert all(jnp.isfinite(value) for value in numbers.values())
    assert numbers["gradient_snr"] == 0.0


def test_nothing_is_said_about_a_healthy_state(key):
    assert advice_of({}, {"clip_radius": 10.0}, key) == []


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.99999])
def test_a_run_with_the_mean_for_a_sample_is_told_whatever_the_rest(b2):
    """A copy of the parameters, which no check of identity can see."""
    params = jnp.array([1.0, -1.0, 2.0])
    tx = ivon_jax.ivon(1e-3, ess=100, hess_init=1.0, b2=b2)

    def step(carry, sigma):
        params, opt_state = carry
        theta = params + sigma * jnp.array([1.0, -1.0, 1.0])
        updates, opt_state = tx.update(theta, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def decayed(sigma):
        carry = params, tx.init(params)
        steps = jnp.full(2 + int(0.02 / (1 - b2)), sigma)
        carry, _ = jax.lax.scan(step, carry, steps)
        return diagnostics.measure(*carry, hess_init=1.0, b2=b2)["hess_decayed"]

    assert decayed(0.0) == 1.0
    assert decayed(1e-3) == 0.0


def test_a_clip_is_advised_with_what_goes_with_it():
    for sentence in (_advice.DIVERGED,):
        assert "clip_radius=1e-3 and rescale_lr=False" in sentence


def test_advice_says_the_numbers():
    [sentence] = diagnostics.advice({"hess_memory": 0.98})
    assert sentence.startswith("h stays 98% hess_init, unless training goes on")
    assert diagnostics.advice({"hess_memory": 1.0}) == []  # before the first step


def test_parameters_and_state_are_enough(key):
    """The settings are those of `ivon` by default."""
    params = jax.random.normal(key, (50,))
    opt_state = ivon_jax.ivon(0.1, ess=100).init(params)
    given = diagnostics.diagnose(params, opt_state, hess_init=1.0, b2=0.99999)
    assert diagnostics.diagnose(params, opt_state).numbers == given.numbers


@pytest.mark.parametrize("unstable", ["zero_gradients", "hess_peak", "loss_gap"])
def test_no_more_noise_is_advised_to_a_run_that_blew_up(unstable):
    numbers = {
        "noise_to_weight": 1e-5,
        "zero_gradients": 0.0,
        "hess_peak": 1.0,
        "loss_gap": 0.0,
    }
    [narrow] = diagnostics.advice(numbers)
    [other] = diagnostics.advice(numbers | {unstable: 1e6})
    assert "lower ess" in narrow
    assert "raise" in other


DIGITS = load_digits()
IMAGES = jnp.asarray(DIGITS.data[:898] / 16, jnp.float32)
LABELS = jnp.asarray(DIGITS.target[:898], jnp.int32)


def cross_entropy(params, rows):
    hidden = jax.nn.relu(IMAGES[rows] @ params["first"] + params["bias"][None])
    logits = hidden @ params["last"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows])
    return losses.mean()


@jax.jit
def digits_run(key, b2, ess):
    """Train a network of 32 hidden units for 110 epochs; its numbers."""
    first_key, last_key, train_key, batch_key, measure_key = jax.random.split(key, 5)
    params = {
        "first": jax.random.normal(first_key, (64, 32)) / 8.0,
        "bias": jnp.zeros(32),
        "last": jax.random.normal(last_key, (32, 10)) / 6.0,
    }
    schedule = optax.cosine_decay_schedule(1.0, 2000)
    tx = ivon_jax.ivon(schedule, ess=ess, hess_init=0.3, b2=b2)

    def step(carry, step_key):
        params, opt_state = carry
        batch_key, sample_key = jax.random.split(step_key)
        rows = jax.random.choice(batch_key, 898, (50,))
        theta = ivon_jax.sample(sample_key, params, opt_state)
        grads = jax.grad(cross_entropy)(theta, rows)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(train_key, 2000)
    (params, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    rows = jax.random.choice(batch_key, 898, (200,))
    return diagnostics.measure(
        params,
        opt_state,
        hess_init=0.3,
        b2=b2,
        loss_fn=lambda theta: cross_entropy(theta, rows),
        key=measure_key,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_good_run_on_digits_gets_no_advice(key):
    numbers = digits_run(key, jnp.float32(0.9997), 898.0)
    assert numbers["loss_at_samples"] < 0.1
    assert diagnostics.advice(numbers) == []


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("b2", "ess", "words"),
    [
        (0.999999, 898.0, "h stays 100% hess_init"),
        (0.9997, 1e9, "the posterior is nearly a point"),
    ],
)
def test_the_one_thing_wrong_with_a_run_on_digits_is_told(b2, ess, words):
    numbers = digits_run(jax.random.key(0), jnp.float32(b2), ess)
    [sentence] = diagnostics.advice(numbers)
    assert words in sentence


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_on_digits_that_collapsed_is_told():
    """With b2 = 0.99 the Hessian collapses, the noise grows, and units die of it."""
    numbers = digits_run(jax.random.key(0), jnp.float32(0.99), 898.0)
    advice = " ".join(diagnostics.advice(numbers))
    assert numbers["loss_at_mean"] > 2.0
    assert "units may be dead" in advice
    assert "bring b2 closer to one" in advice


PARAMS, STATE = small()
BAD = [
    ({"hess_init": 0.0}, ValueError, "`hess_init` must be positive, got 0.0."),
    (
        {"b1": 1.0, "clip_radius": 1.0},
        ValueError,
        "`b1` must be in [0, 1), got 1.0.",
    ),
    ({"b2": 1.0}, ValueError, "`b2` must be in [0, 1), got 1.0."),
    ({"clip_radius": -1}, ValueError, "`clip_radius` must be positive, got -1."),
    ({"num_steps": 0}, ValueError, "`num_steps` must be at least 1, got 0."),
    (
        {"loss_fn": quadratic},
        ValueError,
        "`key` must be a JAX random key where `loss_fn` is given, got None. Pass ",
    ),
    (
        {"loss_fn": quadratic, "key": jax.random.key(0), "num_samples": 1},
        ValueError,
        "`num_samples` must be at least 2, got 1.",
    ),
    (
        {"loss_fn": lambda t: t, "key": jax.random.key(0)},
        ValueError,
        "`loss_fn` must return a scalar, the mean loss per example, got shape (4,).",
    ),
    (
        {"fn": unsure, "labels": NO_LABELS},
        ValueError,
        "`key` must be a JAX random key where `fn` is given, got None. Pass ",
    ),
    (
        {"fn": unsure, "key": jax.random.key(0)},
        ValueError,
        "`labels` must be given with `fn`, got None.",
    ),
    (
        {"fn": unsure, "labels": NO_LABELS - 1, "key": jax.random.key(0)},
        ValueError,
        "`labels` must be in 0..1, got -1.",
    ),
    (
        {"fn": unsure, "labels": jnp.zeros(50), "key": jax.random.key(0)},
        TypeError,
        "`labels` must be integers, got dtype float32.",
    ),
    (
        {"fn": unsure, "labels": NO_LABELS[:3], "key": jax.random.key(0)},
        ValueError,
        "`labels` must have the shape of `fn(theta)` without its last axis, that of "
        "classes, got (3,) and (50, 2).",
    ),
    (
        {"batch_size": 8},
        ValueError,
        "`num_examples` must be given with `batch_size`, got None.",
    ),
    (
        {"batch_size": 8, "num_examples": 0},
        ValueError,
        "`num_examples` must be at least 1, got 0.",
    ),
    (
        {"params": jnp.zeros((0, 4)), "opt_state": small(params=np.zeros((0, 4)))[1]},
        ValueError,
        "`params` must have an entry that IVON trains, got none: its arrays are empty",
    ),
    (
        {"opt_state": optax.adam(1e-3).init(PARAMS)},
        ValueError,
        "`opt_state` must contain the state of `ivon_jax.ivon`",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_arguments_that_do_not_fit_are_named(arguments, error, message):
    good = {"params": PARAMS, "opt_state": STATE} | HEALTHY_SETTINGS
    with pytest.raises(error, match=re.escape(message)):
        diagnostics.measure(**(good | arguments))


def test_advice_needs_known_numbers():
    message = "`numbers` must be known, got a tracer for 'hess_memory'. Call "
    with pytest.raises(TypeError, match=re.escape(message)):
        jax.jit(lambda x: diagnostics.advice({"hess_memory": x}))(1.0)


def test_advice_is_for_one_run():
    message = "`numbers` must be scalars, those of one run, got shape (3,) for 'count'."
    with pytest.raises(ValueError, match=re.escape(message)):
        diagnostics.advice({"count": jnp.ones(3)})
