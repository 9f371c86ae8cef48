"""Updates made orthogonal, as Muon does."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check_count, check_least
from lowrank_optax._core.devices import concrete, sharded_like
from lowrank_optax.engine.axes import MatrixAxes
from lowrank_optax.engine.views import View, see


def orthogonalize(
    rms: float = 0.2,
    *,
    iterations: int = 5,
    view: View | None = None,
) -> optax.GradientTransformation:
    r"""Replaces every matrix-shaped update by its orthogonal polar factor, as Muon does.

    With ``G = U diag(s) V^T``, ``(a, b)``:

    .. math:: \Delta \approx \rho\,\sqrt{\max(a, b)}\; U V^T

    by the quintic Newton–Schulz iteration, whose singular values end between .7 and 1.2. Chain it
    behind any optimizer: the step then has the same length along every singular direction. Every
    matrix of a batch has its own factor. Leaves that are not seen as matrices, and updates that are
    zero or not finite, stay as they are.

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
      iterations: number of Newton–Schulz iterations.
      view: a function of a leaf's path and shape to its `MatrixAxes` or ``None``; by default
        `default_matrix_view`.

    Returns:
      An `optax.GradientTransformation` without state.

    Raises:
      ValueError: for an ``rms`` or a number of iterations out of range, and for a view that does
        not return axes of the leaf.

    Cost: ``4 a² b + 2 a³`` flops an iteration, ``a <= b``, in the precision of products that the
    caller has set: the iteration is rough by design. No state.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
    scale of Liu et al., "Muon is Scalable for LLM Training", 2025.
    """
    check_least("orthogonalize", "rms", rms, strict=True)
    check_count("orthogonalize", "iterations", iterations)

    def polar(g: jax.Array) -> jax.Array:
        """Of one matrix that is not higher than wide."""
        top = jnp.max(jnp.abs(g))
        sound = jnp.isfinite(top) & (top > 0)
        # First the largest entry, or the norm's squares leave the dtype's range; its inverse has to
        # stay in it too.
        y = g / jnp.where(sound, jnp.minimum(top, jnp.finfo(g.dtype).max / 64), 1)
        y = y / jnp.where(sound, jnp.linalg.norm(y), 1)

        def newton_schulz(_, y):
            k = y @ y.T
            return 3.4445 * y + (-4.775 * k + 2.0315 * k @ k) @ y

        y = jax.lax.fori_loop(0, iterations, newton_schulz, y)  # unrolled it compiles for long
        return jnp.where(sound, rms * g.shape[1] ** 0.5 * y, g)

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
            y = jax.vmap(polar)(g.astype(jnp.promote_types(dtype, jnp.float32))).astype(dtype)
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
