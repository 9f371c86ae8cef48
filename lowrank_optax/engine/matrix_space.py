"""All matrices of one shape: how a step reads, projects, turns and writes them."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import (
    BasisUpdate,
    Eigenbasis,
    Inner,
    SymmetricCorrection,
)
from lowrank_optax.basis import Basis, FullMatrix
from lowrank_optax.basis.full import FullMatrixState
from lowrank_optax.curvature.sides import SideCurvature
from lowrank_optax.engine.space import (
    Given,
    GroupState,
    LinearSpace,
    Seen,
    Turned,
    begin,
    carry,
    stayed,
)
from lowrank_optax.engine.stacks import Matrices


class Sides(NamedTuple):
    """States of the bases of both sides.

    Attributes:
      short: state of the basis of columns, of length ``a``; ``()`` without one.
      long: state of the basis of rows, of length ``b``; ``()`` without one.
    """

    short: Any
    long: Any


@dataclasses.dataclass(frozen=True)
class MatrixParts:
    """What the step of a matrix is made of.

    Attributes:
      short: basis of the shorter side, or ``None``.
      long: basis of the longer side, or ``None``.
      inner: the inner parts.
      curvature: what the bases learn from.
      largest: sides longer than this have no basis.
      dtype: dtype of the stored rows, or ``None`` for the leaf's.
    """

    short: Basis | None
    long: Basis | None
    inner: Inner
    curvature: SideCurvature
    largest: int | None
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixSpace(Matrices, LinearSpace):
    """Matrices in bases from `lowrank_optax.basis`, inner parts over the product of both sides."""

    parts: MatrixParts

    def kept_in(self, state: GroupState) -> "MatrixSpace":
        """The same in the dtypes of a state."""
        dtype = state.metrics.captured.dtype
        sides = ((self.columns, state.basis.short), (self.rows, state.basis.long))
        short, long = (one.kept_in(dtype, getattr(side, "rows", ())) for one, side in sides)
        return dataclasses.replace(self, columns=short, rows=long)

    @property
    def sides(self) -> tuple[tuple[Basis | None, Layout], ...]:
        """The bases of both sides, their ranks cut to what there is, with their layouts."""
        parts, layouts = self.parts, (self.columns, self.rows)
        short, long = (
            None if parts.largest is not None and layout.dims[0] > parts.largest else basis
            for basis, layout in zip((parts.short, parts.long), layouts, strict=True)
        )
        return (_cut(short, self.columns), self.columns), (_cut(long, self.rows), self.rows)

    def init(self, keys: Sequence[jax.Array]) -> GroupState:
        """The state before the first step."""
        bases = Sides(
            *(
                () if basis is None else basis.init(layout, k)
                for (basis, layout), k in zip(self.sides, keys, strict=True)
            )
        )
        sizes = [
            layout.dims[0] if basis is None else basis.coordinates(layout)
            for basis, layout in self.sides
        ]
        inner = self.parts.inner.init(self.shape[1] * math.prod(sizes), self.dtype)
        curvature = self.parts.curvature.init(jax.ShapeDtypeStruct(self.shape, self.dtype))
        return begin(self.n, self.dtype, curvature, bases, inner)

    # The phases ---------------------------------------------------------------------------------

    def look(self, g: jax.Array, square, accept, due, old: GroupState, given: Given) -> Seen:
        found, curvature = self.parts.curvature.measure(g, old.curvature, accept)
        pairs = ((found.short, found.short_weights), (found.long, found.long_weights))
        sides, turning, broken = [], jnp.zeros_like(due), jnp.zeros_like(due)
        for (basis, layout), state, (y, weights) in zip(self.sides, old.basis, pairs, strict=True):
            correction = SymmetricCorrection(
                [x.astype(t) for x, t in zip(y, layout.rows, strict=True)],
                jnp.ones(y.shape[:2], layout.dtype) if weights is None else weights,
                # Without it a full matrix would start as the identity, which rounds gradients away.
                initial=jnp.zeros(layout.n, layout.dtype),
            )
            # A matrix takes every gradient in, and turns now and then.
            if isinstance(basis, FullMatrix):
                state, ok, bad = basis.gather(layout, state, correction, due)
                turning, broken = turning | (ok & basis.turning(state)), broken | bad
            elif basis is not None:
                turning = due
            sides.append((state, correction))
        return Seen(g, square, accept, due, turning, broken, (sides, curvature, given.key))

    def still(self, seen: Seen, old: GroupState) -> Turned:
        sides, curvature, _ = seen.measured
        bare = Sides(*(_bare(state) for state, _ in sides))
        zeros = jnp.zeros(self.n, self.dtype)
        return Turned(bare, curvature, old.inner, jnp.zeros_like(seen.due), zeros)

    def absorb(self, seen: Seen, now: Turned) -> tuple[Turned, None]:
        sides, _, key = seen.measured
        done = [
            self._turn(basis, layout, state, gathered, correction, seen.due, k)
            for (basis, layout), state, (gathered, correction), k in zip(
                self.sides, now.basis, sides, jax.random.split(key), strict=True
            )
        ]
        failed = now.failed | done[0].failed | done[1].failed
        # Where one side fails, a full matrix on the other one stays, too.
        done = [self._stay(each, old, failed) for each, old in zip(done, now.basis, strict=True)]

        # A basis may have learned without turning. One that turned takes the inner state along,
        # also where the other side failed.
        has = [basis is not None for basis, _ in self.sides]
        moved, share = jnp.zeros_like(failed), jnp.ones(self.n, self.dtype)
        for (basis, _), old, each in zip(self.sides, now.basis, done, strict=True):
            if basis is not None:
                moved = moved | jnp.any(each.c != jnp.eye(each.c.shape[-1])[None], axis=(1, 2))
                share = share * stayed(each.c, basis.eigenbasis(old).live)
        moved = seen.due & moved
        changes = self._changes(
            [each.c if there else None for each, there in zip(done, has, strict=True)]
        )
        inner = jax.vmap(partial(carry, self.parts.inner))(changes, moved, now.inner)
        bases = Sides(*(each.state for each in done))
        change = jnp.where(moved, 1 - share, 0)
        return Turned(bases, now.curvature, inner, failed, change), None

    def _turn(self, basis, layout, state, gathered, correction, due, key) -> BasisUpdate:
        """One side's basis after it took its columns in."""
        if basis is None:
            nothing = jnp.zeros((self.n, 0, 0))
            return BasisUpdate(state, nothing, nothing, jnp.zeros_like(due))
        if isinstance(basis, FullMatrix):
            return basis.turn(gathered.matrix, state, due & basis.turning(state))
        return basis.absorb(layout, state, correction, due, key)

    def _stay(self, done: BasisUpdate, old: Any, failed: jax.Array) -> BasisUpdate:
        """A full matrix as it was where a side failed."""
        if not isinstance(old, FullMatrixState):
            return done
        keep = lambda a, b: jnp.where(jnp.reshape(failed, (-1, *[1] * (a.ndim - 1))), b, a)
        eye = jnp.eye(done.c.shape[-1], dtype=done.c.dtype)[None]
        return done._replace(state=jax.tree.map(keep, done.state, old), c=keep(done.c, eye))

    def _changes(self, changes: list[jax.Array | None]) -> tuple[Any, ...]:
        """The factors of the change of basis of ``m r_S r_L`` coordinates."""
        _, m, *sizes = self.shape
        if m == 1:
            return tuple(changes)
        # Of all factors one may be an identity that is not written out: that of the m matrices.
        eye = lambda size: jnp.broadcast_to(jnp.eye(size, dtype=self.dtype), (self.n, size, size))
        pairs = zip(changes, sizes, strict=True)
        return None, *(eye(size) if c is None else c for c, size in pairs)

    def settle(self, seen: Seen, now: Turned, old: GroupState, again: jax.Array) -> Turned:
        """The sides' states with their matrices, which took no gradient in where one failed."""
        sides, curvature, _ = seen.measured
        failed = now.failed | seen.broken
        whole = (
            _whole(failed, new, gathered, before)
            for new, (gathered, _), before in zip(now.basis, sides, old.basis, strict=True)
        )
        keep = lambda a, b: jnp.where(jnp.reshape(failed, (-1, *[1] * (a.ndim - 1))), b, a)
        curvature = jax.tree.map(keep, curvature, old.curvature)
        return now._replace(basis=Sides(*whole), curvature=curvature)

    def follow(self, seen: Seen, now: Turned) -> tuple[jax.Array, jax.Array]:
        return seen.g, seen.square

    def project(self, basis: Sides, g: jax.Array) -> jax.Array:
        """``Q_S^T G Q_L``, ``(n, m r_S r_L)``, 0 where it cannot be told from rounding.

        What is left of entries that are zero in truth, a part such as Adam would blow up.
        """
        n, m, a, b = self.shape
        (one, columns), (two, rows) = self.sides
        u = g
        if one is not None:
            y = jnp.reshape(jnp.swapaxes(u, 2, 3), (n, m * b, a))
            u = jnp.reshape(one.project(columns, basis.short, list(y)), (n, -1, m, b))
            u = jnp.swapaxes(u, 1, 2)
        if two is not None:
            size = u.shape[2]
            y = two.project(rows, basis.long, list(jnp.reshape(u, (n, m * size, b))))
            u = jnp.reshape(jnp.swapaxes(y, 1, 2), (n, m, size, -1))
        noise = 4 * jnp.finfo(u.dtype).eps * jnp.sqrt(self.square(g))
        u = jnp.where(jnp.abs(u) > self.each(noise), u, 0)
        return jnp.reshape(u, (n, -1))

    def unproject(self, basis: Sides, *us: jax.Array) -> list[jax.Array]:
        """``Q_S U Q_L^T``, ``(n, m, a, b)`` each."""
        return [self._unproject(basis, u) for u in us]

    def _unproject(self, basis: Sides, u: jax.Array) -> jax.Array:
        n, m, a, b = self.shape
        (one, columns), (two, rows) = self.sides
        height = a if one is None else one.coordinates(columns)
        u = jnp.reshape(u, (n, m, height, -1))
        if two is not None:
            y = two.unproject(rows, basis.long, jnp.reshape(u, (n, m * height, -1)))
            u = jnp.reshape(jnp.stack(y), (n, m, height, b))
        if one is not None:
            y = jnp.reshape(jnp.transpose(u, (0, 1, 3, 2)), (n, m * b, height))
            y = jnp.stack(one.unproject(columns, basis.short, y))
            u = jnp.swapaxes(jnp.reshape(y, (n, m, b, a)), 2, 3)
        return u

    def eigenbasis(self, basis: Sides) -> Eigenbasis:
        """Those of both sides multiplied; of one side spread over the other."""
        n, m, *_ = self.shape
        both = [
            Eigenbasis(
                jnp.ones((n, layout.dims[0]), layout.dtype), jnp.ones((n, layout.dims[0]), bool)
            )
            if side is None
            else side.eigenbasis(state)
            for (side, layout), state in zip(self.sides, basis, strict=True)
        ]
        power = 1.0 if any(side is None for side, _ in self.sides) else 0.5
        one, two = (jnp.maximum(side.lam, 0) ** power for side in both)
        lam = one[:, :, None] * two[:, None]
        live = both[0].live[:, :, None] & both[1].live[:, None]
        tile = lambda x: jnp.tile(jnp.reshape(x, (n, -1)), (1, m))
        return Eigenbasis(tile(lam), tile(live))


def _cut(basis: Basis | None, layout: Layout) -> Any:
    """The basis with no more rank than there are dimensions."""
    rank = getattr(basis, "rank", None)
    if rank is None or rank <= layout.dims[0]:
        return basis
    return dataclasses.replace(basis, rank=layout.dims[0])  # pyright: ignore[reportArgumentType]


def _bare(state: Any) -> Any:
    """A side's state as a loop carries it.

    XLA would decompose a matrix outside of the loop that leaves it as it is.
    """
    return state._replace(matrix=()) if isinstance(state, FullMatrixState) else state


def _whole(failed: jax.Array, new: Any, gathered: Any, old: Any) -> Any:
    """A side's state with its matrix, which where it failed, ``(n,)``, took no gradient in."""
    if not isinstance(new, FullMatrixState):
        return new
    return new._replace(
        matrix=jnp.where(failed[:, None, None], old.matrix, gathered.matrix),
        updates=jnp.where(failed, old.updates, new.updates),
    )
