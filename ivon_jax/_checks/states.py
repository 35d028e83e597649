"""Optimizer states: what `update` is given, and finding IVON in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .trees import like


def one_curvature(sample, hess, grads, estimate_type):
    """Reject an update that has no source for the Hessian, or several."""
    sources = {"sample": sample, "hess": hess, "an `Estimate` for `grads`": None}
    if isinstance(grads, estimate_type):
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


def unbroken(seal, expected):
    """Return whether an estimate is as it was made; an error where it is known not."""
    if seal is None:
        return True
    known = isinstance(seal, np.ndarray) or (
        not isinstance(seal, jax.core.Tracer) and seal.is_fully_addressable
    )
    xp = np if known else jnp
    seal = xp.asarray(seal, np.float32)
    (large, zero), (one, _) = (xp.moveaxis(x, -1, 0) for x in (seal, expected))
    whole = xp.all(xp.abs(large / one[0] - 1.0) < 1e-3) & xp.all(zero == 0.0)
    if known and not whole:
        raise ValueError(
            "`estimate` must reach IVON as it was made, got one that was changed as if "
            "its two halves were one gradient, such as by a transformation before IVON "
            "in a chain. Call `estimate.update(tx, opt_state, params)`, which keeps "
            "them apart."
        )
    return whole


def has_params(params):
    """Reject an update without the mean."""
    if params is None:
        raise ValueError(
            "`update` needs `params`, the posterior mean, got None. Call "
            "`tx.update(grads, opt_state, params, sample=theta)`."
        )


def transformation(name, tx, call):
    """Reject what is no optimizer, arguments in the wrong order above all."""
    if not (callable(getattr(tx, "init", None)) and hasattr(tx, "update")):
        raise TypeError(
            f"`{name}` must be an optax transformation, got {type(tx).__name__}. Call "
            f"`{call}`."
        )


def inside_sampled(inner_state, ivon_states, sampled_type):
    """Reject transformations that `sampled` would train wrongly, without a word."""
    if not ivon_states:
        raise ValueError(
            "`tx` must have `ivon_jax.ivon` or `ivon_jax.scale_by_ivon` inside, got "
            "none: there is nothing to sample. Pass another optimizer as it is."
        )
    wrong = {
        sampled_type: "it is `ivon_jax.sampled` already. Call that once, outermost",
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
    """Reject the mean itself in the place of a sample, where it can be told."""
    leaves = jax.tree_util.tree_leaves_with_path(sample)
    for (path, theta), mean in zip(leaves, jax.tree.leaves(params), strict=True):
        if theta is mean and np.size(theta):
            raise ValueError(
                "`sample` must be a draw of the posterior, got `params` itself at "
                f"sample{jax.tree_util.keystr(path)}: the Hessian would decay to zero. "
                "Pass the theta of `ivon_jax.sample(key, params, opt_state)` where the "
                "gradient was taken."
            )


def nnx_arguments(call, model, optimizer):
    """Reject an NNX model and its optimizer in each other's place, or in the key's."""
    if not (hasattr(optimizer, "opt_state") and hasattr(optimizer, "wrt")):
        name, value, kind = "optimizer", optimizer, "an `nnx.Optimizer`"
    elif hasattr(model, "opt_state") or isinstance(model, (jax.Array, np.ndarray)):
        name, value, kind = "model", model, "an NNX module"
    else:
        return
    raise TypeError(
        f"`{name}` must be {kind}, got {type(value).__name__}. The order is `{call}`."
    )


def one_state(state):
    """Reject a batch of states, which would broadcast along the wrong axes."""
    if jnp.shape(state.ess):
        raise ValueError(
            "`opt_state` must be one state, got a batch of shape "
            f"{jnp.shape(state.ess)}. Call under `jax.vmap`."
        )


def params_before_state(states_in_params):
    """Reject parameters and state in each other's place."""
    if states_in_params:
        raise ValueError(
            "`params` must be the parameters, got an optimizer state with the "
            f"{type(states_in_params[0]).__name__} of IVON in it. The order is "
            "`params, opt_state`."
        )


def some_state(states, opt_state):
    """Reject an optimizer state without IVON."""
    if states:
        return
    raise ValueError(
        "`opt_state` must contain the state of `ivon_jax.ivon` or "
        "`ivon_jax.scale_by_ivon`, got none. Pass the state that `tx.init(params)` "
        "or `tx.update(...)` returned." + _if_restored(opt_state)
    )


def own_state(state, state_type):
    """Reject an update of what IVON never made."""

    def own(node):
        return isinstance(node, state_type)

    if not any(map(own, jax.tree.leaves(state, is_leaf=own))):
        raise ValueError(
            "`state` must be the state of `ivon_jax.ivon`, got "
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


def same_kind_of_prior(prior, state):
    """Reject a prior that the state doesn't have, and one that `ivon` doesn't."""
    if (prior is None) != (state.prior is None):
        made, now = ("without", "has") if state.prior is None else ("with", "has no")
        raise ValueError(
            f"`prior` must be what the state was made with: it was made {made} one, "
            f"and `ivon` now {now} `prior=`. The state keeps the prior, so a new one "
            "needs a new state: `tx.init(params)`."
        )


def one_owner(param, *precisions):
    """Return the precision of the one state that owns `param`, None where none does."""
    owned = [precision for precision in precisions if precision is not None]
    if len(owned) > 1:
        raise ValueError(
            f"`opt_state` must have one IVON state for each parameter, got "
            f"{len(owned)} for a parameter of shape {jnp.shape(param)}. Keep them "
            "apart with `optax.partition`."
        )
    return owned[0] if owned else None
