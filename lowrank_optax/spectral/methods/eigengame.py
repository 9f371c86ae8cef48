"""One Rayleigh quotient a mode, with penalties on what it shares with earlier ones."""

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
        """``(L, L)`` penalties; entry ``(l, m)`` is counted for ``l < m``, live in mode ``m``."""


@dataclasses.dataclass(frozen=True)
class AlphaPenalty(Penalty):
    """``R_lm² / R_ll``: the utility of α-EigenGame, and of NeuralEF.

    Source: Gemp et al., "EigenGame: PCA as a Nash equilibrium", ICLR 2021.
    """

    def __call__(self, quotient, cosine):
        return safe_divide(quotient**2, jax.lax.stop_gradient(jnp.diagonal(quotient))[:, None])


@dataclasses.dataclass(frozen=True)
class MuPenalty(Penalty):
    """``2 [R_lm] <f_l, f_m>``: the direction of μ-EigenGame.

    Source: Gemp et al., "EigenGame Unloaded: when playing games is better than optimizing", 2022.
    """

    def __call__(self, quotient, cosine):
        return 2 * jax.lax.stop_gradient(quotient) * cosine


@dataclasses.dataclass(frozen=True)
class SquaredPenalty(Penalty):
    """``weight * R_lm²``: Neural Eigenmaps.

    Args:
      weight: in units of one over the eigenvalues.

    Raises:
      ValueError: for a weight that is not positive.

    Source: Deng et al., "Neural eigenfunctions are structured representation learners", 2022.
    """

    weight: float = 1.0

    def __post_init__(self):
        check_least("SquaredPenalty", "weight", self.weight, strict=True)

    def __call__(self, quotient, cosine):
        return self.weight * quotient**2


@dataclasses.dataclass(frozen=True)
class NeuralEF(MomentLoss):
    r"""One Rayleigh quotient a mode, with outputs normalised by their L2 norm over the batch.

    .. math:: \mathcal{L} = -\sum_m \Big(R_{mm} - \sum_{l<m} pen([f_l], f_m)\Big), \qquad
              R_{lm} = \langle f_l, T f_m\rangle / (‖f_l‖ ‖f_m‖)

    with the gradient stopped at earlier modes. With `AlphaPenalty` it is NeuralEF, and on a linear
    parametrisation α-EigenGame; with `MuPenalty` μ-EigenGame; with `SquaredPenalty` Neural
    Eigenmaps.

    Limits: ordered, orthogonal in the limit, norms free. `AlphaPenalty` and `SquaredPenalty` need
    ``T`` positive definite on the modes sought, and the latter a weight above ``1/lam_L``. Biased
    on small batches, through the norms.

    Args:
      penalty: a `Penalty`.
      moments: how they are estimated; the source's is the whole batch.

    Source: Deng, Shi and Zhu, "NeuralEF: deconstructing kernels by deep neural networks", ICML
    2022.
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
