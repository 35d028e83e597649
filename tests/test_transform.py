"""IVON as an optax transformation: state, dtypes, options, and clear errors."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ivon_jax

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3), "scale": jnp.ones(())}
GRADS = jax.tree.map(jnp.cos, PARAMS)


def step(tx, params, opt_state, key, grads=None):
    """One step at a sample, with the gradient cos(theta) unless given."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.tree.map(jnp.cos, theta) if grads is None else grads
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


def test_update_keeps_structure_shapes_and_dtypes(key):
    tx = ivon_jax.ivon(0.1, ess=100)
    opt_state = tx.init(PARAMS)
    _, new_state = step(tx, PARAMS, opt_state, key)
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, opt_state)


def test_state_holds_arrays_only():
    leaves = jax.tree.leaves(ivon_jax.ivon(0.1, ess=100).init(PARAMS))
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in leaves)


def test_a_jitted_init_is_init():
    """Also of a prior, which the state copies."""
    prior = ivon_jax.Posterior.isotropic(PARAMS, 2.0)
    for options in {}, {"prior": prior}:
        tx = ivon_jax.ivon(0.1, ess=100, hess_init=0.3, **options)
        chex.assert_trees_all_equal(jax.jit(tx.init)(PARAMS), tx.init(PARAMS))


def test_jitted_step_compiles_once(key):
    tx = ivon_jax.ivon(0.1, ess=100)
    params, opt_state = PARAMS, tx.init(PARAMS)
    traces = []

    @jax.jit
    def train_step(params, opt_state, key):
        traces.append(1)
        return step(tx, params, opt_state, key)

    for step_key in jax.random.split(key, 3):
        params, opt_state = train_step(params, opt_state, step_key)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_accumulators_are_float32_and_updates_like_params(dtype, key):
    tx = ivon_jax.ivon(0.1, ess=100, clip_radius=0.5)
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    opt_state = tx.init(params)
    theta = ivon_jax.sample(key, params, opt_state)
    updates, opt_state = tx.update(theta, opt_state, params, sample=theta)
    [state] = ivon_jax.find_states(opt_state)
    for tree in (theta, updates):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    for tree in (state.hess, state.momentum):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("x64")
def test_accumulators_are_as_wide_as_their_parameter(key):
    """Under x64 each leaf keeps its own precision, mixed trees included."""
    tx = ivon_jax.scale_by_ivon(ess=100)
    dtypes = {"a": jnp.float64, "b": jnp.float32, "c": jnp.bfloat16}
    params = jax.tree.map(lambda dtype: jnp.ones(2, dtype), dtypes)
    opt_state = tx.init(params)
    params, opt_state = step(tx, params, opt_state, key)
    found = jax.tree.map(lambda h: h.dtype, opt_state.hess)
    assert found == {"a": jnp.float64, "b": jnp.float32, "c": jnp.float32}
    assert jax.tree.map(lambda p: p.dtype, params) == dtypes
    assert opt_state.ess.dtype == jnp.float64


def test_float16_updates_do_not_overflow_between_the_steps():
    """A direction of 1e5 is inf in float16; the update, a thousandth of it, is not."""
    tx = ivon_jax.ivon(0.1, ess=100, hess_init=0.01, weight_decay=0.0, b1=0.0)
    params = jnp.zeros(2, jnp.float16)
    grads, hess = jnp.full(2, 1e3, jnp.float16), jnp.full(2, 0.01)
    updates, _ = tx.update(grads, tx.init(params), params, hess=hess)
    np.testing.assert_allclose(updates.astype(jnp.float32), -100.0, rtol=1e-3)


def test_hess_is_the_curvature_of_the_step():
    """With h_hat = h the Hessian stays, and the first step is SGD's, with L2."""
    tx = ivon_jax.ivon(0.1, ess=100, hess_init=2.0, weight_decay=0.5)
    opt_state = tx.init(PARAMS)
    hess = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    updates, opt_state = tx.update(GRADS, opt_state, PARAMS, hess=hess)
    expected = jax.tree.map(lambda g, p: -0.1 * (g + 0.5 * p), GRADS, PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal(ivon_jax.find_states(opt_state)[0].hess, hess)


def test_sample_stands_for_the_product_with_its_perturbation(key):
    """``sample=theta`` is ``hess=grad (theta - m) / sigma^2``."""
    tx = ivon_jax.ivon(0.1, ess=100)
    opt_state = tx.init(PARAMS)
    theta = ivon_jax.sample(key, PARAMS, opt_state)
    precision = ivon_jax.posterior(PARAMS, opt_state).precision
    hess = jax.tree.map(
        lambda g, t, m, p: g * (t - m) * p, GRADS, theta, PARAMS, precision
    )
    at_sample = tx.update(GRADS, opt_state, PARAMS, sample=theta)
    with_hess = tx.update(GRADS, opt_state, PARAMS, hess=hess)
    chex.assert_trees_all_close(at_sample, with_hess, rtol=1e-6)


def test_clip_radius_bounds_each_entry_of_the_direction():
    """Entries of the direction lie on both sides of the radius: some are cut."""
    settings = {"ess": 100, "rescale_lr": False}
    hess = jax.tree.map(jnp.ones_like, PARAMS)
    free, cut = (
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=hess)[0]
        for tx in (
            ivon_jax.ivon(2.0, **settings),
            ivon_jax.ivon(2.0, clip_radius=0.5, **settings),
        )
    )
    expected = jax.tree.map(lambda u: jnp.clip(u, -2.0 * 0.5, 2.0 * 0.5), free)
    chex.assert_trees_all_close(cut, expected, rtol=1e-6)
    assert any(jnp.any(jnp.abs(u) > 1.0) for u in jax.tree.leaves(free))


@pytest.mark.parametrize("clip_radius", [None, 0.5])
def test_rescale_lr_multiplies_the_learning_rate(clip_radius, key):
    """By hess_init + weight_decay, clipped or not: the switches are independent."""
    settings = {"ess": 10, "hess_init": 0.3, "weight_decay": 0.2}
    rescaled = ivon_jax.ivon(0.1, clip_radius=clip_radius, rescale_lr=True, **settings)
    plain = ivon_jax.ivon(
        0.1 * (0.3 + 0.2), clip_radius=clip_radius, rescale_lr=False, **settings
    )
    results = [step(tx, PARAMS, tx.init(PARAMS), key)[0] for tx in (rescaled, plain)]
    chex.assert_trees_all_close(*results, rtol=1e-6)


@pytest.mark.parametrize(("clip_radius", "rescaled"), [(None, True), (1e-2, False)])
def test_clipping_turns_rescaling_off_unless_told(clip_radius, rescaled):
    """As in the paper: entries of the first step are lr times the radius."""
    settings = {"ess": 10, "hess_init": 0.3, "clip_radius": clip_radius}
    default, same, other = (
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=GRADS)[0]["b"]
        for tx in (
            ivon_jax.ivon(0.1, **settings),
            ivon_jax.ivon(0.1, rescale_lr=rescaled, **settings),
            ivon_jax.ivon(0.1, rescale_lr=not rescaled, **settings),
        )
    )
    np.testing.assert_array_equal(default, same)
    assert jnp.all(default != other)
    if clip_radius is not None:
        np.testing.assert_allclose(jnp.abs(default), 0.1 * clip_radius, rtol=1e-6)


def test_ivon_is_scale_by_ivon_and_a_learning_rate(key):
    rule = ivon_jax.scale_by_ivon(ess=100)
    chained = optax.chain(rule, optax.scale_by_learning_rate(0.1))
    ready = ivon_jax.ivon(0.1, ess=100, rescale_lr=False)
    results = [step(tx, PARAMS, tx.init(PARAMS), key)[0] for tx in (chained, ready)]
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_learning_rate_may_be_a_schedule(key):
    """The schedule's first two values, one step each."""
    rates = jnp.array([0.1, 0.05])
    tx = ivon_jax.ivon(lambda count: rates[count], ess=100)
    params, opt_state = PARAMS, tx.init(PARAMS)
    expected, expected_state = params, opt_state
    for rate in (0.1, 0.05):
        params, opt_state = step(tx, params, opt_state, key, GRADS)
        fixed = ivon_jax.ivon(lambda _, rate=rate: rate, ess=100)
        expected, expected_state = step(fixed, expected, expected_state, key, GRADS)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_hess_estimate_uses_the_sigma_of_the_sample(key):
    """A scheduled ess changes the next sample's sigma, not that of the one drawn."""
    ess = jnp.array([100.0, 400.0])
    make = optax.inject_hyperparams(ivon_jax.ivon)
    tx = make(learning_rate=0.0, ess=lambda count: ess[count], b2=0.5)
    before = tx.init(PARAMS)
    theta = ivon_jax.sample(key, PARAMS, before)
    _, after = tx.update(GRADS, before, PARAMS, sample=theta)
    _, last = tx.update(GRADS, after, PARAMS, sample=theta)
    [old], [new] = ivon_jax.find_states(before), ivon_jax.find_states(last)
    assert (old.ess, new.ess) == (100.0, 400.0)
    fixed = ivon_jax.ivon(0.0, ess=100, b2=0.5)
    _, expected = fixed.update(GRADS, fixed.init(PARAMS), PARAMS, sample=theta)
    chex.assert_trees_all_close(
        ivon_jax.find_states(after)[0].hess, ivon_jax.find_states(expected)[0].hess
    )


def test_extra_arguments_of_others_are_accepted():
    tx = ivon_jax.ivon(0.1, ess=100)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=GRADS, value=1.0)


def test_empty_none_and_zero_size_leaves_are_no_obstacle(key):
    """As Equinox's filtered trees have them."""
    tx = ivon_jax.ivon(0.1, ess=100)
    params = {"a": None, "b": (), "c": jnp.ones((0, 3)), "d": jnp.ones(2)}
    new_params, _ = step(tx, params, tx.init(params), key)
    assert jax.tree.structure(new_params) == jax.tree.structure(params)


def test_sample_and_update_hold_no_noise_buffer():
    """The state is two trees like params and six scalars."""
    tx = ivon_jax.ivon(0.1, ess=100)
    leaves = jax.tree.leaves(tx.init(PARAMS))
    assert sum(leaf.size for leaf in leaves) == 2 * sum(
        leaf.size for leaf in jax.tree.leaves(PARAMS)
    ) + len(["count", "ess", "weight_decay", "b1", "one_minus_b2", "hess_init"])


def test_the_state_holds_the_settings():
    """1 - b2, because float32 rounds 1 - 1e-7 by a fifth of 1e-7."""
    tx = ivon_jax.ivon(0.1, ess=7, b1=0.8, b2=1 - 1e-7, hess_init=0.3, clip_radius=2.0)
    [state] = ivon_jax.find_states(tx.init(PARAMS))
    found = state.ess, state.b1, state.one_minus_b2, state.hess_init, state.clip_radius
    np.testing.assert_allclose(found, [7, 0.8, 1e-7, 0.3, 2.0], rtol=1e-6)
    [state] = ivon_jax.find_states(ivon_jax.scale_by_ivon(1.0).init(PARAMS))
    assert state.clip_radius is None


def test_the_state_holds_the_settings_of_the_last_step(key):
    """Those of a schedule, too."""
    tx = optax.inject_hyperparams(ivon_jax.ivon)(
        learning_rate=0.1,
        ess=10,
        b1=lambda t: 0.5 + 0.1 * t.astype(float),
        clip_radius=1.0,
    )
    opt_state = tx.init(PARAMS)
    for expected in (0.5, 0.6):
        _, opt_state = step(tx, PARAMS, opt_state, key)
        [state] = ivon_jax.find_states(opt_state)
        np.testing.assert_allclose(state.b1, expected, rtol=1e-6)


def test_a_state_without_settings_says_what_to_do(key):
    """As those of version 0.1 have none."""
    tx = ivon_jax.scale_by_ivon(10.0)
    opt_state = tx.init(PARAMS)
    old = ivon_jax.IVONState(*opt_state[:6])
    with pytest.raises(ValueError, match=r"of an older checkpoint.*tx\.init\(params\)"):
        step(tx, PARAMS, old, key)
    with pytest.raises(ValueError, match=r"of an older checkpoint.*tx\.init\(params\)"):
        ivon_jax.diagnostics.measure(PARAMS, old)
    copied = opt_state._replace(count=old.count, momentum=old.momentum, hess=old.hess)
    step(tx, PARAMS, copied, key)


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_clip_radius_that_the_state_was_not_made_with_is_refused(before, key):
    opt_state = ivon_jax.ivon(0.1, ess=10, clip_radius=before).init(PARAMS)
    after = ivon_jax.ivon(0.1, ess=10, clip_radius=1.0 if before is None else None)
    with pytest.raises(ValueError, match="`clip_radius` must be what the state was ma"):
        step(after, PARAMS, opt_state, key)


TX = ivon_jax.ivon(0.1, ess=100)
STATE = TX.init(PARAMS)


def test_update_without_params_says_what_to_pass():
    message = "`update` needs `params`, the posterior mean, got None. Call `tx.update("
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(GRADS, STATE, sample=PARAMS)


@pytest.mark.parametrize(
    ("given", "grads", "arguments"),
    [
        ("none", GRADS, {}),
        ("sample and hess", GRADS, {"sample": PARAMS, "hess": PARAMS}),
        (
            "sample and an `Estimate` for `grads`",
            ivon_jax.Estimate(GRADS, GRADS),
            {"sample": PARAMS},
        ),
    ],
)
def test_update_needs_one_source_of_curvature(given, grads, arguments):
    message = f"exactly one source of the Hessian, got {given}. Pass `sample=theta`"
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(grads, STATE, PARAMS, **arguments)


@pytest.mark.parametrize("name", ["sample", "hess"])
@pytest.mark.parametrize("tree", [{"w": 0}, [1, 2, 3], jnp.ones(3)], ids=str)
def test_trees_of_another_structure_are_named(name, tree):
    message = f"`{name}` must have the tree structure of `params`, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(GRADS, STATE, PARAMS, **{name: tree})


@pytest.mark.parametrize("name", ["sample", "hess"])
def test_trees_of_another_shape_are_named(name):
    """A shape that would broadcast is an error, too."""
    message = f"got () at {name}['w'], where `params` has (2, 3)."
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(GRADS, STATE, PARAMS, **{name: PARAMS | {"w": jnp.ones(())}})


def test_params_of_another_shape_than_the_states_are_named():
    message = "`params` must have the shapes of the optimizer's state, got (4,)"
    params = PARAMS | {"b": jnp.ones(4)}
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(params, STATE, params, sample=params)


def test_gradients_of_another_structure_are_named():
    message = "`grads` must have the tree structure of `params`, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update({"w": GRADS["w"]}, STATE, PARAMS, sample=PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_parameters_without_a_gaussian_are_named(dtype):
    message = f"`params` must be real floating-point arrays, got {dtype} at params['n']"
    with pytest.raises(TypeError, match=re.escape(message)):
        TX.init({"n": jnp.ones(2, dtype)})


CONSTRUCTORS = {
    "ivon": lambda **kwargs: ivon_jax.ivon(
        **{"learning_rate": 0.1, "ess": 100} | kwargs
    ),
    "scale_by_ivon": lambda **kwargs: ivon_jax.scale_by_ivon(**{"ess": 100} | kwargs),
}
NAN, INF = float("nan"), float("inf")
BAD_VALUES = [
    *[("ess", bad, "positive") for bad in (0, -1, -1.0, NAN, np.float32(-2))],
    *[("hess_init", bad, "positive") for bad in (0, 0.0, -1.0, NAN, np.array(0.0))],
    *[("weight_decay", bad, "non-negative") for bad in (-1, -1e-4, NAN)],
    *[(b, bad, "in [0, 1)") for b in ("b1", "b2") for bad in (-0.1, 1, 1.0, 2.0, NAN)],
    *[(name, INF, "finite") for name in ("ess", "hess_init", "weight_decay", "b2")],
]


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_horizon_makes_hess_an_average_over_the_run(make):
    """Estimates of zero leave the share e^-1 of h_0, but for the correction term."""
    tx = make(horizon=1000)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS)

    def update(_, state):
        return tx.update(zeros, state, PARAMS, hess=zeros)[1]

    [state] = ivon_jax.find_states(jax.lax.fori_loop(0, 1000, update, state))
    np.testing.assert_allclose(state.one_minus_b2, 1e-3, rtol=1e-6)
    share = jax.tree.map(lambda h: h / state.hess_init, state.hess)
    for leaf in jax.tree.leaves(share):
        np.testing.assert_allclose(leaf, np.exp(-1), rtol=2e-3)


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_horizon_beside_b2_is_refused(make):
    with pytest.raises(ValueError, match=r"`b2` must be left out .*, got 0\.9"):
        make(b2=0.9, horizon=100)


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_horizon_is_at_least_one_step(make):
    with pytest.raises(ValueError, match=r"`horizon` must be at least 1, got 0\."):
        make(horizon=0)


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
@pytest.mark.parametrize(("name", "bad", "allowed"), BAD_VALUES)
def test_a_value_out_of_range_is_named(make, name, bad, allowed):
    message = f"`{name}` must be {allowed}, got {bad}."
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        *[("learning_rate", bad, "non-negative") for bad in (-0.1, NAN)],
        ("learning_rate", INF, "finite"),
        *[("clip_radius", bad, "positive") for bad in (0, 0.0, -1e-3, NAN)],
        ("clip_radius", INF, "finite"),
    ],
)
def test_a_value_out_of_range_is_named_by_ivon(name, bad, allowed):
    message = f"`{name}` must be {allowed}, got {bad}."
    with pytest.raises(ValueError, match=re.escape(message)):
        CONSTRUCTORS["ivon"](**{name: bad})


NUMBERS = [
    "learning_rate",
    "ess",
    "hess_init",
    "b1",
    "b2",
    "weight_decay",
    "clip_radius",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("bad", ["0.1", True, 1j, [0.1]], ids=repr)
def test_a_value_of_the_wrong_type_is_named(name, bad):
    message = f"`{name}` must be a number, got {bad!r}."
    with pytest.raises(TypeError, match=re.escape(message)):
        CONSTRUCTORS["ivon"](**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("ess", jnp.float32(-1), "positive"),
        ("hess_init", jnp.array(jnp.nan), "positive"),
        ("weight_decay", jnp.float32(-1), "non-negative"),
        ("b2", jnp.float32(1), "in [0, 1)"),
        ("learning_rate", jnp.float32(-1), "non-negative"),
        ("clip_radius", jnp.float32(0), "positive"),
        ("ess", jnp.float32(INF), "finite"),
    ],
)
def test_a_concrete_jax_array_out_of_range_is_named(name, bad, allowed):
    """Tracers alone cannot be checked."""
    message = f"`{name}` must be {allowed}, got {bad}."
    with pytest.raises(ValueError, match=re.escape(message)):
        CONSTRUCTORS["ivon"](**{name: bad})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ess", 1e-15, 1e18),
        ("hess_init", 1e-15, 1e15),
        ("weight_decay", 0.0, 1e15),
    ],
)
def test_at_the_bounds_of_the_scalars_sigma_is_finite(name, low, high):
    """In float32, together with the other bounds; beyond them is an error."""
    for value in (low, high):
        extremes = {"ess": (1e-15, 1e18), "hess_init": (1e-15, 1e15)}
        for ess in extremes["ess"]:
            for hess_init in extremes["hess_init"]:
                settings = {"ess": ess, "hess_init": hess_init, "weight_decay": 0.0}
                tx = ivon_jax.scale_by_ivon(**settings | {name: value})
                q = ivon_jax.posterior(jnp.ones(1), tx.init(jnp.ones(1)))
                assert 0 < q.precision < jnp.inf
                assert 0 < q.variance < jnp.inf
    for beyond in {2 * high, low / 2 or -1e-9}:
        with pytest.raises(ValueError, match=f"`{name}` must be "):
            CONSTRUCTORS["ivon"](**{name: beyond})


@pytest.mark.parametrize("ess", [0.1, 1.0, lambda _: 0.1])
def test_a_learning_rate_and_ess_in_each_others_place_are_told(ess):
    message = "`learning_rate` must come first, then `ess`, the number of examples, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        ivon_jax.ivon(1000, ess)
    ivon_jax.ivon(1000, 1.5), ivon_jax.ivon(5.0, 0.5)


@pytest.mark.parametrize("bad", [1e39, 10**400, 1e-50], ids=["1e39", "1e400", "1e-50"])
def test_a_number_that_float32_cannot_hold_is_named(bad):
    """It would be infinite, or zero, in the state."""
    with pytest.raises(ValueError, match=r"`ess` must be at (most|least) \S+, got 1"):
        ivon_jax.ivon(0.1, ess=bad)


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float32])
def test_numbers_of_any_kind_give_the_same_step(kind):
    names = {"ess": 100, "hess_init": 0.5, "weight_decay": 0.25, "b1": 0.5, "b2": 0.75}
    plain, other = (
        ivon_jax.ivon(kind(0.5), **{name: kind(x) for name, x in names.items()})
        for kind in (float, kind)
    )
    steps = [
        tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=GRADS) for tx in (plain, other)
    ]
    chex.assert_trees_all_close(*steps, rtol=1e-6)


@pytest.mark.parametrize("kind", [int, np.int8, jnp.int8, jnp.int32])
def test_integers_are_the_same_settings(kind):
    """Those of few bits, too, where sums would overflow."""
    names = {"ess": 100, "hess_init": 127, "weight_decay": 127, "b1": 0, "b2": 0}

    def step(kind):
        tx = ivon_jax.ivon(kind(1), **{name: kind(x) for name, x in names.items()})
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=GRADS)

    chex.assert_trees_all_close(step(kind), step(float), rtol=1e-6)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_array_is_not_a_scalar(name):
    message = f"`{name}` must be a real scalar, got an array of shape (2,)"
    with pytest.raises(TypeError, match=re.escape(message)):
        CONSTRUCTORS["ivon"](**{name: jnp.ones(2)})


@pytest.mark.parametrize("bad", ["yes", 1, 0.5])
def test_rescale_lr_is_a_boolean(bad):
    message = f"`rescale_lr` must be True or False, got {bad!r}."
    with pytest.raises(TypeError, match=re.escape(message)):
        CONSTRUCTORS["ivon"](rescale_lr=bad)


def test_a_schedule_for_ess_is_sent_to_inject_hyperparams():
    message = "To schedule it, use `optax.inject_hyperparams`."
    with pytest.raises(TypeError, match=re.escape(message)):
        ivon_jax.ivon(0.1, ess=lambda count: 100.0 * count)


def test_a_low_precision_hyperparameter_is_refused():
    """b2 = 0.99999 in bfloat16 is 1: the Hessian would freeze in silence."""
    tx = optax.inject_hyperparams(ivon_jax.ivon)(learning_rate=0.1, ess=100)
    message = "must be float32 or wider, got bfloat16"
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.init(jnp.ones(2, jnp.bfloat16))


@pytest.mark.parametrize("name", NUMBERS)
def test_tracers_pass_through(name):
    """As under vmap over hyperparameters, or `optax.inject_hyperparams` in jit."""

    def first_updates(value):
        tx = CONSTRUCTORS["ivon"](**{name: value})
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, hess=GRADS)[0]

    by_vmap = jax.vmap(first_updates)(jnp.array([0.2, 0.5]))
    one_by_one = [first_updates(value) for value in (0.2, 0.5)]
    expected = jax.tree.map(lambda *updates: jnp.stack(updates), *one_by_one)
    chex.assert_trees_all_close(by_vmap, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_mean_itself_is_no_sample(transform):
    """With it h would decay without a word; one array of several is enough."""

    @transform
    def update(params):
        theta = jax.tree.map(lambda p: p + 1, params) | {"b": params["b"]}
        return TX.update(params, TX.init(params), params, sample=theta)

    message = "`sample` must be a draw of the posterior, got `params` itself at sample["
    with pytest.raises(ValueError, match=re.escape(message + "'b']")):
        update(PARAMS)


BAD_ESTIMATES = [NAN, INF, -INF, 1e35, -1e35, 1e30]


@pytest.mark.parametrize("bad", BAD_ESTIMATES)
def test_an_estimate_that_h_cannot_take_is_seen_and_h_stays(bad):
    """As a NaN gradient: in the update; the other entries know nothing of it."""
    hess = PARAMS | {"b": jnp.array([1.0, bad, 1.0])}
    expected, expected_state = TX.update(GRADS, STATE, PARAMS, hess=PARAMS)
    updates, opt_state = TX.update(GRADS, STATE, PARAMS, hess=hess)
    [state], [fine] = map(ivon_jax.find_states, (opt_state, expected_state))
    assert jnp.isnan(updates["b"][1])
    assert state.hess["b"][1] == 1.0
    others = jnp.array([0, 2])
    np.testing.assert_allclose(updates["b"][others], expected["b"][others], rtol=1e-6)
    np.testing.assert_allclose(state.hess["b"], fine.hess["b"], rtol=1e-6)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


def test_h_stays_where_the_gradient_is_nan():
    """Whatever its Hessian estimate is: the step is none, of mean and h alike."""
    grads = GRADS | {"b": jnp.array([1.0, jnp.nan, 1.0])}
    hess = jax.tree.map(lambda x: x + 10.0, PARAMS)
    updates, opt_state = TX.update(grads, STATE, PARAMS, hess=hess)
    moved = ivon_jax.find_states(opt_state)[0].hess["b"] != 1.0
    assert moved.tolist() == [True, False, True]
    assert jnp.isnan(updates["b"]).tolist() == [False, True, False]


@pytest.mark.parametrize("wild", [1e14, -1e15, 1e30])
def test_a_single_wild_gradient_freezes_no_weight_in_silence(wild, key):
    """Line 5 squares it; its update is NaN, and h still what it was."""
    theta = ivon_jax.sample(key, PARAMS, STATE)
    grads = GRADS | {"b": jnp.array([1.0, wild, 1.0])}
    updates, opt_state = TX.update(grads, STATE, PARAMS, sample=theta)
    assert jnp.isnan(updates["b"]).tolist() == [False, True, False]
    np.testing.assert_allclose(ivon_jax.find_states(opt_state)[0].hess["b"], 1, 1e-3)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_apply_if_finite_skips_an_estimate_that_is_not_finite(transform):
    """Its Hessian alone is not; `apply_if_finite` looks at gradients."""
    tx = optax.apply_if_finite(TX, 3)
    bad = ivon_jax.Estimate(GRADS, PARAMS | {"b": jnp.array([1.0, jnp.nan, 1.0])})
    step = transform(lambda e, s: e.update(tx, s, PARAMS))
    updates, opt_state = step(bad, tx.init(PARAMS))
    assert not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(opt_state.inner_state, tx.init(PARAMS).inner_state)
    assert opt_state.total_notfinite == 1


@pytest.mark.parametrize("name", ["ess", "weight_decay", "hess_init", "learning_rate"])
def test_nothing_of_the_callers_is_in_the_state(name):
    """A scalar parameter included: a donating step deletes the state's arrays."""
    values = {"learning_rate": 0.5, "ess": 2.0, "hess_init": 2.0, "weight_decay": 2.0}
    values = {n: jnp.float32(x) for n, x in values.items()}
    params = {"scalar": jnp.float32(1.0)}
    tx = ivon_jax.ivon(**values)
    opt_state = tx.init(params)
    step = jax.jit(
        lambda p, s: tx.update(p, s, p, hess=p), donate_argnums=(0, 1), keep_unused=True
    )
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(opt_state)}
    assert len(pointers) == len(jax.tree.leaves(opt_state))
    assert values[name].unsafe_buffer_pointer() not in pointers
    _, opt_state = tx.update(params, opt_state, params, hess=params)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(opt_state)}
    assert values[name].unsafe_buffer_pointer() not in pointers
    step(params, opt_state)
    assert not values[name].is_deleted()


@pytest.mark.parametrize(
    "lost", [{}, None, [{"count": 0, "hess": PARAMS, "momentum": PARAMS}, None, None]]
)
def test_a_state_that_is_none_of_ivons_is_named(lost):
    message = "`state` must be the state of `ivon_jax.ivon`, got"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TX.update(GRADS, lost, PARAMS, hess=PARAMS)
    restored = "restore it into the structure of `tx.init(params)`" in str(error.value)
    assert restored == bool(lost)


def test_an_update_without_gradients_is_named():
    message = "got None at grads, where `params` has dict."
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(None, STATE, PARAMS, hess=PARAMS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_parameters_train_under_x64(dtype):
    """With a schedule, clipping and a numpy scalar; the promotion is strict."""
    params = {"w": jnp.ones(2, dtype)}
    tx = ivon_jax.ivon(lambda _: 0.1, ess=np.int64(100), clip_radius=0.5)
    opt_state = tx.init(params)
    theta = ivon_jax.sample(jax.random.key(0), params, opt_state)
    updates, new_state = tx.update(theta, opt_state, params, sample=theta)
    assert updates["w"].dtype == dtype
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, opt_state)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8, np.float64])
def test_settings_may_be_numbers_of_numpy(kind):
    """Of few bits, too, where the default is float64: nothing overflows."""
    [state] = ivon_jax.find_states(ivon_jax.ivon(0.1, ess=kind(3)).init(PARAMS))
    assert state.ess == 3.0


@pytest.mark.usefixtures("x64")
def test_a_state_of_float32_stays_so_under_x64():
    """As one of an older checkpoint, with a setting in double precision."""
    params = {"w": jnp.ones(2, jnp.float32)}
    tx = ivon_jax.ivon(0.1, ess=jnp.float64(100))
    opt_state = optax.tree.cast(tx.init(params), jnp.float32)
    _, new_state = tx.update(params, opt_state, params, hess=params)
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, opt_state)
