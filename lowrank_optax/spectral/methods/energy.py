"""Variational Monte Carlo, of one state and of several."""

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
    r"""Variational Monte Carlo: the energies of the modes' span, and with a floor relative ones.

    .. math:: \mathcal{L} = -\sum_l \lambda_l = -tr(M^{-1} A), \qquad
              G = -\tfrac{2}{B} (T f - f M^{-1} A) \sum_l g_l w_l w_l^T

    with ``(lam_l, w_l)`` the Ritz pairs of the batch, ``A w = lam M w`` and ``w^T M w = 1``. ``A``
    in ``G`` is ``f^T T f / B`` as it is, not symmetrised, so that what is left of ``T f`` is the
    residual of a least-squares fit: on exact modes it vanishes on every batch, noise and all.
    Without a floor ``g = 1``, the gradient of the loss printed, and with one mode it is the
    Rayleigh quotient of the ground state. With a floor

    .. math:: g_l = 1 / \sqrt{\lambda_l^2 + (floor\, \lambda_1)^2}

    so that every Ritz mode is learned at the same relative rate however small its eigenvalue: the
    loss is then ``-sum_l arsinh(lam_l / (floor lam_1))`` with ``lam_1`` held fixed. It increases
    with each Ritz value, so its optimum is the same span.

    Limits: a span, read off by Rayleigh-Ritz; norms are free; biased on small batches, through the
    inverse. With a small floor modes of large eigenvalue count less.

    Args:
      floor: below which part of the largest eigenvalue modes count no more than others, or ``None``
        to weigh all alike.

    Raises:
      ValueError: for a floor that is not positive.

    Cost: ``4 B L²`` flops and one ``eigh`` of ``L x L``.

    Source: McMillan, Phys. Rev. 138 (1965); for several states the expectation of `ExcitedStates`.
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

    Limits: the weights ``det²`` vary the more, the more states: a few. A span, read off by
    Rayleigh-Ritz; norms are free. A batch must hold at least two sets; the rest is left out.

    Source: Pfau et al., "Accurate computation of quantum excited states with neural networks",
    Science 2024.
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
        # Sets whose determinant is rounding, such as those with a point twice, weigh nothing.
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
