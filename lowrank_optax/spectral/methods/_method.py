"""What every method is.

A method is a map from a batch's pairs ``(f, T f)``, each ``(B, L)``, to cotangents ``G`` of the
``f``. No gradient flows through ``T``: the operator is self-adjoint, so the gradient through ``T
f`` equals the one through ``f``, and the methods count it there.
"""

import abc
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.linalg import safe_divide

Pairs = tuple[tuple[jax.Array, jax.Array], ...]
"""``((f, T f),)``, or ``((f, T g), (g, T* f))`` for an operator with two sides."""


class SideMoments(NamedTuple):
    """Second moments of one side of an operator.

    Attributes:
      gram: inner products ``<f_l, f_m>``, ``(L, L)``.
      cross: inner products ``<f_l, T f_m>``, ``(L, L)``.
      image: inner products ``<T f_l, T f_m>``, ``(L, L)``.
    """

    gram: Any
    cross: Any
    image: Any

    @classmethod
    def of(cls, f: jax.Array, tf: jax.Array) -> "SideMoments":
        """The means over a batch of functions and of their images, both ``(B, L)``."""
        return cls(f.T @ f / len(f), f.T @ tf / len(f), tf.T @ tf / len(f))


def moments(pairs: Pairs) -> tuple[SideMoments, ...]:
    """The `SideMoments` of every side."""
    return tuple(SideMoments.of(f, tf) for f, tf in pairs)


class Method(abc.ABC):
    """A rule for the cotangents, with a small memory where it needs one.

    Attributes:
      positive: whether it finds eigenvalues above zero alone; a class variable.
      by_size: whether it seeks the largest ``|lam|``, which on an operator without a lower bound
        has no end; a class variable.
    """

    positive: ClassVar[bool] = False
    by_size: ClassVar[bool] = False

    def init(self, modes: int) -> Any:
        """The memory before the first batch: a pytree of floating-point arrays."""
        return ()

    @abc.abstractmethod
    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        """A cotangent ``(B, L)`` for the ``f`` of every pair, and the memory after the batch."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def surrogate(method: Method, pairs: Pairs, memory: Any = ()) -> tuple[jax.Array, Any]:
    """A number whose gradient is the method's direction, and the memory after the batch.

    The number is the sum of the modes' Rayleigh quotients, which is the same for all methods. Only
    its gradient is the method's: ``G`` at the ``f`` of every pair, and zero elsewhere.

    Args:
      method: the rule for the cotangents, a `Method`.
      pairs: functions and images at the batch, ``((f, T f),)`` for a self-adjoint operator and
        ``((f, T g), (g, T* f))`` for one with two sides, each ``(B, L)``.
      memory: the method's memory before the batch, by default the one of a method without memory.

    Returns:
      The number, a scalar, and the memory after the batch.

    Cost: that of the method, and ``6 B L²`` flops for the quotients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> method = spectral.NestedLoRA(moments=spectral.WholeBatch())
      >>> f = jnp.eye(2)
      >>> loss = lambda f: spectral.surrogate(method, ((f, 0.5 * f),))[0]
      >>> print(jax.grad(loss)(f))  # f^T f / B = T already, so nothing is left to do
      [[0. 0.]
       [0. 0.]]

    Source: elementary.
    """
    return _forward(method, pairs, memory)[0]


def _forward(method: Method, pairs: Pairs, memory: Any):
    directions, memory = method.cotangents(pairs, memory)
    value = jnp.sum(quotients(moments(pairs)))
    return (value, memory), (directions, pairs, memory)


def _backward(method: Method, residuals: Any, cotangent: Any):
    directions, pairs, memory = residuals
    return (
        tuple(
            ((cotangent[0] * g).astype(f.dtype), jnp.zeros_like(tf))
            for g, (f, tf) in zip(directions, pairs, strict=True)
        ),
        jax.tree.map(jnp.zeros_like, memory),
    )


surrogate.defvjp(_forward, _backward)


def quotients(seen: tuple[SideMoments, ...]) -> jax.Array:
    """``<f, T f> / ‖f‖²`` of every mode, or ``<f, T g> / (‖f‖ ‖g‖)`` with two sides."""
    norms = jnp.diagonal(seen[0].gram) * jnp.diagonal(seen[-1].gram)
    return safe_divide(jnp.diagonal(seen[0].cross), jnp.sqrt(norms))
