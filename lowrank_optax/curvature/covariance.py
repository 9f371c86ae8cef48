"""Curvatures that take one column from every step: gradients and what is made of them."""

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
    flat,
    need_params,
    params_row,
    recall,
    remember,
    select,
)


class Collected(NamedTuple):
    """Columns since the last update of the basis.

    Attributes:
      columns: ``(window, leaf.size)`` a leaf.
      weights: ``(n, window)``, 0 where a slot is empty.
      fill: ``(n,)`` how many came; beyond ``window`` the oldest are overwritten.
      memory: what else the curvature remembers.
    """

    columns: Any
    weights: jax.Array
    fill: jax.Array
    memory: Any


class Collecting(Curvature):
    """The correction ``sum_i w_i c_i c_i^T`` over one column for each step since the last update.

    With an update every ``k`` steps these are the last ``k``, or as many as the basis has ranks
    where that is less: they are collected in ``min(k, rank)`` further rows. With ``k = 1`` nothing
    is collected.
    """

    functions: ClassVar[frozenset[str] | None] = frozenset()

    def start(self, layout: Layout) -> Any:
        """The memory before the first step."""
        return ()

    def remember(self, layout: Layout, memory: Any, seen: Observation) -> Any:
        """The memory after a step, unchanged in the groups that do not accept it."""
        return memory

    @abc.abstractmethod
    def column(
        self, layout: Layout, memory: Any, seen: Observation | Evidence
    ) -> tuple[Vector | None, jax.Array | None]:
        """The step's column, ``None`` for the gradient, and its weight ``(n,)``, ``None`` for 1."""

    def init(self, layout: Layout, window: int) -> Any:
        memory = self.start(layout)
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
            return self.remember(layout, state, seen)
        memory = self.remember(layout, state.memory, seen)
        column, weight = self.column(layout, memory, seen)
        columns, window = layout.stored(state.columns), state.weights.shape[1]
        weight = jnp.ones(layout.n, layout.dtype) if weight is None else weight
        # One column that is not finite would spoil all that it is collected with.
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

    With an update every ``k`` steps it is the sum over the last ``k`` gradients, or over as many
    as the basis has ranks where that is less; they are collected in ``min(k, rank)`` further rows.

    Cost: none of its own; with ``k = 1`` the projection's pass over the rows serves both.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    def column(self, layout: Layout, memory: Any, seen: Observation | Evidence):
        return None, None


class Excess(NamedTuple):
    """The lowest loss so far (infinite before the first) and the last one's excess, ``(n,)``."""

    lowest: jax.Array
    excess: jax.Array


@dataclasses.dataclass(frozen=True)
class CovarianceTimesLoss(Collecting):
    """Covariance of gradients times loss: the correction is ``+ (l g)(l g)^T``, weight ``l²``.

    ``l`` is the loss, or with ``adaptive`` its excess over the lowest loss before (over zero on the
    first step). ``update`` needs ``value``, the loss; one that is not finite gives no correction.
    Experimental.

    Args:
      adaptive: subtract the lowest loss seen so far.

    Raises:
      ValueError: by ``update``, without ``value``.

    Cost: that of `Covariance`, and with an update at every step one more pass over the rows.

    Source: the original LRE's curvature of that name.
    """

    adaptive: bool = True

    def start(self, layout: Layout) -> Excess:
        return Excess(jnp.full(layout.n, jnp.inf, layout.dtype), jnp.zeros(layout.n, layout.dtype))

    def remember(self, layout: Layout, memory: Excess, seen: Observation) -> Excess:
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
    """A running average: one row ``(1, leaf.size)`` a leaf, and ``(n,)`` whether it has begun."""

    row: Any
    begun: jax.Array


@dataclasses.dataclass(frozen=True)
class GradientEMA(Collecting):
    """Covariance of the momentum: the correction is ``+ m m^T``, ``m <- beta m + (1-beta) g``.

    The average starts at the first gradient.

    Args:
      beta: its decay.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``d`` numbers in float32 at least, and one more pass over the rows than `Covariance`.

    Source: the original LRE's ``EMA`` curvature, which whitens by the momentum as SOAP's and
    Shampoo's accumulators do by the gradient.
    """

    beta: float = 0.9

    def __post_init__(self):
        check_decay("GradientEMA", "beta", self.beta)

    def start(self, layout: Layout) -> Mean:
        row = [jnp.zeros((1, size), layout.dtype) for size in layout.sizes]
        return Mean(layout.store(row), jnp.zeros(layout.n, bool))

    def remember(self, layout: Layout, memory: Mean, seen: Observation) -> Mean:
        gains = layout.to_leaves(
            jnp.where(memory.begun, 1 - jnp.asarray(self.beta, layout.dtype), 1)
        )
        mean = [
            m + c * (g - m)
            for c, m, g in zip(gains, recall(layout, memory.row), seen.g, strict=True)
        ]
        return Mean(remember(layout, seen.accept, memory.row, mean), memory.begun | seen.accept)

    def column(self, layout: Layout, memory: Mean, seen: Observation | Evidence):
        return recall(layout, memory.row), None


@dataclasses.dataclass(frozen=True)
class Parameters(Collecting):
    """Uncentred covariance of the parameters: the correction is ``+ x x^T``.

    Parameters that are all zero span nothing: then the column is the gradient. Experimental.

    Raises:
      ValueError: by ``update``, without ``params``.

    Cost: one more pass over the rows than `Covariance`.

    Source: the original LRE's curvature of that name.
    """

    def column(self, layout: Layout, memory: Any, seen: Observation | Evidence):
        x = flat(layout, need_params("Parameters", seen.params))
        return select(layout, layout.inner(x, x) > 0, x, seen.g), None


class Moves(NamedTuple):
    """The last parameters and the last step, a row ``(1, leaf.size)`` a leaf; ``(n,)`` begun."""

    params: Any
    step: Any
    begun: jax.Array


@dataclasses.dataclass(frozen=True)
class Updates(Collecting):
    """Uncentred covariance of the steps taken: the correction is ``+ s s^T``, ``s = x - x_prev``.

    While the parameters have not moved, the column is the gradient. Experimental.

    Raises:
      ValueError: by ``update``, without ``params``.

    Cost: ``2 d`` numbers, and one more pass over the rows than `Covariance`.

    Source: the original LRE's curvature of that name.
    """

    def start(self, layout: Layout) -> Moves:
        return Moves(params_row(layout), params_row(layout), jnp.zeros(layout.n, bool))

    def remember(self, layout: Layout, memory: Moves, seen: Observation) -> Moves:
        x = flat(layout, need_params("Updates", seen.params))
        step = [a - b for a, b in zip(x, recall(layout, memory.params), strict=True)]
        some = memory.begun & (layout.inner(step, step) > 0)
        return Moves(
            remember(layout, seen.accept, memory.params, x),
            remember(layout, seen.accept, memory.step, select(layout, some, step, seen.g)),
            memory.begun | seen.accept,
        )

    def column(self, layout: Layout, memory: Moves, seen: Observation | Evidence):
        return recall(layout, memory.step), None
