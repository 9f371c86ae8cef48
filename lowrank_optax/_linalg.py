"""Small dense algebra: pure functions of arrays, one group at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._types import Law


def symmetrize(a: jax.Array) -> jax.Array:
    """``(A + A^T) / 2``."""
    return (a + a.T) / 2


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues in descending order and eigenvectors as rows, of a symmetric ``(n, n)``."""
    if a.shape[-1] == 1:  # spares a call of LAPACK or cuSOLVER where one column came
        return a[0], jnp.ones_like(a)
    lam, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return lam[::-1], vectors.T[::-1]


def eigh_by_size(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `eigh`, in descending order of ``|lam|``."""
    lam, vectors = eigh(a)
    order = jnp.argsort(-jnp.abs(lam))
    return lam[order], vectors[order]


def finite(*arrays: jax.Array) -> jax.Array:
    """Whether every entry of every array is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in arrays]))


def safe_divide(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where ``b`` is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def transport(law: Law, c: jax.Array, state: Any) -> Any:
    """Moves coordinates by ``C = Q_new^T Q_old`` (``(r, r)``) as their law says.

    Cost: ``2 r^(axes+1)`` flops for each of the ``axes``.
    """
    if law.centred:
        mean, second = state
        moved = c @ mean
        return type(state)(moved, (c * c) @ jnp.maximum(second - mean**2, 0) + moved**2)
    c = c**law.power
    for axis in range(law.axes):
        state = jnp.moveaxis(jnp.tensordot(c, state, axes=(1, axis)), 0, axis)
    return state


def regularize(
    lam: jax.Array,
    live: jax.Array,
    *,
    eig_tol: float = 0.0,
    damping: float = 0.0,
    rdamping: float = 0.0,
    abs: bool = False,
    truncate: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Drops, then damps eigenvalues ``(r,)`` given in descending order of size.

    With ``abs`` they lose their signs; of what is live the ``truncate`` largest remain, and of
    those the ones above ``eig_tol * max|lam|``; the rest get ``damping + rdamping * max|lam|``
    added, away from zero. Never keeps what the dtype cannot tell from zero.
    """
    lam = jnp.where(live, jnp.abs(lam) if abs else lam, 0)
    size = jnp.abs(lam)
    top = jnp.max(size, initial=0)
    floor = jnp.finfo(lam.dtype).eps * lam.shape[0] ** 0.5
    live = live & (size > jnp.maximum(eig_tol, floor) * top)
    if truncate is not None:
        live = live & (jnp.cumsum(live) <= truncate)
    shift = (damping + rdamping * top) * jnp.where(lam < 0, -1, 1)
    return jnp.where(live, lam + shift, 0), live


def matrix_power(
    a: jax.Array,
    power: float,
    *,
    eig_tol: float = 1e-12,
    damping: float = 1e-8,
    rdamping: float = 1e-8,
    abs: bool = False,
) -> jax.Array:
    """``A^power`` of a symmetric ``(r, r)``, on its regularised eigenvalues (see `regularize`).

    Cost: one ``eigh``, about ``9 r^3`` flops.
    """
    lam, vectors = eigh(symmetrize(a))
    lam, live = regularize(
        lam,
        jnp.ones(lam.shape, bool) if abs else lam > 0,
        eig_tol=eig_tol,
        damping=damping,
        rdamping=rdamping,
        abs=abs,
    )
    powers = jnp.where(live, jnp.where(live, lam, 1) ** power, 0)
    return (vectors.T * powers) @ vectors


def orthonormalize(t: jax.Array, gram: jax.Array) -> jax.Array:
    """One Newton-Schulz step towards ``T G T^T = I`` for nearly orthonormal rows; zero rows stay.

    The error is squared: ``e -> 3/4 e²``. Cost: ``2 r m (m + 2r)`` flops for ``(r, m)`` rows.
    """
    return 1.5 * t - 0.5 * (t @ gram @ t.T) @ t


def cholesky_inverse(gram: jax.Array, shift: float = 0.0) -> jax.Array:
    """``T = L^{-1}`` with ``L L^T = G``, so that ``T G T^T = I``; zero rows of ``G`` stay zero.

    ``G``, ``(r, r)``, is scaled to unit diagonal first; then ``shift * r * eps`` is added to it.
    """
    r = gram.shape[0]
    scale = safe_divide(1.0, jnp.sqrt(jnp.diagonal(gram)))
    live = scale > 0
    fill = jnp.where(live, shift * r * jnp.finfo(gram.dtype).eps, 1)
    factor = jnp.linalg.cholesky(gram * scale[:, None] * scale + jnp.diag(fill))
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(r, dtype=gram.dtype), lower=True)
    return jnp.where(live[:, None], inverse * scale, 0)


def unit(x: jax.Array) -> jax.Array:
    """``x / ‖x‖``, and 0 for 0."""
    return safe_divide(x, jnp.linalg.norm(x))


def orthonormalize_rows(a: jax.Array) -> jax.Array:
    """Rows ``(r, m)`` orthonormalised from the first on, for conditions up to 1e3 in float32.

    CholeskyQR2: ``A <- L^{-1} A`` with ``A A^T = L L^T``, twice, because once leaves an error that
    grows with the square of the condition number. Zero rows stay; other dependent ones give NaN.
    Cost: ``4 r² m`` flops.
    """
    for _ in range(2):
        a = cholesky_inverse(a @ a.T) @ a
    return a


def lean(
    rows: jax.Array, g: jax.Array, rho: jax.Array, angle: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    r"""Orthonormal rows ``(r, m)`` turned along the tangent ``g rho^T = U diag(s) V^T``.

    .. math:: A + U (\cos\theta - 1) U^T A + U \sin\theta\, V^T, \quad \theta = angle(s)

    The angle ``s`` itself is Grassmann's geodesic; ``arctan(s)`` gives the polar factor of
    ``A + g rho^T``, its closest orthonormal rows. ``g`` is ``(r, k)``; the columns ``rho``,
    ``(m, k)``, have to be orthogonal to the rows. Cost: ``8 r m k`` flops, two ``eigh`` of size
    ``k``.
    """
    size, v = eigh(symmetrize(rho.T @ rho))
    root = jnp.sqrt(jnp.maximum(size, 0))
    n = (g @ v.T) * root  # g rho^T = N E with orthonormal rows E
    size, u = eigh(symmetrize(n.T @ n))
    s = jnp.sqrt(jnp.maximum(size, 0))
    left = safe_divide(n @ u.T, s)
    right = u @ safe_divide(v @ rho.T, root[:, None])
    theta = angle(s)
    return rows + (left * (jnp.cos(theta) - 1)) @ (left.T @ rows) + (left * jnp.sin(theta)) @ right
