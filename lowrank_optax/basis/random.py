"""Random: an orthonormal basis that knows nothing."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, fix_size
from lowrank_optax._core.layout import Layout, cast_like
from lowrank_optax._core.rows import cholesky_qr, rewrite
from lowrank_optax._core.types import BasisUpdate, Eigenbasis, SymmetricCorrection
from lowrank_optax.basis._basis import Basis


class RandomState(NamedTuple):
    """State of `Random` for ``n`` groups.

    Attributes:
      rows: nearly orthonormal rows ``W``, ``(r, size)`` a piece.
      gram: the Gram matrix ``K = W W^T``, ``(n, r, r)``, measured on what is stored.
      t: the matrix ``T`` of ``Q^T = T W``, ``(n, r, r)``, nearly the identity.
      lam: ``(n, r)``, 1 in live slots and 0 in dead ones: there are no eigenvalues.
      updates: number ``(n,)`` of corrections that came so far.
    """

    rows: Any
    gram: jax.Array
    t: jax.Array
    lam: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Random(Basis):
    r"""A uniformly random subspace: ``Q`` is a Gaussian matrix orthonormalised.

    With every draw the inner state moves by the true ``C = Q_new^T Q_old``, which keeps a share of
    about ``r / d`` of it. A subspace that is never redrawn means training in a random subspace.
    Corrections are ignored, and there are no eigenvalues.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> fixed = lro.basis.Random(3, update_every=None)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), fixed, lro.inner.EMA(0.0))
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([1., 2., 3.]), state)
      >>> print((updates * 10).round())           # three dimensions of three are the whole space
      [10. 20. 30.]

    Args:
      rank: dimension ``r`` of the subspace, at least 1. A group with fewer parameters is spanned
        whole.
      update_every: number of updates of the basis from one draw to the next, at least 1, default 1;
        ``None`` keeps the first draw.

    Raises:
      ValueError: for a rank or ``update_every`` below 1.

    Cost: memory ``r d``; a step two passes over the rows (``4 r d`` flops), a draw ``r d`` normal
    numbers and ``12 d r²`` flops, in place.

    Source: Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018;
    Gower et al., "RSN: randomized subspace Newton", NeurIPS 2019.
    """

    rank: int
    update_every: int | None = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        fix_size(self, "rank")
        if self.update_every is not None:
            check_count("Random", "update_every", self.update_every)

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> RandomState:
        n, r = layout.n, self.rank
        square = lambda: jnp.zeros((n, r, r), layout.dtype)
        return RandomState(
            layout.store(layout.zeros(r)),
            square(),
            square(),
            jnp.zeros((n, r), layout.dtype),
            jnp.zeros(n, jnp.int32),
        )

    def absorb(
        self,
        layout: Layout,
        state: RandomState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        due = is_due(state.updates, self.update_every)
        drawn = accept & due
        live = jnp.arange(self.rank)[None] < jnp.asarray(layout.dims)[:, None]
        each = layout.to_pieces(live)

        def draw(leaf: int, at: jax.Array, block: jax.Array) -> jax.Array:
            # A key for each column: what is drawn does not depend on blocks and devices.
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, leaf)))(at)
            normal = partial(jax.random.normal, shape=(self.rank,), dtype=layout.dtype)
            return jax.vmap(normal, out_axes=1)(keys) * each[leaf][:, None]

        rows, gram, cross = rewrite(
            layout.stored(state.rows), layout, drawn, self.rank, draw, cross=True
        )
        rows, gram, t, total = cholesky_qr(rows, layout, gram, drawn)
        # A factorisation that failed leaves an empty basis; the next update draws again.
        fine = jax.vmap(linalg.finite)(t, total)
        failed = drawn & ~fine
        pick = lambda new, old: jnp.where(
            drawn[:, None, None], jnp.where(fine[:, None, None], new, 0), old
        )
        t = pick(t, state.t)
        c = pick(total @ cross @ jnp.swapaxes(state.t, 1, 2), jax.vmap(jnp.diag)(state.lam))
        lam = jnp.where(drawn[:, None], (live & fine[:, None]).astype(t.dtype), state.lam)
        u = t @ layout.dot(rows, cast_like(correction.columns, rows))
        new = RandomState(
            layout.store(rows),
            pick(gram, state.gram),
            t,
            lam,
            linalg.tally(state.updates, accept & ~failed, self.update_every or 1),
        )
        return BasisUpdate(new, c, u, failed)

    def eigenbasis(self, state: RandomState) -> Eigenbasis:
        return Eigenbasis(state.lam, state.lam != 0)


def is_due(updates: jax.Array, update_every: int | None) -> jax.Array:
    """Whether the update that comes after ``updates`` of them draws anew."""
    return updates == 0 if update_every is None else updates % update_every == 0
