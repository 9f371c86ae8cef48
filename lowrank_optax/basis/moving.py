"""Bases that turn towards every new column a little: OPAST, GROUSE, HistoryPCA."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_least
from lowrank_optax.basis._average import Average
from lowrank_optax.basis._frame import Seen, Turn


@dataclasses.dataclass(frozen=True)
class MovingSubspace(Average):
    r"""A subspace that follows a stream, and the stream's moments inside it.

    While slots are dead, new directions take them. Then the rows are rotated so that the moments
    ``Q^T B Q <- beta diag(lam) + (1 - beta) sum_j w_j a_j a_j^T`` are diagonal. That leaves the
    subspace as it is and gives ``lam``. Last, `move` turns the subspace.
    """

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        rows = seen.seated(self.rank)
        a = rows @ x
        moments = jnp.diag(decay * lam[: self.rank]) + a @ a.T
        lam, v = linalg.eigh(linalg.symmetrize(moments))
        lam, live = self.stored.apply(lam, lam > 0)
        v = jnp.where(live[:, None], v, 0)
        z, memory = self.move(memory, v, v @ rows, x, lam, seen.columns)
        # Directions of the method's own are in use, but have no curvature: theirs is tiny, not 0.
        own = jnp.where(jnp.any(z[self.rank :] != 0, axis=1), jnp.finfo(lam.dtype).tiny, 0)
        return Turn(z, jnp.concatenate([lam, own]), memory)

    @abc.abstractmethod
    def move(
        self,
        memory: Any,
        v: jax.Array,
        rows: jax.Array,
        x: jax.Array,
        lam: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """The subspace turned towards columns: orthonormal rows ``(slots, slots + k)``.

        Args:
          memory: the method's memory.
          v: rotation ``(r, r)`` of the old slots into ``rows``; a slot that was dead has none.
          rows: the basis ``(r, slots + k)`` in the coordinates ``[Q, fresh]``.
          x: the columns ``(slots + k, k)``, scaled by the roots of their shares of the moments.
          lam: the moments ``(r,)`` along ``rows``.
          count: number of columns absorbed before.

        Returns:
          The rows and the method's memory after the columns.
        """


@dataclasses.dataclass(frozen=True)
class OPAST(MovingSubspace):
    r"""Orthonormal projection approximation subspace tracking: recursive least squares for ``Q``.

    With ``a = Q^T y`` and ``rho = y - Q a``, the least squares problem ``min_W E‖y - W a‖²`` gives

    .. math:: S^{-1} \leftarrow \beta S^{-1} + (1 - \beta) a a^T, \quad
              g = (1 - \beta)\, S a, \quad Q \leftarrow \mathrm{polar}(Q + \rho g^T)

    The gain ``g`` takes the new ``S``. Its factor ``1 - beta`` is the column's share of the
    average; the sum of ``beta=None`` has no such factor.

    The rows are kept in coordinates in which ``S = diag(1 / lam)`` is diagonal. So ``S`` is
    symmetric by construction, and its ``lam`` are the eigenvalues. This is also PETRELS made
    orthonormal, as long as every coordinate is seen. For missing coordinates every one of them
    needs an ``S`` of its own, which a basis with a single small ``T`` cannot hold: use
    `lowrank_optax.online.trackers.PETRELS`, or give masked blocks ``groups`` of their own.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.OPAST(20))
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000))
      >>> print(lro.diagnose.find(state).basis.rows[0].shape)   # 20 directions and 8 columns
      (28, 1000)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments per correction, in [0, 1), default 0.99; ``None`` never forgets.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.
      eig_tol: share of the largest moment at or below which a direction is given up for a new one,
        without unit, default 1e-5.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, or corrections with
        weights of both signs.

    Cost: memory ``m d + m²``, ``m = r + buffer``; a step two passes over the rows (``4 m d``
    flops), ``eigh`` of size ``r``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Abed-Meraim, Chkeif and Hua, "Fast orthonormal PAST algorithm", IEEE Signal Processing
    Letters 2000; Chi, Eldar and Calderbank, "PETRELS", IEEE Transactions on Signal Processing 2013.
    """

    def move(self, memory, v, rows, x, lam, count):
        a = rows @ x
        return linalg.lean(
            rows, linalg.safe_divide(a, lam[:, None]), x - rows.T @ a, jnp.arctan
        ), memory


@dataclasses.dataclass(frozen=True)
class GROUSE(MovingSubspace):
    r"""Grassmannian rank-one update subspace estimation: geodesic steps towards every column.

    With ``a = Q^T y`` and ``rho = y - Q a``, ``Q`` turns in the plane of ``Q a`` and ``rho`` by

    .. math:: \theta = \eta\, \frac{(1 - \beta)\,‖a‖\,‖\rho‖}{\lambda_{max}}

    the angle of steepest descent on ``‖y - Q Q^T y‖²``. Several columns at once turn ``Q`` along
    the geodesic of the sum of their gradients. The step is relative to the moments: with
    ``beta=None`` these are a sum, and the step falls like ``1/t``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GROUSE(20, learning_rate=4.0, buffer=10))
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000))
      >>> print(lro.diagnose.find(state).basis.rows[0].shape)   # 20 directions and 10 columns
      (30, 1000)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments per correction, in [0, 1), default 0.99; ``None`` sums.
      learning_rate: step ``eta``, without unit, above 0, default 8. It has to exceed about half the
        ratio of the largest eigenvalue to the smallest one that is to be told from the rest.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: as `OPAST`, and for a learning rate that is not positive.

    Cost: that of `OPAST`.

    Source: Balzano, Nowak and Recht, "Online identification and tracking of subspaces from highly
    incomplete information", Allerton 2010.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        super().__post_init__()
        check_least("GROUSE", "learning_rate", self.learning_rate, strict=True)

    def move(self, memory, v, rows, x, lam, count):
        a = rows @ x
        g = linalg.safe_divide(self.learning_rate * a, jnp.max(lam))
        # A geodesic beyond a quarter turn leads back.
        return linalg.lean(rows, g, x - rows.T @ a, lambda s: jnp.minimum(s, jnp.pi / 4)), memory


@dataclasses.dataclass(frozen=True)
class HistoryPCA(Average):
    r"""History PCA: power iterations on the new columns and on what is kept of the old ones.

    .. math:: S = B Q, \quad B = \beta Q_0 \Lambda_0 Q_0^T + (1 - \beta) \sum_j w_j y_j y_j^T,
              \quad Q \leftarrow \mathrm{orth}(S), \quad \lambda_j = ‖s_j‖

    from the ``Q_0`` and ``Lambda_0`` before the correction. Everything happens in the coordinates
    ``[Q_0, rho/‖rho‖]``, so that an iteration costs nothing in ``d``. One iteration gives the
    subspace of `OPAST`; infinitely many give the update of `Eigen`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.HistoryPCA(20, iterations=2))
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000))
      >>> print(lro.diagnose.find(state).basis.rows[0].shape)   # 20 directions and 8 columns
      (28, 1000)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the history per correction, in [0, 1), default 0.99; ``None`` never forgets.
      iterations: number of power iterations per correction, at least 1, default 3.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: as `OPAST`, and for a number of iterations below 1.

    Cost: that of `OPAST` without its ``eigh``, and ``2 (r + k)² r`` flops an iteration.

    Source: Yang, Hsieh and Wang, "History PCA: a new algorithm for streaming PCA", 2018.
    """

    iterations: int = dataclasses.field(default=3, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_count("HistoryPCA", "iterations", self.iterations)

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        b = jnp.diag(decay * jnp.pad(lam, (0, x.shape[1]))) + x @ x.T
        z = s = seen.seated(self.rank)
        for _ in range(self.iterations):
            s = z @ b
            z = linalg.orthonormalize_rows(s)
        size = jnp.linalg.norm(s, axis=1)
        order = jnp.argsort(-size)
        lam, live = self.stored.apply(size[order], size[order] > 0)
        return Turn(jnp.where(live[:, None], z[order], 0), lam, memory)
