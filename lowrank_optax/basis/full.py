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
from lowrank_optax.basis._basis import Basis, Regularized


class FullMatrixState(NamedTuple):
    """State of `FullMatrix` for ``n`` groups of at most ``d`` parameters.

    Attributes:
      matrix: the curvature ``B``, ``(n, d, d)``.
      t: its eigenvectors as rows, ``Q^T``, ``(n, d, d)``.
      lam: eigenvalues ``(n, d)`` in units of the curvature, 0 in dead slots.
      updates: number ``(n,)`` of corrections absorbed so far.
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
        parts, filled = [], [0] * layout.n
        for size, group in zip(layout.sizes, layout.group, strict=True):
            parts.append(whole[group][..., filled[group] : filled[group] + size])
            filled[group] += size
        return parts


@dataclasses.dataclass(frozen=True)
class FullMatrix(Dense, Regularized):
    """Eigenbasis of the dense ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``, ``B_0 = I``.

    With a curvature that assumes ``gamma`` where nothing was measured, ``B_0 = gamma I``.

    The basis is complete: a direction whose eigenvalue cannot be told from zero stays in it, with
    the eigenvalue 0, so that a later gradient along it is not lost. Parts that divide by
    eigenvalues leave such a direction out.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.FullMatrix(beta=0.5)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInv())
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([3., 0.]), state)
      >>> print(state.basis.lam, updates)        # B = I/2 + diag(9, 0)/2, and g / 5
      [[5.  0.5]] [0.6 0. ]

    Args:
      beta: decay per correction, in [0, 1), default 0.9; ``None`` sums instead. What remains of
        ``B_0`` is not corrected for.
      update_every: number of corrections from one eigendecomposition to the next, at least 1,
        default 1. The first correction always has one. In between only the matrix changes.
      eig_tol: share of the largest eigenvalue at or below which an eigenvalue is dropped, without
        unit, default 1e-12. Its direction is dropped with it if ``eig_tol`` is above rounding.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a ``beta``, ``update_every`` or tolerance out of range.

    Cost: memory ``2 d²``; a correction ``2 d² k`` flops, and once in ``update_every`` of them an
    ``eigh`` of size ``d`` (``9 d³`` flops): for tests, toy problems and the sides of matrices.
    Groups of different sizes are padded to the largest.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with the average of Adam.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "initial", "outside"})

    beta: float | None = 0.9
    update_every: int = dataclasses.field(default=1, kw_only=True)
    eig_tol: float = dataclasses.field(default=1e-12, kw_only=True)

    def __post_init__(self):
        Regularized.__post_init__(self)
        if self.beta is not None:
            check_decay("FullMatrix", "beta", self.beta)
        check_count("FullMatrix", "update_every", self.update_every)

    @property
    def every_step(self) -> bool:
        """Whether it is known before tracing that each correction turns the basis."""
        return isinstance(self.update_every, numbers.Integral) and self.update_every == 1

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
        # The matrix is no part of the loop's carry: if it were and the loop left it as it is, XLA
        # would move the decomposition out of the loop and run it at every step.
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
        """The matrix takes in a correction, the eigenvectors stay as they are.

        Returns the state, the groups that took it in, and the groups in which it was not finite.
        """
        y = dense(layout, correction.columns)
        assumed = (
            jnp.ones(layout.n, layout.dtype) if correction.initial is None else correction.initial
        )
        matrix = jax.vmap(self._blend)(state, y, correction.weights, assumed)
        fine = jax.vmap(linalg.finite)(matrix)
        ok = accept & fine
        return (
            state._replace(
                matrix=jnp.where(ok[:, None, None], matrix, state.matrix),
                updates=linalg.tally(state.updates, ok, self.update_every),
            ),
            ok,
            accept & ~fine,
        )

    def turning(self, state: FullMatrixState) -> jax.Array:
        """Groups ``(n,)`` whose eigenvectors are to follow the matrix that was gathered last."""
        return (state.updates - 1) % self.update_every == 0

    def turn(
        self, matrix: jax.Array, state: FullMatrixState, when: jax.Array, signed: bool = False
    ) -> BasisUpdate:
        """Eigenvectors of ``matrix`` for the groups in ``when``, ``(n,)``.

        The state's own matrix is not read, and may be ``()``.
        """
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
        lam, live = super().eigenbasis(state)
        return Eigenbasis(lam, live | ((state.lam == 0) & jnp.any(state.t != 0, axis=2)))

    def _blend(self, old: FullMatrixState, y, weights, assumed):
        gain, decay = (1.0, 1.0) if self.beta is None else (1 - self.beta, self.beta)
        first = ~jnp.any(old.lam != 0)
        return decay * jnp.where(first, assumed, 1) * old.matrix + gain * (y.T * weights[None]) @ y

    def _factor(self, matrix: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues ``(d,)``, 0 where they are dropped, and eigenvectors as rows.

        The row of a direction that is dropped is zero.
        """
        lam, t = (linalg.eigh_by_size if signed else linalg.eigh)(linalg.symmetrize(matrix))
        lam, live = self.stored.apply(lam, lam != 0 if signed else lam > 0)
        if self.truncate is None:
            # An eigenvalue that rounding cannot tell from zero is 0, but its direction stays.
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
