"""Argument checks: the only module that words errors about values.

A scalar that is a Python or NumPy number comes back as a Python float; one that is a
JAX array comes back as it is, checked unless it is a tracer (``jit``, ``vmap``).
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
import optax


def positive(name, value):
    """Return a scalar that is positive and finite, also in the default float dtype."""
    scalar, number = _scalar(name, value)
    if number is not None and not number > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    tiny = float(jnp.finfo(jnp.result_type(float)).tiny)
    if number is not None and number < tiny:
        raise ValueError(f"`{name}` must be at least {tiny:.2g}, got {value}.")
    return scalar


def non_negative(name, value):
    """Return a scalar that is finite and at least zero."""
    scalar, number = _scalar(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"`{name}` must be non-negative, got {value}.")
    return scalar


def decay_rate(name, value):
    """Return a scalar in [0, 1)."""
    scalar, number = _scalar(name, value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
    return scalar


def boolean(name, value):
    """Return True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def integer_between(name, value, low, high=math.inf):
    """Reject anything but an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")


def floating_dtype(name, value):
    """Return a floating-point dtype."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating-point dtype such as `jnp.bfloat16`, got "
            f"{value!r}."
        )
    return dtype


def _scalar(name, value):
    """Return `value` for computing, and as a finite number where it is known."""
    if isinstance(value, np.ndarray) and not value.shape:
        value = value[()]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = _finite(name, value)
        return number, number
    if not isinstance(value, jax.Array):
        hint = " To schedule it, use `optax.inject_hyperparams`." * callable(value)
        raise TypeError(f"`{name}` must be a number, got {value!r}.{hint}")
    kinds = (jnp.integer, jnp.floating)
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(
            f"`{name}` must be a real scalar, got an array of shape {value.shape} and "
            f"dtype {value.dtype}."
        )
    if value.dtype in (jnp.float16, jnp.bfloat16):
        raise TypeError(
            f"`{name}` must be float32 or wider, got {value.dtype}, where 0.99999 is "
            "1. With `optax.inject_hyperparams`, use `hyperparam_dtype=jnp.float32`."
        )
    concrete = not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
    return value, _finite(name, value) if concrete else None


def _finite(name, value):
    """Return `value` as a Python float, if the default float dtype can hold it."""
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    if abs(value) == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if abs(value) > largest:
        raise ValueError(f"`{name}` must be at most {largest:.2g}, got {value}.")
    return float(value)


def floating_leaves(params):
    """Reject parameters that no Gaussian can have: integers, booleans, complex."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`params` must be real floating-point arrays, got {dtype} at "
                f"params{jax.tree_util.keystr(path)}. Leave it out with `optax.masked` "
                "or `optax.partition`."
            )


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
            "or `hess=`, an estimate of the Hessian diagonal, or the `Estimate` of "
            "`ivon_jax.value_and_grad` in the place of the gradients."
        )


def has_params(params):
    """Reject an update without the mean."""
    if params is None:
        raise ValueError(
            "`update` needs `params`, the posterior mean, got None. Call "
            "`tx.update(grads, opt_state, params, sample=theta)`."
        )


def one_state(state):
    """Reject a batch of states, which would broadcast along the wrong axes."""
    if jnp.shape(state.ess):
        raise ValueError(
            "`opt_state` must be one state, got a batch of shape "
            f"{jnp.shape(state.ess)}. Call under `jax.vmap`."
        )


def posterior_to_sample(posterior):
    """Reject what has no samples, the parameters above all."""
    if not hasattr(posterior, "sample"):
        raise TypeError(
            f"`posterior` must be a posterior, got {type(posterior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`."
        )


def is_masked(node):
    """Whether `node` stands for parameters that `optax.masked` took away."""
    return isinstance(node, optax.MaskedNode)


def like(name, tree, reference_name, reference):
    """Return `tree` with the structure, masks included, and shapes of `reference`."""
    try:
        tree = jax.tree.map(
            lambda p, x: p if is_masked(p) else x, reference, tree, is_leaf=is_masked
        )
        same = jax.tree.structure(tree) == jax.tree.structure(reference)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"`{name}` must have the tree structure of {reference_name}, got\n"
            f"{jax.tree.structure(tree)}\nwhere {reference_name} has\n"
            f"{jax.tree.structure(reference)}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(reference)
    for (path, p), x in zip(leaves, jax.tree.leaves(tree), strict=True):
        if jnp.shape(x) != jnp.shape(p):
            raise ValueError(
                f"`{name}` must have the shapes of {reference_name}, got "
                f"{jnp.shape(x)} at {name}{jax.tree_util.keystr(path)}, where "
                f"{reference_name} has {jnp.shape(p)}."
            )
    return tree


def some_state(states):
    """Reject an optimizer state without IVON."""
    if not states:
        raise ValueError(
            "`opt_state` must contain the state of `ivon_jax.ivon` or "
            "`ivon_jax.scale_by_ivon`, got none. Pass the state that `tx.init(params)` "
            "or `tx.update(...)` returned."
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


def same_point_masses(posterior, prior):
    """Reject two Gaussians with a divergence that is infinite by structure."""

    def check(path, _, precision, prior_precision):
        if (precision is None) != (prior_precision is None):
            raise ValueError(
                "`prior.precision` must be None where the posterior's is, got one None "
                f"of two at mean{jax.tree_util.keystr(path)}."
            )

    jax.tree_util.tree_map_with_path(
        check, posterior.mean, posterior.precision, prior.precision
    )


def probabilities(name, probs):
    """Reject what is no array of distributions over its last axis."""
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got dtype {probs.dtype}.")
    if not probs.ndim or not probs.size:
        raise ValueError(
            f"`{name}` must have shape (..., num_classes) and at least one example, "
            f"got shape {probs.shape}."
        )
    values = _values(probs)
    if values is None:
        return
    if values.min() < 0:
        raise ValueError(f"`{name}` must be non-negative, got {values.min()}.")
    total = values.sum(axis=-1).ravel()
    worst = total[np.argmax(np.abs(total - 1))]
    if not abs(worst - 1) <= max(1e-2, 4 * float(jnp.finfo(probs.dtype).eps)):
        raise ValueError(
            f"`{name}` must sum to one over its last axis, got a sum of {worst}. "
            + ("Training diverged?" if np.isnan(worst) else "Softmax the logits.")
        )


def labels(name, labels, probs):
    """Reject what are no class indices for `probs`."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be integers, got dtype {labels.dtype}. Of one-hot labels "
            "pass the argmax."
        )
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"`{name}` must have shape {probs.shape[:-1]}, one label for each row of "
            f"`probs`, got {labels.shape}."
        )
    values, num_classes = _values(labels), probs.shape[-1]
    if values is not None and not 0 <= values.min() <= values.max() < num_classes:
        bad = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"`{name}` must be in 0..{num_classes - 1}, got {bad}.")


def _values(array):
    """The values of a concrete array on this host as NumPy's, else None.

    NumPy's, because within ``jit`` even the minimum of a constant is a tracer.
    """
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return None
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return np.asarray(array, np.float64 if floating else array.dtype)


def choice(name, value, allowed):
    """Return one of a closed set of strings."""
    if value not in allowed:
        options = " or ".join(f'"{option}"' for option in allowed)
        raise ValueError(f"`{name}` must be {options}, got {value!r}.")
    return value


def stateless(name, transform, params):
    """Reject what is no optax transformation, or one that would need its state kept."""
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax transformation, such as "
            f"`optax.clip_by_global_norm(1.0)`, got {transform!r}."
        )
    state = jax.eval_shape(transform.init, params)
    if jax.tree.leaves(state):
        raise ValueError(
            f"`{name}` must be stateless, got one with the state {state}. Chain it "
            "before `ivon_jax.ivon` instead."
        )


def scalar_loss(value, has_aux):
    """Reject a loss to which no gradient, or not that of the mean, belongs."""
    if has_aux and not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            "`loss_fn` must return (loss, aux) with has_aux=True, got "
            f"{type(value).__name__}."
        )
    loss = value[0] if has_aux else value
    if isinstance(loss, (tuple, list, dict)):
        raise TypeError(
            f"`loss_fn` must return a scalar, got {type(loss).__name__}. Pass "
            "`has_aux=True` if it returns (loss, aux)."
        )
    if jnp.shape(loss) != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean loss per example, got shape "
            f"{jnp.shape(loss)}. Take its mean."
        )


def divisible(name, count, arrays):
    """Reject arrays that do not fall into `count` slices of one length."""
    if not arrays:
        raise ValueError(
            f"`{name}` needs a batch to cut into {count}, got no array with an axis in "
            "`args`."
        )
    for array in arrays:
        if array.shape[0] % count:
            raise ValueError(
                f"`{name}` must divide the first axis of every array in `args`, got "
                f"{count} for an array of shape {array.shape}."
            )


def batch_size(args):
    """Return the one length of the first axes of the arrays in `args`."""
    lengths = {x.shape[0] for x in jax.tree.leaves(args) if getattr(x, "ndim", 0)}
    if len(lengths) != 1:
        raise ValueError(
            '`hess_estimator`="gauss_newton" needs the examples along the first axis '
            f"of every array in `args`, got lengths {sorted(lengths)}."
        )
    return lengths.pop()


def has_axis(name, axis_name):
    """Reject what is about several devices where there is no axis of them."""
    if axis_name is None:
        raise ValueError(f"`{name}` needs `axis_name`, the axis to reduce over.")


def axis_index(axis_name):
    """Return this device's index along a mapped axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound by a map around the call, got {axis_name!r}. "
            "Call inside `jax.shard_map` or `jax.pmap` with that axis name."
        ) from None


def natural_parameters(natural):
    """Reject what is of no Gaussian: the quadratic ones are negative."""
    structure = jax.tree.structure(natural.linear)
    try:
        leaves = structure.flatten_up_to(natural.quadratic)
    except ValueError:
        raise ValueError(
            "`natural.quadratic` must have the tree structure of `natural.linear`, got"
            f"\n{jax.tree.structure(natural.quadratic)}\nwhere `natural.linear` has\n"
            f"{structure}."
        ) from None
    for leaf in leaves:
        values = None if leaf is None else _values(leaf)
        if values is not None and not np.all(values < 0):
            raise ValueError(
                "`natural.quadratic` must be negative, -1 / (2 variance), got "
                f"{values.max()}. Was more taken out than was there?"
            )


def mask_of(name, mask, tree):
    """Return a tree of booleans like `tree` from one that may be a prefix of it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f"`{name}` must have leaves True or False, got {leaf!r} at "
                f"{name}{jax.tree_util.keystr(path)}."
            )
    try:
        return jax.tree.map(lambda k, t: jax.tree.map(lambda _: k, t), mask, tree)
    except ValueError:
        raise ValueError(
            f"`{name}` must be a tree prefix of the posterior's mean, got\n"
            f"{jax.tree.structure(mask)}\nwhere the mean has\n"
            f"{jax.tree.structure(tree)}."
        ) from None


def one_prior(prior, posterior_type, weight_decay, default):
    """Reject a prior that is no Gaussian, or two priors."""
    if prior is None:
        return
    if not isinstance(prior, posterior_type):
        raise TypeError(
            f"`prior` must be a Posterior, got {type(prior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`, or around weights "
            "`ivon_jax.Posterior.isotropic(weights, ess * weight_decay)`."
        )
    if isinstance(weight_decay, float) and weight_decay != default:
        raise ValueError(
            f"`weight_decay` must be left out where `prior` is given, got "
            f"{weight_decay}. To narrow the prior, use `prior.tempered(temperature)`."
        )


def prior_precision(precision, params):
    """Return the prior's precision where `params` are, non-negative, nowhere None."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked)
    try:
        values = structure.flatten_up_to(precision)
    except ValueError:
        leaves = values = []  # another tree: `like` will say so
    for (path, param), value in zip(leaves, values, strict=True):
        where = f"prior.precision{jax.tree_util.keystr(path)}"
        if value is None and not is_masked(param):
            raise ValueError(
                "`prior.precision` must be an array for each parameter that IVON "
                f"trains, got None at {where}: it could never move. Leave it out with "
                "`optax.masked`."
            )
        non_negative_array(where, None if is_masked(param) else value)
    return like("prior.precision", precision, "`params`", params)


def non_negative_array(name, array):
    """Reject concrete values that are negative, infinite or NaN."""
    values = None if array is None else _values(jnp.asarray(array))
    if values is not None and not (np.all(values >= 0) and np.all(values < np.inf)):
        raise ValueError(
            f"`{name}` must be non-negative and finite, got {values.min()} to "
            f"{values.max()}."
        )


def gaussian(name, value, posterior_type):
    """Reject what has no divergence to another Gaussian in closed form."""
    if not isinstance(value, posterior_type):
        raise TypeError(
            f"`{name}` must be a Posterior, one Gaussian, got {type(value).__name__}. "
            f"Pass `ivon_jax.{name}(params, opt_state)`."
        )


def one_loss(value):
    """Return a loss that is a scalar and nothing else."""
    if isinstance(value, (tuple, list, dict)):
        raise TypeError(
            "`loss_fn` must return a scalar, the mean loss per example, got "
            f"{type(value).__name__}. Drop what it returns besides."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean loss per example, got shape "
            f"{jnp.shape(value)}. Take its mean."
        )
    return value


def number_of_examples(**trees):
    """Return the one length of the first axes of all arrays in these arguments."""
    count = None
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        if not leaves:
            raise ValueError(f"`{name}` must have at least one array, got {tree!r}.")
        for path, array in leaves:
            where = f"at {name}{jax.tree_util.keystr(path)}" if path else "of it"
            if not array.shape or not array.shape[0]:
                raise ValueError(
                    f"`{name}` must have one or more examples along the first axis of "
                    f"every array, got shape {array.shape} {where}."
                )
            count = count or array.shape[0]
            if array.shape[0] != count:
                raise ValueError(
                    f"`{name}` must have {count} examples along the first axis of "
                    f"every array, as the first of `{next(iter(trees))}`, got shape "
                    f"{array.shape} {where}."
                )
    return count


def one_array(name, value):
    """Return the one array that a function must have returned."""
    if not hasattr(value, "shape"):
        raise TypeError(
            f"`{name}` must be one array, got {type(value).__name__}. Return the "
            "predictions alone."
        )
    return value


def outputs_of_one(output):
    """Return the number of outputs, of what `fn` returned for a batch of one."""
    one_array("fn(theta, x)", output)
    if output.ndim != 2 or output.shape[0] != 1 or not output.shape[1]:
        raise ValueError(
            "`fn(theta, x)` must have shape (N, C), C outputs for each of N examples, "
            f"got shape {output.shape} for a batch of one."
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(
            f"`fn(theta, x)` must be floating-point, got dtype {output.dtype}. Return "
            "logits, not classes."
        )
    return output.shape[1]


def labels_of_examples(name, y, count, num_classes):
    """Reject what are no class indices, one for each of `count` examples."""
    one_array(name, y)
    if jnp.issubdtype(y.dtype, jnp.integer) and y.shape != (count,):
        raise ValueError(
            f"`{name}` must have shape {(count,)}, one label for each example, got "
            f"{y.shape}."
        )
    labels(name, y, jax.ShapeDtypeStruct((count, num_classes), jnp.float32))


def loss_of_example(value):
    """Reject a loss that is no scalar for one example."""
    if jnp.shape(one_array("loss(outputs, y)", value)) != ():
        raise ValueError(
            "`loss(outputs, y)` must be a scalar, the loss of one example, got shape "
            f"{value.shape}. Sum it over the outputs."
        )


def members(posteriors, posterior_type):
    """Reject what is no mixture: nothing, or Gaussians over several trees."""
    if isinstance(posteriors, posterior_type):
        lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(posteriors)}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(
                "`posteriors` must have one leading axis of members in every array, "
                f"got lengths {sorted(lengths)}. Of one posterior, pass a list."
            )
        return
    if not isinstance(posteriors, (list, tuple)):
        raise TypeError(
            "`posteriors` must be a list of posteriors, or a stacked one, got "
            f"{type(posteriors).__name__}."
        )
    if not posteriors:
        raise ValueError("`posteriors` must have at least one member, got none.")
    for i, q in enumerate(posteriors):
        if not isinstance(q, posterior_type):
            raise TypeError(
                f"`posteriors[{i}]` must be a posterior, got {type(q).__name__}. Pass "
                "`ivon_jax.posterior(params, opt_state)`."
            )
        like(f"posteriors[{i}]", q, "`posteriors[0]`", posteriors[0])


def some_entries(arrays):
    """Reject parameters of which IVON trains none."""
    if not sum(x.mean.size for x in arrays):
        raise ValueError(
            "`params` must have an entry that IVON trains, got none: its arrays are "
            "empty, or all left out with `optax.masked`."
        )


def has_key(key):
    """Reject samples without randomness."""
    if key is None:
        raise ValueError(
            "`key` must be a JAX random key where `loss_fn` is given, got None. Pass "
            "`key=jax.random.key(0)`, a new one for each call."
        )


def measured(name, value):
    """Return a number of `diagnostics.measure` as a Python float."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`numbers` must be known, got a tracer for {name!r}. Call "
            "`diagnostics.advice` on what a jitted `diagnostics.measure` returned."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"`numbers` must be scalars, those of one run, got shape {jnp.shape(value)}"
            f" for {name!r}."
        )
    return float(value)


def scores(name, value):
    """Return numbers to rank, as floating-point ones."""
    array = jnp.asarray(value)
    if not any(jnp.issubdtype(array.dtype, k) for k in (jnp.floating, jnp.integer)):
        raise TypeError(f"`{name}` must be real numbers, got dtype {array.dtype}.")
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(float)
    values = _values(array)
    if values is not None and np.isnan(values).any():
        raise ValueError(
            f"`{name}` must be numbers, got NaN for {np.isnan(values).sum()} of "
            f"{array.size}. Training diverged?"
        )
    return array


def not_empty(name, *arrays):
    """Reject arrays without a single entry."""
    if not sum(array.size for array in arrays):
        raise ValueError(f"`{name}` must have at least one entry, got none.")


def list_of_trees(name, value, count=None):
    """Reject what is no list of one tree for each model."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"`{name}` must be a list of trees, one for each model, got "
            f"{type(value).__name__}."
        )
    if not value:
        raise ValueError(f"`{name}` must have at least one tree, got none.")
    if count is not None and len(value) != count:
        raise ValueError(
            f"`{name}` must have one tree for each of the {count} models in "
            f"`finetuned`, got {len(value)}."
        )


def floating_tree(name, tree):
    """Reject a tree with arrays that no difference can be scaled of."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must be real floating-point arrays, got {dtype} at "
                f"{name}{jax.tree_util.keystr(path)}. Pass the parameters alone."
            )


def scales(name, value, count):
    """Return one finite number for each of `count` models."""
    is_list = isinstance(value, (list, tuple))
    if not is_list and not getattr(value, "ndim", 0):
        return [_scalar(name, value)[0]] * count
    length = len(value)
    if length != count:
        raise ValueError(
            f"`{name}` must be one number, or one for each of the {count} models in "
            f"`finetuned`, got {length}."
        )
    return [_scalar(f"{name}[{i}]", scale)[0] for i, scale in enumerate(value)]


def curvature(name, hess, reference_name, reference):
    """Return non-negative `hess` like `reference`, None for None or masked parts."""
    if isinstance(hess, numbers.Real) or getattr(hess, "shape", None) == ():
        number = non_negative(name, hess)
        return jax.tree.map(lambda _: number, reference)

    def unknown(node):
        return node is None or is_masked(node)

    def fill(h, part):
        return part if unknown(h) else h

    try:
        whole = jax.tree.map(fill, hess, reference, is_leaf=unknown)
    except ValueError:
        whole = hess
    like(name, whole, reference_name, reference)
    for path, h in jax.tree_util.tree_leaves_with_path(hess):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(h), jnp.floating):
            raise TypeError(
                f"`{name}` must be real floating-point arrays, got "
                f"{jnp.result_type(h)} at {where}."
            )
        values = _values(jnp.asarray(h))
        if values is None or not values.size:
            continue
        if not (values.min() >= 0 and values.max() < np.inf):
            bad = values.max() if values.min() >= 0 else values.min()
            raise ValueError(
                f"`{name}` must be non-negative and finite, got {bad} at {where}. "
                "IVON's `h` may fall to minus the weight decay: use the precision of "
                "`ivon_jax.posterior`, or `jnp.maximum(h, 0)`."
            )
    return jax.tree.map(
        lambda h, part: jax.tree.map(lambda _: None, part) if unknown(h) else h,
        hess,
        reference,
        is_leaf=unknown,
    )


def some_curvature(path, total):
    """Reject a sum of Hessians that cannot be divided by."""
    values = _values(total)
    if values is not None and not (np.all(values > 0) and np.all(values < np.inf)):
        bad = values.max() if np.all(values > 0) else values.min()
        raise ValueError(
            "`base_hessian` plus the sum of `hessians` must be positive and finite, "
            f"got {bad} at base{jax.tree_util.keystr(path)}. Pass a positive "
            "`base_hessian`, such as the prior's precision."
        )


def fraction(name, value):
    """Return a scalar in [0, 1], as a Python float where it is known."""
    scalar, number = _scalar(name, value)
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
    return scalar if number is None else number


def fractions(name, value):
    """Return numbers in [0, 1] along one axis."""
    array = jnp.asarray(value, dtype=float)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`{name}` must be a list of at least one number, got shape {array.shape}."
        )
    values = _values(array)
    if values is not None and not (np.all(values >= 0) and np.all(values <= 1)):
        bad = values.max() if np.all(values >= 0) else values.min()
        raise ValueError(f"`{name}` must be in [0, 1], got {bad}.")
    return array


def some_precision(posterior):
    """Reject a posterior with nothing to rank."""
    if not jax.tree.leaves(posterior.precision):
        raise ValueError(
            "`posterior` must have a precision for some array, got point masses alone. "
            "Was it made of the state of `ivon_jax.ivon`?"
        )


def keep_like(name, mask, reference_name, reference):
    """Return booleans like `reference`; single ones hold for a whole array."""

    def is_none(node):
        return node is None

    def whole(param, keep):
        single = isinstance(keep, (bool, np.bool_)) or getattr(keep, "shape", 0) == ()
        return param if param is None or single else keep

    def kept(param, keep):
        return None if param is None else keep

    try:
        filled = jax.tree.map(whole, reference, mask, is_leaf=is_none)
    except ValueError:
        filled = mask
    like(name, filled, reference_name, reference)
    for path, keep in jax.tree_util.tree_leaves_with_path(mask):
        if jnp.result_type(keep) != jnp.bool_:
            raise TypeError(
                f"`{name}` must be booleans, True for what is kept, got "
                f"{jnp.result_type(keep)} at {name}{jax.tree_util.keystr(path)}."
            )
    return jax.tree.map(kept, reference, mask, is_leaf=is_none)
