"""What every curvature offers the engine, and what it may look at."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Columns, Correction, Outside, Vector


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
      probed: whether the correction's ``probe`` will be read, by an inner part or by
        `Curvature.learn` (static).
      axis_name: axes of `jax.pmap` or `jax.shard_map` over which functions of the parameters
        differ, or ``None``; see `across` and `gathered`.
    """

    g: Vector
    due: jax.Array
    params: Any
    extra: Mapping[str, Any]
    key: jax.Array
    apply: Callable[[Vector, jax.Array], Vector]
    project: Callable[[Vector], Vector]
    probed: bool = False
    axis_name: Any = None


class Curvature(abc.ABC):
    """Observes every step; gives a correction on the steps that update the basis.

    ``provides`` and ``needs`` hold names from `NEEDS`, ``functions`` the extra arguments of
    ``update`` that it reads and that are functions; ``None`` stands for all that come.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    functions: ClassVar[frozenset[str] | None] = None
    learns: ClassVar[bool] = False
    """Whether `outside` comes from `learn`."""

    def init(self, layout: Layout, window: int) -> Any:
        """A fresh state; at most ``window`` observations are collected between two updates."""
        return ()

    def observe(self, layout: Layout, state: Any, seen: Observation) -> Any:
        """The state after seeing a step."""
        return state

    def undo(
        self, layout: Layout, failed: jax.Array, again: jax.Array, state: Any, before: Any
    ) -> Any:
        """The state after a step whose update of the basis ``failed``, ``(n,)``.

        ``before`` is the state before `observe`. What a step collected is to be forgotten, and what
        was collected before it kept, unless the last update had failed ``again``, ``(n,)``: then
        all is to be forgotten.
        """
        return state

    def gradient(self, layout: Layout, state: Any, g: Vector) -> Vector:
        """The gradient that the step is to follow: ``g`` itself, but for unrolled residuals."""
        return g

    def learn(self, layout: Layout, state: Any, due: jax.Array, seen: Outside) -> Any:
        """The state after the groups that are ``due`` absorbed their correction.

        ``seen``, ``(n,)`` each, is what the correction's ``probe`` shows outside the new basis.
        """
        return state

    def outside(self, state: Any) -> jax.Array:
        """The curvature assumed outside the basis, ``(n,)``; for those that provide ``outside``."""
        raise AttributeError(f"{type(self).__name__} assumes no curvature outside the basis.")

    @abc.abstractmethod
    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        """The correction of a step that updates the basis, after `observe`."""


def across(evidence: Evidence, vector: Vector) -> Vector:
    """The mean of a vector that every device has of its own part of the batch."""
    if not evidence.axis_name:
        return vector
    return [lax.pmean(x, evidence.axis_name) for x in vector]


def gathered(evidence: Evidence, columns: Columns) -> Columns:
    """The columns of all devices, of which every one has those of its own part of the batch."""
    if not evidence.axis_name:
        return columns
    return [lax.all_gather(c, evidence.axis_name, tiled=True) for c in columns]


def need_params(owner: str, params: Any) -> Any:
    """The parameters, or an error that says how to pass them."""
    check(
        params is not None,
        f"{owner} needs the parameters, which were not passed: call "
        "tx.update(grads, state, params).",
    )
    return params


def flat(layout: Layout, tree: Any) -> Vector:
    """A tree as a vector in the dtype of the small algebra: differences must not be rounded."""
    return [jnp.reshape(x, -1).astype(layout.dtype) for x in layout.leaves(tree)]


def scale(layout: Layout, factors: jax.Array, vector: Vector) -> Vector:
    """A vector times the factor ``(n,)`` of each group; 0 wherever that is 0."""
    return [
        jnp.where(c == 0, 0, c * x) for c, x in zip(layout.to_leaves(factors), vector, strict=True)
    ]


def select(layout: Layout, which: jax.Array, one: Vector, other: Vector) -> Vector:
    """The groups of ``one`` where ``which``, ``(n,)``, and of ``other`` elsewhere."""
    return [
        jnp.where(c, x, y.astype(x.dtype))
        for c, x, y in zip(layout.to_leaves(which), one, other, strict=True)
    ]


def remember(layout: Layout, when: jax.Array, row: Any, vector: Vector) -> Any:
    """A stored row ``(1, leaf.size)`` a leaf, replaced in the groups ``when``, ``(n,)``."""
    old = layout.stored(row)
    new = [jnp.reshape(x, (1, -1)).astype(y.dtype) for x, y in zip(vector, old, strict=True)]
    return layout.store(select(layout, when, new, old))


def recall(layout: Layout, row: Any) -> Vector:
    """A stored row as a vector."""
    return [x[0].astype(layout.dtype) for x in layout.stored(row)]


def params_row(layout: Layout) -> Any:
    """An empty row for parameters, in their own dtypes whatever those of the rows."""
    return layout.store(
        [
            jnp.zeros((1, size), dtype)
            for size, dtype in zip(layout.sizes, layout.dtypes, strict=True)
        ]
    )


def rows_of(layout: Layout, leaves: Sequence[jax.Array]) -> Columns:
    """Leaves with a leading axis of columns, as columns."""
    return [
        jnp.reshape(x, (x.shape[0], -1)).astype(t) for x, t in zip(leaves, layout.rows, strict=True)
    ]
