"""FullMatrix: the curvature itself, for problems small enough to hold it."""

import dataclasses
import numbers
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_decay
from lowrank_optax._core.layout import Layout, stack
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection, Vector
from lowrank_optax.basis._basis import Basis, Spectrum


class FullMatrixState(NamedTuple):
    """State of `FullMatrix` for ``n`` groups of at most ``d`` parameters.

    Attributes:
      matrix: ``B``, ``(n, d, d)``.
      t: its eigenvectors as rows, ``Q^T``, ``(n, d, d)``.
      lam: ``(n, d)`` eigenvalues, 0 in dead slots.
      updates: ``(n,)`` corrections absorbed so far.
    """

    matrix: jax.Array
    t: jax.Array
    lam: jax.Array
    updates: jax.Array


class Dense(Basis):
    """A basis whose ``Q^T = state.t`` is one array ``(n, r, d)``, groups padded to the largest."""

    def project(self, layout: Layout, state: Any, vector: Vector | Columns) -> jax.Array:
        single = vector[0].ndim == 1
        y = dense(layout, stack(vector) if single else vector)
        u = jnp.einsum("nrd,nkd->nrk", state.t, y)
        return u[..., 0] if single else u

    def unproject(self, layout: Layout, state: Any, u: jax.Array) -> Vector | Columns:
        whole = jnp.einsum("n...r,nrd->n...d", u, state.t)
        parts, start = [], [0] * layout.n
        for size, group in zip(layout.sizes, layout.group, strict=True):
            parts.append(whole[group][..., start[group] : start[group] + size])
            start[group] += size
        return parts


@dataclasses.dataclass(frozen=True)
class FullMatrix(Dense, Spectrum):
    """Eigenbasis of the dense ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``, ``B_0 = I``.

    ``B_0 = gamma I`` with a curvature that assumes ``gamma`` where nothing was measured.

    The basis is complete: a direction whose eigenvalue rounding cannot tell from zero stays in it,
    with the eigenvalue 0, so that a gradient that comes there later is not lost. Parts that divide
    by eigenvalues leave such a direction out.

    Args:
      beta: decay; ``None`` sums instead. The start is not corrected for.
      every: corrections from one eigendecomposition to the next, the first included; in between the
        matrix goes on alone.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped, and their directions with them where
        it is above rounding. For the others see `GGT`.

    Raises:
      ValueError: for a ``beta``, ``every`` or tolerance out of range.

    Cost: memory ``2 d²``, a correction ``2 d² k`` flops and in ``every`` of them one ``eigh``
    of size ``d`` (``9 d³`` flops): for tests, toy problems and the sides of matrices. Groups of
    different sizes are padded to the largest.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with the average of Adam.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "initial"})

    beta: float | None = 0.9
    every: int = dataclasses.field(default=1, kw_only=True)
    eig_tol: float = dataclasses.field(default=1e-12, kw_only=True)

    def __post_init__(self):
        Spectrum.__post_init__(self)
        if self.beta is not None:
            check_decay("FullMatrix", "beta", self.beta)
        check_count("FullMatrix", "every", self.every)

    @property
    def every_step(self) -> bool:
        """Whether it is known before tracing that each correction turns the basis."""
        return isinstance(self.every, numbers.Integral) and self.every == 1

    def coordinates(self, layout: Layout) -> int:
        return max(layout.dims)

    def init(self, layout: Layout, key: jax.Array) -> FullMatrixState:
        d = self.coordinates(layout)
        real = jnp.arange(d)[None] < jnp.asarray(layout.dims)[:, None]
        square = lambda: jnp.zeros((layout.n, d, d), layout.dtype)
        matrix = jax.vmap(jnp.diag)(real.astype(layout.dtype))
        lam, updates = jnp.zeros((layout.n, d), layout.dtype), jnp.zeros(layout.n, jnp.int32)
        return FullMatrixState(matrix, square(), lam, updates)

    def absorb(
        self,
        layout: Layout,
        state: FullMatrixState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        new, accept, broken = self.gather(layout, state, correction, accept)
        when = accept & self.turning(new)
        # A loop's carry has no matrix: XLA would decompose outside what the loop leaves as it is.
        bare, unchanged = new._replace(matrix=()), self._still(new)
        still = BasisUpdate(bare, unchanged, jnp.zeros((layout.n, 0)), jnp.zeros_like(accept))
        turn = lambda _, now: self.turn(new.matrix, now.state, when, correction.signed)
        done = turn(0, still) if self.every_step else now_and_then(jnp.any(when), turn, still)
        # A group whose eigenproblem failed has learned nothing.
        back = lambda a, b: jnp.where(done.failed.reshape(-1, *[1] * (a.ndim - 1)), b, a)
        kept = jax.tree.map(back, done.state._replace(matrix=new.matrix), state)
        u = kept.t @ jnp.swapaxes(dense(layout, correction.columns), 1, 2)
        return BasisUpdate(kept, done.c, u, done.failed | broken)

    def gather(
        self,
        layout: Layout,
        state: FullMatrixState,
        correction: SymmetricCorrection,
        accept: jax.Array,
    ) -> tuple[FullMatrixState, jax.Array, jax.Array]:
        """The matrix alone takes in a correction; who did, and who did not for not being finite."""
        y = dense(layout, correction.columns)
        start = (
            jnp.ones(layout.n, layout.dtype) if correction.initial is None else correction.initial
        )
        matrix = jax.vmap(self._blend)(state, y, correction.weights, start)
        fine = jax.vmap(linalg.finite)(matrix)
        ok = accept & fine
        return (
            state._replace(
                matrix=jnp.where(ok[:, None, None], matrix, state.matrix),
                updates=linalg.tally(state.updates, ok, self.every),
            ),
            ok,
            accept & ~fine,
        )

    def turning(self, state: FullMatrixState) -> jax.Array:
        """Whether the eigenvectors are to follow the matrix as it was gathered last, ``(n,)``."""
        return (state.updates - 1) % self.every == 0

    def turn(
        self, matrix: jax.Array, state: FullMatrixState, when: jax.Array, signed: bool = False
    ) -> BasisUpdate:
        """Eigenvectors of ``matrix``, not of the state's, for the groups in ``when``, ``(n,)``."""
        lam, t = jax.vmap(partial(self._factor, signed=signed))(matrix)
        c = jnp.einsum("nrd,nsd->nrs", t, state.t)
        fine = jax.vmap(linalg.finite)(lam, t)
        ok = when & fine
        pick = lambda a, b: jnp.where(ok.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        new = state._replace(t=pick(t, state.t), lam=pick(lam, state.lam))
        empty = jnp.zeros((len(when), 0))
        return BasisUpdate(new, pick(c, self._still(state)), empty, when & ~fine)

    @staticmethod
    def _still(state: FullMatrixState) -> jax.Array:
        """No change of basis."""
        return jnp.broadcast_to(jnp.eye(state.t.shape[-1], dtype=state.t.dtype), state.t.shape)

    def eigenbasis(self, state: FullMatrixState) -> Eigenbasis:
        lam, live = jax.vmap(self.used)(state.lam)
        return Eigenbasis(lam, live | ((state.lam == 0) & jnp.any(state.t != 0, axis=2)))

    def _blend(self, old: FullMatrixState, y, weights, start):
        gain, decay = (1.0, 1.0) if self.beta is None else (1 - self.beta, self.beta)
        first = ~jnp.any(old.lam != 0)
        return decay * jnp.where(first, start, 1) * old.matrix + gain * (y.T * weights[None]) @ y

    def _factor(self, matrix: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues, 0 where they are dropped, and all eigenvectors but the dropped ones."""
        lam, t = (linalg.eigh_by_size if signed else linalg.eigh)(linalg.symmetrize(matrix))
        lam, live = self.stored(lam, lam != 0 if signed else lam > 0)
        if self.truncate is None:
            # What only rounding tells from zero has no eigenvalue, and is a direction all the same.
            live = live | (self.eig_tol <= linalg.rounding(lam))
        return lam, jnp.where(live[:, None], t, 0)


def dense(layout: Layout, columns: Columns) -> jax.Array:
    """Columns as one array ``(n, k, d)``, each group's leaves side by side and padded."""
    d, groups = max(layout.dims), []
    for i in range(layout.n):
        leaves = [
            c.astype(layout.dtype)
            for c, group in zip(columns, layout.group, strict=True)
            if group == i
        ]
        count = columns[0].shape[0] if columns else 0
        flat = jnp.concatenate(leaves, axis=1) if leaves else jnp.zeros((count, 0), layout.dtype)
        groups.append(jnp.pad(flat, ((0, 0), (0, d - flat.shape[1]))))
    return jnp.stack(groups)
