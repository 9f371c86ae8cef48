"""Updates made orthogonal, as Muon does."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, check_least
from lowrank_optax._core.devices import concrete, sharded_like
from lowrank_optax._core.linalg import times
from lowrank_optax._core.states import at_least_float32
from lowrank_optax.engine.axes import MatrixAxes
from lowrank_optax.engine.views import View, see

WIDE = 1.5
"""From so many times as wide as high on, the iteration runs on the Gram matrix alone."""

# The second to the fifth of the polynomials that Amsel et al. found best one after another.
STEPS = (
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalize(
    rms: float = 0.2,
    *,
    view: View | None = None,
) -> optax.GradientTransformation:
    r"""Replaces every matrix-shaped update by its orthogonal polar factor, as Muon does.

    With ``G = U diag(s) V^T``, ``(a, b)``:

    .. math:: \Delta \approx \rho\,\sqrt{\max(a, b)}\; U V^T

    by four quintic Newton–Schulz steps. Singular values above a hundredth of the largest end
    between .87 and 1.13. Chain it behind any optimizer: the step then has the same length along
    every singular direction. Every matrix of a batch has its own factor. Leaves that are not seen
    as matrices, and updates that are zero or not finite, stay as they are.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.orthogonalize(rms=1.0)
      >>> updates, _ = tx.update(jnp.array([[100.0, 0.0], [0.0, -1.0]]), tx.init(jnp.zeros((2, 2))))
      >>> print(jnp.round(updates / 2**0.5))
      [[ 1.  0.]
       [ 0. -1.]]

    Args:
      rms: root mean square ``rho`` of the entries of an update of full rank; that of Adam's
        updates is about .2.
      view: a function of a leaf's path and shape to its `MatrixAxes` or ``None``; by default
        `default_matrix_view`.

    Returns:
      An `optax.GradientTransformation` without state.

    Raises:
      ValueError: for an ``rms`` out of range, and for a view that does
        not return axes of the leaf.

    Cost: ``16 a² b + 8 a³`` flops, ``a <= b``, and where ``b`` is half as long again or longer
    ``4 a² b + 26 a³``, as the steps then run on the Gram matrix alone; in the precision of products
    that the caller has set: the factor is rough by design. No state.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
    scale of Liu et al., "Muon is Scalable for LLM Training", 2025; the polynomials of Amsel et al.,
    "The Polar Express", 2025 (arXiv 2505.16932), without their first, which the norm makes up for.
    """
    check_least("orthogonalize", "rms", rms, strict=True)

    def step(updates: Any) -> tuple[Any]:
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        leaves = [x for _, x in paths]
        seen = see("orthogonalize", [path for path, _ in paths], [x.shape for x in leaves], view)
        kinds: dict[Any, dict[int, MatrixAxes]] = {}
        for i, ((axes, _), x) in enumerate(zip(seen, leaves, strict=True)):
            if axes is not None:
                kind = axes.sizes(x.shape)[1:], x.dtype
                kinds.setdefault(kind, {})[i] = axes.wide(x.shape)
        for (_, dtype), members in kinds.items():
            g = jnp.concatenate([axes.matrices(leaves[i]) for i, axes in members.items()])
            g = g.astype(jnp.promote_types(dtype, jnp.float32))
            factor, sound = polar(g)
            y = jnp.where(sound[:, None, None], rms * g.shape[2] ** 0.5 * factor, g).astype(dtype)
            first = 0
            for i, axes in members.items():
                many, shape = axes.sizes(leaves[i].shape)[0], leaves[i].shape
                leaves[i] = axes.leaf(y[first : first + many], shape)
                first += many
        return (treedef.unflatten(leaves),)

    compiled = jax.jit(step)

    def update(updates: Any, state: Any, params: Any = None):
        if concrete(updates):  # outside of `jax.jit` the loop would be compiled at every call
            return *compiled(updates), state
        return *sharded_like(step, (updates,), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def polar(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The orthogonal polar factor of matrices ``(..., a, b)``, ``a <= b``, roughly.

    Returns it, and for which matrices there is one, ``(...)``: they are finite and not zero.
    """
    shape = g.shape
    g = jnp.reshape(g, (math.prod(shape[:-2]), *shape[-2:]))
    top = jnp.max(jnp.abs(g), axis=(1, 2), keepdims=True)
    sound = jnp.isfinite(top) & (top > 0)
    # First the largest entry, or the squares leave the dtype's range; its inverse has to stay in it
    # too.
    y = g / jnp.where(sound, jnp.minimum(top, jnp.finfo(g.dtype).max / 64), 1)
    a, b = shape[-2:]
    k = times(y, y, "y")
    # The root of the Gram matrix's norm bounds the largest singular value, closer than y's norm.
    bound = jnp.sqrt(jnp.sqrt(jnp.sum(k**2, axis=(1, 2), keepdims=True)))
    bound = 1.01 * jnp.where(sound, bound, 1)
    y, k = y / bound, k / bound**2
    eye = jnp.eye(a, dtype=g.dtype)[None]
    steps = jnp.asarray(STEPS, g.dtype)
    polynomial = lambda i, k: steps[i, 0] * eye + steps[i, 1] * k + steps[i, 2] * times(k, k)
    last = len(STEPS) - 1  # In loops, since unrolled steps compile for long.
    if b < WIDE * a:

        def straight(i, now):
            y, k = now
            y = times(polynomial(i, k), y)
            return y, times(y, y, "y")

        y, k = jax.lax.fori_loop(0, last, straight, (y, k))
        y = times(polynomial(last, k), y)
    else:
        # Polynomials in K commute: they are collected, and the wide matrix is multiplied once.
        def collect(i, now):
            z, k = now
            p = polynomial(i, k)
            return times(z, p), times(times(p, k), p)

        z = polynomial(0, k)
        z, k = jax.lax.fori_loop(1, last, collect, (z, times(times(z, k), z)))
        y = times(times(z, polynomial(last, k)), y)
    return jnp.reshape(y, shape), jnp.reshape(sound, shape[:-2])


class NeuronRMSState(NamedTuple):
    """State of `scale_by_neuron_rms`.

    Attributes:
      count: steps.
      square: averages of the mean squares of all neurons, leaf after leaf, not corrected for their
        start.
    """

    count: jax.Array
    square: jax.Array


def _one_row(leaves: list[Any], views: list[Any]) -> list[tuple[int, ...]]:
    """The shapes of leaves with one number for each neuron, ``(0,)`` of those that have none."""
    one = lambda x, axes: tuple(1 if i in axes.rows else n for i, n in enumerate(x.shape))
    pairs = zip(leaves, views, strict=True)
    return [(0,) if axes is None else one(x, axes) for x, axes in pairs]


def scale_by_neuron_rms(
    b2: float = 0.95, rms: float = 0.2, *, eps: float = 1e-8, view: View | None = None
) -> optax.GradientTransformation:
    r"""Divides what every neuron gets by its running root mean square, as NorMuon does.

    With an update ``O`` seen as matrices of rows ``i`` (inputs) and columns ``j`` (neurons):

    .. math:: v_j \leftarrow b_2 v_j + (1-b_2)\,\mathrm{mean}_i\,O_{ij}^2,\quad
              \hat O_{ij} = O_{ij} / (\sqrt{\hat v_j} + \epsilon),\quad
              O \leftarrow \rho\,\hat O / \mathrm{rms}(\hat O)

    A hat over ``v`` stands for the correction of the start at zero. Leaves that are not seen as
    matrices stay as they are.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_neuron_rms(rms=1.0)
      >>> x = jnp.array([[1.0, 10.0], [1.0, -10.0]])
      >>> print(tx.update(x, tx.init(x))[0])
      [[ 1.  1.]
       [ 1. -1.]]

    Args:
      b2: decay of the averages, in [0, 1).
      rms: root mean square ``rho`` of a matrix's update.
      eps: number added to the root.
      view: a function of a leaf's path and shape to its `MatrixAxes` or ``None``; by default
        `default_matrix_view`.

    Returns:
      An `optax.GradientTransformation` with the state `NeuronRMSState`.

    Raises:
      ValueError: for a decay, ``rms`` or ``eps`` out of range.

    Cost: one number of state for every neuron, a few flops for every entry.

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", 2025 (arXiv 2510.05491).
    """
    owner = "scale_by_neuron_rms"
    check_decay(owner, "b2", b2)
    check_least(owner, "rms", rms, strict=True)
    check_least(owner, "eps", eps)

    def leaves_and_axes(tree: Any):
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        leaves = [x for _, x in paths]
        seen = see(owner, [path for path, _ in paths], [jnp.shape(x) for x in leaves], view)
        return leaves, [each.axes for each in seen], treedef

    def init(params: Any) -> NeuronRMSState:
        leaves, views, _ = leaves_and_axes(params)
        dtype = jnp.result_type(jnp.float32, *leaves)
        neurons = sum(math.prod(shape) for shape in _one_row(leaves, views))
        return NeuronRMSState(jnp.zeros((), jnp.int32), jnp.zeros(neurons, dtype))

    def step(updates: Any, state: Any):
        leaves, views, treedef = leaves_and_axes(updates)
        count, first, squares = linalg.tally(state.count), 0, []
        for i, (axes, shape) in enumerate(zip(views, _one_row(leaves, views), strict=True)):
            if axes is None:
                continue
            y = at_least_float32(leaves[i])
            old = jnp.reshape(state.square[first : first + math.prod(shape)], shape)
            mean = jnp.mean(y**2, axis=axes.rows, keepdims=True)
            # An update that was dropped is zero, and no part of the average.
            v = jnp.where(jnp.any(mean > 0), b2 * old + (1 - b2) * mean, old)
            y = linalg.safe_divide(y, jnp.sqrt(v / (1 - b2**count)) + eps)
            size = jnp.mean(y**2, axis=axes.rows + axes.columns, keepdims=True)
            y = rms * linalg.safe_divide(y, jnp.sqrt(size))
            leaves[i], first = y.astype(leaves[i].dtype), first + math.prod(shape)
            squares.append(jnp.ravel(v).astype(state.square.dtype))
        square = jnp.concatenate([state.square[:0], *squares])
        return treedef.unflatten(leaves), NeuronRMSState(count, square)

    compiled = jax.jit(step)

    def update(updates: Any, state: Any, params: Any = None):
        run = compiled if concrete((updates, state)) else step
        return run(updates, state)

    return optax.GradientTransformation(init, update)
