"""Inner parts that read the eigenvalues."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check_finite
from lowrank_optax._core.types import Context
from lowrank_optax.inner.compose import Stateless


@dataclasses.dataclass(frozen=True)
class LPower(Stateless):
    r"""Multiplies by a power of the eigenvalues.

    .. math:: u'_i = \lambda_i^p\, u_i

    On the whole space this is ``Q diag(lam^p) Q^T``. The power of a negative eigenvalue is that of
    its size, with a minus sign where ``p`` is odd. A direction whose eigenvalue is 0 gets 0, as in
    a pseudo-inverse.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.LPower(-0.5), jnp.array([6.0, 6.0])
      >>> basis = lro.Eigenbasis(lam=jnp.array([4.0, 0.0]), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> print(part.update(g, part.init(2, g.dtype), context)[0])
      [3. 0.]

    Args:
      p: finite power, a number without unit; −1/2 whitens (`LInvSqrt`), −1 is Newton's method in
        the basis (`LInv`).

    Raises:
      ValueError: for a power that is not a finite number; when an optimizer is built whose basis
        has no eigenvalues.

    Cost: no state, about ``10 r`` flops.

    Source: Newton's method; for the root, full-matrix AdaGrad, Duchi et al., JMLR 2011.
    """

    p: float
    needs: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})

    def __post_init__(self):
        check_finite("LPower", "p", self.p)

    def update(self, u: jax.Array, state: Any, context: Context):
        lam, live = context.basis
        live = live & (lam != 0)
        size = jnp.abs(jnp.where(live, lam, 1)) ** self.p
        sign = jnp.where((lam < 0) & (self.p % 2 == 1), -1, 1)
        return jnp.where(live, size * sign * u, 0), state


def LInvSqrt() -> LPower:
    """Whitens the gradient, ``u / sqrt(lam)``: the step of GGT and of full-matrix AdaGrad.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.inner.LInvSqrt()
      LPower(p=-0.5)

    Returns:
      `LPower` of −1/2.

    Cost: that of `LPower`.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011.
    """
    return LPower(-0.5)


def LInv() -> LPower:
    """Divides by the eigenvalues, ``u / lam``: Newton's step where the curvature is a Hessian.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.inner.LInv()
      LPower(p=-1.0)

    Returns:
      `LPower` of −1.

    Cost: that of `LPower`.

    Source: Newton's method.
    """
    return LPower(-1.0)
