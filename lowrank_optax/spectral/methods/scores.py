"""Scores of a span, for operators of any sign and with two sides."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_optax._core.checks import check_least
from lowrank_optax._core.linalg import safe_divide
from lowrank_optax.spectral.methods._moments import MomentLoss, logdet, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, WholeBatch


@dataclasses.dataclass(frozen=True)
class VAMP2(MomentLoss):
    r"""The squared singular values of the whitened cross-covariance, as in VAMPnets.

    .. math:: \mathcal{L} = -tr(C_{00}^{-1} C_{01} C_{11}^{-1} C_{10})

    with ``C_01 = <f, T g>``, and ``g = f`` for a self-adjoint operator.

    Limits: it finds the span of the modes of largest ``|lam|``, with no order or norm;
    Rayleigh-Ritz reads them off. The inverses make it biased on small batches.

    Args:
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Cost: ``4 B L²`` flops and two Cholesky factorisations of ``L x L``.

    Source: Mardt et al., "VAMPnets for deep learning of molecular kinetics", 2018; Wu and Noé,
    "Variational approach for learning Markov processes from time series data", 2020.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> cross = jnp.diag(jnp.array([0.5, 0.25]))
      >>> eye, loss = jnp.eye(2), spectral.VAMP2().loss
      >>> scores = loss((eye, eye), cross), loss((4 * eye, eye), 2 * cross)  # in any unit of f
      >>> print(*(round(float(score), 4) for score in scores))
      -0.3125 -0.3125
    """

    moments: Estimate = WholeBatch()
    two_sided: ClassVar[bool] = True
    by_size: ClassVar[bool] = True

    def loss(self, grams, cross):
        left, right = whitening(grams[0]), whitening(grams[-1])
        return -jnp.sum((left.T @ cross @ right) ** 2)


@dataclasses.dataclass(frozen=True)
class DPNet(MomentLoss):
    r"""A score of the span without inverses, and a penalty that holds the covariances at one.

    .. math:: \mathcal{L} = -\frac{‖C_{01}‖_F^2}{‖C_{00}‖ ‖C_{11}‖}
              + penalty \sum_C tr(C^2 - C - \ln C)

    with operator norms in the denominator.

    Limits: it finds a span, as `VAMP2` does. ``tr(C² - C - ln C)`` is 0 at the identity alone, so
    the covariances end near it.

    Args:
      penalty: factor of the penalty, in units of the squared eigenvalues, 1 by default.
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Raises:
      ValueError: for a penalty that is not positive.

    Cost: ``4 B L²`` flops, and an ``eigh`` and a Cholesky factorisation of ``L x L`` for each side.

    Source: Kostic et al., "Learning invariant representations of time-homogeneous stochastic
    dynamical systems", ICLR 2024.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> cross = jnp.diag(jnp.array([0.5, 0.25]))
      >>> loss = jax.jit(spectral.DPNet().loss)((jnp.eye(2), jnp.eye(2)), cross)
      >>> print(round(float(loss), 4))  # identities have no penalty
      -0.3125
    """

    penalty: float = 1.0
    moments: Estimate = WholeBatch()
    two_sided: ClassVar[bool] = True
    by_size: ClassVar[bool] = True

    def __post_init__(self):
        check_least("DPNet", "penalty", self.penalty, strict=True)

    def loss(self, grams, cross):
        top = [jnp.linalg.eigvalsh(m)[-1] for m in grams]
        held = sum(jnp.sum(m * m) - jnp.trace(m) - logdet(m) for m in grams)
        return self.penalty * held - safe_divide(jnp.sum(cross**2), top[0] * top[-1])
