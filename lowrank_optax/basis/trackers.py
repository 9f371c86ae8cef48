"""Bases that turn towards every new column a little: OPAST, GROUSE."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least
from lowrank_optax.basis._average import Average
from lowrank_optax.basis._frame import Seen, Turn


@dataclasses.dataclass(frozen=True)
class Tracker(Average):
    r"""A subspace that follows a stream, and the stream's moments inside it.

    While slots are dead, new directions take them. Then the rows are rotated so that the moments
    ``Q^T B Q <- beta diag(lam) + (1 - beta) sum_j w_j a_j a_j^T`` are diagonal, which leaves the
    subspace as it is and gives ``lam``; and `move` turns the subspace.
    """

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        rows = seen.seated(self.rank)
        a = rows @ x
        moments = jnp.diag(decay * lam[: self.rank]) + a @ a.T
        lam, v = linalg.eigh(linalg.symmetrize(moments))
        lam, live = self.stored(lam, lam > 0)
        v = jnp.where(live[:, None], v, 0)
        z, memory = self.move(memory, v, v @ rows, x, lam, seen.columns)
        # What a method keeps for itself is in use, but has no curvature.
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
          v: ``(r, r)`` the rotation of the old slots into ``rows``, where they had any.
          rows: ``(r, slots + k)`` the basis in the coordinates ``[Q, fresh]``.
          x: ``(slots + k, k)`` the columns, scaled by the roots of their shares of the moments.
          lam: ``(r,)`` the moments along ``rows``.
          count: columns absorbed before.
        """


@dataclasses.dataclass(frozen=True)
class OPAST(Tracker):
    r"""Orthonormal projection approximation subspace tracking: recursive least squares for ``Q``.

    With ``a = Q^T y`` and ``rho = y - Q a``, the least squares problem ``min_W E‖y - W a‖²`` gives

    .. math:: S^{-1} \leftarrow \beta S^{-1} + (1 - \beta) a a^T, \quad
              g = (1 - \beta)\, S a, \quad Q \leftarrow \mathrm{polar}(Q + \rho g^T)

    The gain ``g`` takes the new ``S``. Its factor is the column's share of the average; the sum of
    ``beta=None`` has none.

    In the coordinates in which ``S`` is diagonal, which `Tracker` keeps, ``S = diag(1 / lam)``: it
    is symmetric by construction, and its ``lam`` are the eigenvalues. With every coordinate
    seen this is also PETRELS made orthonormal; coordinates that are missing would need one ``S``
    for every mask, hence one ``T`` for every block of coordinates, which a basis with a single
    small ``T`` cannot hold: `lowrank_optax.online.trackers.PETRELS` keeps one for every
    coordinate. Give masked blocks ``groups`` of their own.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.OPAST(20))

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments; ``None`` never forgets.
      buffer: columns between two rotations, see `Frame`.
      eig_tol: directions whose moments fall below ``eig_tol * max`` are given up for new ones. For
        the others see `GGT`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, or corrections with
        weights of both signs.

    Cost: memory ``m d + m²``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of size
    ``r``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Abed-Meraim, Chkeif and Hua, "Fast orthonormal PAST algorithm", IEEE Signal Processing
    Letters 2000; Chi, Eldar and Calderbank, "PETRELS", IEEE Transactions on Signal Processing 2013.
    """

    def move(self, memory, v, rows, x, lam, count):
        a = rows @ x
        return linalg.lean(
            rows, linalg.safe_divide(a, lam[:, None]), x - rows.T @ a, jnp.arctan
        ), memory


@dataclasses.dataclass(frozen=True)
class GROUSE(Tracker):
    r"""Grassmannian rank-one update subspace estimation: geodesic steps towards every column.

    With ``a = Q^T y`` and ``rho = y - Q a``, ``Q`` turns in the plane of ``Q a`` and ``rho`` by

    .. math:: \theta = \eta\, \frac{(1 - \beta)\,‖a‖\,‖\rho‖}{\lambda_{max}}

    the angle of steepest descent on ``‖y - Q Q^T y‖²``; several columns at once turn along the
    geodesic of the sum of their gradients. The step is relative to the moments: with ``beta=None``
    these are a sum, and it falls like ``1/t``.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GROUSE(20))

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments; ``None`` sums.
      learning_rate: ``eta``, without unit. It has to exceed about half the ratio of the largest to
        the smallest eigenvalue that is to be told from the rest.
      buffer: columns between two rotations, see `Frame`. For the others see `OPAST`.

    Raises:
      ValueError: as `OPAST`, and for a learning rate that is not positive.

    Cost: that of `OPAST`.

    Source: Balzano, Nowak and Recht, "Online identification and tracking of subspaces from highly
    incomplete information", Allerton 2010.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        Tracker.__post_init__(self)
        check_least("GROUSE", "learning_rate", self.learning_rate, strict=True)

    def move(self, memory, v, rows, x, lam, count):
        a = rows @ x
        g = linalg.safe_divide(self.learning_rate * a, jnp.max(lam))
        # A geodesic beyond a quarter turn leads back.
        return linalg.lean(rows, g, x - rows.T @ a, lambda s: jnp.minimum(s, jnp.pi / 4)), memory
