"""What many functions refuse alike."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ivon_jax
import ivon_jax.flax

W = jnp.ones((3, 2))
TX = ivon_jax.ivon(0.1, ess=10)
STATE = TX.init(W)
Q = ivon_jax.posterior(W, STATE)
KEY = jax.random.key(0)
X, Y = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)


def fn(theta, x):
    return x @ theta


def loss_fn(theta):
    return jnp.mean(theta**2)


FUNCTIONS = {
    "predict": lambda bad: ivon_jax.predict(bad, Q, KEY),
    "uncertainty": lambda bad: ivon_jax.uncertainty(bad, Q, KEY),
    "linearized": lambda bad: ivon_jax.linearized(bad, Q, X),
    "elbo": lambda bad: ivon_jax.evidence_lower_bound(bad, Q, Q, KEY, ess=1.0),
    "value_and_grad": lambda bad: ivon_jax.value_and_grad(bad),
    "nnx": lambda bad: ivon_jax.flax.value_and_grad(bad),
    "measure": lambda bad: ivon_jax.diagnostics.measure(W, STATE, loss_fn=bad, key=KEY),
    "fisher": lambda bad: ivon_jax.merging.diagonal_fisher(bad, W, KEY, X),
    "sensitivity": lambda bad: ivon_jax.sensitivity.sensitivities(bad, Q, X, Y),
    "loss": lambda bad: ivon_jax.sensitivity.deviations(fn, Q, X, Y, loss=bad),
    "curve": lambda bad: ivon_jax.pruning.curve(bad, Q, [0.5]),
    "criterion": lambda bad: ivon_jax.pruning.curve(loss_fn, Q, [0.5], bad),
}


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_no_function_is_named(call):
    with pytest.raises(TypeError, match=r"must be a function of .*, got str\. Pass"):
        call("mse")


def nnx_sample(key):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    return ivon_jax.flax.sample(key, model, nnx.Optimizer(model, TX, wrt=nnx.Param))


KEYS = {
    "sample": lambda bad: ivon_jax.sample(bad, W, STATE),
    "nnx": nnx_sample,
    "posterior": lambda bad: Q.sample(bad),
    "mixture": lambda bad: ivon_jax.Mixture([Q]).sample(bad),
    "strata": lambda bad: ivon_jax.Mixture([Q]).strata(bad, 2),
    "sampled": lambda bad: ivon_jax.sampled(TX, bad),
    "predict": lambda bad: ivon_jax.predict(loss_fn, Q, bad),
    "uncertainty": lambda bad: ivon_jax.uncertainty(loss_fn, Q, bad),
    "elbo": lambda bad: ivon_jax.evidence_lower_bound(loss_fn, Q, Q, bad, ess=1.0),
    "value_and_grad": lambda bad: ivon_jax.value_and_grad(loss_fn)(bad, W, STATE),
    "measure": lambda bad: ivon_jax.diagnostics.measure(
        W, STATE, loss_fn=loss_fn, key=bad
    ),
    "fisher": lambda bad: ivon_jax.merging.diagonal_fisher(fn, W, bad, X),
}


@pytest.mark.parametrize("call", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("bad", [0, "0", jnp.zeros(3), jax.random.split(KEY, 2)])
def test_what_is_no_key_is_named(call, bad):
    with pytest.raises(TypeError, match=r"`key` must be (a|one) JAX random key, got"):
        call(bad)
