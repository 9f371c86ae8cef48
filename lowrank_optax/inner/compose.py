"""Putting inner parts together, and letting optax's transformations be parts."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check
from lowrank_optax._core.types import Context, Inner


class Stateless(abc.ABC):
    """A part without state."""

    def init(self, rank: int, dtype: Any) -> tuple[()]:
        return ()

    @property
    def laws(self) -> tuple[()]:
        return ()

    @abc.abstractmethod
    def update(self, u: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        """New coordinates ``(r,)`` and the state as it came."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parts one after the other; each gets the output of the one before.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part = lro.inner.Chain((lro.inner.Normalize(), lro.inner.ClipValue(0.7)))
      >>> g, basis = jnp.array([3.0, 4.0]), lro.Eigenbasis(jnp.ones(2), jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, _ = part.update(g, part.init(2, g.dtype), context)
      >>> print(u)                                # (.6, .8), then clipped
      [0.6 0.7]

    Args:
      parts: sequence of inner parts, at least one; a sequence inside it becomes a `Chain`.

    Raises:
      ValueError: for no parts, or for something that is not a part.

    Cost: that of the parts.

    Source: elementary.
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
    """An optax transformation as a part, which runs on the coordinates ``(r,)`` of the basis.

    Example:
      >>> import jax.numpy as jnp, optax, lowrank_optax as lro
      >>> part = lro.inner.Optax(optax.trace(0.5), laws=optax.TraceState(lro.VECTOR))
      >>> g, basis = jnp.array([2.0, 4.0]), lro.Eigenbasis(jnp.ones(2), jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> _, state = part.update(g, part.init(2, g.dtype), context)
      >>> print(part.update(g, state, context)[0])
      [3. 6.]

    Args:
      transformation: `optax.GradientTransformation` that does not read the parameters.
      laws: tree prefix of its state that names the `Law` of every part of it. For
        `optax.scale_by_adam` it is ``optax.ScaleByAdamState(SCALAR, VECTOR, SECOND_MOMENT)``. By
        default (``None``) the state must hold no arrays.

    Raises:
      ValueError: for something that is not an optax transformation; when arrays of the state have
        no law.

    Cost: that of the transformation for ``r`` parameters, and ``2 r²`` flops for each vector of its
    state when the basis turns.

    Source: elementary.
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
    """Makes an inner part of what a user may pass for one.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.inner.as_inner([lro.inner.Sign(), lro.inner.ClipNorm(2.0)])
      Chain(parts=(Sign(), ClipNorm(max_norm=2.0)))

    Args:
      inner: inner part, or a sequence of them.

    Returns:
      The part itself, or a `Chain` of the sequence.

    Raises:
      ValueError: for anything else, an optax transformation without laws included; for an empty
        sequence.
    """
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
