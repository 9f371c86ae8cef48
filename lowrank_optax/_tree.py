"""Trees of parameters seen as vectors in groups, and the rows that are stored beside them.

A `Layout` is the static picture of a tree: its leaves, their shapes, and which group each belongs
to. Vectors are lists of flat leaves, rows are lists of ``(m, leaf.size)`` arrays: two-dimensional
because XLA copies rows that carry a leaf's own shape. Sums over the leaves of a group give small
arrays with a leading axis of groups; nothing here ever concatenates the leaves.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_optax import _linalg
from lowrank_optax._types import Columns, Vector, check


@dataclasses.dataclass(frozen=True)
class Layout:
    """Leaves of a tree by group.

    Attributes:
      treedef: the tree's structure.
      names: the leaves' paths, for messages.
      shapes: the leaves' shapes.
      dtypes: the leaves' dtypes.
      rows: the dtypes in which rows are stored.
      group: the group of every leaf, ``0 .. n-1``.
      n: how many groups there are; at least one.
      dtype: of the small algebra: float32, or float64 where a leaf is.
    """

    treedef: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    rows: tuple[Any, ...]
    group: tuple[int, ...]
    n: int
    dtype: Any

    @classmethod
    def of(
        cls,
        tree: Any,
        groups: Callable[[Any], Hashable] | None,
        rows: Any = None,
        owner: str = "scale_by_lre",
    ) -> "Layout":
        """Reads the layout of a tree of floating-point arrays (or shapes of arrays)."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = tuple(jax.tree_util.keystr(path) for path, _ in leaves)
        dtypes = tuple(_dtype(leaf) for _, leaf in leaves)
        for name, dtype in zip(names, dtypes, strict=True):
            check(
                not jnp.issubdtype(dtype, jnp.complexfloating),
                f"{owner}: the leaf {name or 'of the tree'} is {dtype}; pass real and imaginary "
                "parts as two leaves (optax.contrib.split_real_and_imaginary does).",
            )
            check(
                jnp.issubdtype(dtype, jnp.floating),
                f"{owner}: the leaf {name or 'of the tree'} is {dtype}; pass floating-point "
                "leaves, or leave it out with optax.masked or optax.partition.",
            )
        labels = [None if groups is None else groups(path) for path, _ in leaves]
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return cls(
            treedef=treedef,
            names=names,
            shapes=tuple(
                tuple(np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape)
                for _, leaf in leaves
            ),
            dtypes=dtypes,
            rows=tuple(jnp.dtype(rows or dtype) for dtype in dtypes),
            group=tuple(order[label] for label in labels),
            n=max(1, len(order)),
            dtype=jnp.result_type(jnp.float32, *dtypes),
        )

    @property
    def example(self) -> Any:
        """The tree's shapes and dtypes."""
        leaves = zip(self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of every leaf."""
        return tuple(int(np.prod(shape)) for shape in self.shapes)

    @property
    def dims(self) -> tuple[int, ...]:
        """Number of entries of every group, the ``d`` of the formulas."""
        dims = [0] * self.n
        for size, group in zip(self.sizes, self.group, strict=True):
            dims[group] += size
        return tuple(dims)

    def block(self, rows: int) -> int:
        """Columns to treat at a time, so that ``rows`` of them stay below half a gradient."""
        return min(max(sum(self.sizes) // (2 * rows), 256), 16384)

    def flatten(self, tree: Any) -> Vector:
        """The tree as a vector, rounded to the dtype of the rows."""
        leaves = self.treedef.flatten_up_to(tree)
        return [jnp.reshape(x, -1).astype(t) for x, t in zip(leaves, self.rows, strict=True)]

    def columns(self, tree: Any, owner: str) -> tuple[Columns, bool]:
        """A vector, or vectors along a leading axis, as columns; and whether there was that axis.

        Raises ``ValueError`` where structure or shapes are not those of the layout.
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
        return [
            jnp.reshape(x, (*head, size)).astype(t)
            for x, size, t in zip(leaves, self.sizes, self.rows, strict=True)
        ], not one

    def vectors(self, columns: Columns) -> Any:
        """Columns as a tree of the leaves' shapes with a leading axis."""
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), (-1, *shape))
                for x, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
            ]
        )

    def unflatten(self, vector: Vector) -> Any:
        """The vector as a tree of the leaves' shapes and dtypes, clipped to what these can hold."""
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), shape)
                for x, shape, dtype in zip(vector, self.shapes, self.dtypes, strict=True)
            ]
        )

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Any list with one entry a leaf, as a tree of the same structure."""
        return self.treedef.unflatten(leaves)

    def leaves(self, tree: Any) -> list[Any]:
        """The inverse of `tree`."""
        return self.treedef.flatten_up_to(tree)

    def zeros(self, count: int) -> Columns:
        """``count`` rows of zeros."""
        return [jnp.zeros((count, size), t) for size, t in zip(self.sizes, self.rows, strict=True)]

    def spread(self, values: jax.Array) -> list[jax.Array]:
        """The value of each leaf's group, from an array with a leading axis of groups."""
        return [values[group] for group in self.group]

    def gather(self, parts: Sequence[jax.Array], shape: tuple[int, ...] = ()) -> jax.Array:
        """Sums one small array a leaf over the leaves of each group: ``(n, *shape)``."""
        sums = [jnp.zeros(shape, self.dtype) for _ in range(self.n)]
        for group, part in zip(self.group, parts, strict=True):
            sums[group] = sums[group] + part.astype(self.dtype)
        return jnp.stack(sums)

    def dot(self, rows: Columns, vector: Vector | Columns) -> jax.Array:
        """``W v``: ``(n, m)`` for a vector, ``(n, m, k)`` for columns. One pass over the rows."""
        if vector and vector[0].ndim == 2 and vector[0].shape[0] == 1:  # a gemv is the faster one
            return self.dot(rows, [v[0] for v in vector])[..., None]
        parts = [_contract(w, v, self.dtype) for w, v in zip(rows, vector, strict=True)]
        count = rows[0].shape[0] if rows else 0
        tail = () if not rows or vector[0].ndim == 1 else (vector[0].shape[0],)
        return self.gather(parts, (count, *tail))

    def inner(self, a: Vector, b: Vector) -> jax.Array:
        """``a · b`` within each group, ``(n,)``."""
        return self.gather(
            [
                jnp.vdot(x.astype(self.dtype), y.astype(self.dtype))
                for x, y in zip(a, b, strict=True)
            ]
        )

    def squares(self, columns: Columns) -> jax.Array:
        """Squared norms of columns over all leaves, ``(k,)``."""
        parts = [jnp.sum(jnp.square(c.astype(self.dtype)), axis=1) for c in columns]
        return sum(parts[1:], parts[0])

    def gram(self, columns: Columns) -> jax.Array:
        """``(n, k, k)`` inner products of columns; one column costs one elementwise pass."""
        if columns and columns[0].shape[0] == 1:
            vector = [c[0] for c in columns]
            return self.inner(vector, vector)[:, None, None]
        return self.dot(columns, columns)

    def combine(self, weights: jax.Array, rows: Columns) -> Vector | Columns:
        """``c W``: weights ``(n, m)`` give a vector, ``(n, k, m)`` columns. One pass."""
        return [combine(c, w, self.dtype) for c, w in zip(self.spread(weights), rows, strict=True)]


def check_kind(owner: str, state: Any, kind: type) -> None:
    """Raises ``ValueError`` for a state of another class, such as the dictionary of a bare file."""
    check(
        isinstance(state, kind),
        f"{owner}: the state is a {type(state).__name__}, not a {kind.__name__}; pass what init "
        "returned. A checkpoint is to be restored with such a state as its target.",
    )


def check_fits(owner: str, state: Any, like: Any, but: str | None = None) -> None:
    """Raises ``ValueError`` where a state's arrays are not shaped as those of ``like``, shapes.

    What lies under the field ``but`` may differ.
    """
    check_kind(owner, state, type(like))
    read = lambda tree: {
        jax.tree_util.keystr(path): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(path[0], "name", None) != but
    }
    got, needed = read(state), read(like)
    say = lambda shapes, path: f"an array {shapes[path]}" if path in shapes else "nothing"
    for path in (*needed, *got):
        check(
            got.get(path) == needed.get(path),
            f"{owner}: the state holds {say(got, path)} at {path}, where these gradients and parts "
            f"need {say(needed, path)}. Pass gradients shaped like the parameters given to init, "
            "and a state that the same parts made in the same version, or call init again.",
        )


def per_leaf(path: Any) -> str:
    """A ``groups`` function: every leaf is a group of its own.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1e-2, basis=lro.basis.GGT(10), groups=lro.per_leaf)
    """
    return jax.tree_util.keystr(path)


def stack(vector: Vector) -> Columns:
    """A vector as a single column."""
    return [x[None] for x in vector]


def cast_like(columns: Columns, rows: Columns) -> Columns:
    """Columns in the dtypes of the rows they are to join."""
    return [c.astype(w.dtype) for c, w in zip(columns, rows, strict=True)]


def repeat(times: jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Runs ``body(i, carry)`` a traced number of times, mostly zero or one.

    The engine's only form of "now and then": `lax.cond` makes XLA copy big buffers through both of
    its branches, a loop updates its carry in place and costs nothing when it does not run.
    """
    return lax.fori_loop(0, times.astype(jnp.int32), body, carry)


def write(rows: Columns, layout: Layout, slots: jax.Array, columns: Columns) -> Columns:
    """Puts column ``j`` of ``k`` into row ``slots[:, j]`` of its group; a slot of ``m`` drops it.

    The rows are read before (``slots`` depends on the read), so that XLA writes in place.
    """

    def put(w: jax.Array, at: jax.Array, c: jax.Array) -> jax.Array:
        def body(j, w):
            return repeat(
                at[j] < w.shape[0],
                lambda _, w: lax.dynamic_update_slice_in_dim(
                    w, lax.dynamic_slice_in_dim(c, j, 1, 0), at[j], 0
                ),
                w,
            )

        if c.shape[0] == 1:
            return body(0, w)
        return lax.fori_loop(0, c.shape[0], body, w)

    return [
        put(w, at, c)
        for w, at, c in zip(rows, layout.spread(slots), cast_like(columns, rows), strict=True)
    ]


def rewrite(
    rows: Columns,
    layout: Layout,
    when: jax.Array,
    height: int,
    make: Callable[[int, jax.Array, jax.Array], jax.Array],
    cross: bool = False,
) -> tuple[Columns, jax.Array, jax.Array]:
    """Replaces the first ``height`` rows of the groups in ``when``, ``(n,)``, in place.

    ``make(leaf, start, block)`` turns the columns ``start ..`` of a leaf's rows, ``(m, width)``,
    into the new ``(height, width)``. Besides the rows it returns the Gram matrix of the new ones,
    ``(n, height, height)``, and with ``cross`` (else empty) their products with the old,
    ``(n, height, m)``, measured on what is stored; both are 0 for the other groups.
    """
    count = rows[0].shape[0] if rows else height
    done, grams, crosses = [], [], []
    for leaf, (w, go) in enumerate(zip(rows, layout.spread(when), strict=True)):
        w, *sums = _rewrite_leaf(
            w, go, height, partial(make, leaf), cross, layout.block(count), layout.dtype
        )
        done.append(w)
        grams.append(sums[0])
        crosses.append(sums[-1])
    gram = layout.gather(grams, (height, height))
    empty = jnp.zeros((layout.n, height, 0), layout.dtype)
    return done, gram, layout.gather(crosses, (height, count)) if cross else empty


def random_rows(layout: Layout, key: jax.Array, count: int) -> Columns:
    """Orthonormal rows of a random subspace, for at most as many as a vector has entries."""
    keys = jax.random.split(key, max(1, len(layout.sizes)))
    rows = [
        jax.random.normal(k, (count, size), layout.dtype).astype(t)
        for k, size, t in zip(keys, layout.sizes, layout.rows, strict=False)
    ]
    return orthonormal(layout, rows)


def orthonormal(layout: Layout, rows: Columns) -> Columns:
    """Independent rows orthonormalised from the first on: CholeskyQR2, not in place.

    Cost: ``8 d r²`` flops, and a copy of the rows.
    """
    for _ in range(2):
        t = jax.vmap(_linalg.cholesky_inverse)(layout.gram(rows))
        rows = cast_like(layout.combine(t, rows), rows)
    return rows


def cholesky_qr(
    rows: Columns, layout: Layout, gram: jax.Array, when: jax.Array
) -> tuple[Columns, jax.Array, jax.Array, jax.Array]:
    """Orthonormalises the rows of the groups in ``when``, whose Gram matrix is given.

    Shifted CholeskyQR3: two rounds ``W <- L^{-1} W`` with ``W W^T = L L^T``, in place; the third
    factor stays small. A shift of the order of rounding keeps the first rounds from failing.
    Returns ``W``, its Gram matrix, ``T`` with orthonormal ``T W``, and ``T`` for the rows as they
    were given. Zero rows stay zero.

    Cost: ``8 d r²`` flops.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", SIAM J. Sci. Comput. 2020.
    """
    r = gram.shape[-1]
    total = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)

    def turn(each: list[jax.Array], leaf: int, start: jax.Array, block: jax.Array) -> jax.Array:
        return combine(each[leaf], block, layout.dtype)

    for shift in (10.0, 1.0):
        t = jax.vmap(partial(_linalg.cholesky_inverse, shift=shift))(gram)
        rows, gram, _ = rewrite(rows, layout, when, r, partial(turn, layout.spread(t)))
        total = t @ total
    t = jax.vmap(_linalg.cholesky_inverse)(gram)
    return rows, gram, t, t @ total


def combine(weights: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """``c W`` with the accumulation in ``dtype``."""
    over = (((weights.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(weights.astype(rows.dtype), rows, over, preferred_element_type=dtype)


def _rewrite_leaf(w, go, height, make, cross, width, dtype):
    """`rewrite` for one leaf: a loop over blocks of columns with a trip count of zero or all."""
    count, size = w.shape
    sums = [jnp.zeros((height, height), dtype)]
    sums += [jnp.zeros((height, count), dtype)] if cross else []
    if size == 0:
        return w, *sums
    width = min(size, width)

    def body(j, carry):
        w, *sums = carry
        start = jnp.minimum(j * width, size - width)
        block = lax.dynamic_slice_in_dim(w, start, width, 1)
        new = make(start, block).astype(w.dtype)
        mine = start + jnp.arange(width) >= j * width  # the last block overlaps the one before
        counted = jnp.where(mine, new, 0)
        sums = [a + _contract(counted, b, dtype) for a, b in zip(sums, (new, block), strict=False)]
        # What is written depends on all that was read before, or XLA copies the rows.
        fine = jnp.all(jnp.isfinite(sums[-1]))
        new = jnp.where(mine & fine, new, block[:height])
        return lax.dynamic_update_slice(w, new, (jnp.zeros_like(start), start)), *sums

    return repeat(jnp.where(go, -(-size // width), 0), body, (w, *sums))


def _contract(w: jax.Array, v: jax.Array, dtype: Any) -> jax.Array:
    """``W v`` or ``W V^T`` with the accumulation in ``dtype``."""
    return lax.dot_general(
        w, v.astype(w.dtype), (((1,), (v.ndim - 1,)), ((), ())), preferred_element_type=dtype
    )


def _dtype(leaf: Any) -> Any:
    return jnp.dtype(leaf.dtype) if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """A cast that stays finite: a float32 number may be too large for float16."""
    if jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
        return x.astype(dtype)
    return jnp.clip(x, -jnp.finfo(dtype).max, jnp.finfo(dtype).max).astype(dtype)
