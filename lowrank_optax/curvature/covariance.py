"""Curvatures that take one column from every step: a gradient or what is made of it."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, require
from lowrank_optax._core.layout import Layout, cast_like, stack
from lowrank_optax._core.rows import write
from lowrank_optax._core.types import Correction, Vector
from lowrank_optax.curvature._curvature import (
    Curvature,
    Evidence,
    Observation,
    empty_params_row,
    flat,
    need_params,
    read_row,
    replace_row,
    select,
)


class Collected(NamedTuple):
    """Columns since the last update of the basis.

    Attributes:
      columns: columns, ``(window, size)`` for every piece.
      weights: ``(n, window)`` weights, 0 where a slot is empty.
      fill: ``(n,)`` number of columns that came; beyond ``window`` they overwrite the oldest.
      memory: state of the curvature besides its columns.
    """

    columns: Any
    weights: jax.Array
    fill: jax.Array
    memory: Any


class Collecting(Curvature):
    """The correction ``sum_i w_i c_i c_i^T`` with one column for each step since the last update.

    With an update every ``k`` steps the last ``min(k, rank)`` columns are collected, in as many
    further rows. With ``k = 1`` nothing is collected.
    """

    functions: ClassVar[frozenset[str] | None] = frozenset()

    def init_memory(self, layout: Layout) -> Any:
        """The memory before the first step."""
        return ()

    def update_memory(self, layout: Layout, memory: Any, seen: Observation) -> Any:
        """The memory after a step; groups that do not accept the step keep theirs."""
        return memory

    @abc.abstractmethod
    def column(
        self, layout: Layout, memory: Any, seen: Observation | Evidence
    ) -> tuple[Vector | None, jax.Array | None]:
        """The step's column, ``None`` for the gradient, and its weight ``(n,)``, ``None`` for 1."""

    def init(self, layout: Layout, window: int) -> Any:
        memory = self.init_memory(layout)
        if window == 1:
            return memory
        return Collected(
            layout.store(layout.zeros(window)),
            jnp.zeros((layout.n, window), layout.dtype),
            jnp.zeros(layout.n, jnp.int32),
            memory,
        )

    def observe(self, layout: Layout, state: Any, seen: Observation) -> Any:
        if not isinstance(state, Collected):
            return self.update_memory(layout, state, seen)
        memory = self.update_memory(layout, state.memory, seen)
        column, weight = self.column(layout, memory, seen)
        columns, window = layout.stored(state.columns), state.weights.shape[1]
        weight = jnp.ones(layout.n, layout.dtype) if weight is None else weight
        # A column that is not finite would spoil the sum with all that were collected beside it.
        sound = seen.accept & jnp.isfinite(weight)
        if column is None:
            column = seen.g
        else:
            sound = sound & jnp.isfinite(layout.inner(column, column))
        slots = jnp.where(sound, state.fill % window, window)[:, None]
        columns = write(columns, layout, slots, cast_like(stack(column), columns))
        weights = jnp.where(slots == jnp.arange(window), weight[:, None], state.weights)
        fill = linalg.tally(state.fill, sound, window)
        return Collected(layout.store(columns), weights, fill, memory)

    def undo(
        self, layout: Layout, failed: jax.Array, again: jax.Array, state: Any, before: Any
    ) -> Any:
        if not isinstance(state, Collected):
            return state
        kept = jnp.where(again[:, None], 0, before.weights), jnp.where(again, 0, before.fill)
        return state._replace(
            weights=jnp.where(failed[:, None], kept[0], state.weights),
            fill=jnp.where(failed, kept[1], state.fill),
        )

    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        if not isinstance(state, Collected):
            column, weight = self.column(layout, state, evidence)
            return Correction(
                None if column is None else stack(column),
                weights=None if weight is None else weight[:, None],
            ), state
        emptied = state._replace(
            weights=jnp.where(evidence.due[:, None], 0, state.weights),
            fill=jnp.where(evidence.due, 0, state.fill),
        )
        return Correction(layout.stored(state.columns), weights=state.weights), emptied


@dataclasses.dataclass(frozen=True)
class Covariance(Collecting):
    """Uncentred covariance of the gradients: the correction is ``+ g g^T``.

    With an update every ``k`` steps it is the sum over the last ``min(k, rank)`` gradients.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.curvature.Covariance(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> g = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(g, tx.init(g))
      >>> print(state.basis.matrix[0])            # I + g g^T
      [[2. 2.]
       [2. 5.]]

    Cost: with ``k = 1`` nothing beyond the projection's own pass over the rows; otherwise
    ``min(k, rank) d`` numbers for the gradients in between.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    def column(self, layout: Layout, memory: Any, seen: Observation | Evidence):
        return None, None


class Excess(NamedTuple):
    """Losses that were seen, ``(n,)`` each.

    Attributes:
      lowest: lowest loss so far, infinite before the first.
      excess: last loss less the one that is subtracted from it.
    """

    lowest: jax.Array
    excess: jax.Array


@dataclasses.dataclass(frozen=True)
class CovarianceTimesLoss(Collecting):
    """Covariance of gradients times loss: the correction is ``+ (l g)(l g)^T``.

    ``l`` is the loss. With ``adaptive`` it is the loss less the lowest one before it, on the first
    step less zero. ``update`` needs ``value``, the loss; a loss that is not finite gives no
    correction. Experimental.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.experimental.CovarianceTimesLoss(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> g = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(g, tx.init(g), value=3.0)
      >>> print(state.basis.matrix[0])            # I + 9 g g^T
      [[10. 18.]
       [18. 37.]]

    Args:
      adaptive: whether the lowest loss so far is subtracted, ``True`` by default.

    Raises:
      ValueError: by ``update``, without ``value``.

    Cost: that of `Covariance`, and with an update at every step one more pass over the rows.

    Source: the original LRE's curvature of that name.
    """

    adaptive: bool = True

    def init_memory(self, layout: Layout) -> Excess:
        return Excess(jnp.full(layout.n, jnp.inf, layout.dtype), jnp.zeros(layout.n, layout.dtype))

    def update_memory(self, layout: Layout, memory: Excess, seen: Observation) -> Excess:
        value = jnp.asarray(
            require("CovarianceTimesLoss", seen.extra, "value", "the loss"), layout.dtype
        )
        base = jnp.where(jnp.isfinite(memory.lowest) & self.adaptive, memory.lowest, 0)
        good = seen.accept & jnp.isfinite(value)
        return Excess(
            jnp.where(good, jnp.minimum(memory.lowest, value), memory.lowest),
            jnp.where(seen.accept, jnp.where(good, value - base, 0), memory.excess),
        )

    def column(self, layout: Layout, memory: Excess, seen: Observation | Evidence):
        return None, memory.excess**2


class Mean(NamedTuple):
    """A running average of gradients.

    Attributes:
      row: average, a row ``(1, size)`` for every piece.
      begun: ``(n,)`` booleans, true once a gradient is in it.
    """

    row: Any
    begun: jax.Array


@dataclasses.dataclass(frozen=True)
class GradientEMA(Collecting):
    r"""Covariance of the momentum: the correction is ``+ m m^T``.

    .. math:: m \leftarrow \beta m + (1-\beta)\,g

    The average starts at the first gradient.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.curvature.GradientEMA(beta=0.5), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in jnp.array([[1.0, 0.0], [1.0, 2.0]]):
      ...     _, state = tx.update(g, state)
      >>> print(state.basis.matrix[0])            # I + m m^T of m = (1, 0) and of m = (1, 1)
      [[3. 1.]
       [1. 2.]]

    Args:
      beta: decay of the average, in [0, 1).

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``d`` numbers in float32 at least, and one more pass over the rows than `Covariance`.

    Source: the original LRE's ``EMA`` curvature, which whitens by the momentum as SOAP's and
    Shampoo's accumulators do by the gradient.
    """

    beta: float = 0.9

    def __post_init__(self):
        check_decay("GradientEMA", "beta", self.beta)

    def init_memory(self, layout: Layout) -> Mean:
        row = [jnp.zeros((1, size), layout.dtype) for size in layout.sizes]
        return Mean(layout.store(row), jnp.zeros(layout.n, bool))

    def update_memory(self, layout: Layout, memory: Mean, seen: Observation) -> Mean:
        gains = layout.to_pieces(
            jnp.where(memory.begun, 1 - jnp.asarray(self.beta, layout.dtype), 1)
        )
        mean = [
            m + c * (g - m)
            for c, m, g in zip(gains, read_row(layout, memory.row), seen.g, strict=True)
        ]
        return Mean(replace_row(layout, seen.accept, memory.row, mean), memory.begun | seen.accept)

    def column(self, layout: Layout, memory: Mean, seen: Observation | Evidence):
        return read_row(layout, memory.row), None


@dataclasses.dataclass(frozen=True)
class Parameters(Collecting):
    """Uncentred covariance of the parameters: the correction is ``+ x x^T``.

    Parameters that are all zero span nothing, and the column is then the gradient. Experimental.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.experimental.Parameters(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> g, x = jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
      >>> _, state = tx.update(g, tx.init(x), x)
      >>> print(state.basis.matrix[0])            # I + x x^T
      [[2. 2.]
       [2. 5.]]

    Raises:
      ValueError: by ``update``, without ``params``.

    Cost: one more pass over the rows than `Covariance`.

    Source: the original LRE's curvature of that name.
    """

    def column(self, layout: Layout, memory: Any, seen: Observation | Evidence):
        x = flat(layout, need_params("Parameters", seen.params))
        return select(layout, layout.inner(x, x) > 0, x, seen.g), None


class Moves(NamedTuple):
    """The last parameters and the last step.

    Attributes:
      params: last parameters, a row ``(1, size)`` for every piece.
      step: last step, or the gradient while there is none, a row likewise.
      begun: ``(n,)`` booleans, true once parameters were seen.
    """

    params: Any
    step: Any
    begun: jax.Array


@dataclasses.dataclass(frozen=True)
class Updates(Collecting):
    """Uncentred covariance of the steps taken: the correction is ``+ s s^T``, ``s = x - x_prev``.

    While the parameters have not moved, the column is the gradient. Experimental.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.experimental.Updates(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> g, x = jnp.array([1.0, 0.0]), jnp.zeros(2); state = tx.init(x)
      >>> for step in jnp.array([[0.0, 0.0], [0.0, 2.0]]):
      ...     _, state = tx.update(g, state, x + step)
      >>> print(state.basis.matrix[0])            # I + g g^T + s s^T
      [[2. 0.]
       [0. 5.]]

    Raises:
      ValueError: by ``update``, without ``params``.

    Cost: ``2 d`` numbers, and one more pass over the rows than `Covariance`.

    Source: the original LRE's curvature of that name.
    """

    def init_memory(self, layout: Layout) -> Moves:
        return Moves(empty_params_row(layout), empty_params_row(layout), jnp.zeros(layout.n, bool))

    def update_memory(self, layout: Layout, memory: Moves, seen: Observation) -> Moves:
        x = flat(layout, need_params("Updates", seen.params))
        step = [a - b for a, b in zip(x, read_row(layout, memory.params), strict=True)]
        some = memory.begun & (layout.inner(step, step) > 0)
        return Moves(
            replace_row(layout, seen.accept, memory.params, x),
            replace_row(layout, seen.accept, memory.step, select(layout, some, step, seen.g)),
            memory.begun | seen.accept,
        )

    def column(self, layout: Layout, memory: Moves, seen: Observation | Evidence):
        return read_row(layout, memory.step), None
