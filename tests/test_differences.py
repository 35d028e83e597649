"""Errors about trees: the first difference and the remedy, in a few lines."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import ivon_jax
from ivon_jax._arrays.trees import difference

PARAMS = {"a": jnp.ones(2), "b": [jnp.ones(3), {"c": jnp.ones(())}]}
TX = ivon_jax.ivon(0.1, ess=10)


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """As Equinox's: a pytree with functions among its leaves."""

    __module__ = "equinox.stand_in"

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation

    def tree_flatten_with_keys(self):
        names = ("weight", "activation")
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


MODULE = Module(jnp.ones((2, 2)), jax.nn.tanh)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (PARAMS | {"b": [jnp.ones(3), {}]}, "got nothing at x['b'][1]['c'], where y"),
        (PARAMS | {"d": 0}, "got the int 0 at x['d'], where y has nothing"),
        (PARAMS | {"b": (jnp.ones(3), {"c": 0})}, "got tuple at x['b'], where y has"),
        (
            PARAMS | {"a": None},
            "got None at x['a'], where y has an array of shape (2,)",
        ),
        (PARAMS | {"a": [0]}, "got list at x['a'], where y has an array of shape (2,)"),
        (MODULE, "got Module at x, where y has dict"),
        (None, "got None at x, where y has dict"),
    ],
)
def test_the_first_difference_is_named(tree, message):
    assert message in difference("x", tree, "y", PARAMS)


def test_a_leaf_is_a_prefix_of_any_subtree():
    """As in masks: the difference is elsewhere."""
    found = difference("x", {"a": True, "b": {}}, "y", PARAMS, prefix=True)
    assert found == "got dict at x['b'], where y has list."


def nnx_parts():
    """A network of forty layers, and IVON's state of it."""
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(40)])
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


@pytest.mark.parametrize("of", [lambda m: nnx.state(m, nnx.Param), lambda m: m])
def test_nnx_users_learn_the_verbs_in_a_few_lines(of):
    model, optimizer = nnx_parts()
    with pytest.raises(ValueError, match=re.escape("`ivon_jax.flax.posterior`")) as e:
        ivon_jax.posterior(of(model), optimizer.opt_state)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("name", ["params", "sample"])
def test_equinox_users_learn_the_filter(name):
    params = Module(MODULE.weight, None)
    arguments = {"params": params, "sample": params} | {name: MODULE}
    message = (
        f"got the function tanh at {name}.activation, where .* has None.\nFor an Eq"
    )
    with pytest.raises(ValueError, match=message) as e:
        TX.update(params, TX.init(params), **arguments)
    assert "`eqx.filter(model, eqx.is_inexact_array)`" in str(e.value)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (jax.nn.tanh, "the function tanh"),
        ("adam", "the str 'adam'"),
        (jax.random.key(0), "key<fry>"),
        (3, "int32"),
    ],
)
def test_init_on_a_whole_module_says_what_to_filter(bad, got):
    message = f"arrays, got {got} at params.activation. Leave it out: `nnx.state(model"
    with pytest.raises(TypeError, match=re.escape(message)) as e:
        TX.init(Module(jnp.ones(2), bad))
    assert "`eqx.filter(model, eqx.is_inexact_array)`" in str(e.value)


def test_init_of_nothing_is_an_error():
    with pytest.raises(TypeError, match="must be a tree of arrays, got None"):
        TX.init(None)


WHOLE = Module(jnp.ones((3, 2)), jax.nn.tanh)
Q = ivon_jax.Posterior(WHOLE, Module(jnp.ones((3, 2)), None))
FROZEN = optax.masked(TX, Module(True, False))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ivon_jax.sampled(TX, jax.random.key(0)).init(WHOLE),
        lambda: ivon_jax.Posterior.isotropic(WHOLE, 4.0),
        lambda: Q.sample(jax.random.key(0)),
        lambda: Q.variance,
        lambda: Q.entropy(),
        lambda: ivon_jax.posterior(WHOLE, FROZEN.init(WHOLE)),
        lambda: ivon_jax.predict(lambda m: m.weight, Q, jax.random.key(0), 2),
        lambda: ivon_jax.linearized(lambda m, x: x @ m.weight, Q, jnp.ones((4, 3))),
        lambda: ivon_jax.Mixture([Q, Q]).log_prob(WHOLE),
        lambda: ivon_jax.merging.task_arithmetic(WHOLE, [WHOLE]),
        lambda: ivon_jax.merging.merge(WHOLE, [WHOLE], [1.0], 1.0),
        lambda: ivon_jax.merging.diagonal_fisher(
            lambda m, x: x @ m.weight, WHOLE, jax.random.key(0), jnp.ones((4, 3))
        ),
        lambda: ivon_jax.pruning.mask(WHOLE, 0.5),
        lambda: ivon_jax.pruning.prune(WHOLE, Module(True, True)),
    ],
)
def test_a_whole_module_is_sent_to_the_filter_wherever_it_goes(call):
    with pytest.raises(TypeError, match="tree of arrays, got the function tanh") as e:
        call()
    assert "`eqx.filter(model, eqx.is_inexact_array)`" in str(e.value)
