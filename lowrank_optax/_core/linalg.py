"""Small dense algebra: pure functions of arrays, one group at a time."""

import dataclasses
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax.core
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core.loops import traced
from lowrank_optax._core.types import Law

_outside: ContextVar[Any] = ContextVar("outside")


def symmetrize(a: jax.Array) -> jax.Array:
    """``(A + A^T) / 2``."""
    return (a + a.T) / 2


def one_by_one(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of arrays, which `jax.vmap` makes a loop on CPU and a batch elsewhere.

    There XLA hands a batch of factorisations to its pool of threads and waits for them in a thread
    of that pool: as many of them at once as there are threads, and all wait for ever.
    """
    single: Any = jax.custom_batching.custom_vmap(f)

    @single.def_vmap
    def batch(size, batched, *arrays):
        arrays = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(arrays, batched, strict=True)
        ]
        if size == 1:
            out = jax.tree.map(lambda x: x[None], single(*(x[0] for x in arrays)))
        elif not traced(arrays):
            out = jax.tree.map(lambda *x: jnp.stack(x), *map(single, *arrays))
        else:
            loop = lambda *arrays: lax.map(lambda each: single(*each), arrays)
            out = lax.platform_dependent(*arrays, cpu=loop, default=jax.vmap(f))
        return out, jax.tree.map(lambda _: True, out)

    return single


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues in descending order and eigenvectors as rows, of a symmetric ``(n, n)``."""
    if a.shape[-1] == 1:  # spares a call of LAPACK or cuSOLVER where one column came
        return a[0], jnp.ones_like(a)
    lam, vectors = _eigh(a)
    return lam[::-1], vectors.T[::-1]


@one_by_one
def _eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.linalg.eigh(a, symmetrize_input=False))


@one_by_one
def qr(a: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of ``(n, k)``."""
    return jnp.linalg.qr(a)[0]


@one_by_one
def thin_qr(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``Q``, ``(n, k)``, and the triangle ``R`` of ``(n, k)``, ``k <= n``."""
    q, r = jnp.linalg.qr(a)
    return q, r


@one_by_one
def inv(a: jax.Array) -> jax.Array:
    """The inverse of ``(n, n)``."""
    return jnp.linalg.inv(a)


@one_by_one
def svd(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values, descending, and left singular vectors as rows, of ``(m, d)``, ``d <= m``."""
    u, s, _ = jnp.linalg.svd(a, full_matrices=False)
    return s, u.T


@one_by_one
def thin_svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``U``, the singular values in descending order, and ``V^T``, of ``(n, d)``."""
    return tuple(jnp.linalg.svd(a, full_matrices=False))


def eigh_by_size(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `eigh`, in descending order of ``|lam|``."""
    lam, vectors = eigh(a)
    order = jnp.argsort(-jnp.abs(lam))
    return lam[order], vectors[order]


def finite(*arrays: jax.Array) -> jax.Array:
    """Whether every entry of every array is finite."""
    top = jnp.stack([_top(a) for a in arrays])
    # In halves, for the reason that `layout._total` gives.
    halves = jnp.max(jnp.reshape(jnp.pad(top, (0, len(top) % 2)), (-1, 2)), axis=0)
    return jnp.isfinite(jnp.maximum(halves[0], halves[1]))


def _top(a: jax.Array) -> jax.Array:
    """The largest ``|a|``, 0 of nothing, in one operation; NaN where there is any."""
    return lax.reduce(jnp.abs(a), jnp.zeros((), a.dtype), lax.max, range(a.ndim))


DRAWS = 2**20
"""Period of counters that random draws depend on: one that stood still would draw the same again.

Counters of so many steps repeat draws when they have ended, and not before.
"""


def tally(counter: jax.Array, n: jax.Array | int = 1, period: jax.Array | int = 1) -> jax.Array:
    """``counter + n``, for ``0 <= n``; a counter without room for it does not overflow.

    It stays within ``max(n, period)`` of its largest value, and its remainder by the period goes on
    as if it had counted.
    """
    n = jnp.asarray(n, counter.dtype)
    room = jnp.iinfo(counter.dtype).max - counter >= n
    return counter + jnp.where(room, n, -(-n % period))


def safe_divide(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where ``b`` is 0; an array ``b`` of fewer axes divides along the last."""
    if 0 < jnp.ndim(b) < jnp.ndim(a):
        b = jnp.expand_dims(b, tuple(range(jnp.ndim(a) - jnp.ndim(b))))
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


Change = jax.Array | tuple[jax.Array | None, ...]
"""A change of basis: ``C``, or factors of a Kronecker product, ``None`` for an identity."""


def transport(law: Law, c: Change, state: Any) -> Any:
    """Moves coordinates by ``C = Q_new^T Q_old`` (``(r, r)``) as their law says.

    Of ``C = C_1 (x) C_2`` it takes the factors, ``(r_i, r_i)``, and never forms it: an elementwise
    power of a Kronecker product is that of its factors. One factor at most may be ``None``.

    Cost: ``2 r^(axes+1)`` flops for each of the ``axes``, with factors ``2 r^axes sum r_i``.
    """
    factors = c if isinstance(c, tuple) else (c,)
    if law.centred:
        mean, second = state
        moved = _along(factors, 1, mean, 0)
        # Averages of different decays may have a mean above the root: the size is LDAdam's way.
        return type(state)(moved, jnp.abs(_along(factors, 2, second - mean**2, 0) + moved**2))
    if law.surrounded:
        inside, outside = state
        apart = outside * jnp.eye(len(inside), dtype=inside.dtype) if law.axes > 1 else outside
        law = dataclasses.replace(law, surrounded=False)
        return type(state)(transport(law, c, inside - apart) + apart, outside)
    for axis in range(law.axes):
        state = _along(factors, law.power, state, axis)
    return state


def _along(factors: tuple[jax.Array | None, ...], power: int, x: jax.Array, axis: int) -> jax.Array:
    """One axis of ``x`` times the elementwise ``power`` of the factors' Kronecker product."""
    x = jnp.moveaxis(x, axis, 0)
    split = jnp.reshape(x, (*(-1 if f is None else f.shape[0] for f in factors), *x.shape[1:]))
    for i, factor in enumerate(factors):
        if factor is not None:
            split = jnp.moveaxis(jnp.tensordot(factor**power, split, axes=(1, i)), 0, i)
    return jnp.moveaxis(jnp.reshape(split, x.shape), 0, axis)


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
    added, away from zero. Never keeps what the dtype cannot tell from zero. NaN, which is what an
    eigenproblem gives that failed, stays: dropped, it would pass for an empty basis.
    """
    failed = jnp.isnan(lam)
    lam = jnp.where(live, jnp.abs(lam) if abs else lam, 0)
    size = jnp.abs(lam)
    top = jnp.max(size, initial=0)
    live = live & (size > jnp.maximum(eig_tol, rounding(lam)) * top)
    if truncate is not None:
        live = live & (jnp.cumsum(live) <= truncate)
    shift = (damping + rdamping * top) * jnp.where(lam < 0, -1, 1)
    return jnp.where(failed, jnp.nan, jnp.where(live, lam + shift, 0)), live | failed


def rounding(lam: jax.Array) -> float:
    """The share of the largest of the eigenvalues ``(r,)`` that their dtype cannot tell from 0."""
    return float(jnp.finfo(lam.dtype).eps) * lam.shape[-1] ** 0.5


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
    return (vectors.T * powers[None]) @ vectors


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
    inverse = _cholesky_inverse(gram * scale[:, None] * scale[None] + jnp.diag(fill))
    return jnp.where(live[:, None], inverse * scale[None], 0)


@one_by_one
def _cholesky_inverse(a: jax.Array) -> jax.Array:
    factor, eye = jnp.linalg.cholesky(a), jnp.eye(len(a), dtype=a.dtype)
    return jax.scipy.linalg.solve_triangular(factor, eye, lower=True)


def times(x: jax.Array, y: jax.Array, mirrored: str = "") -> jax.Array:
    """``x y`` of matrices ``(..., a, b)`` and ``(..., b, c)``; ``mirrored`` names the transposed.

    As a product of two arrays of three axes, which is one that libraries have: for others, and for
    transposes, XLA compiles loops.
    """
    flat = lambda z: jnp.reshape(z, (math.prod(z.shape[:-2]), *z.shape[-2:]))
    over = (2 - ("x" in mirrored),), (1 + ("y" in mirrored),)
    z = lax.dot_general(flat(x), flat(y), (over, ((0,), (0,))))
    return jnp.reshape(z, (*x.shape[:-2], *z.shape[-2:]))


def diagonal(a: jax.Array) -> jax.Array:
    """The diagonals ``(..., n)`` of ``(..., n, n)``, by sums: indices compile for longer."""
    on = jnp.eye(a.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(jnp.expand_dims(on, range(a.ndim - 2)), a, 0), axis=-1)


def norm(x: jax.Array) -> jax.Array:
    """``‖x‖_F`` of entries whose squares may be out of range."""
    top = _top(x)
    return top * jnp.linalg.norm(safe_divide(x, top))


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
    n = (g @ v.T) * root[None]  # g rho^T = N E with orthonormal rows E
    size, u = eigh(symmetrize(n.T @ n))
    s = jnp.sqrt(jnp.maximum(size, 0))
    left = safe_divide(n @ u.T, s)
    right = u @ safe_divide(v @ rho.T, root[:, None])
    theta = angle(s)
    return (
        rows
        + (left * (jnp.cos(theta) - 1)[None]) @ (left.T @ rows)
        + (left * jnp.sin(theta)[None]) @ right
    )
