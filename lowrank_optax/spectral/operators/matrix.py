"""Matrices, whose points are indices."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_count
from lowrank_optax.spectral.operators._operator import Function, SampledOperator, check_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix(SampledOperator):
    """A symmetric matrix on functions of an index below ``n``, each of the weight ``1/n``.

    Args:
      matrix: the entries, ``(n, n)``, or a function of columns ``(n, L)`` that multiplies them.
      size: the number of indices ``n``, needed with a function.
      everything: whether every batch holds all indices once, so that nothing is random; ``False``
        by default. Pass `WholeBatch` with it: leaving points out of a finite population would bias
        its moments.

    Raises:
      ValueError: for an array that is not square and symmetric, or a missing size.

    Cost: ``n`` evaluations of the functions, and ``2 B n L`` flops with an array, since only the
    batch's rows are multiplied.

    Source: elementary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> operator = spectral.operators.Matrix(jnp.diag(jnp.array([3.0, 1.0])), everything=True)
      >>> f, tf = operator.apply(lambda i: jnp.ones(1), operator.sample(jax.random.key(0), 2))
      >>> print(tf[:, 0])
      [3. 1.]
    """

    matrix: Any
    size: Any = None
    everything: bool = False

    def __post_init__(self):
        if callable(self.matrix):
            check_count("Matrix", "size", self.size)
            _check_adjoint("Matrix", self.matrix, self.matrix, (self.size, self.size))
            return
        a = check_rows("Matrix", "matrix", self.matrix, 2)
        check(
            a.shape[0] == a.shape[1] and bool(jnp.allclose(a, a.T, atol=1e-5 * jnp.abs(a).max())),
            f"Matrix: matrix of shape {a.shape} is not symmetric; pass (A + A^T)/2, or a "
            "RectangularMatrix.",
        )
        object.__setattr__(self, "matrix", a)
        object.__setattr__(self, "size", a.shape[0])

    @property
    def indices(self) -> tuple[int, ...]:
        return (self.size,)

    def held_out(self) -> tuple["Matrix", Any]:
        """All indices once: where the matrix is known whole, so is what is read."""
        return self, jnp.arange(self.size)[None]

    def sample(self, key: jax.Array, size: int, state: Any = None) -> jax.Array:
        if self.everything:
            return jnp.arange(self.size)
        return jax.random.randint(key, (size,), 0, self.size)

    def apply(self, function: Function, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        f = jax.vmap(function)(jnp.arange(self.size))
        product: Any = self.matrix
        if callable(self.matrix):
            return f[batch], product(f)[batch]
        return f[batch], product[batch] @ f

    def truth(self, k: int) -> np.ndarray:
        """The ``k`` largest eigenvalues, descending, by a dense solver.

        Raises:
          ValueError: where the matrix was given as a function.

        Cost: memory ``n²``, and ``4/3 n³`` flops.
        """
        check(not callable(self.matrix), "Matrix: only an array has its eigenvalues computed.")
        return np.linalg.eigvalsh(np.asarray(self.matrix, np.float64))[::-1][:k]


@dataclasses.dataclass(frozen=True, eq=False)
class RectangularMatrix(SampledOperator):
    """A matrix ``K`` from functions of a column's index to functions of a row's.

    Rows weigh ``1/m``, columns ``1/n``, and ``T = sqrt(m/n) K`` so that singular values are those
    of ``K``: ``T g = sqrt(m/n) K g``, ``T* f = sqrt(n/m) K^T f``.

    Args:
      matrix: the entries, ``(m, n)``, or a function of columns ``(n, L)`` that multiplies them.
      transpose: with a function, the one that multiplies columns ``(m, L)`` by ``K^T``.
      shape: with functions, the numbers ``(m, n)`` of rows and columns.
      everything: whether every batch holds all indices once, as for `Matrix`; ``False`` by default.

    Raises:
      ValueError: for an array that is not a matrix, or functions without transpose and shape.

    Cost: ``m + n`` evaluations of the functions, and ``4 m n L`` flops.

    Source: elementary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> matrix = jnp.array([[3.0], [4.0]])
      >>> operator = spectral.operators.RectangularMatrix(matrix, everything=True)
      >>> one, batch = lambda i: jnp.ones(1), operator.sample(jax.random.key(0), 1)
      >>> _, image, g, _ = operator.apply(one, one, batch)
      >>> print((jnp.mean(image**2) / jnp.mean(g**2)).round())  # the singular value, squared
      25.0
    """

    matrix: Any
    transpose: Any = None
    shape: Any = None
    everything: bool = False
    sides: ClassVar[int] = 2

    def __post_init__(self):
        if callable(self.matrix):
            check(
                self.transpose is not None and self.shape is not None,
                "RectangularMatrix: a function came alone; pass transpose and shape with it.",
            )
            _check_adjoint("RectangularMatrix", self.matrix, self.transpose, self.shape)
            return
        a = check_rows("RectangularMatrix", "matrix", self.matrix, 2)
        object.__setattr__(self, "matrix", a)
        object.__setattr__(self, "shape", a.shape)

    @property
    def indices(self) -> tuple[int, ...]:
        return self.shape

    def held_out(self) -> tuple["RectangularMatrix", Any]:
        """All indices once: where the matrix is known whole, so is what is read."""
        m, n = self.shape
        return self, (jnp.arange(m)[None], jnp.arange(n)[None])

    def sample(self, key: jax.Array, size: int, state: Any = None) -> Any:
        """Row and column indices."""
        rows, columns = jax.random.split(key)
        m, n = self.shape
        if self.everything:
            return jnp.arange(m), jnp.arange(n)
        return (
            jax.random.randint(rows, (size,), 0, m),
            jax.random.randint(columns, (size,), 0, n),
        )

    def points(self, batch: Any) -> tuple[Any, ...]:
        return batch

    def apply(self, f: Function, g: Function, batch: Any) -> tuple[jax.Array, ...]:
        (m, n), (rows, columns) = self.shape, batch
        left, right = jax.vmap(f)(jnp.arange(m)), jax.vmap(g)(jnp.arange(n))
        ratio = (m / n) ** 0.5
        product: Any = self.matrix
        if callable(self.matrix):
            forth, back = product(right)[rows], self.transpose(left)[columns]
        else:
            forth, back = product[rows] @ right, product[:, columns].T @ left
        return left[rows], ratio * forth, right[columns], back / ratio


def _check_adjoint(owner: str, product: Any, transpose: Any, shape: Any) -> None:
    """Two random products tell whether one function is the other's transpose."""
    m, n = shape
    one, two = jax.random.split(jax.random.key(0))
    f, g = jax.random.normal(one, (m, 1)), jax.random.normal(two, (n, 1))
    forth, back = product(g), transpose(f)
    check(
        jnp.shape(forth) == (m, 1) and jnp.shape(back) == (n, 1),
        f"{owner}: products of one column have shapes {jnp.shape(forth)} and {jnp.shape(back)}; "
        f"pass functions that give {(m, 1)} and {(n, 1)}.",
    )
    left, right = float(jnp.vdot(f, forth)), float(jnp.vdot(back, g))
    size = float(jnp.linalg.norm(f) * jnp.linalg.norm(forth))
    size = max(size, float(jnp.linalg.norm(back) * jnp.linalg.norm(g)))
    check(
        abs(left - right) <= 1e-3 * size,
        f"{owner}: <f, K g> = {left:.4g} and <K^T f, g> = {right:.4g} differ; pass "
        + ("a symmetric product." if owner == "Matrix" else "the transpose of the same product."),
    )
