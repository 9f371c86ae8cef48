"""Inner parts that solve a small model of the loss in the basis."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_least
from lowrank_optax._core.types import MATRIX, SCALAR, TENSOR, VECTOR, Context, Eigenbasis


class CubicNewtonState(NamedTuple):
    """State of `CubicNewton`.

    Attributes:
      sigma: weight of the regularisation in the next step.
      shift: number ``sigma ‖u‖`` that the last step added to the eigenvalues.
      step: ``(r,)`` the last step, 0 before the first.
    """

    sigma: jax.Array
    shift: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class CubicNewton:
    r"""The global minimum of the cubically regularised model in the basis.

    .. math:: \min_y\ g \cdot y + \tfrac12 y^T \mathrm{diag}(\lambda)\, y
              + \tfrac{\sigma}{3} \|y\|^3,\qquad
              u = -y = (\mathrm{diag}(\lambda) + \rho I)^{-1} g,\quad \rho = \sigma \|u\|

    with ``rho >= max(0, -lam_min)``, which is the root of one scalar equation. The step descends
    also along eigenvectors with ``lam_i < 0``, where Newton's own step climbs. In the "hard case"
    the gradient has no part along the lowest eigenvector; the step is then filled up to its length
    along that eigenvector.

    With ``adaptive``, ``sigma <- max(sigma/2, M)`` follows the error of the model. The gradient
    that the last model predicted is ``rho u``, so ``M = |u · (g - rho u)| / ‖u‖³`` measures the
    change of curvature that it missed. This assumes that the last update was applied whole: use a
    learning rate of 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.CubicNewton(sigma=1.0), jnp.array([2.0, 0.0])
      >>> basis = lro.Eigenbasis(lam=jnp.array([1.0, 0.5]), live=jnp.ones(2, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, _ = part.update(g, part.init(2, g.dtype), context)
      >>> print(u.round(2))                       # u (1 + |u|) = 2
      [1. 0.]

    Args:
      sigma: weight of the regularisation, in units of curvature by length; with ``adaptive`` the
        first one. Half the Lipschitz constant of the Hessian makes the model an upper bound.
      adaptive: whether ``sigma`` follows the errors of the model, ``False`` by default.
      iterations: number of iterations of Newton's method for ``rho``, which converges
        quadratically.

    Raises:
      ValueError: for a ``sigma`` that is not positive or fewer than one iteration; when an
        optimizer is built whose basis has no eigenvalues.

    Cost: ``r`` numbers; ``10 r`` flops an iteration, and ``2 r²`` when the basis turns.

    Source: Nesterov and Polyak, "Cubic regularization of Newton method", 2006; the adaptation is
    that of Mishchenko, "Regularized Newton Method with Global O(1/k²) Convergence", 2023.
    """

    sigma: float = 1.0
    adaptive: bool = False
    iterations: int = 15
    needs: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})

    def __post_init__(self):
        check_least("CubicNewton", "sigma", self.sigma, strict=True)
        check_count("CubicNewton", "iterations", self.iterations)

    def init(self, rank: int, dtype: Any) -> CubicNewtonState:
        return CubicNewtonState(
            jnp.asarray(self.sigma, dtype), jnp.zeros((), dtype), jnp.zeros(rank, dtype)
        )

    @property
    def laws(self) -> CubicNewtonState:
        return CubicNewtonState._make((SCALAR, SCALAR, VECTOR))

    def update(self, u: jax.Array, state: CubicNewtonState, context: Context):
        sigma = state.sigma
        if self.adaptive:
            size = jnp.linalg.norm(state.step)
            missed = jnp.abs(state.step @ (context.g - state.shift * state.step))
            least = jnp.finfo(u.dtype).eps * self.sigma
            halved = jnp.where(size > 0, jnp.maximum(sigma / 2, least), sigma)
            sigma = jnp.maximum(halved, linalg.safe_divide(missed, size**3))
        u, shift = _cubic_step(u, context.basis, sigma, self.iterations)
        return u, CubicNewtonState(sigma, shift, u)


class ThirdOrderState(NamedTuple):
    """State of `ThirdOrder`.

    Attributes:
      step: ``(r,)`` sum of the steps since the basis was last updated.
      hessian: ``(r, r)`` curvature in the basis, as it was then.
      tensor: ``(r, r, r)`` the third derivatives in the basis.
    """

    step: jax.Array
    hessian: jax.Array
    tensor: jax.Array


@dataclasses.dataclass(frozen=True)
class ThirdOrder:
    r"""A minimum of the third-order model in the basis, its tensor learned by secants.

    .. math:: \min_y\ g \cdot y + \tfrac12 y^T \mathrm{diag}(\lambda)\, y + \tfrac16 T[y,y,y]
              + \tfrac{\sigma}{4} \|y\|^4,\qquad u = -y

    When the basis is updated, the curvature ``B = diag(lam)`` has changed by ``T[s]``, where ``s``
    is the step since the last update. So ``T`` becomes the closest symmetric tensor with that
    property. With ``n = s / ‖s‖`` and ``E = (B - C B_old C^T)/‖s‖ - T[n]``,

    .. math:: T \leftarrow T + 3\,\mathrm{sym}(E \otimes n)
              - 3\,\mathrm{sym}(En \otimes n \otimes n) + (n^T E n)\, n \otimes n \otimes n

    It is an option for deterministic problems of few directions. The eigenvalues have to be those
    of the Hessian at the current parameters: of ``GaussNewton`` in ``GGT(batch, renew=True)``, or
    of exact products in ``FullMatrix(beta=None)``, not an average over batches. The learning rate
    has to be 1, because ``s`` is taken to be the sum of the updates. With estimates from
    minibatches it is worse than `CubicNewton`, which has most of the gain at ``r²`` times less.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.ThirdOrder(sigma=1.0), jnp.array([10.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(1), live=jnp.ones(1, bool))
      >>> context = lro.Context(g, basis, moved=jnp.array(True))
      >>> u, _ = part.update(g, part.init(1, g.dtype), context)
      >>> print(u.round(2))                       # while T = 0, u + u³ = 10
      [2.]

    Args:
      sigma: weight of the regularisation, in units of curvature by squared length.
      iterations: number of iterations of the damped Newton method for the model.

    Raises:
      ValueError: for a ``sigma`` that is not positive or fewer than one iteration; when an
        optimizer is built whose basis has no eigenvalues.

    Cost: ``r³ + r² + r`` numbers, and ``6 r⁴`` flops when the basis turns; an iteration takes one
    ``eigh`` of size ``r`` and ``20 r³`` flops. Sensible for ``r`` up to about 12.

    Source: Welzel and Hauser, "Approximating higher-order derivative tensors using secant updates",
    2022; the model is that of Nesterov, "Implementable tensor methods in unconstrained convex
    optimization", 2021.
    """

    sigma: float = 1.0
    iterations: int = 20
    needs: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})

    def __post_init__(self):
        check_least("ThirdOrder", "sigma", self.sigma, strict=True)
        check_count("ThirdOrder", "iterations", self.iterations)

    def init(self, rank: int, dtype: Any) -> ThirdOrderState:
        return ThirdOrderState(
            jnp.zeros(rank, dtype),
            jnp.zeros((rank, rank), dtype),
            jnp.zeros((rank, rank, rank), dtype),
        )

    @property
    def laws(self) -> ThirdOrderState:
        return ThirdOrderState._make((VECTOR, MATRIX, TENSOR))

    def update(self, u: jax.Array, state: ThirdOrderState, context: Context):
        hessian = jnp.diag(context.basis.lam)
        tensor = _secant(state.tensor, state.step, hessian - state.hessian)
        tensor = jnp.where(context.moved, tensor, state.tensor)
        y = _third_order_step(u, hessian, tensor, self.sigma, self.iterations)
        y = jnp.where(context.basis.live, y, 0)
        step = jnp.where(context.moved, 0, state.step) + y
        return -y, ThirdOrderState(step, hessian, tensor)


@dataclasses.dataclass(frozen=True)
class NaturalGradient:
    r"""The natural gradient in the basis, by the empirical Fisher matrix of this step's examples.

    .. math:: u' = (F + \mu I)^{-1} u,\quad
              F = \frac{\sum_i w_i\, a_i a_i^T}{\sum_i w_i},\quad a_i = Q^T g_i,\quad
              \mu = \mathrm{damping} + \mathrm{rdamping} \cdot \mathrm{tr} F

    ``g_i`` is the gradient of example ``i``; the gradient of the step should be their mean. Between
    two updates of the basis the last ``F`` is used. When the basis turns, it becomes ``C F C^T``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part, g = lro.inner.NaturalGradient(damping=1.0), jnp.array([5.0, 2.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> seen = {"columns": jnp.array([[2.0, 2.0], [0.0, 0.0]]), "weights": jnp.ones(2)}
      >>> context = lro.Context(g, basis, moved=jnp.array(True), **seen)
      >>> u, fisher = part.update(g, part.init(2, g.dtype), context)
      >>> print(fisher.diagonal(), u.round(2))    # 5 / (4 + 1) and 2 / (0 + 1)
      [4. 0.] [1. 2.]

    Args:
      damping: number added to the eigenvalues of ``F``, in units of the squared gradient.
      rdamping: share of the trace of ``F`` that is added to them, a number without unit.

    Raises:
      ValueError: for negative damping; when an optimizer is built whose curvature gives no columns
        of examples.

    Cost: ``r²`` numbers, and ``4 r³`` flops when the basis turns; ``2 r² k`` flops for ``k``
    examples and one ``eigh`` of size ``r`` a step, about ``9 r³``. The basis has already made the
    problem as small as ``min(k, r)``.

    Source: Amari, "Natural gradient works efficiently in learning", 1998; Schraudolph, "Fast
    curvature matrix-vector products for second-order gradient descent", 2002, for the empirical
    matrix.
    """

    damping: float = 1e-3
    rdamping: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"examples"})

    def __post_init__(self):
        _check_damping(self)

    def init(self, rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros((rank, rank), dtype)

    @property
    def laws(self):
        return MATRIX

    def update(self, u: jax.Array, state: jax.Array, context: Context):
        total, weight = _outer_sum(context)
        fisher = jnp.where(context.moved, linalg.safe_divide(total, weight), state)
        return _damped_solve(fisher, u, self.damping, self.rdamping), fisher


@dataclasses.dataclass(frozen=True)
class DampedLeastSquares:
    r"""The damped least-squares step in the basis, by the Jacobian of this step's residuals.

    .. math:: u' = (J^T J + \mu I)^{-1} u,\quad
              J^T J = \sum_i w_i\, a_i a_i^T,\quad a_i = Q^T \nabla r_i,\quad
              \mu = \mathrm{damping} + \mathrm{rdamping} \cdot \mathrm{tr}\, J^T J

    The gradient of the step should be ``J^T r``; the step is then that of Gauss-Newton. In a `GGT`
    basis that holds the gradients of all ``k`` residuals it is the dual form
    ``J^T (J J^T + mu I)^{-1} r``. Between two updates of the basis the last matrix is used. When
    the basis turns, it becomes ``C J^T J C^T``. Eigenvalues that rounding cannot tell from zero are
    dropped, so that without damping the step is the shortest one that solves the problem.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> part = lro.inner.DampedLeastSquares(rdamping=0.0)
      >>> jacobian, r = jnp.array([[4.0, 0.0], [3.0, 0.0]]), jnp.array([4.0, 3.0])
      >>> basis = lro.Eigenbasis(lam=jnp.ones(2), live=jnp.ones(2, bool))
      >>> g, seen = jacobian.T @ r, {"columns": jacobian.T, "weights": jnp.ones(2)}
      >>> context = lro.Context(g, basis, moved=jnp.array(True), **seen)
      >>> u, _ = part.update(g, part.init(2, g.dtype), context)
      >>> print(u.round(2))                       # the shortest u with J u = r
      [1. 0.]

    Args:
      damping: number added to the eigenvalues of ``J^T J``, in units of the squared gradients of
        the residuals.
      rdamping: share of the trace of ``J^T J`` that is added to them, a number without unit.

    Raises:
      ValueError: for negative damping; when an optimizer is built whose curvature gives no columns
        of residuals.

    Cost: ``r²`` numbers, and ``4 r³`` flops when the basis turns; ``2 r² k`` flops for ``k``
    residuals and one ``eigh`` of size ``r`` a step, about ``9 r³``.

    Source: Levenberg, 1944; Marquardt, 1963; Ren and Goldfarb, "Efficient subsampled Gauss-Newton
    and natural gradient methods for training neural networks", 2019, for the dual form.
    """

    damping: float = 0.0
    rdamping: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"examples"})

    def __post_init__(self):
        _check_damping(self)

    def init(self, rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros((rank, rank), dtype)

    @property
    def laws(self):
        return MATRIX

    def update(self, u: jax.Array, state: jax.Array, context: Context):
        matrix = jnp.where(context.moved, _outer_sum(context)[0], state)
        return _damped_solve(matrix, u, self.damping, self.rdamping), matrix


def _check_damping(part: Any) -> None:
    check_least(type(part).__name__, "damping", part.damping)
    check_least(type(part).__name__, "rdamping", part.rdamping)


def _outer_sum(context: Context) -> tuple[jax.Array, jax.Array]:
    """``sum_i w_i a_i a_i^T`` of the correction's columns in the basis, and ``sum_i w_i``."""
    columns, weights = context.columns, context.weights
    assert columns is not None and weights is not None
    return (columns * weights[None]) @ columns.T, jnp.sum(weights)


def _damped_solve(matrix: jax.Array, u: jax.Array, damping, rdamping) -> jax.Array:
    """``(A + mu I)^{-1} u``; a pseudo-inverse where ``mu`` is below rounding."""
    mu = damping + rdamping * jnp.trace(matrix)
    shifted = matrix + mu * jnp.eye(u.shape[0], dtype=u.dtype)
    return linalg.matrix_power(shifted, -1.0, eig_tol=0.0, damping=0.0, rdamping=0.0) @ u


def _cubic_step(g: jax.Array, basis: Eigenbasis, sigma, iterations: int):
    """``u = (diag(lam) + rho I)^{-1} g`` with ``rho = sigma ‖u‖``, and ``rho``.

    The unknown is ``t`` in ``rho = pole + t``, ``pole = max(0, -lam_min)``: near the pole ``rho``
    itself would cancel against ``lam_min``.
    """
    lam, live = basis
    g = jnp.where(live, g, 0)
    pole = jnp.max(jnp.where(live, -lam, 0), initial=0)
    above = jnp.where(live, lam + pole, 0)

    def alone(above, size):
        """The root ``t`` of a gradient of this size along one eigenvector."""
        bound = sigma * size
        return linalg.safe_divide(
            2 * (bound - above * pole), above + pole + jnp.sqrt((above - pole) ** 2 + 4 * bound)
        )

    # The root of a single coordinate lies below that of all. From there Newton's method for
    # 1/‖u‖ = sigma/rho rises to the root and never passes it, as the function is concave.
    low = jnp.max(alone(above, jnp.abs(g)), initial=0)
    high = alone(
        jnp.min(jnp.where(live, above, jnp.inf), initial=jnp.max(above, initial=0)),
        jnp.linalg.norm(g),
    )

    def body(_, t):
        u = linalg.safe_divide(g, above + t)
        ratio = linalg.safe_divide(sigma * jnp.linalg.norm(u), pole + t)
        slope = linalg.safe_divide(linalg.unit(u) ** 2, above + t).sum() + linalg.safe_divide(
            ratio, pole + t
        )
        return jnp.clip(t + linalg.safe_divide(ratio - 1, slope), low, jnp.maximum(low, high))

    t = lax.fori_loop(0, iterations, body, low)
    u, rho = linalg.safe_divide(g, above + t), pole + t
    # The hard case: at the pole the step is still too short. The lowest eigenvector fills it.
    missing = jnp.sqrt(jnp.maximum((rho / sigma) ** 2 - u @ u, 0))
    bottom = jax.nn.one_hot(jnp.argmin(jnp.where(live, above, jnp.inf)), g.shape[0], dtype=g.dtype)
    return u + jnp.where((pole > 0) & (t == 0), missing, 0) * bottom, rho


def _secant(tensor: jax.Array, step: jax.Array, change: jax.Array) -> jax.Array:
    """The symmetric tensor closest to ``tensor`` with ``T[step] = change``; itself for no step."""
    length = jnp.linalg.norm(step)
    s = linalg.unit(step)
    e = linalg.safe_divide(change, length) - jnp.einsum("ijk,k->ij", tensor, s)
    es = e @ s
    new = (
        _sum_over_positions(e, s)
        - _sum_over_positions(jnp.outer(es, s) + jnp.outer(s, es), s) / 2
        + (s @ es) * jnp.einsum("i,j,k->ijk", s, s, s)
    )
    return jnp.where(length > 0, tensor + new, tensor)


def _sum_over_positions(matrix: jax.Array, s: jax.Array) -> jax.Array:
    """``3 sym(A ⊗ s)`` of a symmetric ``A``: the sum over the three axes that ``s`` can have."""
    return (
        jnp.einsum("ij,k->ijk", matrix, s)
        + jnp.einsum("ik,j->ijk", matrix, s)
        + jnp.einsum("jk,i->ijk", matrix, s)
    )


def _third_order_step(g, hessian, tensor, sigma, iterations: int) -> jax.Array:
    """A minimum of the third-order model, by Newton's method with ``|H|`` and a line search."""
    n = g.shape[0]

    def model(y):
        return (
            g @ y
            + y @ hessian @ y / 2
            + jnp.einsum("ijk,i,j,k->", tensor, y, y, y) / 6
            + sigma * (y @ y) ** 2 / 4
        )

    lengths = jnp.concatenate([2.0 ** -jnp.arange(12, dtype=g.dtype), jnp.zeros(1, g.dtype)])

    def body(_, y):
        ty = jnp.einsum("ijk,k->ij", tensor, y)
        slope = g + hessian @ y + ty @ y / 2 + sigma * (y @ y) * y
        curvature = (
            hessian + ty + sigma * ((y @ y) * jnp.eye(n, dtype=g.dtype) + 2 * jnp.outer(y, y))
        )
        step = linalg.matrix_power(curvature, -1.0, abs=True) @ slope
        tries = y[None] - lengths[:, None] * step[None]
        return tries[jnp.argmin(jax.vmap(model)(tries))]

    return lax.fori_loop(0, iterations, body, jnp.zeros_like(g))
