"""Inner parts that carry averages of the curvature itself, from products with probes.

They read ``z = Q^T z`` and ``Q^T H z`` of the step's `Context`; on a step that measured no product
the averages stay as they are. A random probe is one that the basis has not absorbed (see
`Probing`), so that estimates are right in the basis as it is now.

An average has no entry for a direction that enters the basis, and with zero for it the step along
that direction would be far too long. So the same statistic is averaged over all that lies outside
the basis, one scalar, and a direction that enters brings it along: the average moves as that of
``Q M Q^T + s (I - Q Q^T)``. With a probe that is not random nothing is known outside, and ``s``
is 0.
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
from lowrank_optax.inner.adaptive import check_moments, debias, ema, identity_at_first


class Surrounded(NamedTuple):
    """An average inside the basis, and the scalar that stands for it outside.

    Attributes:
      inside: ``(r,)`` or ``(r, r)``.
      outside: what directions bring along that enter the basis.
    """

    inside: jax.Array
    outside: jax.Array


class HutchinsonAdamState(NamedTuple):
    """State of `HutchinsonAdam`.

    Attributes:
      count: steps.
      estimates: how many of them measured a product.
      mean: ``(r,)`` average of the gradients.
      diagonal: average of the diagonal's estimates, or of their squares.
    """

    count: jax.Array
    estimates: jax.Array
    mean: jax.Array
    diagonal: Surrounded


@dataclasses.dataclass(frozen=True)
class HutchinsonAdam:
    r"""Adam's momentum over a Hutchinson estimate of the Hessian's diagonal in the basis.

    With ``v = (Q^T z)∘(Q^T H z)``, of which the mean over probes is ``diag(Q^T H Q)``,

    .. math:: u = \hat m / (\sqrt{\hat D} + \epsilon),\quad D \leftarrow b_2 D + (1-b_2) v^2

    or, where ``gamma`` is given,

    .. math:: u = m / \max(\gamma h, \epsilon),\quad h \leftarrow b_2 h + (1-b_2) v

    ``D`` and ``h`` move as ``diag(C diag(h) C^T + s (I - C C^T))``, where ``s`` is the average over
    what lies outside the basis: of the mean square eigenvalue there for ``D``, of the mean one for
    ``h``. Coordinates of a random probe in a basis are nearly normal, ``E[v²] = 3 λ²`` along an
    eigenvector, so ``sqrt(D)`` settles at ``1.7 |λ|``. Two published methods, in the coordinates of
    the basis:

    * AdaHessian (without its spatial averages, which a basis has no use for):
      ``HutchinsonAdam(b2=0.999)``.
    * Sophia-H: ``HutchinsonAdam(b1=0.965, eps=1e-12, gamma=0.01, debias=False)``, then
      ``ClipValue(1.0)``.

    Until the first product is measured the first form returns zeros, as it does where the
    denominator is zero. The second form is then infinite, for `ClipValue` to cut, but zero where
    ``m`` is: without ``eps``, too, slots that nothing has reached stand still.

    Args:
      b1: decay of the mean.
      b2: decay of the estimates, a measured product.
      eps: added to the root, or the least denominator; in units of the curvature.
      gamma: ``None`` for the root of averaged squares, a number for Sophia's denominator.
      debias: correct the averages for their start at zero, the mean after its steps and the
        estimates after their own number. Sophia's paper does not.

    Raises:
      ValueError: for decays outside [0, 1), a negative ``eps`` or a ``gamma`` that is not positive;
        when built into a product without products with probes.

    Cost: ``2 r`` numbers and ``4 r²`` flops; the engine projects ``z`` and ``H z`` in one pass over
    the rows on the steps that measure them.

    Source: Yao et al., "ADAHESSIAN", AAAI 2021; Liu et al., "Sophia: A Scalable Stochastic
    Second-order Optimizer for Language Model Pre-training", 2023.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    gamma: float | None = None
    debias: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def __post_init__(self):
        check_moments(self)
        if self.gamma is not None:
            check_least("HutchinsonAdam", "gamma", self.gamma, strict=True)

    def init(self, rank: int, dtype: Any) -> HutchinsonAdamState:
        zero = jnp.zeros((), jnp.int32)
        diagonal = Surrounded(jnp.zeros(rank, dtype), jnp.zeros((), dtype))
        return HutchinsonAdamState(zero, zero, jnp.zeros(rank, dtype), diagonal)

    @property
    def laws(self) -> HutchinsonAdamState:
        return HutchinsonAdamState._make((SCALAR, SCALAR, VECTOR, SURROUNDED_DIAGONAL))

    def update(self, u: jax.Array, state: HutchinsonAdamState, context: Context):
        count = linalg.tally(state.count)
        estimates = linalg.tally(state.estimates, context.moved)
        z, hz = _pair(context)
        v = z * hz
        v = v * v if self.gamma is None else v
        diagonal = _averaged(state.diagonal, v, context, self.b2, square=self.gamma is None)
        mean = ema(state.mean, u, self.b1)
        new = HutchinsonAdamState(count, estimates, mean, diagonal)
        diagonal = diagonal.inside
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
      estimates: how many of them measured a product.
      mean: ``(r,)`` average of the gradients.
      hessian: average of the Hessian's estimates.
    """

    count: jax.Array
    estimates: jax.Array
    mean: jax.Array
    hessian: Surrounded


@dataclasses.dataclass(frozen=True)
class _FullMatrixHessian(abc.ABC):
    """What the two below share: Adam's momentum, an average matrix from the identity, its law."""

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
        """What the average takes in, ``(r, r)``."""

    @abc.abstractmethod
    def _inverse(self, matrix: jax.Array) -> jax.Array:
        """The inverse of a symmetric ``(r, r)``."""


@dataclasses.dataclass(frozen=True)
class FullMatrixHutchinsonAdam(_FullMatrixHessian):
    r"""Adam's momentum times the inverse of ``|H|``, ``H`` averaged from Hessian products.

    .. math:: H \leftarrow b_2 H + \tfrac{1-b_2}{2} Q^T (Hz\,z^T + z\,(Hz)^T) Q,\quad
              u = |\hat H + \epsilon I|^{-1} \hat m

    ``H`` starts as the identity of the first basis and moves as ``C H C^T + s (I - C C^T)``, with
    the mean eigenvalue ``s`` outside the basis. Eigenvalues below
    ``1e-12`` of the largest are dropped; the others get ``1e-8`` and ``1e-8`` of the largest added.

    Args:
      b1: decay of the mean.
      b2: decay of the Hessian, a measured product.
      eps: added to the eigenvalues, in units of the curvature.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``; when built into a product without
        products with probes.

    Cost: ``r²`` numbers; one ``eigh`` of size ``r`` a step, about ``9 r³`` flops.

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
              - \frac{B s\, s^T B}{s \cdot B s}\Bigr),\quad u = (\hat B + \epsilon I)^{-1} \hat m

    with ``s = Q^T z`` and ``y = Q^T H z``; pairs with ``s·y < 1e-16`` leave the matrix as it is.
    ``B`` starts as the identity of the first basis and moves as ``C B C^T + s (I - C C^T)``, with
    the mean eigenvalue ``s`` outside the basis.

    Args:
      b1: decay of the mean.
      b2: decay of the matrix, a measured product.
      eps: added to the eigenvalues, in units of the curvature.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``; when built into a product without
        products with probes.

    Cost: ``r²`` numbers; one ``eigh`` of size ``r`` a step, about ``9 r³`` flops.

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
    """The average after an update of the basis.

    Outside it takes in the mean eigenvalue there or, where estimates are squared, the mean square.
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
    """The probe and its product in the basis, which the engine has made sure are there."""
    assert context.probe is not None and context.product is not None
    return context.probe, context.product
