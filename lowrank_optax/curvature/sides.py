"""What the bases of a matrix's two sides learn from."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SideColumns(NamedTuple):
    """Columns that the bases of both sides take in, of ``n`` groups of ``m`` matrices ``(a, b)``.

    Attributes:
      short: ``(n, k, a)``; the basis of the shorter side takes ``sum_j w_j y_j y_j^T`` in.
      long: ``(n, l, b)``, likewise for the longer side.
      short_weights: ``(n, k)``, ``None`` for ones.
      long_weights: ``(n, l)``, ``None`` for ones.
    """

    short: jax.Array
    long: jax.Array
    short_weights: jax.Array | None = None
    long_weights: jax.Array | None = None


class SideCurvature(abc.ABC):
    """What is measured on matrices: a state, and the columns that both sides' bases take in.

    Everything has a leading axis of ``n`` groups, which are independent of one another, and a
    second one of the ``m`` matrices that share the bases of a group.
    """

    def init(self, like: jax.ShapeDtypeStruct) -> Any:
        """A fresh state; ``like`` is the gradient ``(n, m, a, b)``."""
        return ()

    @abc.abstractmethod
    def measure(self, g: jax.Array, state: Any, accept: jax.Array) -> tuple[SideColumns, Any]:
        """The columns of this step, and the state of the groups that ``accept`` it, ``(n,)``."""


@dataclasses.dataclass(frozen=True)
class SideCovariance(SideCurvature):
    r"""The gradient's covariance on both sides: ``G G^T`` and ``G^T G``.

    .. math:: L \leftarrow L + \sum_j G_j G_j^T,\quad R \leftarrow R + \sum_j G_j^T G_j

    with the decay of the basis that takes them in, over the ``m`` matrices of a group.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.curvature import SideCovariance
      >>> g = jnp.arange(6.0).reshape(1, 1, 2, 3)
      >>> columns, _ = SideCovariance().measure(g, (), jnp.array([True]))
      >>> bool(jnp.all(columns.short[0].T @ columns.short[0] == g[0, 0] @ g[0, 0].T))
      True

    Cost: none; the columns are the gradient's own.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization",
    ICML 2018.
    """

    def measure(self, g: jax.Array, state: Any, accept: jax.Array) -> tuple[SideColumns, Any]:
        n, _, a, b = g.shape
        short = jnp.reshape(jnp.swapaxes(g, 2, 3), (n, -1, a))
        return SideColumns(short, jnp.reshape(g, (n, -1, b))), state
