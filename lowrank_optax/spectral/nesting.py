"""Masks that give the modes of a low-rank approximation their order."""

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lowrank_optax._core.checks import check


class Nesting(abc.ABC):
    """How a method weighs the modes (``v``) and the moments between them (``M``)."""

    @abc.abstractmethod
    def masks(self, modes: int) -> tuple[ArrayLike, ArrayLike]:
        """``v``, ``(L,)``, and ``M``, ``(L, L)``; column ``m`` of ``M`` says what mode ``m`` sees.

        Args:
          modes: the number of modes, ``L``.
        """


@dataclasses.dataclass(frozen=True)
class JointNesting(Nesting):
    r"""All nested problems at once: one objective whose minimum is ordered.

    .. math:: v_l = \sum_{j \ge l} \alpha_j, \qquad M_{lm} = \min(v_l, v_m)

    Args:
      weights: weights ``alpha`` of the problems of the first 1, 2, ... L modes, ``(L,)`` and
        positive; ``None``, the default, gives each the weight ``1/L``.

    Raises:
      ValueError: for weights that are not positive; by ``masks``, where there are not as many as
        modes.

    Cost: ``L²`` numbers.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> from lowrank_optax import spectral
      >>> v, mask = spectral.JointNesting((1.0, 1.0)).masks(2)
      >>> print(v, mask[0])
      [2. 1.] [2. 1.]
    """

    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
            check(
                self.weights and all(w > 0 for w in self.weights),
                f"JointNesting: weights is {self.weights!r}; pass positive numbers, one a mode.",
            )

    def masks(self, modes: int) -> tuple[ArrayLike, ArrayLike]:
        weights = (1 / modes,) * modes if self.weights is None else self.weights
        check(
            len(weights) == modes,
            f"JointNesting: {len(weights)} weights came for {modes} modes; pass one a mode.",
        )
        v = np.cumsum(weights[::-1])[::-1]
        return jnp.asarray(v), jnp.asarray(np.minimum(v[:, None], v))


@dataclasses.dataclass(frozen=True)
class SequentialNesting(Nesting):
    """Mode ``m`` sees modes 1 to ``m`` alone: ``v = 1``, and ``M`` is upper triangular with ones.

    The cotangent is that of one problem for each mode, with the gradient stopped at earlier modes.
    It is not the gradient of any one function.

    Cost: ``L²`` numbers.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> from lowrank_optax import spectral
      >>> print(spectral.SequentialNesting().masks(2)[1])
      [[1. 1.]
       [0. 1.]]
    """

    def masks(self, modes: int) -> tuple[ArrayLike, ArrayLike]:
        return jnp.ones(modes), jnp.triu(jnp.ones((modes, modes)))


@dataclasses.dataclass(frozen=True)
class Unnested(Nesting):
    """Every mode sees every other, ``v = 1``, ``M = 1``: the span is found, without an order.

    Cost: ``L²`` numbers.

    Source: elementary.

    Example:
      >>> from lowrank_optax import spectral
      >>> print(spectral.Unnested().masks(2)[1])
      [[1. 1.]
       [1. 1.]]
    """

    def masks(self, modes: int) -> tuple[ArrayLike, ArrayLike]:
        return jnp.ones(modes), jnp.ones((modes, modes))
