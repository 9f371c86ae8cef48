"""The trace, with orthonormality by a penalty, by multipliers or by a factor."""

import dataclasses
from typing import ClassVar, NamedTuple

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

    Limits: ``T`` must be positive semidefinite (give it a shift), or the energy has no minimum.
    Every mode is learned at a rate proportional to its eigenvalue and ends at norm one.

    Args:
      nesting: how modes are ordered, as for `NestedLoRA`, by default `SequentialNesting`.
      moments: how moments are estimated, as for `NestedLoRA`, by default `Halves`.

    Cost: ``8 B L²`` flops.

    Source: Mauri, Galli and Car, Phys. Rev. B 47 (1993); "Revisiting orbital minimization for
    neural operator decomposition", arXiv 2510.21952.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # orthonormal modes are the minimum
      >>> method = spectral.OrbitalMinimization(moments=spectral.WholeBatch())
      >>> (g,), _ = method.cotangents(((f, f * jnp.array([4.0, 1.0])),), ())
      >>> print(jnp.abs(g).max())
      0.0
    """

    nesting: Nesting = SequentialNesting()
    moments: Estimate = Halves()
    positive: ClassVar[bool] = True

    def coefficients(self, seen, memory):
        (m,) = seen
        v, mask = self.nesting.masks(len(m.gram))
        return ((2 * mask * m.gram - 4 * jnp.diag(v), 2 * mask * symmetrize(m.cross)),)


@dataclasses.dataclass(frozen=True)
class TracePenalty(MomentMethod):
    r"""The trace, with deviations from orthonormality penalised.

    .. math:: \mathcal{L} = -tr(v A) + \tfrac{penalty}{2} \sum_{lm} M_{lm}
              (\langle f_l, f_m\rangle - \delta_{lm})^2

    With `Unnested` it is the trace-penalty method, and on a `GraphLaplacian` the spectral graph
    drawing of Wu et al.; with `JointNesting` it is the generalised graph drawing objective.

    Limits: norms end at ``‖f_l‖² = 1 + lam_l / penalty``, so the penalty must exceed ``-lam_L``.
    Without nesting the modes are an arbitrary basis of the span.

    Args:
      penalty: factor of the penalty, in units of the eigenvalues, 1 by default.
      nesting: how modes are ordered, as for `NestedLoRA`, by default `Unnested`.
      moments: how moments are estimated, as for `NestedLoRA`, by default `Halves`.

    Raises:
      ValueError: for a penalty that is not positive.

    Cost: ``4 B L²`` flops.

    Source: Wen et al., "Trace-penalty minimization for large-scale eigenspace computation", 2016;
    Wu, Tucker and Nachum, "The Laplacian in RL", ICLR 2019; Wang et al., "Towards better Laplacian
    representation in reinforcement learning with generalized graph drawing", ICML 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[2.0, 1.0], [2.0, -1.0]])  # ‖f‖² = 1 + lam
      >>> method = spectral.TracePenalty(penalty=1.0, moments=spectral.WholeBatch())
      >>> (g,), _ = method.cotangents(((f, f * jnp.array([3.0, 0.0])),), ())
      >>> print(jnp.abs(g).max())
      0.0
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
    """What `ALLO` remembers.

    Attributes:
      multipliers: ``beta``, ``(L, L)`` and upper triangular, in units of the eigenvalues.
      barrier: ``b``, a scalar in the same units.
    """

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

    Limits: the solution is a saddle point, so the multipliers must move slower than the functions.
    It is stable where the barrier exceeds the eigenvalues' range.

    Args:
      barrier: ``b`` before the first batch, in units of the eigenvalues, 2 by default.
      rate: step of the multipliers for each batch, without unit, 0.01 by default.
      growth: step of the barrier for each batch, in units of the eigenvalues, 0 by default.
      moments: how moments are estimated, an `Estimate`, by default `Halves`.

    Raises:
      ValueError: for a barrier or a rate that is not positive, or a growth that is negative.

    Cost: ``L²`` numbers of memory, and ``4 B L²`` flops.

    Source: Gomez, Bowling and Machado, "Proper Laplacian Representation Learning", ICLR 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> method = spectral.ALLO(barrier=2.0, rate=0.01)
      >>> f = 2 * jnp.ones((4, 1))  # <f, f> - 1 = 3
      >>> _, memory = method.cotangents(((f, f),), method.init(1))
      >>> print(memory.multipliers)  # rate * barrier * 3
      [[0.06]]
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

    Limits: the modes are ``f L^{-T}``: the first ``m`` outputs span the first ``m`` modes, and
    Rayleigh-Ritz reads them off. Norms are free. It is biased where the average lags behind. The
    source also averages the Jacobian of ``M``, a matrix for every parameter. Cotangents of
    functions have no such average, so the second term uses the batch's own.

    Args:
      decay: decay of the average of the Gram matrix for each batch, in [0, 1), 0.9 by default.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``L²`` numbers of memory, ``4 B L² + L³`` flops.

    Source: Pfau et al., "Spectral Inference Networks", ICLR 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[2.0, 1.0], [2.0, -1.0]])  # exact modes, of any norm
      >>> method = spectral.SpIN()
      >>> (g,), _ = method.cotangents(((f, f * jnp.array([4.0, 1.0])),), method.init(2))
      >>> bool(jnp.abs(g).max() < 1e-4)
      True
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
    r"""The trace in a basis orthonormalised on other samples, with no gradient through that basis.

    .. math:: \mathcal{L} = -tr(L^{-1} A L^{-T}), \quad [L] [L]^T = M' \text{ of the other half}

    Limits: it finds a span, and Rayleigh-Ritz reads off the modes. Nothing holds the norms: their
    squares change at four times the eigenvalue. The eigenvalues sought must therefore be small
    beside the gap after them, as those of minus the Laplacian of a graph with clusters are.
    Elsewhere the method slows down or collapses before it has converged.

    Args:
      moments: how moments are estimated, an `Estimate`, by default `Halves`.

    Cost: ``4 B L²`` flops and one Cholesky factorisation of ``L x L``.

    Source: Shaham et al., "SpectralNet: spectral clustering using deep neural networks", ICLR 2018.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = 2 * jnp.ones((4, 1))  # <f, f> = 4
      >>> (g,), _ = spectral.SpectralNet().cotangents(((f, -f),), ())
      >>> print((4 * g / -f)[:, 0].round(3))  # -2 T f / <f, f>
      [-0.5 -0.5 -0.5 -0.5]
    """

    moments: Estimate = Halves()

    def coefficients(self, seen, memory):
        whiten = whitening(seen[0].gram)
        return ((-2 * whiten @ whiten.T, jnp.zeros_like(whiten)),)
