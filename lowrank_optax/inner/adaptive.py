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


class GradientMoments(NamedTuple):
    """First and second moments of a gradient, both corrected for their start at zero.

    Attributes:
      mean: ``(r,)`` average of the gradients.
      second: ``(r,)`` average of their squares.
    """

    mean: jax.Array
    second: jax.Array


class AdamState(NamedTuple):
    """State of `Adam`.

    Attributes:
      count: steps.
      moments: the moments, corrected for their start.
      largest: ``(r,)`` decaying maximum of the second moment before its correction; ``None``
        without ``amsgrad_decay``.
    """

    count: jax.Array
    moments: GradientMoments
    largest: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Adam:
    r"""Adam in the coordinates of the basis.

    .. math:: m \leftarrow b_1 m + (1-b_1)\,u,\quad v \leftarrow b_2 v + (1-b_2)\,u^2,\quad
              u' = \hat m / (\sqrt{\hat v} + \epsilon)

    A hat stands for the correction of the start at zero: ``m_hat = m / (1 - b1^t)`` after ``t``
    steps. When the basis turns, ``m`` becomes ``C m`` and ``v`` becomes ``(C∘C) v``. ``b1=0`` is
    RMSprop. Where the denominator is zero, the step is zero: without ``eps`` that is so in slots
    that no gradient has reached.

    With ``amsgrad_decay``, a decaying maximum ``s`` takes the place of ``v``:

    .. math:: s \leftarrow \max(a\,s,\ v),\quad \hat s = s / (1 - b_2^t)

    The maximum is of ``v`` before its correction, as in the original and in torch; the one of
    `optax.amsgrad` is of ``v_hat``. It moves with the basis as ``v`` does.

    The state holds ``m_hat`` and ``v_hat``, because the centred law subtracts ``m²`` from ``v``,
    which has a meaning for corrected moments alone.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> adam, g = lro.inner.Adam(), jnp.array([3.0, -0.5])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, state = adam.update(g, adam.init(2, g.dtype), context)
      >>> print(u)                                # the first step has the size 1 everywhere
      [ 1. -1.]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: number added to the root, in units of the gradient.
      amsgrad_decay: decay ``a`` of the maximum of the second moment in [0, 1], a step; 1 is AMSGrad
        (Reddi et al., ICLR 2018), and by default (``None``) there is no maximum.
      centred: whether ``v`` moves as ``|(C∘C)(v - m²) + (C m)²|`` (Robert et al., LDAdam, ICLR
        2025); ``False`` by default.

    Raises:
      ValueError: for decays out of range or a negative ``eps``.

    Cost: ``2 r`` numbers, and ``4 r²`` flops when the basis turns; with ``amsgrad_decay`` ``3 r``
    and ``6 r²``.

    Source: Kingma and Ba, "Adam", ICLR 2015; the decay of the maximum is the original LRE's.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    amsgrad_decay: float | None = None
    centred: bool = False

    def __post_init__(self):
        check_moments(self)
        check_amsgrad(self)

    def init(self, rank: int, dtype: Any) -> AdamState:
        zeros = lambda: jnp.zeros(rank, dtype)
        largest = None if self.amsgrad_decay is None else zeros()
        return AdamState(jnp.zeros((), jnp.int32), GradientMoments(zeros(), zeros()), largest)

    @property
    def laws(self) -> AdamState:
        moments = MOMENTS if self.centred else GradientMoments._make((VECTOR, SECOND_MOMENT))
        return AdamState._make(
            (SCALAR, moments, None if self.amsgrad_decay is None else SECOND_MOMENT)
        )

    def update(self, u: jax.Array, state: AdamState, context: Context):
        count = linalg.tally(state.count)
        mean = average(state.moments.mean, u, self.b1, count)
        v = second = average(state.moments.second, u * u, self.b2, count)
        largest, decay = state.largest, self.amsgrad_decay
        if largest is not None and decay is not None:
            known = 1 - jnp.asarray(self.b2, v.dtype) ** count
            largest = jnp.maximum(decay * largest, known * second)
            v = largest / known
        u = linalg.safe_divide(mean, jnp.sqrt(v) + self.eps)
        return u, AdamState(count, GradientMoments(mean, second), largest)


class FullMatrixAdamState(NamedTuple):
    """State of `FullMatrixAdam`.

    Attributes:
      count: steps.
      mean: ``(r,)`` average of the gradients, not corrected for its start.
      covariance: ``(r, r)`` average of their outer products, not corrected.
      excess: ``(r,)`` how far the decaying maximum of the covariance's diagonal lies above that
        diagonal; ``None`` without ``amsgrad_decay``.
    """

    count: jax.Array
    mean: jax.Array
    covariance: jax.Array
    excess: jax.Array | None


@dataclasses.dataclass(frozen=True)
class FullMatrixAdam:
    r"""Adam with the whole matrix of second moments in the basis.

    .. math:: m \leftarrow b_1 m + (1-b_1)\,u,\quad M \leftarrow b_2 M + (1-b_2)\,u u^T,\quad
              u' = (\hat M + \epsilon I)^{-1/2}\, \hat m

    A hat stands for the correction of a start at zero. When the basis turns, ``M`` becomes
    ``C M C^T``.

    With ``identity=True`` the matrix starts as the identity of the first basis, as in the original;
    directions that join later start at zero. The correction then multiplies that identity by 99 in
    the first step (``b2 / (1 - b2)``), and hides gradients of 1e-3 for more than a thousand steps.
    With ``identity=False`` the matrix starts at zero and its root is a pseudo-inverse: updates have
    the size of Adam's along every axis of the gradients seen so far, whatever the gradient's unit,
    and are zero along all others.

    With ``amsgrad_decay``, a decaying maximum takes the place of the diagonal of ``M``:

    .. math:: M' = M + \mathrm{diag}(s - \mathrm{diag}\,M),\quad
              s \leftarrow \max(a\,s,\ \mathrm{diag}\,M)

    When the basis turns, ``s`` becomes the diagonal of ``C M' C^T``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.FullMatrixAdam(identity=False), jnp.array([3.0, 4.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, state = part.update(g, part.init(2, g.dtype), context)
      >>> print(u.round(3))                       # length 1 along the one axis that was seen
      [0.6 0.8]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the covariance, in [0, 1).
      eps: number added to the eigenvalues, in units of the squared gradient: the square of Adam's.
      identity: whether the covariance starts as the identity, ``True`` by default. Then ``1e-8``,
        and ``1e-8`` of the largest eigenvalue, are added to the eigenvalues once more.
      amsgrad_decay: decay ``a`` of the maximum of the diagonal in [0, 1], a step; 1 never lets it
        fall, and by default (``None``) there is no maximum.

    Raises:
      ValueError: for decays out of range or a negative ``eps``.

    Cost: ``r² + r`` numbers, ``r`` more with ``amsgrad_decay``; one ``eigh`` of size ``r`` a step,
    about ``9 r³`` flops.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with Adam's averages; the maximum is the
    original LRE's.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    identity: bool = True
    amsgrad_decay: float | None = None

    def __post_init__(self):
        check_moments(self)
        check_amsgrad(self)

    def init(self, rank: int, dtype: Any) -> FullMatrixAdamState:
        zeros = lambda *shape: jnp.zeros(shape, dtype)
        return FullMatrixAdamState(
            jnp.zeros((), jnp.int32),
            zeros(rank),
            zeros(rank, rank),
            None if self.amsgrad_decay is None else zeros(rank),
        )

    @property
    def laws(self) -> FullMatrixAdamState:
        excess = None if self.amsgrad_decay is None else SECOND_MOMENT
        return FullMatrixAdamState._make((SCALAR, VECTOR, MATRIX, excess))

    def update(self, u: jax.Array, state: FullMatrixAdamState, context: Context):
        count = linalg.tally(state.count)
        mean = ema(state.mean, u, self.b1)
        old = state.covariance
        if self.identity:
            old = identity_at_first(old, state.count, context)
        m = covariance = ema(old, jnp.outer(u, u), self.b2)
        excess, decay = state.excess, self.amsgrad_decay
        if excess is not None and decay is not None:
            # The excess moves as a second moment beside the whole matrix, so that the maximum moves
            # as the diagonal of the matrix that it is on; a maximum stored by itself would not
            # follow what turns from the entries beside the diagonal into it.
            largest = jnp.diagonal(state.covariance) + excess
            excess = jnp.maximum(decay * largest - jnp.diagonal(covariance), 0)
            m = covariance + jnp.diag(excess)
        m = debias(m, self.b2, count)
        if self.identity:
            root = linalg.matrix_power(m + self.eps * jnp.eye(len(u), dtype=u.dtype), -0.5)
        else:  # what was not seen is dropped before anything is added
            root = linalg.matrix_power(m, -0.5, damping=self.eps, rdamping=0.0)
        u = root @ debias(mean, self.b1, count)
        u = jnp.where(context.basis.live, u, 0)
        return u, FullMatrixAdamState(count, mean, covariance, excess)


class CubicAdamState(NamedTuple):
    """State of `CubicAdam`; the moments are not corrected for their start.

    Attributes:
      count: steps.
      mean: ``(r,)`` average of the gradients.
      second: ``(r,)`` average of their squares.
      third: ``(r,)`` average of their cubes.
    """

    count: jax.Array
    mean: jax.Array
    second: jax.Array
    third: jax.Array


@dataclasses.dataclass(frozen=True)
class CubicAdam:
    r"""Along every coordinate, the minimum of a cubic made of the first three moments.

    .. math:: \min_x\ \tfrac{A}{3} x^3 + \tfrac{B}{2} x^2 + C x,\quad
              A = \sqrt[3]{\hat m_3},\ B = \sqrt{\hat m_2},\ C = \hat m_1

    Its local minimum is ``x = -2C / (B + sqrt(B² - 4AC))``. As ``A`` goes to zero it becomes Adam's
    ``-C/B``. A cubic without a minimum gives ``x = -C/(B + eps)``. The part returns ``u = -x``.
    When the basis turns, the third moment is multiplied by ``C∘C∘C``, as the diagonal of the whole
    third-order tensor would be.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part = lro.inner.CubicAdam(b1=0.0, b2=0.9, b3=0.9)
      >>> basis, state = lro.Eigenbasis(jnp.ones(1), jnp.ones(1, bool)), part.init(1, jnp.float32)
      >>> for g in jnp.array([[1.0], [1.0], [-1.0]]):
      ...     u, state = part.update(g, state, lro.Context(g, basis, jnp.array(True)))
      >>> print(u.round(2))                       # A = .64, B = 1, C = -1, where Adam's is -1
      [-0.69]

    Args:
      b1: decay of the mean, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      b3: decay of the third moment, in [0, 1).
      eps: number added to the root where there is no minimum, in units of the gradient.

    Raises:
      ValueError: for decays outside [0, 1) or a negative ``eps``.

    Cost: ``3 r`` numbers, and ``6 r²`` flops when the basis turns.

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
    r"""Lion in the coordinates of the basis: the sign of an interpolated momentum.

    .. math:: u' = \mathrm{sign}(b_1 m + (1-b_1)\,u),\quad
              m \leftarrow b_2 m + (1-b_2)\,u

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lion, g = lro.inner.Lion(), jnp.array([3.0, -0.5])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, m = lion.update(g, lion.init(2, g.dtype), context)
      >>> print(u, m.round(3))
      [ 1. -1.] [ 0.03  -0.005]

    Args:
      b1: decay inside the sign, in [0, 1).
      b2: decay of the momentum, in [0, 1).

    Raises:
      ValueError: for decays outside [0, 1).

    Cost: ``r`` numbers, and ``2 r²`` flops when the basis turns.

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
    """State of `EMA`.

    Attributes:
      count: steps.
      mean: ``(r,)`` average of the updates, not corrected for its start.
    """

    count: jax.Array
    mean: jax.Array


@dataclasses.dataclass(frozen=True)
class EMA:
    r"""Momentum in the basis: a running average of the updates.

    .. math:: m \leftarrow \beta m + (1-\beta)\,u,\quad u' = m

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.EMA(beta=0.75), jnp.array([4.0, -8.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, _ = part.update(g, part.init(2, g.dtype), context)
      >>> print(u)                                # a quarter, as ``debias`` is off
      [ 1. -2.]

    Args:
      beta: decay of the average, in [0, 1).
      debias: whether the average is corrected for its start at zero; ``False`` by default.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``r`` numbers, and ``2 r²`` flops when the basis turns.

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
    """The `ema` of ``count`` terms, corrected for its start, from the corrected one before."""
    b = jnp.asarray(decay, old.dtype)
    return old + (1 - b) / (1 - b**count) * (new - old)


def debias(average: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    """An average that started at zero, corrected after ``count`` terms."""
    return average / (1 - jnp.asarray(decay, average.dtype) ** count)


def identity_at_first(matrix: jax.Array, count: jax.Array, context: Context) -> jax.Array:
    """The matrix, or the identity of the first basis while no term is in the average."""
    return jnp.where(count == 0, jnp.diag(context.basis.live.astype(matrix.dtype)), matrix)


def check_moments(part: Any) -> None:
    """Checks ``b1``, ``b2`` and ``eps``."""
    owner = type(part).__name__
    check_decay(owner, "b1", part.b1)
    check_decay(owner, "b2", part.b2)
    check_least(owner, "eps", part.eps)


def check_amsgrad(part: Any) -> None:
    """Checks ``amsgrad_decay``."""
    if part.amsgrad_decay is not None:
        check_decay(type(part).__name__, "amsgrad_decay", part.amsgrad_decay, closed=True)
