"""What every tracker offers, and the base of the trackers that keep rows of their own."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_decay
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.precision import full_precision
from lowrank_optax._core.rows import orthonormal, random_rows
from lowrank_optax._core.states import check_fits, check_kind
from lowrank_optax._core.types import Columns, Vector
from lowrank_optax.online.operator import Operator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrackerState:
    """State of a tracker.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.PAST(2)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), {"w": jnp.zeros((3, 5))})
      >>> print(state.memory.rows[0].shape, state.layout.shapes)
      (2, 15) ((3, 5),)

    Attributes:
      memory: the algorithm's own memory.
      seen: number of vectors taken in so far.
      skipped: number of vectors left out: they were not finite, or too large for their squares, or
        the algebra failed with them.
      key: a random key that never changes; every draw folds ``seen`` into it.
      layout: the example's structure and shapes; static.

    Cost: that of the memory, see the tracker.

    Source: elementary.
    """

    memory: Any
    seen: jax.Array
    skipped: jax.Array
    key: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Tracker(abc.ABC):
    """A rule that follows the ``rank`` leading eigenpairs of ``E v v^T`` along a stream of ``v``.

    Rows are kept in float32 at least. All methods give the same under ``jax.jit``, ``lax.scan`` and
    ``jax.vmap`` as outside. A tracker is a frozen dataclass. To write one of your own extend
    `OnRows`, or write a basis (`lowrank_optax.basis.Frame`) and hand it to `FromBasis`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.CCIPCA(1)
      >>> state = tracker.init(jax.random.key(0), jnp.zeros(2))
      >>> vectors = jnp.array([[3., 4.], [6., 8.], [jnp.nan, 0.]])
      >>> state = jax.jit(tracker.update)(state, vectors)
      >>> print(state.seen, state.skipped)
      2 1

    Args:
      rank: number ``r`` of eigenpairs, at least 1 and at most the number of entries of a vector.
    """

    rank: int

    def __post_init__(self):
        check_count(type(self).__name__, "rank", self.rank)

    def init(self, key: jax.Array, example: Any) -> TrackerState:
        """The state before the first vector.

        Args:
          key: random key for the first rows and for sketches.
          example: a vector or tree of floating-point arrays, or of their shapes; the values are not
            read.

        Raises:
          ValueError: for a rank above the number of entries, and leaves that are not real floats.
        """
        owner = type(self).__name__
        kinds = [x.dtype for x in jax.tree.leaves(example) if hasattr(x, "dtype")]
        rows = jnp.result_type(jnp.float32, *kinds)
        layout = Layout.of(example, None, rows=rows, owner=owner)
        check(
            self.rank <= layout.dims[0],
            f"{owner}: rank is {self.rank} and vectors have {layout.dims[0]} entries; pass a rank "
            "of at most that.",
        )
        memory = self._fresh(layout, key)
        zero = lambda: jnp.zeros((), jnp.int32)
        return TrackerState(memory, zero(), zero(), key, layout)

    def update(self, state: TrackerState, v: Any) -> TrackerState:
        """Takes in a vector shaped like the example, or ``k`` along a leading axis of every leaf.

        Vectors that are not finite are left out and counted. With no vectors at all, ``k = 0``, the
        state stays as it is.

        Args:
          state: the state before.
          v: a vector shaped like the example, or ``k`` of them along a leading axis.

        Returns:
          The state after the vectors.

        Raises:
          ValueError: for another structure or other shapes than the example's.
        """
        self.check_state(state)
        columns, _ = state.layout.columns(v, type(self).__name__)
        if columns[0].shape[0] == 0:
            return state
        return self._update(state, columns)

    @abc.abstractmethod
    def operator(self, state: TrackerState) -> Operator:
        """What was found: orthonormal rows, the leading one first, and ``H = diag(lam)``.

        ``lam``, ``(r,)``, are second moments ``E|q^T v|²`` per vector, or a running estimate of
        them, in squared units of the vectors.
        """

    def resume(
        self, operator: Operator, count: int | jax.Array, key: jax.Array | None = None
    ) -> TrackerState:
        """The state of a tracker that goes on from an operator, as if after ``count`` vectors.

        Together with `merge` this joins the trackers of two parts of a stream.

        Args:
          operator: the operator to go on from. Its eigenvalues are second moments per vector, at
            least 0; the leading ones are kept.
          count: number of vectors that the operator stands for, at least 1.
          key: random key as for `init`, default ``jax.random.key(0)``.

        Returns:
          The state, whose `operator` is the given one cut to the tracker's rank.

        Raises:
          ValueError: for a rank above the number of entries, or a count that is not one.
        """
        check_count(type(self).__name__, "count", count)
        layout = operator.layout
        state = self.init(jax.random.key(0) if key is None else key, layout.example)
        rows, _ = state.layout.columns(operator.eigenvectors(), "resume")
        lam = jnp.maximum(operator.eigenvalues(), 0).astype(state.layout.dtype)
        count = jnp.asarray(count, jnp.int32)
        memory = self._resumed(state, rows, lam, count)
        return dataclasses.replace(state, memory=memory, seen=count)

    def check_state(self, state: Any) -> None:
        """Raises ``ValueError`` for another tracker's state."""
        owner = type(self).__name__
        check_kind(owner, state, TrackerState)
        example = state.layout.example
        begin = lambda key: self.init(key, example)
        check_fits(owner, state, begin, (jax.random.key(0),), but=("key",))  # typed or raw

    @full_precision
    def _update(self, state: TrackerState, columns: Columns, *others: Columns) -> TrackerState:
        dtype = state.layout.dtype
        squares = [jnp.sum(c.astype(dtype) ** 2, axis=1) for c in columns]
        fine = jnp.isfinite(sum(squares, jnp.zeros(columns[0].shape[0], dtype)))
        columns = [jnp.where(fine[:, None], c, 0) for c in columns]
        memory, taken = self._take(state, columns, fine, *others)
        return dataclasses.replace(
            state,
            memory=memory,
            seen=linalg.tally(state.seen, jnp.sum(taken), linalg.DRAWS),
            skipped=linalg.tally(state.skipped, jnp.sum(~taken)),
        )

    @abc.abstractmethod
    def _fresh(self, layout: Layout, key: jax.Array) -> Any:
        """The memory before the first vector."""

    @abc.abstractmethod
    def _resumed(self, state: TrackerState, rows: Columns, lam: jax.Array, count: jax.Array) -> Any:
        """The memory after ``count`` vectors of moments ``lam`` along orthonormal ``rows``."""

    @abc.abstractmethod
    def _take(
        self, state: TrackerState, columns: Columns, fine: jax.Array, *others: Columns
    ) -> tuple[Any, jax.Array]:
        """The memory after ``k`` finite columns, and which of them, ``(k,)``, were taken in.

        Only the columns in ``fine``, ``(k,)``, count.
        """


class RowMemory(NamedTuple):
    """Memory of an `OnRows` tracker.

    Attributes:
      rows: an array ``(r, leaf.size)`` for every leaf, and whatever else grows with ``d``.
      small: arrays that do not grow with ``d``.
      weight: number of vectors that the moments stand for, ``sum_t beta^t``.
    """

    rows: Any
    small: Any
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class OnRows(Tracker):
    """A rule for one vector over rows of its own; several vectors are taken in one by one.

    A tracker of your own is a frozen dataclass that extends this class by three methods: `begin`,
    `step` and `read`. ``layout`` has a single group, so that ``layout.dot(rows, v)[0]`` is ``W v``.
    A vector after which the small numbers are not finite is skipped. The operator is ``A^T H A`` of
    the rows ``A`` and the moments ``H`` along them, written in its own eigenvectors.
    """

    @property
    def decay(self) -> float:
        """The decay of the moments per vector."""
        return 1.0

    @abc.abstractmethod
    def begin(
        self, layout: Layout, rows: Columns, lam: jax.Array, weight: jax.Array
    ) -> tuple[Any, Any]:
        """Rows and small memory from orthonormal rows with moments ``lam``, 0 if unknown."""

    @abc.abstractmethod
    def step(
        self, layout: Layout, rows: Any, small: Any, v: Vector, weight: jax.Array, *others: Vector
    ) -> tuple[Any, Any]:
        """Rows and small memory after a vector, which ``weight`` includes."""

    @abc.abstractmethod
    def read(
        self, layout: Layout, rows: Any, small: Any, weight: jax.Array
    ) -> tuple[Columns, jax.Array]:
        """Rows ``A`` of about unit length, and ``H``, ``(r, r)``."""

    def operator(self, state: TrackerState) -> Operator:
        layout, memory = state.layout, state.memory
        rows, h = self.read(layout, memory.rows, memory.small, jnp.maximum(memory.weight, 1))
        found = Operator(layout.tree(rows), h, layout.gram(rows)[0], layout)
        rows, _ = layout.columns(found.eigenvectors(), "operator")
        h = jnp.diag(found.eigenvalues())
        return Operator(layout.tree(rows), h, layout.gram(rows)[0], layout)

    def _fresh(self, layout: Layout, key: jax.Array) -> RowMemory:
        rows, zeros = random_rows(layout, key, self.rank), jnp.zeros(self.rank, layout.dtype)
        return RowMemory(*self.begin(layout, rows, zeros, zeros[0]), zeros[0])

    def _resumed(
        self, state: TrackerState, rows: Columns, lam: jax.Array, count: jax.Array
    ) -> RowMemory:
        layout, r = state.layout, self.rank
        more = max(0, r - lam.shape[0])
        # Directions that the operator does not name are random and orthogonal to those it does.
        spare = random_rows(layout, state.key, r)
        pairs = zip(rows, spare, strict=True)
        rows = orthonormal(layout, [jnp.concatenate([c[:r], w[:more]]) for c, w in pairs])
        lam = jnp.pad(lam[:r], (0, more))
        decay = jnp.asarray(self.decay, layout.dtype)
        t = count.astype(layout.dtype)
        weight = jnp.where(decay < 1, (1 - decay**t) / jnp.where(decay < 1, 1 - decay, 1), t)
        return RowMemory(*self.begin(layout, rows, lam, weight), weight)

    def _take(
        self, state: TrackerState, columns: Columns, fine: jax.Array, *others: Columns
    ) -> tuple[RowMemory, jax.Array]:
        layout = state.layout

        def one(old: RowMemory, given):
            v, fine, *others = given
            weight = self.decay * old.weight + 1
            new = RowMemory(*self.step(layout, old.rows, old.small, v, weight, *others), weight)
            ok = fine & linalg.finite(*jax.tree.leaves(new.small))
            return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old), ok

        return lax.scan(one, state.memory, (columns, fine, *others))


@dataclasses.dataclass(frozen=True)
class Forgetting(OnRows):
    """`OnRows` whose moments decay.

    Args:
      beta: decay of the moments per vector, in [0, 1); ``None``, the default, never forgets.
    """

    beta: float | None = None

    def __post_init__(self):
        OnRows.__post_init__(self)
        if self.beta is not None:
            check_decay(type(self).__name__, "beta", self.beta)

    @property
    def decay(self) -> float:
        return 1.0 if self.beta is None else self.beta
