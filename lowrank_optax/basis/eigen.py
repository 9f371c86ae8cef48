"""Eigen: the leading eigenpairs of a running average or sum, on lazily rotated rows."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax import _linalg
from lowrank_optax._tree import BLOCK, Layout, cast_like, repeat, write
from lowrank_optax._types import Absorbed, Columns, Eigenbasis, check_count, check_decay
from lowrank_optax.basis._basis import Basis, Spectrum, check_rank


class EigenState(NamedTuple):
    """State of `Eigen` for ``n`` groups.

    Attributes:
      rows: ``W``, ``(m, leaf.size)`` a leaf: ``r`` rotated rows, then the columns since.
      gram: ``K = W W^T``, ``(n, m, m)``, measured; 0 for rows not in use.
      t: ``(n, r, m)``, with ``Q^T = T W``.
      lam: ``(n, r)`` eigenvalues, 0 in dead slots; not corrected for the average's start.
      fill: ``(n,)`` how many of the last ``m - r`` rows are in use.
      columns: ``(n,)`` columns absorbed so far.
      updates: ``(n,)`` corrections absorbed so far.
    """

    rows: Any
    gram: jax.Array
    t: jax.Array
    lam: jax.Array
    fill: jax.Array
    columns: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Eigen(Basis, Spectrum):
    r"""The ``rank`` leading eigenpairs of ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``.

    ``B`` is truncated after every correction (Brand's update): with ``a = Q^T y`` and the residual
    ``rho = y - Q a``, ``[Q, rho/‖rho‖]`` is rotated by the eigenvectors of the small

    .. math:: \beta\,\mathrm{diag}(\lambda, 0) + (1-\beta)
              \begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}\begin{bmatrix} a \\ ‖\rho‖ \end{bmatrix}^T

    The rotation is lazy: ``Q^T = T W`` with new columns appended to ``W`` and only the small ``T``
    rotated; once ``buffer`` columns have come, ``W <- T W`` in place. A residual below ``sqrt(1000
    eps)`` of its column counts as inside the span; one below a tenth is made explicit, by one more
    pass, because a Gram matrix cannot resolve it.

    Args:
      rank: how many eigenpairs are kept, ``r``.
      beta: decay of the average; ``None`` sums instead. Averages are corrected for their start by
        ``1 - beta^n``, with ``n`` counting columns.
      buffer: columns between two rotations; by default about a third of the rank, which balances
        longer rows against more rotations. ``m = r + buffer``.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped. The first correction's are neither
        dropped nor damped.
      update_damping: added to the eigenvalues for the step alone. For the others see `GGT`.

    Raises:
      ValueError: for a rank or buffer below 1, or a ``beta`` or tolerance out of range.

    Cost: memory ``m d + m² + r m``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of
    size ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.
    """

    rank: int
    beta: float | None = 0.9
    buffer: int | None = dataclasses.field(default=None, kw_only=True)
    eig_tol: float = dataclasses.field(default=1e-4, kw_only=True)
    update_damping: float = dataclasses.field(default=1e-4, kw_only=True)

    def __post_init__(self):
        Spectrum.__post_init__(self)
        check_rank("Eigen", self.rank)
        if self.beta is not None:
            check_decay("Eigen", "beta", self.beta)
        if self.buffer is not None:
            check_count("Eigen", "buffer", self.buffer)

    @property
    def capacity(self) -> int:
        """Columns that fit between two rotations."""
        return self.buffer or max(8, self.rank // 3)

    def coordinates(self, layout: Layout) -> int:
        return self.rank

    def init(self, layout: Layout) -> EigenState:
        n, r, m = layout.n, self.rank, self.rank + self.capacity
        zeros = lambda *shape: jnp.zeros((n, *shape), layout.dtype)
        count = lambda: jnp.zeros(n, jnp.int32)
        return EigenState(layout.tree(layout.zeros(m)), zeros(m, m), zeros(r, m), zeros(r),
                          count(), count(), count())

    def absorb(self, layout: Layout, state: EigenState, columns: Columns, weights: jax.Array,
               accept: jax.Array, signed: bool = False) -> Absorbed:
        """In chunks of what fits between two rotations; the average decays with the first."""
        whole = None
        for start in range(0, weights.shape[1], self.capacity):
            chunk = slice(start, start + self.capacity)
            decay = (1.0 if self.beta is None else self.beta) if start == 0 else 1.0
            new = self._chunk(layout, state, [c[chunk] for c in columns], weights[:, chunk],
                              accept, signed, decay)
            if whole is not None:
                u = jnp.concatenate([new.c @ whole.u, new.u], axis=-1)
                new = Absorbed(new.state, new.c @ whole.c, u, whole.failed | new.failed)
            whole, state = new, new.state
        return whole._replace(state=state._replace(updates=state.updates + accept))

    def eigenbasis(self, state: EigenState) -> Eigenbasis:
        def view(lam, columns, updates):
            used, live = self.used(lam)
            used, live = jnp.where(updates > 1, used, lam), jnp.where(updates > 1, live, lam != 0)
            if self.beta is None:
                return used, live
            seen = 1 - jnp.asarray(self.beta, lam.dtype) ** columns
            return _linalg.safe_divide(used, seen), live

        return Eigenbasis(*jax.vmap(view)(state.lam, state.columns, state.updates))

    def _chunk(self, layout, state, columns, weights, accept, signed, decay):
        k = weights.shape[1]
        state = self._rotate(layout, state, accept & (state.fill + k > self.capacity))
        rows = layout.leaves(state.rows)
        columns = cast_like(columns, rows)
        gram = layout.gram(columns)
        # Scaling by powers of two rounds nothing, and keeps rows and Gram matrix near one.
        norms = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
        scale = jnp.where(norms > 0, jnp.exp2(-jnp.round(jnp.log2(jnp.where(norms > 0, norms, 1)))),
                          0)
        columns = [c * s[:, None].astype(c.dtype)
                   for c, s in zip(columns, layout.spread(scale), strict=True)]
        s = layout.dot(rows, columns)
        gram = gram * scale[:, :, None] * scale[:, None, :]
        new, step = jax.vmap(partial(self._absorb, signed=signed, decay=decay))(
            state._replace(rows=()), s, gram, scale, weights, accept)
        rows = write(rows, layout, step.slots, columns)
        rows = self._refine(layout, rows, columns, step)
        return Absorbed(new._replace(rows=layout.tree(rows)), step.c, step.u, step.failed)

    def _rotate(self, layout: Layout, state: EigenState, when: jax.Array) -> EigenState:
        """``W <- T W`` in place, block by block, for the groups that need it; ``K`` measured."""
        r, m = self.rank, self.rank + self.capacity
        rows, grams = [], []
        for w, t, go in zip(layout.leaves(state.rows), layout.spread(state.t), layout.spread(when),
                            strict=True):
            w, gram = _rotate_leaf(w, t, go, layout.dtype)
            rows.append(w)
            grams.append(gram)
        gram = jnp.zeros((layout.n, m, m), layout.dtype)
        gram = gram.at[:, :r, :r].set(layout.gather(grams, (r, r)))
        live = (state.lam != 0).astype(layout.dtype)
        t = jnp.zeros((layout.n, r, m), layout.dtype).at[:, :, :r].set(jax.vmap(jnp.diag)(live))
        t = jax.vmap(_linalg.orthonormalize)(t, gram)
        pick = lambda a, b: jnp.where(when.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        return state._replace(rows=layout.tree(rows), gram=pick(gram, state.gram),
                              t=pick(t, state.t), fill=pick(jnp.zeros_like(state.fill), state.fill))

    def _refine(self, layout: Layout, rows: Columns, columns: Columns, step: "_Step") -> Columns:
        """Replaces new rows by their residuals where these are small: one more pass, rarely."""
        m = self.rank + self.capacity
        k = step.slots.shape[1]

        def body(_, rows):
            inside = layout.combine(jnp.swapaxes(step.alpha, 1, 2), rows)
            mix = layout.spread(step.mix)
            rest = [n @ (c.astype(layout.dtype) - a)
                    for n, c, a in zip(mix, columns, inside, strict=True)]
            fix = 1.5 * jnp.eye(k, dtype=layout.dtype) - 0.5 * layout.gram(rest)
            rest = [f @ x for f, x in zip(layout.spread(fix), rest, strict=True)]
            return write(rows, layout, jnp.where(step.refine[:, None], step.slots, m), rest)

        return repeat(jnp.any(step.refine), body, rows)

    def _absorb(self, old: EigenState, s, gram, scale, weights, accept, signed, decay):
        """One group: ``s = W Y`` is ``(m, k)``, of columns scaled by ``scale``."""
        r, m, k = self.rank, self.rank + self.capacity, weights.shape[0]
        used = jnp.diagonal(old.gram) > 0
        s = jnp.where(used[:, None], s, 0)
        a = old.t @ s
        a = a + old.t @ (s - old.gram @ (old.t.T @ a))              # twice is enough
        alpha = old.t.T @ a
        cross = alpha.T @ s
        rest = gram - cross - cross.T + alpha.T @ old.gram @ alpha
        size, v = _linalg.eigh(_linalg.symmetrize(rest))
        fresh = size > 1e3 * jnp.finfo(s.dtype).eps
        root = jnp.where(fresh, jnp.sqrt(jnp.where(fresh, size, 1)), 0)
        mix = _linalg.safe_divide(v, root[:, None])
        y = _linalg.safe_divide(jnp.concatenate([a, root[:, None] * v]), scale)

        gain = 1.0 if self.beta is None else 1 - self.beta
        b = jnp.zeros((r + k, r + k), s.dtype).at[:r, :r].set(jnp.diag(decay * old.lam))
        b = b + gain * (y * weights) @ y.T
        lam, z = (_linalg.eigh_by_size if signed else _linalg.eigh)(_linalg.symmetrize(b))
        lam, z = lam[:r], z[:r]
        positive = lam != 0 if signed else lam > 0
        first = old.updates == 0
        floor = _linalg.regularize(lam, positive)
        kept = self.stored(lam, positive)
        lam = jnp.where(first, floor[0], kept[0])
        z = jnp.where(jnp.where(first, floor[1], kept[1])[:, None], z, 0)

        fine = _linalg.finite(lam, z, y)
        ok = accept & fine
        refine = ok & jnp.any(fresh & (size < 1e-2))
        slots = jnp.where(ok & jnp.any(fresh), r + old.fill + jnp.arange(k), m)
        place = jax.nn.one_hot(slots, m, dtype=s.dtype)
        # New rows are the columns themselves, or their residuals mix (Y - W alpha).
        x = jnp.where(refine, mix @ (s.T - alpha.T @ old.gram), s.T)
        corner = jnp.where(refine, jnp.diag(fresh.astype(s.dtype)), gram)
        grown = old.gram + place.T @ x + x.T @ place + place.T @ corner @ place
        ahead = jnp.where(refine, jnp.eye(k, dtype=s.dtype), mix)
        behind = jnp.where(refine, 0, mix @ alpha.T)
        t = z[:, :r] @ old.t + z[:, r:] @ (ahead @ place - behind)
        t = _linalg.orthonormalize(t, grown)
        new = old._replace(
            gram=grown, t=t, lam=lam,
            fill=old.fill + jnp.sum(slots < m, dtype=jnp.int32),
            columns=old.columns + jnp.sum(weights != 0, dtype=jnp.int32))
        new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        c = jnp.where(ok, z[:, :r], jnp.eye(r, dtype=s.dtype))
        return new, _Step(slots, refine, alpha, mix, c, z @ y, accept & ~fine)


class _Step(NamedTuple):
    """What the rows still have to do after the small algebra, and what the engine is told."""

    slots: jax.Array
    refine: jax.Array
    alpha: jax.Array
    mix: jax.Array
    c: jax.Array
    u: jax.Array
    failed: jax.Array


def _rotate_leaf(w: jax.Array, t: jax.Array, go: jax.Array, dtype: Any):
    """``W[:r] <- T W`` for one leaf, zero or one times; returns it and its Gram matrix."""
    r, (m, size) = t.shape[0], w.shape
    gram = jnp.zeros((r, r), dtype)
    if size == 0:
        return w, gram
    width = min(size, BLOCK)
    blocks = -(-size // width)

    def body(j, carry):
        w, gram = carry
        start = jnp.minimum(j * width, size - width)
        block = lax.dynamic_slice_in_dim(w, start, width, 1)
        new = lax.dot_general(t.astype(w.dtype), block, (((1,), (0,)), ((), ())),
                              preferred_element_type=dtype).astype(w.dtype)
        mine = start + jnp.arange(width) >= j * width      # the last block overlaps the one before
        gram = gram + lax.dot_general(jnp.where(mine, new, 0), new, (((1,), (1,)), ((), ())),
                                      preferred_element_type=dtype)
        new = jnp.where(mine, new, block[:r])
        return lax.dynamic_update_slice(w, new, (jnp.zeros_like(start), start)), gram

    return repeat(jnp.where(go, blocks, 0), body, (w, gram))
