"""Hebbian: a basis learnt by stochastic ascent on the energy it captures."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay, check_least, fix_size
from lowrank_optax.basis.trackers import Tracker


class Rule(abc.ABC):
    """One step of ascent on ``1/2 ‖A x‖²`` over orthonormal rows ``A``.

    Its gradient is Hebb's ``(A x) x^T``: what goes out times what comes in.
    """

    def spare(self, rank: int) -> int:
        """Directions that the rule keeps besides the basis."""
        return 0

    def init(self, rank: int, dtype: Any) -> Any:
        """A fresh memory."""
        return ()

    @abc.abstractmethod
    def step(
        self,
        memory: Any,
        v: jax.Array,
        rows: jax.Array,
        x: jax.Array,
        lam: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """As `Tracker.move`."""


@dataclasses.dataclass(frozen=True)
class GradientRule(Rule):
    r"""Oja's rule: ``A <- orth(A + eta (A x) x^T)``, with ``eta`` relative to ``lam_max``.

    With ``a = A x`` and ``rho = x - A^T a`` the rows of ``A + eta a x^T = (I + eta a a^T) A + eta a
    rho^T`` span the same as those of ``A + g rho^T``, ``g = (I + eta a a^T)^{-1} eta a``, which is
    how they are orthonormalised. Sanger's generalised Hebbian algorithm is the first order of it.

    Args:
      learning_rate: ``eta``, without unit: relative to the column's share of the moments and to
        their largest. It has to exceed about half the ratio of the largest to the smallest
        eigenvalue that is to be told from the rest.

    Raises:
      ValueError: for a learning rate that is not positive.

    Source: Oja, "Simplified neuron model as a principal component analyzer", Journal of
    Mathematical Biology 1982; Sanger, "Optimal unsupervised learning in a single-layer linear
    feedforward neural network", Neural Networks 1989.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        check_least("GradientRule", "learning_rate", self.learning_rate, strict=True)

    def step(self, memory, v, rows, x, lam, count):
        a = rows @ x
        eta = linalg.safe_divide(self.learning_rate, jnp.max(lam))
        inverse = linalg.inv(jnp.eye(x.shape[1], dtype=x.dtype) + eta * a.T @ a)
        return linalg.lean(rows, eta * a @ inverse, x - rows.T @ a, jnp.arctan), memory


@dataclasses.dataclass(frozen=True)
class StiefelRule(Rule):
    r"""Riemannian ascent: the gradient's tangent ``(A x) rho^T`` and the polar retraction.

    ``A <- polar(A + eta (A x) rho^T)`` with ``rho = x - A^T A x``: also the steepest descent on
    the reconstruction error ``1/2 ‖x - A^T A x‖²``.

    Args:
      learning_rate: ``eta``, as in `GradientRule`.

    Raises:
      ValueError: for a learning rate that is not positive.

    Source: Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds", 2008.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        check_least("StiefelRule", "learning_rate", self.learning_rate, strict=True)

    def step(self, memory, v, rows, x, lam, count):
        a = rows @ x
        g = linalg.safe_divide(self.learning_rate * a, jnp.max(lam))
        return linalg.lean(rows, g, x - rows.T @ a, jnp.arctan), memory


class CayleyMemory(NamedTuple):
    """Memory of `CayleyAdamG`.

    Attributes:
      count: steps.
      momentum: ``(r, slots)`` rows in the coordinates of all directions that are kept.
      root: of the running average of the gradients' squared norms, which themselves go with the
        fourth power of what is absorbed and would soon leave float32.
    """

    count: jax.Array
    momentum: jax.Array
    root: jax.Array


@dataclasses.dataclass(frozen=True)
class CayleyAdamG(Rule):
    r"""Adam on the Stiefel manifold: momentum, one second moment, the iterative Cayley transform.

    With ``X = A^T`` and the gradient ``G`` of descent:

    .. math:: M \leftarrow b_1 M + (1 - b_1) G, \quad v \leftarrow b_2 v + (1 - b_2) ‖G‖^2, \quad
              s = (1 - b_1^t) \sqrt{v / (1 - b_2^t) + \epsilon}

    .. math:: \hat W = M X^T - \tfrac12 X X^T M X^T, \quad W = (\hat W - \hat W^T) / s, \quad
              M \leftarrow s W X, \quad \alpha = \min\{\eta, 2 q / (‖W‖ + \epsilon)\}

    .. math:: Y \leftarrow X - \alpha W X, \quad\text{then ``iterations`` times}\quad
              Y \leftarrow X - \tfrac{\alpha}{2} W (X + Y)

    and ``X <- orth(Y)``. The momentum has directions of its own, for which the basis keeps ``r``
    further rows.

    Args:
      learning_rate: ``eta``, the length of a step on the manifold once ``‖M‖`` is like ``‖G‖``; or
        a schedule of the number of columns absorbed.
      b1: decay of the momentum; without it (0) no rows are kept for it.
      b2: decay of the second moment.
      eps: added under the root and to the norm.
      q: contraction of the iteration.
      iterations: of the Cayley transform.

    Raises:
      ValueError: for numbers out of range.

    Cost: ``r d`` further numbers, small algebra of size ``2 r + k``.

    Source: Li, Li and Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the
    Cayley transform", ICLR 2020.
    """

    learning_rate: float | Callable[[jax.Array], jax.Array] = 0.02
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    q: float = 0.5
    iterations: int = 2

    def __post_init__(self):
        if not callable(self.learning_rate):
            check_least("CayleyAdamG", "learning_rate", self.learning_rate, strict=True)
        check_decay("CayleyAdamG", "b1", self.b1)
        check_decay("CayleyAdamG", "b2", self.b2)
        check_least("CayleyAdamG", "eps", self.eps)
        check_least("CayleyAdamG", "q", self.q, strict=True)
        fix_size(self, "iterations")

    def spare(self, rank: int) -> int:
        return rank if self.b1 else 0

    def init(self, rank: int, dtype: Any) -> CayleyMemory:
        return CayleyMemory(
            jnp.zeros((), jnp.int32),
            jnp.zeros((rank, rank + self.spare(rank)), dtype),
            jnp.zeros((), dtype),
        )

    def step(self, memory, v, rows, x, lam, count):
        slots, steps = memory.momentum.shape[1], linalg.tally(memory.count)
        gradient = -(rows @ x) @ x.T
        momentum = v @ jnp.pad(memory.momentum, ((0, 0), (0, x.shape[1])))
        momentum = self.b1 * momentum + (1 - self.b1) * gradient
        root = jnp.hypot(self.b2**0.5 * memory.root, (1 - self.b2) ** 0.5 * linalg.norm(gradient))
        power = lambda b: 1 - jnp.asarray(b, x.dtype) ** steps
        scale = power(self.b1) * jnp.hypot(root / jnp.sqrt(power(self.b2)), self.eps**0.5)
        hat = momentum.T @ rows - 0.5 * rows.T @ (rows @ momentum.T) @ rows
        w = (hat - hat.T) / scale
        along = rows @ w.T
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        alpha = jnp.minimum(rate, 2 * self.q / (jnp.linalg.norm(w) + self.eps))
        y = rows - alpha * along
        for _ in range(self.iterations):
            y = rows - alpha / 2 * (rows + y) @ w.T
        z = linalg.orthonormalize_rows(y)
        z = jnp.concatenate([z, _outside(along, z, slots - rows.shape[0])])
        return z, CayleyMemory(steps, scale * along @ z.T, root)


@dataclasses.dataclass(frozen=True)
class Hebbian(Tracker):
    r"""Learns the subspace by stochastic ascent on the energy it captures, ``E‖Q^T y‖²``.

    The rule gets Hebb's gradient ``a y^T``, ``a = Q^T y``; the moments of ``a`` inside the subspace
    give the eigenvalues, and their eigenvectors the rows' rotation, see `Tracker`.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.Hebbian(20, rule=lro.basis.CayleyAdamG(0.02)))

    Args:
      rank: dimension of the subspace, ``r``.
      beta: decay of the moments; ``None`` sums, and the steps of `GradientRule` and `StiefelRule`,
        which are relative to the moments, then fall like ``1/t``.
      rule: `GradientRule`, `StiefelRule` or `CayleyAdamG`.
      buffer: columns between two rotations, see `Frame`.
      eig_tol: directions whose moments fall below ``eig_tol * max`` are given up for new ones. For
        the others see `GGT`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, something that is not a
        rule, or corrections with weights of both signs.

    Cost: memory ``m d + m²``, with `CayleyAdamG` ``r d`` more; a step two passes over the rows
    (``4 m d`` flops), ``eigh`` of size ``r``, and ``(2 m + 2 r) r d / buffer`` flops for rotations.

    Source: that of the rule.
    """

    rule: Rule = GradientRule()

    def __post_init__(self):
        Tracker.__post_init__(self)
        check(
            isinstance(self.rule, Rule),
            f"Hebbian: rule is {self.rule!r}; pass GradientRule(), StiefelRule() or CayleyAdamG().",
        )

    @property
    def slots(self) -> int:
        return self.rank + self.rule.spare(self.rank)

    def remember(self, dtype: Any) -> Any:
        return self.rule.init(self.rank, dtype)

    def move(self, memory, v, rows, x, lam, count):
        return self.rule.step(memory, v, rows, x, lam, count)


def _outside(momentum: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """Orthonormal rows for what of a momentum is outside ``rows``, as far as it is resolved."""
    rest = momentum - momentum @ rows.T @ rows
    size, z = linalg.eigh(linalg.symmetrize(rest.T @ rest))
    kind = jnp.finfo(rest.dtype)
    rounding = size <= jnp.maximum(kind.eps**0.5 * jnp.max(size), kind.tiny)
    z = jnp.where(rounding[:, None], 0, z)[:count]
    return z - z @ rows.T @ rows
