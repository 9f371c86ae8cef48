"""What every basis offers the engine, and the spectrum's options that they share."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_decay, check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection, Vector


class Basis(abc.ABC):
    """An eigenbasis ``Q^T = T W`` of ``m`` stored rows ``W`` and a small ``(r, m)`` matrix ``T``.

    All small arrays have a leading axis of ``n`` groups, which are independent of one another.
    ``provides`` and ``needs`` hold names from `NEEDS`.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})
    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def coordinates(self, layout: Layout) -> int:
        """The number ``r`` of coordinates."""

    @abc.abstractmethod
    def init(self, layout: Layout, key: jax.Array) -> Any:
        """The empty basis."""

    @abc.abstractmethod
    def absorb(
        self,
        layout: Layout,
        state: Any,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        """Takes in ``sum_i w_i y_i y_i^T`` for the groups that ``accept`` it, ``(n,)``."""

    @abc.abstractmethod
    def eigenbasis(self, state: Any) -> Eigenbasis:
        """Eigenvalues as the step is to see them, ``(n, r)``."""

    def measured(self, state: Any) -> jax.Array:
        """Eigenvalues as they were measured, ``(n, r)``, before the step's own regularisation."""
        return state.lam

    def outside(self, state: Any) -> jax.Array:
        """The curvature that a step is to see outside, ``(n,)``; for those that provide it."""
        raise AttributeError(f"{type(self).__name__} knows of no curvature outside the basis.")

    def project(self, layout: Layout, state: Any, vector: Vector | Columns) -> jax.Array:
        """``Q^T v``, ``(n, r)``, or ``(n, r, k)`` for columns: one pass over the rows."""
        return jnp.einsum(
            "nrm,nm...->nr...", state.t, layout.dot(layout.stored(state.rows), vector)
        )

    def unproject(self, layout: Layout, state: Any, u: jax.Array) -> Vector | Columns:
        """``Q u``: ``(n, r)`` gives a vector, ``(n, k, r)`` columns. One pass over the rows."""
        return layout.combine(jnp.einsum("n...r,nrm->n...m", u, state.t), layout.stored(state.rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Which eigenvalues stay and what is added to them, in the state and for the step alone.

    `linalg.regularize` gives the order. The fields without prefix act on what is stored, those
    with ``update_`` on what one step reads.
    """

    eig_tol: float = 1e-5
    damping: float = 0.0
    rdamping: float = 0.0
    abs: bool = False
    truncate: int | None = None
    update_eig_tol: float = 0.0
    update_damping: float = 0.0
    update_rdamping: float = 0.0
    update_abs: bool = False
    update_truncate: int | None = None

    def __post_init__(self):
        owner = type(self).__name__
        for prefix in ("", "update_"):
            check_decay(owner, prefix + "eig_tol", getattr(self, prefix + "eig_tol"))
            check_least(owner, prefix + "damping", getattr(self, prefix + "damping"))
            check_least(owner, prefix + "rdamping", getattr(self, prefix + "rdamping"))
            if getattr(self, prefix + "truncate") is not None:
                check_count(owner, prefix + "truncate", getattr(self, prefix + "truncate"))

    def stored(self, lam: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues ``(r,)`` as they are kept."""
        return linalg.regularize(
            lam,
            live,
            eig_tol=self.eig_tol,
            damping=self.damping,
            rdamping=self.rdamping,
            abs=self.abs,
            truncate=self.truncate,
        )

    def bound(self, measured: jax.Array) -> jax.Array:
        """The largest eigenvalue that may have been dropped, ``(n,)``, as one step sees it.

        ``measured``, ``(n, r)``, is what `Basis.measured` gave.
        """
        size = jnp.abs(measured)
        top = jnp.max(size, axis=1, initial=0)
        least = jnp.maximum(self.eig_tol, linalg.rounding(measured)) * top
        return least + self.update_damping + self.update_rdamping * top

    def used(self, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Stored eigenvalues ``(r,)`` as one step sees them."""
        return linalg.regularize(
            lam,
            lam != 0,
            eig_tol=self.update_eig_tol,
            damping=self.update_damping,
            rdamping=self.update_rdamping,
            abs=self.update_abs,
            truncate=self.update_truncate,
        )
