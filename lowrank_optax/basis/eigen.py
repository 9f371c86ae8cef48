"""Bases of the leading eigenpairs of a running average or sum: exact, or with a random sketch."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import fix_size
from lowrank_optax._core.types import Eigenbasis
from lowrank_optax.basis._frame import Frame, FrameState, Seen, Turn


@dataclasses.dataclass(frozen=True)
class TruncatedEigen(Frame):
    """Brand's update of ``rank`` leading eigenpairs; how the small problem is solved is open.

    Args:
      beta: decay of the average per correction, in [0, 1), default 0.9; ``None`` sums instead. An
        average starts at zero and is divided by ``1 - beta^n`` to make up for that.
      count_columns: whether that ``n`` counts columns, as in the original LRE (the default), or
        corrections. For corrections of one column both are the same; for wider ones only the
        number of corrections makes the average exact.
      damp_first: whether a step's damping is added before the division by ``1 - beta^n``, as in the
        original (the default). The damping is then ``damping / (1 - beta^n)``, and the eigenvalues
        of the first correction get none. With ``False`` the divided eigenvalues are damped, those
        of the first correction included.
      eig_tol: share of the largest eigenvalue at or below which an eigenvalue is dropped, without
        unit, default 1e-4 as in the original. The first correction drops none; its eigenvalues lose
        their signs where ``abs`` or ``update_abs`` asks for it.
      update_damping: number added to the eigenvalues that a step reads, in units of the curvature,
        default 1e-4 as in the original (other bases: 0).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "initial", "outside"})

    beta: float | None = 0.9
    count_columns: bool = dataclasses.field(default=True, kw_only=True)
    damp_first: bool = dataclasses.field(default=True, kw_only=True)
    eig_tol: float = dataclasses.field(default=1e-4, kw_only=True)
    update_damping: float = dataclasses.field(default=1e-4, kw_only=True)

    @abc.abstractmethod
    def decompose(self, b: jax.Array, signed: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At least ``rank`` leading eigenvalues of ``b`` and eigenvectors as rows.

        ``b`` is what the curvature has beyond the ``gamma`` that is assumed outside.
        """

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, gain = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        old = (decay if seen.decays else 1.0) * jnp.concatenate(
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
        whole, kept = linalg.regularize(lam, some, abs=self.abs), self.stored.apply(lam, some)
        lam = jnp.where(seen.first, whole[0], kept[0])
        return Turn(jnp.where(jnp.where(seen.first, whole[1], kept[1])[:, None], z, 0), lam, memory)

    def measured(self, state: FrameState) -> jax.Array:
        return jax.vmap(self._debias)(state.lam, self._terms(state))

    def eigenbasis(self, state: FrameState) -> Eigenbasis:
        if not self.damp_first:
            return super().eigenbasis(state)

        def view(lam, terms, updates):
            first = jnp.abs(lam) if self.update_abs else lam
            used, live = self.used.apply(lam, lam != 0)
            used, live = jnp.where(updates > 1, used, first), jnp.where(updates > 1, live, lam != 0)
            return self._debias(used, terms), live

        return Eigenbasis(*jax.vmap(view)(state.lam, self._terms(state), state.updates))

    def _terms(self, state: FrameState) -> jax.Array:
        """The ``n`` of ``1 - beta^n``."""
        return state.columns if self.count_columns else state.updates

    def _debias(self, lam: jax.Array, terms: jax.Array) -> jax.Array:
        if self.beta is None:
            return lam
        return linalg.safe_divide(lam, 1 - jnp.asarray(self.beta, lam.dtype) ** terms)


def exact(b: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """All eigenvalues of ``b`` and eigenvectors as rows, the largest first; by size if signed."""
    return (linalg.eigh_by_size if signed else linalg.eigh)(b)


@dataclasses.dataclass(frozen=True)
class Eigen(TruncatedEigen):
    r"""The ``rank`` leading eigenpairs of ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``.

    ``B`` is truncated after every correction (Brand's update): with ``a = Q^T y`` and the residual
    ``rho = y - Q a``, ``[Q, rho/‖rho‖]`` is rotated by the eigenvectors of the small

    .. math:: \beta\,\mathrm{diag}(\lambda, \gamma) + (1-\beta)
              \begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}
              \begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}^T

    where ``gamma`` is the curvature assumed outside the basis: zero, except for quasi-Newton
    curvatures. A direction that is dropped gets ``gamma`` again. So the eigenpairs that stay are
    those with the largest ``|lam - gamma|``, in that order. The stored rows are rotated once every
    ``buffer`` columns, see `Frame`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.Eigen(4), lro.inner.LInv())
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([3., 4., 0.]), state)
      >>> print((updates * 25).round())        # g / ‖g‖², as if the average were complete
      [3. 4. 0.]

    Args:
      rank: number ``r`` of eigenpairs that are kept, at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.9; ``None`` sums instead.
      buffer: number of columns between two rotations of the rows, default ``max(8, rank // 3)``;
        ``m = r + buffer``.

    The remaining keywords are those of `TruncatedEigen` and of `Regularized`.

    Raises:
      ValueError: for a rank or buffer below 1, or a ``beta`` or tolerance out of range.

    Cost: memory ``m d + m² + r m``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of
    size ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.
    """

    def decompose(self, b: jax.Array, signed: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return exact(b, signed)


@dataclasses.dataclass(frozen=True)
class RandomizedEigen(TruncatedEigen):
    r"""`Eigen` whose small eigenproblem is solved by a randomised range finder.

    Of the ``(r + k, r + k)`` matrix ``B`` in the coordinates ``[Q, rho/‖rho‖]`` a Gaussian
    ``Omega`` takes ``l = r + oversample`` samples:

    .. math:: V = \mathrm{orth}(B^{1+q}\,\Omega), \qquad V^T B V = Z \Lambda Z^T, \qquad
              Q \leftarrow V Z

    The expected error is the optimal one times ``(1 + r/(oversample - 1))^{1/2}``, and comes closer
    to the optimal one with every power iteration. A correction of at most ``oversample`` columns is
    solved exactly, because there is nothing to save.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.RandomizedEigen(20, buffer=40)      # for 40 examples a step
      >>> tx = lro.lre(1.0, lro.curvature.EmpiricalFisher(), basis)
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000))
      >>> print(lro.diagnose.find(state).basis.rows[0].shape)   # m = 20 + 40 rows; eigh of size 25
      (60, 1000)

    Args:
      rank: number ``r`` of eigenpairs that are kept, at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.9; ``None`` sums instead.
      oversample: number of samples beyond the rank, at least 0, default 5.
      power_iterations: number ``q`` of further products with ``B``, which sharpen the spectrum; at
        least 0, default 1.

    The remaining keywords are those of `Frame`, `TruncatedEigen` and `Regularized`.

    Raises:
      ValueError: as `Eigen`, and for a negative number of samples or iterations.

    Cost: that of `Eigen`, with ``eigh`` of size ``min(r + oversample, r + k)`` and
    ``(2 q + 4) (r + k)² l`` flops for the range.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.
    """

    oversample: int = dataclasses.field(default=5, kw_only=True)
    power_iterations: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        fix_size(self, "oversample", 0)
        fix_size(self, "power_iterations", 0)

    def decompose(self, b: jax.Array, signed: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        size, samples = b.shape[0], self.rank + self.oversample
        if samples >= size:
            return exact(b, signed)
        v = jax.random.normal(key, (size, samples), b.dtype)
        for _ in range(1 + self.power_iterations):
            # QR by Householder reflections: B is singular while slots are dead, and B is small.
            v = linalg.qr(b @ v)
        lam, z = exact(linalg.symmetrize(v.T @ b @ v), signed)
        return lam, z @ v.T
