"""Bases whose directions are coordinates, or sets of them: indices instead of vectors."""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_decay, check_least, fix_size
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection, Vector
from lowrank_optax.basis._basis import Basis
from lowrank_optax.basis.random import is_due


class SelectionState(NamedTuple):
    """State of a `Selection` for ``n`` groups.

    Attributes:
      rows: the running diagonal of the curvature, ``(1, leaf.size)`` a leaf; ``()`` where none is
        kept, because there are checkpoints that take no arrays without entries.
      indices: ``(n, r)`` the coordinates, counted through the group's leaves; -1 in dead slots.
      lam: ``(n, r)`` the diagonal at the coordinates, 0 in dead slots; 1 where none is kept.
      updates: ``(n,)`` corrections absorbed so far.
    """

    rows: Any
    indices: jax.Array
    lam: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Selection(Basis):
    """``rank`` coordinates: projecting gathers, unprojecting scatters, ``C_ij = [i is j]``."""

    rank: int

    def __post_init__(self):
        fix_size(self, "rank")

    @property
    def period(self) -> int:
        """Corrections after which its rhythm, if it has any, starts again."""
        return 1

    @abc.abstractmethod
    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """Rows or ``()``, index and lam after a correction, and whether all is finite, ``(n,)``."""

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> SelectionState:
        check(
            max(layout.dims) < 2**31,
            f"{type(self).__name__}: a group has {max(layout.dims)} "
            "entries, too many for an index; pass groups=lowrank_optax.per_leaf.",
        )
        rows = [jnp.zeros((1, size), layout.dtype) for size in layout.sizes]
        return SelectionState(
            layout.store(rows) if "eigenvalues" in self.provides else (),
            jnp.full((layout.n, self.rank), -1, jnp.int32),
            jnp.zeros((layout.n, self.rank), layout.dtype),
            jnp.zeros(layout.n, jnp.int32),
        )

    def absorb(
        self,
        layout: Layout,
        state: SelectionState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        rows, index, lam, fine = self.choose(layout, state, correction, key)
        ok = accept & fine
        if rows:
            pairs = zip(layout.to_leaves(ok), rows, layout.stored(state.rows), strict=True)
            rows = layout.store([jnp.where(yes, a, b) for yes, a, b in pairs])
        index = jnp.where(ok[:, None], index, state.indices)
        new = SelectionState(
            rows,
            index,
            jnp.where(ok[:, None], lam, state.lam),
            linalg.tally(state.updates, ok, self.period),
        )
        same = (index[:, :, None] == state.indices[:, None, :]) & (index >= 0)[:, :, None]
        c = same.astype(layout.dtype)
        return BasisUpdate(new, c, self.project(layout, new, correction.columns), accept & ~fine)

    def eigenbasis(self, state: SelectionState) -> Eigenbasis:
        return Eigenbasis(state.lam, state.indices >= 0)

    def project(self, layout: Layout, state: SelectionState, vector: Vector | Columns) -> jax.Array:
        parts = [_take(x, at) for x, at in zip(vector, _local(layout, state.indices), strict=True)]
        return layout.gather(parts, parts[0].shape)

    def unproject(self, layout: Layout, state: SelectionState, u: jax.Array) -> Vector | Columns:
        places = _local(layout, state.indices)
        return [
            jnp.zeros((*v.shape[:-1], size), layout.dtype).at[..., at].set(v, mode="drop")
            for v, at, size in zip(layout.to_leaves(u), places, layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RandomPermutation(Selection):
    """Coordinates drawn uniformly without replacement.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.RandomPermutation(100, redraw=10))

    Args:
      rank: how many, ``r``; of a smaller group all.
      redraw: updates of the basis between two draws; ``None`` keeps the first.

    Raises:
      ValueError: for a rank or ``redraw`` below 1; by ``init``, for groups of 2^31 entries.

    Cost: memory ``r``; a step ``O(r)``, a draw ``r²``, whatever ``d`` is.

    Source: random coordinate descent, Nesterov, SIAM Journal on Optimization 2012; the draw is
    Floyd's, Bentley and Floyd, "A sample of brilliance", 1987.
    """

    redraw: int | None = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        super().__post_init__()
        if self.redraw is not None:
            check_count("RandomPermutation", "redraw", self.redraw)

    @property
    def period(self) -> int:
        return self.redraw or 1

    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ):
        drawn = jax.vmap(partial(_sample, rank=self.rank))(
            jax.random.split(key, layout.n), jnp.asarray(layout.dims)
        )
        index = jnp.where(is_due(state.updates, self.redraw)[:, None], drawn, state.indices)
        return (), index, (index >= 0).astype(layout.dtype), jnp.ones(layout.n, bool)


@dataclasses.dataclass(frozen=True)
class TopK(Selection):
    r"""The coordinates in which the curvature's running diagonal is largest.

    .. math:: v \leftarrow \beta v + (1 - \beta) \sum_j w_j\, y_j \circ y_j, \qquad
              i_1, \dots, i_r = \mathrm{top}_r\, |v|, \qquad \lambda_k = v_{i_k}

    With `Covariance` this is the mean square of every gradient entry, and ``LInvSqrt`` is RMSprop
    on the ``r`` largest. Coordinates that never moved stay out.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.TopK(2), lro.inner.Sign())
      >>> state = tx.init(jnp.zeros(4))
      >>> updates, state = tx.update(jnp.array([0.1, -3., 2., 0.]), state)
      >>> print(updates)
      [ 0. -1.  1.  0.]

    Args:
      rank: how many coordinates, ``r``.
      beta: decay of the average, which is corrected for its start by ``1 - beta^n``; ``None`` sums.

    Raises:
      ValueError: for a rank below 1 or a ``beta`` out of range; by ``init``, for groups of 2^31
        entries.

    Cost: memory ``d``; a step one pass over ``v`` and the selection of ``r`` from it.

    Source: the original LRE's basis of that name, which takes them from the last correction alone
    (``beta=0``).
    """

    beta: float | None = 0.99

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None:
            check_decay(type(self).__name__, "beta", self.beta)

    def scores(self, layout: Layout, sizes: Vector, key: jax.Array) -> Vector:
        """What the chosen coordinates have most of, from ``|v|``."""
        return sizes

    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ):
        decay, gain = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        rows = [
            decay * v + gain * _weigh(w, jnp.square(y.astype(layout.dtype)))[None]
            for v, w, y in zip(
                layout.stored(state.rows),
                layout.to_leaves(correction.weights),
                correction.columns,
                strict=True,
            )
        ]
        total = layout.gather([jnp.sum(v) for v in rows])
        index = _largest(
            layout,
            self.rank,
            [
                jnp.where(v[0] != 0, s, -jnp.inf)
                for v, s in zip(
                    rows, self.scores(layout, [jnp.abs(v[0]) for v in rows], key), strict=True
                )
            ],
        )
        lam = self.project(layout, state._replace(indices=index), [v[0] for v in rows])
        order = jnp.argsort(-jnp.abs(lam), axis=1)
        index, lam = jnp.take_along_axis(index, order, 1), jnp.take_along_axis(lam, order, 1)
        if self.beta is not None:
            lam = lam / (
                1 - jnp.asarray(self.beta, lam.dtype) ** linalg.tally(state.updates)[:, None]
            )
        return rows, index, lam, jnp.isfinite(total)


@dataclasses.dataclass(frozen=True)
class WeightedPermutation(TopK):
    r"""Coordinates drawn without replacement, with probabilities in proportion to ``|v|^power``.

    ``v`` is the running diagonal of `TopK`. The ``r`` largest of ``power log|v| + gumbel`` are such
    a draw, a new one at every update.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.WeightedPermutation(100), update_every=10)

    Args:
      rank: how many coordinates, ``r``.
      beta: decay of the average; ``None`` sums.
      power: 1/2 draws by the size of a gradient's entries, 1 by its square, 0 evenly.

    Raises:
      ValueError: for a rank below 1, a ``beta`` out of range or a negative power; by ``init``, for
        groups of 2^31 entries.

    Cost: that of `TopK`, and ``d`` random numbers.

    Source: the original LRE's importance sampling; Efraimidis and Spirakis, "Weighted random
    sampling with a reservoir", 2006.
    """

    power: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_least("WeightedPermutation", "power", self.power)

    def scores(self, layout: Layout, sizes: Vector, key: jax.Array) -> Vector:
        keys = jax.random.split(key, max(1, len(sizes)))
        # The ordinary generator has ties among the largest of more than 2^23 numbers.
        gumbel = partial(jax.random.gumbel, dtype=layout.dtype, mode="high")
        return [
            self.power * jnp.log(jnp.where(x > 0, x, 1)) + gumbel(k, x.shape)
            for x, k in zip(sizes, keys, strict=False)
        ]


class HistogramState(NamedTuple):
    """State of `Histogram` for ``n`` groups.

    Attributes:
      rows: the bin of every entry, ``(1, leaf.size)`` a leaf.
      mean: the running mean of the columns, ``(1, leaf.size)`` a leaf.
      counts: ``(n, r)`` entries in every bin.
      lam: ``(n, r)``, 1 for a bin with entries: there are no eigenvalues.
      updates: ``(n,)`` corrections absorbed so far.
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

    With the curvature `Parameters` it is a histogram of the parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> bins = lro.basis.Histogram(2)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), bins, lro.inner.EMA(0.))
      >>> state = tx.init(jnp.zeros(5))
      >>> updates, state = tx.update(jnp.array([1., 2., 2., 3., 10.]), state)
      >>> print(updates)                                        # the means of two bins
      [ 2.  2.  2.  2. 10.]

    Args:
      rank: how many bins, ``r``; those without entries are dead slots.
      beta: decay of the mean; 0 takes the last correction alone.

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
            self.beta * x + _weigh(w, y.astype(layout.dtype))[None]
            for x, w, y in zip(before, layout.to_leaves(share), correction.columns, strict=True)
        ]
        low, high = _extremes(layout, mean)
        ok = accept & jnp.isfinite(high - low)
        bins = [
            jnp.where(yes, self._bin(x, a, b).astype(was.dtype), was)
            for yes, x, a, b, was in zip(
                layout.to_leaves(ok),
                mean,
                layout.to_leaves(low),
                layout.to_leaves(high),
                old,
                strict=True,
            )
        ]
        mean = [
            jnp.where(yes, a, b)
            for yes, a, b in zip(layout.to_leaves(ok), mean, before, strict=True)
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
            for x, bins in zip(layout.to_leaves(scaled), layout.stored(state.rows), strict=True)
        ]

    def _bin(self, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        place = jnp.floor(linalg.safe_divide(x - low, high - low) * self.rank)
        return jnp.clip(place, 0, self.rank - 1)


def _starts(layout: Layout) -> list[int]:
    """The first coordinate of every leaf, counted through its group."""
    starts, filled = [], [0] * layout.n
    for size, group in zip(layout.sizes, layout.group, strict=True):
        starts.append(filled[group])
        filled[group] += size
    return starts


def _local(layout: Layout, index: jax.Array) -> list[jax.Array]:
    """Coordinates of each group as those ``(r,)`` of every leaf; of others the leaf's size."""
    local = [at - start for at, start in zip(layout.to_leaves(index), _starts(layout), strict=True)]
    return [
        jnp.where((at >= 0) & (at < size) & (of >= 0), at, size)
        for at, of, size in zip(local, layout.to_leaves(index), layout.sizes, strict=True)
    ]


def _weigh(weights: jax.Array, columns: jax.Array) -> jax.Array:
    """``sum_j w_j y_j``; a column that is switched off may hold anything."""
    return jnp.einsum("k,ks->s", weights, jnp.where(weights[:, None] != 0, columns, 0))


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries ``(r,)`` of a leaf's vector, or ``(r, k)`` of its columns; 0 beyond its end."""
    if x.shape[-1] == 0:  # which XLA does not gather from
        return jnp.zeros((at.shape[0], *x.shape[:-1]), x.dtype)
    return x.at[..., at].get(mode="fill", fill_value=0).T


def _largest(layout: Layout, rank: int, scores: Vector) -> jax.Array:
    """The ``rank`` coordinates of each group with the largest scores above ``-inf``, or -1."""
    values = [[jnp.full(rank, -jnp.inf, layout.dtype)] for _ in range(layout.n)]
    places = [[jnp.full(rank, -1, jnp.int32)] for _ in range(layout.n)]
    for x, start, group in zip(scores, _starts(layout), layout.group, strict=True):
        top, at = lax.top_k(x, min(rank, x.size))
        values[group].append(top)
        places[group].append(at + start)
    chosen = []
    for value, place in zip(values, places, strict=True):
        top, at = lax.top_k(jnp.concatenate(value), rank)
        chosen.append(jnp.where(top > -jnp.inf, jnp.concatenate(place)[at], -1))
    return jnp.stack(chosen)


def _sample(key: jax.Array, size: jax.Array, *, rank: int) -> jax.Array:
    """``rank`` different numbers below ``size``, uniformly; -1 for what a smaller size lacks."""
    count = jnp.minimum(rank, size)

    def body(i, chosen):
        last = size - count + i
        drawn = jax.random.randint(jax.random.fold_in(key, i), (), 0, jnp.maximum(last, 0) + 1)
        drawn = jnp.where(jnp.any(chosen == drawn), last, drawn)
        return chosen.at[i].set(jnp.where(i < count, drawn, -1).astype(jnp.int32))

    return lax.fori_loop(0, rank, body, jnp.full(rank, -1, jnp.int32))


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
    """``1 / sqrt(n)``, and 0 where ``n`` is."""
    return linalg.safe_divide(1.0, jnp.sqrt(counts))
