"""What one step learns of the loss: a gradient and a Hessian estimate, kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Scaling, clipping and centring move the first number, adding to it the second. An
# average over equal ones moves neither.
SEAL = np.array([[2.0**60, 0.0]], np.float32)
LONGEST_STACK = 4096


class _Sealed(NamedTuple):
    """One part of the tree, so that one spec or axis stands for both."""

    hess: optax.Updates
    seal: jax.Array  # (..., 1, 2): SEAL


class _Shown(type):
    """What jax's errors about trees say of an `Estimate`: they print its type."""

    def __repr__(cls):
        return (
            "<class 'ivon_jax.Estimate'> (pass it on by "
            "`estimate.update(tx, opt_state, params)`)"
        )


@jax.tree_util.register_pytree_with_keys_class
class Estimate(metaclass=_Shown):
    r"""What one step learns of the mean loss: its gradient and Hessian diagonal.

    Both are averages over samples, micro-batches and devices, as `value_and_grad` makes
    them: the product of gradient and noise comes before the mean. `update` takes a step
    with both, through any optax transformation:

    >>> import ivon_jax
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), ivon_jax.ivon(0.1, ess=1000))
    >>> params = jnp.zeros(2)
    >>> estimate = Estimate(grad=jnp.array([3.0, 4.0]), hess=jnp.ones(2))
    >>> updates, opt_state = estimate.update(tx, tx.init(params), params)
    >>> print(updates.round(4))
    [-0.06 -0.08]
    >>> grad, hess = estimate

    It is a pytree, for ``jit``, ``scan``, ``vmap`` and means over devices. Beside the
    two it carries a seal, a constant that whatever scales, clips or shifts the tree as
    if it were one gradient changes: then a step with it is an error, and all NaN
    under ``jit``. For an estimate that you change on purpose, make a new one.

    Attributes:
      grad: :math:`\hat g`, per example; the shapes of the parameters.
      hess: :math:`\hat h`, the same; None for a point mass.
    """

    def __init__(self, grad: optax.Updates, hess: optax.Updates):
        self.grad, self.hess = grad, hess
        self._seal = _seal_of(jax.tree.leaves(grad))

    def __iter__(self) -> Iterator[optax.Updates]:
        return iter((self.grad, self.hess))

    def __contains__(self, name: Any) -> bool:
        """Say no: Flax's train state asks for a collection by its name."""
        return False

    def __repr__(self) -> str:  # for errors of older versions of jax, which print it
        shapes = jax.tree.map(np.shape, self.grad)
        return f"{type(self)!r} of a gradient of shapes {shapes}"

    def update(
        self,
        tx: optax.GradientTransformation | optax.MultiSteps,
        opt_state: optax.OptState,
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        r"""Call ``tx.update(grad, opt_state, params, hess=hess)``.

        Transformations before IVON act on the gradient alone, wrappers hand both on. A
        gradient entry is NaN where :math:`\hat h` is not finite, so that
        `optax.apply_if_finite` skips such a step. `optax.MultiSteps` averages the
        gradients of a window, and takes the Hessian estimate of its last step: right on
        average, but ``value_and_grad(..., microbatches=k)`` averages both.

        Args:
          tx: any optax transformation, with IVON in it or not.
          opt_state: its state.
          params: the posterior mean.
          **extra_args: what other transformations in `tx` need, such as ``value=``.

        Returns:
          The updates, for `optax.apply_updates`, and the next state.

        Raises:
          TypeError: `tx` is not an optax transformation.
          ValueError: the estimate was changed as if it were a gradient.
        """
        check_transformation("tx", tx, "estimate.update(tx, opt_state, params)")
        grad, hess = self.opened()
        tx = with_extra_args(tx)
        return tx.update(grad, opt_state, params, hess=hess, **extra_args)

    def opened(self) -> tuple[optax.Updates, optax.Updates]:
        """Return both; the gradient is NaN where the Hessian estimate is unusable."""
        whole = _is_unbroken(self._seal, SEAL)
        structure = jax.tree.structure(self.grad)
        try:
            # To mypy, jaxlib's PyTreeDef has no methods.
            hess = structure.flatten_up_to(self.hess)  # type: ignore[attr-defined]
        except ValueError:
            return self.grad, self.hess  # another tree, which `update` will tell

        def seen(grad, hess):
            if not jnp.issubdtype(jnp.result_type(grad), jnp.floating):
                return grad
            fits = getattr(hess, "shape", None) == jnp.shape(grad)
            known = jnp.isfinite(hess) & whole if fits else whole
            return jnp.where(known, grad, jnp.full_like(grad, jnp.nan))

        leaves = map(seen, jax.tree.leaves(self.grad), hess)
        return jax.tree.unflatten(structure, leaves), self.hess

    def tree_flatten_with_keys(self):
        """Return the parts with their names, for jax."""
        sealed = self._seal is not None
        hess = _Sealed(self.hess, self._seal) if sealed else self.hess
        keys = map(jax.tree_util.GetAttrKey, ("grad", "hess"))
        return tuple(zip(keys, (self.grad, hess), strict=True)), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        """Return an estimate of `tree_flatten_with_keys`'s parts, for jax."""
        estimate = object.__new__(cls)
        estimate.grad, hess = parts
        sealed = isinstance(hess, _Sealed)
        estimate.hess, estimate._seal = hess if sealed else (hess, None)
        return estimate


def with_extra_args(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Let `tx` take arguments of others; unlike optax, let `MultiSteps` see them."""
    if isinstance(tx, optax.MultiSteps):
        # It takes a state of its own kind, the protocol takes any.
        update = tx.update
        return optax.GradientTransformationExtraArgs(tx.init, update)  # type: ignore[arg-type]
    return optax.with_extra_args_support(tx)


def _seal_of(leaves):
    """A seal for arrays; none for specs or axes, which stand for arrays.

    Where all arrays have a first axis of one length they may be a stack of estimates,
    whose seals `jax.vmap` cuts with them.
    """
    if not any(isinstance(x, float) or hasattr(x, "dtype") for x in leaves):
        return None
    lengths = {np.shape(x)[:1] for x in leaves}
    [length] = lengths if len(lengths) == 1 else [()]
    if length == () or not 0 < length[0] <= LONGEST_STACK:
        return SEAL
    return np.broadcast_to(SEAL, length + SEAL.shape)


def check_transformation(name, tx, call):
    """Raise unless `tx` is an optimizer; arguments may be in the wrong order."""
    if not (callable(getattr(tx, "init", None)) and hasattr(tx, "update")):
        raise TypeError(
            f"`{name}` must be an optax transformation, got {type(tx).__name__}. Call "
            f"`{call}`."
        )


def _is_unbroken(seal, expected):
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
