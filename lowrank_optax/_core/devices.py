"""Where arrays lie on several devices, and how a step enters and leaves that arrangement."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax._core.checks import check


def mesh_of(tree: Any) -> Any:
    """The mesh that arrays lie on, or ``None`` where they are on a single device.

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


def split_over_devices(tree: Any, mesh: Any, axes: tuple[int, ...] | None = None) -> Any:
    """Arrays split along that of their ``axes``, by default all, which most devices can share.

    Among equals it is the first of ``axes``, or the longest. Without a mesh nothing happens.
    """
    if mesh is None:
        return tree

    def put(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or not x.ndim:
            return x
        longest = sorted(range(x.ndim), key=lambda i: -x.shape[i])
        names = {i % x.ndim: dividing_axes(x.shape[i], mesh) for i in axes or longest}
        best = max(names, key=lambda i: math.prod(mesh.shape[a] for a in names[i]))
        return put_on(x, mesh, P(*(names[i] or None if i == best else None for i in range(x.ndim))))

    return jax.tree.map(put, tree)


def everywhere(tree: Any, mesh: Any) -> Any:
    """Arrays whole on all devices."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: put_on(x, mesh, P(*[None] * x.ndim)), tree)


def init_on_devices(init: Callable[[Any], Any], params: Any) -> Any:
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
        put = lambda x, like: put_on(x, mesh, spec(like)) if any(spec(like)) else x
        state = jax.tree.map(put, state, _types(init, params, mesh))
    # `jax.jit` forgets arguments that no result depends on, and their devices with them.
    return lax.optimization_barrier((state, params))[0]


def sharded_like(run: Callable[..., Any], like: Any, *given: Any, **functions: Any) -> Any:
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


def step_on_devices(step: "Step", updates: Any, state: Any, params: Any, extra: Any) -> Any:
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
        return sharded_like(step.run, like, *given, **functions)
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


def dividing_axes(size: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh with the most devices among those whose number divides ``size``.

    JAX has no uneven splits of arguments and results. A leaf that fits no axis is on all devices.
    """
    free = free_axes(mesh)
    choices = (c for k in range(len(free) + 1) for c in itertools.combinations(free, k))
    parts = lambda names: math.prod(mesh.shape[name] for name in names)
    return max((c for c in choices if size % parts(c) == 0), key=parts)


def put_on(x: jax.Array, mesh: Any, spec: P) -> jax.Array:
    """An array split as ``spec`` says."""
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


class Place(NamedTuple):
    """Which of the equal parts of a leaf a device has, and whether it is the first that has it."""

    part: Any
    first: Any


def place_of(size: int, mesh: Any) -> Place:
    axes = dividing_axes(size, mesh)
    others = [lax.axis_index(a) == 0 for a in free_axes(mesh) if a not in axes]
    return Place(lax.axis_index(axes) if axes else 0, jnp.all(jnp.array(others, bool)))
