"""Purposes about the moments of the codes, ``H = E z z^T``."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
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
class Profile(Purpose):
    r"""Codes of a given covariance: ``H = E z z^T`` is to match a target profile.

    .. math:: L = ‖H / \mathrm{tr} H - D / \mathrm{tr} D‖_F^2, \qquad \text{or} \qquad
              L = ‖H - D‖_F^2

    with ``∂A = 2 (∂L/∂H) z v^T``, ``∂L/∂H = 2 (H - D)`` for the second form. With a diagonal ``D``
    codes become uncorrelated, with variances in these proportions. `Whitening` is the profile of
    equal numbers.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.Profile(1.0, target=(4.0, 2.0, 1.0)).free       # rows of any length
      True

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      target: the profile: ``r`` variances, or an ``(r, r)`` covariance; at
        least 0, in squared units of the codes where ``relative`` is off.
      relative: whether the loss is the first form, which has no unit (the default), or the second.

    Raises:
      ValueError: for a negative weight, or a target that is no profile, or not of the rank's size.

    Cost: ``2 k r d`` flops.

    Source: elementary.
    """

    target: Any = ()
    relative: bool = True
    free: ClassVar[bool] = True

    def __post_init__(self):
        Purpose.__post_init__(self)
        d = np.asarray(self.target, float)
        square = d.ndim == 2 and d.shape[0] == d.shape[1] and np.allclose(d, d.T)
        sound = (d.ndim == 1 or square) and d.size > 0 and bool(np.all(np.isfinite(d)))
        check(
            sound and np.linalg.eigvalsh(np.diag(d) if d.ndim == 1 else d)[0] >= 0 and d.sum() > 0,
            f"Profile: target is {self.target!r}; pass r variances, or an (r, r) covariance.",
        )
        rows = d.tolist()
        frozen = tuple(rows) if d.ndim == 1 else tuple(map(tuple, rows))
        object.__setattr__(self, "target", frozen)  # an array has no hash

    def terms(self, view: View, theta: Any) -> Terms:
        h = view.operator.h
        d = jnp.asarray(self.target, h.dtype)
        d = jnp.diag(d) if d.ndim == 1 else d
        check(
            d.shape == h.shape,
            f"Profile: target has {d.shape[0]} variances; the learner's rank is {h.shape[0]}.",
        )
        if not self.relative:
            return Terms(jnp.sum((h - d) ** 2), *_factors(view, 2 * (h - d)))
        trace = jnp.trace(h)
        share = linalg.safe_divide(h, trace)
        rest = jnp.where(trace > 0, share - d / jnp.trace(d), 0)
        along = jnp.sum(rest * share) * jnp.eye(h.shape[0], dtype=h.dtype)
        slope = 2 * linalg.safe_divide(rest - along, trace)
        return Terms(jnp.sum(rest**2), *_factors(view, slope))


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
