"""Parts as somebody else would write them: public names alone, each in a few lines.

`docs/extending.md` shows this file; `test_extending.py` runs the contract suites on it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class WithPrevious(lro.curvature.Curvature):
    """A curvature: the covariance of each gradient and the one before it, two columns a step."""

    provides = frozenset()
    functions = frozenset()  # of the extra arguments of `update` it reads none

    def init(self, layout, window):
        return layout.store([rows[0] for rows in layout.zeros(1)])

    def correct(self, layout, state, evidence):
        last = layout.stored(state)
        columns = [jnp.stack([a, b]) for a, b in zip(evidence.g, last, strict=True)]
        due = layout.to_leaves(evidence.due)
        pairs = zip(due, evidence.g, last, strict=True)
        kept = layout.store([jnp.where(on, new, old) for on, new, old in pairs])
        return lro.Correction(columns, weights=jnp.ones((layout.n, 2), layout.dtype)), kept


class OneDirectionState(NamedTuple):
    """Rows ``W`` of one vector a group, ``T`` with ``Q = W^T T^T``, and the eigenvalue."""

    rows: Any
    t: Any
    lam: Any


@dataclasses.dataclass(frozen=True)
class OneDirection(lro.basis.Basis):
    """A basis: the direction of the first column alone, with the square of its length."""

    def coordinates(self, layout):
        return 1

    def init(self, layout, key):
        rows = layout.store(layout.zeros(1))
        zero = lambda *shape: jnp.zeros((layout.n, *shape), layout.dtype)
        return OneDirectionState(rows, zero(1, 1), zero(1))

    def absorb(self, layout, state, correction, accept, key):
        if correction.signed:
            raise ValueError("OneDirection: weights of both signs; pass lro.basis.Eigen instead.")
        old = layout.stored(state.rows)
        # A column of weight 0 has no effect.
        live = layout.to_leaves(correction.weights[:, 0] > 0)
        pairs = zip(live, correction.columns, old, strict=True)
        new = [jnp.where(on, y[:1].astype(w.dtype), 0) for on, y, w in pairs]
        square = layout.gram(new)[:, 0]
        fine = jnp.isfinite(square[:, 0])
        ok = accept & fine & (square[:, 0] > 0)
        size = jnp.sqrt(jnp.where(ok[:, None], square, 1))
        # C = Q_new^T Q_old, and the identity where nothing moved.
        cross = layout.dot(old, new)[:, 0] * state.t[:, 0] / size
        c = jnp.where(ok[:, None], cross, 1)[:, None]
        pairs = zip(layout.to_leaves(ok), new, old, strict=True)
        moved = OneDirectionState(
            layout.store([jnp.where(on, y, w) for on, y, w in pairs]),
            jnp.where(ok[:, None, None], 1 / size[:, None], state.t),
            jnp.where(ok[:, None], correction.weights[:, :1] * square, state.lam),
        )
        u = self.project(layout, moved, correction.columns)
        return lro.BasisUpdate(moved, c, u, accept & ~fine)

    def eigenbasis(self, state):
        return lro.Eigenbasis(state.lam, state.lam > 0)


@dataclasses.dataclass(frozen=True)
class HeavyBall:
    """An inner part: a sum of past gradients that decays. It moves like a vector."""

    decay: float = 0.9

    def init(self, rank, dtype):
        return jnp.zeros(rank, dtype)

    @property
    def laws(self):
        return lro.VECTOR

    def update(self, u, state, context):
        m = self.decay * state + u
        return m, m
