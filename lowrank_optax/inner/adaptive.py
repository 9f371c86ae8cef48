"""Inner parts that carry moments of the projected gradient."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, check_least
from lowrank_optax._core.types import (
    MATRIX,
    MOMENTS,
    SCALAR,
    SECOND_MOMENT,
    THIRD_MOMENT,
    VECTOR,
    Context,
)


class Moments(NamedTuple):
    """First and second moments, ``(r,)`` each, corrected for their start at zero."""

    mean: jax.Array
    second: jax.Array


class AdamState(NamedTuple):
    """State of `Adam`: steps, moments and, with AMSGrad, the largest second moment so far."""

    count: jax.Array
    moments: Moments
    largest: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Adam:
    r"""``u = m_hat / (sqrt(v_hat) + eps)`` in the coordinates of the basis.

    ``m <- b1 m + (1-b1) u`` and ``v <- b2 v + (1-b2) u²``, both corrected for their start. When the
    basis moves, ``m <- C m`` and ``v <- (C∘C) v``. ``b1=0`` is RMSprop. Where the denominator is
    zero, as without ``eps`` in slots that no gradient has reached, the step is zero.

    The state holds the corrected moments, since a centred law subtracts one from the other: without
    the correction they are the same multiple of the true ones only where ``b1 = b2``.

    Args:
      b1: decay of the mean.
      b2: decay of the second moment.
      eps: added to the root.
      amsgrad: divide by the largest second moment so far (Reddi et al., ICLR 2018).
      centred: move ``v`` as ``|(C∘C)(v - m²) + (C m)²|`` (Robert et al., LDAdam, ICLR 2025).

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``.

    Cost: ``2 r`` numbers and ``4 r²`` flops.

    Source: Kingma and Ba, "Adam", ICLR 2015.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    amsgrad: bool = False
    centred: bool = False

    def __post_init__(self):
        check_moments(self)

    def init(self, rank: int, dtype: Any) -> AdamState:
        zeros = lambda: jnp.zeros(rank, dtype)
        return AdamState(
            jnp.zeros((), jnp.int32), Moments(zeros(), zeros()), zeros() if self.amsgrad else None
        )

    @property
    def laws(self) -> AdamState:
        moments = MOMENTS if self.centred else Moments._make((VECTOR, SECOND_MOMENT))
        return AdamState._make((SCALAR, moments, SECOND_MOMENT if self.amsgrad else None))

    def update(self, u: jax.Array, state: AdamState, context: Context):
        count = linalg.tally(state.count)
        mean = average(state.moments.mean, u, self.b1, count)
        v = second = average(state.moments.second, u * u, self.b2, count)
        largest = state.largest
        if largest is not None:
            v = largest = jnp.maximum(largest, v)
        u = linalg.safe_divide(mean, jnp.sqrt(v) + self.eps)
        return u, AdamState(count, Moments(mean, second), largest)


class FullMatrixAdamState(NamedTuple):
    """State of `FullMatrixAdam`: steps, mean ``(r,)`` and covariance ``(r, r)``."""

    count: jax.Array
    mean: jax.Array
    covariance: jax.Array


@dataclasses.dataclass(frozen=True)
class FullMatrixAdam:
    r"""``u = (M_hat + eps I)^{-1/2} m_hat`` with ``M <- b2 M + (1-b2) u u^T``.

    ``M`` moves as ``C M C^T``. It starts as the original's does, as the identity of the first
    basis, with directions that join later at zero: the correction for a start at zero then makes
    that identity ``b2 / (1-b2)`` times itself, 99 at first, and gradients of 1e-3 are hidden by it
    for more than a thousand steps. With ``identity=False`` it starts at zero and its root is a
    pseudo-inverse: along every axis of the gradients seen so far, and along no other, updates have
    the size of Adam's, whatever the gradient's unit.

    Args:
      b1: decay of the mean.
      b2: decay of the covariance.
      eps: added to the eigenvalues, in units of the squared gradient: the square of Adam's.
      identity: whether the covariance starts as the identity. Then ``1e-8``, and ``1e-8`` of the
        largest, are added to the eigenvalues once more.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``.

    Cost: ``r²`` numbers, one ``eigh`` of size ``r`` a step.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with Adam's averages.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    identity: bool = True

    def __post_init__(self):
        check_moments(self)

    def init(self, rank: int, dtype: Any) -> FullMatrixAdamState:
        return FullMatrixAdamState(
            jnp.zeros((), jnp.int32), jnp.zeros(rank, dtype), jnp.zeros((rank, rank), dtype)
        )

    @property
    def laws(self) -> FullMatrixAdamState:
        return FullMatrixAdamState._make((SCALAR, VECTOR, MATRIX))

    def update(self, u: jax.Array, state: FullMatrixAdamState, context: Context):
        count = linalg.tally(state.count)
        mean = ema(state.mean, u, self.b1)
        start = state.covariance
        if self.identity:
            start = identity_at_first(start, state.count, context)
        covariance = ema(start, jnp.outer(u, u), self.b2)
        m = debias(covariance, self.b2, count)
        if self.identity:
            root = linalg.matrix_power(m + self.eps * jnp.eye(len(u), dtype=u.dtype), -0.5)
        else:  # what was not seen is dropped before anything is added
            root = linalg.matrix_power(m, -0.5, damping=self.eps, rdamping=0.0)
        u = root @ debias(mean, self.b1, count)
        return jnp.where(context.basis.live, u, 0), FullMatrixAdamState(count, mean, covariance)


class CubicAdamState(NamedTuple):
    """State of `CubicAdam`: steps and the first three moments, ``(r,)`` each."""

    count: jax.Array
    mean: jax.Array
    second: jax.Array
    third: jax.Array


@dataclasses.dataclass(frozen=True)
class CubicAdam:
    r"""Along every coordinate, the minimum of a cubic made of the first three moments.

    .. math:: \min_x\ \tfrac{A}{3} x^3 + \tfrac{B}{2} x^2 + C x,\quad
              A = \sqrt[3]{\hat m_3},\ B = \sqrt{\hat m_2},\ C = \hat m_1

    Its local minimum is ``x = -2C / (B + sqrt(B² - 4AC))``, which becomes Adam's ``-C/B`` as ``A``
    goes to zero; where the cubic has none the step is ``-C/(B + eps)``. ``u = -x``. The third
    moment moves by ``C∘C∘C``, the diagonal of the full tensor's transport.

    Args:
      b1: decay of the mean.
      b2: decay of the second moment.
      b3: decay of the third moment.
      eps: added to the root where there is no minimum.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``.

    Cost: ``3 r`` numbers and ``6 r²`` flops.

    Source: the original LRE's cubic Adam.
    """

    b1: float = 0.9
    b2: float = 0.99
    b3: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        check_moments(self)
        check_decay("CubicAdam", "b3", self.b3)

    def init(self, rank: int, dtype: Any) -> CubicAdamState:
        zeros = lambda: jnp.zeros(rank, dtype)
        return CubicAdamState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros())

    @property
    def laws(self) -> CubicAdamState:
        return CubicAdamState._make((SCALAR, VECTOR, SECOND_MOMENT, THIRD_MOMENT))

    def update(self, u: jax.Array, state: CubicAdamState, context: Context):
        count = linalg.tally(state.count)
        mean, second, third = (
            ema(old, u**power, decay)
            for old, power, decay in (
                (state.mean, 1, self.b1),
                (state.second, 2, self.b2),
                (state.third, 3, self.b3),
            )
        )
        a = jnp.cbrt(debias(third, self.b3, count))
        b = jnp.sqrt(debias(second, self.b2, count))
        c = debias(mean, self.b1, count)
        d = b * b - 4 * a * c
        lowest = linalg.safe_divide(2 * c, b + jnp.sqrt(jnp.maximum(d, 0)))
        u = jnp.where(d >= 0, lowest, linalg.safe_divide(c, b + self.eps))
        return u, CubicAdamState(count, mean, second, third)


@dataclasses.dataclass(frozen=True)
class Lion:
    """``u = sign(b1 m + (1-b1) u)``, then ``m <- b2 m + (1-b2) u``.

    Args:
      b1: decay inside the sign.
      b2: decay of the momentum.

    Raises:
      ValueError: for decays outside [0, 1).

    Cost: ``r`` numbers.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023.
    """

    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        check_decay("Lion", "b1", self.b1)
        check_decay("Lion", "b2", self.b2)

    def init(self, rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros(rank, dtype)

    @property
    def laws(self):
        return VECTOR

    def update(self, u: jax.Array, state: jax.Array, context: Context):
        return jnp.sign(ema(state, u, self.b1)), ema(state, u, self.b2)


class EMAState(NamedTuple):
    """State of `EMA`: steps and mean ``(r,)``."""

    count: jax.Array
    mean: jax.Array


@dataclasses.dataclass(frozen=True)
class EMA:
    """``m <- beta m + (1-beta) u``: momentum in the basis.

    Args:
      beta: decay.
      debias: correct for the start at zero.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``r`` numbers.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """

    beta: float = 0.9
    debias: bool = False

    def __post_init__(self):
        check_decay("EMA", "beta", self.beta)

    def init(self, rank: int, dtype: Any) -> EMAState:
        return EMAState(jnp.zeros((), jnp.int32), jnp.zeros(rank, dtype))

    @property
    def laws(self) -> EMAState:
        return EMAState._make((SCALAR, VECTOR))

    def update(self, u: jax.Array, state: EMAState, context: Context):
        state = EMAState(linalg.tally(state.count), ema(state.mean, u, self.beta))
        return debias(state.mean, self.beta, state.count) if self.debias else state.mean, state


def ema(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """``decay * old + (1 - decay) * new``."""
    return decay * old + (1 - decay) * new


def average(old: jax.Array, new: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    """`ema` of terms corrected for its start, from the corrected one before; ``count`` has it."""
    b = jnp.asarray(decay, old.dtype)
    return old + (1 - b) / (1 - b**count) * (new - old)


def debias(average: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    """An average that started at zero, corrected after ``count`` terms."""
    return average / (1 - jnp.asarray(decay, average.dtype) ** count)


def identity_at_first(matrix: jax.Array, count: jax.Array, context: Context) -> jax.Array:
    """The identity of the first basis while nothing was averaged yet."""
    return jnp.where(count == 0, jnp.diag(context.basis.live.astype(matrix.dtype)), matrix)


def check_moments(part: Any) -> None:
    """Checks ``b1``, ``b2`` and ``eps``."""
    owner = type(part).__name__
    check_decay(owner, "b1", part.b1)
    check_decay(owner, "b2", part.b2)
    check_least(owner, "eps", part.eps)
