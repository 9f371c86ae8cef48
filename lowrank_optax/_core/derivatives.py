"""The derivative that a step does not have, refused where it is asked for."""

from functools import partial
from typing import Any

import jax
import numpy as np


def undifferentiated(owner: str, tree: Any) -> Any:
    """The tree itself; who differentiates through it gets a ``ValueError`` that names ``owner``.

    Eigenvectors of repeated eigenvalues have no derivative, and every basis starts with such. Left
    to JAX, forward mode gives NaN and reverse mode fails deep inside a loop. So an engine passes
    the gradients that it is given through here, in the first line of its update.

    What stays possible: derivatives that do not run through the gradients. The update of one step
    is linear in the learning rate, so the derivative with respect to it is exact, and
    ``jax.lax.stop_gradient`` of the gradients gives that part in any number of steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> float(undifferentiated("engine", jnp.float32(2.0)))
      2.0
      >>> jax.grad(lambda x: undifferentiated("engine", x))(2.0)
      Traceback (most recent call last):
      ...
      ValueError: engine: the derivative of a step with respect to its gradients does not exist...

    Args:
      owner: name of the engine, with which the message begins.
      tree: the gradients, a tree. Leaves that are no arrays of numbers stay as they are.

    Returns:
      The tree, leaf for leaf. Nothing of it is left in the compiled program.

    Raises:
      ValueError: in forward and reverse mode, where a leaf depends on what is differentiated.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if _is_number(x)]
    for i, x in zip(places, _identity(owner, [leaves[i] for i in places]), strict=True):
        leaves[i] = x
    return treedef.unflatten(leaves)


def _is_number(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | float)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(owner: str, arrays: list[Any]) -> list[Any]:
    return arrays


@_identity.defjvp
def _refuse(owner, primals, tangents):
    raise ValueError(
        f"{owner}: the derivative of a step with respect to its gradients does not exist, since "
        "eigenvectors of repeated eigenvalues have none; to learn a learning rate, put "
        "optax.scale_by_learning_rate behind in optax.chain and differentiate one step, whose "
        "update is linear in it, or take finite differences over several steps, or pass "
        "jax.lax.stop_gradient(gradients) to leave this part of the derivative out."
    )
