"""The currencies the parts trade in, and the checks that guard their construction.

Shapes are those of one group of parameters; the engine adds a leading axis of groups. Symbols:
``d`` parameters of a group, ``r`` coordinates, ``m`` stored rows, ``k`` columns of one correction.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.core

Vector = list[jax.Array]
"""One vector of the parameters' space: a flat array for every piece of a `Layout`."""


Columns = list[jax.Array]
"""Several such vectors: an array ``(k, size)`` for every piece."""


class Eigenbasis(NamedTuple):
    """What a step reads of ``Q diag(lam) Q^T``: eigenvalues and which of the ``r`` slots hold one.

    Attributes:
      lam: eigenvalues ``(r,)`` in units of the curvature, 0 in dead slots; a basis gives them with
        a leading axis of groups.
      live: booleans ``(r,)``; a dead slot's direction is zero and so is everything along it. A live
        slot may have the eigenvalue 0.
    """

    lam: jax.Array
    live: jax.Array


class Correction(NamedTuple):
    """A low-rank change of curvature, ``sum_i w_i y_i z_i^T``.

    Attributes:
      columns: the ``y_i``, an array ``(k, size)`` for every piece; ``None`` when the one
        column is the gradient itself, whose products with the basis need no pass of their own.
      right: the ``z_i`` where they differ from the ``y_i``; the engine symmetrises.
      weights: ``(n, k)``; ``None`` means ones. Zero switches a column off.
      signed: whether weights can be negative (static, a property of the curvature).
      initial: ``(n,)`` curvature assumed in directions that no correction has touched, or ``None``
        for zero.
      probe: a pair of vectors ``(z, H z)`` for the inner parts that use them, or ``None``.
      independent: whether that ``z`` was drawn apart from the columns (static). Only then does the
        pair also tell of the curvature outside the basis: of a pair that the basis has absorbed
        nothing is left there.
    """

    columns: Columns | None
    right: Columns | None = None
    weights: jax.Array | None = None
    signed: bool = False
    initial: jax.Array | None = None
    probe: tuple[Vector, Vector] | None = None
    independent: bool = False


class SymmetricCorrection(NamedTuple):
    """A correction as the engine hands it to the basis: symmetric, ``sum_i w_i y_i y_i^T``.

    Attributes:
      columns: the columns ``y_i``, an array ``(k, size)`` for every piece.
      weights: weights ``w_i``, ``(n, k)``; a column of weight 0 is switched off and may hold
        anything.
      signed: whether weights can be negative; static.
      initial: curvature ``(n,)`` assumed in directions that no correction has touched, or ``None``
        for zero.
      params: the parameters' tree if ``update`` got them, for bases that look at steps.
    """

    columns: Columns
    weights: jax.Array
    signed: bool = False
    initial: jax.Array | None = None
    params: Any = None


@dataclasses.dataclass(frozen=True)
class Law:
    """How a state in the coordinates of a basis moves when the basis does.

    With ``C = Q_new^T Q_old``, the elementwise ``power`` of ``C`` multiplies the state along each
    of its first ``axes`` axes: ``C m`` for a mean, ``(C∘C) v`` for second moments, ``C M C^T`` for
    a matrix.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lro.SECOND_MOMENT == lro.Law(axes=1, power=2)
      True
      >>> C = jnp.array([[0.0, 1.0], [-1.0, 0.0]])        # a quarter turn
      >>> print(C**2 @ jnp.array([4.0, 9.0]))             # what this law makes of a second moment
      [9. 4.]

    Args:
      axes: how many of the state's axes are coordinates; a state of none stays as it is.
      power: elementwise power of ``C``.
      centred: whether the state is a pair of first and second moments, each corrected for its
        start. The law then moves the variance and adds the square of the moved mean.
      surrounded: whether the state is a pair of which the second, a number ``s``, stands for the
        first outside the basis. A direction that enters then brings ``s`` along instead of zero.

    Cost: ``2 r^(axes + 1)`` flops for each axis.

    Source: Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
    ICLR 2025, for the centred law; the others follow from the definitions of the moments.
    """

    axes: int
    power: int = 1
    centred: bool = False
    surrounded: bool = False


SCALAR = Law(0)
"""Counters and norms: unchanged."""


VECTOR = Law(1)
"""Momentum: ``C m``."""


SECOND_MOMENT = Law(1, 2)
"""Adam's second moment: ``(C∘C) v = diag(C diag(v) C^T)``."""


THIRD_MOMENT = Law(1, 3)
"""Diagonal third moment: ``(C∘C∘C) t``."""


MATRIX = Law(2)
"""Full second moments and Hessians: ``C M C^T``."""


TENSOR = Law(3)
"""Full third moments: ``einsum('ai,bj,ck,ijk->abc', C, C, C, T)``."""


MOMENTS = Law(1, 2, centred=True)
"""The pair ``(m, v)``, corrected for its start: ``C m`` and ``|(C∘C)(v - m²) + (C m)²|``."""


SURROUNDED_DIAGONAL = Law(1, 2, surrounded=True)
"""The pair ``(v, s)``: ``(C∘C) v + s (1 - (C∘C) 1) = diag(C diag(v) C^T + s (I - C C^T))``."""


SURROUNDED_MATRIX = Law(2, surrounded=True)
"""The pair ``(M, s)``: ``C M C^T + s (I - C C^T)``."""


class Outside(NamedTuple):
    """A probe and its product, as far as they lie outside the basis: three inner products.

    Without a probe that is independent of the basis, and where the basis spans everything, all are
    zero: then nothing is known.

    Attributes:
      probe: ``z·z``.
      cross: ``z·Hz``; over ``z·z`` an estimate of the mean eigenvalue.
      product: ``Hz·Hz``; over ``z·z`` an estimate of the eigenvalues' mean square.
    """

    probe: jax.Array
    cross: jax.Array
    product: jax.Array


class Context(NamedTuple):
    """What an inner part sees of the step besides its input.

    Attributes:
      g: ``(r,)`` the gradient in the basis, as projected.
      basis: eigenvalues and live slots of the basis, as regularised for this step.
      moved: whether the basis took a correction in at this step, and states moved with it where it
        turned. Only then are the following of this step.
      columns: ``(r, k)`` the correction's columns in the basis.
      weights: ``(k,)`` their weights.
      probe: ``(r,)`` a probe ``z`` of the curvature in the basis, ``None`` where it gives none.
      product: ``(r,)`` the curvature times the probe, likewise.
      outside: `Outside` of the same pair, likewise.
    """

    g: jax.Array
    basis: Eigenbasis
    moved: jax.Array
    columns: jax.Array | None = None
    weights: jax.Array | None = None
    probe: jax.Array | None = None
    product: jax.Array | None = None
    outside: Outside | None = None


class BasisUpdate(NamedTuple):
    """What a basis returns after a correction.

    Attributes:
      state: the state of the basis after the correction.
      c: the change of basis ``C = Q_new^T Q_old``, ``(n, r, r)``; the identity for a group that
        failed.
      u: the columns in the new basis, ``(n, r, k)``.
      failed: booleans ``(n,)``: groups in which something was not finite, so that their basis
        stayed as it was.
    """

    state: Any
    c: jax.Array
    u: jax.Array
    failed: jax.Array


class Inner(Protocol):
    """A rule in the coordinates of the basis. All shapes are those of one group.

    A part may have ``needs``, a set of names of what it needs of the other parts, such as
    ``"eigenvalues"``. A combination in which nothing provides them is refused when it is built.
    """

    def init(self, rank: int, dtype: Any) -> Any:
        """The state before the first step, for ``rank`` coordinates: any tree of arrays."""

    @property
    def laws(self) -> Any:
        """How the state moves with the basis: a tree prefix of it with a `Law` for every part."""

    def update(self, u: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        """New coordinates ``(r,)`` in place of ``u`` ``(r,)``, and the state after the step."""
        ...


NEEDS = {
    "eigenvalues": "the basis's eigenvalues; combine it with GGT, Eigen or FullMatrix",
    "probe": "products of the curvature with a probe; combine it with HutchinsonHessian, "
    "SquaredHessian, BFGS or SR1",
    "outside": "the curvature outside the basis; combine it with BFGS or SR1, which assume one, "
    "HutchinsonHessian or SquaredHessian, which measure one, or a basis with eigenvalues",
    "examples": "one column for every example; combine it with EmpiricalFisher or GaussNewton",
    "initial": "a basis that adds corrections to an assumed curvature; combine it with Eigen(rank, "
    "beta=None) or FullMatrix(beta=None)",
    "complement": "a first step to learn from, outside the empty basis; pass a complement such as "
    "lro.inner.LInv()",
}
"""What a part may need of the others, and where it can be had."""
