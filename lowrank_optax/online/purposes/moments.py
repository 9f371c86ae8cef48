"""Purposes about the moments of the codes, ``H = E z z^T``."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.types import Columns
from lowrank_optax.online.purposes._purpose import Purpose, Terms, View


@dataclasses.dataclass(frozen=True)
class Whitening(Purpose):
    r"""Codes of equal variance: ``H = E z z^T`` is to be a multiple of the identity.

    .. math:: L = r\,\mathrm{tr} H^2 / (\mathrm{tr} H)^2 - 1, \qquad \text{or} \qquad
              L = ‖H - \alpha I‖_F^2, \quad \alpha = \mathrm{tr} H / r

    with ``∂A = 2 (∂L/∂H) z v^T``, ``∂L/∂H = 2 (H - αI)`` for the second form. Together with
    reconstruction the optimum lies exactly in the leading eigenspace. There the scales are ``A Q =
    diag(√p_i)``, ``p_i = (1 + λα)/(1 + λ λ_i)`` for a weight ``λ`` of the second form, which is a
    damped inverse. This purpose shapes the scales and cannot improve the span that PCA finds;
    ``operator.power(v, -0.5)`` gives the exact root. With orthonormal rows it could only discard
    the leading directions, so the learner refuses that combination.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.learner(4, (lro.online.Whitening(5.0),)).orthonormal    # rows of any length
      False

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      relative: whether the loss is the first form, which has no unit (the default), or the second,
        which has the fourth power of the vectors' unit.

    Raises:
      ValueError: for a negative weight.

    Cost: ``2 k r d`` flops.

    Source: elementary.
    """

    relative: bool = True
    free: ClassVar[bool] = True

    def terms(self, view: View, theta: Any) -> Terms:
        h = view.operator.h
        r, trace, square = h.shape[0], jnp.trace(h), jnp.sum(h**2)
        eye = jnp.eye(r, dtype=h.dtype)
        if self.relative:
            value = linalg.safe_divide(r * square, trace**2) - (trace > 0)
            d = linalg.safe_divide(2 * r * (h - linalg.safe_divide(square, trace) * eye), trace**2)
        else:
            value = square - trace**2 / r
            d = 2 * (h - trace / r * eye)
        return Terms(value, *_factors(view, d))


@dataclasses.dataclass(frozen=True)
class Entropy(Purpose):
    r"""Von Neumann entropy of the codes' moments, against collapse.

    .. math:: L = \ln r + \mathrm{tr} \rho \ln \rho, \quad \rho = H / \mathrm{tr} H, \qquad
              \partial L / \partial H = (\ln\rho - (\mathrm{tr} \rho \ln\rho) I) / \mathrm{tr} H

    The loss is 0 for codes of equal variance, and ``ln r`` if one direction has all of it.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.learner(4, (lro.online.Entropy(0.1),)).orthonormal
      True

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.

    Raises:
      ValueError: for a negative weight.

    Cost: ``2 k r d + O(r³)`` flops.

    Source: Kim et al., "VNE: an effective method for improving deep representation by manipulating
    eigenvalue distribution", CVPR 2023.
    """

    def terms(self, view: View, theta: Any) -> Terms:
        h = view.operator.h
        r, trace = h.shape[0], jnp.trace(h)
        lam, v = linalg.eigh(linalg.symmetrize(linalg.safe_divide(h, trace)))
        # The logarithm is bounded by what the dtype resolves, so that the gradient along a dead
        # direction stays finite.
        log = jnp.log(jnp.maximum(lam, jnp.finfo(h.dtype).eps))
        negative = jnp.sum(jnp.maximum(lam, 0) * log)
        d = linalg.safe_divide((v.T * (log - negative)) @ v, trace)
        return Terms(jnp.where(trace > 0, jnp.log(float(r)) + negative, 0), *_factors(view, d))


def _factors(view: View, d: jax.Array) -> tuple[jax.Array, Columns, jax.Array]:
    """Factors of a loss of ``H`` from ``D = ∂L/∂H``: ``2 D z v^T``."""
    return 2 * view.stream.weights[:, None] * (view.codes @ d), view.stream.columns, view.codes
