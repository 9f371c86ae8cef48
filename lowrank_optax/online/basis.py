"""Learned: an online operator as the basis of `scale_by_lre`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Columns, SymmetricCorrection, Vector
from lowrank_optax.basis._basis import Regularized
from lowrank_optax.online.learner import Learner, LearnerState


class LearnedState(NamedTuple):
    """State of `Learned` for ``n`` groups.

    Attributes:
      learners: the learner's state for each group, which holds the rows ``A``.
      t: the matrix ``T`` of ``Q^T = T A``, ``(n, r, r)``; its rows are zero in dead slots.
      lam: eigenvalues ``(n, r)`` of ``G``, in units of the curvature; 0 in dead slots.
    """

    learners: tuple[LearnerState, ...]
    t: jax.Array
    lam: jax.Array

    @property
    def gram(self) -> jax.Array:
        """``A A^T``, ``(n, r, r)``."""
        return jnp.stack([s.operator.gram for s in self.learners])


@dataclasses.dataclass(frozen=True)
class Learned(Regularized):
    r"""The eigenbasis of an operator that is learned for a purpose, on its own slow schedule.

    .. math:: G = A^T H A = Q\,\mathrm{diag}(\lambda)\,Q^T

    The corrections' columns ``√w_j y_j`` are the stream. Every group has a learner of its own. A
    step sees the eigenvectors ``Q`` and the eigenvalues of ``G``. Inside the subspace they turn
    with ``H`` at every correction; the subspace turns when the learner's optimizer moves it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> learner = lro.online.learner(8, (lro.online.Dynamics(1.0),), optax.adam(3e-3))
      >>> tx = lro.lre(1.0, basis=lro.online.Learned(learner), complement=1.0)
      >>> state = lro.diagnose.find(jax.eval_shape(tx.init, jnp.zeros(1000)))
      >>> print(state.basis.learners[0].operator.rows[0].shape, state.basis.lam.shape)
      (8, 1000) (1, 8)

    Args:
      learner: learner of the operator, made by `learner`. Its purposes can look at the main stream
        alone, that of the corrections.

    The remaining keywords are those of `lowrank_optax.basis.Regularized`.

    Raises:
      ValueError: for something else than a learner, purposes that need other streams, corrections
        with weights of both signs, or groups with fewer parameters than the rank.

    Cost: the learner's, two ``eigh`` of size ``r``, and one more pass over the rows.

    Source: that of the learner's purposes.
    """

    learner: Learner

    def __post_init__(self):
        Regularized.__post_init__(self)
        check(
            isinstance(self.learner, Learner),
            f"Learned: learner is {self.learner!r}; pass lro.online.learner(...).",
        )
        names = sorted({name for p in self.learner.purposes for name in p.streams})
        check(
            not names,
            f"Learned: the learner's purposes need the streams {', '.join(names)}, but a basis "
            "sees the corrections alone; pass purposes that look at the main stream.",
        )

    def coordinates(self, layout: Layout) -> int:
        return self.learner.rank

    def init(self, layout: Layout, key: jax.Array) -> LearnedState:
        r = self.learner.rank
        keys = jax.random.split(key, layout.n)
        zeros = lambda *shape: jnp.zeros((layout.n, *shape), layout.dtype)
        states = tuple(
            self.learner.init(k, example)
            for k, example in zip(
                keys, _groups(layout, [x[0] for x in layout.zeros(1)]), strict=True
            )
        )
        return LearnedState(states, zeros(r, r), zeros(r))

    def absorb(
        self,
        layout: Layout,
        state: LearnedState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        check(
            not correction.signed,
            "Learned keeps positive semidefinite moments, but the corrections have weights of both "
            "signs; combine them with Eigen, RandomizedEigen, GGT or FullMatrix.",
        )
        root = jnp.sqrt(jnp.maximum(correction.weights, 0))
        columns = [
            c * w[:, None].astype(c.dtype)
            for c, w in zip(correction.columns, layout.to_pieces(root), strict=True)
        ]
        on = accept[:, None] & (correction.weights > 0)
        each = zip(
            _groups(layout, columns), state.learners, state.t, state.lam, on, accept, strict=True
        )
        groups = [self._absorb(*group) for group in each]
        learners = tuple(g[0] for g in groups)
        t, lam, c, failed = (jnp.stack(x) for x in zip(*(g[1:] for g in groups), strict=True))
        new = LearnedState(learners, t, lam)
        return BasisUpdate(new, c, self.project(layout, new, correction.columns), failed)

    def project(self, layout: Layout, state: LearnedState, vector: Vector | Columns) -> jax.Array:
        return jnp.einsum("nrm,nm...->nr...", state.t, layout.dot(_rows(layout, state), vector))

    def unproject(self, layout: Layout, state: LearnedState, u: jax.Array) -> Vector | Columns:
        return layout.combine(jnp.einsum("n...r,nrm->n...m", u, state.t), _rows(layout, state))

    def _absorb(self, columns: Columns, state: LearnerState, t, old, on, accept):
        """One group: its learner, ``T``, eigenvalues and ``C = Q_new^T Q_old``."""
        new, info = self.learner.step(state, columns, None, {}, on)
        op = new.operator
        lam, turned = op.eigenbasis()
        lam, live = self.stored.apply(lam, lam > 0)
        fine = linalg.finite(lam, turned)
        turned = jnp.where(fine, jnp.where(live[:, None], turned, 0), t)
        # The learner gives A_new A_old^+; times A_old A_old^T this is A_new A_old^T.
        c = turned @ info.change @ state.operator.gram @ t.T
        failed = accept & (~fine | (new.failed > state.failed))
        return new, turned, jnp.where(fine, lam, old), c, failed


def _groups(layout: Layout, leaves: list[Any]) -> list[list[Any]]:
    """A list with one entry for every leaf, cut into one list for each group."""
    return [
        [x for x, group in zip(leaves, layout.group, strict=True) if group == g]
        for g in range(layout.n)
    ]


def _rows(layout: Layout, state: LearnedState) -> Columns:
    """The learners' rows in the order of the leaves."""
    each = [iter(s.operator.rows) for s in state.learners]
    return [next(each[group]) for group in layout.group]
