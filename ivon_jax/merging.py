r"""Merge models that were finetuned from one base, weighted by their curvatures.

:math:`\theta_0` are the parameters of the base model, :math:`\theta_t` those of the
model finetuned on task t, all trees of one structure. :math:`h_0` and :math:`h_t` are
diagonals of the Hessians of whole data sets: sums, not means, over examples. All
functions work under ``jit``; there, values go unchecked.

References:
  Shen et al., Variational Learning is Effective for Large Deep Networks, ICML 2024,
  section 4.3.2; Daheim et al., Model Merging by Uncertainty-Based Gradient Matching,
  ICLR 2024; Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._arrays import compiled, sharding
from ._arrays.dtypes import wide_dtype
from ._arrays.loops import scan_mean, sum_examples
from ._arrays.trees import array_leaves, is_masked, like
from ._evaluation import validity


def task_arithmetic(
    base: optax.Params,
    finetuned: Sequence[optax.Params],
    scale: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike] = 1.0,
) -> optax.Params:
    r"""Add up the changes: :math:`\theta_0 + \sum_t s_t (\theta_t - \theta_0)`.

    >>> base, first, second = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
    >>> print(task_arithmetic(base, [first, second], scale=0.5))
    [1. 1.]

    Args:
      base: :math:`\theta_0`, floating-point arrays.
      finetuned: a list of the :math:`\theta_t`.
      scale: :math:`s_t`, one number, or one for each; a negative one removes a task.

    Returns:
      A tree like `base`, with its dtypes, computed in float32 or wider.

    Raises:
      TypeError, ValueError: `finetuned` or `scale` is not as described.
    """
    scales = _checked_scales(base, finetuned, scale)

    def leaf(theta, *thetas):
        return _shifted(theta, thetas, scales, [1.0] * len(thetas))

    return jax.tree.map(leaf, base, *finetuned)


def merge(
    base: optax.Params,
    finetuned: Sequence[optax.Params],
    hessians: Sequence[Any],
    base_hessian: Any,
    *,
    scale: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike] = 1.0,
) -> optax.Params:
    r"""Merge models, each with the say that its curvature gives it, entry by entry.

    .. math::
        \theta_0 + \sum_t s_t \frac{h_0 + h_t}{h_0 + \sum_{t'} h_{t'}}
            (\theta_t - \theta_0)

    With :math:`s_t = 1` it is the exact minimiser of the sum of all tasks' losses plus
    :math:`\frac{1}{2} h_0 (\theta - \theta_0)^2`, if every :math:`\theta_t` is that of
    its own loss plus the same term, and the losses are quadratic with diagonal
    Hessians. `task_arithmetic` is the case of :math:`h_t = 0`.

    IVON's `h`, ``ivon_jax.find_states(opt_state)[0].hess``, is a mean over examples:
    multiply it by their number where tasks differ in size or :math:`h_0` has a say.
    With ``ess`` for that number, the precision of `ivon_jax.posterior` is
    :math:`\lambda (h + \delta)`, that product plus the precision of the prior, which
    then counts once for each task.

    >>> base, first, second = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> hessians = [jnp.array([3.0, 0.0]), jnp.array([0.0, 1.0])]
    >>> print(merge(base, [first, second], hessians, base_hessian=1.0))
    [1. 1.]

    Args:
      base: :math:`\theta_0`, floating-point arrays.
      finetuned: a list of the :math:`\theta_t`.
      hessians: a list of the :math:`h_t`, non-negative trees like `base`, or numbers
        for all entries. Where a tree has None or `optax.MaskedNode`, as for what IVON
        did not train, :math:`h_t = 0`; where all have, this is `task_arithmetic`.
      base_hessian: :math:`h_0`, another such tree or number.
      scale: :math:`s_t`, one number for all models, or one for each.

    Returns:
      A tree like `base`, with its dtypes, computed in float32 or wider.

    Raises:
      TypeError, ValueError: an argument is not as described, or h_0 + sum h_t is zero.
    """
    scales = _checked_scales(base, finetuned, scale)
    count = len(finetuned)
    _check_list("hessians", hessians, count)
    hessians = [
        _curvature(f"hessians[{t}]", hess, "`base`", base)
        for t, hess in enumerate(hessians)
    ]

    def leaf(path, theta, base_hess, *rest):
        thetas, hess = rest[:count], rest[count:]
        weights = _weights(path, base_hess, hess, wide_dtype(theta, *thetas))
        return _shifted(theta, thetas, scales, weights)

    base_hessian = _curvature("base_hessian", base_hessian, "`base`", base)
    trees = (base_hessian, *finetuned, *hessians)
    return jax.tree_util.tree_map_with_path(leaf, base, *trees)


def diagonal_fisher(
    fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    key: jax.Array,
    inputs: Any,
    *,
    num_samples: int = 1,
    chunk_size: int = 16,
) -> optax.Params:
    r"""Estimate a classifier's curvature from squared gradients of single examples.

    .. math::
        \sum_i \frac{1}{S} \sum_s [\nabla_\theta \log p(y_i^{(s)} | x_i, \theta)]^2,
        \qquad y_i^{(s)} \sim p(y | x_i, \theta)

    It is the `h` of a model trained without IVON. As labels are drawn from the model,
    its expectation is the diagonal of the Fisher (here the Gauss-Newton) matrix.

    >>> x, weights = jnp.array([[1.0], [2.0]]), jnp.zeros((1, 2))
    >>> print(diagonal_fisher(lambda w, x: x @ w, weights, jax.random.key(0), x))
    [[1.25 1.25]]

    Args:
      fn: ``fn(theta, x) -> (N, C)``, the logits of N examples; with one column, those
        of a sigmoid. It is called with batches of one, so batch normalisation must not
        be in training mode.
      params: where to take the gradients, floating-point arrays.
      key: a JAX random key. The same key draws the same labels for any `chunk_size`.
      inputs: a pytree of arrays, the data set's examples along their first axes.
      num_samples: S, labels for each example; each costs a backward pass.
      chunk_size: examples to evaluate at once, with memory for one gradient each. With
        `inputs` sharded over devices, make it a multiple of their number that divides
        the number of examples.

    Returns:
      A tree like `params`, float32 or wider: a sum over the data set.

    Raises:
      TypeError, ValueError: an argument or the logits are not as described.
    """
    _checks.function("fn", fn, "parameters and inputs", "apply")
    key = _checks.random_key("key", key)
    _checks.integer_between("num_samples", num_samples, 1)
    _checks.integer_between("chunk_size", chunk_size, 1)
    _check_floating("params", params)
    inputs = jax.tree.map(jnp.asarray, inputs)
    validity.number_of_examples(inputs=inputs)

    def run(params, key, inputs):
        def squared_gradient(index_and_example):
            index, example = index_and_example
            return _squared_gradient(
                fn, params, jax.random.fold_in(key, index), example, num_samples
            )

        indices = sharding.positions(jax.tree.leaves(inputs)[0])
        params = sharding.alike(jax.tree.map(jnp.asarray, params), inputs)
        return sum_examples(squared_gradient, (indices, inputs), chunk_size)

    return compiled.call(run, params, key, inputs, of=fn)


def _squared_gradient(fn, params, key, example, num_samples):
    """The mean over labels of one example, drawn from the model."""
    batch = jax.tree.map(lambda x: x[None], example)
    logits, pull = jax.vjp(lambda theta: fn(theta, batch), params)
    validity.outputs_of_one(logits)

    def square(label_key):
        [grad] = pull(_errors(label_key, logits))
        return jax.tree.map(lambda g: g.astype(wide_dtype(g)) ** 2, grad)

    return scan_mean(square, jax.random.split(key, num_samples))


def _errors(key, logits):
    """Probabilities minus a drawn label: the gradient of the cross-entropy."""
    wide = logits.astype(wide_dtype(logits))
    if wide.shape[-1] == 1:
        probs = jax.nn.sigmoid(wide)
        labels = jax.random.bernoulli(key, probs).astype(wide.dtype)
    else:
        probs = jax.nn.softmax(wide)
        classes = jax.random.categorical(key, wide)
        labels = jax.nn.one_hot(classes, wide.shape[-1], dtype=wide.dtype)
    return (probs - labels).astype(logits.dtype)


def _checked_scales(base, finetuned, scale):
    """One scale for each of the checked models."""
    _check_floating("base", base)
    _check_list("finetuned", finetuned)
    for t, theta in enumerate(finetuned):
        like(f"finetuned[{t}]", theta, "`base`", base)
        _check_floating(f"finetuned[{t}]", theta)
    return _one_scale_each("scale", scale, len(finetuned))


def _weights(path, base_hess, hess, dtype):
    """(h_0 + h_t) / (h_0 + sum of all h_t) for each t; None is zero."""
    if all(h is None for h in hess):
        return [1.0] * len(hess)
    base_hess, *hess = [
        jnp.asarray(0.0 if h is None else h, dtype) for h in (base_hess, *hess)
    ]
    total = base_hess + sum(hess)
    _check_some_curvature(path, total)
    return [(base_hess + h) / total for h in hess]


def _shifted(theta, thetas, scales, weights):
    """Theta plus the sum of scale * weight * (theta_t - theta), in theta's dtype."""
    dtype = wide_dtype(theta, *thetas)
    start = total = jnp.asarray(theta, dtype)
    for theta_t, *factors in zip(thetas, scales, weights, strict=True):
        scale, weight = (jnp.asarray(factor, dtype) for factor in factors)
        total += scale * weight * (jnp.asarray(theta_t, dtype) - start)
    return total.astype(jnp.result_type(theta))


def _curvature(name, hess, reference_name, reference):
    """Return non-negative `hess` like `reference`, None for None or masked parts."""
    if isinstance(hess, numbers.Real) or getattr(hess, "shape", None) == ():
        number = _checks.number(name, hess, _checks.NON_NEGATIVE)
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
        low, high = _checks.extremes(jnp.asarray(h)) or (0, 0)
        if not 0 <= low <= high < np.inf:
            bad = high if low >= 0 else low
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


def _check_some_curvature(path, total):
    """Raise unless the sum of Hessians is positive and finite."""
    low, high = _checks.extremes(total) or (1, 1)
    if not 0 < low <= high < np.inf:
        bad = high if low > 0 else low
        raise ValueError(
            "`base_hessian` plus the sum of `hessians` must be positive and finite, "
            f"got {bad} at base{jax.tree_util.keystr(path)}. Pass a positive "
            "`base_hessian`, such as the prior's precision."
        )


def _check_floating(name, tree):
    """Raise unless differences of these arrays can be scaled."""
    array_leaves(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must be real floating-point arrays, got {dtype} at "
                f"{name}{jax.tree_util.keystr(path)}. Pass the parameters alone."
            )


def _check_list(name, value, count=None):
    """Raise unless this is a list with one tree for each model."""
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


def _one_scale_each(name, value, count):
    """Return one finite number for each of `count` models."""

    def one(name, value):
        scale, number = _checks.scalar(name, value)
        if number is not None and math.isnan(number):
            raise ValueError(f"`{name}` must be a number, got nan.")
        return scale

    is_list = isinstance(value, (list, tuple))
    if not is_list and not getattr(value, "ndim", 0):
        return [one(name, value)] * count
    length = len(value)
    if length != count:
        raise ValueError(
            f"`{name}` must be one number, or one for each of the {count} models in "
            f"`finetuned`, got {length}."
        )
    return [one(f"{name}[{i}]", scale) for i, scale in enumerate(value)]
