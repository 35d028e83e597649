r"""The eigenbasis of SOAP's preconditioner, one array at a time.

For the gradient G of a matrix, :math:`L` and :math:`R` are moving averages of
:math:`G G^\top` and :math:`G^\top G`, the statistics of Shampoo. Their eigenvectors are
:math:`Q_L` and :math:`Q_R`.

References:
  Gupta et al., Shampoo: Preconditioned Stochastic Tensor Optimization, ICML 2018.
  Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, ICLR 2025,
  https://arxiv.org/abs/2409.11321
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._arrays import sharding
from .._arrays.dtypes import wide, wide_dtype
from .._distributions.basis import Basis, map_bases, matmul, matrix_form

MAX_SIDE = 10_000
MATRIX_AXES = 2, 4  # of a matrix, and of a convolution's kernel
# Of the odd polynomial that lifts singular values towards one (Jordan et al., Muon: An
# Optimizer for Hidden Layers in Neural Networks, 2024). Five rounds take those from
# 0.01 on to 0.7 to 1.2; it is steep at zero, and need not converge.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Statistic(NamedTuple):
    """Moving averages of one array's gradients; None where its basis has none."""

    left: jax.Array | None  # (..., rows, rows): L
    right: jax.Array | None  # (..., columns, columns): R


def identity(param, stacked, max_side):
    """The basis before any gradient: identities for the sides that will have one."""
    stacked_axes = int(stacked)
    sides = [None, None]
    if len(param.shape) - stacked_axes in MATRIX_AXES:
        rows = math.prod(param.shape[stacked_axes:-1])
        sides = [n if 1 < n <= max_side else None for n in (rows, param.shape[-1])]

    def eye(n):
        if n is None:
            return None
        one = jnp.eye(n, dtype=wide_dtype(param))
        return jnp.tile(one, (*param.shape[:stacked_axes], 1, 1))

    return Basis(*map(eye, sides))


def no_statistic(basis):
    """The statistic before any gradient."""
    return Statistic(*(None if q is None else jnp.zeros_like(q) for q in basis))


def next_statistic(statistic, grad, b3):
    r""":math:`L \leftarrow \beta_3 L + (1 - \beta_3) G G^\top`, and R alike.

    A gradient that is not finite, or of which the squares are not, leaves no trace.
    """
    sides = [x for x in statistic if x is not None]
    if not sides:
        return statistic
    grad, _ = wide(grad, sides[0])
    grad = matrix_form(sharding.whole(grad), sides[0].ndim - 2)
    finite = jnp.isfinite(jnp.sum(grad**2, axis=(-1, -2), keepdims=True))

    def average(x, factor):
        if x is None:
            return None
        step = (1.0 - b3) * (matmul(factor, jnp.swapaxes(factor, -1, -2)) - x)
        return jnp.where(finite, x + step, x)

    return Statistic(
        average(statistic.left, grad),
        average(statistic.right, jnp.swapaxes(grad, -1, -2)),
    )


def is_known(statistic):
    """Say which of the stacked matrices has had a gradient: (..., 1, 1)."""
    return _trace(next(x for x in statistic if x is not None)) > 0


def begins(basis, before, after):
    """Say where the first gradient came just now; None without a basis."""
    return is_known(after) & ~is_known(before) if basis.turns else None


def renewed(bases, before, after, due, stay, turned):
    """Return ``turned(bases)`` of the bases that follow the statistics, or `stay`.

    Eigenvectors where the first gradient came between the statistics `before` and
    `after`; one power iteration of all where it is `due`; else nothing is calculated.
    """
    first = map_bases(begins, bases, before, after)
    if not jax.tree.leaves(first):
        return stay
    any_first = jnp.any(jnp.stack([jnp.any(x) for x in jax.tree.leaves(first)]))

    def follow():
        return turned(map_bases(power_iteration, bases, after))

    def begin():
        return turned(map_bases(eigenvectors, bases, after, first))

    branch = jnp.where(any_first, 2, due.astype(jnp.int32))
    return jax.lax.switch(branch, [lambda: stay, follow, begin])


def eigenvectors(basis, statistic, chosen):
    """The basis of eigenvectors where `chosen`, those of large eigenvalues first.

    In this order the power iteration leaves them where they are.
    """

    def vectors(q, x):
        if q is None:
            return None
        ascending = jnp.linalg.eigh(_regular(x))[1]
        return jnp.where(chosen, jnp.flip(ascending, axis=-1), q)

    return Basis(*map(vectors, basis, statistic))


def power_iteration(basis, statistic):
    """The basis :math:`qr(L Q)`, closer to the eigenvectors; as it is without a trace.

    Of the factors that there are it takes the one that keeps signs: R has a positive
    diagonal.
    """

    def turned(q, x):
        if q is None:
            return None
        factor, triangle = jnp.linalg.qr(matmul(_regular(x), q))
        signs = jnp.where(jnp.diagonal(triangle, axis1=-1, axis2=-2) < 0, -1.0, 1.0)
        factor = factor * signs[..., None, :].astype(factor.dtype)
        return jnp.where(is_known(statistic), factor, q)

    return Basis(*map(turned, basis, statistic))


def _trace(x):
    return jnp.trace(x, axis1=-1, axis2=-2)[..., None, None]


def _regular(x):
    """`x` with a trace of one, and so much of the identity as rounding leaves of it.

    It has the same eigenvectors. Without, directions that no gradient has been in would
    turn at random, and factors of theirs become subnormal numbers, on which CPUs take a
    hundred times as long.
    """
    trace, eps = _trace(x), 4.0 * float(jnp.finfo(x.dtype).eps)
    scaled = x / jnp.where(trace > 0, trace, jnp.ones_like(trace))
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return scaled + jnp.broadcast_to(eps * identity, x.shape)


def orthogonalized(x, stacked):
    """The matrix with about the singular vectors of `x`, and singular values of one.

    Of what has no matrix form, `x` divided by its norm.
    """
    stacked_axes = int(stacked)
    if x.ndim - stacked_axes not in MATRIX_AXES:
        axes = tuple(range(stacked_axes, x.ndim))
        return _normalized(x, axes)
    whole = sharding.whole(x)
    matrix = _normalized(matrix_form(whole, stacked_axes), (-1, -2))
    tall = matrix.shape[-2] > matrix.shape[-1]
    matrix = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        square = matmul(matrix, jnp.swapaxes(matrix, -1, -2))
        polynomial = b * square + c * matmul(square, square)
        matrix = a * matrix + matmul(polynomial, matrix)
    matrix = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    return sharding.back(matrix.reshape(x.shape), x)


def _normalized(x, axes):
    """`x` divided by its norm, zero where that is; its largest entry has no square."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    scaled = x / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    norm = jnp.sqrt(jnp.sum(scaled**2, axis=axes, keepdims=True))
    return scaled / jnp.where(norm > 0, norm, jnp.ones_like(norm))
