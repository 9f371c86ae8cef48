"""Hebbian: a basis learned by stochastic ascent on the energy it captures."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_decay, check_least, fix_size
from lowrank_optax.basis.moving import MovingSubspace


class Rule(abc.ABC):
    """One step of ascent on ``1/2 ‖A x‖²`` over orthonormal rows ``A``.

    Its gradient is Hebb's ``(A x) x^T``: what goes out times what comes in. A rule is a frozen
    dataclass; its memory is a tree of arrays of fixed shapes.
    """

    def spare(self, rank: int) -> int:
        """The number of directions that the rule keeps besides the ``rank`` of the basis."""
        return 0

    def init(self, rank: int, dtype: Any) -> Any:
        """The memory before the first column."""
        return ()

    def after(self, memory: Any, lam: jax.Array, count: jax.Array) -> Any:
        """The memory as if ``count`` columns had come before.

        For a state that goes on from given eigenpairs. ``lam`` are the columns' mean squares along
        the rows, the largest first, of any number; ``memory`` is what absorbing these gave.
        """
        return memory

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
        """The rows after one step, and the memory.

        Args:
          memory: the rule's memory.
          v: rotation ``(r, r)`` of the old slots into ``rows``; a slot that was dead has none.
          rows: orthonormal rows ``(r, slots + k)``: the basis in the coordinates of its old
            ``slots`` directions and ``k`` new ones. ``slots`` is ``r`` and `spare`.
          x: the columns ``(slots + k, k)``, scaled by the roots of their shares of the moments.
          lam: the moments ``(r,)`` along ``rows``.
          count: number of columns absorbed before.

        Returns:
          Orthonormal rows ``(slots, slots + k)``, those of the basis first, and the memory.
        """


@dataclasses.dataclass(frozen=True)
class GradientRule(Rule):
    r"""Oja's rule: ``A <- orth(A + eta (A x) x^T)``, with ``eta`` relative to ``lam_max``.

    With ``a = A x`` and ``rho = x - A^T a`` the rows of ``A + eta a x^T = (I + eta a a^T) A + eta a
    rho^T`` span the same as those of ``A + g rho^T``, ``g = (I + eta a a^T)^{-1} eta a``, which is
    how they are orthonormalised. Sanger's generalised Hebbian algorithm is the first order of it.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule, row = lro.basis.GradientRule(1.0), jnp.array([[1., 0.]])
      >>> x, lam = jnp.array([[1.], [1.]]), jnp.ones(1)
      >>> turned, _ = rule.step((), jnp.eye(1), row, x, lam, 0)
      >>> print((turned / turned[0, 0]).round(2))      # A + (A x) x^T = (2, 1)
      [[1.  0.5]]

    Args:
      learning_rate: step ``eta``, without unit, above 0, default 8: relative to the column's share
        of the moments and to their largest. It has to exceed about half the ratio of the largest
        eigenvalue to the smallest one that is to be told from the rest.

    Raises:
      ValueError: for a learning rate that is not positive.

    Cost: no memory; small algebra of size ``r + k``.

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

    .. math:: A \leftarrow \mathrm{polar}(A + \eta\,(A x) \rho^T), \qquad \rho = x - A^T A x

    This is also steepest descent on the reconstruction error ``1/2 ‖x - A^T A x‖²``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule, row = lro.basis.StiefelRule(1.0), jnp.array([[1., 0.]])
      >>> x, lam = jnp.array([[1.], [1.]]), jnp.ones(1)
      >>> turned, _ = rule.step((), jnp.eye(1), row, x, lam, 0)
      >>> print((turned / turned[0, 0]).round(2))      # A + (A x) rho^T = (1, 1)
      [[1. 1.]]

    Args:
      learning_rate: step ``eta``, without unit, above 0, default 8; see `GradientRule`.

    Raises:
      ValueError: for a learning rate that is not positive.

    Cost: no memory; small algebra of size ``r + k``.

    Source: Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds", 2008.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        check_least("StiefelRule", "learning_rate", self.learning_rate, strict=True)

    def step(self, memory, v, rows, x, lam, count):
        a = rows @ x
        g = linalg.safe_divide(self.learning_rate * a, jnp.max(lam))
        return linalg.lean(rows, g, x - rows.T @ a, jnp.arctan), memory


@dataclasses.dataclass(frozen=True)
class AdaptiveRule(Rule):
    r"""Oja's rule with AdaGrad's step for every row: no rate is left to tune.

    .. math:: G = (A x) x^T, \quad b_i^2 \leftarrow b_i^2 + ‖G_i‖^2, \quad
              A \leftarrow \mathrm{orth}(A + \mathrm{diag}(b)^{-1} G)

    As in `GradientRule`, the rows of ``A + diag(1/b) a x^T`` span the same as those of
    ``A + g rho^T`` with ``g = (I + diag(1/b) a a^T)^{-1} diag(1/b) a``. Rows are kept in the order
    of their moments, and their ``b`` move with them.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule, row = lro.basis.AdaptiveRule(), jnp.array([[1., 0.]])
      >>> x, lam = jnp.array([[1.], [1.]]), jnp.ones(1)
      >>> _, squares = rule.step(rule.init(1, x.dtype), jnp.eye(1), row, x, lam, 0)
      >>> print(squares)                               # ‖(A x) x‖² = 1 · 2
      [2.]

    Cost: memory ``r``; small algebra of size ``r + k``.

    Source: Henriksen and Ward, "AdaOja: adaptive learning rates for streaming PCA", 2019.
    """

    def init(self, rank: int, dtype: Any) -> jax.Array:
        """The ``b_i²``, ``(r,)``."""
        return jnp.zeros(rank, dtype)

    def after(self, memory: jax.Array, lam: jax.Array, count: jax.Array) -> jax.Array:
        """About what ``count`` columns without energy outside ``lam`` would have summed up to."""
        own = jnp.pad(lam[: len(memory)], (0, max(0, len(memory) - len(lam))))
        return count * jnp.sum(lam) * own

    def step(self, memory, v, rows, x, lam, count):
        a = rows @ x
        # Squares of gradients move with the rows like any second moment.
        squares = (v * v) @ memory + jnp.sum((a @ x.T) ** 2, axis=1)
        step = linalg.safe_divide(a, jnp.sqrt(squares)[:, None])
        g = step @ linalg.inv(jnp.eye(x.shape[1], dtype=x.dtype) + a.T @ step)
        return linalg.lean(rows, g, x - rows.T @ a, jnp.arctan), squares


class CayleyMemory(NamedTuple):
    """Memory of `CayleyAdamG`.

    Attributes:
      count: number of steps.
      momentum: rows ``(r, slots)`` in the coordinates of all directions that are kept.
      root: root of the running average of the gradients' squared norms. The root is kept because
        the squares grow with the fourth power of what is absorbed, and would soon leave float32.
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
    more rows.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.basis.CayleyAdamG(0.5, b1=0.0, iterations=20)
      >>> x, lam, memory = jnp.array([[1.], [1.]]), jnp.ones(1), rule.init(1, jnp.float32)
      >>> turned, _ = rule.step(memory, jnp.eye(1), jnp.array([[1., 0.]]), x, lam, 0)
      >>> print(turned.round(2))       # by the angle 2 atan(η/(2√2)), as ‖W X‖ = 1/√2 at the start
      [[0.94 0.34]]

    Args:
      learning_rate: step ``eta``, the length of a step on the manifold once ``‖M‖`` is about
        ``‖G‖``; a number above 0, default 0.02, or a schedule of the number of columns absorbed.
      b1: decay of the momentum, in [0, 1), default 0.9; with 0 no rows are kept for it.
      b2: decay of the second moment, in [0, 1), default 0.99.
      eps: number added under the root and to the norm, at least 0, default 1e-8.
      q: contraction of the iteration, above 0, default 0.5.
      iterations: number of iterations of the Cayley transform, at least 1, default 2.

    Raises:
      ValueError: for numbers out of range.

    Cost: memory ``r d`` for the momentum's own directions; small algebra of size ``2 r + k``.

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
class Hebbian(MovingSubspace):
    r"""Learns the subspace by stochastic ascent on the energy it captures, ``E‖Q^T y‖²``.

    The rule gets Hebb's gradient ``a y^T``, ``a = Q^T y``. The moments of ``a`` inside the subspace
    give the eigenvalues, and their eigenvectors rotate the rows.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> for rule in (lro.basis.GradientRule(), lro.basis.CayleyAdamG()):
      ...     tx = lro.lre(1.0, basis=lro.basis.Hebbian(20, rule=rule, buffer=8))
      ...     state = jax.eval_shape(tx.init, jnp.zeros(1000))
      ...     print(lro.diagnose.find(state).basis.rows[0].shape)    # the second has a momentum
      (28, 1000)
      (48, 1000)

    Args:
      rank: dimension ``r`` of the subspace, at least 1.
      beta: decay of the moments per correction, in [0, 1), default 0.99. ``None`` sums; the steps
        of `GradientRule` and `StiefelRule` are relative to the moments and then fall like ``1/t``.
      rule: how the rows move: `GradientRule` (the default), `StiefelRule`, `AdaptiveRule`,
        `CayleyAdamG`, or a `Rule` of your own.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.
      eig_tol: share of the largest moment at or below which a direction is given up for a new one,
        without unit, default 1e-5.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, something that is not a
        rule, or corrections with weights of both signs.

    Cost: memory ``m d + m²``, with `CayleyAdamG` ``r d`` more; a step two passes over the rows
    (``4 m d`` flops), ``eigh`` of size ``r``, and ``(2 m + 2 r) r d / buffer`` flops for rotations.

    Source: that of the rule.
    """

    rule: Rule = GradientRule()

    def __post_init__(self):
        super().__post_init__()
        check(
            isinstance(self.rule, Rule),
            f"Hebbian: rule is {self.rule!r}; pass a rule of lowrank_optax.basis, such as "
            "GradientRule().",
        )

    @property
    def slots(self) -> int:
        return self.rank + self.rule.spare(self.rank)

    def init_memory(self, dtype: Any) -> Any:
        return self.rule.init(self.rank, dtype)

    def memory_after(self, memory: Any, lam: jax.Array, count: jax.Array) -> Any:
        return self.rule.after(memory, lam, count)

    def move(self, memory, v, rows, x, lam, count):
        return self.rule.step(memory, v, rows, x, lam, count)


def _outside(momentum: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """Orthonormal rows for the part of a momentum outside ``rows``, where it exceeds rounding."""
    rest = momentum - momentum @ rows.T @ rows
    size, z = linalg.eigh(linalg.symmetrize(rest.T @ rest))
    kind = jnp.finfo(rest.dtype)
    rounding = size <= jnp.maximum(kind.eps**0.5 * jnp.max(size), kind.tiny)
    z = jnp.where(rounding[:, None], 0, z)[:count]
    return z - z @ rows.T @ rows
