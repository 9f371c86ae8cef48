"""Average: what bases over a running average or a sum of corrections share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
from lowrank_optax.basis._frame import Frame, FrameState, Seen


@dataclasses.dataclass(frozen=True)
class Average(Frame):
    """A `Frame` over ``B <- beta B + (1 - beta) sum_j w_j y_j y_j^T``, or the sum for ``None``.

    An average starts at zero; after ``n`` corrections it is divided by ``1 - beta^n``, which makes
    up for that.
    """

    def blend(self, seen: Seen, signed: bool) -> tuple[float, jax.Array]:
        """The decay of the old, and the new columns scaled by the roots of their shares."""
        check(
            not signed,
            f"{type(self).__name__} keeps a positive semidefinite curvature, but the "
            "corrections have weights of both signs; combine them with Eigen, RandomizedEigen, "
            "GGT or FullMatrix.",
        )
        decay, gain = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        return decay if seen.decays else 1.0, seen.y * jnp.sqrt(gain * seen.weights)[None]

    def eigenvalues(self, lam: jax.Array, memory: Any) -> jax.Array:
        """One group's eigenvalues ``(r,)`` before they are divided by ``1 - beta^n``."""
        return lam

    def measured(self, state: FrameState) -> jax.Array:
        def view(lam, memory, updates):
            return self.debiased(self.eigenvalues(lam, memory), updates)

        return jax.vmap(view)(super().measured(state), state.memory, state.updates)

    def debiased(self, lam: jax.Array, updates: jax.Array) -> jax.Array:
        """Averages after ``updates`` corrections, divided by ``1 - beta^updates``."""
        if self.beta is None:
            return lam
        return linalg.safe_divide(lam, 1 - jnp.asarray(self.beta, lam.dtype) ** updates)
