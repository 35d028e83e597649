"""One compilation for one program, no old values, and nothing kept."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ivon_jax
from ivon_jax import diagnostics, merging, pruning
from ivon_jax._arrays import compiled

Q = ivon_jax.Posterior(jnp.linspace(-1.0, 1.0, 5), jnp.full(5, 4.0))
X = jnp.linspace(0.0, 1.0, 5)
KEY = jax.random.key(0)
COMPILATIONS = []


def count(event, _duration, **_):
    if event.endswith("backend_compile_duration"):
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(count)


def scaled(theta, x):
    return theta * x


@jax.jit
def jitted(theta):
    return scaled(theta, X)


class Network:
    def __init__(self, x):
        self.x = x

    def outputs(self, theta):
        return scaled(theta, self.x)

    __call__ = outputs


NETWORK = Network(X)
WAYS = {
    "one function": lambda _: (jitted, ()),
    "arguments": lambda x: (scaled, (x,)),
    "a new lambda": lambda x: (lambda theta: scaled(theta, x), ()),
    "a new jitted lambda": lambda _: (jax.jit(lambda theta: scaled(theta, X)), ()),
    "a bound method": lambda _: (NETWORK.outputs, ()),
    "a new object": lambda x: (Network(x), ()),
    "a partial": lambda x: (functools.partial(scaled, x=x), ()),
    "custom derivatives": lambda x: (lambda theta: jax.nn.softmax(theta * x), ()),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_calls_in_a_loop_compile_once(way):
    """Whatever form the function has, and whatever arrays it closes over."""
    inputs = [X + i for i in range(4)]

    def predict(x):
        fn, args = way(x)
        return ivon_jax.predict(fn, Q, KEY, 2, args)

    predict(inputs[0])
    before = len(COMPILATIONS)
    for x in inputs[1:]:
        predict(x)
    assert len(COMPILATIONS) == before


def classify(theta, x):
    return x @ theta[:4].reshape(2, 2)


def probs(theta, x):
    return jax.nn.softmax(classify(theta, x))


def loss(theta, x):
    return jnp.mean(classify(theta, x) ** 2)


TX = ivon_jax.ivon(0.1, ess=10)
STATE = TX.init(Q.mean)
LABELS = jnp.array([0, 1, 1])
USES = {
    "Mixture": lambda fn, x: ivon_jax.predict(
        lambda t: fn(probs)(t, x), ivon_jax.Mixture([Q, Q]), KEY, 2
    ),
    "uncertainty": lambda fn, x: ivon_jax.uncertainty(
        lambda t: fn(probs)(t, x), Q, KEY, 2
    ),
    "evidence_lower_bound": lambda fn, x: ivon_jax.evidence_lower_bound(
        lambda t: fn(loss)(t, x), Q, Q, KEY, ess=10, num_samples=2
    ),
    "predict_moments": lambda fn, x: ivon_jax.predict_moments(
        lambda t: (fn(classify)(t, x), 1.0), Q, KEY, 2
    ),
    "linearized": lambda fn, x: ivon_jax.linearized(fn(classify), Q, x),
    "calibration_curve": lambda fn, x: ivon_jax.calibration_curve(
        lambda t: fn(probs)(t, x), Q, LABELS, KEY, num_samples=2
    ),
    "diagnose": lambda fn, x: diagnostics.measure(
        Q.mean, STATE, loss_fn=lambda t: fn(loss)(t, x), key=KEY, num_samples=2
    ),
    "value_and_grad": lambda fn, x: ivon_jax.value_and_grad(
        lambda t, x: fn(loss)(t, x), mc_samples=2
    )(KEY, Q.mean, STATE, x),
    "curve": lambda fn, x: pruning.curve(lambda t: fn(loss)(t, x), Q, [0.2, 0.5]),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_a_function_compiles_once(use):
    """Of new functions on other data; and it is the result under jit."""

    def new(fn):
        return lambda *args: fn(*args)

    inputs = [jnp.ones((3, 2)) + i for i in range(3)]
    use(new, inputs[0])
    before = len(COMPILATIONS)
    for x in inputs[1:]:
        result = use(new, x)
    assert len(COMPILATIONS) == before
    expected = jax.jit(lambda x: use(new, x))(inputs[-1])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), result, expected
    )


KEYED = {
    "predict": lambda key: ivon_jax.predict(jitted, Q, key, 2),
    "Mixture": lambda key: ivon_jax.predict(jitted, ivon_jax.Mixture([Q, Q]), key, 2),
    "uncertainty": lambda key: ivon_jax.uncertainty(jax.nn.softmax, Q, key, 2),
    "calibrate": lambda key: ivon_jax.calibrate(
        lambda t: jax.nn.softmax(t)[None], Q, jnp.array([1]), key, num_samples=2
    ),
    "evidence_lower_bound": lambda key: ivon_jax.evidence_lower_bound(
        jnp.sum, Q, Q, key, ess=10, num_samples=2
    ),
    "measure": lambda key: diagnostics.measure(
        Q.mean, STATE, loss_fn=jnp.sum, key=key, num_samples=2
    ),
    "diagonal_fisher": lambda key: merging.diagonal_fisher(
        classify, Q.mean, key, jnp.ones((3, 2)), num_samples=2
    ),
}


@pytest.mark.parametrize("use", KEYED.values(), ids=KEYED)
def test_no_key_is_used_twice(use):
    """By jax's own checker, without jit and under it."""
    with jax.debug_key_reuse(True):
        use(jax.random.key(1))
        jax.jit(use).trace(jax.random.key(1))


def test_a_key_that_the_caller_uses_twice_is_an_error():
    """So the checker above sees through what is compiled."""
    key = jax.random.key(1)
    with jax.debug_key_reuse(True):
        KEYED["predict"](key)
        with pytest.raises(jax.errors.KeyReuseError):
            KEYED["predict"](key)


def test_other_programs_are_compiled():
    """The count above can rise."""
    before = len(COMPILATIONS)
    for factor in (2.5, 3.5):
        ivon_jax.predict(lambda theta, c=factor: theta * c, Q, KEY, 2)
    assert len(COMPILATIONS) >= before + 2


def test_a_function_never_sees_old_values():
    """Of what it closes over: arrays, numbers, attributes."""
    network = Network(X)

    def fn(theta):
        return network.outputs(1.0 + 0.0 * theta)

    for network.x in (X + 1, X + 2, 3.0, -0.0, jnp.inf):
        result = ivon_jax.predict(fn, Q, KEY, 2)
        np.testing.assert_array_equal(result, fn(jnp.ones(5)))


ALIKE = [
    (lambda t: t / 0.0, lambda t: t / -0.0),
    (lambda t: t**2, lambda t: t**3),
    (lambda t: t.sum(keepdims=True), lambda t: t.max(keepdims=True)),
    (lambda t: (t, t + 1), lambda t: (t + 1, t)),
    (lambda t: t[1:], lambda t: t[:-1]),
    (lambda t: jnp.where(t > 0, 1, 2), lambda t: jnp.where(t > 0, 1, 3)),
    (
        lambda t: jax.lax.cond(t[0] < 9, jnp.sin, jnp.cos, t),
        lambda t: jax.lax.cond(t[0] < 9, jnp.cos, jnp.sin, t),
    ),
    (
        lambda t: jax.lax.fori_loop(0, 2, lambda _, x: 2 * x, t),
        lambda t: jax.lax.fori_loop(0, 2, lambda _, x: 3 * x, t),
    ),
    (lambda t: jax.nn.relu(t), lambda t: jax.nn.relu6(9 * t)),
    (lambda t: t.astype(jnp.int32), lambda t: t.astype(jnp.int8)),
    (jax.jit(lambda t: t * np.arange(5.0)), jax.jit(lambda t: t * np.ones(5))),
    (
        lambda t: jax.pure_callback(np.sin, t, t),
        lambda t: jax.pure_callback(np.cos, t, t),
    ),
]


@pytest.mark.parametrize("pair", ALIKE)
def test_programs_that_differ_a_little_are_not_taken_for_each_other(pair):
    """Against the function itself, at a point mass; again when both are known."""
    q = ivon_jax.Posterior(Q.mean + 0.3, None)  # no zero, or 0 / 0 is NaN
    with jax.numpy_dtype_promotion("standard"):
        for fn in (*pair, *pair):
            result = ivon_jax.predict(fn, q, KEY, 1)
            expected = jax.tree.map(lambda x: x.astype(jnp.float32), fn(q.mean))
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-6),
                result,
                expected,
            )


def test_what_a_function_closes_over_is_not_kept():
    x = X + 0.0
    fn = Network(x)
    ivon_jax.predict(fn, Q, KEY, 2)
    kept = weakref.ref(fn), weakref.ref(x)
    del fn, x
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_large_arrays_of_a_jitted_function_are_kept_as_long_as_it_is(monkeypatch):
    """And it is compiled once."""
    monkeypatch.setattr(compiled, "MAX_EMBEDDED_BYTES", 8)
    x = X + 0.0
    fn = jax.jit(lambda theta: theta * x)
    for _ in range(3):
        ivon_jax.predict(fn, Q, KEY, 2)
        before = len(COMPILATIONS)
    assert len(COMPILATIONS) == before
    kept = weakref.ref(fn), weakref.ref(x)
    fn = x = None
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_no_more_than_some_programs_are_kept():
    before = len(jax.devices()[0].client.live_executables())
    for i in range(compiled.MAX_PROGRAMS + 8):
        compiled.call(
            lambda x, c=i: x + c, X, of=test_no_more_than_some_programs_are_kept
        )
    gc.collect()
    after = len(jax.devices()[0].client.live_executables())
    assert after - before <= compiled.MAX_PROGRAMS


def test_closed_over_arrays_are_no_part_of_the_program():
    """They are arguments: nothing of their size is compiled."""
    x = jnp.ones(10_000)
    trace = jax.make_jaxpr(lambda t: t * x)(x)
    embedded = []
    compiled._structure(compiled._of_arguments(trace), embedded)
    assert embedded == []


def test_arguments_are_traced_unless_they_are_no_arrays():
    """Numbers too; strings, booleans and functions are as they are."""

    def fn(theta, x, options):
        assert options["train"] is False
        assert options["name"] == "sin"
        assert isinstance(options["scale"], jax.core.Tracer)
        return options["scale"] * options["function"](theta) + x["x"]

    options = {"train": False, "name": "sin", "scale": 2.0, "function": jnp.sin}
    result = ivon_jax.predict(fn, Q, KEY, 3, args=({"x": X}, options))
    expected = ivon_jax.predict(lambda theta: 2.0 * jnp.sin(theta) + X, Q, KEY, 3)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_transformations_see_through_it():
    """Whatever is transformed: an argument, the posterior, or what fn closes over."""

    def loss(scale, q, x, closed):
        fn = functools.partial(scaled, x=x) if closed else scaled
        args = () if closed else (x,)
        return ivon_jax.predict(lambda *a: scale * fn(*a), q, KEY, 2, args).sum()

    for closed in (True, False):
        run = functools.partial(loss, closed=closed)
        value = run(2.0, Q, X)
        of_scale, of_q = jax.jit(jax.grad(run, argnums=(0, 1)))(2.0, Q, X)
        np.testing.assert_allclose(of_scale, value / 2, rtol=1e-6)
        np.testing.assert_allclose(of_q.mean, 2 * X, rtol=1e-6)
        values = jax.vmap(run, in_axes=(None, None, 0))(2.0, Q, jnp.stack([X, X + 1]))
        np.testing.assert_allclose(values[0], value, rtol=1e-6)


def test_derivatives_are_those_of_the_function_itself():
    """Of two functions with equal values but other rules, each its own."""

    def custom(factor):
        @jax.custom_jvp
        def fn(x):
            return x * 1.0

        fn.defjvp(lambda primals, tangents: (fn(*primals), factor * tangents[0]))
        return fn

    for factor in (2.0, 3.0):
        fn = custom(factor)
        result = jax.grad(
            lambda s, f=fn: ivon_jax.predict(lambda _: f(s * X), Q, KEY, 2).sum()
        )(1.0)
        np.testing.assert_allclose(result, factor * X.sum(), rtol=1e-6)


def test_without_jit_functions_see_values():
    seen = []
    with jax.disable_jit():
        ivon_jax.predict(lambda theta: seen.append(theta) or theta, Q, KEY, 2)
    assert any(not isinstance(theta, jax.core.Tracer) for theta in seen)


def test_functions_without_hash_are_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_EMBEDDED_BYTES", -1)

    class Unhashable(Network):
        __hash__ = None

    result = ivon_jax.predict(Unhashable(X), Q, KEY, 2)
    np.testing.assert_array_equal(result, ivon_jax.predict(jitted, Q, KEY, 2))
