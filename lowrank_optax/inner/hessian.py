"""Inner parts that carry averages of the curvature itself, from products with probes.

They read ``Q^T z`` and ``Q^T H z`` in the step's `Context`. On a step that measured no product the
averages stay as they are. A random probe is one that the basis has not absorbed (see `Probing`), so
the estimates have no bias in the basis as it is now.

An average has no entry for a direction that enters the basis. A zero there would make the step
along that direction far too long. So one scalar ``s`` holds the average of the same statistic over
all that lies outside the basis, and a direction that enters starts with it: the average moves as
that of ``Q M Q^T + s (I - Q Q^T)``. A probe that is not random tells nothing of what is outside,
and ``s`` is then 0.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least
from lowrank_optax._core.types import (
    SCALAR,
    SURROUNDED_DIAGONAL,
    SURROUNDED_MATRIX,
    VECTOR,
    Context,
)
from lowrank_optax.inner.adaptive import (
    check_amsgrad,
    check_moments,
    debias,
    ema,
    identity_at_first,
)


class Surrounded(NamedTuple):
    """An average inside the basis, and the scalar that stands for it outside.

    Attributes:
      inside: the average in the basis, ``(r,)`` or ``(r, r)``.
      outside: the scalar that a direction starts with when it enters the basis.
    """

    inside: jax.Array
    outside: jax.Array


class HutchinsonAdamState(NamedTuple):
    """State of `HutchinsonAdam`.

    Attributes:
      count: steps.
      estimates: number of steps that measured a product.
      mean: ``(r,)`` average of the gradients, not corrected for its start.
      diagonal: average of the diagonal's estimates or of their squares, not corrected.
      largest: decaying maximum of ``diagonal``; ``None`` without ``amsgrad_decay``.
    """

    count: jax.Array
    estimates: jax.Array
    mean: jax.Array
    diagonal: Surrounded
    largest: Surrounded | None


@dataclasses.dataclass(frozen=True)
class HutchinsonAdam:
    r"""Adam's momentum over a Hutchinson estimate of the Hessian's diagonal in the basis.

    With ``v = (Q^T z)∘(Q^T H z)``, whose mean over probes is ``diag(Q^T H Q)``,

    .. math:: u' = \hat m / (\sqrt{\hat D} + \epsilon),\quad D \leftarrow b_2 D + (1-b_2)\, v^2

    or, where ``gamma`` is given,

    .. math:: u' = \hat m / \max(\gamma \hat h, \epsilon),\quad h \leftarrow b_2 h + (1-b_2)\, v

    A hat stands for the correction of the start at zero, which ``debias=False`` turns off.

    When the basis turns, ``h`` becomes ``diag(C diag(h) C^T + s (I - C C^T))``, and ``D`` likewise.
    The scalar ``s`` is an average over what lies outside the basis: of the mean eigenvalue there
    for ``h``, of the mean square eigenvalue for ``D``. The coordinates of a random probe in a basis
    are nearly normal, so ``E[v²] = 3 λ²`` along an eigenvector and ``sqrt(D)`` settles at
    ``1.7 |λ|``.

    With ``amsgrad_decay`` ``= a``, a decaying maximum takes the place of ``D`` or ``h`` before the
    correction. It moves with the basis by the same law.

    .. math:: M \leftarrow \max(a\,M,\ D)

    Two published methods, in the coordinates of the basis:

    * AdaHessian is ``HutchinsonAdam(b2=0.999)``, without its spatial averages, since neighbours in
      a basis are not alike.
    * Sophia-H is ``HutchinsonAdam(b1=0.965, eps=1e-12, gamma=0.01, debias=False)``, then
      ``ClipValue(1.0)``.

    The first form returns zero where the denominator is zero, and everywhere until the first
    product is measured. The second form may be infinite where ``eps`` and ``h`` are zero, which
    `ClipValue` cuts; where ``m`` is zero it is zero, so slots that nothing has reached stand still.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part = lro.inner.HutchinsonAdam(b1=0.0, b2=0.0)
      >>> g, z = jnp.array([3.0, 4.0]), jnp.array([1.0, -1.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> hz = jnp.array([1.0, 2.0]) * z                         # H = diag(1, 2)
      >>> context = lro.Context(g, basis, moved=jnp.array(True), probe=z, product=hz)
      >>> u, state = part.update(g, part.init(2, g.dtype), context)
      >>> print(u)                                               # Newton's step, H^{-1} g
      [3. 2.]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the estimates, in [0, 1), a measured product.
      eps: number added to the root, or the least denominator; in units of the curvature.
      gamma: factor of Sophia's denominator, a number without unit; by default (``None``) the
        denominator is the root of averaged squares.
      debias: whether averages are corrected for their start at zero, the mean by the number of
        steps and the estimates by their own number; ``True`` by default. Sophia's paper does not.
      amsgrad_decay: decay ``a`` of the maximum of the estimates in [0, 1], a measured product; 1
        never lets it fall, and by default (``None``) there is no maximum.

    Raises:
      ValueError: for decays out of range, a negative ``eps`` or a ``gamma`` that is not positive;
        when an optimizer is built in which nothing measures products with probes.

    Cost: ``2 r`` numbers, and ``4 r²`` flops when the basis turns; with ``amsgrad_decay`` ``3 r``
    and ``6 r²``. The engine projects ``z`` and ``H z`` in one pass over the rows on the steps that
    measure them.

    Source: Yao et al., "ADAHESSIAN", AAAI 2021; Liu et al., "Sophia: A Scalable Stochastic
    Second-order Optimizer for Language Model Pre-training", 2023; the maximum is the original
    LRE's.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    gamma: float | None = None
    debias: bool = True
    amsgrad_decay: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self):
        check_moments(self)
        check_amsgrad(self)
        if self.gamma is not None:
            check_least("HutchinsonAdam", "gamma", self.gamma, strict=True)

    def init(self, rank: int, dtype: Any) -> HutchinsonAdamState:
        zero = lambda: jnp.zeros((), jnp.int32)
        empty = lambda: Surrounded(jnp.zeros(rank, dtype), jnp.zeros((), dtype))
        largest = None if self.amsgrad_decay is None else empty()
        return HutchinsonAdamState(zero(), zero(), jnp.zeros(rank, dtype), empty(), largest)

    @property
    def laws(self) -> HutchinsonAdamState:
        largest = None if self.amsgrad_decay is None else SURROUNDED_DIAGONAL
        return HutchinsonAdamState._make((SCALAR, SCALAR, VECTOR, SURROUNDED_DIAGONAL, largest))

    def update(self, u: jax.Array, state: HutchinsonAdamState, context: Context):
        count = linalg.tally(state.count)
        estimates = linalg.tally(state.estimates, context.moved)
        z, hz = _pair(context)
        v = z * hz
        v = v * v if self.gamma is None else v
        diagonal = _averaged(state.diagonal, v, context, self.b2, square=self.gamma is None)
        largest, decay = state.largest, self.amsgrad_decay
        if largest is not None and decay is not None:
            raised = lambda old, now: jnp.maximum(decay * old, now)
            largest = jax.tree.map(
                lambda old, now: jnp.where(context.moved, raised(old, now), old), largest, diagonal
            )
        mean = ema(state.mean, u, self.b1)
        new = HutchinsonAdamState(count, estimates, mean, diagonal, largest)
        diagonal = (diagonal if largest is None else largest).inside
        if self.debias:
            mean = debias(mean, self.b1, count)
            diagonal = debias(diagonal, self.b2, jnp.maximum(estimates, 1))
        if self.gamma is not None:
            return jnp.where(mean == 0, 0, mean / jnp.maximum(self.gamma * diagonal, self.eps)), new
        step = linalg.safe_divide(mean, jnp.sqrt(diagonal) + self.eps)
        return jnp.where(estimates > 0, step, 0), new


class FullMatrixHessianState(NamedTuple):
    """State of `FullMatrixHutchinsonAdam` and `FullMatrixBFGSAdam`.

    Attributes:
      count: steps.
      estimates: number of steps that measured a product.
      mean: ``(r,)`` average of the gradients, not corrected for its start.
      hessian: average of the Hessian's estimates, not corrected.
    """

    count: jax.Array
    estimates: jax.Array
    mean: jax.Array
    hessian: Surrounded


@dataclasses.dataclass(frozen=True)
class _FullMatrixHessian(abc.ABC):
    """What the two parts below share: the momentum, the average of matrices, and its law."""

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self):
        check_moments(self)

    def init(self, rank: int, dtype: Any) -> FullMatrixHessianState:
        zero = jnp.zeros((), jnp.int32)
        hessian = Surrounded(jnp.zeros((rank, rank), dtype), jnp.zeros((), dtype))
        return FullMatrixHessianState(zero, zero, jnp.zeros(rank, dtype), hessian)

    @property
    def laws(self) -> FullMatrixHessianState:
        return FullMatrixHessianState._make((SCALAR, SCALAR, VECTOR, SURROUNDED_MATRIX))

    def update(self, u: jax.Array, state: FullMatrixHessianState, context: Context):
        count = linalg.tally(state.count)
        estimates = linalg.tally(state.estimates, context.moved)
        mean = ema(state.mean, u, self.b1)
        old = identity_at_first(state.hessian.inside, state.count, context)
        estimate = self._estimate(old, *_pair(context))
        hessian = _averaged(state.hessian._replace(inside=old), estimate, context, self.b2)
        m = debias(hessian.inside, self.b2, jnp.maximum(estimates, 1))
        u = self._inverse(m + self.eps * jnp.eye(u.shape[0], dtype=u.dtype)) @ debias(
            mean, self.b1, count
        )
        return (
            jnp.where(context.basis.live, u, 0),
            FullMatrixHessianState(count, estimates, mean, hessian),
        )

    @abc.abstractmethod
    def _estimate(self, old: jax.Array, z: jax.Array, hz: jax.Array) -> jax.Array:
        """The matrix ``(r, r)`` that enters the average."""

    @abc.abstractmethod
    def _inverse(self, matrix: jax.Array) -> jax.Array:
        """The inverse of a symmetric ``(r, r)``."""


@dataclasses.dataclass(frozen=True)
class FullMatrixHutchinsonAdam(_FullMatrixHessian):
    r"""Adam's momentum times the inverse of ``|H|``, ``H`` averaged from Hessian products.

    .. math:: A \leftarrow b_2 A + \tfrac{1-b_2}{2} Q^T (Hz\,z^T + z\,(Hz)^T) Q,\quad
              u' = |\hat A + \epsilon I|^{-1} \hat m

    ``A`` starts as the identity of the first basis. When the basis turns, it becomes
    ``C A C^T + s (I - C C^T)``, where ``s`` is the average eigenvalue outside the basis.
    Eigenvalues below ``1e-12`` of the largest are dropped; ``1e-8``, and ``1e-8`` of the largest,
    are added to the others.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.FullMatrixHutchinsonAdam(b2=0.0), jnp.array([0.0, 4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> z = jnp.array([0.0, 1.0])
      >>> context = lro.Context(g, basis, moved=jnp.array(True), probe=z, product=-2 * z)
      >>> u, _ = part.update(g, part.init(2, g.dtype), context)
      >>> print(u.round(3))                       # curvature -2 counts as 2
      [0. 2.]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the Hessian, in [0, 1), a measured product.
      eps: number added to the eigenvalues, in units of the curvature.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``; when an optimizer is built in
        which nothing measures products with probes.

    Cost: ``r² + r`` numbers; ``4 r³`` flops when the basis turns, and one ``eigh`` of size ``r`` a
    step, about ``9 r³`` flops.

    Source: the original LRE; Hutchinson's estimator as in Yao et al., "ADAHESSIAN", AAAI 2021.
    """

    def _estimate(self, old: jax.Array, z: jax.Array, hz: jax.Array) -> jax.Array:
        return linalg.symmetrize(jnp.outer(hz, z))

    def _inverse(self, matrix: jax.Array) -> jax.Array:
        return linalg.matrix_power(matrix, -1.0, abs=True)


@dataclasses.dataclass(frozen=True)
class FullMatrixBFGSAdam(_FullMatrixHessian):
    r"""Adam's momentum times the inverse of a BFGS matrix that is averaged in the basis.

    .. math:: B \leftarrow B + (1-b_2) \Bigl(\frac{y y^T}{y \cdot s}
              - \frac{B s\, s^T B}{s \cdot B s}\Bigr),\quad u' = (\hat B + \epsilon I)^{-1} \hat m

    with ``s = Q^T z`` and ``y = Q^T H z``. Pairs with ``s·y < 1e-16`` leave the matrix as it is.
    ``B`` starts as the identity of the first basis. When the basis turns, it becomes
    ``C B C^T + a (I - C C^T)``, where ``a`` is the average eigenvalue outside the basis.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, z = lro.inner.FullMatrixBFGSAdam(b2=0.0), jnp.array([1.0, 1.0])
      >>> y = jnp.array([2.0, 4.0])               # H z for H = diag(2, 4)
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(y, basis, moved=jnp.array(True), probe=z, product=y)
      >>> u, _ = part.update(y, part.init(2, y.dtype), context)
      >>> print(u.round(3))                       # B z = y, so that B^{-1} y = z
      [1. 1.]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the matrix, in [0, 1), a measured product.
      eps: number added to the eigenvalues, in units of the curvature.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``; when an optimizer is built in
        which nothing measures products with probes.

    Cost: ``r² + r`` numbers; ``4 r³`` flops when the basis turns, and one ``eigh`` of size ``r`` a
    step, about ``9 r³`` flops.

    Source: the original LRE; Fletcher, "Practical Methods of Optimization", 1987, for the update.
    """

    def _estimate(self, old: jax.Array, z: jax.Array, hz: jax.Array) -> jax.Array:
        bz, sy = old @ z, z @ hz
        new = (
            old
            + linalg.safe_divide(jnp.outer(hz, hz), sy)
            - linalg.safe_divide(jnp.outer(bz, bz), z @ bz)
        )
        return jnp.where(sy >= 1e-16, new, old)

    def _inverse(self, matrix: jax.Array) -> jax.Array:
        return linalg.matrix_power(matrix, -1.0, eig_tol=0.0, damping=0.0, rdamping=0.0)


def _averaged(
    old: Surrounded, estimate: jax.Array, context: Context, decay: float, square: bool = False
) -> Surrounded:
    """The average after a step, which changes it where the basis was updated.

    Outside it averages the mean eigenvalue there, or the mean square where estimates are squared.
    """
    outside = context.outside
    known = context.moved & (outside is not None and outside.probe > 0)
    seen = old.outside
    if outside is not None:
        seen = linalg.safe_divide(outside.product if square else outside.cross, outside.probe)
    return Surrounded(
        jnp.where(context.moved, ema(old.inside, estimate, decay), old.inside),
        jnp.where(known, ema(old.outside, seen, decay), old.outside),
    )


def _pair(context: Context) -> tuple[jax.Array, jax.Array]:
    """The probe and its product in the basis; the engine has refused parts that give none."""
    assert context.probe is not None and context.product is not None
    return context.probe, context.product
