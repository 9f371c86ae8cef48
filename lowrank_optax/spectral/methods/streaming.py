"""Rules of streaming PCA and of power iteration, on operators."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_optax._core.linalg import symmetrize
from lowrank_optax.spectral.methods._moments import MomentMethod, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, WholeBatch
from lowrank_optax.spectral.nesting import Nesting, Unnested


@dataclasses.dataclass(frozen=True)
class Oja(MomentMethod):
    r"""Oja's subspace rule, and with `SequentialNesting` Sanger's, which orders the modes.

    .. math:: G = \tfrac{1}{B} (f\, (M \circ A) - T f)

    `online.trackers.oja` is the same rule for a stream of vectors.

    Limits: it is stable where ``A`` is positive, and modes end orthonormal. It is meant for linear
    parametrisations, where ``-G`` is the rule itself; it is not the gradient of a function.

    Args:
      nesting: how modes are ordered: `Unnested`, the default, for Oja's rule, `SequentialNesting`
        for Sanger's.
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Cost: ``4 B L²`` flops.

    Source: Oja, J. Math. Biol. 15 (1982); Sanger, Neural Networks 2 (1989).

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # orthonormal modes are a fixed point
      >>> (g,), _ = spectral.Oja().cotangents(((f, f * jnp.array([4.0, 1.0])),), ())
      >>> print(jnp.abs(g).max())
      0.0
    """

    nesting: Nesting = Unnested()
    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        v, mask = self.nesting.masks(len(seen[0].gram))
        return ((-jnp.diag(v), mask * symmetrize(seen[0].cross)),)


@dataclasses.dataclass(frozen=True)
class Krasulina(MomentMethod):
    r"""Krasulina's rule in its matrix form for several modes: the part of ``T f`` outside the span.

    .. math:: G = \tfrac{1}{B} (f\, M^{-1} A - T f)

    `online.trackers.krasulina` is the same rule for a stream of vectors.

    Limits: it finds a span, and Rayleigh-Ritz reads off the modes. Norms are free and only grow.

    Args:
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Cost: ``4 B L²`` flops and one Cholesky factorisation of ``L x L``.

    Source: Krasulina, 1969; Tang, "Exponentially convergent stochastic k-PCA without variance
    reduction", NeurIPS 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f, tf = jnp.array([[1.0], [1.0]]), jnp.array([[3.0], [1.0]])
      >>> (g,), _ = spectral.Krasulina().cotangents(((f, tf),), ())
      >>> print((-2 * g)[:, 0].round(3))  # T f = 2 f + (1, -1)
      [ 1. -1.]
    """

    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        whiten = whitening(seen[0].gram)
        return ((-jnp.eye(len(whiten)), whiten @ (whiten.T @ symmetrize(seen[0].cross))),)


@dataclasses.dataclass(frozen=True)
class NoisyPower(MomentMethod):
    r"""The power method on noisy images: a step of size one goes to orthonormal ``T f``.

    .. math:: G = \tfrac{1}{B} (f - T f\, R^{-1}), \qquad R^T R = (T f)^T T f / B

    with ``R`` upper triangular, as in a QR factorisation, so that modes are ordered by ``|lam|``.
    With a network it is a regression on the image. `online.trackers.NoisyPower` is the same method
    for a stream of vectors.

    Limits: it converges by the ratio of successive ``|lam|``, whatever the step.

    Args:
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Cost: ``4 B L²`` flops and one Cholesky factorisation of ``L x L``.

    Source: Hardt and Price, "The noisy power method: a meta algorithm with applications", NeurIPS
    2014.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f, tf = jnp.ones((2, 1)), jnp.array([[3.0], [-3.0]])
      >>> (g,), _ = spectral.NoisyPower().cotangents(((f, tf),), ())
      >>> print((f - 2 * g)[:, 0].round(3))  # T f, of norm one
      [ 1. -1.]
    """

    moments: Estimate = WholeBatch()
    by_size: ClassVar[bool] = True

    def coefficients(self, seen, memory):
        return ((-whitening(seen[0].image), jnp.eye(len(seen[0].gram))),)
