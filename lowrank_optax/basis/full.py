"""FullMatrix: the curvature itself, for problems small enough to hold it."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import _linalg
from lowrank_optax._tree import Layout, stack
from lowrank_optax._types import (
    Absorbed,
    Columns,
    Eigenbasis,
    Increment,
    Vector,
    check,
    check_decay,
)
from lowrank_optax.basis._basis import Basis, Spectrum


class FullMatrixState(NamedTuple):
    """State of `FullMatrix` for ``n`` groups of at most ``d`` parameters.

    Attributes:
      matrix: ``B``, ``(n, d, d)``.
      t: its eigenvectors as rows, ``Q^T``, ``(n, d, d)``.
      lam: ``(n, d)`` eigenvalues, 0 in dead slots.
    """

    matrix: jax.Array
    t: jax.Array
    lam: jax.Array


@dataclasses.dataclass(frozen=True)
class FullMatrix(Basis, Spectrum):
    """Eigenbasis of the dense ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``, ``B_0 = I``.

    ``B_0 = gamma I`` with a curvature that assumes ``gamma`` where nothing was measured.

    Args:
      beta: decay; ``None`` sums instead. The start is not corrected for.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped. For the others see `GGT`.

    Raises:
      ValueError: for a ``beta`` or tolerance out of range.

    Cost: memory ``2 d²``, a step one ``eigh`` of size ``d`` (``9 d³`` flops): for tests, toy
    problems and small groups. Groups of different sizes are padded to the largest.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with the average of Adam.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "initial"})

    beta: float | None = 0.9
    eig_tol: float = dataclasses.field(default=1e-12, kw_only=True)

    def __post_init__(self):
        Spectrum.__post_init__(self)
        if self.beta is not None:
            check_decay("FullMatrix", "beta", self.beta)

    def coordinates(self, layout: Layout) -> int:
        return max(layout.dims)

    def init(self, layout: Layout, key: jax.Array) -> FullMatrixState:
        d = self.coordinates(layout)
        real = jnp.arange(d) < jnp.asarray(layout.dims)[:, None]
        square = lambda: jnp.zeros((layout.n, d, d), layout.dtype)
        matrix = jax.vmap(jnp.diag)(real.astype(layout.dtype))
        return FullMatrixState(matrix, square(), jnp.zeros((layout.n, d), layout.dtype))

    def absorb(
        self,
        layout: Layout,
        state: FullMatrixState,
        correction: Increment,
        accept: jax.Array,
        key: jax.Array,
    ) -> Absorbed:
        y = _dense(layout, correction.columns, self.coordinates(layout))
        start = (
            jnp.ones(layout.n, layout.dtype) if correction.initial is None else correction.initial
        )
        return Absorbed(
            *jax.vmap(partial(self._absorb, signed=correction.signed))(
                state, y, correction.weights, accept, start
            )
        )

    def eigenbasis(self, state: FullMatrixState) -> Eigenbasis:
        return Eigenbasis(*jax.vmap(self.used)(state.lam))

    def project(
        self, layout: Layout, state: FullMatrixState, vector: Vector | Columns
    ) -> jax.Array:
        single = vector[0].ndim == 1
        y = _dense(layout, stack(vector) if single else vector, self.coordinates(layout))
        u = jnp.einsum("nrd,nkd->nrk", state.t, y)
        return u[..., 0] if single else u

    def unproject(self, layout: Layout, state: FullMatrixState, u: jax.Array) -> Vector | Columns:
        dense = jnp.einsum("n...r,nrd->n...d", u, state.t)
        parts, start = [], [0] * layout.n
        for size, group in zip(layout.sizes, layout.group, strict=True):
            parts.append(dense[group][..., start[group] : start[group] + size])
            start[group] += size
        return parts

    def check_state(self, layout: Layout, state: FullMatrixState) -> None:
        d = self.coordinates(layout)
        check(
            state.lam.shape == (layout.n, d),
            f"scale_by_lre: the gradients form {layout.n} groups of at most {d} entries, but init "
            f"saw {state.lam.shape[0]} of at most {state.lam.shape[1]}; pass gradients shaped like "
            "the parameters, or call init again.",
        )

    def _absorb(self, old: FullMatrixState, y, weights, accept, start, signed):
        gain, decay = (1.0, 1.0) if self.beta is None else (1 - self.beta, self.beta)
        first = ~jnp.any(old.lam != 0)
        matrix = decay * jnp.where(first, start, 1) * old.matrix + gain * (y.T * weights) @ y
        lam, t = (_linalg.eigh_by_size if signed else _linalg.eigh)(_linalg.symmetrize(matrix))
        lam, live = self.stored(lam, lam != 0 if signed else lam > 0)
        t = jnp.where(live[:, None], t, 0)
        fine = _linalg.finite(matrix, lam, t)
        ok = accept & fine
        new = FullMatrixState(matrix, t, lam)
        new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        c = jnp.where(ok, t @ old.t.T, jnp.eye(t.shape[0], dtype=t.dtype))
        return new, c, t @ y.T, accept & ~fine


def _dense(layout: Layout, columns: Columns, d: int) -> jax.Array:
    """Columns as one array ``(n, k, d)``, each group's leaves side by side and padded."""
    groups = []
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
