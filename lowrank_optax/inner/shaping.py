"""Inner parts that reshape an update: caution, clipping, signs and norms."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, check_least
from lowrank_optax._core.types import SCALAR, SECOND_MOMENT, VECTOR, Context
from lowrank_optax.inner.adaptive import average
from lowrank_optax.inner.compose import Stateless


@dataclasses.dataclass(frozen=True)
class Cautious(Stateless):
    """Sets coordinates to zero whose update opposes the gradient, ``u_i g_i <= 0``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.Cautious(), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([1.0, 1.0]), part.init(2, g.dtype), context)[0])
      [1. 0.]

    Args:
      normalize: whether the other coordinates are multiplied by ``r / (their number)``, with ``r``
        the number of live ones; ``False`` by default.

    Cost: no state, ``3 r`` flops.

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
    r"""Clips the norm of an update.

    .. math:: u' = u\,\min(1,\ \mathrm{max\_norm} / \|u\|)

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.ClipNorm(2.5), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([3.0, 4.0]), part.init(2, g.dtype), context)[0])
      [1.5 2. ]

    Args:
      max_norm: largest norm that passes, in units of the update; positive.

    Raises:
      ValueError: for a norm that is not positive.

    Cost: no state, ``3 r`` flops.

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
    """Clips every coordinate to ``[-max_value, max_value]``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.ClipValue(2.0), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([3.0, -1.0]), part.init(2, g.dtype), context)[0])
      [ 2. -1.]

    Args:
      max_value: largest size of a coordinate that passes, in units of the update; positive.

    Raises:
      ValueError: for a value that is not positive.

    Cost: no state, ``2 r`` flops.

    Source: elementary.
    """

    max_value: float = 1.0

    def __post_init__(self):
        check_least("ClipValue", "max_value", self.max_value, strict=True)

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.clip(u, -self.max_value, self.max_value), state


class RMSPropState(NamedTuple):
    """State of `RMSProp`.

    Attributes:
      count: steps.
      second: ``(r,)`` average of the squares, corrected for its start.
    """

    count: jax.Array
    second: jax.Array


@dataclasses.dataclass(frozen=True)
class RMSProp:
    r"""Division by the root mean square: Adam without its mean.

    .. math:: v \leftarrow b_2 v + (1-b_2)\,u^2,\quad u' = u / (\sqrt{\hat v} + \epsilon)

    A hat stands for the correction of the start at zero. When the basis turns, ``v`` becomes
    ``(C∘C) v``. Where the denominator is zero, the step is zero.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.RMSProp(), jnp.array([3.0, -0.5])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, state = part.update(g, part.init(2, g.dtype), context)
      >>> print(u)
      [ 1. -1.]

    Args:
      b2: decay of the second moment, in [0, 1).
      eps: number added to the root, in units of the gradient.

    Raises:
      ValueError: for a decay out of range or a negative ``eps``.

    Cost: ``r`` numbers, and ``2 r²`` flops when the basis turns.

    Source: Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012.
    """

    b2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        check_decay("RMSProp", "b2", self.b2)
        check_least("RMSProp", "eps", self.eps)

    def init(self, rank: int, dtype: Any) -> RMSPropState:
        return RMSPropState(jnp.zeros((), jnp.int32), jnp.zeros(rank, dtype))

    @property
    def laws(self) -> RMSPropState:
        return RMSPropState._make((SCALAR, SECOND_MOMENT))

    def update(self, u: jax.Array, state: RMSPropState, context: Context):
        count = linalg.tally(state.count)
        second = average(state.second, u * u, self.b2, count)
        return linalg.safe_divide(u, jnp.sqrt(second) + self.eps), RMSPropState(count, second)


class ClipNormByEMAState(NamedTuple):
    """State of `ClipNormByEMA`.

    Attributes:
      count: steps.
      mean: ``(r,)`` running average of the updates.
      norm: norm of that average when the basis was last updated.
    """

    count: jax.Array
    mean: jax.Array
    norm: jax.Array


@dataclasses.dataclass(frozen=True)
class ClipNormByEMA:
    r"""Clips the norm of an update to the norm of the running average of the updates.

    .. math:: e \leftarrow \beta e + (1-\beta)\,u,\quad
              u' = u\,\min(1,\ \|e\| / \|u\|)

    With ``normalize`` it is ``u' = u ‖e‖ / ‖u‖``. The norm of ``e`` may grow by the factor
    ``max_growth`` between two updates of the basis, and no further. When the basis turns, ``e``
    becomes ``C e``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, u = lro.inner.ClipNormByEMA(beta=0.5), jnp.array([3.0, 4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(u, basis, moved=jnp.array(True))
      >>> clipped, _ = part.update(u, part.init(2, u.dtype), context)
      >>> print(jnp.linalg.norm(clipped))         # 5 (.5 * .1 + .5)
      2.75

    Args:
      beta: decay of the average, in [0, 1).
      max_growth: largest factor by which the norm of the average may grow between two updates of
        the basis, at least 1; ``None`` for no limit.
      min_norm: norm below which the average is never held, in units of the update. An average that
        is smaller when the basis is updated is lengthened to it.
      initial_scale: positive factor of the first update, with which the average starts.
      normalize: whether smaller updates are lengthened to the norm of the average, too; ``False``
        by default.

    Raises:
      ValueError: for a decay outside [0, 1), a growth below 1, a negative norm or an
        ``initial_scale`` that is not positive.

    Cost: ``r`` numbers and ``8 r`` flops, and ``2 r²`` when the basis turns.

    Source: torchzero's ``ClipNormByEMA``, part of the original LRE's recommended recipe.
    """

    beta: float = 0.99
    max_growth: float | None = 1.2
    min_norm: float = 1e-2
    initial_scale: float = 0.1
    normalize: bool = False

    def __post_init__(self):
        check_decay("ClipNormByEMA", "beta", self.beta)
        if self.max_growth is not None:
            check_least("ClipNormByEMA", "max_growth", self.max_growth, 1.0)
        check_least("ClipNormByEMA", "min_norm", self.min_norm)
        check_least("ClipNormByEMA", "initial_scale", self.initial_scale, strict=True)

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
        mean = jnp.where(first, self.initial_scale * u, mean)
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
    """Gives every coordinate the sign of the gradient, ``|u| sign(g)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.CopyGradSign(), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([1.0, 2.0]), part.init(2, g.dtype), context)[0])
      [ 1. -2.]

    Cost: no state, ``2 r`` flops.

    Source: "grafting" of signs, as in torchzero.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.abs(u) * jnp.sign(context.g), state


@dataclasses.dataclass(frozen=True)
class Normalize(Stateless):
    """Gives every update the length 1, ``u / ‖u‖``; zero stays zero.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.Normalize(), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([3.0, 4.0]), part.init(2, g.dtype), context)[0])
      [0.6 0.8]

    Cost: no state, ``3 r`` flops.

    Source: elementary.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return linalg.unit(u), state


@dataclasses.dataclass(frozen=True)
class Sign(Stateless):
    """Takes steps of the size 1 along every live direction, ``sign(u)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.Sign(), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([0.1, -7.0]), part.init(2, g.dtype), context)[0])
      [ 1. -1.]

    Cost: no state, ``1 r`` flops.

    Source: elementary.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.sign(u), state


@dataclasses.dataclass(frozen=True)
class NanToZero(Stateless):
    """Sets coordinates to zero that are not finite, so that the step keeps all others.

    Without this part the engine drops a step with such a coordinate whole, and counts it.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.NanToZero(), jnp.array([3.0, -4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(jnp.array([jnp.nan, 2.0]), part.init(2, g.dtype), context)[0])
      [0. 2.]

    Cost: no state, ``1 r`` flops.

    Source: elementary.
    """

    def update(self, u: jax.Array, state: Any, context: Context):
        return jnp.where(jnp.isfinite(u), u, 0), state
