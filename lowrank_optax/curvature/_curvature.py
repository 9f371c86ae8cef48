"""What every curvature offers the engine, and what it may read."""

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
    """What a curvature may read on every step.

    Attributes:
      g: gradient, a vector: a list with a flat array for every piece.
      accept: ``(n,)`` booleans, true for the groups whose gradient is finite and not zero.
      params: tree of the parameters, or ``None`` where none were passed.
      extra: extra arguments of ``update`` by name.
    """

    g: Vector
    accept: jax.Array
    params: Any
    extra: Mapping[str, Any]


class Evidence(NamedTuple):
    """What a curvature may read on a step that updates the basis.

    Attributes:
      g: gradient, a vector: a list with a flat array for every piece.
      due: ``(n,)`` booleans, true for the groups whose basis is to be updated.
      params: tree of the parameters, or ``None`` where none were passed.
      extra: extra arguments of ``update`` by name.
      key: random key of this step.
      apply: function ``(vector, gamma) -> B v`` of the basis before its update, with unregularised
        eigenvalues and the curvature ``gamma``, ``(n,)``, outside it. Two passes over the rows.
      project: function ``vector -> Q Q^T v``. Two passes over the rows.
      probed: whether an inner part or `Curvature.learn` will read the ``probe`` of the correction
        (static).
      axis_name: names of the axes of `jax.pmap` or `jax.shard_map` over which functions of the
        parameters differ, or ``None``; see `across` and `gathered`.
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
    """What is measured: observes every step, and gives a correction when the basis is updated.

    A curvature has a state, which it gets from `init` and returns from its methods. Vectors are
    lists with a flat array for every piece, arrays of one number per group have the shape ``(n,)``.

    Attributes:
      provides: names from `NEEDS` of what it gives to other parts.
      needs: names from `NEEDS` of what it wants from other parts.
      functions: names of the extra arguments of ``update`` that it reads and that are functions;
        ``None`` stands for all that come.
      learns: whether `learn` is called after the basis was updated, so that `outside` can come from
        what it is shown.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    functions: ClassVar[frozenset[str] | None] = None
    learns: ClassVar[bool] = False

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

        Groups that failed go back to what the state ``before`` `observe` had collected, so that
        one bad step costs nothing else. Where an update fails ``again``, ``(n,)``, right after
        another, what was collected before may be the cause, and all of it is to be dropped.
        """
        return state

    def gradient(self, layout: Layout, state: Any, g: Vector) -> Vector:
        """The gradient that the step is to follow: ``g`` itself unless a curvature replaces it."""
        return g

    def learn(self, layout: Layout, state: Any, due: jax.Array, seen: Outside) -> Any:
        """The state after the groups that are ``due``, ``(n,)``, absorbed their correction.

        ``seen``, ``(n,)`` each, are the inner products of the correction's ``probe`` and its
        product outside the new basis.
        """
        return state

    def outside(self, state: Any) -> jax.Array:
        """The curvature outside the basis, ``(n,)``, of a part that provides ``outside``."""
        raise AttributeError(f"{type(self).__name__} assumes no curvature outside the basis.")

    @abc.abstractmethod
    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        """The correction of a step that updates the basis, after `observe`."""


def across(evidence: Evidence, vector: Vector) -> Vector:
    """The mean over the devices of vectors that each made from its own part of the batch."""
    if not evidence.axis_name:
        return vector
    return [lax.pmean(x, evidence.axis_name) for x in vector]


def gathered(evidence: Evidence, columns: Columns) -> Columns:
    """The columns of all devices, each of which made some from its own part of the batch."""
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
    """A tree as a vector in the dtype of the small algebra, so that differences stay exact."""
    return layout.join(layout.leaves(tree), (), [layout.dtype] * len(layout.pieces))


def scale(layout: Layout, factors: jax.Array, vector: Vector) -> Vector:
    """A vector times the factor ``(n,)`` of each group; 0 where the factor is 0."""
    return [
        jnp.where(c == 0, 0, c * x) for c, x in zip(layout.to_pieces(factors), vector, strict=True)
    ]


def select(layout: Layout, which: jax.Array, one: Vector, other: Vector) -> Vector:
    """The groups of ``one`` where ``which``, ``(n,)``, and of ``other`` elsewhere."""
    return [
        jnp.where(c, x, y.astype(x.dtype))
        for c, x, y in zip(layout.to_pieces(which), one, other, strict=True)
    ]


def replace_row(layout: Layout, when: jax.Array, row: Any, vector: Vector) -> Any:
    """A stored row, ``(1, size)`` for every piece, with the groups ``when``, ``(n,)``, new."""
    old = layout.stored(row)
    new = [jnp.reshape(x, (1, -1)).astype(y.dtype) for x, y in zip(vector, old, strict=True)]
    return layout.store(select(layout, when, new, old))


def read_row(layout: Layout, row: Any) -> Vector:
    """A stored row as a vector."""
    return [x[0].astype(layout.dtype) for x in layout.stored(row)]


def empty_params_row(layout: Layout) -> Any:
    """A row of zeros for parameters, in their own dtypes, which rows need not have."""
    sizes = zip(layout.sizes, layout.widest, strict=True)
    return layout.store([jnp.zeros((1, size), dtype) for size, dtype in sizes])


def rows_of(layout: Layout, leaves: Sequence[jax.Array]) -> Columns:
    """Leaves ``(k, *leaf.shape)`` as columns ``(k, size)``."""
    return layout.join(leaves, leaves[0].shape[:1], layout.rows) if leaves else []


def check_is(owner: str, name: str, value: Any, kind: type, advice: str) -> None:
    """Raises ``ValueError`` unless ``value`` is of a kind; ``advice`` says what to pass."""
    check(isinstance(value, kind), f"{owner}: {name} is {value!r}; pass {advice}.")
