"""Inner parts that read the eigenvalues."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check_finite
from lowrank_optax._core.types import Context
from lowrank_optax.inner.compose import Stateless


@dataclasses.dataclass(frozen=True)
class LPower(Stateless):
    r"""``u_i <- lam_i^p u_i`` where there is curvature: a power of it, ``Q diag(lam^p) Q^T``.

    A negative eigenvalue counts with its size, and keeps its sign where ``p`` is odd. A direction
    whose eigenvalue is 0 is left out, as in a pseudo-inverse.

    Args:
      p: −1/2 whitens (`LInvSqrt`), −1 is Newton's method in the basis (`LInv`).

    Raises:
      ValueError: for a power that is not a finite number.
    """

    p: float
    needs: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})

    def __post_init__(self):
        check_finite("LPower", "p", self.p)

    def update(self, u: jax.Array, state: Any, context: Context):
        lam, live = context.basis
        live = live & (lam != 0)
        size = jnp.abs(jnp.where(live, lam, 1)) ** self.p
        sign = jnp.where((lam < 0) & (self.p % 2 == 1), -1, 1)
        return jnp.where(live, size * sign * u, 0), state


def LInvSqrt() -> LPower:
    """``u / sqrt(lam)``: whitens the gradient, the step of GGT and full-matrix AdaGrad."""
    return LPower(-0.5)


def LInv() -> LPower:
    """``u / lam``: Newton's step when the curvature is a Hessian."""
    return LPower(-1.0)
