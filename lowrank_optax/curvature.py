"""Curvatures: what is measured at every step and handed to the basis as a low-rank correction."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._tree import Layout, cast_like, stack, write
from lowrank_optax._types import Correction, Vector


class Observation(NamedTuple):
    """What a curvature may look at on every step.

    Attributes:
      g: the gradient.
      accept: ``(n,)`` the groups whose gradient is finite and not zero.
      params: the parameters, or ``None`` where none were passed.
      extra: the extra arguments of ``update``.
    """

    g: Vector
    accept: jax.Array
    params: Any
    extra: Mapping[str, Any]


class Evidence(NamedTuple):
    """What a curvature may look at on a step that updates the basis.

    Attributes:
      g: the gradient.
      due: ``(n,)`` the groups whose basis is to be updated.
      params: the parameters, or ``None`` where none were passed.
      extra: the extra arguments of ``update``.
      key: a random key of this step.
      apply: ``(vector, gamma) -> B v``, with the basis as it is, its eigenvalues unregularised, and
        ``gamma``, ``(n,)``, as the curvature outside it. Two passes over the rows.
      project: ``vector -> Q Q^T v``, likewise two passes.
    """

    g: Vector
    due: jax.Array
    params: Any
    extra: Mapping[str, Any]
    key: jax.Array
    apply: Callable[[Vector, jax.Array], Vector]
    project: Callable[[Vector], Vector]


class Curvature(abc.ABC):
    """Observes every step; gives a correction on the steps that update the basis.

    ``provides`` and ``needs`` hold names from `NEEDS`.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, layout: Layout, window: int) -> Any:
        """A fresh state; at most ``window`` observations are collected between two updates."""
        return ()

    def observe(self, layout: Layout, state: Any, seen: Observation) -> Any:
        """The state after seeing a step."""
        return state

    def outside(self, state: Any) -> jax.Array:
        """The curvature assumed outside the basis, ``(n,)``; for those that provide ``outside``."""
        raise AttributeError(f"{type(self).__name__} assumes no curvature outside the basis.")

    @abc.abstractmethod
    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        """The correction of a step that updates the basis, after `observe`."""


class Collected(NamedTuple):
    """Gradients since the last update of the basis.

    Attributes:
      columns: ``(window, leaf.size)`` a leaf.
      fill: ``(n,)`` how many came; beyond ``window`` the oldest are overwritten.
    """

    columns: Any
    fill: jax.Array


@dataclasses.dataclass(frozen=True)
class Covariance(Curvature):
    """Uncentred covariance of the gradients: the correction is ``+ g g^T``.

    With an update every ``k`` steps it is the sum over the last ``k`` gradients, or over as many
    as the basis has ranks where that is less; they are collected in ``min(k, rank)`` further rows.

    Cost: none of its own; with ``k = 1`` the projection's pass over the rows serves both.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    def init(self, layout: Layout, window: int) -> Any:
        if window == 1:
            return ()
        return Collected(layout.tree(layout.zeros(window)), jnp.zeros(layout.n, jnp.int32))

    def observe(self, layout: Layout, state: Any, seen: Observation) -> Any:
        if not isinstance(state, Collected):
            return state
        columns = layout.leaves(state.columns)
        window = columns[0].shape[0] if columns else 1
        slots = jnp.where(seen.accept, state.fill % window, window)[:, None]
        columns = write(columns, layout, slots, cast_like(stack(seen.g), columns))
        return Collected(layout.tree(columns), state.fill + seen.accept)

    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        if not isinstance(state, Collected):
            return Correction(None), state
        columns = layout.leaves(state.columns)
        window = columns[0].shape[0] if columns else 1
        weights = (jnp.arange(window) < state.fill[:, None]).astype(layout.dtype)
        fill = jnp.where(evidence.due, 0, state.fill)
        return Correction(columns, weights=weights), Collected(state.columns, fill)
