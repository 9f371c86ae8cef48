"""SubspaceIteration: the leading eigenvectors of many columns at once."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay, check_least, fix_size
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Eigenbasis, SymmetricCorrection
from lowrank_optax.basis.full import Dense, dense


class SubspaceIterationState(NamedTuple):
    """State of `SubspaceIteration` for ``n`` groups of at most ``d`` parameters.

    Attributes:
      t: orthonormal rows ``Q^T``, ``(n, r, d)``.
      lam: eigenvalues ``(n, r)`` before they are divided by ``1 - beta^updates``, in units of the
        curvature; 0 in dead slots.
      updates: number ``(n,)`` of corrections absorbed so far.
    """

    t: jax.Array
    lam: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class SubspaceIteration(Dense):
    r"""The ``rank`` leading eigenpairs of ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``.

    It is meant for wide corrections of short vectors, as the sides of a matrix have them. ``B =
    M^T M`` is known through its factor ``M = [sqrt(beta Lambda) Q^T; sqrt((1-beta) W) Y^T]``. The
    iteration starts from the old rows (random ones in dead slots) and ``oversample`` random rows:

    .. math:: X \leftarrow \mathrm{orth}(X M^T M) \quad\text{``iterations`` times}, \qquad
              X M^T M X^T = Z \Lambda Z^T, \qquad Q^T \leftarrow Z X

    If ``rank + oversample`` is at least ``d``, this is the exact ``eigh`` of ``B``. With a rank of
    ``d`` nothing is lost, and ``Q diag(lam) Q^T`` is the average itself. ``lam_i = ‖M q_i‖²``
    resolves directions down to the rounding of ``M``, which is finer than that of ``B``. Only
    directions below it are dropped, so that a basis of full rank loses no part of a gradient.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> side = lro.basis.SubspaceIteration(2, beta=0.9)
      >>> tx = lro.scale_by_matrix_lre(side, side, lro.inner.Adam(), update_every=10)
      >>> state = jax.eval_shape(tx.init, jnp.zeros((50, 70)))
      >>> print([x.shape for x in jax.tree.leaves(state) if x.shape[1:2] == (2,) and x.ndim == 3])
      [(1, 2, 50), (1, 2, 70)]

    Args:
      rank: number ``r`` of eigenpairs that are kept, at least 1; ``None`` or a number above ``d``
        keeps all ``d``.
      beta: decay of the average per correction, in [0, 1), default 0.9; 0 sees the last correction
        alone. An average starts at zero and is divided by ``1 - beta^n`` to make up for that.
      oversample: number of random rows beyond the rank, at least 0, default 8.
      iterations: number of products with ``B``, at least 1, default 2. Few are enough, because the
        old rows are close to the new ones.
      floor: share of the largest eigenvalue below which a step sees no eigenvalue: smaller ones
        count as that much. At least 0, without unit, default 1e-6.

    Raises:
      ValueError: for a rank, number of iterations or decay out of range, or corrections with
        weights of both signs.

    Cost: memory ``r d``; a correction of ``k`` columns ``4 (iterations + 1) (r + k) d l`` flops,
    ``l = min(r + oversample, d)``, a QR of ``(d, l)`` for each iteration and an ``eigh`` of size
    ``l``.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011; the
    warm start is that of Hardt and Price, "The noisy power method", NIPS 2014.
    """

    rank: int | None
    beta: float = 0.9
    oversample: int = dataclasses.field(default=8, kw_only=True)
    iterations: int = dataclasses.field(default=2, kw_only=True)
    floor: float = dataclasses.field(default=1e-6, kw_only=True)

    def __post_init__(self):
        if self.rank is not None:
            fix_size(self, "rank")
        check_decay("SubspaceIteration", "beta", self.beta)
        fix_size(self, "oversample", 0)
        fix_size(self, "iterations")
        check_least("SubspaceIteration", "floor", self.floor)

    def coordinates(self, layout: Layout) -> int:
        d = max(layout.dims)
        return d if self.rank is None else min(self.rank, d)

    def init(self, layout: Layout, key: jax.Array) -> SubspaceIterationState:
        n, r = layout.n, self.coordinates(layout)
        return SubspaceIterationState(
            jnp.zeros((n, r, max(layout.dims)), layout.dtype),
            jnp.zeros((n, r), layout.dtype),
            jnp.zeros(n, jnp.int32),
        )

    def absorb(
        self,
        layout: Layout,
        state: SubspaceIterationState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        check(
            not correction.signed,
            "SubspaceIteration keeps a positive semidefinite curvature, but the corrections have "
            "weights of both signs; combine them with Eigen, RandomizedEigen, GGT or FullMatrix.",
        )
        return BasisUpdate(
            *jax.vmap(self._absorb)(
                state,
                dense(layout, correction.columns),
                correction.weights,
                accept,
                jax.random.split(key, layout.n),
            )
        )

    def measured(self, state: SubspaceIterationState) -> jax.Array:
        whole = 1 - jnp.asarray(self.beta, state.lam.dtype) ** state.updates
        return linalg.safe_divide(state.lam, whole[:, None])

    def eigenbasis(self, state: SubspaceIterationState) -> Eigenbasis:
        lam = self.measured(state)
        live, least = state.lam != 0, self.floor * jnp.max(lam, axis=1, keepdims=True)
        return Eigenbasis(jnp.where(live, jnp.maximum(lam, least), 0), live)

    def _absorb(self, old: SubspaceIterationState, y, weights, accept, key):
        (r, d), eps = old.t.shape, jnp.finfo(y.dtype).eps
        y = jnp.where((weights != 0)[:, None], y, 0)  # what is switched off may hold anything
        m = jnp.concatenate(
            [
                jnp.sqrt(self.beta * old.lam)[:, None] * old.t,
                jnp.sqrt((1 - self.beta) * weights)[:, None] * y,
            ]
        )
        x = jnp.eye(d, dtype=y.dtype)
        if r + self.oversample < d:
            x = jax.random.normal(key, (r + self.oversample, d), y.dtype)
            x = x.at[:r].set(jnp.where((old.lam != 0)[:, None], old.t, x[:r]))
            for _ in range(self.iterations):
                # QR by Householder reflections: B may be singular, and the columns are short.
                x = linalg.qr(m.T @ (m @ x.T)).T
        s = m @ x.T
        t = linalg.eigh(linalg.symmetrize(s.T @ s))[1][:r] @ x
        # Measured through M, an eigenvalue is known to eps² of the largest, through B only to eps.
        lam = jnp.sum((m @ t.T) ** 2, axis=0)
        live = ~(lam <= 100 * d * eps**2 * jnp.max(lam))  # what is NaN is to be seen
        lam, t = jnp.where(live, lam, 0), jnp.where(live[:, None], t, 0)
        fine = linalg.finite(m, lam, t)
        ok = accept & fine
        new = SubspaceIterationState(t, lam, linalg.tally(old.updates))
        new = jax.tree.map(partial(jnp.where, ok), new, old)
        c = jnp.where(ok, t @ old.t.T, jnp.eye(r, dtype=t.dtype))
        return new, c, new.t @ y.T, accept & ~fine
