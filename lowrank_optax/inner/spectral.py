"""Inner parts that read the eigenvalues."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._types import Context, check
from lowrank_optax.inner.compose import Stateless


@dataclasses.dataclass(frozen=True)
class LPower(Stateless):
    r"""``u_i <- lam_i^p u_i`` on live directions: a power of the curvature, ``Q diag(lam^p) Q^T``.

    A negative eigenvalue counts with its size, and keeps its sign where ``p`` is odd.

    Args:
      p: −1/2 whitens (`LInvSqrt`), −1 is Newton's method in the basis (`LInv`).

    Raises:
      ValueError: for a power that is not a finite number.
    """

    p: float
    needs: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})

    def __post_init__(self):
        check(
            isinstance(self.p, int | float) and abs(self.p) < float("inf"),
            f"LPower: p is {self.p!r}; pass a finite number such as -0.5.",
        )

    def update(self, u: jax.Array, state: Any, context: Context):
        lam, live = context.basis
        size = jnp.abs(jnp.where(live, lam, 1)) ** self.p
        sign = jnp.where(lam < 0, -1, 1) if self.p % 2 == 1 else 1
        return jnp.where(live, size * sign * u, 0), state


def LInvSqrt() -> LPower:
    """``u / sqrt(lam)``: whitens the gradient, the step of GGT and full-matrix AdaGrad."""
    return LPower(-0.5)


def LInv() -> LPower:
    """``u / lam``: Newton's step when the curvature is a Hessian."""
    return LPower(-1.0)
