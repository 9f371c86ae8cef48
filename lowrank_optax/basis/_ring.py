"""Ring: a window of columns with its Gram matrix, the form of every basis that keeps columns."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import fix_size
from lowrank_optax._core.layout import Layout, cast_like
from lowrank_optax._core.rows import write
from lowrank_optax._core.types import BasisUpdate, Columns, SymmetricCorrection
from lowrank_optax.basis._basis import Basis, Regularization
from lowrank_optax.basis.full import dense


class RingState(NamedTuple):
    """State of a `Ring` for ``n`` groups.

    Attributes:
      rows: the window ``W``, ``(m, size)`` a piece.
      gram: the Gram matrix ``K = W W^T``, ``(n, m, m)``.
      weights: weights ``(n, m)`` of the rows, 0 while a row is empty.
      head: index ``(n,)`` of the row that is replaced next, where rows are replaced in turn.
      t: the matrix ``T`` of ``Q^T = T W``, ``(n, m, m)``.
      lam: eigenvalues ``(n, m)`` in units of the curvature, 0 in dead slots.
      memory: the method's own memory.
    """

    rows: Any
    gram: jax.Array
    weights: jax.Array
    head: jax.Array
    t: jax.Array
    lam: jax.Array
    memory: Any = ()


@dataclasses.dataclass(frozen=True)
class Ring(Basis):
    """Columns kept as rows of ``W`` beside ``K = W W^T``, and ``Q^T = T W`` from ``K`` alone.

    A new column changes one row and one column of ``K``. These are the product ``W y``, which the
    projection needs anyway, so that nothing large is ever factored.

    Args:
      rank: number of columns that are kept, ``m = r``, at least 1.
    """

    rank: int

    def __post_init__(self):
        fix_size(self, "rank")

    @abc.abstractmethod
    def factor(self, state: RingState, signed: bool) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues ``(m,)`` and ``T`` of one group's window, from its Gram matrix.

        ``state.rows`` is the window as one array ``(m, d)`` where ``d < m``, or ``()``.
        """

    def place(self, old: RingState, gram: jax.Array, weights: jax.Array) -> jax.Array:
        """Rows ``(k,)`` of one group in which columns go, by default the oldest; ``m`` drops one.

        ``gram``, ``(k, k)``, is that of the columns. ``weights``, ``(k,)``, are 0 for columns that
        are switched off.
        """
        return oldest(old, weights)

    @property
    def renews(self) -> bool:
        """Whether a correction empties the window before it goes in."""
        return False

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout, key: jax.Array) -> RingState:
        n, m = layout.n, self.rank
        square = lambda: jnp.zeros((n, m, m), layout.dtype)
        line = lambda: jnp.zeros((n, m), layout.dtype)
        return RingState(
            layout.store(layout.zeros(m)),
            square(),
            line(),
            jnp.zeros(n, jnp.int32),
            square(),
            line(),
        )

    def absorb(
        self,
        layout: Layout,
        state: RingState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        rows = layout.stored(state.rows)
        columns = cast_like(correction.columns, rows)
        absorb = lambda *each: self._absorb(*each, signed=correction.signed)
        small, slots, c, u, failed = jax.vmap(absorb)(
            state._replace(rows=_short(layout, rows, self.rank), memory=()),
            layout.dot(rows, columns),
            layout.gram(columns),
            _short(layout, columns, self.rank),
            correction.weights,
            accept,
        )
        rows = write(rows, layout, slots, columns)
        return BasisUpdate(
            small._replace(rows=layout.store(rows), memory=state.memory), c, u, failed
        )

    def _absorb(self, old: RingState, s, gram, y, weights, accept, *, signed):
        """One group: ``s = W Y`` ``(m, k)``, ``gram = Y^T Y`` ``(k, k)``, and ``y`` of `_short`."""
        m = self.rank
        slots = self.place(old, gram, weights)
        taken = slots < m
        place = jax.nn.one_hot(slots, m, dtype=s.dtype)
        keep = (0 if self.renews else 1) * (1 - jnp.sum(place, axis=0))
        # Columns that are switched off may hold anything, so they are set to zero.
        incoming = place.T @ jnp.where(taken[:, None], s.T, 0)
        cross = keep[:, None] * old.gram + incoming  # W_new W_old^T
        after = keep[:, None] * s + place.T @ jnp.where(taken[:, None], gram, 0)  # W_new Y
        k = cross * keep[None] + jnp.where(taken, after, 0) @ place
        put = lambda w, y: keep[:, None] * w + place.T @ jnp.where(taken[:, None], y, 0)
        new = old._replace(
            rows=jax.tree.map(put, old.rows, y),
            gram=k,
            weights=keep * old.weights + place.T @ weights,
            head=(old.head + jnp.sum(taken, dtype=jnp.int32)) % m,
        )
        lam, t = self.factor(new, signed)
        new = new._replace(lam=lam, t=t)
        fine = linalg.finite(k, lam, t)
        ok = accept & fine
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        c = jnp.where(ok, t @ cross @ old.t.T, jnp.eye(m, dtype=s.dtype))
        u = jnp.where(ok, t @ after, old.t @ s)
        return new, jnp.where(ok, slots, m), c, u, accept & ~fine


def oldest(old: RingState, weights: jax.Array) -> jax.Array:
    """The oldest rows of one group, one for each of the columns ``(k,)`` that are switched on."""
    m, valid = old.weights.shape[0], weights != 0
    order = jnp.cumsum(valid)
    order = order - jnp.maximum(order[-1] - m, 0)  # of more than m only the last stay
    return jnp.where(valid & (order > 0), (old.head + order - 1) % m, m)


def _short(layout: Layout, columns: Columns, height: int) -> Any:
    """Columns as one array ``(n, k, d)`` if ``d`` is below ``height``, else ``()``."""
    return dense(layout, columns) if max(layout.dims) < height else ()


def window_eigh(gram: jax.Array, scale: jax.Array, window: Any) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, descending, and eigenvectors as rows of ``S K S``, ``S = diag(scale)``.

    If the window ``(m, d)`` is given, they come from the singular values and vectors of ``S W``,
    since that does not square the condition number. There are ``d``; the other rows are zero.
    """
    if isinstance(window, tuple):
        return linalg.eigh(scale[:, None] * gram * scale[None])
    s, v = linalg.svd(scale[:, None] * window)
    more = len(gram) - len(s)
    return jnp.pad(s**2, (0, more)), jnp.pad(v, ((0, more), (0, 0)))


def spectral_factor(
    keep: Regularization, gram: jax.Array, weights: jax.Array, signed: bool, window: Any = ()
) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and ``T`` of ``W^T diag(weights) W`` in descending order of size, from ``K``."""
    scale = jnp.sqrt(jnp.abs(weights))
    lam, v = window_eigh(gram, scale, window)
    if signed:
        # W^T S W with S = diag(sign w): S in the window's own orthonormal coordinates.
        live = keep.apply(lam, lam > 0)[1]
        half = jnp.where(live, jnp.sqrt(jnp.where(live, lam, 1)), 0)[:, None] * v
        t = jnp.where(live, jax.lax.rsqrt(jnp.where(live, lam, 1)), 0)[:, None] * v * scale[None]
        lam, z = linalg.eigh_by_size((half * jnp.sign(weights)) @ half.T)
        lam, live = keep.apply(lam, lam != 0)
        return lam, jnp.where(live[:, None], z @ t, 0)
    kept, live = keep.apply(lam, lam > 0)
    inverse = jnp.where(live, jax.lax.rsqrt(jnp.where(live, lam, 1)), 0)
    return kept, inverse[:, None] * v * scale[None]
