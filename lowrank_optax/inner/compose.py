"""Putting inner parts together, and letting optax's transformations be parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check
from lowrank_optax._core.types import Context, Inner


class Stateless:
    """A part without state."""

    def init(self, rank: int, dtype: Any) -> tuple[()]:
        return ()

    @property
    def laws(self) -> tuple[()]:
        return ()


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parts one after the other; each sees the output of the one before.

    Args:
      parts: at least one.

    Raises:
      ValueError: for no parts, or for something that is not a part.
    """

    parts: tuple[Inner, ...]

    def __post_init__(self):
        check(self.parts, "inner is empty; pass at least one part, such as lro.inner.Adam().")
        object.__setattr__(self, "parts", tuple(as_inner(part) for part in self.parts))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(getattr(part, "needs", frozenset()) for part in self.parts))

    def init(self, rank: int, dtype: Any) -> tuple[Any, ...]:
        return tuple(part.init(rank, dtype) for part in self.parts)

    @property
    def laws(self) -> tuple[Any, ...]:
        return tuple(part.laws for part in self.parts)

    def update(self, u: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        states = []
        for part, old in zip(self.parts, state, strict=True):
            u, new = part.update(u, old, context)
            states.append(new)
        return u, tuple(states)


@dataclasses.dataclass(frozen=True)
class Optax:
    """An optax transformation as a part, run on the coordinates ``(r,)`` as if on parameters.

    Args:
      transformation: any `optax.GradientTransformation` that does not read the parameters.
      laws: the laws of its state, as a tree prefix of it: for `optax.scale_by_adam`
        ``optax.ScaleByAdamState(SCALAR, VECTOR, SECOND_MOMENT)``. ``None`` where the state holds
        no arrays.

    Raises:
      ValueError: when arrays of the state have no law.

    Example:
      >>> import optax, lowrank_optax as lro
      >>> from lowrank_optax import VECTOR
      >>> part = lro.inner.Optax(optax.trace(0.9), laws=optax.TraceState(VECTOR))
    """

    transformation: optax.GradientTransformation
    laws: Any = None

    def __post_init__(self):
        check(
            isinstance(self.transformation, optax.GradientTransformation),
            f"inner.Optax: the transformation is {self.transformation!r}; pass an "
            "optax.GradientTransformation.",
        )

    def init(self, rank: int, dtype: Any) -> Any:
        state = self.transformation.init(jnp.zeros(rank, dtype))
        if self.laws is None:
            check(
                not jax.tree.leaves(state),
                f"inner.Optax: the state {type(state).__name__} holds arrays; name how each moves "
                "with the basis, as inner.Optax(transformation, laws=...).",
            )
        return state

    def update(self, u: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        new, state = self.transformation.update(u, state)
        return jnp.asarray(new), state


def as_inner(inner: Any) -> Any:
    """A part as it is, a sequence of parts as a `Chain`."""
    if isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner: {inner!r} does not say how its state moves with the basis; pass "
            "lro.inner.Optax(transformation, laws=...)."
        )
    if isinstance(inner, Sequence) and not isinstance(inner, str):
        return Chain(tuple(inner))
    check(
        not isinstance(inner, type) and all(hasattr(inner, a) for a in ("init", "laws", "update")),
        f"inner: {inner!r} is not an inner part; pass one such as lro.inner.Adam(), or a sequence "
        "of them.",
    )
    return inner
