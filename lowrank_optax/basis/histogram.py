"""Histogram: coordinates of similar values move together."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, fix_size
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection, Vector
from lowrank_optax.basis._basis import Basis
from lowrank_optax.basis.selection import weigh


class HistogramState(NamedTuple):
    """State of `Histogram` for ``n`` groups.

    Attributes:
      rows: the bin of every entry, ``(1, size)`` a piece.
      mean: the running mean of the columns, ``(1, size)`` a piece.
      counts: number ``(n, r)`` of entries in every bin.
      lam: ``(n, r)``, 1 for a bin with entries and 0 for one without: there are no eigenvalues.
      updates: number ``(n,)`` of corrections absorbed so far.
    """

    rows: Any
    mean: Any
    counts: jax.Array
    lam: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Histogram(Basis):
    r"""Coordinates of similar values move together: one direction for each bin of a histogram.

    The entries of the columns' running mean fall into ``rank`` bins of equal width between the
    smallest and the largest; ``q_k`` is the indicator of a bin over ``sqrt(n_k)``, so that

    .. math:: (Q^T g)_k = \frac{1}{\sqrt{n_k}} \sum_{i \in k} g_i, \qquad
              C_{kl} = \frac{|k_\mathrm{new} \cap l_\mathrm{old}|}{\sqrt{n_k\, n_l}}

    With the curvature `Parameters` it is the histogram of the parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> bins = lro.basis.Histogram(2)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), bins, lro.inner.EMA(0.))
      >>> state = tx.init(jnp.zeros(5))
      >>> updates, state = tx.update(jnp.array([1., 2., 2., 3., 10.]), state)
      >>> print(updates)                                        # the means of two bins
      [ 2.  2.  2.  2. 10.]

    Args:
      rank: number ``r`` of bins, at least 1. A bin without entries is a dead slot.
      beta: decay of the mean per correction, in [0, 1), default 0.99; 0 takes the last correction
        alone.

    Raises:
      ValueError: for a rank below 1 or a ``beta`` out of range.

    Cost: memory ``2 d`` and ``r²``; a step a few passes over a gradient, none over rows.

    Source: the original LRE's basis of that name.
    """

    rank: int
    beta: float = 0.99
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        fix_size(self, "rank")
        check_decay("Histogram", "beta", self.beta)

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> HistogramState:
        small = jnp.uint8 if self.rank <= 2**8 else jnp.uint16 if self.rank <= 2**16 else jnp.int32
        rows = lambda dtype: layout.store([jnp.zeros((1, size), dtype) for size in layout.sizes])
        line = lambda: jnp.zeros((layout.n, self.rank), layout.dtype)
        return HistogramState(
            rows(small), rows(layout.dtype), line(), line(), jnp.zeros(layout.n, jnp.int32)
        )

    def absorb(
        self,
        layout: Layout,
        state: HistogramState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        on = (correction.weights != 0).astype(layout.dtype)
        share = (1 - self.beta) * linalg.safe_divide(on, jnp.sum(on, axis=1, keepdims=True))
        old, before = layout.stored(state.rows), layout.stored(state.mean)
        mean = [
            self.beta * x + weigh(w, y.astype(layout.dtype))[None]
            for x, w, y in zip(before, layout.to_pieces(share), correction.columns, strict=True)
        ]
        low, high = _extremes(layout, mean)
        ok = accept & jnp.isfinite(high - low)
        bins = [
            jnp.where(yes, self._bin(x, a, b).astype(was.dtype), was)
            for yes, x, a, b, was in zip(
                layout.to_pieces(ok),
                mean,
                layout.to_pieces(low),
                layout.to_pieces(high),
                old,
                strict=True,
            )
        ]
        mean = [
            jnp.where(yes, a, b)
            for yes, a, b in zip(layout.to_pieces(ok), mean, before, strict=True)
        ]
        pick = lambda new, old: jnp.where(ok.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        r = self.rank
        shared = layout.gather(
            [
                _count(a[0].astype(jnp.int32) * r + b[0], r * r)
                for a, b in zip(bins, old, strict=True)
            ],
            (r * r,),
        ).reshape(-1, r, r)
        counts = pick(jnp.sum(shared, axis=2), state.counts)
        new = HistogramState(
            layout.store(bins),
            layout.store(mean),
            counts,
            (counts > 0).astype(layout.dtype),
            linalg.tally(state.updates, ok),
        )
        c = _scale(counts)[:, :, None] * shared * _scale(state.counts)[:, None, :]
        u = self.project(layout, new, correction.columns)
        return BasisUpdate(new, c, u, accept & ~ok)

    def eigenbasis(self, state: HistogramState) -> Eigenbasis:
        return Eigenbasis(state.lam, state.lam != 0)

    def project(self, layout: Layout, state: HistogramState, vector: Vector | Columns) -> jax.Array:
        sums = partial(jax.ops.segment_sum, num_segments=self.rank)
        parts = [
            sums(x.astype(layout.dtype).T, bins[0].astype(jnp.int32))
            for x, bins in zip(vector, layout.stored(state.rows), strict=True)
        ]
        total = layout.gather(parts, parts[0].shape)
        return jnp.einsum("nr,nr...->nr...", _scale(state.counts), total)

    def unproject(self, layout: Layout, state: HistogramState, u: jax.Array) -> Vector | Columns:
        scaled = jnp.einsum("nr,n...r->n...r", _scale(state.counts), u)
        return [
            x[..., bins[0]]
            for x, bins in zip(layout.to_pieces(scaled), layout.stored(state.rows), strict=True)
        ]

    def _bin(self, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        place = jnp.floor(linalg.safe_divide(x - low, high - low) * self.rank)
        return jnp.clip(place, 0, self.rank - 1)


def _extremes(layout: Layout, rows: Columns) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest entry of each group, ``(n,)`` each."""
    low: list[Any] = [jnp.inf] * layout.n
    high: list[Any] = [-jnp.inf] * layout.n
    for x, group in zip(rows, layout.group, strict=True):
        low[group] = jnp.minimum(low[group], jnp.min(x, initial=jnp.inf))
        high[group] = jnp.maximum(high[group], jnp.max(x, initial=-jnp.inf))
    return jnp.asarray(low, layout.dtype), jnp.asarray(high, layout.dtype)


def _count(bins: jax.Array, length: int) -> jax.Array:
    """How many entries there are of each number below ``length``."""
    return jnp.zeros(length, jnp.int32).at[bins].add(1)


def _scale(counts: jax.Array) -> jax.Array:
    """``1 / sqrt(n)``, and 0 for an ``n`` of 0."""
    return linalg.safe_divide(1.0, jnp.sqrt(counts))
