"""Methods that read a batch through its ``L x L`` moments alone.

They answer with two coefficient matrices ``P`` and ``Q``,

    G = (T f P + f Q) / B,    M = f^T f / B,    A = f^T T f / B,    C = (T f)^T T f / B,

so that a method is a few lines of small algebra. How the moments are estimated from the batch is a
part of its own, an `Estimate`.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check
from lowrank_optax._core.linalg import symmetrize
from lowrank_optax.spectral.methods._method import Method, Pairs, SideMoments, moments
from lowrank_optax.spectral.methods.estimates import Coefficients, Estimate, WholeBatch


@dataclasses.dataclass(frozen=True)
class MomentMethod(Method):
    """A method that reads moments and answers with ``P`` and ``Q`` of every side.

    Attributes:
      two_sided: whether the method serves operators with two sides; a class variable.
      moments: how moments are estimated from a batch, an `Estimate`, in methods that have a choice.
    """

    two_sided: ClassVar[bool] = False
    """Whether it serves operators with two sides."""

    @abc.abstractmethod
    def coefficients(self, seen: tuple[SideMoments, ...], memory: Any) -> Coefficients:
        """``(P, Q)`` of every side, each ``(L, L)``."""

    def remember(self, seen: tuple[SideMoments, ...], memory: Any) -> Any:
        """The memory after the batch, which the coefficients of the same batch see already."""
        return memory

    @property
    def estimate(self) -> Estimate:
        """How moments are estimated; a field ``moments`` where there is a choice."""
        return getattr(self, "moments", WholeBatch())

    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        check(
            len(pairs) == 1 or self.two_sided,
            f"{type(self).__name__} is for self-adjoint operators and an operator with two sides "
            "came; pass NestedLoRA(), VAMP2() or DPNet().",
        )
        memory = self.remember(moments(pairs), memory)
        return self.estimate.directions(pairs, lambda seen: self.coefficients(seen, memory)), memory


@dataclasses.dataclass(frozen=True)
class MomentLoss(MomentMethod):
    """A method given by a loss of the moments, which is differentiated in them.

    An ``ordered`` loss is a sum of one loss for each mode. Entry ``(l, m)`` of a moment counts in
    the loss of mode ``m`` alone, and the gradient is stopped at what that loss reads of earlier
    modes.

    Attributes:
      ordered: whether the loss is such a sum; a class variable.
    """

    ordered: ClassVar[bool] = False

    @abc.abstractmethod
    def loss(self, grams: tuple[jax.Array, ...], cross: jax.Array) -> jax.Array:
        """The loss, a scalar.

        Args:
          grams: ``<f_l, f_m>`` of every side, each ``(L, L)``.
          cross: ``<f_l, T f_m>``, or ``<f_l, T g_m>`` with two sides, ``(L, L)``.
        """

    def coefficients(self, seen, memory):
        cross = seen[0].cross if len(seen) == 2 else symmetrize(seen[0].cross)
        dm, da = jax.grad(self.loss, argnums=(0, 1))(tuple(s.gram for s in seen), cross)
        both = lambda x: (1 + jnp.eye(len(x))) * x if self.ordered else x + x.T
        if len(seen) == 1:
            return ((both(da), both(dm[0])),)
        return ((da.T, both(dm[0])), (da, both(dm[1])))


def whitening(gram: jax.Array) -> jax.Array:
    """``L^{-T}``, upper triangular, with ``L L^T`` the Gram matrix."""
    factor = jnp.linalg.cholesky(_ridge(gram))
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(factor, eye, lower=True).T


def logdet(gram: jax.Array) -> jax.Array:
    """The logarithm of a Gram matrix's determinant."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(_ridge(gram)))))


def _ridge(gram: jax.Array) -> jax.Array:
    """The Gram matrix, lifted by what its dtype cannot tell from zero."""
    lift = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    return symmetrize(gram) + lift * jnp.diag(jnp.diagonal(gram))
