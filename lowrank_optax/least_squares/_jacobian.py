"""The residuals' Jacobian in the units of a step: decomposed once, solved for every damping."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.loops import for_range, while_loop

SMALL = 256
"""The shorter side up to which a Jacobian is decomposed by its singular values without ado."""


class Solver(NamedTuple):
    """What a step asks of the Jacobian ``J`` in its units.

    Attributes:
      top: the largest squared singular value.
      solve: ``(mu, y) -> (J^T J + mu I)^{-1} J^T y``, from ``(k,)`` to ``(d,)``.
    """

    top: jax.Array
    solve: Callable[[jax.Array, jax.Array], jax.Array]


def dense(j: jax.Array, middle: Callable[[jax.Array], jax.Array]) -> Solver:
    """A Jacobian ``(k, d)`` that is there.

    Its singular values cost several times the Gram matrix of its shorter side and the eigenvalues
    of that. The Gram matrix has lost what is below ``sqrt(eps)`` of the largest singular value:
    it serves while dampings lie above ``eps`` of the largest eigenvalue, where its rounding hardly
    changes a step.

    Args:
      j: the Jacobian in the units of the step.
      middle: from the largest squared singular value to the damping in the middle of the trials.
    """
    if min(j.shape) <= SMALL:
        u, s, v = linalg.thin_svd(j)
        top = jnp.max(s) ** 2
        return Solver(top, lambda mu, y: (linalg.safe_divide(s, s**2 + mu) * (y @ u)) @ v)
    wide = j.shape[0] <= j.shape[1]
    lam, vectors = linalg.eigh(j @ j.T if wide else j.T @ j)
    lam = jnp.maximum(lam, 0)
    top, eps = lam[0], jnp.finfo(j.dtype).eps

    # Both ways are ``y -> y A diag(g) B C``, or ``y A B diag(g) C`` where ``J`` is tall.
    def by_gram(_):
        parts = (vectors.T, vectors, j) if wide else (j, vectors.T, vectors)
        return jnp.ones_like(lam), lam, *parts

    def by_svd(_):
        q, triangle = linalg.thin_qr(j.T if wide else j)
        u, s, v = linalg.thin_svd(triangle.T if wide else triangle)
        return s, s**2, *((u, v, q.T) if wide else (q, u, v))

    coarse = middle(top) > 16 * eps * top
    numerator, squares, a, b, c = lax.cond(coarse, by_gram, by_svd, None)

    def solve(mu: jax.Array, y: jax.Array) -> jax.Array:
        factors = linalg.safe_divide(numerator, squares + mu)
        if wide:
            return ((factors * (y @ a)) @ b) @ c
        return (factors * ((y @ a) @ b)) @ c

    return Solver(top, solve)


class Space(NamedTuple):
    """Orthonormal directions and what the Jacobian makes of them: ``W J^T = L U``.

    Attributes:
      w: rows ``(m, d)``, orthonormal or zero.
      u: rows ``(m, k)``, orthonormal over all devices or zero.
      lower: the triangle ``L``, ``(m, m)``.
    """

    w: jax.Array
    u: jax.Array
    lower: jax.Array


def absorb(space: Space, i: jax.Array, w: jax.Array, push: Callable, total: Callable) -> Space:
    """Takes the direction ``w``, ``(d,)``, into row ``i``; nothing where the space holds it."""
    eps = jnp.finfo(w.dtype).eps
    length = jnp.linalg.norm(w)
    for _ in range(2):  # once leaves what cancellation makes of rounding
        w = w - (space.w @ w) @ space.w
    rest = jnp.linalg.norm(w)
    w = jnp.where(rest > 16 * eps * length, linalg.safe_divide(w, rest), 0)
    z = push(w)
    length = jnp.sqrt(total(jnp.vdot(z, z)))
    row = jnp.zeros(space.lower.shape[0], w.dtype)
    for _ in range(2):
        h = total(space.u @ z)
        z, row = z - h @ space.u, row + h
    rest = jnp.sqrt(total(jnp.vdot(z, z)))
    new = rest > 16 * eps * length
    row = row.at[i].set(jnp.where(new, rest, 0))
    return Space(
        space.w.at[i].set(w),
        space.u.at[i].set(jnp.where(new, linalg.safe_divide(z, rest), 0)),
        space.lower.at[i].set(row),
    )


def by_products(
    push: Callable[[jax.Array], jax.Array],
    pull: Callable[[jax.Array], jax.Array],
    total: Callable[[jax.Array], jax.Array],
    r: jax.Array,
    start: jax.Array,
    more: int,
    sound: jax.Array,
) -> tuple[Solver, jax.Array, jax.Array]:
    """The best damped steps in a space that products alone have found.

    The space holds the directions ``start`` and ``more`` of the bidiagonalisation of Golub and
    Kahan that LSMR and LSQR run, deflated by these: the gradient ``J^T r`` first, then ``J^T`` of
    what no step in the space takes from ``r``. It does not depend on the damping. One small
    decomposition ``L = A diag(s) B^T`` serves all of them.

    Args:
      push: ``J v``, from ``(d,)`` to this device's ``(k,)``.
      pull: ``J^T w``, summed over all devices.
      total: the sum over the devices.
      r: this device's residuals, ``(k,)``.
      start: directions ``(n, d)``, of which those that are zero are left out.
      more: the largest number of further directions.
      sound: whether anything is to be done.

    Returns:
      The solver; the right singular vectors in the space as rows ``(n + more, d)``, the largest
      singular value first; and the number of products.
    """
    n, d = start.shape
    m = n + more
    space = Space(*(jnp.zeros(shape, r.dtype) for shape in ((m, d), (m, r.size), (m, m))))
    space = for_range(0, n, lambda i, space: absorb(space, i, start[i], push, total), space)
    slope = pull(r)
    least = 16 * jnp.finfo(r.dtype).eps * jnp.linalg.norm(slope)

    def step(carry):
        i, space, slope = carry
        space = absorb(space, i, slope, push, total)
        left = r - total(space.u @ r) @ space.u
        return i + 1, space, pull(left)

    go = lambda carry: (carry[0] < m) & sound & (jnp.linalg.norm(carry[2]) > least)
    i, space, _ = while_loop(go, step, (jnp.int32(n), space, slope))
    left, s, right = linalg.thin_svd(jnp.where(sound, space.lower, 0))  # L = left diag(s) right
    u, w = right @ space.u, left.T @ space.w
    top = jnp.max(s) ** 2

    def solve(mu: jax.Array, y: jax.Array) -> jax.Array:
        return (linalg.safe_divide(s, s**2 + mu) * total(u @ y)) @ w

    return Solver(top, solve), w, n + 1 + 2 * (i - n)
