"""Trees of parameters seen as vectors in groups, and the rows that are stored beside them.

A `Layout` is the static picture of a tree: its leaves, their shapes, and which group each belongs
to. Vectors are lists of flat arrays, rows are lists of ``(m, size)`` arrays: two-dimensional
because XLA copies rows that carry a leaf's own shape. Sums over the leaves of a group give small
arrays with a leading axis of groups. Large leaves are never concatenated. Small ones can be joined
into *pieces*, because XLA compiles every operation on every array anew.

On several devices rows and vectors are split along their last axis over as many axes of the mesh as
divide it, whatever the parameter's own sharding: moving one gradient costs ``d``, moving the rows
``m d``. The mesh is that of the leaves, which carry it in their types; small algebra is on all
devices. `sharded_like` is how a step enters and leaves this arrangement.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from lowrank_optax._core.checks import check
from lowrank_optax._core.devices import (
    dividing_axes,
    free_axes,
    mesh_of,
    place_of,
    put_on,
)
from lowrank_optax._core.pieces import joined, parted, pieces_of, widest_of
from lowrank_optax._core.types import Columns, Vector


@dataclasses.dataclass(frozen=True)
class Layout:
    """The leaves of a tree and their groups, and the algebra of vectors and rows over them.

    A basis or a curvature gets a layout from the engine and works in three kinds of values:

    * a *vector* is a list with one flat array ``(size,)`` for every piece: a large leaf, or several
      small ones of one group, as `lowrank_optax._core.pieces` joins them;
    * *columns* (or rows) are a list with one array ``(k, size)`` for every piece;
    * a small array has a leading axis of the ``n`` groups, whose leaves belong together.

    `flatten` and `unflatten` lead from a tree to a vector and back, `columns` and `vectors` from a
    tree with a leading axis to columns and back. `dot`, `inner`, `gram` and `gather` lead from
    pieces to groups, `to_pieces` and `combine` from groups to pieces. `store` and `stored` are how
    a state keeps rows. On several devices rows stay split along their last axis.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tree = {"a": jnp.array([3., 4.]), "b": jnp.array([[1.], [2.]])}
      >>> layout = lro.Layout.of(tree, groups=lro.per_leaf)
      >>> v = layout.flatten(tree)
      >>> print(layout.n, layout.dims, layout.inner(v, v))      # ‖a‖² and ‖b‖²
      2 (2, 2) [25.  5.]
      >>> rows = [x[None] for x in v]                           # one row in each group
      >>> print(layout.unflatten(layout.combine(jnp.array([[2.], [10.]]), rows))["b"].T)
      [[10. 20.]]

    Attributes:
      treedef: the tree's structure.
      names: the leaves' paths as text, for messages.
      paths: the leaves' paths as jax's key paths.
      shapes: the leaves' shapes.
      dtypes: the leaves' dtypes.
      pieces: the places of the leaves that each piece consists of.
      rows: the dtypes in which rows are stored, one for each piece.
      group: the group of every piece, ``0 .. n-1``.
      n: number of groups, at least one.
      dtype: dtype of the small algebra: float32, or float64 if a leaf has it.
      mesh: the mesh of the leaves if they lie on several devices, else ``None``.

    Cost: none; a layout holds no arrays.

    Source: elementary.
    """

    treedef: Any
    names: tuple[str, ...]
    paths: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    pieces: tuple[tuple[int, ...], ...]
    rows: tuple[Any, ...]
    group: tuple[int, ...]
    n: int
    dtype: Any
    mesh: Any = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        tree: Any,
        groups: Callable[[Any], Hashable] | None,
        rows: Any = None,
        owner: str = "scale_by_lre",
        small: bool = False,
    ) -> "Layout":
        """Reads the layout of a tree of floating-point arrays, or of their shapes.

        Args:
          tree: the parameters or gradients.
          groups: function of a leaf's path to a label, such as `per_leaf`: leaves that share a
            label are one group. ``None`` puts all leaves into one group.
          rows: dtype in which rows are stored; ``None`` for that of each leaf, the widest in a
            piece.
          owner: name that messages begin with.
          small: whether small leaves are joined into pieces; else every leaf is one.

        Returns:
          The layout.

        Raises:
          ValueError: for a leaf that is not a real floating-point array of 16 bits or more.
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = tuple(jax.tree_util.keystr(path) for path, _ in leaves)
        dtypes = tuple(
            dtype_of(owner, name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)
        )
        labels = [None if groups is None else groups(path) for path, _ in leaves]
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        shapes = tuple(
            tuple(np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape)
            for _, leaf in leaves
        )
        pieces = pieces_of(labels, shapes, small)
        return cls(
            treedef=treedef,
            names=names,
            paths=tuple(path for path, _ in leaves),
            shapes=shapes,
            dtypes=dtypes,
            pieces=pieces,
            rows=tuple(jnp.dtype(rows or t) for t in widest_of(pieces, dtypes)),
            group=tuple(order[labels[piece[0]]] for piece in pieces),
            n=max(1, len(order)),
            dtype=jnp.result_type(jnp.float32, *dtypes),
            mesh=mesh_of([leaf for _, leaf in leaves]),
        )

    @property
    def example(self) -> Any:
        """The tree with `jax.ShapeDtypeStruct` for its leaves."""
        leaves = zip(self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of every piece."""
        return tuple(sum(math.prod(self.shapes[i]) for i in piece) for piece in self.pieces)

    @property
    def widest(self) -> tuple[Any, ...]:
        """The dtype of every piece: of several leaves' the one that holds them all."""
        return widest_of(self.pieces, self.dtypes)

    @property
    def dims(self) -> tuple[int, ...]:
        """Number of entries of every group, the ``d`` of the formulas."""
        dims = [0] * self.n
        for size, group in zip(self.sizes, self.group, strict=True):
            dims[group] += size
        return tuple(dims)

    def block(self, rows: int) -> int:
        """How many entries of ``rows`` rows to treat at a time: less than a third of a gradient."""
        return min(max(sum(self.sizes) // (3 * rows), 256), 16384)

    def flatten(self, tree: Any) -> Vector:
        """The tree as a vector: flat pieces ``(size,)``, rounded to the dtypes of the rows."""
        return self.split(self.join(self.treedef.flatten_up_to(tree), (), self.rows))

    def join(self, leaves: Sequence[Any], head: tuple[int, ...], dtypes: Sequence[Any]) -> Columns:
        """Leaves ``(*head, *shape)`` as pieces ``(*head, size)`` of the ``dtypes``."""
        pairs = zip(leaves, self.shapes, strict=True)
        flat = [jnp.reshape(x, (*head, math.prod(shape))) for x, shape in pairs]
        each = [
            [flat[i].astype(dtype) for i in places]
            for places, dtype in zip(self.pieces, dtypes, strict=True)
        ]
        return [x[0] if len(x) == 1 else joined(list(map(self._split_one, x))) for x in each]

    def part(self, pieces: Vector | Columns) -> list[jax.Array]:
        """Pieces ``(..., size)`` as flat leaves ``(..., leaf.size)``, the inverse of `join`."""
        leaves: dict[int, jax.Array] = {}
        for places, x in zip(self.pieces, pieces, strict=True):
            sizes = [math.prod(self.shapes[i]) for i in places]
            parts = [x] if len(places) == 1 else map(self._split_one, parted(x, sizes))
            leaves |= zip(places, parts, strict=True)
        return [leaves[i] for i in range(len(self.names))]

    def of_leaves(self, values: jax.Array) -> list[jax.Array]:
        """From an array ``(n, ...)`` the value of each leaf's group, one entry for every leaf."""
        each: dict[int, jax.Array] = {}
        for places, group in zip(self.pieces, self.group, strict=True):
            each |= dict.fromkeys(places, values[group])
        return [each[i] for i in range(len(self.names))]

    def kept_in(self, dtype: Any, rows: Any) -> "Layout":
        """The layout as a state has it: small algebra in ``dtype``, leaves in that of its rows.

        ``rows`` is what `store` gave, or nothing where a basis keeps no rows.
        """
        own = isinstance(rows, tuple) and len(rows) == len(self.pieces)
        # Rows may be codes, of which no leaf has the dtype.
        if not own or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in rows):
            return dataclasses.replace(self, dtype=dtype)
        stored = tuple(jnp.dtype(x.dtype) for x in rows)
        each = {i: t for piece, t in zip(self.pieces, stored, strict=True) for i in piece}
        dtypes = tuple(each[i] for i in range(len(self.names)))
        return dataclasses.replace(self, dtype=dtype, dtypes=dtypes, rows=stored)

    def on(self, tree: Any) -> "Layout":
        """The same layout where the arrays of ``tree`` are."""
        return dataclasses.replace(self, mesh=mesh_of(tree))

    def split(self, arrays: Vector | Columns) -> Vector | Columns:
        """Vectors or rows split over the devices along their last axis."""
        return arrays if self.mesh is None else list(map(self._split_one, arrays))

    def _split_one(self, x: jax.Array) -> jax.Array:
        return x if self.mesh is None else put_on(x, self.mesh, self._spec(x))

    def _spec(self, x: jax.Array) -> P:
        """How an array of a vector, of rows or of a leaf is split."""
        return P(*[None] * (x.ndim - 1), dividing_axes(x.shape[-1], self.mesh) or None)

    def _locally(self, run: Callable[..., Any], given: Any, out: Any) -> Any:
        """``run(places, *given)`` on each device's own columns.

        ``places`` says of every piece which part of it that is, and whether it is the first device
        that has it. Lists in ``given`` hold one array a piece, as do those in ``out``.
        """
        axes = free_axes(self.mesh)
        spec = lambda x: [self._spec(y) for y in x] if isinstance(x, list) else P()
        specs = lambda tree: tuple(map(spec, tree))

        def mine(*given):
            return run([place_of(size, self.mesh) for size in self.sizes], *given)

        return jax.shard_map(
            mine,
            mesh=self.mesh,
            in_specs=specs(given),
            out_specs=specs(out) if isinstance(out, tuple) else P(),
            axis_names=set(axes),
            check_vma=False,
        )(*given)

    def columns(self, tree: Any, owner: str) -> tuple[Columns, bool]:
        """A tree of one vector, or of ``k`` along a leading axis, as columns ``(k, size)``.

        Also returns whether there was that axis; without it ``k`` is 1. Raises ``ValueError`` if
        structure or shapes are not those of the layout.
        """
        try:
            leaves = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{owner}: the vector's structure is not that of the example: {error}"
            ) from error
        shapes = [np.shape(x) for x in leaves]
        count = {s[:1] for s in shapes}
        one = shapes == list(self.shapes)
        for name, got, shape in zip(self.names, shapes, self.shapes, strict=True):
            check(
                one or (len(got) > 0 and got[1:] == shape and len(count) == 1),
                f"{owner}: the leaf {name or 'of the vector'} has shape {got}; pass {shape}, or "
                f"({', '.join(map(str, ('k', *shape)))}) for k vectors, the same k in every leaf.",
            )
        head = (1,) if one else (shapes[0][0],)
        return self.split(self.join(leaves, head, self.rows)), not one

    def vectors(self, columns: Columns) -> Any:
        """Columns as a tree with leaves ``(k, *shape)``, the inverse of `columns`."""
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), (*x.shape[:-1], *shape))
                for x, shape, dtype in zip(
                    self.part(columns), self.shapes, self.dtypes, strict=True
                )
            ]
        )

    def unflatten(self, vector: Vector, given: Any = None) -> Any:
        """The vector as a tree of the leaves' shapes: see `shaped`."""
        return self.shaped(self.part(vector), given)

    def shaped(self, leaves: Sequence[jax.Array], given: Any = None) -> Any:
        """Flat leaves as a tree of their shapes, clipped to what their dtypes can hold.

        With the gradients as ``given``, every leaf gets the dtype to which those of gradient and
        parameter promote, as optax's own updates do.
        """
        dtypes = self.dtypes
        if given is not None:
            pairs = zip(self.leaves(given), dtypes, strict=True)
            dtypes = [jnp.promote_types(jnp.result_type(x), t) for x, t in pairs]
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), shape)
                for x, shape, dtype in zip(leaves, self.shapes, dtypes, strict=True)
            ]
        )

    def tree(self, leaves: Sequence[Any]) -> Any:
        """A list with one entry for every leaf, of any kind, as a tree of the same structure."""
        return self.treedef.unflatten(leaves)

    def leaves(self, tree: Any) -> list[Any]:
        """The leaves of a tree of the same structure as a list, the inverse of `tree`."""
        return self.treedef.flatten_up_to(tree)

    def store(self, leaves: Sequence[jax.Array]) -> Any:
        """Rows or vectors as a state keeps them: a tuple in the order of the pieces.

        The parameters' own containers would lend them names, metadata and checks that hold for
        parameters only. `optax.tree.map_params` calls ``init`` on a tree without leaves, to find
        out what is shaped like parameters: a single number then stands for the whole tuple.
        """
        return tuple(leaves) if self.names else jnp.zeros((), self.dtype)

    def stored(self, rows: Any) -> list[jax.Array]:
        """Rows or vectors that a state keeps, as a list: the inverse of `store`."""
        return list(rows) if self.names else []

    def zeros(self, count: int) -> Columns:
        """``count`` rows of zeros, ``(count, size)`` a piece, in the dtypes of the rows."""
        return self.split(
            [jnp.zeros((count, size), t) for size, t in zip(self.sizes, self.rows, strict=True)]
        )

    def to_pieces(self, values: jax.Array) -> list[jax.Array]:
        """From an array ``(n, ...)`` the value of each piece's group, one entry for every piece."""
        return [values[group] for group in self.group]

    def gather(self, parts: Sequence[jax.Array], shape: tuple[int, ...] = ()) -> jax.Array:
        """Sums one small array ``shape`` for every piece over each group: ``(n, *shape)``."""
        sums: list[list[jax.Array]] = [[] for _ in range(self.n)]
        for group, part in zip(self.group, parts, strict=True):
            sums[group].append(part.astype(self.dtype))
        return jnp.stack([_total(each, shape, self.dtype) for each in sums])

    def _sum(self, dot: Callable[..., jax.Array], shape: tuple[int, ...], *arrays: Any):
        """`gather` of products over columns, with one sum over the devices for all the leaves."""

        def own(places, *arrays):
            parts = [dot(*each) for each in zip(*arrays, strict=True)]
            if places:
                parts = [jnp.where(p.first, x, 0) for p, x in zip(places, parts, strict=True)]
            return self.gather(parts, shape)

        if self.mesh is None:
            return own((), *arrays)
        total = lambda *all: lax.psum(own(*all), free_axes(self.mesh))
        return self._locally(total, arrays, None)

    def dot(self, rows: Columns, vector: Vector | Columns) -> jax.Array:
        """``W v`` of rows ``W``: ``(n, m)`` for a vector, ``(n, m, k)`` for columns; one pass."""
        if vector and vector[0].ndim == 2 and vector[0].shape[0] == 1:  # a gemv is the faster one
            return self.dot(rows, [v[0] for v in vector])[..., None]
        count = rows[0].shape[0] if rows else 0
        tail = () if not rows or vector[0].ndim == 1 else (vector[0].shape[0],)
        return self._sum(partial(contract, dtype=self.dtype), (count, *tail), rows, vector)

    def inner(self, a: Vector, b: Vector) -> jax.Array:
        """``a · b`` within each group, ``(n,)``."""
        dot = lambda x, y: jnp.vdot(x.astype(self.dtype), y.astype(self.dtype))
        return self._sum(dot, (), a, b)

    def squares(self, columns: Columns) -> jax.Array:
        """Squared norms ``(k,)`` of columns over the leaves of all groups together."""
        parts = [jnp.sum(jnp.square(c.astype(self.dtype)), axis=1) for c in columns]
        return _total(parts, (columns[0].shape[0],), self.dtype)

    def gram(self, columns: Columns) -> jax.Array:
        """Inner products ``(n, k, k)`` of columns; one column costs one elementwise pass."""
        if columns and columns[0].shape[0] == 1:
            vector = [c[0] for c in columns]
            return self.inner(vector, vector)[:, None, None]
        return self.dot(columns, columns)

    def combine(self, weights: jax.Array, rows: Columns) -> Vector | Columns:
        """``c W`` of rows: weights ``(n, m)`` give a vector, ``(n, k, m)`` columns; one pass."""
        return [
            combine(c, w, self.dtype) for c, w in zip(self.to_pieces(weights), rows, strict=True)
        ]


def per_leaf(path: Any) -> str:
    """A ``groups`` function: every leaf is a group of its own.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GGT(10), groups=lro.per_leaf)
      >>> tx.init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})[0].steps.shape
      (2,)

    Args:
      path: a leaf's key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      A label that no other leaf has: the path as text.
    """
    return jax.tree_util.keystr(path)


def stack(vector: Vector) -> Columns:
    """A vector as a single column."""
    return [x[None] for x in vector]


def cast_like(columns: Columns, rows: Columns) -> Columns:
    """Columns in the dtypes of the rows they are to join."""
    return [c.astype(w.dtype) for c, w in zip(columns, rows, strict=True)]


def combine(weights: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """``c W`` with the accumulation in ``dtype``."""
    over = (((weights.ndim - 1,), (0,)), ((), ()))
    return _product(weights.astype(rows.dtype), rows, over, dtype)


def _total(parts: Sequence[jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The sum of small arrays of one shape, as a reduction that stays one.

    XLA puts a copy of a chain of additions into every operation that reads the sum, and there are
    some of these for every leaf: programs, and the time to compile them, grew with the square of
    the number of leaves. A sum over stacked arrays, or over scalars, it turns back into a chain.
    """
    if len(parts) < 2:
        return parts[0] if parts else jnp.zeros(shape, dtype)
    flat = jnp.concatenate([jnp.reshape(x, -1) for x in parts])
    if parts[0].size > 1:
        return jnp.reshape(jnp.sum(jnp.reshape(flat, (len(parts), -1)), axis=0), shape)
    halves = jnp.sum(jnp.reshape(jnp.pad(flat, (0, len(parts) % 2)), (-1, 2)), axis=0)
    return jnp.reshape(halves[0] + halves[1], shape)


def contract(w: jax.Array, v: jax.Array, dtype: Any) -> jax.Array:
    """``W v`` or ``W V^T`` with the accumulation in ``dtype``."""
    return _product(w, v.astype(w.dtype), (((1,), (v.ndim - 1,)), ((), ())), dtype)


def _product(a: jax.Array, b: jax.Array, over: Any, dtype: Any) -> jax.Array:
    """A product over rows: exact in what is stored, and of 16-bit rows no more than that.

    An accelerator reads 16-bit rows as they are; for float32 it has to be asked for float32.
    """
    short = a.dtype.itemsize < 4
    precision = lax.Precision.DEFAULT if short else lax.Precision.HIGHEST
    return lax.dot_general(a, b, over, precision=precision, preferred_element_type=dtype)


def dtype_of(owner: str, name: str, leaf: Any) -> Any:
    """The dtype that jax gives a leaf, which has to be one of its floating-point kinds."""
    place = f"{owner}: the leaf {name or 'of the tree'}"
    advice = "pass floating-point leaves, or leave it out with optax.masked or optax.partition."
    if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
        raise ValueError(f"{place} is {leaf!r}, a {type(leaf).__name__}; {advice}")
    kind: Any = getattr(leaf, "dtype", type(leaf))
    check(
        not jnp.issubdtype(kind, jax.dtypes.extended),
        f"{place} is {kind}; {advice}",
    )
    dtype = jax.dtypes.canonicalize_dtype(kind)
    check(
        not jnp.issubdtype(dtype, jnp.complexfloating),
        f"{place} is {dtype}; pass real and imaginary parts as two leaves "
        "(optax.contrib.split_real_and_imaginary does).",
    )
    check(jnp.issubdtype(dtype, jnp.floating), f"{place} is {dtype}; {advice}")
    check(
        dtype.itemsize >= 2,
        f"{place} is {dtype}, in which no optimizer's step can be kept; pass bfloat16, float16, "
        "float32 or float64, and cast to eight bits in the model.",
    )
    return dtype


def _narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """A cast that stays finite: a float32 number may be too large for float16."""
    if jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
        return x.astype(dtype)
    return jnp.clip(x, -jnp.finfo(dtype).max, jnp.finfo(dtype).max).astype(dtype)
