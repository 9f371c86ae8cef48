"""Trackers that are bases of the engine, on one group: `lowrank_optax.basis` says how they work."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import basis
from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count
from lowrank_optax._core.layout import Layout, cast_like
from lowrank_optax._core.types import Columns, SymmetricCorrection
from lowrank_optax.basis._average import Average
from lowrank_optax.basis._frame import Seen, Turn
from lowrank_optax.online.operator import Operator
from lowrank_optax.online.trackers._tracker import Tracker, TrackerState


@dataclasses.dataclass(frozen=True)
class OnBasis(Tracker):
    """A tracker that is a `basis.Frame`; ``k`` vectors are one correction of ``k`` columns.

    A basis over an average, with a ``beta``, gets the mean of the ``k``. With ``buffer`` below
    ``k`` they come in chunks of that size.
    """

    beta: float | None = None
    buffer: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        Tracker.__post_init__(self)
        _ = self.basis  # which checks the other values

    @property
    @abc.abstractmethod
    def basis(self) -> Any:
        """The basis."""

    def operator(self, state: TrackerState) -> Operator:
        layout, kept = state.layout, self.basis
        pick = jnp.eye(self.rank, kept.rank, dtype=layout.dtype)
        rows = kept.unproject(layout, state.memory, pick[None])
        lam = kept.measured(state.memory)[0, : self.rank]
        lam = lam / jnp.maximum(state.seen, 1) if self.beta is None else lam
        rows = cast_like(rows, layout.stored(state.memory.rows))
        return Operator(layout.tree(rows), jnp.diag(lam), layout.gram(rows)[0], layout)

    def _fresh(self, layout: Layout, key: jax.Array) -> Any:
        return self.basis.init(layout, key)

    def _resumed(self, state: TrackerState, rows: Columns, lam: jax.Array, count: jax.Array) -> Any:
        n = min(lam.shape[0], self.basis.rank)
        share = count
        if self.beta is not None:  # what an average of so many holds before its start's correction
            share = (1 - jnp.asarray(self.beta, lam.dtype) ** count) / (1 - self.beta)
        memory = self._absorb(state, [c[:n] for c in rows], share * lam[:n]).state
        counts = jnp.broadcast_to(count, memory.updates.shape)
        return memory._replace(updates=counts, columns=counts)

    def _take(
        self, state: TrackerState, columns: Columns, fine: jax.Array, *others: Columns
    ) -> tuple[Any, jax.Array]:
        weights = fine.astype(state.layout.dtype)
        if self.beta is not None:
            weights = weights / jnp.maximum(jnp.sum(weights), 1)
        done = self._absorb(state, columns, weights)
        return done.state, fine & ~done.failed[0]

    def _absorb(self, state: TrackerState, columns: Columns, weights: jax.Array) -> Any:
        given = SymmetricCorrection(columns, weights[None])
        key = jax.random.fold_in(state.key, state.seen)
        accept = jnp.any(weights != 0)[None]
        return self.basis.absorb(state.layout, state.memory, given, accept, key)


@dataclasses.dataclass(frozen=True)
class Oja(OnBasis):
    r"""Oja's rule, ``A <- orth(A + eta (A v) v^T)``: `basis.Hebbian` with its `GradientRule`.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments that scale the step; ``None`` sums, and steps fall like ``1/t``.
      learning_rate: ``eta``, without unit, relative to those moments. It has to exceed about half
        the ratio of the largest to the smallest eigenvalue that is to be told from the rest.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``m d``, ``m = r + max(8, r // 3)``; ``4 m d`` flops a vector and amortised
    rotations, see `basis.Hebbian`.

    Source: Oja, "Simplified neuron model as a principal component analyzer", Journal of
    Mathematical Biology 1982.
    """

    learning_rate: float = 8.0

    @property
    def basis(self) -> basis.Hebbian:
        return basis.Hebbian(
            self.rank, self.beta, basis.GradientRule(self.learning_rate), buffer=self.buffer
        )


@dataclasses.dataclass(frozen=True)
class Krasulina(OnBasis):
    r"""Krasulina's rule for subspaces, ``A <- orth(A + eta (A v) (v - A^T A v)^T)``.

    It moves along the gradient's tangent only: `basis.Hebbian` with its `StiefelRule`, whose rows
    span the same as those of any other orthonormalisation.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: as in `Oja`.
      learning_rate: as in `Oja`.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: as `Oja`.

    Cost: that of `Oja`.

    Source: Krasulina, "The method of stochastic approximation for the determination of the least
    eigenvalue of a symmetrical matrix", 1969; Tang, "Exponentially convergent stochastic k-PCA
    without variance reduction", NeurIPS 2019.
    """

    learning_rate: float = 8.0

    @property
    def basis(self) -> basis.Hebbian:
        return basis.Hebbian(
            self.rank, self.beta, basis.StiefelRule(self.learning_rate), buffer=self.buffer
        )


@dataclasses.dataclass(frozen=True)
class AdaptiveRule(basis.Rule):
    """Oja's rule with a step ``1 / b_i`` for every row; see `AdaOja`. Remembers the ``b_i²``.

    As in `basis.GradientRule`, the rows of ``A + diag(1/b) a x^T`` span the same as those of
    ``A + g rho^T`` with ``g = (I + diag(1/b) a a^T)^{-1} diag(1/b) a``.
    """

    def init(self, rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros(rank, dtype)

    def step(self, memory, v, rows, x, lam, count):
        a = rows @ x
        # Squares of gradients move with the rows like any second moment.
        squares = (v * v) @ memory + jnp.sum((a @ x.T) ** 2, axis=1)
        step = linalg.safe_divide(a, jnp.sqrt(squares)[:, None])
        g = step @ linalg.inv(jnp.eye(x.shape[1], dtype=x.dtype) + a.T @ step)
        return linalg.lean(rows, g, x - rows.T @ a, jnp.arctan), squares


@dataclasses.dataclass(frozen=True)
class AdaOja(OnBasis):
    r"""Oja's rule with AdaGrad's step, one number for every row; nothing is left to tune.

    .. math:: G = (A v) v^T, \quad b_i^2 \leftarrow b_i^2 + ‖G_i‖^2, \quad
              A \leftarrow \mathrm{orth}(A + \mathrm{diag}(b)^{-1} G)

    Rows are kept in the order of their moments, and their ``b`` move with them.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments, for the eigenvalues alone; steps fall in any case.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `Oja`.

    Source: Henriksen and Ward, "AdaOja: adaptive learning rates for streaming PCA", 2019.
    """

    @property
    def basis(self) -> basis.Hebbian:
        return basis.Hebbian(self.rank, self.beta, AdaptiveRule(), buffer=self.buffer)

    def _resumed(self, state: TrackerState, rows: Columns, lam: jax.Array, count: jax.Array) -> Any:
        memory = super()._resumed(state, rows, lam, count)
        # What count vectors without energy outside had about summed up to.
        squares = (
            count * jnp.sum(lam) * jnp.pad(lam[: self.rank], (0, max(0, self.rank - len(lam))))
        )
        return memory._replace(memory=squares[None])


@dataclasses.dataclass(frozen=True)
class OPAST(OnBasis):
    """Orthonormal projection approximation subspace tracking: `basis.OPAST`.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments; ``None`` never forgets.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `Oja`.

    Source: Abed-Meraim, Chkeif and Hua, "Fast orthonormal PAST algorithm", IEEE Signal Processing
    Letters 2000.
    """

    @property
    def basis(self) -> basis.OPAST:
        return basis.OPAST(self.rank, self.beta, buffer=self.buffer)


@dataclasses.dataclass(frozen=True)
class GROUSE(OnBasis):
    """Grassmannian rank-one steps: `basis.GROUSE`. For missing entries see `PETRELS`.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments that scale the step; ``None`` sums, and steps fall like ``1/t``.
      learning_rate: as in `Oja`.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `Oja`.

    Source: Balzano, Nowak and Recht, "Online identification and tracking of subspaces from highly
    incomplete information", Allerton 2010.
    """

    learning_rate: float = 8.0

    @property
    def basis(self) -> basis.GROUSE:
        return basis.GROUSE(self.rank, self.beta, self.learning_rate, buffer=self.buffer)


@dataclasses.dataclass(frozen=True)
class HistoryBasis(Average):
    """Power iterations on the average itself, in the coordinates ``[Q, fresh]``: `HistoryPCA`."""

    iterations: int = dataclasses.field(default=3, kw_only=True)

    def __post_init__(self):
        Average.__post_init__(self)
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
        lam, live = self.stored(size[order], size[order] > 0)
        return Turn(jnp.where(live[:, None], z[order], 0), lam, memory)


@dataclasses.dataclass(frozen=True)
class HistoryPCA(OnBasis):
    r"""History PCA: power iterations on the new vectors and what is remembered of all the others.

    .. math:: S = B Q, \quad B = Q_0 \Lambda_0 Q_0^T + \sum_j v_j v_j^T, \quad
              Q \leftarrow \mathrm{orth}(S), \quad \lambda_j = ‖s_j‖

    from the ``Q_0`` and ``Lambda_0`` of before. Everything happens in coordinates of ``[Q_0, v]``,
    so that iterations cost nothing in ``d``. One gives the subspace of `OPAST`, and without end
    they give `Brand`'s update.

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the history; ``None`` never forgets.
      iterations: of the power method for every update.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `Oja`, and ``2 (r + k)² r`` flops an iteration.

    Source: Yang, Hsieh and Wang, "History PCA: a new algorithm for streaming PCA", 2018.
    """

    iterations: int = 3

    @property
    def basis(self) -> HistoryBasis:
        return HistoryBasis(self.rank, self.beta, buffer=self.buffer, iterations=self.iterations)


@dataclasses.dataclass(frozen=True)
class _Spacious(OnBasis):
    """A tracker that keeps more eigenpairs than it shows."""

    slots: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        owner = type(self).__name__
        check_count(owner, "rank", self.rank)
        if self.slots is not None:
            check_count(owner, "slots", self.slots)
            check(
                self.slots >= self.rank,
                f"{owner}: slots is {self.slots}, below the rank; pass at least {self.rank}.",
            )
        OnBasis.__post_init__(self)

    @property
    def kept(self) -> int:
        """How many eigenpairs are kept."""
        return 2 * self.rank if self.slots is None else self.slots


@dataclasses.dataclass(frozen=True)
class Brand(_Spacious):
    """Brand's truncated eigendecomposition, exact up to what it truncates: `basis.Eigen`.

    Args:
      rank: eigenpairs shown, ``r``.
      beta: decay of the average; ``None`` never forgets.
      slots: eigenpairs kept, ``m``; by default ``2 r``. The more, the less is lost.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, fewer slots than that, and numbers out of range.

    Cost: that of `basis.Eigen` of rank ``m``.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.
    """

    @property
    def basis(self) -> basis.Eigen:
        return basis.Eigen(
            self.kept, self.beta, buffer=self.buffer, count_columns=False, eig_tol=0.0
        )


@dataclasses.dataclass(frozen=True)
class FrequentDirections(_Spacious):
    """Frequent Directions, with a bound on every stream: `basis.FrequentDirections`.

    Eigenvalues are lower bounds of the second moments, ``robust`` ones between these and upper.
    It erases directions weaker than the tail over ``m``: use it for its guarantee.

    Args:
      rank: eigenpairs shown, ``r``.
      beta: decay of the average; ``None`` sums, as the bound has it.
      robust: give half of what was cut back to every eigenvalue.
      slots: eigenpairs kept, ``m``, on which the bound is; by default ``2 r``.
      buffer: vectors between two rotations of the rows, see `basis.Frame`.

    Raises:
      ValueError: for a rank below 1, fewer slots than that, and numbers out of range.

    Cost: that of `basis.FrequentDirections` of rank ``m``.

    Source: Ghashami, Liberty, Phillips and Woodruff, "Frequent Directions", SIAM Journal on
    Computing 2016; Luo et al., "Robust Frequent Directions", JMLR 2019.
    """

    robust: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def basis(self) -> basis.FrequentDirections:
        return basis.FrequentDirections(
            self.kept, self.beta, robust=self.robust, buffer=self.buffer
        )
