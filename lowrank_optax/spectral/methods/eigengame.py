"""One Rayleigh quotient for each mode, with penalties on what the mode shares with earlier ones."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check_least
from lowrank_optax._core.linalg import safe_divide
from lowrank_optax.spectral.methods._moments import MomentLoss
from lowrank_optax.spectral.methods.estimates import Estimate, WholeBatch


class Penalty(abc.ABC):
    """What keeps a mode away from earlier ones."""

    @abc.abstractmethod
    def __call__(self, quotient: jax.Array, cosine: jax.Array) -> jax.Array:
        """The penalties ``(L, L)``; for ``l < m`` entry ``(l, m)`` is part of mode ``m``'s loss.

        Args:
          quotient: ``R_lm = <f_l, T f_m> / (‖f_l‖ ‖f_m‖)``, ``(L, L)``, in units of the
            eigenvalues.
          cosine: ``<f_l, f_m> / (‖f_l‖ ‖f_m‖)``, ``(L, L)``.
        """


@dataclasses.dataclass(frozen=True)
class AlphaPenalty(Penalty):
    """The utility of α-EigenGame and of NeuralEF, ``R_lm² / R_ll``.

    Cost: ``3 L²`` flops.

    Source: Gemp et al., "EigenGame: PCA as a Nash equilibrium", ICLR 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> quotient = jnp.array([[4.0, 2.0], [2.0, 1.0]])
      >>> print(spectral.AlphaPenalty()(quotient, jnp.eye(2))[0, 1])
      1.0
    """

    def __call__(self, quotient, cosine):
        return safe_divide(quotient**2, jax.lax.stop_gradient(jnp.diagonal(quotient))[:, None])


@dataclasses.dataclass(frozen=True)
class MuPenalty(Penalty):
    """The penalty whose gradient is the direction of μ-EigenGame, ``2 [R_lm] <f_l, f_m>``.

    The gradient is stopped at the brackets, so ``cosine`` alone is differentiated.

    Cost: ``2 L²`` flops.

    Source: Gemp et al., "EigenGame Unloaded: when playing games is better than optimizing", 2022.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> quotient, cosine = jnp.array([[4.0, 2.0], [2.0, 1.0]]), jnp.full((2, 2), 0.5)
      >>> print(spectral.MuPenalty()(quotient, cosine)[0, 1])
      2.0
    """

    def __call__(self, quotient, cosine):
        return 2 * jax.lax.stop_gradient(quotient) * cosine


@dataclasses.dataclass(frozen=True)
class SquaredPenalty(Penalty):
    """The penalty of Neural Eigenmaps, ``weight * R_lm²``.

    Args:
      weight: factor of the penalty, in units of one over the eigenvalues, 1 by default.

    Raises:
      ValueError: for a weight that is not positive.

    Cost: ``2 L²`` flops.

    Source: Deng et al., "Neural eigenfunctions are structured representation learners", 2022.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> quotient = jnp.array([[4.0, 2.0], [2.0, 1.0]])
      >>> print(spectral.SquaredPenalty(0.5)(quotient, jnp.eye(2))[0, 1])
      2.0
    """

    weight: float = 1.0

    def __post_init__(self):
        check_least("SquaredPenalty", "weight", self.weight, strict=True)

    def __call__(self, quotient, cosine):
        return self.weight * quotient**2


@dataclasses.dataclass(frozen=True)
class NeuralEF(MomentLoss):
    r"""One Rayleigh quotient for each mode, with outputs divided by their norm over the batch.

    .. math:: \mathcal{L} = -\sum_m \Big(R_{mm} - \sum_{l<m} pen([f_l], f_m)\Big), \qquad
              R_{lm} = \langle f_l, T f_m\rangle / (‖f_l‖ ‖f_m‖)

    with the gradient stopped at earlier modes. With `AlphaPenalty` it is NeuralEF, and α-EigenGame
    where the parametrisation is linear; with `MuPenalty` it is μ-EigenGame, with `SquaredPenalty`
    Neural Eigenmaps.

    Limits: modes are ordered and become orthogonal, and their norms are free. `AlphaPenalty` and
    `SquaredPenalty` need a ``T`` that is positive definite on the modes sought, and
    `SquaredPenalty` a weight above ``1/lam_L``. The norms make it biased on small batches.

    Args:
      penalty: what keeps a mode away from earlier ones, a `Penalty`, by default `AlphaPenalty`.
      moments: how moments are estimated, an `Estimate`; by default `WholeBatch`, as in the source.

    Cost: ``4 B L²`` flops.

    Source: Deng, Shi and Zhu, "NeuralEF: deconstructing kernels by deep neural networks", ICML
    2022.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0, 2.0], [1.0, -2.0]])  # orthogonal modes, of any norm
      >>> pairs = ((f, f * jnp.array([4.0, 1.0])),)
      >>> (g,), _ = jax.jit(spectral.NeuralEF().cotangents)(pairs, ())
      >>> bool(jnp.abs(g).max() < 1e-5)
      True
    """

    penalty: Penalty = AlphaPenalty()
    moments: Estimate = WholeBatch()
    ordered: ClassVar[bool] = True

    def loss(self, grams, cross):
        square = jnp.diagonal(grams[0])
        size = safe_divide(1.0, jnp.sqrt(square))
        scale = jax.lax.stop_gradient(size)[:, None] * size[None]
        own = safe_divide(jnp.diagonal(cross), square)
        quotient = jnp.where(jnp.eye(len(cross), dtype=bool), own[None], cross * scale)
        return jnp.sum(jnp.triu(self.penalty(quotient, grams[0] * scale), 1)) - jnp.sum(own)
