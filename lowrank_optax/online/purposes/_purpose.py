"""What every purpose offers, what it sees, and what it returns."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check_least
from lowrank_optax._core.types import Columns
from lowrank_optax.online.operator import Operator

Weight = float | Callable[[jax.Array], jax.Array]
"""A number, or a schedule: a function of the number of updates."""


class Stream(NamedTuple):
    """The vectors of one stream in one batch.

    Attributes:
      columns: the vectors, ``(k, leaf.size)`` for every leaf, zero where a vector was not finite.
      weights: weights ``(k,)``, equal for all finite vectors, with sum one; zero if there are none.
    """

    columns: Columns
    weights: jax.Array


class Pairs(NamedTuple):
    """Vectors, and the vector that follows each of them.

    Attributes:
      sources: the vectors, ``(k, leaf.size)`` for every leaf.
      codes: the codes ``(k, r)`` of the sources.
      targets: the vectors that follow, with a weight for each pair.
    """

    sources: Columns
    codes: jax.Array
    targets: Stream


class Batch(NamedTuple):
    """What the function of a `Custom` purpose sees of the stream.

    Attributes:
      vectors: the vectors, shaped like the example with a leading axis ``k``; zero where a vector
        was not finite.
      weights: weights ``(k,)`` with sum one, zero for vectors that were skipped.
      extra: the other streams that were passed to ``update``, by name, shaped like ``vectors``.
    """

    vectors: Any
    weights: jax.Array
    extra: dict[str, Any]


class View(NamedTuple):
    """What a purpose sees of the state and one batch.

    Attributes:
      operator: the operator before the batch. Its ``H`` is an average over other vectors, so that
        gradients through ``H`` have hardly any bias.
      stream: the batch of the main stream.
      codes: codes ``(k, r)`` of the batch.
      pairs: vectors and their successors, ``None`` unless a purpose asks for them.
      extra: other streams by name.
      energy: mean square length ``E‖v‖²`` of the main stream, or 1 where losses keep their units.
      memory: this purpose's memory.
    """

    operator: Operator
    stream: Stream
    codes: jax.Array
    pairs: Pairs | None
    extra: dict[str, Stream]
    energy: jax.Array
    memory: Any


class Terms(NamedTuple):
    """A loss and its gradient in factors.

    Attributes:
      value: the loss, a number.
      left: the ``a_j`` of the gradient ``sum_j a_j b_j^T`` by ``A``, ``(j, r)``; ``None`` for zero.
      right: the ``b_j``, ``(j, leaf.size)`` for every leaf.
      inside: the codes ``A b_j``, ``(j, r)``.
      theta: the gradient by the purpose's own parameters, shaped like these.
      dense: a gradient by ``A`` that is not a sum of few products, ``(r, leaf.size)`` for every
        leaf; it is added to the other.
    """

    value: jax.Array
    left: jax.Array | None = None
    right: Columns | None = None
    inside: jax.Array | None = None
    theta: Any = ()
    dense: Columns | None = None


@dataclasses.dataclass(frozen=True)
class Purpose(abc.ABC):
    """A term of the composite loss, ``weight`` times `terms`.

    A purpose of your own is a frozen dataclass that defines `terms`. `Custom` is the simpler way:
    it differentiates a function of the operator and the batch.

    Args:
      weight: share of the loss, a number of at least 0 or a schedule: a function of the number of
        updates. Default 1.

    Attributes:
      free: whether the purpose needs rows ``A`` of any length, so that they are not made
        orthonormal; of the class, default no.
      pairs: whether the purpose looks at ``view.pairs``; of the class, default no.
    """

    weight: Weight = 1.0
    free: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    def __post_init__(self):
        if not callable(self.weight):
            check_least(type(self).__name__, "weight", self.weight)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that ``update`` has to be given besides the main one.

        By default this is the field ``stream``, where there is one and it is not ``None``.
        """
        name = getattr(self, "stream", None)
        return () if name is None else (name,)

    def theta(self, key: jax.Array, rank: int, dtype: Any) -> Any:
        """The first parameters that the purpose learns besides ``A``: any tree of arrays."""
        return ()

    def memory(self, rank: int, dtype: Any) -> Any:
        """The memory before the first batch: any tree of arrays of fixed shapes."""
        return ()

    def remember(self, memory: Any, view: View, rate: jax.Array) -> Any:
        """The memory after a batch, ``(1 - rate)`` of the old one and ``rate`` of the batch's own.

        ``view.codes`` are those before ``A`` moves. The result has the shapes of ``memory``.
        """
        return memory

    def move(self, memory: Any, c: jax.Array) -> Any:
        """The memory after ``A`` has moved, by which codes ``z`` became ``C z``, ``(r, r)``."""
        return memory

    @abc.abstractmethod
    def terms(self, view: View, theta: Any) -> Terms:
        """The loss over a batch, without its weight, and its gradient in factors.

        ``theta`` are the purpose's own parameters. Vectors of weight 0 must have no effect. Nothing
        is differentiated automatically: the gradient is what `Terms` says.
        """


def stream_and_codes(view: View, name: str | None) -> tuple[Stream, jax.Array]:
    """The stream of that name, ``None`` for the main one, and its codes ``(k, r)``."""
    if name is None:
        return view.stream, view.codes
    stream = view.extra[name]
    return stream, view.operator.codes(stream.columns)


def pairs_of(view: View) -> Pairs:
    assert view.pairs is not None  # the learner makes them for purposes with `pairs`
    return view.pairs


def through(view: View, columns: Columns, codes: jax.Array, cotangent: Columns):
    """Factors of a loss of ``A^T A v``, from its cotangents ``c``: ``z c^T + (A c) v^T``."""
    within = view.operator.codes(cotangent)
    right = [
        jnp.concatenate([c.astype(v.dtype), v]) for c, v in zip(cotangent, columns, strict=True)
    ]
    return jnp.concatenate([codes, within]), right, jnp.concatenate([within, codes])


def less(a: Columns, b: Columns) -> Columns:
    """``a - b`` in the dtypes of ``b``."""
    return [x.astype(y.dtype) - y for x, y in zip(a, b, strict=True)]


def scaled(columns: Columns, scale: jax.Array) -> Columns:
    """Every column times its own number."""
    return [scale[:, None].astype(c.dtype) * c for c in columns]
