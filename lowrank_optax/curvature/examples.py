"""Curvatures with one column for every example or residual."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, fix_size, require
from lowrank_optax._core.functions import example_losses, flat_residuals
from lowrank_optax._core.layout import Layout, cast_like, stack
from lowrank_optax._core.loops import traced
from lowrank_optax._core.rows import write
from lowrank_optax._core.types import Correction, Vector
from lowrank_optax.curvature._curvature import (
    Curvature,
    Evidence,
    Observation,
    gathered,
    need_params,
    rows_of,
)
from lowrank_optax.curvature.covariance import Collecting


@dataclasses.dataclass(frozen=True)
class Examples(Curvature):
    """The correction ``sum_i j_i j_i^T`` over the gradients ``j_i`` of the entries of a vector."""

    chunk: int | None = None

    provides: ClassVar[frozenset[str]] = frozenset({"examples"})
    functions: ClassVar[frozenset[str] | None] = frozenset({"losses_fn", "residuals_fn"})

    def __post_init__(self):
        if self.chunk is not None:
            fix_size(self, "chunk")

    @abc.abstractmethod
    def vector_fn(self, evidence: Evidence) -> Callable[[Any], jax.Array]:
        """The function of the parameters whose Jacobian has the rows ``j_i``."""

    def correct(self, layout: Layout, state: Any, evidence: Evidence) -> tuple[Correction, Any]:
        given = evidence.extra.get("per_example_grads")
        if given is None:
            fn = self.vector_fn(evidence)
            params = need_params(type(self).__name__, evidence.params)
            columns = rows_of(layout, jacobian(fn, params, self.chunk))
            return Correction(gathered(evidence, columns)), state
        leaves = layout.leaves(given)
        for name, leaf, shape in zip(layout.names, leaves, layout.shapes, strict=True):
            count = np.shape(leaves[0])[:1]
            check(
                len(count) == 1 and np.shape(leaf) == (*count, *shape),
                f"{type(self).__name__}: per_example_grads has the shape {np.shape(leaf)} at the "
                f"leaf {name} of shape {shape}; pass a tree of (k, *leaf.shape), such as "
                "jax.vmap(jax.grad(loss), (None, 0))(params, batch).",
            )
        return Correction(gathered(evidence, rows_of(layout, leaves))), state


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher(Examples):
    r"""Empirical Fisher matrix: the correction is ``sum_i g_i g_i^T`` over the examples.

    It is a sum; the gradient that goes with it is the sum of the ``g_i``, too. ``update`` takes
    either ``losses_fn`` (params -> losses ``(k,)``) with ``params``, or ``per_example_grads``, a
    tree with leaves ``(k, *leaf.shape)``. The second is cheaper where examples do not interact,
    because the whole of ``losses_fn`` is differentiated once for each example.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.curvature.EmpiricalFisher(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.LInvSqrt())
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(grads.sum(0), state, per_example_grads=grads)
      >>> print(state.basis.matrix[0])            # I + diag(1, 4)
      [[2. 0.]
       [0. 5.]]

    Args:
      chunk: number of examples that are differentiated at a time, which bounds the memory; ``None``
        (the default) for all.

    Raises:
      ValueError: for a chunk below 1, and by ``update`` without either argument.

    Cost: ``k d`` numbers for the columns, on the steps that update the basis only; ``k`` backward
    passes of ``losses_fn``.

    Source: Kunstner, Hennig and Balles, "Limitations of the empirical Fisher approximation for
    natural gradient descent", NeurIPS 2019.
    """

    def vector_fn(self, evidence: Evidence) -> Callable[[Any], jax.Array]:
        meaning = "params -> losses (k,); or per_example_grads, a tree of (k, ...)"
        fn = require("EmpiricalFisher", evidence.extra, "losses_fn", meaning)
        return example_losses("EmpiricalFisher", "losses_fn", fn)


@dataclasses.dataclass(frozen=True)
class GaussNewton(Examples):
    r"""Gauss-Newton matrix: the correction is ``J^T J`` with ``J`` the residuals' Jacobian.

    The gradient that goes with it is ``J^T r``, that of ``½ ‖r‖²``. ``update`` takes either
    ``residuals_fn`` (params -> residuals ``(k,)``) with ``params``, or the gradients of the
    residuals as ``per_example_grads``, a tree with leaves ``(k, *leaf.shape)``.

    In ``GGT(rank=k, renew=True)``, whose window holds the last Jacobian alone, the step of ``LInv``
    is ``J^T (J J^T)^{-1} r``. That is Gauss-Newton in the dual: one ``eigh`` of size ``k``,
    whatever ``d``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.GaussNewton(), lro.basis.GGT(2), lro.inner.LInv())
      >>> a, b = jnp.array([[1., 2., 0.], [0., 1., 3.]]), jnp.array([1., 2.])
      >>> residuals = lambda x: a @ x - b
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> update = jax.jit(lambda g, s, x: tx.update(g, s, x, residuals_fn=residuals))
      >>> updates, state = update(a.T @ residuals(x), state, x)
      >>> bool(jnp.max(jnp.abs(residuals(x - updates))) < 1e-5)
      True

    Args:
      chunk: number of residuals that are differentiated at a time, which bounds the memory;
        ``None`` (the default) for all.

    Raises:
      ValueError: for a chunk below 1, and by ``update`` without either argument.

    Cost: ``k d`` numbers for the columns, on the steps that update the basis only; ``k`` backward
    passes of ``residuals_fn``.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, section 10.3.
    """

    def vector_fn(self, evidence: Evidence) -> Callable[[Any], jax.Array]:
        meaning = "params -> residuals (k,); or per_example_grads, a tree of (k, ...)"
        fn = require("GaussNewton", evidence.extra, "residuals_fn", meaning)
        return flat_residuals("GaussNewton", "residuals_fn", fn)


class History(NamedTuple):
    """The last gradients and losses.

    Attributes:
      columns: gradients, ``(history, size)`` for every piece.
      losses: ``(n, history)`` losses, 0 where a slot is empty.
      fill: ``(n,)`` number of gradients that came.
      lowest: ``(n,)`` lowest loss so far, infinite before the first.
    """

    columns: Any
    losses: jax.Array
    fill: jax.Array
    lowest: jax.Array


@dataclasses.dataclass(frozen=True)
class UnrolledGaussNewton(Collecting):
    """Gauss-Newton whose residuals are the losses of the last steps: the correction is ``+ g g^T``.

    The step follows ``J^T r`` instead of ``g``, where ``J`` holds the last ``history`` gradients
    and ``r`` their losses. ``update`` needs ``value``, the loss. Experimental.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, whole = lro.experimental.UnrolledGaussNewton(), lro.basis.FullMatrix(None)
      >>> tx = lro.scale_by_lre(curvature, whole, lro.inner.EMA(0.0))
      >>> g = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(g, tx.init(g), value=3.0)
      >>> print(updates.round(2))                 # the one gradient times its loss
      [3. 6.]

    Args:
      history: number ``h`` of steps whose gradients and losses are kept, 10 by default.
      adaptive: whether the lowest loss before it is subtracted from every loss; ``False`` by
        default.

    Raises:
      ValueError: for a history below 1, and by ``update`` without ``value``.

    Cost: ``h d`` numbers, one pass over them a step, and one more over the rows than `Covariance`.

    Source: the original LRE's curvature of that name.
    """

    history: int = 10
    adaptive: bool = False

    def __post_init__(self):
        fix_size(self, "history")

    def init_memory(self, layout: Layout) -> History:
        n, dtype = layout.n, layout.dtype
        return History(
            layout.store(layout.zeros(self.history)),
            jnp.zeros((n, self.history), dtype),
            jnp.zeros(n, jnp.int32),
            jnp.full(n, jnp.inf, dtype),
        )

    def update_memory(self, layout: Layout, memory: History, seen: Observation) -> History:
        value = jnp.asarray(
            require("UnrolledGaussNewton", seen.extra, "value", "the loss"), layout.dtype
        )
        good = seen.accept & jnp.isfinite(value)
        base = jnp.where(jnp.isfinite(memory.lowest) & self.adaptive, memory.lowest, 0)
        slots = jnp.where(good, memory.fill % self.history, self.history)[:, None]
        columns = layout.stored(memory.columns)
        columns = write(columns, layout, slots, cast_like(stack(seen.g), columns))
        here = slots == jnp.arange(self.history)[None]
        losses = jnp.where(here, (value - base)[:, None], memory.losses)
        return History(
            layout.store(columns),
            losses,
            linalg.tally(memory.fill, good, self.history),
            jnp.where(good, jnp.minimum(memory.lowest, value), memory.lowest),
        )

    def column(self, layout: Layout, memory: History, seen: Observation | Evidence):
        return seen.g, None

    def gradient(self, layout: Layout, state: Any, g: Vector) -> Vector:
        memory = getattr(state, "memory", state)
        return layout.combine(memory.losses, layout.stored(memory.columns))


def jacobian(fn: Callable[[Any], jax.Array], params: Any, chunk: int | None) -> Any:
    """The gradient of every entry of ``fn(params)``, ``(k,)``: a list of leaves ``(k, ...)``.

    It is a list, no tree, because containers of parameters may check the shapes of what they hold.
    Chunks are differentiated one after the other. Outside of a trace that is a loop of Python,
    since a compiled one would be compiled again at every call.
    """
    leaves, treedef = jax.tree.flatten(params)
    values, pull = jax.vjp(lambda x: fn(treedef.unflatten(x)), leaves)
    k = values.shape[0]
    back = jax.vmap(lambda e: pull(e)[0])
    if chunk is None or chunk >= k:
        return back(jnp.eye(k, dtype=values.dtype))
    # Not by the batch_size of `lax.map`, which fails on leaves without entries.
    blocks = -(-k // chunk)
    padded = jnp.eye(blocks * chunk, k, dtype=values.dtype)
    padded = jnp.reshape(padded, (blocks, chunk, k))
    if traced(values):
        rows = lax.map(back, padded)
    else:
        rows = jax.tree.map(lambda *x: jnp.stack(x), *map(back, padded))
    return jax.tree.map(lambda x: jnp.reshape(x, (blocks * chunk, *x.shape[2:]))[:k], rows)
