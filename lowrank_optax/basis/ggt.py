"""GGT: the window of the last columns, factored through its Gram matrix."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Eigenbasis, SymmetricCorrection
from lowrank_optax.basis._basis import Spectrum
from lowrank_optax.basis._ring import Ring, RingState, spectral_factor


@dataclasses.dataclass(frozen=True)
class GGT(Ring, Spectrum):
    r"""Eigenbasis of the last ``rank`` columns, ``B = sum_j w_j y_j y_j^T``.

    With the columns as rows of ``W`` and ``K = W W^T = V diag(lam) V^T``:
    ``Q^T = diag(lam)^{-1/2} V^T W``. A new column changes one row and column of ``K``, which is
    the one product ``W y`` that the projection needs anyway; nothing large is ever factored.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(10), lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([3., 4., 0.]), state)
      >>> print(updates)                       # one gradient in the window: g / ‖g‖
      [0.6 0.8 0. ]

    Args:
      rank: the window's length ``m = r``.
      beta: ``None`` sums over the window, as the original does; a number weighs a column of age
        ``a`` with ``beta^a`` and divides by the sum of the weights, so that 1.0 is the mean.
      renew: a correction takes the place of the whole window, which then holds its columns and
        nothing older: for curvatures that measure all there is at once, as `GaussNewton` does on a
        batch. Corrections of more columns than ``rank`` are refused, since none may be missing.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped, as are their directions.
      damping: added to what is kept; with ``rdamping * max`` on top. ``abs`` and ``truncate`` as in
        `linalg.regularize`, and each again as ``update_...`` for the step alone.

    Raises:
      ValueError: for a rank below 1, or a ``beta`` or tolerance out of range; with ``renew`` for
        corrections of more columns than ``rank``.

    Cost: memory ``m d + 3 m²``; a step two passes over the rows (``4 m d`` flops), one ``eigh`` of
    size ``m`` and ``6 m³`` flops. Where ``d < m`` the window itself is decomposed instead.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """

    beta: float | None = dataclasses.field(default=None, kw_only=True)
    renew: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        Spectrum.__post_init__(self)
        Ring.__post_init__(self)
        if self.beta is not None:
            check_decay("GGT", "beta", self.beta, closed=True)

    @property
    def renews(self) -> bool:
        return self.renew

    def absorb(
        self,
        layout: Layout,
        state: RingState,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        k = correction.weights.shape[1]
        check(
            not self.renew or k <= self.rank,
            f"GGT(renew=True) holds a correction whole, but {k} columns came for a rank of "
            f"{self.rank}; pass a rank of at least {k}.",
        )
        return super().absorb(layout, state, correction, accept, key)

    def eigenbasis(self, state: RingState) -> Eigenbasis:
        return Eigenbasis(*jax.vmap(self.used)(state.lam))

    def factor(self, state: RingState, signed: bool) -> tuple[jax.Array, jax.Array]:
        weights = state.weights * self._ages(state)
        return spectral_factor(self, state.gram, weights, signed, state.rows)

    def _ages(self, state: RingState) -> jax.Array:
        """Every row's share of the average, or ones."""
        if self.beta is None:
            return jnp.ones_like(state.weights)
        age = (state.head - 1 - jnp.arange(self.rank)) % self.rank
        share = jnp.where(state.weights != 0, jnp.asarray(self.beta, state.lam.dtype) ** age, 0)
        return linalg.safe_divide(share, jnp.sum(share))
