"""GGT: the window of the last columns, factored through its Gram matrix."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import _linalg
from lowrank_optax._tree import Layout, cast_like, write
from lowrank_optax._types import Absorbed, Correction, Eigenbasis, check_count, check_decay
from lowrank_optax.basis._basis import Basis, Spectrum


class GGTState(NamedTuple):
    """State of `GGT` for ``n`` groups.

    Attributes:
      rows: the window ``W``, ``(m, leaf.size)`` a leaf.
      gram: ``K = W W^T``, ``(n, m, m)``.
      weights: ``(n, m)`` weight of every row, 0 while it is empty.
      head: ``(n,)`` the row to be replaced next.
      t: ``(n, m, m)``, with ``Q^T = T W``.
      lam: ``(n, m)`` eigenvalues, 0 in dead slots.
    """

    rows: Any
    gram: jax.Array
    weights: jax.Array
    head: jax.Array
    t: jax.Array
    lam: jax.Array


@dataclasses.dataclass(frozen=True)
class GGT(Basis, Spectrum):
    r"""Eigenbasis of the last ``rank`` columns, ``B = sum_j w_j y_j y_j^T``.

    With the columns as rows of ``W`` and ``K = W W^T = V diag(lam) V^T``:
    ``Q^T = diag(lam)^{-1/2} V^T W``. A new column changes one row and column of ``K``, which is
    the one product ``W y`` that the projection needs anyway; nothing large is ever factored.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(10), lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([3., 4., 0.]), state)
      >>> print(updates)                       # one gradient in the window: g / ‖g‖
      [0.6 0.8 0. ]

    Args:
      rank: the window's length ``m = r``.
      beta: ``None`` sums over the window, as the original does; a number weighs a column of age
        ``a`` with ``beta^a`` and divides by the sum of the weights, so that 1.0 is the mean.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped, as are their directions.
      damping: added to what is kept; with ``rdamping * max`` on top. ``abs`` and ``truncate`` as in
        `_linalg.regularize`, and each again as ``update_...`` for the step alone.

    Raises:
      ValueError: for a rank below 1, or a ``beta`` or tolerance out of range.

    Cost: memory ``m d + 3 m²``; a step two passes over the rows (``4 m d`` flops), one ``eigh`` of
    size ``m`` and ``6 m³`` flops.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    rank: int
    beta: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        Spectrum.__post_init__(self)
        check_count("GGT", "rank", self.rank)
        if self.beta is not None:
            check_decay("GGT", "beta", self.beta, closed=True)

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> GGTState:
        n, m = layout.n, self.rank
        square = lambda: jnp.zeros((n, m, m), layout.dtype)
        line = lambda: jnp.zeros((n, m), layout.dtype)
        return GGTState(layout.tree(layout.zeros(m)), square(), line(),
                        jnp.zeros(n, jnp.int32), square(), line())

    def absorb(self, layout: Layout, state: GGTState, correction: Correction, accept: jax.Array,
               key: jax.Array) -> Absorbed:
        rows = layout.leaves(state.rows)
        last = slice(-self.rank, None)
        columns = cast_like([c[last] for c in correction.columns], rows)
        small, slots, c, u, failed = jax.vmap(partial(self._absorb, signed=correction.signed))(
            state._replace(rows=()), layout.dot(rows, columns), layout.gram(columns),
            correction.weights[:, last], accept)
        rows = write(rows, layout, slots, columns)
        return Absorbed(small._replace(rows=layout.tree(rows)), c, u, failed)

    def eigenbasis(self, state: GGTState) -> Eigenbasis:
        return Eigenbasis(*jax.vmap(self.used)(state.lam))

    def _absorb(self, old: GGTState, s, gram, weights, accept, signed):
        """One group: ``s = W Y`` is ``(m, k)``, ``gram = Y^T Y`` is ``(k, k)``."""
        m = self.rank
        valid = weights != 0
        slots = jnp.where(valid, (old.head + jnp.cumsum(valid) - 1) % m, m)
        place = jax.nn.one_hot(slots, m, dtype=s.dtype)
        keep = 1 - jnp.sum(place, axis=0)
        cross = keep[:, None] * old.gram + place.T @ s.T            # W_new W_old^T
        s = keep[:, None] * s + place.T @ gram                      # W_new Y
        k = cross * keep + s @ place
        new = old._replace(
            gram=k,
            weights=keep * old.weights + place.T @ weights,
            head=(old.head + jnp.sum(valid, dtype=jnp.int32)) % m)
        lam, t = self._factor(new, signed)
        new = new._replace(lam=lam, t=t)
        fine = _linalg.finite(k, lam, t)
        ok = accept & fine
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        c = jnp.where(ok, t @ cross @ old.t.T, jnp.eye(m, dtype=s.dtype))
        return new, jnp.where(ok, slots, m), c, t @ s, accept & ~fine

    def _factor(self, state: GGTState, signed: bool) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues and ``T`` of the weighted window, through its Gram matrix."""
        scale = jnp.sqrt(jnp.abs(state.weights) * self._ages(state))
        lam, v = _linalg.eigh(scale[:, None] * state.gram * scale)
        if signed:
            # W^T S W with S = diag(sign w): S in the window's own orthonormal coordinates.
            live = self.stored(lam, lam > 0)[1]
            half = jnp.where(live, jnp.sqrt(jnp.where(live, lam, 1)), 0)[:, None] * v
            signs = jnp.sign(state.weights)
            t = jnp.where(live, jax.lax.rsqrt(jnp.where(live, lam, 1)), 0)[:, None] * v * scale
            lam, z = _linalg.eigh_by_size((half * signs) @ half.T)
            lam, live = self.stored(lam, lam != 0)
            return lam, jnp.where(live[:, None], z @ t, 0)
        kept, live = self.stored(lam, lam > 0)
        inverse = jnp.where(live, jax.lax.rsqrt(jnp.where(live, lam, 1)), 0)
        return kept, inverse[:, None] * v * scale

    def _ages(self, state: GGTState) -> jax.Array:
        """Every row's share of the average, or ones."""
        if self.beta is None:
            return jnp.ones_like(state.weights)
        age = (state.head - 1 - jnp.arange(self.rank)) % self.rank
        share = jnp.where(state.weights != 0, jnp.asarray(self.beta, state.lam.dtype) ** age, 0)
        return _linalg.safe_divide(share, jnp.sum(share))

