"""What every operator is."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check

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
