"""Bases whose directions are coordinates: indices instead of vectors."""

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
      rows: the running diagonal of the curvature, ``(1, size)`` a piece; ``()`` where none is
        kept, because some checkpoint formats take no empty arrays.
      indices: the coordinates ``(n, r)``, counted through the group's leaves; -1 in dead slots.
      lam: the diagonal ``(n, r)`` at the coordinates, 0 in dead slots; 1 where none is kept.
      updates: number ``(n,)`` of corrections absorbed so far.
    """

    rows: Any
    indices: jax.Array
    lam: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Selection(Basis):
    """``rank`` coordinates: projecting gathers, unprojecting scatters, ``C_ij = [i is j]``.

    Args:
      rank: number ``r`` of coordinates, at least 1.
    """

    rank: int

    def __post_init__(self):
        fix_size(self, "rank")

    @property
    def period(self) -> int:
        """Number of corrections after which a regular schedule begins again; 1 without one."""
        return 1

    @abc.abstractmethod
    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """Rows or ``()``, indices ``(n, r)`` and ``lam`` ``(n, r)`` after a correction.

        The fourth result says for every group, ``(n,)``, whether all of it is finite.
        """

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
            pairs = zip(layout.to_pieces(ok), rows, layout.stored(state.rows), strict=True)
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
            for v, at, size in zip(layout.to_pieces(u), places, layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RandomPermutation(Selection):
    """Coordinates drawn uniformly without replacement.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.RandomPermutation(2)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.Sign())
      >>> state = tx.init(jnp.zeros(5))
      >>> updates, state = tx.update(jnp.ones(5), state)
      >>> print(updates.sum())                    # two of the five coordinates move
      2.0

    Args:
      rank: number ``r`` of coordinates, at least 1. Of a smaller group all are taken.
      update_every: number of updates of the basis from one draw to the next, at least 1, default 1;
        ``None`` keeps the first draw.

    Raises:
      ValueError: for a rank or ``update_every`` below 1; by ``init``, for groups of 2^31 entries.

    Cost: memory ``r``; a step ``O(r)``, a draw ``r²``, whatever ``d`` is.

    Source: random coordinate descent, Nesterov, SIAM Journal on Optimization 2012; the draw is
    Floyd's, Bentley and Floyd, "A sample of brilliance", 1987.
    """

    update_every: int | None = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        super().__post_init__()
        if self.update_every is not None:
            check_count("RandomPermutation", "update_every", self.update_every)

    @property
    def period(self) -> int:
        return self.update_every or 1

    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ):
        drawn = jax.vmap(partial(_sample, rank=self.rank))(
            jax.random.split(key, layout.n), jnp.asarray(layout.dims)
        )
        index = jnp.where(is_due(state.updates, self.update_every)[:, None], drawn, state.indices)
        return (), index, (index >= 0).astype(layout.dtype), jnp.ones(layout.n, bool)


@dataclasses.dataclass(frozen=True)
class FromDiagonal(Selection):
    """Coordinates that are chosen by the curvature's running diagonal ``v``; see `TopK`.

    Args:
      beta: decay of the diagonal per correction, in [0, 1), default 0.99; ``None`` sums.
    """

    beta: float | None = 0.99

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None:
            check_decay(type(self).__name__, "beta", self.beta)

    @abc.abstractmethod
    def scores(self, layout: Layout, sizes: Vector, key: jax.Array) -> Vector:
        """One score for every entry, from ``|v|``; the ``rank`` largest scores are chosen."""

    def choose(
        self, layout: Layout, state: SelectionState, correction: SymmetricCorrection, key: jax.Array
    ):
        decay, gain = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        rows = [
            decay * v + gain * weigh(w, jnp.square(y.astype(layout.dtype)))[None]
            for v, w, y in zip(
                layout.stored(state.rows),
                layout.to_pieces(correction.weights),
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
class TopK(FromDiagonal):
    r"""The coordinates in which the curvature's running diagonal is largest.

    .. math:: v \leftarrow \beta v + (1 - \beta) \sum_j w_j\, y_j \circ y_j, \qquad
              i_1, \dots, i_r = \mathrm{top}_r\, |v|, \qquad \lambda_k = v_{i_k}

    With `Covariance` ``v`` is the mean square of every gradient entry, and ``LInvSqrt`` is RMSprop
    on the ``r`` largest. Coordinates whose gradient was always zero are never chosen.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.TopK(2), lro.inner.Sign())
      >>> state = tx.init(jnp.zeros(4))
      >>> updates, state = tx.update(jnp.array([0.1, -3., 2., 0.]), state)
      >>> print(updates)
      [ 0. -1.  1.  0.]

    Args:
      rank: number ``r`` of coordinates, at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.99; ``None`` sums. An average
        starts at zero and is divided by ``1 - beta^n`` to make up for that.

    Raises:
      ValueError: for a rank below 1 or a ``beta`` out of range; by ``init``, for groups of 2^31
        entries.

    Cost: memory ``d``; a step one pass over ``v`` and the selection of ``r`` entries from it.

    Source: the original LRE's basis of that name, which takes the coordinates from the last
    correction alone (``beta=0``).
    """

    def scores(self, layout: Layout, sizes: Vector, key: jax.Array) -> Vector:
        return sizes


@dataclasses.dataclass(frozen=True)
class WeightedPermutation(FromDiagonal):
    r"""Coordinates drawn without replacement, with probabilities in proportion to ``|v|^power``.

    .. math:: i_1, \dots, i_r = \mathrm{top}_r\,(p \log |v| + \mathrm{gumbel})

    is such a draw, where ``v`` is the running diagonal of `TopK` and ``p`` is ``power``. Every
    update of the basis draws anew.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.WeightedPermutation(2, power=50.0)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.Sign())
      >>> state = tx.init(jnp.zeros(4))
      >>> updates, state = tx.update(jnp.array([0.1, -3., 2., 0.]), state)
      >>> print(updates)                          # so high a power is nearly `TopK`
      [ 0. -1.  1.  0.]

    Args:
      rank: number ``r`` of coordinates, at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.99; ``None`` sums.
      power: exponent of the probabilities, at least 0, default 1/2: 1/2 draws by the size of a
        gradient's entries, 1 by its square, 0 evenly.

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


def _starts(layout: Layout) -> list[int]:
    """The first coordinate of every piece, counted through its group."""
    starts, filled = [], [0] * layout.n
    for size, group in zip(layout.sizes, layout.group, strict=True):
        starts.append(filled[group])
        filled[group] += size
    return starts


def _local(layout: Layout, index: jax.Array) -> list[jax.Array]:
    """Coordinates ``(r,)`` of each leaf, from those of its group; its size for other leaves'."""
    local = [at - first for at, first in zip(layout.to_pieces(index), _starts(layout), strict=True)]
    return [
        jnp.where((at >= 0) & (at < size) & (of >= 0), at, size)
        for at, of, size in zip(local, layout.to_pieces(index), layout.sizes, strict=True)
    ]


def weigh(weights: jax.Array, columns: jax.Array) -> jax.Array:
    """``sum_j w_j y_j``; a column that is switched off may hold anything."""
    return jnp.einsum("k,ks->s", weights, jnp.where(weights[:, None] != 0, columns, 0))


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries ``(r,)`` of a leaf's vector, or ``(r, k)`` of its columns; 0 beyond its end."""
    if x.shape[-1] == 0:  # XLA does not gather from an array without entries
        return jnp.zeros((at.shape[0], *x.shape[:-1]), x.dtype)
    return x.at[..., at].get(mode="fill", fill_value=0).T


def _largest(layout: Layout, rank: int, scores: Vector) -> jax.Array:
    """The ``rank`` coordinates of each group with the largest scores above ``-inf``, or -1."""
    values = [[jnp.full(rank, -jnp.inf, layout.dtype)] for _ in range(layout.n)]
    places = [[jnp.full(rank, -1, jnp.int32)] for _ in range(layout.n)]
    for x, first, group in zip(scores, _starts(layout), layout.group, strict=True):
        top, at = lax.top_k(x, min(rank, x.size))
        values[group].append(top)
        places[group].append(at + first)
    chosen = []
    for value, place in zip(values, places, strict=True):
        top, at = lax.top_k(jnp.concatenate(value), rank)
        chosen.append(jnp.where(top > -jnp.inf, jnp.concatenate(place)[at], -1))
    return jnp.stack(chosen)


def _sample(key: jax.Array, size: jax.Array, *, rank: int) -> jax.Array:
    """``rank`` different numbers below ``size``, uniformly; padded with -1 if there are fewer."""
    count = jnp.minimum(rank, size)

    def body(i, chosen):
        last = size - count + i
        drawn = jax.random.randint(jax.random.fold_in(key, i), (), 0, jnp.maximum(last, 0) + 1)
        drawn = jnp.where(jnp.any(chosen == drawn), last, drawn)
        return chosen.at[i].set(jnp.where(i < count, drawn, -1).astype(jnp.int32))

    return lax.fori_loop(0, rank, body, jnp.full(rank, -1, jnp.int32))
