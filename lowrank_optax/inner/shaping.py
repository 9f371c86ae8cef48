"""Inner parts that reshape an update: caution, clipping, signs and norms."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, check_least
from lowrank_optax._core.types import SCALAR, VECTOR, Context
from lowrank_optax.inner.compose import Stateless


@dataclasses.dataclass(frozen=True)
class Cautious(Stateless):
    """Zeroes coordinates whose update opposes the gradient, ``u_i g_i <= 0``.

    Args:
      normalize: scale what remains by ``r / (number that remains)``.

    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", 2024.
    """

    normalize: bool = False

    def update(self, u: jax.Array, state: Any, context: Context):
        mask = (u * context.g > 0).astype(u.dtype)
        if self.normalize:
            mask = mask * linalg.safe_divide(
                jnp.sum(context.basis.live.astype(u.dtype)), jnp.sum(mask)
            )
        return u * mask, state


@dataclasses.dataclass(frozen=True)
class ClipNorm(Stateless):
    """``u min(1, max_norm / ‖u‖)``.

    Args:
      max_norm: in units of the update.

    Raises:
      ValueError: for a norm that is not positive.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013.
    """

    max_norm: float = 1.0

    def __post_init__(self):
        check_least("ClipNorm", "max_norm", self.max_norm, strict=True)

    def update(self, u: jax.Array, state: Any, context: Context):
        norm = jnp.linalg.norm(u)
        return u * jnp.minimum(1, linalg.safe_divide(self.max_norm, norm) + (norm == 0)), state


@dataclasses.dataclass(frozen=True)
class ClipValue(Stateless):
    """Every coordinate clipped to ``[-max_value, max_value]``.

    Args:
      max_value: in units of the update.

    Raises:
      ValueError: for a value that is not positive.
    """

    max_value: float = 1.0

    def __post_init__(self):
        check_least("ClipValue", "max_value", self.max_value, strict=True)

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.clip(u, -self.max_value, self.max_value), state


class ClipNormByEMAState(NamedTuple):
    """State of `ClipNormByEMA`.

    Attributes:
      count: steps.
      mean: ``(r,)`` running average of the updates.
      norm: its norm when the basis last moved.
    """

    count: jax.Array
    mean: jax.Array
    norm: jax.Array


@dataclasses.dataclass(frozen=True)
class ClipNormByEMA:
    """Clips the norm of an update to the norm of the updates' running average.

    ``e <- beta e + (1-beta) u``, where ``‖e‖`` grows by at most ``max_growth`` over what it was
    when the basis last moved; then ``u min(1, ‖e‖/‖u‖)``, or ``u ‖e‖/‖u‖`` with ``normalize``.

    Args:
      beta: decay of the average.
      max_growth: largest growth of its norm between two moves of the basis; ``None`` for no limit.
      min_norm: the norm below which the average is never held.
      start: the average starts at ``start`` times the first update.
      normalize: give every update the average's norm, also the smaller ones.

    Raises:
      ValueError: for a decay outside [0, 1), a growth below 1 or a negative norm.

    Cost: ``r`` numbers.

    Source: torchzero's ``ClipNormByEMA``, part of the original LRE's recommended recipe.
    """

    beta: float = 0.99
    max_growth: float | None = 1.2
    min_norm: float = 1e-2
    start: float = 0.1
    normalize: bool = False

    def __post_init__(self):
        check_decay("ClipNormByEMA", "beta", self.beta)
        if self.max_growth is not None:
            check_least("ClipNormByEMA", "max_growth", self.max_growth, 1.0)
        check_least("ClipNormByEMA", "min_norm", self.min_norm)
        check_least("ClipNormByEMA", "start", self.start, strict=True)

    def init(self, rank: int, dtype: Any) -> ClipNormByEMAState:
        return ClipNormByEMAState(
            jnp.zeros((), jnp.int32), jnp.zeros(rank, dtype), jnp.zeros((), dtype)
        )

    @property
    def laws(self) -> ClipNormByEMAState:
        return ClipNormByEMAState._make((SCALAR, VECTOR, SCALAR))

    def update(self, u: jax.Array, state: ClipNormByEMAState, context: Context):
        first = state.count == 0
        size = jnp.linalg.norm(state.mean)
        lift = jnp.where(size < self.min_norm, linalg.safe_divide(self.min_norm, size), 1)
        mean = jnp.where(context.moved, lift, 1) * state.mean
        norm = jnp.where(context.moved, jnp.linalg.norm(mean), state.norm)
        mean = jnp.where(first, self.start * u, mean)
        mean = self.beta * mean + (1 - self.beta) * u
        size = jnp.linalg.norm(mean)
        if self.max_growth is not None:
            limit = jnp.maximum(self.max_growth * norm, self.min_norm)
            held = jnp.where(first, size, jnp.minimum(size, limit))
            mean, size = mean * linalg.safe_divide(held, size), held
        scale = linalg.safe_divide(size, jnp.linalg.norm(u))
        if not self.normalize:
            scale = jnp.minimum(scale, 1)
        return u * scale, ClipNormByEMAState(linalg.tally(state.count), mean, norm)


@dataclasses.dataclass(frozen=True)
class CopyGradSign(Stateless):
    """``|u| sign(g)``: the update's sizes with the gradient's signs.

    Source: "grafting" of signs, as in torchzero.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.abs(u) * jnp.sign(context.g), state


@dataclasses.dataclass(frozen=True)
class Normalize(Stateless):
    """``u / ‖u‖``, and 0 for 0."""

    def update(self, u: jax.Array, state: Any, context: Context):
        return linalg.unit(u), state


@dataclasses.dataclass(frozen=True)
class Sign(Stateless):
    """``sign(u)``: equal steps along every live direction."""

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.sign(u), state


@dataclasses.dataclass(frozen=True)
class NanToZero(Stateless):
    """Coordinates that are not finite become zero, so that the rest of the step is kept.

    Without it a step with such a coordinate is dropped whole and counted.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.where(jnp.isfinite(u), u, 0), state
