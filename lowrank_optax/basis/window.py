"""Bases that keep columns as they came: common directions, and a factor that can overflow."""

import abc
import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay, fix_size
from lowrank_optax._core.layout import Layout, cast_like, combine, stack
from lowrank_optax._core.rows import rewrite, write
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection
from lowrank_optax.basis._basis import Regularized
from lowrank_optax.basis._ring import Ring, RingState, oldest, spectral_factor, window_eigh


@dataclasses.dataclass(frozen=True)
class CommonDirections(Ring):
    r"""Orthonormal basis of the last gradients and the last steps.

    With ``s_t = x_t - x_{t-1}`` and the gradients (or other columns of the curvature) ``g_t``:

    .. math:: \mathrm{span}\, Q = \mathrm{span}\{s_t, g_t, s_{t-1}, g_{t-1}, \dots\}

    over the last ``rank`` of them, through the eigenvectors of their correlation matrix. There are
    no eigenvalues. ``update`` needs ``params``, because the steps are differences of these.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(
      ...     lro.curvature.Covariance(), lro.basis.CommonDirections(10), lro.inner.Normalize())
      >>> x = jnp.ones(3); state = tx.init(x)
      >>> updates, state = tx.update(jnp.array([0., 2., 0.]), state, x)
      >>> print(updates)                               # one direction so far: the gradient's
      [0. 1. 0.]

    Args:
      rank: number of vectors that are kept, ``m = r``, at least 2. Where a correction has one
        column, half of them are steps.
      eig_tol: share of the largest eigenvalue of the correlation matrix at or below which a
        direction is dropped as a combination of the others; in [0, 1), without unit, default 1e-5.

    Raises:
      ValueError: for a rank below 2 or a tolerance out of range; by ``update``, without ``params``.

    Cost: memory ``(m + 1) d + 3 m²``; a step two passes over the rows (``6 m d`` flops), one
    ``eigh`` of size ``m`` and ``6 m³`` flops.

    Source: Wang, Lee and Lin, "The common-directions method for regularized empirical risk
    minimization", JMLR 2019; with steps Lee, Wang, Chen and Lin, "Limited-memory common-directions
    method for distributed optimization", SDM 2017.
    """

    eig_tol: float = dataclasses.field(default=1e-5, kw_only=True)
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        fix_size(self, "rank", 2)
        check_decay("CommonDirections", "eig_tol", self.eig_tol)

    def init(self, layout: Layout, key: jax.Array) -> RingState:
        # The last parameters keep their own dtype: the difference of rounded ones would be noise.
        last = [
            jnp.zeros((1, size), dtype)
            for size, dtype in zip(layout.sizes, layout.widest, strict=True)
        ]
        return super().init(layout, key)._replace(memory=layout.store(last))

    def absorb(
        self,
        layout: Layout,
        state: RingState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        check(
            correction.params is not None,
            "CommonDirections needs the parameters, which were "
            "not passed: call tx.update(grads, state, params).",
        )
        last = layout.stored(state.memory)
        here = stack(layout.join(layout.leaves(correction.params), (), [y.dtype for y in last]))
        step = [
            x.astype(layout.dtype) - y.astype(layout.dtype) for x, y in zip(here, last, strict=True)
        ]
        # Steps get unit length, so that no dtype of the rows is too narrow for a short one.
        size = jnp.sqrt(layout.gram(step)[:, 0])
        step = [linalg.safe_divide(x, c) for x, c in zip(step, layout.to_pieces(size), strict=True)]
        recent = slice(1 - self.rank, None)
        columns = [
            jnp.concatenate([s.astype(y.dtype), y[recent]])
            for s, y in zip(step, correction.columns, strict=True)
        ]
        begun = jnp.any(state.weights != 0, axis=1, keepdims=True)
        on = jnp.concatenate([begun & (size != 0), correction.weights[:, recent] != 0], axis=1)
        done = super().absorb(
            layout,
            state,
            correction._replace(columns=columns, weights=on.astype(layout.dtype), signed=False),
            accept,
            key,
        )
        kept = [
            jnp.where(ok, x, y)
            for ok, x, y in zip(layout.to_pieces(accept & ~done.failed), here, last, strict=True)
        ]
        return done._replace(
            state=done.state._replace(memory=layout.store(kept)), u=done.u[..., 1:]
        )

    def eigenbasis(self, state: RingState) -> Eigenbasis:
        return Eigenbasis(state.lam, state.lam != 0)

    def factor(self, state: RingState, signed: bool) -> tuple[jax.Array, jax.Array]:
        scale = linalg.safe_divide(state.weights, jnp.sqrt(jnp.diagonal(state.gram)))
        lam, v = window_eigh(state.gram, scale, state.rows)
        lam, live = linalg.regularize(lam, lam > 0, eig_tol=self.eig_tol)
        t = jnp.where(live, lax.rsqrt(jnp.where(live, lam, 1)), 0)[:, None] * v * scale[None]
        return live.astype(lam.dtype), t


class Overflow(abc.ABC):
    """What a `LowRankFactor` does with columns when it is full."""

    @abc.abstractmethod
    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        """Rows ``(k,)`` of one group in which columns go, ``m`` for a column that is dropped.

        Args:
          old: one group's window, with ``weights`` ``(m,)`` that are 0 where a row is empty.
          gram: the Gram matrix ``(k, k)`` of the columns.
          weights: the columns' weights ``(k,)``, 0 for a column that is switched off.
        """

    def kept(self, rank: int) -> int | None:
        """Number of eigenpairs that an overflow leaves; ``None`` where columns replace columns."""
        return None


@dataclasses.dataclass(frozen=True)
class DropOldest(Overflow):
    """The oldest columns make room, which leaves the window of `GGT`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.LowRankFactor(2, lro.basis.DropOldest())
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> for g in jnp.diag(jnp.array([3., 1., 2.])):
      ...     updates, state = tx.update(g, state)
      >>> print(basis.measured(state.basis).round())      # 3² has gone
      [[4. 1.]]

    Cost: none beyond `LowRankFactor`.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        return oldest(old, weights)


@dataclasses.dataclass(frozen=True)
class DropSmallest(Overflow):
    """The columns with the largest ``|w_j| ‖y_j‖²`` stay, whether they are old or new.

    A column that was large once stays for good, so this rule is for streams whose norms do not
    fade.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.LowRankFactor(2, lro.basis.DropSmallest())
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> for g in jnp.diag(jnp.array([3., 1., 2.])):
      ...     updates, state = tx.update(g, state)
      >>> print(basis.measured(state.basis).round())      # 1² has gone
      [[9. 4.]]

    Cost: none beyond `LowRankFactor`.

    Source: elementary.
    """

    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        m = old.weights.shape[0]
        held = jnp.where(old.weights != 0, jnp.abs(old.weights) * jnp.diagonal(old.gram), -1)
        come = jnp.where(weights != 0, jnp.abs(weights) * jnp.diagonal(gram), -2)
        rank = jnp.argsort(jnp.argsort(-jnp.concatenate([held, come])))
        return _seat(rank[:m] >= m, rank[m:] < m)


@dataclasses.dataclass(frozen=True)
class Reconstruct(Overflow):
    r"""``B`` with the new columns is cut to its leading eigenpairs, ``y_i = sqrt(|lam_i|) q_i``.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.basis.Reconstruct().kept(20), lro.basis.Reconstruct(keep=15).kept(20)
      (10, 15)

    Args:
      keep: number of eigenpairs that stay, from 1 to the factor's rank; default ``None``, half of
        the rank. ``keep=rank`` cuts as little as possible, but cuts at every correction once the
        factor is full.

    Raises:
      ValueError: for less than one.

    Cost: with half of the rank an overflow every ``rank / 2`` columns, at ``3 d r`` flops a column;
    with ``keep=rank`` ``4 d r²`` flops for every correction.

    Source: Levy and Lindenbaum, "Sequential Karhunen-Loeve basis extraction", 2000.
    """

    keep: int | None = None

    def __post_init__(self):
        if self.keep is not None:
            fix_size(self, "keep")

    def kept(self, rank: int) -> int:
        return self.keep or max(1, rank // 2)

    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        free, new = old.weights == 0, weights != 0
        return jnp.where(jnp.sum(new) > jnp.sum(free), free.shape[0], _seat(free, new))


@dataclasses.dataclass(frozen=True)
class LowRankFactor(Ring, Regularized):
    r"""Eigenbasis of ``B = sum_j w_j y_j y_j^T``, kept as a factor of at most ``rank`` columns.

    With ``W`` the columns as rows, ``S`` their weights and ``K = W W^T``, as in `GGT`:
    ``S^{1/2} K S^{1/2} = V diag(lam) V^T`` and ``Q^T = diag(lam)^{-1/2} V^T S^{1/2} W``. A part of
    its own, ``overflow``, says what happens when the factor is full.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.LowRankFactor(2, lro.basis.Reconstruct(keep=2))
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> for g in jnp.array([[3., 0., 0.], [0., 2., 0.], [4., 0., 0.]]):
      ...     updates, state = tx.update(g, state)
      >>> print(basis.measured(state.basis).round())      # 3² + 4² along the first axis, and 2²
      [[25.  4.]]

    Args:
      rank: number of columns of the factor, ``m = r``, at least 1.
      overflow: what happens when the factor is full: `Reconstruct` (the default), `DropOldest`,
        `DropSmallest`, or an `Overflow` of your own.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a rank below 1, a tolerance out of range, an overflow that is not a rule or
        keeps more than ``rank``.

    Cost: memory ``m d + 3 m²``; a step two passes over the rows (``4 m d`` flops), one ``eigh`` of
    size ``m`` (``m + k`` with `Reconstruct`) and ``6 m³`` flops, and the cost of the overflow.

    Source: the original LRE's low-rank factor; `Reconstruct` is incremental principal components,
    Levy and Lindenbaum, "Sequential Karhunen-Loeve basis extraction", 2000.
    """

    overflow: Overflow = Reconstruct()

    def __post_init__(self):
        Regularized.__post_init__(self)
        Ring.__post_init__(self)
        check(
            isinstance(self.overflow, Overflow),
            f"LowRankFactor: overflow is {self.overflow!r}; "
            "pass Reconstruct(), DropOldest() or DropSmallest() from lowrank_optax.basis.",
        )
        keep = self.overflow.kept(self.rank)
        check(
            keep is None or keep <= self.rank,
            f"LowRankFactor: {self.overflow!r} keeps more "
            f"than the rank of {self.rank}; pass a keep of at most that.",
        )

    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        return self.overflow.place(old, gram, weights)

    def factor(self, state: RingState, signed: bool) -> tuple[jax.Array, jax.Array]:
        return spectral_factor(self.stored, state.gram, state.weights, signed, state.rows)

    def absorb(
        self,
        layout: Layout,
        state: RingState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        keep = self.overflow.kept(self.rank)
        if keep is None:
            return super().absorb(layout, state, correction, accept, key)
        rows = layout.stored(state.rows)
        columns = cast_like(correction.columns, rows)
        small, cut = jax.vmap(partial(self._cut, keep=keep, signed=correction.signed))(
            state._replace(rows=()),
            layout.dot(rows, columns),
            layout.gram(columns),
            correction.weights,
            accept,
        )
        rows = write(rows, layout, cut.slots, columns)
        rows, small = self._rebuild(layout, rows, columns, small, cut, keep)
        return BasisUpdate(small._replace(rows=layout.store(rows)), cut.c, cut.u, cut.failed)

    def _cut(self, old: RingState, s, gram, weights, accept, *, keep, signed):
        """One group's eigenpairs with the new columns, all of them or those that are kept."""
        m, on = self.rank, weights != 0
        corner = jnp.where(on[:, None] & on[None], gram, 0)
        beside = jnp.where(on[None], s, 0)
        whole = jnp.block([[old.gram, beside], [beside.T, corner]])
        lam, t = spectral_factor(
            self.stored, whole, jnp.concatenate([old.weights, weights]), signed
        )
        full = jnp.sum(on) > jnp.sum(old.weights == 0)
        live = jnp.arange(m) < jnp.where(full, keep, m)
        lam, t = jnp.where(live, lam[:m], 0), jnp.where(live[:, None], t[:m], 0)
        fine = linalg.finite(whole, lam, t)
        ok = accept & fine
        slots = jnp.where(ok, self.place(old, gram, weights), m)
        place = jax.nn.one_hot(slots, m, dtype=s.dtype)
        stay = 1 - jnp.sum(place, axis=0)
        seated = place.T @ beside.T * stay[None]
        root = jnp.sqrt(jnp.abs(lam))
        added = old._replace(
            gram=stay[:, None] * old.gram * stay[None]
            + seated
            + seated.T
            + place.T @ corner @ place,
            weights=stay * old.weights + place.T @ weights,
            lam=lam,
            t=t[:, :m] + t[:, m:] @ place,
        )
        rebuilt = old._replace(
            gram=jnp.diag(jnp.abs(lam)),
            weights=jnp.sign(lam),
            lam=lam,
            t=jnp.diag(linalg.safe_divide(1.0, root)),
        )
        pick = lambda a, b, o: jnp.where(ok, jnp.where(full, a, b), o)
        c = jnp.where(
            ok, t @ jnp.concatenate([old.gram, beside.T]) @ old.t.T, jnp.eye(m, dtype=s.dtype)
        )
        u = jnp.where(ok, t @ jnp.concatenate([s, jnp.where(on[:, None], gram, 0)]), old.t @ s)
        return (
            jax.tree.map(pick, rebuilt, added, old),
            _Cut(slots, ok & full, root[:, None] * t, c, u, accept & ~fine),
        )

    def _rebuild(self, layout, rows: Columns, columns: Columns, small: RingState, cut, keep: int):
        """``W <- sqrt(|lam|) Q^T`` in place, for the groups that overflow; ``K`` measured."""
        m = self.rank
        mixes = layout.to_pieces(cut.mix[:, :keep])

        def mix(leaf: int, at: jax.Array, block: jax.Array, new: jax.Array) -> jax.Array:
            return combine(mixes[leaf][:, :m], block, layout.dtype) + combine(
                mixes[leaf][:, m:], new, layout.dtype
            )

        rows, gram, _ = rewrite(rows, layout, cut.full, keep, mix, columns)
        rest = [(0, 0), (0, m - keep), (0, m - keep)]
        gram = jnp.where(cut.full[:, None, None], jnp.pad(gram, rest), small.gram)
        t = jnp.where(
            cut.full[:, None, None], jax.vmap(linalg.orthonormalize)(small.t, gram), small.t
        )
        return rows, small._replace(gram=gram, t=t)


class _Cut(NamedTuple):
    """What is still to be done to the rows after the small algebra, and what the engine is told."""

    slots: jax.Array
    full: jax.Array
    mix: jax.Array
    c: jax.Array
    u: jax.Array
    failed: jax.Array


def _seat(free: jax.Array, coming: jax.Array) -> jax.Array:
    """Free rows ``(m,)`` for the columns ``(k,)`` that come, in order; ``m`` for the others."""
    order = jnp.argsort(~free)
    return jnp.where(
        coming, order[jnp.clip(jnp.cumsum(coming) - 1, 0, free.shape[0] - 1)], free.shape[0]
    )
