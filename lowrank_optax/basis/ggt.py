"""GGT: the window of the last columns, factored through its Gram matrix."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, SymmetricCorrection
from lowrank_optax.basis._basis import Regularized
from lowrank_optax.basis._ring import Ring, RingState, spectral_factor


@dataclasses.dataclass(frozen=True)
class GGT(Ring, Regularized):
    r"""Eigenbasis of the last ``rank`` columns, ``B = sum_j w_j y_j y_j^T``.

    With the columns as rows of ``W`` and ``K = W W^T = V diag(lam) V^T``:
    ``Q^T = diag(lam)^{-1/2} V^T W``. A new column changes one row and one column of ``K``. These
    are the product ``W y``, which the projection needs anyway, so that nothing large is ever
    factored.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(10), lro.inner.LInvSqrt())
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([3., 4., 0.]), state)
      >>> print(updates)                       # one gradient in the window: g / ‖g‖
      [0.6 0.8 0. ]

    Args:
      rank: length ``m = r`` of the window in columns, at least 1.
      beta: decay per column, in [0, 1]: a column of age ``a`` gets the weight ``beta^a``, divided
        by the sum of the weights, so that 1.0 is the mean. ``None``, the default, sums over the
        window, as the original does.
      renew: whether a correction replaces the whole window, so that nothing older remains; default
        no. It is for curvatures that measure everything at once, as `GaussNewton` does on a batch.
        A correction of more columns than ``rank`` is refused, because no column may be missing.

    The remaining keywords are those of `Regularized`.

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
        Regularized.__post_init__(self)
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

    def factor(self, state: RingState, signed: bool) -> tuple[jax.Array, jax.Array]:
        weights = state.weights * self._ages(state)
        return spectral_factor(self.stored, state.gram, weights, signed, state.rows)

    def _ages(self, state: RingState) -> jax.Array:
        """Every row's share of the average, or ones."""
        if self.beta is None:
            return jnp.ones_like(state.weights)
        age = (state.head - 1 - jnp.arange(self.rank)) % self.rank
        share = jnp.where(state.weights != 0, jnp.asarray(self.beta, state.lam.dtype) ** age, 0)
        return linalg.safe_divide(share, jnp.sum(share))
