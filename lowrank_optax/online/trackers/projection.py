"""Trackers of a whole subspace by least squares or by power iterations, with rows of their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.rows import orthonormal
from lowrank_optax._core.types import Columns
from lowrank_optax.online.trackers._tracker import Forgetting, OnRows, TrackerState


@dataclasses.dataclass(frozen=True)
class PAST(Forgetting):
    r"""Projection approximation subspace tracking: recursive least squares for ``v ~ W^T a``.

    .. math:: a = W v, \quad C \leftarrow \beta C + a a^T, \quad
              W \leftarrow W + C^{-1} a\, (v - W^T a)^T

    ``C`` itself is kept, because the usual recursion for its inverse loses its symmetry. ``W``
    becomes orthonormal only in the limit; that of `opast` is orthonormal at all times.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.PAST(2, beta=0.9)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(100))
      >>> print(state.memory.rows[0].shape, state.memory.small.shape)      # W and C
      (2, 100) (2, 2)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay per vector, in [0, 1); ``None``, the default, never forgets.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``r d``; ``6 r d + O(r³)`` flops a vector.

    Source: Yang, "Projection approximation subspace tracking", IEEE Transactions on Signal
    Processing 1995.
    """

    def begin(self, layout, rows, lam, weight):
        return rows, jnp.diag(lam * weight)

    def step(self, layout, rows, small, v, weight):
        a = layout.dot(rows, v)[0]
        # The first C is what a vector of this length without direction has in a random subspace.
        first = layout.inner(v, v)[0] / layout.dims[0]
        eye = jnp.eye(self.rank, dtype=a.dtype)
        c = jnp.where(jnp.trace(small) == 0, first * eye, self.decay * small) + jnp.outer(a, a)
        g = _solve(c, a)
        inside = layout.combine(a[None], rows)
        rest = [x - y.astype(x.dtype) for x, y in zip(v, inside, strict=True)]
        rows = [w + jnp.outer(g.astype(w.dtype), e) for w, e in zip(rows, rest, strict=True)]
        return rows, c

    def read(self, layout, rows, small, weight):
        return rows, small / weight


@dataclasses.dataclass(frozen=True)
class PETRELS(Forgetting):
    r"""Parallel estimation by recursive least squares from vectors with missing entries.

    The code ``a`` fits the entries that are there, which ``P`` picks. Then every coordinate ``j``
    that is there takes a step of its own recursive least squares, with its own ``R_j``:

    .. math:: a = \arg\min_a ‖P (v - W^T a)‖, \quad R_j \leftarrow \beta R_j + a a^T, \quad
              w_j \leftarrow w_j + R_j^{-1} a\, (v_j - w_j \cdot a)

    With forgetting, rows and codes are rebalanced when the rows' lengths have left [1/2, 2], and
    every ``R_j^{-1}`` is kept symmetric, which its recursion alone is not for long.

    A coordinate forgets only when it is seen (in the paper it forgets at all times), and never more
    than it knew at first. If the stream spans fewer than ``rank`` dimensions, some rows stay
    undetermined.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.PETRELS(1)
      >>> state = tracker.init(jax.random.key(0), jnp.zeros(3))
      >>> v, mask = jnp.array([1., jnp.nan, 2.]), jnp.array([1, 0, 1])
      >>> state = jax.jit(tracker.update)(state, v, mask)
      >>> print(state.seen)
      1

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay per vector, in [0, 1); ``None``, the default, never forgets.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``r² d + r d``, because every entry of a vector has a small matrix; ``8 r² d``
    flops a vector.

    Source: Chi, Eldar and Calderbank, "PETRELS: parallel subspace estimation and tracking by
    recursive least squares from partial observations", IEEE Transactions on Signal Processing 2013.
    """

    def update(self, state: TrackerState, v: Any, mask: Any = None) -> TrackerState:
        """Takes in a vector, or ``k``, whose missing entries can hold anything.

        Args:
          state: the tracker's state.
          v: vector shaped like the example, or ``k`` of them along a leading axis.
          mask: array or tree shaped like ``v``, false or 0 where an entry is missing; ``None``, the
            default, if none is.

        Returns:
          The state after the vectors.

        Raises:
          ValueError: for other shapes than the example's, or a mask of another shape than ``v``.
        """
        self.check_state(state)
        columns, many = state.layout.columns(v, "PETRELS")
        if mask is None:
            there = [jnp.ones_like(c) for c in columns]
        else:
            there, also = state.layout.columns(mask, "PETRELS: mask")
            if also != many or there[0].shape != columns[0].shape:
                raise ValueError("PETRELS: mask and v differ in shape; pass a mask shaped like v.")
            there = [(t != 0).astype(t.dtype) for t in there]
        columns = [jnp.where(t != 0, c, 0) for c, t in zip(columns, there, strict=True)]
        return self._update(state, columns, there)

    def begin(self, layout, rows, lam, weight):
        unit = jnp.mean(lam)
        known = jnp.diag(1 / (1 + linalg.safe_divide(lam * weight, unit)))
        inverse = [jnp.tile(known.astype(w.dtype), (w.shape[1], 1, 1)) for w in rows]
        return (rows, inverse), (jnp.diag(lam * weight), unit)

    def step(self, layout, rows, small, v, weight, there):
        (rows, inverse), (moments, unit) = rows, small
        seen = [w * t[None] for w, t in zip(rows, there, strict=True)]
        a = _solve(layout.dot(rows, seen)[0], layout.dot(rows, v)[0])
        # Inverses are in units of a first code's square, so that they start as the identity.
        many = jnp.maximum(sum(jnp.sum(t) for t in there), 1)
        unit = jnp.where(unit == 0, layout.inner(v, v)[0] / many, unit)
        x = linalg.safe_divide(a, jnp.sqrt(unit))
        leaves = zip(rows, inverse, v, there, strict=True)
        done = [self._coordinates(*leaf, a, x, unit) for leaf in leaves]
        rows, inverse = [d[0] for d in done], [d[1] for d in done]
        if self.beta is not None:
            rows, inverse, a = self._balanced(layout, rows, inverse, a)
        # Moments are in the vectors' units, because codes shrink as rows grow, by any factor. The
        # new rows give the lengths, so that an overflow in them shows.
        along = a * _lengths(layout, rows)
        moments = self.decay * moments + jnp.outer(along, along)
        return (rows, inverse), (moments, unit)

    def _coordinates(self, w, inverse, v, there, a, x, unit):
        """One leaf's rows ``(r, size)`` and inverses ``(size, r, r)`` after codes ``a``."""
        decay = jnp.where(jnp.trace(inverse, axis1=1, axis2=2) < self.rank, self.decay, 1.0)
        decay = jnp.where(there != 0, decay, 1.0).astype(w.dtype)[:, None]
        px = inverse @ x.astype(w.dtype) * there[:, None]
        gain = px / (decay + px @ x.astype(w.dtype)[:, None])
        rest = there * (v - a.astype(w.dtype) @ w)
        step = gain * rest[:, None] * linalg.safe_divide(1.0, jnp.sqrt(unit)).astype(w.dtype)
        new = (inverse - gain[:, :, None] * px[:, None]) / decay[:, :, None]
        # Forgetting divides what is not symmetric by the decay, again and again: without this it
        # grows like ``β^-t`` and destroys the inverse after some hundred vectors.
        return w + step.T, (new + jnp.swapaxes(new, 1, 2)) / 2

    def _balanced(self, layout, rows, inverse, a):
        """Orthonormal rows and codes of their size, once a row is twice too long or too short.

        Only the product of rows and codes is determined. With forgetting nothing holds either.
        """
        gram = layout.gram(rows)[0]
        size = jnp.diagonal(gram)
        off = (jnp.max(size) > 4) | (jnp.min(size) < 0.25)

        def body(_, carry):
            rows, inverse, a = carry
            lam, v = linalg.eigh(linalg.symmetrize(gram))
            # Rows that hold no direction of their own are not blown up to one.
            lam = jnp.maximum(lam, 1e-4 * jnp.max(lam))
            t = (v.T / jnp.sqrt(lam)) @ v
            rows = [t.astype(w.dtype) @ w for w in rows]
            inverse = [jnp.einsum("ab,jbc,cd->jad", t, p, t).astype(p.dtype) for p in inverse]
            return rows, inverse, (v.T * jnp.sqrt(lam)) @ v @ a

        return now_and_then(off, body, (rows, inverse, a))

    def read(self, layout, rows, small, weight):
        one = linalg.safe_divide(1.0, _lengths(layout, rows[0]))[:, None]
        return [(one * w).astype(w.dtype) for w in rows[0]], small[0] / weight


@dataclasses.dataclass(frozen=True)
class NoisyPower(OnRows):
    r"""The noisy power method: one power iteration for every block of vectors.

    .. math:: S = \frac1b \sum_{t=1}^{b} (Q^T v_t) v_t^T, \qquad Q^T \leftarrow \mathrm{orth}(S)

    Eigenvalues are the singular values of ``S``. The vectors of a block take effect when the block
    is full. Before the first full block the subspace is random and the eigenvalues are zero.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.NoisyPower(2, block=100)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(50))
      >>> q, s = state.memory.rows
      >>> print(q[0].shape, s[0].shape)
      (2, 50) (2, 50)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      block: number ``b`` of vectors in a block, at least 1, default 256; about an eighth of a
        stream is a good choice. It counts vectors, whether they come one by one or many at once.

    Raises:
      ValueError: for a rank or block below 1.

    Cost: memory ``2 r d``; ``4 r d`` flops a vector and ``10 r² d`` a block.

    Source: Hardt and Price, "The noisy power method: a meta algorithm with applications",
    NeurIPS 2014; Mitliagkas, Caramanis and Jain, "Memory limited, streaming PCA", NeurIPS 2013.
    """

    block: int = 256

    def __post_init__(self):
        OnRows.__post_init__(self)
        check_count("NoisyPower", "block", self.block)

    def begin(self, layout, rows, lam, weight):
        return (rows, layout.zeros(self.rank)), (jnp.diag(lam), jnp.zeros((), jnp.int32))

    def step(self, layout, rows, small, v, weight):
        (q, s), (h, count) = rows, small
        a = layout.dot(q, v)[0] / self.block
        s = [w + jnp.outer(a.astype(w.dtype), x) for w, x in zip(s, v, strict=True)]
        count = count + 1

        def full(_, carry):
            q, s, h = carry
            # A multiple of Q shifts all eigenvalues, and leaves no row without a direction.
            shift = 1e-3 * jnp.sqrt(jnp.trace(layout.gram(s)[0]))
            pairs = zip(s, q, strict=True)
            new = orthonormal(layout, [x + shift.astype(w.dtype) * w for x, w in pairs])
            along = layout.dot(s, new)[0]  # S = along @ new, hence |S| in the new rows:
            size = linalg.matrix_power(along.T @ along, 0.5, damping=0, rdamping=0)
            fine = linalg.finite(size) & (shift > 0)
            q = [jnp.where(fine, x, w) for x, w in zip(new, q, strict=True)]
            return q, layout.zeros(self.rank), jnp.where(fine, size, h)

        q, s, h = now_and_then(count >= self.block, full, (q, s, h))
        return (q, s), (h, jnp.where(count >= self.block, 0, count))

    def read(self, layout, rows, small, weight):
        return rows[0], small[0]


def _solve(c: jax.Array, a: jax.Array) -> jax.Array:
    """``c^{-1} a`` for a positive semidefinite ``c``, singular where nothing was seen yet."""
    ridge = 10 * jnp.finfo(c.dtype).eps * jnp.trace(c)
    ridge = jnp.where(ridge > 0, ridge, 1)
    return jnp.linalg.solve(c + ridge * jnp.eye(c.shape[0], dtype=c.dtype), a)


def _lengths(layout: Layout, rows: Columns) -> jax.Array:
    """The lengths ``(r,)`` of the rows."""
    return jnp.sqrt(jax.vmap(layout.inner)(rows, rows)[:, 0])
