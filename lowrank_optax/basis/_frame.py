"""Frame: lazily rotated orthonormal rows, the form of every basis that tracks a subspace."""

import abc
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, fix_size
from lowrank_optax._core.layout import Layout, cast_like, combine
from lowrank_optax._core.loops import for_range, now_and_then
from lowrank_optax._core.rows import rewrite, write
from lowrank_optax._core.types import BasisUpdate, Columns, SymmetricCorrection, Vector
from lowrank_optax.basis._basis import Regularized


class FrameState(NamedTuple):
    """State of a `Frame` for ``n`` groups.

    Attributes:
      rows: stored rows ``W``, ``(m, size)`` a piece: ``r`` rotated rows, then the columns that
        came since the rotation.
      gram: ``K = W W^T``, ``(n, m, m)``, measured on what is stored; 0 for rows not in use.
      t: the matrix ``T`` of ``Q^T = T W``, ``(n, r, m)``.
      lam: eigenvalues ``(n, r)`` as the method keeps them, in units of the curvature; 0 in dead
        slots.
      fill: number ``(n,)`` of the last ``m - r`` rows that are in use.
      columns: number ``(n,)`` of columns absorbed so far.
      updates: number ``(n,)`` of corrections absorbed so far.
      memory: the method's own memory, with a leading axis of groups.
    """

    rows: Any
    gram: jax.Array
    t: jax.Array
    lam: jax.Array
    fill: jax.Array
    columns: jax.Array
    updates: jax.Array
    memory: Any


class Seen(NamedTuple):
    """A correction in the coordinates ``[Q, fresh]``, for one group; see `Frame.turn`.

    Here and in `Turn` ``r`` is `Frame.slots`: the rank and the directions that a method keeps for
    itself.

    Attributes:
      y: the columns, ``(r + k, k)``. The first ``r`` coordinates are ``Q^T y``.
      weights: weights ``(k,)`` of the columns, 0 for a column that is switched off.
      fresh: booleans ``(k,)``: which of the last ``k`` coordinates are directions at all.
      initial: curvature assumed along fresh directions, a number.
      first: whether nothing was absorbed before.
      decays: whether averages decay with this chunk: they do with a correction's first one.
      live: booleans ``(r,)``: which slots of the basis are in use.
      columns: number of columns absorbed before.
      key: a random key of this group and step.
    """

    y: jax.Array
    weights: jax.Array
    fresh: jax.Array
    initial: jax.Array
    first: jax.Array
    decays: bool
    live: jax.Array
    columns: jax.Array
    key: jax.Array

    def seated(self, rank: int) -> jax.Array:
        """The old basis with fresh directions in its dead slots: rows ``(rank, r + k)``."""
        live = self.live[:rank, None]
        turn = jnp.cumsum(~live)[:, None] == jnp.cumsum(self.fresh)[None]
        old = jnp.eye(rank, self.live.shape[0], dtype=bool) & live
        return jnp.concatenate([old, ~live & self.fresh[None] & turn], axis=1).astype(self.y.dtype)


class Turn(NamedTuple):
    """What a method makes of a correction.

    Attributes:
      z: the new basis ``(r, r + k)`` in the coordinates ``[Q, fresh]``: orthonormal rows, and zero
        rows in dead slots.
      lam: eigenvalues ``(r,)``, exactly 0 in dead slots and nowhere else.
      memory: the method's memory after the correction.
    """

    z: jax.Array
    lam: jax.Array
    memory: Any


@dataclasses.dataclass(frozen=True)
class Frame(Regularized):
    r"""Orthonormal ``Q^T = T W`` whose rotations are lazy: the base of the subspace trackers.

    With ``a = Q^T y`` and the residual ``rho = y - Q a``, a method (`turn`) says which combinations
    of ``[Q, rho/‖rho‖]`` make the new basis; all of that is small. New columns are appended to
    ``W``, and only ``T`` is rotated. After ``buffer`` columns ``W <- T W`` is computed in place.

    A residual below ``sqrt(1000 eps)`` of its column counts as inside the span. A residual that is
    too small for a Gram matrix to resolve is computed as a vector, which costs four more passes
    over the rows; a stream with little noise needs that often. A correction of more columns than
    ``buffer`` is absorbed in chunks of ``buffer``, and the basis is truncated after each chunk.

    A method of your own is a frozen dataclass that defines `turn`.

    Args:
      rank: number ``r`` of directions, at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.99; ``None`` sums.
      buffer: number of columns between two rotations of the rows, at least 1; by default
        ``max(8, rank // 3)``. ``m = r + buffer`` rows are stored.
    """

    rank: int
    beta: float | None = 0.99
    buffer: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        Regularized.__post_init__(self)
        fix_size(self, "rank")
        if self.beta is not None:
            check_decay(type(self).__name__, "beta", self.beta)
        if self.buffer is not None:
            fix_size(self, "buffer")

    @abc.abstractmethod
    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        """The new basis of one group, in the coordinates of the old one and the new directions.

        Args:
          memory: the method's memory.
          lam: eigenvalues ``(r,)`` before, 0 in dead slots.
          seen: the correction in the coordinates ``[Q, fresh]``.
          signed: whether weights can be negative; known before tracing.

        Returns:
          `Turn`. What is not finite in it leaves the group as it was.
        """

    def init_memory(self, dtype: Any) -> Any:
        """The method's memory of one group before anything was seen."""
        return ()

    def memory_after(self, memory: Any, lam: jax.Array, count: jax.Array) -> Any:
        """The memory of one group as if ``count`` columns had been seen before.

        For a state that goes on from given eigenpairs. ``lam`` are the columns' mean squares along
        the rows, the largest first, of any number; ``memory`` is what absorbing these gave.
        """
        return memory

    @property
    def slots(self) -> int:
        """Number of directions that are kept: the basis, then those of the method's own."""
        return self.rank

    @property
    def capacity(self) -> int:
        """Number of columns that fit between two rotations.

        By default it is about a third of the rank. A larger buffer means more rows to read in every
        step, a smaller one more rotations.
        """
        return self.buffer or max(8, self.rank // 3)

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> FrameState:
        n, r, m = layout.n, self.slots, self.slots + self.capacity
        zeros = lambda *shape: jnp.zeros((n, *shape), layout.dtype)
        count = lambda: jnp.zeros(n, jnp.int32)
        memory = jax.tree.map(
            lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), self.init_memory(layout.dtype)
        )
        return FrameState(
            layout.store(layout.zeros(m)),
            zeros(m, m),
            zeros(r, m),
            zeros(r),
            count(),
            count(),
            count(),
            memory,
        )

    def absorb(
        self,
        layout: Layout,
        state: FrameState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        """Absorbs a correction in chunks of what fits between two rotations."""
        rank, size = self.rank, self.capacity
        count = correction.weights.shape[1]

        def part(start, width: int) -> SymmetricCorrection:
            cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
            return correction._replace(
                columns=[cut(c, axis=0) for c in correction.columns],
                weights=cut(correction.weights, axis=1),
            )

        def more(i, carry: BasisUpdate, width: int = size) -> BasisUpdate:
            turn = jax.random.fold_in(key, i - 1)
            new = self._chunk(layout, carry.state, part(i * size, width), accept, turn, False)
            u = lax.dynamic_update_slice_in_dim(new.c @ carry.u, new.u, i * size, 2)
            return BasisUpdate(new.state, new.c @ carry.c, u, carry.failed | new.failed)

        done = self._chunk(layout, state, part(0, min(size, count)), accept, key, True)
        done = done._replace(u=jnp.pad(done.u, ((0, 0), (0, 0), (0, max(0, count - size)))))
        whole, rest = divmod(count, size)
        if whole > 1:
            done = for_range(1, whole, more, done)
        if rest and whole:
            done = more(whole, done, rest)
        state = done.state
        return BasisUpdate(
            state._replace(updates=linalg.tally(state.updates, accept & ~done.failed)),
            done.c[:, :rank, :rank],
            done.u[:, :rank],
            done.failed,
        )

    def measured(self, state: FrameState) -> jax.Array:
        return state.lam[:, : self.rank]

    def project(self, layout: Layout, state: FrameState, vector: Vector | Columns) -> jax.Array:
        return super().project(layout, state._replace(t=state.t[:, : self.rank]), vector)

    def unproject(self, layout: Layout, state: FrameState, u: jax.Array) -> Vector | Columns:
        return super().unproject(layout, state._replace(t=state.t[:, : self.rank]), u)

    def _chunk(
        self,
        layout: Layout,
        state: FrameState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
        decays: bool,
    ) -> BasisUpdate:
        columns, weights = correction.columns, correction.weights
        k = weights.shape[1]
        state = self._rotate(layout, state, accept & (state.fill + k > self.capacity))
        rows = layout.stored(state.rows)
        columns = cast_like(columns, rows)
        gram = layout.gram(columns)
        # Scaling by powers of two rounds nothing, and keeps rows and Gram matrix near one.
        norms = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
        scale = jnp.where(
            norms > 0, jnp.exp2(-jnp.round(jnp.log2(jnp.where(norms > 0, norms, 1)))), 0
        )
        # In float16 the scale of a short column would be infinite.
        columns = [
            (c.astype(layout.dtype) * s[:, None]).astype(c.dtype)
            for c, s in zip(columns, layout.to_pieces(scale), strict=True)
        ]
        s = layout.dot(rows, columns)
        gram = gram * scale[:, :, None] * scale[:, None, :]
        initial = correction.initial
        initial = jnp.zeros(layout.n, layout.dtype) if initial is None else initial
        new, step = jax.vmap(partial(self._absorb, signed=correction.signed, decays=decays))(
            state._replace(rows=()),
            s,
            gram,
            scale,
            weights,
            accept,
            initial,
            jax.random.split(key, layout.n),
        )
        rows = write(rows, layout, step.slots, columns)
        rows, gram, t = self._refine(layout, (rows, new.gram, new.t), columns, state, step)
        return BasisUpdate(
            new._replace(rows=layout.store(rows), gram=gram, t=t), step.c, step.u, step.failed
        )

    def _rotate(self, layout: Layout, state: FrameState, when: jax.Array) -> FrameState:
        """``W <- T W`` in place for the groups in ``when``; then ``K`` is measured anew."""
        r, m = self.slots, self.slots + self.capacity
        each = layout.to_pieces(state.t)
        rows, measured, _ = rewrite(
            layout.stored(state.rows),
            layout,
            when,
            r,
            lambda leaf, _, block: combine(each[leaf], block, layout.dtype),
        )
        gram = jnp.zeros((layout.n, m, m), layout.dtype).at[:, :r, :r].set(measured)
        live = (state.lam != 0).astype(layout.dtype)
        t = jnp.zeros((layout.n, r, m), layout.dtype).at[:, :, :r].set(jax.vmap(jnp.diag)(live))
        t = jax.vmap(linalg.orthonormalize)(t, gram)
        pick = lambda a, b: jnp.where(when.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        return state._replace(
            rows=layout.store(rows),
            gram=pick(gram, state.gram),
            t=pick(t, state.t),
            fill=pick(jnp.zeros_like(state.fill), state.fill),
        )

    def _refine(self, layout: Layout, carry, columns: Columns, old: FrameState, step: "_Step"):
        """Replaces new rows by explicit residuals where a Gram matrix is too coarse for them.

        Subtracts twice and measures, which is enough; four passes over the rows, rarely.
        """
        m = self.slots + self.capacity
        slots = jnp.where(step.refine[:, None], step.slots, m)
        used = (jnp.diagonal(old.gram, axis1=1, axis2=2) > 0)[..., None]
        transposed = lambda x: jnp.swapaxes(x, 1, 2)

        def less(mix, vectors, weights, rows):
            """``mix V - weights W``: the only arrays of a vector's size that are made here."""
            inside = layout.combine(weights, rows)
            return [
                f @ v.astype(layout.dtype) - x
                for f, v, x in zip(layout.to_pieces(mix), vectors, inside, strict=True)
            ]

        def measured(vectors, rows):
            """The factor that makes vectors orthonormal that nearly are, and the result's products.

            A step of Newton and Schulz, as in `linalg.orthonormalize`.
            """
            gram = layout.gram(vectors)
            unit = 1.5 * jnp.eye(slots.shape[1], dtype=layout.dtype)[None] - 0.5 * gram
            s = jnp.where(used, layout.dot(rows, vectors) @ transposed(unit), 0)
            return unit, unit @ gram @ transposed(unit), s

        def body(_, carry):
            rows, gram, t = carry
            rest = less(step.mix, columns, step.mix @ transposed(step.alpha), rows)
            unit, _, s = measured(rest, rows)
            again = jnp.einsum("nlk,nrl,nrm->nkm", s, old.t, old.t)
            rest = less(unit, rest, again, rows)
            unit, corner, s = measured(rest, rows)
            # Slots that depend on the last read let XLA write in place.
            at = jnp.where(jnp.all(jnp.isfinite(s), axis=(1, 2))[:, None], slots, m)
            gram, t = jax.vmap(_remeasure)(gram, t, at, s, corner)
            rest = [f @ v for f, v in zip(layout.to_pieces(unit), rest, strict=True)]
            return write(rows, layout, at, rest), gram, t

        return now_and_then(jnp.any(step.refine), body, carry)

    def _absorb(
        self, old: FrameState, s, gram, scale, weights, accept, initial, key, *, signed, decays
    ):
        """One group: ``s = W Y`` is ``(m, k)``, of columns scaled by ``scale``."""
        r, m, k = self.slots, self.slots + self.capacity, weights.shape[0]
        used, on = jnp.diagonal(old.gram) > 0, weights != 0
        s = jnp.where(used[:, None] & on[None], s, 0)
        gram = jnp.where(on[:, None] & on[None], gram, 0)
        a = old.t @ s
        a = a + old.t @ (s - old.gram @ (old.t.T @ a))  # twice is enough
        alpha = old.t.T @ a
        cross = alpha.T @ s
        rest = gram - cross - cross.T + alpha.T @ old.gram @ alpha
        size, v = linalg.eigh(linalg.symmetrize(rest))
        fresh = size > 1e3 * jnp.finfo(s.dtype).eps
        root = jnp.where(fresh, jnp.sqrt(jnp.where(fresh, size, 1)), 0)
        mix = linalg.safe_divide(v, root[:, None])
        y = linalg.safe_divide(jnp.concatenate([a, root[:, None] * v]), scale)
        z, lam, memory = self.turn(
            old.memory,
            old.lam,
            Seen(
                y, weights, fresh, initial, old.updates == 0, decays, old.lam != 0, old.columns, key
            ),
            signed,
        )

        kept = [x for x in jax.tree.leaves(memory) if jnp.issubdtype(x.dtype, jnp.inexact)]
        # A column without a finite length has the scale 0, which makes ``y`` zero.
        fine = linalg.finite(gram, lam, z, y, *kept)
        ok = accept & fine
        # The new directions as combinations of rows; rounding in K grows by their size.
        behind = mix @ alpha.T
        refine = ok & (jnp.max(jnp.sum(behind**2, axis=1) + jnp.sum(mix**2, axis=1)) > 10)
        slots = jnp.where(ok & jnp.any(fresh), r + old.fill + jnp.arange(k), m)
        place = jax.nn.one_hot(slots, m, dtype=s.dtype)
        # The new rows are the columns themselves, or their residuals mix (Y - W alpha).
        x = jnp.where(refine, mix @ (s.T - alpha.T @ old.gram), s.T)
        corner = jnp.where(refine, jnp.diag(fresh.astype(s.dtype)), gram)
        grown = old.gram + place.T @ x + x.T @ place + place.T @ corner @ place
        ahead = jnp.where(refine, jnp.eye(k, dtype=s.dtype), mix)
        behind = jnp.where(refine, 0, behind)
        t = z[:, :r] @ old.t + z[:, r:] @ (ahead @ place - behind)
        new = old._replace(
            gram=grown,
            t=linalg.orthonormalize(t, grown),
            lam=lam,
            memory=memory,
            fill=old.fill + jnp.sum(slots < m, dtype=jnp.int32),
            columns=linalg.tally(old.columns, jnp.sum(weights != 0)),
        )
        new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        c = jnp.where(ok, z[:, :r], jnp.eye(r, dtype=s.dtype))
        return new, _Step(slots, refine, alpha, mix, c, z @ y, accept & ~fine)


class _Step(NamedTuple):
    """What is still to be done to the rows after the small algebra, and what the engine is told."""

    slots: jax.Array
    refine: jax.Array
    alpha: jax.Array
    mix: jax.Array
    c: jax.Array
    u: jax.Array
    failed: jax.Array


def _remeasure(gram, t, slots, s, corner):
    """One group's ``K`` with the measured products of the refined rows, and a ``T`` that fits."""
    place = jax.nn.one_hot(slots, gram.shape[0], dtype=gram.dtype)
    keep = 1 - jnp.sum(place, axis=0)
    cross = keep[:, None] * (s @ place)
    new = keep[:, None] * gram * keep[None] + cross + cross.T + place.T @ corner @ place
    hit = jnp.any(slots < gram.shape[0])  # a group without refined rows may hold NaN here
    return jnp.where(hit, new, gram), jnp.where(hit, linalg.orthonormalize(t, new), t)
