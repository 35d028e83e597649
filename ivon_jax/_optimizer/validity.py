"""Errors about training: what `init` and `update` are given, and where a state is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._arrays.trees import FILTERS, is_array, leaf_in_words, like
from .estimate import Estimate
from .state import EVONState, IVONState, SampledState


def one_curvature(sample, hess, grads):
    """Raise unless an update has exactly one source for the Hessian."""
    sources = {"sample": sample, "hess": hess, "an `Estimate` for `grads`": None}
    if isinstance(grads, Estimate):
        sources["an `Estimate` for `grads`"] = grads
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise ValueError(
            "`update` needs exactly one source of the Hessian, got "
            f"{' and '.join(given) or 'none'}. Pass `sample=theta`, the theta of "
            "`ivon_jax.sample(key, params, opt_state)` where the gradient was taken, "
            "or `hess=`, an estimate of the Hessian diagonal, or call "
            "`estimate.update(tx, opt_state, params)` of `ivon_jax.value_and_grad`'s "
            "estimate." + ("" if given else LOST)
        )


LOST = (
    " If you did pass one, it was lost on the way: `optax.MultiSteps` inside of "
    "`optax.chain` or Flax's TrainState gets none unless it is wrapped, as "
    "`optax.GradientTransformationExtraArgs(multi.init, multi.update)`, and Flax's own "
    "TrainState hands on gradients alone: use `ivon_jax.flax.TrainState`. Where a "
    "trainer can't pass `sample=`, wrap the transformation in `ivon_jax.sampled`."
)


def has_params(params):
    """Raise if an update lacks the mean."""
    if params is None:
        raise ValueError(
            "`update` needs `params`, the posterior mean, got None. Call "
            "`tx.update(grads, opt_state, params, sample=theta)`."
        )


def inside_sampled(inner_state, ivon_states):
    """Raise for transformations that `sampled` would silently train wrongly."""
    if not ivon_states:
        raise ValueError(
            "`tx` must have `ivon_jax.ivon` or `ivon_jax.scale_by_ivon` inside, got "
            "none: there is nothing to sample. Pass another optimizer as it is."
        )
    wrong = {
        SampledState: "it is `ivon_jax.sampled` already. Call that once, outermost",
        optax.MultiStepsState: (
            "a sample must stay until its gradients are all there. Put it around, "
            "`optax.MultiSteps(ivon_jax.sampled(tx, key), every_k_schedule)`"
        ),
    }

    def is_wrong(node):
        return isinstance(node, tuple(wrong))

    for node in filter(is_wrong, jax.tree.leaves(inner_state, is_leaf=is_wrong)):
        raise ValueError(
            f"`tx` must not have a {type(node).__name__}, got one: {wrong[type(node)]}."
        )


def params_of_sampled(params, grads, mean):
    """Return the trainer's parameters, None where rounding errors can't add up."""
    if params is not None:
        return like("params", params, "the optimizer's state", mean)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        dtype = jnp.result_type(grad)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                "`update` needs `params` where they are in low precision, got None "
                f"with {dtype} at grads{jax.tree_util.keystr(path)}: the rounding "
                "errors of all steps would add up. Call "
                "`tx.update(grads, opt_state, params)`."
            )
    return None


def a_draw(sample, params):
    """Raise if the sample is the mean itself, where that can be seen."""
    leaves = jax.tree_util.tree_leaves_with_path(sample)
    for (path, theta), mean in zip(leaves, jax.tree.leaves(params), strict=True):
        if theta is mean and np.size(theta):
            raise ValueError(
                "`sample` must be a draw of the posterior, got `params` itself at "
                f"sample{jax.tree_util.keystr(path)}: the Hessian would decay to zero. "
                "Pass the theta of `ivon_jax.sample(key, params, opt_state)` where the "
                "gradient was taken."
            )


def params_before_state(states_in_params):
    """Raise if parameters and state are in each other's place."""
    if states_in_params:
        raise ValueError(
            "`params` must be the parameters, got an optimizer state with the "
            f"{type(states_in_params[0]).__name__} of IVON in it. The order is "
            "`params, opt_state`."
        )


def some_state(states, opt_state):
    """Raise if an optimizer state has no IVON in it."""
    if states:
        return
    raise ValueError(
        "`opt_state` must contain the state of `ivon_jax.ivon` or "
        "`ivon_jax.scale_by_ivon`, got none. Pass the state that `tx.init(params)` "
        "or `tx.update(...)` returned." + _if_restored(opt_state)
    )


def own_state(state, kind):
    """Raise unless this optimizer made the state."""
    maker = {IVONState: "ivon", EVONState: "evon"}

    def is_state(node):
        return isinstance(node, tuple(maker))

    found = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    if not any(isinstance(node, kind) for node in found):
        raise ValueError(
            f"`state` must be the state of `ivon_jax.{maker[kind]}`, got "
            f"{type(state).__name__}. Pass what `tx.init(params)` or `tx.update(...)` "
            "returned." + _if_restored(state)
        )


def _if_restored(state):
    """What to do about a state whose types a checkpoint has lost."""

    def has_fields(node):
        return isinstance(node, dict) and {"momentum", "hess"} <= node.keys()

    if not any(map(has_fields, jax.tree.leaves(state, is_leaf=has_fields))):
        return ""
    return (
        " A checkpoint was restored into dicts and lists: restore it into the "
        "structure of `tx.init(params)`, with `checkpointer.restore(path, "
        "jax.eval_shape(tx.init, params))` of Orbax or "
        "`flax.serialization.from_bytes(tx.init(params), data)`."
    )


def same_kind(name, given, kept, remedy):
    """Raise unless the state and `ivon` both have this option, or both have none."""
    if (given is None) != (kept is None):
        made, now = ("without", "has") if kept is None else ("with", "has no")
        raise ValueError(
            f"`{name}` must be what the state was made with: it was made {made} one, "
            f"and `ivon` now {now} `{name}=`. {remedy}"
        )


def arguments_in_order(learning_rate, ess):
    """Raise if learning rate and number of examples are in each other's place."""
    known = not callable(learning_rate)
    rate = _checks.scalar("learning_rate", learning_rate)[1] if known else None
    size = 1.0 if callable(ess) else _checks.scalar("ess", ess)[1]
    if None not in (rate, size) and rate >= 10.0 and 0.0 < size <= 1.0:
        raise ValueError(
            "`learning_rate` must come first, then `ess`, the number of examples, got "
            f"{learning_rate} and {ess}. Call `ivon(learning_rate=..., ess=...)`."
        )


def floating_leaves(params):
    """Raise unless all parameters are floating-point arrays; a module is not."""
    if params is None:
        raise TypeError("`params` must be a tree of arrays, got None.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_array(leaf):
            got = leaf_in_words(leaf)
        elif not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            got = jnp.result_type(leaf)
        else:
            continue
        raise TypeError(
            f"`params` must be real floating-point arrays, got {got} at "
            f"params{jax.tree_util.keystr(path)}. Leave it out: {FILTERS} In other "
            "trees use `optax.masked` or `optax.partition`."
        )
