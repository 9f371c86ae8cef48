"""Parts as somebody else would write them: public names alone, each in a few lines.

`docs/extending.md` shows this file; `test_extending.py` runs the contract suites on it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
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
        due = layout.to_pieces(evidence.due)
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
        live = layout.to_pieces(correction.weights[:, 0] > 0)
        pairs = zip(live, correction.columns, old, strict=True)
        new = [jnp.where(on, y[:1].astype(w.dtype), 0) for on, y, w in pairs]
        square = layout.gram(new)[:, 0]
        fine = jnp.isfinite(square[:, 0])
        ok = accept & fine & (square[:, 0] > 0)
        size = jnp.sqrt(jnp.where(ok[:, None], square, 1))
        # C = Q_new^T Q_old, and the identity where nothing moved.
        cross = layout.dot(old, new)[:, 0] * state.t[:, 0] / size
        c = jnp.where(ok[:, None], cross, 1)[:, None]
        pairs = zip(layout.to_pieces(ok), new, old, strict=True)
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


@dataclasses.dataclass(frozen=True)
class SubspaceRule(lro.online.trackers.OnRows):
    """A tracker: ``W <- W + eta a (v - W^T a)^T`` with ``a = W v``, and the moments of ``a``."""

    gain: float = 4.0

    def begin(self, layout, rows, lam, weight):
        return rows, jnp.diag(lam * weight)

    def step(self, layout, rows, small, v, weight):
        a = layout.dot(rows, v)[0]
        eta = self.gain / (jnp.trace(small) + self.gain * layout.inner(v, v)[0])
        move = lambda w, x: w + eta * a[:, None] * (x - a @ w)
        return [move(w, x) for w, x in zip(rows, v, strict=True)], small + jnp.outer(a, a)

    def read(self, layout, rows, small, weight):
        return rows, small / weight


@dataclasses.dataclass(frozen=True)
class Capture(lro.online.Purpose):
    """A purpose: ``-E|A v|² / E|v|²``, whose gradient by ``A`` is ``-2 E z v^T / E|v|²``."""

    def terms(self, view, theta):
        weights, z = view.stream.weights, view.codes
        value = -jnp.sum(weights * jnp.sum(z**2, axis=1)) / view.energy
        left = -2 * weights[:, None] * z / view.energy
        return lro.online.Terms(value, left, view.stream.columns, z)


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours(lro.spectral.operators.SampledOperator):
    """An operator on the circle: the mean of a function at both neighbours of a point."""

    distance: float = 0.5

    def sample(self, key, size, state=None):
        return jax.random.uniform(key, (size,), maxval=2 * jnp.pi)

    def apply(self, function, batch):
        at = lambda points: jax.vmap(function)(points)
        return at(batch), (at(batch + self.distance) + at(batch - self.distance)) / 2
