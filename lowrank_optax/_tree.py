"""Trees of parameters seen as vectors in groups, and the rows that are stored beside them.

A `Layout` is the static picture of a tree: its leaves, their shapes, and which group each belongs
to. Vectors are lists of flat leaves, rows are lists of ``(m, leaf.size)`` arrays: two-dimensional
because XLA copies rows that carry a leaf's own shape. Sums over the leaves of a group give small
arrays with a leading axis of groups; nothing here ever concatenates the leaves.

On several devices rows and vectors are split along their last axis over as many axes of the mesh as
divide it, whatever the parameter's own sharding: moving one gradient costs ``d``, moving the rows
``m d``. The mesh is that of the leaves, which carry it in their types; small algebra is on all
devices. `alike` is how a step enters and leaves this arrangement.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.shard_alike import shard_alike
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax import _linalg
from lowrank_optax._types import Columns, Vector, check


@dataclasses.dataclass(frozen=True)
class Layout:
    """Leaves of a tree by group.

    Attributes:
      treedef: the tree's structure.
      names: the leaves' paths, for messages.
      paths: the same as jax's key paths.
      shapes: the leaves' shapes.
      dtypes: the leaves' dtypes.
      rows: the dtypes in which rows are stored.
      group: the group of every leaf, ``0 .. n-1``.
      n: how many groups there are; at least one.
      dtype: of the small algebra: float32, or float64 where a leaf is.
      mesh: the mesh of the leaves where there are several devices to spread over, else ``None``.
    """

    treedef: Any
    names: tuple[str, ...]
    paths: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
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
    ) -> "Layout":
        """Reads the layout of a tree of floating-point arrays (or shapes of arrays)."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = tuple(jax.tree_util.keystr(path) for path, _ in leaves)
        dtypes = tuple(
            _dtype(owner, name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)
        )
        labels = [None if groups is None else groups(path) for path, _ in leaves]
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return cls(
            treedef=treedef,
            names=names,
            paths=tuple(path for path, _ in leaves),
            shapes=tuple(
                tuple(np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape)
                for _, leaf in leaves
            ),
            dtypes=dtypes,
            rows=tuple(jnp.dtype(rows or dtype) for dtype in dtypes),
            group=tuple(order[label] for label in labels),
            n=max(1, len(order)),
            dtype=jnp.result_type(jnp.float32, *dtypes),
            mesh=mesh_of([leaf for _, leaf in leaves]),
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
        return self.split(
            [jnp.reshape(x, -1).astype(t) for x, t in zip(leaves, self.rows, strict=True)]
        )

    def kept_in(self, dtype: Any, rows: Any) -> "Layout":
        """The layout as a state has it: small algebra in ``dtype``, leaves in that of its rows.

        ``rows`` is what `store` gave, or nothing where a basis keeps no rows.
        """
        own = isinstance(rows, tuple) and len(rows) == len(self.names)
        # Rows may be codes, of which no leaf has the dtype.
        if not own or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in rows):
            return dataclasses.replace(self, dtype=dtype)
        dtypes = tuple(jnp.dtype(x.dtype) for x in rows)
        return dataclasses.replace(self, dtype=dtype, dtypes=dtypes, rows=dtypes)

    def on(self, tree: Any) -> "Layout":
        """The same layout where the arrays of ``tree`` are."""
        return dataclasses.replace(self, mesh=mesh_of(tree))

    def split(self, arrays: Vector | Columns) -> Vector | Columns:
        """Vectors or rows spread over the devices along their last axis."""
        if self.mesh is None:
            return arrays
        return [_put(x, self.mesh, s) for x, s in zip(arrays, self._specs(arrays), strict=True)]

    def _specs(self, arrays: Vector | Columns) -> list[P]:
        """How vectors or rows are split."""
        axes = [_dividing(size, self.mesh) or None for size in self.sizes]
        return [P(*[None] * (x.ndim - 1), a) for x, a in zip(arrays, axes, strict=True)]

    def _locally(self, run: Callable[..., Any], given: Any, out: Any) -> Any:
        """``run(places, *given)`` on each device's own columns.

        ``places`` says of every leaf which part of it that is, and whether it is the first device
        that has it. Lists in ``given`` hold one array a leaf, as do those in ``out``.
        """
        axes = free_axes(self.mesh)
        specs = lambda tree: tuple(self._specs(x) if isinstance(x, list) else P() for x in tree)

        def mine(*given):
            return run([_place(size, self.mesh) for size in self.sizes], *given)

        return jax.shard_map(
            mine,
            mesh=self.mesh,
            in_specs=specs(given),
            out_specs=specs(out) if isinstance(out, tuple) else P(),
            axis_names=set(axes),
            check_vma=False,
        )(*given)

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
        columns = [
            jnp.reshape(x, (*head, size)).astype(t)
            for x, size, t in zip(leaves, self.sizes, self.rows, strict=True)
        ]
        return self.split(columns), not one

    def vectors(self, columns: Columns) -> Any:
        """Columns as a tree of the leaves' shapes with a leading axis."""
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), (-1, *shape))
                for x, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
            ]
        )

    def unflatten(self, vector: Vector, given: Any = None) -> Any:
        """The vector as a tree of the leaves' shapes, clipped to what their dtypes can hold.

        Beside ``given``, the gradients, a leaf's dtype is the one to which the gradient's and the
        parameter's promote, as that of optax's own updates.
        """
        dtypes = self.dtypes
        if given is not None:
            pairs = zip(self.leaves(given), dtypes, strict=True)
            dtypes = [jnp.promote_types(jnp.result_type(x), t) for x, t in pairs]
        return self.treedef.unflatten(
            [
                jnp.reshape(_narrow(x, dtype), shape)
                for x, shape, dtype in zip(vector, self.shapes, dtypes, strict=True)
            ]
        )

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Any list with one entry a leaf, as a tree of the same structure."""
        return self.treedef.unflatten(leaves)

    def leaves(self, tree: Any) -> list[Any]:
        """The inverse of `tree`."""
        return self.treedef.flatten_up_to(tree)

    def store(self, leaves: Sequence[jax.Array]) -> Any:
        """Rows or vectors as a state keeps them: a tuple in the order of the leaves.

        The parameters' own containers would lend them names, metadata and checks that hold for
        parameters only. `optax.tree.map_params` calls ``init`` on a tree without leaves, to find
        out what is shaped like parameters: a single number then stands for the whole tuple.
        """
        return tuple(leaves) if self.names else jnp.zeros((), self.dtype)

    def stored(self, rows: Any) -> list[jax.Array]:
        """The inverse of `store`."""
        return list(rows) if self.names else []

    def zeros(self, count: int) -> Columns:
        """``count`` rows of zeros."""
        return self.split(
            [jnp.zeros((count, size), t) for size, t in zip(self.sizes, self.rows, strict=True)]
        )

    def spread(self, values: jax.Array) -> list[jax.Array]:
        """The value of each leaf's group, from an array with a leading axis of groups."""
        return [values[group] for group in self.group]

    def gather(self, parts: Sequence[jax.Array], shape: tuple[int, ...] = ()) -> jax.Array:
        """Sums one small array a leaf over the leaves of each group: ``(n, *shape)``."""
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
        """``W v``: ``(n, m)`` for a vector, ``(n, m, k)`` for columns. One pass over the rows."""
        if vector and vector[0].ndim == 2 and vector[0].shape[0] == 1:  # a gemv is the faster one
            return self.dot(rows, [v[0] for v in vector])[..., None]
        count = rows[0].shape[0] if rows else 0
        tail = () if not rows or vector[0].ndim == 1 else (vector[0].shape[0],)
        return self._sum(partial(_contract, dtype=self.dtype), (count, *tail), rows, vector)

    def inner(self, a: Vector, b: Vector) -> jax.Array:
        """``a · b`` within each group, ``(n,)``."""
        dot = lambda x, y: jnp.vdot(x.astype(self.dtype), y.astype(self.dtype))
        return self._sum(dot, (), a, b)

    def squares(self, columns: Columns) -> jax.Array:
        """Squared norms of columns over all leaves, ``(k,)``."""
        parts = [jnp.sum(jnp.square(c.astype(self.dtype)), axis=1) for c in columns]
        return _total(parts, (columns[0].shape[0],), self.dtype)

    def gram(self, columns: Columns) -> jax.Array:
        """``(n, k, k)`` inner products of columns; one column costs one elementwise pass."""
        if columns and columns[0].shape[0] == 1:
            vector = [c[0] for c in columns]
            return self.inner(vector, vector)[:, None, None]
        return self.dot(columns, columns)

    def combine(self, weights: jax.Array, rows: Columns) -> Vector | Columns:
        """``c W``: weights ``(n, m)`` give a vector, ``(n, k, m)`` columns. One pass."""
        return [combine(c, w, self.dtype) for c, w in zip(self.spread(weights), rows, strict=True)]


def mesh_of(tree: Any) -> Any:
    """The mesh that arrays lie on, ``None`` where there is nothing to spread over.

    Axes that `jax.shard_map` has made manual are not ours: there every device runs on its own.
    """
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            devices = math.prod(mesh.shape[a] for a in free_axes(mesh))
            if devices > 1 or AxisType.Explicit in mesh.axis_types:  # whose types hold for one too
                return mesh
    return None


def free_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that are not manual."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def spread(tree: Any, mesh: Any, axes: tuple[int, ...] | None = None) -> Any:
    """Arrays split along that of their ``axes``, by default all, which most devices can share.

    Among equals it is the first of ``axes``, or the longest. Without a mesh nothing happens.
    """
    if mesh is None:
        return tree

    def put(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or not x.ndim:
            return x
        longest = sorted(range(x.ndim), key=lambda i: -x.shape[i])
        names = {i % x.ndim: _dividing(x.shape[i], mesh) for i in axes or longest}
        best = max(names, key=lambda i: math.prod(mesh.shape[a] for a in names[i]))
        return _put(x, mesh, P(*(names[i] or None if i == best else None for i in range(x.ndim))))

    return jax.tree.map(put, tree)


def everywhere(tree: Any, mesh: Any) -> Any:
    """Arrays whole on all devices."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, mesh, P(*[None] * x.ndim)), tree)


def start(init: Callable[[Any], Any], params: Any) -> Any:
    """``init(params)`` on the devices of ``params``.

    Zeros have no operands that would tell XLA where they belong, but types do: see `shardings`.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return init(params)
    if _traced(params):
        return jax.jit(partial(_start, init))(params)  # also where `jax.vmap` alone traces
    return jax.jit(init, out_shardings=shardings(init, params))(params)


def _start(init: Callable[[Any], Any], params: Any) -> Any:
    mesh, state = mesh_of(params), init(params)
    if AxisType.Explicit in mesh.axis_types:
        put = lambda x: x if mesh_of(x) is not None else everywhere(x, mesh)
        state = jax.tree.map(put, state)
    else:
        spec = lambda like: P() if like.sharding is None else like.sharding.spec
        put = lambda x, like: _put(x, mesh, spec(like)) if any(spec(like)) else x
        state = jax.tree.map(put, state, _types(init, params, mesh))
    # `jax.jit` forgets arguments that no result depends on, and their devices with them.
    return lax.optimization_barrier((state, params))[0]


def alike(run: Callable[..., Any], like: Any, *given: Any, **functions: Any) -> Any:
    """``run(*given, **functions)``: arrays sharded like their counterparts in ``like``.

    The result and ``like`` are tuples; ``None`` in ``like`` stands for small arrays, which are on
    all devices. Inside, all axes of the mesh are automatic, but not so in the functions, whose
    arguments are like ``like[0]``. Without a mesh it is the plain call.
    """
    if mesh_of(given) is None:
        return run(*given, **functions)
    if functions:  # which differ from call to call
        return jax.jit(partial(_alike, run, **functions))(like, *given)
    return _compiled(run, like, *given)


def step_alike(step: "Step", updates: Any, state: Any, params: Any, extra: Any) -> Any:
    """One step of an optimizer, sharded as it came, compiled also where nobody asked for it.

    ``extra`` is what came by keyword, of which functions are told from arrays. Updates become
    sharded like the parameters where there are any.
    """
    same = jax.tree.structure(params) == jax.tree.structure(updates)
    functions = {name: x for name, x in extra.items() if callable(x)}
    arrays = {name: x for name, x in extra.items() if name not in functions}
    like = params if same else updates, state, None
    given = updates, state, params, arrays
    if mesh_of(given) is not None:
        return alike(step.run, like, *given, **functions)
    if functions or not concrete(given):
        return step.run(*given, **functions)
    return step.compiled(*given)


class Step:
    """``run(updates, state, params, arrays, **functions)`` beside its compiled form.

    Outside of `jax.jit` a loop is compiled anew at each call, since its body is a new function, and
    jax keeps what it compiled. This holds one compiled step for as long as the optimizer lives.
    """

    def __init__(self, run: Callable[..., Any]):
        self.run = run
        self.compiled = jax.jit(run)


def concrete(tree: Any) -> bool:
    """Whether all leaves are numbers or arrays at hand on one device, none of them traced."""
    if mesh_of(tree) is not None:
        return False
    at_hand = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
    return all(
        isinstance(x, at_hand) and not isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)
    )


def _alike(run: Callable[..., Any], like: Any, *given: Any, **functions: Any) -> Any:
    mesh = mesh_of(given)
    if AxisType.Explicit not in mesh.axis_types:
        pairs = zip(run(*given, **functions), like, strict=True)
        return tuple(new if old is None else shard_alike(new, old)[0] for new, old in pairs)
    axes, small = free_axes(mesh), NamedSharding(mesh, P())
    types = tuple(
        small if x is None else jax.tree.map(lambda x: jax.typeof(x).sharding, x) for x in like
    )

    def automatic(*given):
        outer = lambda f: (
            lambda x: jax.sharding.explicit_axes(f, axes=axes, in_sharding=(types[0],))(x)
        )
        return run(*given, **{name: outer(f) for name, f in functions.items()})

    return jax.sharding.auto_axes(automatic, axes=axes, out_sharding=types)(*given)


_compiled = jax.jit(_alike, static_argnums=0)
"""Compiled once for each ``run``, for calls outside of `jax.jit` too."""


def _traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def shardings(init: Callable[[Any], Any], params: Any) -> Any:
    """The shardings of ``init(params)``, such as an optimizer's state, without computing it.

    Rows ``(m, leaf.size)`` are split along their last axis over as many axes of the mesh as divide
    it, whatever the parameter's own sharding; what is shaped like a parameter is sharded like it;
    the rest is on all devices.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
      >>> params = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=place)}
      >>> tx = lro.lre(1e-2, basis=lro.basis.GGT(3))
      >>> places = lro.shardings(tx.init, params)
      >>> init = jax.jit(tx.init, out_shardings=places)        # puts every part where it belongs

    Args:
      init: ``tx.init`` of any optax transformation, or a function of arrays alone.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, on one mesh.

    Returns:
      A tree of `jax.sharding.NamedSharding`, as ``out_shardings`` of `jax.jit` and checkpoint
      libraries take it.

    Raises:
      ValueError: where no parameter has a `jax.sharding.NamedSharding`.
    """
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    mesh: Any = next((s.mesh for s in places if isinstance(s, NamedSharding)), None)
    check(
        mesh is not None,
        "shardings: no parameter has a NamedSharding; pass arrays that lie on a mesh, or "
        "jax.ShapeDtypeStruct(shape, dtype, sharding=...).",
    )

    def place(x: Any) -> NamedSharding:
        spec = () if x.sharding is None else tuple(x.sharding.spec)
        while spec and spec[-1] is None:  # as XLA spells what it returns, or steps compile twice
            spec = spec[:-1]
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, _types(init, params, mesh.abstract_mesh))


def _types(init: Callable[[Any], Any], params: Any, mesh: Any) -> Any:
    """What ``init`` would return were all axes explicit, whose types show shardings."""
    kinds = [t if t == AxisType.Manual else AxisType.Explicit for t in mesh.axis_types]
    explicit = mesh.update(axis_types=tuple(kinds))

    def typed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(explicit, spec))

    with jax.sharding.use_abstract_mesh(explicit):
        return jax.eval_shape(init, jax.tree.map(typed, params))


def check_kind(owner: str, state: Any, kind: type) -> None:
    """Raises ``ValueError`` for a state of another class, such as the dictionary of a bare file."""
    check(
        isinstance(state, kind),
        f"{owner}: the state is a {type(state).__name__}, not a {kind.__name__}; pass what init "
        "returned. A checkpoint is to be restored with such a state as its target.",
    )


def check_fits(
    owner: str,
    state: Any,
    init: Callable[..., Any],
    example: tuple[Any, ...],
    known: set[Any] | None = None,
    but: str | None = None,
) -> None:
    """Raises ``ValueError`` where a state's arrays are not those of ``init(*example)``.

    What lies under the field ``but`` may differ. ``known`` remembers what was found to fit, since
    finding out traces ``init``.
    """
    known = set() if known is None else known
    kinds = lambda tree: (
        jax.tree.structure(tree),
        tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)),
    )
    key = kinds(state), kinds(example)
    if key in known:
        return
    like = jax.eval_shape(init, *example)
    check_kind(owner, state, type(like))
    read = lambda tree: {
        jax.tree_util.keystr(path): f"an array {np.shape(leaf)} {jnp.result_type(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(path[0], "name", None) != but
    }
    got, needed = read(state), read(like)
    for path in (*needed, *got):
        check(
            got.get(path) == needed.get(path),
            f"{owner}: the state holds {got.get(path, 'nothing')} at {path}, where these gradients "
            f"({_listing(example)}) and parts need {needed.get(path, 'nothing')}. Pass gradients "
            "shaped like the "
            "parameters given to init, parameters of the dtypes given to init, and a state that "
            "the same parts made in the same version; or call init again.",
        )
    if len(known) > 64:
        known.clear()
    known.add(key)


def _listing(tree: Any, most: int = 4) -> str:
    """The first leaves of a tree, with names and shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path[1:]) or "one leaf"
    said = [f"{name(path)} {np.shape(x)}" for path, x in leaves[:most]]
    return ", ".join([*said, "..."] if len(leaves) > most else said)


def per_leaf(path: Any) -> str:
    """A ``groups`` function: every leaf is a group of its own.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1e-2, basis=lro.basis.GGT(10), groups=lro.per_leaf)
    """
    return jax.tree_util.keystr(path)


def wide(tree: Any) -> Any:
    """The leaves in float32 at least, in which squares and small constants are not lost."""

    def one(x: Any) -> Any:
        dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return jnp.asarray(x, dtype)

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class _Opaque:
    """Whether a leaf's step was taken, in a container that may look at the shapes of arrays."""

    taken: Any


def advance(tx: Any, layout: Layout, taken: Sequence[Any], new: Any, old: Any) -> Any:
    """The new state of an optax transformation where the leaves' steps were taken, else the old.

    ``taken`` has a boolean for every leaf of the layout, or `optax.MaskedNode`. What belongs to no
    leaf, such as a count, moves where any leaf does.
    """
    hidden = lambda x: isinstance(x, optax.MaskedNode)
    flags = [x for x in taken if not hidden(x)]
    if not flags:
        return old
    some = jnp.any(jnp.stack(flags))
    which = optax.tree.map_params(
        tx,
        lambda x, flag: x if hidden(x) else flag,
        old,
        layout.tree([x if hidden(x) else _Opaque(x) for x in taken]),
        transform_non_params=lambda _: _Opaque(some),
        is_leaf=hidden,
    )
    pick = lambda flag, *pair: jax.tree.map(partial(jnp.where, flag.taken), *pair)
    return jax.tree.map(pick, which, new, old)


def stack(vector: Vector) -> Columns:
    """A vector as a single column."""
    return [x[None] for x in vector]


def cast_like(columns: Columns, rows: Columns) -> Columns:
    """Columns in the dtypes of the rows they are to join."""
    return [c.astype(w.dtype) for c, w in zip(columns, rows, strict=True)]


def repeat(times: jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Runs ``body(i, carry)`` a traced number of times, mostly zero or one.

    The engine's only form of "now and then": `lax.cond` makes XLA copy big buffers through both of
    its branches, a loop updates its carry in place and costs nothing when it does not run. Under
    `jax.vmap` it runs as often as any of the batch asks for, since separate counts would copy the
    carry: ``body`` leaves alone what does not ask, as it has to for groups. Outside of a trace it
    is a loop of Python, as XLA would compile the body at every call.
    """
    if not _linalg.traced((times, carry)):
        for i in range(int(times)):
            carry = body(jnp.int32(i), carry)
        return carry
    start, treedef = jax.tree.flatten(carry)

    def flat(i, *leaves):
        return jax.tree.leaves(body(i, treedef.unflatten(leaves)))

    inside = jax.make_jaxpr(flat)(jnp.zeros((), jnp.int32), *start)

    def run(i, leaves):
        # XLA takes out of a loop what does not depend on it, and would do at every step what is to
        # be done now and then.
        known, i = lax.optimization_barrier((inside.consts, i))
        return jaxpr_as_fun(inside.replace(consts=known))(i, *leaves)

    return treedef.unflatten(lax.fori_loop(0, _most(times.astype(jnp.int32)), run, start))


@jax.custom_batching.custom_vmap
def _most(times: jax.Array) -> jax.Array:
    """``times``, and under `jax.vmap` the largest of the batch, the same for all."""
    return times


@_most.def_vmap
def _(size, batched, times):
    return jnp.max(times), False


def write(rows: Columns, layout: Layout, slots: jax.Array, columns: Columns) -> Columns:
    """Puts column ``j`` of ``k`` into row ``slots[:, j]`` of its group; a slot of ``m`` drops it.

    A column that is dropped puts back what was there, so that nothing depends on a predicate and
    `jax.vmap` of it copies nothing either. The rows are read before (``slots`` depends on the
    read), so that XLA writes in place.
    """

    def put(w: jax.Array, at: jax.Array, c: jax.Array) -> jax.Array:
        def one(j, w):
            row = jnp.minimum(at[j], w.shape[0] - 1)
            old = lax.dynamic_slice_in_dim(w, row, 1, 0)
            new = jnp.where(at[j] < w.shape[0], lax.dynamic_slice_in_dim(c, j, 1, 0), old)
            return lax.dynamic_update_slice_in_dim(w, new, row, 0)

        return one(0, w) if c.shape[0] == 1 else _linalg.loop(0, c.shape[0], one, w)

    return [
        put(w, at, c)
        for w, at, c in zip(rows, layout.spread(slots), cast_like(columns, rows), strict=True)
    ]


def rewrite(
    rows: Columns,
    layout: Layout,
    when: jax.Array,
    height: int,
    make: Callable[..., jax.Array],
    *beside: Columns,
    cross: bool = False,
) -> tuple[Columns, jax.Array, jax.Array]:
    """Replaces the first ``height`` rows of the groups in ``when``, ``(n,)``, in place.

    ``make(leaf, at, block, *blocks)`` turns columns of a leaf's rows, ``(m, width)``, of indices
    ``at``, ``(width,)``, into the new ``(height, width)``; ``blocks`` are those columns of
    ``beside``. Besides the rows it returns the Gram matrix of the new ones, ``(n, height,
    height)``, and with ``cross`` (else empty) their products with the old, ``(n, height, m)``,
    measured on what is stored; both are 0 for the other groups. Every device treats its own columns
    and the products are summed at the end.
    """
    count = rows[0].shape[0] if rows else height
    zeros = lambda width: jnp.zeros((layout.n, height, width), layout.dtype)
    local = partial(_rewrite, layout=layout, height=height, make=make, cross=cross)

    def mine(places, rows, when, *beside):
        rows, *sums = local(rows, when, beside, places)
        return rows, *lax.psum(sums, free_axes(layout.mesh))

    def body(_, carry):
        if layout.mesh is None:
            return local(carry[0], when, beside, [Place(0, True)] * len(rows))
        return layout._locally(mine, (carry[0], when, *beside), (rows, None, None))

    # One loop around those of the leaves, which mostly does not run: in it the sums over devices
    # wait, and on a GPU the host, which decides whether a loop runs, waits for one answer a step.
    return repeat(jnp.any(when), body, (rows, zeros(height), zeros(count if cross else 0)))


def random_rows(layout: Layout, key: jax.Array, count: int) -> Columns:
    """Orthonormal rows of a random subspace, for at most as many as a vector has entries."""
    keys = jax.random.split(key, max(1, len(layout.sizes)))
    rows = [
        jax.random.normal(k, (count, size), layout.dtype).astype(t)
        for k, size, t in zip(keys, layout.sizes, layout.rows, strict=False)
    ]
    return orthonormal(layout, layout.split(rows))


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

    def turn(each: list[jax.Array], leaf: int, at: jax.Array, block: jax.Array) -> jax.Array:
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
    return _product(weights.astype(rows.dtype), rows, over, dtype)


def _rewrite(rows, when, beside, places, *, layout: Layout, height, make, cross):
    """`rewrite` on one device."""
    count = rows[0].shape[0] if rows else height
    done, grams, crosses = [], [], []
    along = zip(*beside, strict=True) if beside else [()] * len(rows)
    for leaf, (w, go, blocks, place) in enumerate(
        zip(rows, layout.spread(when), along, places, strict=True)
    ):
        w, *sums = _rewrite_leaf(
            (w, *blocks), go, height, partial(make, leaf), cross, layout, place
        )
        done.append(w)
        grams.append(sums[0])
        crosses.append(sums[-1])
    gram = layout.gather(grams, (height, height))
    empty = jnp.zeros((layout.n, height, 0), layout.dtype)
    return done, gram, layout.gather(crosses, (height, count)) if cross else empty


def _rewrite_leaf(arrays, go, height, make, cross, layout: Layout, place: "Place"):
    """`_rewrite` for one leaf: a loop over blocks of columns with a trip count of zero or all."""
    w, *beside = arrays
    count, size = w.shape
    dtype = layout.dtype
    sums = [jnp.zeros((height, height), dtype)]
    sums += [jnp.zeros((height, count), dtype)] if cross else []
    if size == 0:
        return w, *sums
    width = min(size, layout.block(count))

    def body(j, carry):
        w, *sums = carry
        start = jnp.minimum(j * width, size - width)
        block, *blocks = (lax.dynamic_slice_in_dim(x, start, width, 1) for x in (w, *beside))
        at = start + jnp.arange(width)
        new = make(place.part * size + at, block, *blocks).astype(w.dtype)
        # The last block overlaps the one before; in a batch of runs a loop may run for others.
        mine = (at >= j * width) & go
        counted = jnp.where(mine & place.first, new, 0)
        sums = [a + _contract(counted, b, dtype) for a, b in zip(sums, (new, block), strict=False)]
        # What is written depends on all that was read before, or XLA copies the rows.
        fine = jnp.all(jnp.isfinite(sums[-1]))
        new = jnp.where(mine & fine, new, block[:height])
        return lax.dynamic_update_slice(w, new, (jnp.zeros_like(start), start)), *sums

    return repeat(jnp.where(go, -(-size // width), 0), body, (w, *sums))


def _dividing(size: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh with the most devices among those whose number divides ``size``.

    JAX has no uneven splits of arguments and results. A leaf that fits no axis is on all devices.
    """
    free = free_axes(mesh)
    choices = (c for k in range(len(free) + 1) for c in itertools.combinations(free, k))
    parts = lambda names: math.prod(mesh.shape[name] for name in names)
    return max((c for c in choices if size % parts(c) == 0), key=parts)


def _put(x: jax.Array, mesh: Any, spec: P) -> jax.Array:
    """An array split as ``spec`` says."""
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


class Place(NamedTuple):
    """Which of the equal parts of a leaf a device has, and whether it is the first that has it."""

    part: Any
    first: Any


def _place(size: int, mesh: Any) -> Place:
    axes = _dividing(size, mesh)
    others = [lax.axis_index(a) == 0 for a in free_axes(mesh) if a not in axes]
    return Place(lax.axis_index(axes) if axes else 0, jnp.all(jnp.array(others, bool)))


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


def _contract(w: jax.Array, v: jax.Array, dtype: Any) -> jax.Array:
    """``W v`` or ``W V^T`` with the accumulation in ``dtype``."""
    return _product(w, v.astype(w.dtype), (((1,), (v.ndim - 1,)), ((), ())), dtype)


def _product(a: jax.Array, b: jax.Array, over: Any, dtype: Any) -> jax.Array:
    """A product over rows: exact in what is stored, and of 16-bit rows no more than that.

    An accelerator reads 16-bit rows as they are; for float32 it has to be asked for float32.
    """
    short = a.dtype.itemsize < 4
    precision = lax.Precision.DEFAULT if short else lax.Precision.HIGHEST
    return lax.dot_general(a, b, over, precision=precision, preferred_element_type=dtype)


def _dtype(owner: str, name: str, leaf: Any) -> Any:
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
