"""Trackers made of bases of the engine: one adapter, and a function for each known method.

`lowrank_optax.basis` documents what the bases do.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import basis
from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout, cast_like
from lowrank_optax._core.types import BasisUpdate, Columns, SymmetricCorrection
from lowrank_optax.online.operator import Operator
from lowrank_optax.online.trackers._tracker import Tracker, TrackerState


@dataclasses.dataclass(frozen=True)
class FromBasis(Tracker):
    """The tracker of a basis that keeps a subspace, `lowrank_optax.basis.Frame`, of one group.

    ``k`` vectors that come at once are one correction of ``k`` columns: a basis that averages (it
    has a ``beta``) gets their mean, one that sums (``beta=None``) their sum. If ``buffer`` of the
    basis is below ``k``, they are absorbed in chunks of ``buffer``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.FromBasis(1, lro.basis.Nystrom(4, beta=None))
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(100))
      >>> print(state.memory.rows[0].shape)         # four directions and a buffer of eight columns
      (12, 100)

    Args:
      rank: number ``r`` of eigenpairs that `operator` shows, at least 1.
      basis: what keeps the eigenpairs: `Eigen`, `OPAST`, `Hebbian` or another `Frame`. Its rank is
        at least ``rank``; if it is higher, the leading eigenpairs are shown.

    Raises:
      ValueError: for a rank below 1 or above that of the basis, or something that is not a `Frame`.

    Cost: that of the basis.

    Source: that of the basis.
    """

    basis: basis.Frame

    def __post_init__(self):
        super().__post_init__()
        kept: Any = self.basis
        check(
            isinstance(kept, basis.Frame),
            f"FromBasis: basis is {kept!r}; pass a basis that keeps a subspace, such as "
            "lowrank_optax.basis.Eigen(20).",
        )
        check(
            kept.rank >= self.rank,
            f"FromBasis: the basis keeps {kept.rank} directions, but rank is {self.rank}; pass a "
            f"basis that keeps at least {self.rank}.",
        )

    def operator(self, state: TrackerState) -> Operator:
        layout, kept = state.layout, self.basis
        pick = jnp.eye(self.rank, kept.rank, dtype=layout.dtype)
        rows = kept.unproject(layout, state.memory, pick[None])
        lam = kept.measured(state.memory)[0, : self.rank]
        lam = lam / jnp.maximum(state.seen, 1) if kept.beta is None else lam
        rows = cast_like(rows, layout.stored(state.memory.rows))
        return Operator(layout.tree(rows), jnp.diag(lam), layout.gram(rows)[0], layout)

    def _fresh(self, layout: Layout, key: jax.Array) -> Any:
        return self.basis.init(layout, key)

    def _resumed(self, state: TrackerState, rows: Columns, lam: jax.Array, count: jax.Array) -> Any:
        kept = self.basis
        n, share = min(lam.shape[0], kept.rank), count
        if kept.beta is not None:  # an average starts at zero: after so many it holds this share
            share = (1 - jnp.asarray(kept.beta, lam.dtype) ** count) / (1 - kept.beta)
        memory = self._absorb(state, [c[:n] for c in rows], share * lam[:n]).state
        counts = jnp.broadcast_to(count, memory.updates.shape)
        own = kept.memory_after(jax.tree.map(lambda x: x[0], memory.memory), lam, count)
        return memory._replace(
            updates=counts, columns=counts, memory=jax.tree.map(lambda x: x[None], own)
        )

    def _take(
        self, state: TrackerState, columns: Columns, fine: jax.Array, *others: Columns
    ) -> tuple[Any, jax.Array]:
        weights = fine.astype(state.layout.dtype)
        if self.basis.beta is not None:
            weights = weights / jnp.maximum(jnp.sum(weights), 1)
        done = self._absorb(state, columns, weights)
        return done.state, fine & ~done.failed[0]

    def _absorb(self, state: TrackerState, columns: Columns, weights: jax.Array) -> BasisUpdate:
        given = SymmetricCorrection(columns, weights[None])
        key = jax.random.fold_in(state.key, state.seen)
        accept = jnp.any(weights != 0)[None]
        return self.basis.absorb(state.layout, state.memory, given, accept, key)


def oja(
    rank: int, beta: float | None = None, learning_rate: float = 8.0, *, buffer: int | None = None
) -> FromBasis:
    r"""Oja's rule, ``A <- orth(A + eta (A v) v^T)``: `basis.Hebbian` with `basis.GradientRule`.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.oja(10, learning_rate=4.0).basis.rule
      GradientRule(learning_rate=4.0)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay per update of the moments that scale the step, in [0, 1); ``None``, the default,
        sums them, and steps fall like ``1/t``.
      learning_rate: step ``eta`` relative to those moments, without unit, above 0, default 8. It
        has to exceed about half the ratio of the largest eigenvalue to the smallest one that is to
        be told from the rest.
      buffer: number of vectors between two rotations of the rows, default ``max(8, rank // 3)``.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``m d``, ``m = r + buffer``; ``4 m d`` flops a vector, and the rotations of
    `basis.Frame`.

    Source: Oja, "Simplified neuron model as a principal component analyzer", Journal of
    Mathematical Biology 1982.
    """
    rule = basis.GradientRule(learning_rate)
    return FromBasis(rank, basis.Hebbian(rank, beta, rule, buffer=buffer))


def krasulina(
    rank: int, beta: float | None = None, learning_rate: float = 8.0, *, buffer: int | None = None
) -> FromBasis:
    r"""Krasulina's rule for subspaces, ``A <- orth(A + eta (A v) (v - A^T A v)^T)``.

    It moves along the gradient's tangent alone: `basis.Hebbian` with `basis.StiefelRule`, whose
    rows span the same subspace as those of any other orthonormalisation.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.krasulina(10).basis.rule
      StiefelRule(learning_rate=8.0)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments, as in `oja`.
      learning_rate: step, as in `oja`.
      buffer: number of vectors between two rotations of the rows, as in `oja`.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: as `oja`.

    Cost: that of `oja`.

    Source: Krasulina, "The method of stochastic approximation for the determination of the least
    eigenvalue of a symmetrical matrix", 1969; Tang, "Exponentially convergent stochastic k-PCA
    without variance reduction", NeurIPS 2019.
    """
    rule = basis.StiefelRule(learning_rate)
    return FromBasis(rank, basis.Hebbian(rank, beta, rule, buffer=buffer))


def ada_oja(rank: int, beta: float | None = None, *, buffer: int | None = None) -> FromBasis:
    r"""Oja's rule with AdaGrad's step for every row: `basis.Hebbian` with `basis.AdaptiveRule`.

    .. math:: G = (A v) v^T, \quad b_i^2 \leftarrow b_i^2 + ‖G_i‖^2, \quad
              A \leftarrow \mathrm{orth}(A + \mathrm{diag}(b)^{-1} G)

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.ada_oja(10).basis.rule
      AdaptiveRule()

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay per update of the moments, in [0, 1), for the eigenvalues alone: steps fall in any
        case. ``None``, the default, sums.
      buffer: number of vectors between two rotations of the rows, as in `oja`.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `oja`.

    Source: Henriksen and Ward, "AdaOja: adaptive learning rates for streaming PCA", 2019.
    """
    return FromBasis(rank, basis.Hebbian(rank, beta, basis.AdaptiveRule(), buffer=buffer))


def opast(rank: int, beta: float | None = None, *, buffer: int | None = None) -> FromBasis:
    """Orthonormal projection approximation subspace tracking: `basis.OPAST`.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.opast(10, 0.9).basis == lro.basis.OPAST(10, 0.9)
      True

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments per update, in [0, 1); ``None``, the default, never forgets.
      buffer: number of vectors between two rotations of the rows, as in `oja`.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: that of `oja`.

    Source: Abed-Meraim, Chkeif and Hua, "Fast orthonormal PAST algorithm", IEEE Signal Processing
    Letters 2000.
    """
    return FromBasis(rank, basis.OPAST(rank, beta, buffer=buffer))


def grouse(
    rank: int, beta: float | None = None, learning_rate: float = 8.0, *, buffer: int | None = None
) -> FromBasis:
    """Grassmannian rank-one steps: `basis.GROUSE`. For missing entries see `PETRELS`.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.grouse(10).basis == lro.basis.GROUSE(10, beta=None)
      True

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments, as in `oja`.
      learning_rate: step, as in `oja`.
      buffer: number of vectors between two rotations of the rows, as in `oja`.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: as `oja`.

    Cost: that of `oja`.

    Source: Balzano, Nowak and Recht, "Online identification and tracking of subspaces from highly
    incomplete information", Allerton 2010.
    """
    return FromBasis(rank, basis.GROUSE(rank, beta, learning_rate, buffer=buffer))


def history_pca(
    rank: int, beta: float | None = None, iterations: int = 3, *, buffer: int | None = None
) -> FromBasis:
    """Power iterations on the new vectors and what is kept of the old ones: `basis.HistoryPCA`.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.trackers.history_pca(10).basis.iterations
      3

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the history per update, in [0, 1); ``None``, the default, never forgets.
      iterations: number of power iterations per update, at least 1, default 3.
      buffer: number of vectors between two rotations of the rows, as in `oja`.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank or number of iterations below 1, and numbers out of range.

    Cost: that of `oja`, and ``2 (r + k)² r`` flops an iteration.

    Source: Yang, Hsieh and Wang, "History PCA: a new algorithm for streaming PCA", 2018.
    """
    return FromBasis(rank, basis.HistoryPCA(rank, beta, buffer=buffer, iterations=iterations))


def brand(
    rank: int, beta: float | None = None, *, slots: int | None = None, buffer: int | None = None
) -> FromBasis:
    """Brand's truncated eigendecomposition, exact up to what it truncates: `basis.Eigen`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.brand(10)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(100))
      >>> print(tracker.basis.rank, state.memory.rows[0].shape)     # 20 slots and 8 columns
      20 (28, 100)

    Args:
      rank: number ``r`` of eigenpairs that are shown, at least 1.
      beta: decay of the average per update, in [0, 1); ``None``, the default, never forgets.
      slots: number of eigenpairs that are kept, at least ``rank``; default ``2 rank``. With more
        slots less is lost.
      buffer: number of vectors between two rotations of the rows, default ``max(8, slots // 3)``.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank below 1, fewer slots than that, and numbers out of range.

    Cost: that of `basis.Eigen` with ``slots`` eigenpairs.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.
    """
    kept = 2 * rank if slots is None else slots
    eigen = basis.Eigen(kept, beta, buffer=buffer, count_columns=False, eig_tol=0.0)
    return FromBasis(rank, eigen)


def frequent_directions(
    rank: int,
    beta: float | None = None,
    *,
    robust: bool = False,
    slots: int | None = None,
    buffer: int | None = None,
) -> FromBasis:
    """Frequent Directions, with a bound on every stream: `basis.FrequentDirections`.

    Eigenvalues are lower bounds of the second moments; with ``robust`` they lie between the lower
    and the upper bounds. Directions weaker than the tail divided by ``slots`` are lost, so this
    tracker is for its guarantee.

    Example:
      >>> import lowrank_optax as lro
      >>> tracker = lro.online.trackers.frequent_directions(10, robust=True)
      >>> print(tracker.rank, tracker.basis.rank, tracker.basis.share)
      10 20 0.5

    Args:
      rank: number ``r`` of eigenpairs that are shown, at least 1.
      beta: decay of the average per update, in [0, 1); ``None``, the default, sums, as the bound
        has it.
      robust: whether half of what was cut is given back to every eigenvalue, default no.
      slots: number of eigenpairs that are kept, for which the bound holds; at least ``rank``,
        default ``2 rank``.
      buffer: number of vectors between two rotations of the rows, default ``max(8, slots // 3)``.

    Returns:
      A tracker, `FromBasis`.

    Raises:
      ValueError: for a rank below 1, fewer slots than that, and numbers out of range.

    Cost: that of `basis.FrequentDirections` with ``slots`` eigenpairs.

    Source: Ghashami, Liberty, Phillips and Woodruff, "Frequent Directions", SIAM Journal on
    Computing 2016; Luo et al., "Robust Frequent Directions", JMLR 2019.
    """
    kept = 2 * rank if slots is None else slots
    return FromBasis(rank, basis.FrequentDirections(kept, beta, robust=robust, buffer=buffer))
