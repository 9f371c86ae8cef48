"""Parameters as one vector, and the gradients that were given as the rows of a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout
from lowrank_optax.curvature._curvature import rows_of


def as_tree(layout: Layout, p: jax.Array, like: Any = None) -> Any:
    """The flat update ``(d,)`` as a tree, in the dtypes of ``like`` where it is given."""
    parts = jnp.split(p, np.cumsum(layout.sizes)[:-1]) if layout.sizes else []
    return layout.unflatten(parts) if like is None else layout.unflatten(parts, like)


def given_rows(layout: Layout, tree: Any) -> jax.Array:
    """The residuals' gradients side by side, ``(k, d)``."""
    rows = rows_of(layout, layout.leaves(tree))
    return jnp.concatenate([x.astype(layout.dtype) for x in rows], axis=1)


def check_rows(owner: str, j: jax.Array, shape: tuple[int, int]) -> None:
    """Raises ``ValueError`` unless a Jacobian has a row a residual and a column a parameter."""
    check(
        j.shape == shape,
        f"{owner}: per_example_grads has {j.shape[0]} rows of {j.shape[1]} entries for {shape[0]} "
        f"residuals of {shape[1]} parameters; pass one gradient a residual, such as "
        "jax.vmap(jax.grad(residual), (None, 0))(params, batch).",
    )
