"""Eigen: the leading eigenpairs of a running average or sum."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay
from lowrank_optax._core.types import Eigenbasis
from lowrank_optax.basis._frame import Frame, FrameState, Seen, Turn


@dataclasses.dataclass(frozen=True)
class Eigen(Frame):
    r"""The ``rank`` leading eigenpairs of ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``.

    ``B`` is truncated after every correction (Brand's update): with ``a = Q^T y`` and the residual
    ``rho = y - Q a``, ``[Q, rho/‖rho‖]`` is rotated by the eigenvectors of the small

    .. math:: \beta\,\mathrm{diag}(\lambda, \gamma) + (1-\beta)
              \begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}
              \begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}^T

    where ``gamma`` is the curvature assumed outside the basis, zero but for quasi-Newton ones. A
    direction that is dropped goes back to ``gamma``, so the eigenpairs with the largest
    ``|lam - gamma|`` stay, in that order. The rows themselves are rotated once in ``buffer``
    columns, see `Frame`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.Eigen(4), lro.inner.LInv())
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([3., 4., 0.]), state)
      >>> print((updates * 25).round())        # g / ‖g‖²: the average is corrected for its start
      [3. 4. 0.]

    Args:
      rank: how many eigenpairs are kept, ``r``.
      beta: decay of the average; ``None`` sums instead. Averages are corrected for their start by
        ``1 - beta^n``.
      count_columns: whether ``n`` counts columns, as in the original, or corrections. For one
        column at a time these agree; for several only the latter is exact.
      buffer: columns between two rotations, by default ``max(8, rank // 3)``; ``m = r + buffer``.
      damp_first: whether the step's damping comes before the correction for the start, as in the
        original, which makes it ``damping / (1 - beta^n)`` and leaves the first correction's
        eigenvalues without. ``False`` damps what was corrected, from the first correction on.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped, but for the first correction's,
        which do lose their signs where ``abs`` or ``update_abs`` asks for it.
      update_damping: added to the eigenvalues for the step alone. For the others see `GGT`.

    Raises:
      ValueError: for a rank or buffer below 1, or a ``beta`` or tolerance out of range.

    Cost: memory ``m d + m² + r m``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of
    size ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "initial"})

    beta: float | None = 0.9
    count_columns: bool = dataclasses.field(default=True, kw_only=True)
    damp_first: bool = dataclasses.field(default=True, kw_only=True)
    eig_tol: float = dataclasses.field(default=1e-4, kw_only=True)
    update_damping: float = dataclasses.field(default=1e-4, kw_only=True)

    def __post_init__(self):
        Frame.__post_init__(self)
        if self.beta is not None:
            check_decay("Eigen", "beta", self.beta)

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, gain = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        old = (decay if seen.start else 1.0) * jnp.concatenate(
            [lam, jnp.where(seen.fresh, seen.initial, 0)]
        )
        b = jnp.diag(old) + gain * (seen.y * seen.weights[None]) @ seen.y.T
        # A direction that is dropped goes back to gamma, so what is lost with it is lam - gamma.
        gamma = jnp.where(jnp.concatenate([seen.live, seen.fresh]), seen.initial, 0)
        beyond, z = self.decompose(linalg.symmetrize(b - jnp.diag(gamma)), signed, seen.key)
        beyond, z = beyond[: self.rank], z[: self.rank]
        some = linalg.regularize(beyond, beyond != 0)[1]
        lam = jnp.where(some, beyond + seen.initial, 0)
        some = some & ((lam != 0) if signed else (lam > 0))
        whole, kept = linalg.regularize(lam, some, abs=self.abs), self.stored(lam, some)
        lam = jnp.where(seen.first, whole[0], kept[0])
        return Turn(jnp.where(jnp.where(seen.first, whole[1], kept[1])[:, None], z, 0), lam, memory)

    def decompose(self, b: jax.Array, signed: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At least ``rank`` leading eigenvalues of ``b`` and eigenvectors as rows.

        ``b`` is what the curvature has beyond the ``gamma`` that is assumed outside.
        """
        return (linalg.eigh_by_size if signed else linalg.eigh)(b)

    def measured(self, state: FrameState) -> jax.Array:
        return jax.vmap(self._debias)(state.lam, self._terms(state))

    def eigenbasis(self, state: FrameState) -> Eigenbasis:
        if not self.damp_first:
            return super().eigenbasis(state)

        def view(lam, terms, updates):
            first = jnp.abs(lam) if self.update_abs else lam
            used, live = self.used(lam)
            used, live = jnp.where(updates > 1, used, first), jnp.where(updates > 1, live, lam != 0)
            return self._debias(used, terms), live

        return Eigenbasis(*jax.vmap(view)(state.lam, self._terms(state), state.updates))

    def _terms(self, state: FrameState) -> jax.Array:
        """The ``n`` of the start's correction."""
        return state.columns if self.count_columns else state.updates

    def _debias(self, lam: jax.Array, terms: jax.Array) -> jax.Array:
        if self.beta is None:
            return lam
        return linalg.safe_divide(lam, 1 - jnp.asarray(self.beta, lam.dtype) ** terms)
