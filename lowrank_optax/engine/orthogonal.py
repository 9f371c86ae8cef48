"""Updates made orthogonal, as Muon does."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check_count, check_least
from lowrank_optax._core.devices import concrete, sharded_like
from lowrank_optax.engine.views import View, default_matrix_view


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
    behind any optimizer: the step then has the same length along every singular direction. Leaves
    that are not seen as matrices, and updates that are zero or not finite, stay as they are.

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
      view: a function of a leaf's path and shape to ``(rows, columns)`` or ``None``; by default
        `default_matrix_view` of the shape.

    Returns:
      An `optax.GradientTransformation` without state.

    Raises:
      ValueError: for an ``rms`` or a number of iterations out of range.

    Cost: ``4 a² b + 2 a³`` flops an iteration, ``a <= b``, in the precision of products that the
    caller has set: the iteration is rough by design. No state.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
    scale of Liu et al., "Muon is Scalable for LLM Training", 2025.
    """
    check_least("orthogonalize", "rms", rms, strict=True)
    check_count("orthogonalize", "iterations", iterations)
    seen = view or (lambda path, shape: default_matrix_view(shape))

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
        kinds: dict[Any, list[int]] = {}
        for i, (path, x) in enumerate(paths):
            size = seen(path, x.shape)
            if size is not None:
                kinds.setdefault((x.shape, size, x.dtype), []).append(i)
        for (shape, size, dtype), members in kinds.items():
            upright = size[0] > size[1]
            g = jnp.reshape(jnp.stack([leaves[i] for i in members]), (-1, *size))
            g = g.astype(jnp.promote_types(dtype, jnp.float32))
            y = jax.vmap(polar)(jnp.swapaxes(g, 1, 2) if upright else g)
            y = jnp.reshape(jnp.swapaxes(y, 1, 2) if upright else y, (-1, *shape)).astype(dtype)
            for i, x in zip(members, y, strict=True):
                leaves[i] = x
        return (treedef.unflatten(leaves),)

    compiled = jax.jit(step)

    def update(updates: Any, state: Any, params: Any = None):
        if concrete(updates):  # outside of `jax.jit` the loop would be compiled at every call
            return *compiled(updates), state
        return *sharded_like(step, (updates,), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
