"""What every operator is."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_decay

Function = Callable[[Any], jax.Array]
"""One point to the values ``(L,)`` of the modes there."""


@dataclasses.dataclass(frozen=True, eq=False)
class SampledOperator(abc.ABC):
    """A linear operator on functions, seen through samples.

    Whatever the measure behind an operator, its outputs include the importance weights, so that
    inner products are plain means over a batch: ``<f, h> = mean_i f(x_i) h(x_i)``.
    """

    sides: ClassVar[int] = 1
    """1 for a self-adjoint operator, 2 for one between different spaces."""

    group: ClassVar[int] = 1
    """Rows of a batch, next to each other, that are one sample and not independent."""

    exact: ClassVar[bool] = True
    """Whether an image is exact at its point, so that ``‖T f - lam f‖`` is a residual."""

    def init(self) -> Any:
        """What the sampler knows before the first batch: a pytree."""
        return ()

    @abc.abstractmethod
    def sample(self, key: jax.Array, size: int, state: Any = None) -> Any:
        """A batch: a pytree of arrays with ``size`` entries each, or as many as there are."""

    def adapt(self, state: Any, batch: Any, f: jax.Array) -> Any:
        """What the sampler knows after a batch with outputs ``f``, ``(B, L)``."""
        return state

    def efficiency(self, state: Any) -> jax.Array:
        """Effective sample size as a fraction of the batch, 1 where it is not known."""
        return jnp.ones(())

    def points(self, batch: Any) -> tuple[Any, ...]:
        """The points of a batch at which the functions of each side are called."""
        return (batch,) * self.sides

    def held_out(self) -> tuple["SampledOperator", Any]:
        """What a fit learns from, and the batches it is read from.

        Returns:
          The operator to learn from, and batches stacked along a first axis that are independent of
          each other and of it; this operator and ``None`` where every batch is a fresh sample.
        """
        return self, None

    @property
    def indices(self) -> tuple[int, ...] | None:
        """How many points each side has, where points are indices; else ``None``."""
        return None

    @property
    def least(self) -> float:
        """The number at and below which there are no modes, minus infinity where there are."""
        return -math.inf

    def dress(self, function: Function) -> Function:
        """The function of a point that a network's output stands for."""
        return function

    @abc.abstractmethod
    def apply(self, *args: Any) -> tuple[jax.Array, ...]:
        """``apply(function, batch) -> (f, T f)``, or ``apply(f, g, batch) -> (f, T g, g, T* f)``.

        Every output is ``(B, L)``.
        """


def with_constant(function: Function) -> Function:
    """The functions, after a first one that is 1 everywhere."""

    def extended(x: Any) -> jax.Array:
        values = function(x)
        return jnp.concatenate([jnp.ones(1, values.dtype), values])

    return extended


def check_rows(owner: str, name: str, value: Any, ndim: int) -> jax.Array:
    """A finite array of ``ndim`` axes."""
    value = jnp.asarray(value)
    check(
        value.ndim == ndim and value.size > 0,
        f"{owner}: {name} has shape {value.shape}; pass an array of {ndim} axes with entries.",
    )
    check(
        not jnp.issubdtype(value.dtype, jnp.inexact) or bool(jnp.all(jnp.isfinite(value))),
        f"{owner}: {name} has entries that are not finite; pass finite ones.",
    )
    return value


BLOCKS = 16
"""Number of batches that held-out rows make; their spread gives the standard errors."""

CHUNKS = 20
"""Number of pieces that rows without groups are cut into, of which some are held out whole."""

FEW = 20
"""Number of rows below which nothing is held out."""


def check_held_out(owner: str, part: Any) -> None:
    """A part of the rows in [0, 1), and a number of a group for each row."""
    check_decay(owner, "held_out_part", part.held_out_part)
    if part.groups is not None:
        groups, count = np.asarray(part.groups), part.rows
        check(
            groups.shape == (count,),
            f"{owner}: groups has shape {groups.shape}; pass the number of its trajectory for each "
            f"of the {count} rows.",
        )


def held_rows(count: int, part: float, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows to learn from, and those held out: whole groups, or whole pieces of one series.

    Neighbours in a series resemble each other, so that rows drawn at random would not be new.
    """
    everything, none = np.arange(count), np.arange(0)
    if part == 0 or count < FEW:
        return everything, none
    if groups is None:
        groups = everything * CHUNKS // count
    names, at = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return everything, none
    wanted = min(max(1, round(part * len(names))), len(names) - 1)
    chosen = np.floor((np.arange(wanted) + 0.5) * len(names) / wanted).astype(int)
    held = np.isin(at, chosen)
    return everything[~held], everything[held]


def blocks(rows: np.ndarray, least: int = 2) -> np.ndarray:
    """Rows as up to `BLOCKS` batches of neighbours, ``(n, k)``, of at least so many each.

    Among the upper half of the possible numbers it is the one that leaves out the fewest rows.
    """
    most = int(np.clip(len(rows) // max(least, 2), 1, BLOCKS))
    count = min(range(most, most // 2, -1), key=lambda n: len(rows) % n)
    return rows[: len(rows) // count * count].reshape(count, -1)
