"""Variational Monte Carlo for one state and for several."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check, check_least
from lowrank_optax._core.linalg import safe_divide, symmetrize
from lowrank_optax.spectral.methods._method import Method, Pairs
from lowrank_optax.spectral.methods._moments import MomentMethod, whitening
from lowrank_optax.spectral.methods.estimates import Estimate, WholeBatch


@dataclasses.dataclass(frozen=True)
class VariationalEnergy(MomentMethod):
    r"""Variational Monte Carlo: the energies of the modes' span, in relative units with a floor.

    .. math:: \mathcal{L} = -\sum_l \lambda_l = -tr(M^{-1} A), \qquad
              G = -\tfrac{2}{B} (T f - f M^{-1} A) \sum_l g_l w_l w_l^T

    with ``(lam_l, w_l)`` the Ritz pairs of the batch, ``A w = lam M w`` and ``w^T M w = 1``. In
    ``G`` the matrix ``A = f^T T f / B`` is not symmetrised, so that ``T f - f M^{-1} A`` is the
    residual of a least-squares fit: on exact modes it vanishes on every batch, however noisy.
    Without a floor ``g = 1`` and ``G`` is the gradient of the loss above, with one mode that of the
    ground state's Rayleigh quotient. With a floor

    .. math:: g_l = 1 / \sqrt{\lambda_l^2 + (floor\, \lambda_1)^2}

    so that every Ritz mode is learned at the same relative rate, however small its eigenvalue. The
    loss is then ``-sum_l arsinh(lam_l / (floor lam_1))`` with ``lam_1`` held fixed. It falls as any
    Ritz value rises, so its minimum is the same span.

    Limits: it finds a span, and Rayleigh-Ritz reads off the modes. Norms are free. The inverse
    makes it biased on small batches. With a small floor, modes of large eigenvalue count less.

    Args:
      floor: the fraction of the largest eigenvalue below which modes are no longer weighed up,
        without unit; ``None``, the default, weighs all modes alike.
      moments: how moments are estimated, an `Estimate`, by default `WholeBatch`.

    Raises:
      ValueError: for a floor that is not positive.

    Cost: ``4 B L²`` flops and one ``eigh`` of ``L x L``.

    Source: McMillan, Phys. Rev. 138 (1965); for several states the expectation of `ExcitedStates`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> modes, mix = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> pairs = ((modes @ mix, modes * jnp.array([4.0, 1.0]) @ mix),)
      >>> (g,), _ = jax.jit(spectral.VariationalEnergy(floor=0.01).cotangents)(pairs, ())
      >>> bool(jnp.abs(g).max() < 1e-4)  # any basis of the span is a minimum
      True
    """

    floor: float | None = None
    moments: Estimate = WholeBatch()

    def __post_init__(self):
        if self.floor is not None:
            check_least("VariationalEnergy", "floor", self.floor, strict=True)

    def coefficients(self, seen, memory):
        (m,) = seen
        whiten = whitening(m.gram)
        values, turn = jnp.linalg.eigh(whiten.T @ symmetrize(m.cross) @ whiten)
        ritz = whiten @ turn
        weights = jnp.ones_like(values)
        if self.floor is not None:
            weights = safe_divide(1.0, jnp.hypot(values, self.floor * values[-1]))
        metric = 2 * ritz * weights[None] @ ritz.T
        return ((-metric, whiten @ (whiten.T @ m.cross) @ metric),)


@dataclasses.dataclass(frozen=True)
class ExcitedStates(Method):
    r"""Natural excited states: variational Monte Carlo for the determinant of several states.

    The batch is cut into sets of ``L`` points. A set has the total ansatz ``Psi = det F`` with
    ``F_jl = f_l(x_j)`` and the local energy ``e = tr(F^{-1} T F)``, and

    .. math:: G = -2 \sum_s w_s (e_s - \bar e)\, F_s^{-T}, \qquad w_s = \det(F_s)^2 / \sum \det^2

    whose expectation is the gradient of `VariationalEnergy`.

    Limits: the weights ``det²`` vary more with every further state, so it serves a few. It finds a
    span, and Rayleigh-Ritz reads off the modes. Norms are free. A batch must hold at least two
    sets; points beyond the last whole set are left out.

    Raises:
      ValueError: by ``cotangents``, for a batch below ``2 L`` points or an operator with two sides.

    Cost: ``4 B L²`` flops, in ``B / L`` determinants and inverses of ``L x L``.

    Source: Pfau et al., "Accurate computation of quantum excited states with neural networks",
    Science 2024.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0], [1.0, -3.0]])  # two sets
      >>> pairs = ((f, f * jnp.array([4.0, 1.0])),)  # exact modes: the same energy in every set
      >>> (g,), _ = jax.jit(spectral.ExcitedStates().cotangents)(pairs, ())
      >>> bool(jnp.abs(g).max() < 1e-5)
      True
    """

    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        check(len(pairs) == 1, "ExcitedStates is for self-adjoint operators; pass NestedLoRA().")
        ((f, tf),) = pairs
        size, modes = f.shape
        sets = size // modes
        check(
            sets >= 2,
            f"ExcitedStates: a batch of {size} came for {modes} modes; pass at least {2 * modes}.",
        )
        cut = lambda a: a[: sets * modes].reshape(sets, modes, modes)
        f, tf = cut(f), cut(tf)
        log = jnp.linalg.slogdet(f)[1]
        # A determinant that is rounding, as with the same point twice, gets no weight.
        bound = jnp.sum(jnp.log(jnp.linalg.norm(f, axis=2)), axis=1)
        live = log > bound + jnp.log(100 * jnp.finfo(f.dtype).eps)
        weight = jax.nn.softmax(jnp.where(live, 2 * log, -jnp.inf))
        f = jnp.where(live[:, None, None], f, jnp.eye(modes))
        inverse = jnp.linalg.inv(f)
        energy = jnp.einsum("sij,sji->s", inverse, tf)
        excess = weight * (energy - weight @ energy)
        direction = -2 * excess[:, None, None] * jnp.swapaxes(inverse, 1, 2)
        rows = direction.reshape(sets * modes, modes)
        return (jnp.pad(rows, ((0, size - sets * modes), (0, 0))),), memory
