"""The trace under an orthonormality that is penalised, priced or made by a factor."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check_decay, check_least
from lowrank_optax._core.linalg import symmetrize
from lowrank_optax.spectral.methods._moments import MomentMethod, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, Halves
from lowrank_optax.spectral.nesting import Nesting, SequentialNesting, Unnested


@dataclasses.dataclass(frozen=True)
class OrbitalMinimization(MomentMethod):
    r"""Orbital minimisation: an energy whose minimum is orthonormal without a constraint.

    .. math:: \mathcal{L} = -2\, tr(v A) + tr(M \circ (f^T f)\, A)

    and, with `SequentialNesting`, its triangular form, which orders the modes.

    Limits: needs ``T`` positive semidefinite (give it a shift), or the energy has no minimum. All
    modes are learned at their eigenvalue's rate and end at norm one.

    Args:
      nesting: as for `NestedLoRA`.
      moments: as for `NestedLoRA`.

    Cost: ``8 B L²`` flops.

    Source: Mauri, Galli and Car, Phys. Rev. B 47 (1993); "Revisiting orbital minimization for
    neural operator decomposition", arXiv 2510.21952.
    """

    nesting: Nesting = SequentialNesting()
    moments: Estimate = Halves()

    def coefficients(self, seen, memory):
        (m,) = seen
        v, mask = self.nesting.masks(len(m.gram))
        return ((2 * mask * m.gram - 4 * jnp.diag(v), 2 * mask * symmetrize(m.cross)),)


@dataclasses.dataclass(frozen=True)
class TracePenalty(MomentMethod):
    r"""The trace, with deviations from orthonormality penalised.

    .. math:: \mathcal{L} = -tr(v A) + \tfrac{penalty}{2} \sum_{lm} M_{lm}
              (\langle f_l, f_m\rangle - \delta_{lm})^2

    `Unnested` it is the trace-penalty method, and on a `GraphLaplacian` the spectral graph drawing
    of Wu et al.; with `JointNesting` it is the generalised graph drawing objective.

    Limits: norms end at ``‖f_l‖² = 1 + lam_l / penalty``, so the penalty must exceed ``-lam_L``;
    unnested the modes are an arbitrary basis of the span.

    Args:
      penalty: in units of the eigenvalues.
      nesting: as for `NestedLoRA`.
      moments: as for `NestedLoRA`.

    Raises:
      ValueError: for a penalty that is not positive.

    Source: Wen et al., "Trace-penalty minimization for large-scale eigenspace computation", 2016;
    Wu, Tucker and Nachum, "The Laplacian in RL", ICLR 2019; Wang et al., "Towards better Laplacian
    representation in reinforcement learning with generalized graph drawing", ICML 2021.
    """

    penalty: float = 1.0
    nesting: Nesting = Unnested()
    moments: Estimate = Halves()

    def __post_init__(self):
        check_least("TracePenalty", "penalty", self.penalty, strict=True)

    def coefficients(self, seen, memory):
        (m,) = seen
        v, mask = self.nesting.masks(len(m.gram))
        return ((-2 * jnp.diag(v), 2 * self.penalty * mask * (m.gram - jnp.eye(len(m.gram)))),)


class Duals(NamedTuple):
    """What ALLO remembers: ``(L, L)`` multipliers, upper triangular, and the barrier."""

    multipliers: jax.Array
    barrier: jax.Array


@dataclasses.dataclass(frozen=True)
class ALLO(MomentMethod):
    r"""Augmented Lagrangian: ordered modes of norm one, with multipliers that are eigenvalues.

    .. math:: \min_f \max_\beta\; -tr A + \sum_{l \le m} \beta_{lm} (\langle [f_l], f_m\rangle
              - \delta_{lm}) + b\, (\langle [f_l], f_m\rangle - \delta_{lm})^2

    with the gradient stopped at ``[f_l]``. Every batch moves the multipliers by ``rate * b`` times
    the violation and raises ``b`` by ``growth`` times its mean square. At the solution
    ``beta_ll = lam_l``.

    Limits: a saddle point, so the multipliers must move slower than the functions; the barrier has
    to exceed the eigenvalues' range to be stable.

    Args:
      barrier: ``b`` at the start, in units of the eigenvalues.
      rate: step of the multipliers.
      growth: of the barrier.

    Raises:
      ValueError: for numbers that are not positive (``growth``: negative).

    Cost: ``L²`` numbers of memory.

    Source: Gomez, Bowling and Machado, "Proper Laplacian Representation Learning", ICLR 2024.
    """

    barrier: float = 2.0
    rate: float = 1e-2
    growth: float = 0.0
    moments: Estimate = Halves()

    def __post_init__(self):
        check_least("ALLO", "barrier", self.barrier, strict=True)
        check_least("ALLO", "rate", self.rate, strict=True)
        check_least("ALLO", "growth", self.growth)

    def init(self, modes: int) -> Duals:
        return Duals(jnp.zeros((modes, modes)), jnp.asarray(float(self.barrier)))

    def remember(self, seen, memory):
        error = jnp.triu(seen[0].gram - jnp.eye(len(seen[0].gram)))
        return Duals(
            memory.multipliers + self.rate * memory.barrier * error,
            memory.barrier + self.growth * jnp.mean(error**2),
        )

    def coefficients(self, seen, memory):
        eye = jnp.eye(len(seen[0].gram))
        error = jnp.triu(seen[0].gram - eye)
        return ((-2 * eye, (1 + eye) * (memory.multipliers + 2 * memory.barrier * error)),)


@dataclasses.dataclass(frozen=True)
class SpIN(MomentMethod):
    r"""Spectral inference networks: the trace in an orthonormal basis, with a masked gradient.

    .. math:: \Lambda = L^{-1} A L^{-T}, \; L L^T = \bar M, \qquad
              G = -\tfrac{2}{B} (T f\, L^{-T} D^{-1}
              - f\, L^{-T} triu(\Lambda D^{-1})),\; D = diag L

    with ``M̄`` an exponential average. The mask makes mode ``m`` blind to later ones.

    Limits: the modes are ``f L^{-T}``, the first ``m`` outputs span the first ``m`` modes, and
    Rayleigh-Ritz reads them off. Norms are free. Biased where the average lags behind. The original
    averages the Jacobian of ``M`` too, a matrix for every parameter; a cotangent of functions has
    no such average, so here the second term uses the batch's own.

    Args:
      decay: of the average of the covariance.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``L²`` numbers of memory, ``L³`` flops.

    Source: Pfau et al., "Spectral Inference Networks", ICLR 2019.
    """

    decay: float = 0.9

    def __post_init__(self):
        check_decay("SpIN", "decay", self.decay)

    def init(self, modes: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((modes, modes)), jnp.zeros(())

    def remember(self, seen, memory):
        mix = lambda old, new: self.decay * old + (1 - self.decay) * new
        return mix(memory[0], seen[0].gram), mix(memory[1], 1.0)

    def coefficients(self, seen, memory):
        whiten = whitening(memory[0] / memory[1])  # L^{-T}
        size = jnp.diagonal(whiten)  # 1 / D
        between = whiten.T @ symmetrize(seen[0].cross) @ whiten
        return ((-2 * whiten * size[None], 2 * whiten @ jnp.triu(between * size[None])),)


@dataclasses.dataclass(frozen=True)
class SpectralNet(MomentMethod):
    r"""The trace in a basis orthonormalised on other samples, whose own gradient is left out.

    .. math:: \mathcal{L} = -tr(L^{-1} A L^{-T}), \quad [L] [L]^T = M' \text{ of the other half}

    Limits: a span, read off by Rayleigh-Ritz. Nothing holds the norms: squared, they change at four
    times the eigenvalue, so that the eigenvalues sought have to be small beside the gap after them,
    as those of minus the Laplacian of a graph with clusters are; elsewhere it slows down or
    collapses before it has converged.

    Source: Shaham et al., "SpectralNet: spectral clustering using deep neural networks", ICLR 2018.
    """

    moments: Estimate = Halves()

    def coefficients(self, seen, memory):
        whiten = whitening(seen[0].gram)
        return ((-2 * whiten @ whiten.T, jnp.zeros_like(whiten)),)
