"""Rules of streaming PCA and of power iteration, on operators."""

import dataclasses

import jax.numpy as jnp

from lowrank_optax._core.linalg import symmetrize
from lowrank_optax.spectral.methods._moments import MomentMethod, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, WholeBatch
from lowrank_optax.spectral.nesting import Nesting, Unnested


@dataclasses.dataclass(frozen=True)
class Oja(MomentMethod):
    r"""Oja's subspace rule, and with `SequentialNesting` Sanger's, which orders the modes.

    .. math:: G = \tfrac{1}{B} (f\, (M \circ A) - T f)

    Limits: stable where ``A`` is positive; modes end orthonormal. Meant for linear
    parametrisations, where ``-G`` is the rule itself; not the gradient of a function.

    Args:
      nesting: `Unnested` for Oja's, `SequentialNesting` for Sanger's.

    Source: Oja, J. Math. Biol. 15 (1982); Sanger, Neural Networks 2 (1989).
    """

    nesting: Nesting = Unnested()
    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        v, mask = self.nesting.masks(len(seen[0].gram))
        return ((-jnp.diag(v), mask * symmetrize(seen[0].cross)),)


@dataclasses.dataclass(frozen=True)
class Krasulina(MomentMethod):
    r"""The part of ``T f`` outside the span, with its matrix form for several modes.

    .. math:: G = \tfrac{1}{B} (f\, M^{-1} A - T f)

    Limits: a span, read off by Rayleigh-Ritz; norms are free and only grow.

    Source: Krasulina, 1969; Tang, "Exponentially convergent stochastic k-PCA without variance
    reduction", NeurIPS 2019.
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
    With a network it is a regression on the image.

    Limits: converges by the ratio of successive ``|lam|``, whatever the step.

    Source: Hardt and Price, "The noisy power method: a meta algorithm with applications", NeurIPS
    2014.
    """

    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        return ((-whitening(seen[0].image), jnp.eye(len(seen[0].gram))),)
