"""Low-rank approximations of the operator."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_optax._core.linalg import symmetrize
from lowrank_optax.spectral.methods._moments import MomentMethod, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, Halves, WholeBatch
from lowrank_optax.spectral.nesting import Nesting, SequentialNesting


@dataclasses.dataclass(frozen=True)
class NestedLoRA(MomentMethod):
    r"""NeuralSVD: the best low-rank approximation of the operator, nested to order its modes.

    .. math:: \mathcal{L} = -2 \sum_l v_l \langle g_l, T f_l\rangle
              + \sum_{lm} M_{lm} \langle f_l, f_m\rangle \langle g_l, g_m\rangle

    and the same with ``g = f`` for a self-adjoint ``T``. Nothing forces the modes to be orthogonal,
    but at the minimum they are: ``f_l -> sqrt(lam_l) phi_l``.

    Limits: it finds eigenvalues above zero only, so give ``T`` a shift. A mode is learned at a rate
    proportional to its eigenvalue. Within an eigenspace any basis is as good as another.

    Args:
      nesting: how modes are ordered, by default `SequentialNesting`; `JointNesting`, or `Unnested`
        for the span alone.
      moments: how moments are estimated, by default `Halves`; `UStatistic`, also unbiased, or
        `WholeBatch`.

    Cost: ``4 B L²`` flops, and ``B L²`` numbers with `UStatistic`.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> phi, lam = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.array([4.0, 1.0])
      >>> f = phi * jnp.sqrt(lam)
      >>> method = spectral.NestedLoRA(moments=spectral.WholeBatch())
      >>> (g,), _ = method.cotangents(((f, f * lam),), ())
      >>> print(jnp.abs(g).max())  # sqrt(lam) phi is the minimum
      0.0
    """

    nesting: Nesting = SequentialNesting()
    moments: Estimate = Halves()
    two_sided: ClassVar[bool] = True
    positive: ClassVar[bool] = True

    def coefficients(self, seen, memory):
        modes = len(seen[0].gram)
        v, mask = self.nesting.masks(modes)
        factor = 4 if len(seen) == 1 else 2
        return tuple(
            (-factor * jnp.diag(v), factor * mask * other.gram) for other in reversed(seen)
        )


@dataclasses.dataclass(frozen=True)
class LowRankProduct(MomentMethod):
    r"""Gauss-Newton steps on the symmetric low-rank product ``‖T - f f^T‖²``.

    .. math:: G = \tfrac{1}{B} \left(\tfrac12 f\,(M^{-1} A M^{-1} + I) - T f\, M^{-1}\right)

    A step of size one is Gauss-Newton's. Modes of small eigenvalue are learned as fast as others.

    Limits: it finds a span, ``f -> phi sqrt(lam) U`` with any rotation ``U``, and eigenvalues above
    zero only.

    Args:
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Cost: ``4 B L²`` flops and one Cholesky factorisation of ``L x L``.

    Source: Liu, Wen and Zhang, "An efficient Gauss-Newton algorithm for symmetric low-rank product
    matrix approximations", SIAM J. Optim. 2015.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0], [-1.0]])  # a mode of norm one and eigenvalue 4
      >>> (g,), _ = jax.jit(spectral.LowRankProduct().cotangents)(((f, 4 * f),), ())
      >>> print((f - 2 * g)[:, 0].round(3))  # Heron's first step from 1 to sqrt(4)
      [ 2.5 -2.5]
    """

    moments: Estimate = WholeBatch()
    positive: ClassVar[bool] = True

    def coefficients(self, seen, memory):
        whiten = whitening(seen[0].gram)
        inverse = whiten @ whiten.T
        eye = jnp.eye(len(inverse))
        return ((-inverse, (inverse @ symmetrize(seen[0].cross) @ inverse + eye) / 2),)
