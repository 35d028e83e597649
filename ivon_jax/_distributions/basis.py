r"""Orthogonal bases of arrays in matrix form.

The matrix form of an array has its last axis for columns, and all others for rows: a
convolution's kernel (H, W, in, out) is a matrix of H W in rows. Leading axes that a
basis has as well stack matrices, each with a basis of its own.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._arrays import sharding
from .._arrays.dtypes import wide


class Basis(NamedTuple):
    r"""Orthogonal matrices :math:`Q_L, Q_R`, the basis of one array W.

    Its coordinates there are :math:`Q_L^\top W Q_R`. None is the identity: that side
    stays as it is.

    >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> print(Basis(left=turn).into(jnp.array([[1.0], [2.0]])))
    [[ 2.]
     [-1.]]
    """

    left: jax.Array | None = None  #: (..., rows, rows)
    right: jax.Array | None = None  #: (..., columns, columns)

    def into(self, x: jax.Array) -> jax.Array:
        r"""Return the coordinates :math:`Q_L^\top X Q_R` of `x`, in its shape."""
        return _product(_transposed(self.left), x, self.right)

    def out_of(self, x: jax.Array) -> jax.Array:
        r"""Return the array :math:`Q_L X Q_R^\top` of these coordinates."""
        return _product(self.left, x, _transposed(self.right))

    @property
    def turns(self) -> bool:
        """Return whether the basis turns anything: it is not the identity."""
        return any(q is not None for q in self)

    @property
    def squared(self) -> "Basis":
        """The squares of all entries, which turn variances; not a basis itself."""
        return Basis(*(None if q is None else q**2 for q in self))

    def seen_from(self, other: "Basis") -> "Basis":
        r"""Return :math:`P_L^\top Q_L, P_R^\top Q_R` for the matrices P of `other`."""
        return Basis(*map(_relative, self, other))


def into(bases, tree):
    """The coordinates of each array of `tree`; None stays None."""
    return map_bases(_if_there(Basis.into), bases, tree)


def out_of(bases, tree):
    """The arrays of these coordinates."""
    return map_bases(_if_there(Basis.out_of), bases, tree)


def map_bases(fn, bases, *trees):
    """Map `fn` over the basis of each array, and its part of other trees."""
    return jax.tree.map(fn, bases, *trees, is_leaf=is_basis)


def squared(bases):
    return map_bases(lambda basis: basis.squared, bases)


def is_basis(node):
    return isinstance(node, Basis)


def without(tree):
    """A tree of no bases for the arrays of `tree`."""
    return jax.tree.map(lambda _: Basis(), tree)


def matrix_form(x, stacked_axes=0):
    """`x` with one axis for rows, one for columns, and those that stack matrices."""
    *rows, columns = x.shape[stacked_axes:]
    return x.reshape(*x.shape[:stacked_axes], math.prod(rows), columns)


def matmul(a, b):
    """The product of matrices in their own precision, also where chips offer less."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _if_there(fn):
    return lambda basis, x: None if x is None else fn(basis, x)


def _product(left, x, right):
    """``left x right`` in matrix form, where None is the identity."""
    matrices = [q for q in (left, right) if q is not None]
    if not matrices:
        return x
    reference, (x, *matrices) = x, wide(x, *matrices)
    product = matrix_form(sharding.whole(x), matrices[0].ndim - 2)
    if left is not None:
        product = matmul(matrices.pop(0), product)
    if right is not None:
        product = matmul(product, matrices.pop())
    return sharding.back(product.reshape(x.shape), reference)


def _relative(q, p):
    if p is None:
        return q
    return _transposed(p) if q is None else matmul(_transposed(p), q)


def _transposed(q):
    return None if q is None else jnp.swapaxes(q, -1, -2)
