"""A side of a matrix as its leading directions and one eigenvalue for all others: spike and flat.

A gradient ``G`` of shape ``(a, b)`` falls into four parts, by what the two sides hold of it:

    inside  Q_S^T G Q_L            right   Q_S^T G (I - Q_L Q_L^T)
    below   (I - Q_S Q_S^T) G Q_L  corner  (I - Q_S Q_S^T) G (I - Q_L Q_L^T)

A complete side leaves nothing outside; a side without directions holds nothing. Directions follow
by matrix products alone: one simultaneous Jacobi rotation among themselves, one step of orthogonal
iteration towards what is outside. Arrays have leading axes of ``n`` groups and of the ``m``
matrices that share a group's sides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.linalg import diagonal, times

FLOOR = 1e-6
"""The smallest eigenvalue that a side counts with, relative to its mean."""

REACH = 0.5
"""The largest norm of one rotation, in radians."""


class Side(NamedTuple):
    """One side of ``n`` groups of matrices.

    Attributes:
      directions: orthonormal columns ``Q``, ``(n, d, r)``.
      moments: average second moment along them, ``(n, r, r)``: diagonal but for what the last
        rotation left.
      rest: average eigenvalue of all other directions, ``(n,)``; 0 where there are none.
    """

    directions: jax.Array
    moments: jax.Array
    rest: jax.Array

    @property
    def complete(self) -> bool:
        """Whether nothing lies outside."""
        return self.directions.shape[1] == self.directions.shape[2]

    @property
    def lam(self) -> jax.Array | None:
        """Eigenvalues along the directions, the largest first, ``(n, r)``, if there are any."""
        along = diagonal(self.moments)
        return jnp.sort(along, axis=1, descending=True) if along.shape[1] else None

    @property
    def eigenvalues(self) -> tuple[jax.Array, jax.Array]:
        """``(n, r)`` along the directions and ``(n, 1)`` outside, with a floor of their mean."""
        _, d, r = self.directions.shape
        along = diagonal(self.moments)
        mean = (jnp.sum(along, axis=1) + (d - r) * self.rest) / d
        least = FLOOR * mean + jnp.finfo(mean.dtype).tiny
        return along + least[:, None], (self.rest + least)[:, None]


class Split(NamedTuple):
    """Matrices by what two sides hold of them; ``None`` for parts that a complete side empties.

    Attributes:
      inside: coordinates along both sides' directions, ``(n, m, r, s)``.
      right: along those of the short side, outside of the long one, ``(n, m, r, b)``.
      below: along those of the long side, outside of the short one, ``(n, m, a, s)``.
      corner: outside of both, ``(n, m, a, b)``.
    """

    inside: jax.Array
    right: jax.Array | None
    below: jax.Array | None
    corner: jax.Array | None


def start(n: int, d: int, rank: int, key: jax.Array, dtype) -> Side:
    """The axes for a complete side, random directions for any other."""
    if rank >= d:
        directions = jnp.broadcast_to(jnp.eye(d, dtype=dtype), (n, d, d))
    else:
        directions = jnp.linalg.qr(jax.random.normal(key, (n, d, rank), dtype))[0]
    size = directions.shape[2]
    zeros = jnp.zeros((n, size, size), dtype)
    return Side(jnp.array(directions), zeros, jnp.zeros(n, dtype))


def split(short: Side, long: Side, x: jax.Array) -> Split:
    """The parts of ``x``, ``(n, m, a, b)``."""
    m = x.shape[1]
    q, p = _each(short, m), _each(long, m)
    rows = times(q, x, "x")
    inside = times(rows, p)
    right = None if long.complete else rows - times(inside, p, "y")
    if short.complete:
        return Split(inside, right, None, None)
    below = times(x, p) - times(q, inside)
    if long.complete:
        return Split(inside, None, below, None)
    return Split(inside, right, below, x - (times(q, rows) + times(below, p, "y")))


def sizes(short: Side, long: Side, parts: Split) -> jax.Array:
    """Coordinates ``(n, m, r + 1, s + 1)``: those inside, and root mean squares of what is outside.

    A complete side has no further row or column.
    """
    (_, a, r), (_, b, s) = short.directions.shape, long.directions.shape
    rms = lambda x, axes, count: jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True) / count)
    grid = parts.inside
    if parts.right is not None:
        grid = jnp.concatenate([grid, rms(parts.right, 3, b - s)], axis=3)
    if parts.below is None:
        return grid
    last = rms(parts.below, 2, a - r)
    if parts.corner is not None:
        last = jnp.concatenate([last, rms(parts.corner, (2, 3), (a - r) * (b - s))], axis=3)
    return jnp.concatenate([grid, last], axis=2)


def joined(short: Side, long: Side, parts: Split, u0: jax.Array, u: jax.Array) -> jax.Array:
    """The matrices whose coordinates, which were ``u0``, are ``u``: the inverse of `split`.

    What is outside is multiplied as its root mean square was.
    """
    m = u.shape[1]
    q, p = _each(short, m), _each(long, m)
    r, s = q.shape[3], p.shape[3]
    factor = jnp.where(u0 == 0, 0, u / jnp.where(u0 == 0, 1, u0))
    rows = times(u[:, :, :r, :s], p, "y")
    if parts.right is not None:
        rows = rows + factor[:, :, :r, s:] * parts.right
    x = times(q, rows)
    if parts.below is not None:
        x = x + times(factor[:, :, r:, :s] * parts.below, p, "y")
    if parts.corner is not None:
        x = x + factor[:, :, r:, s:] * parts.corner
    return x


def turned(short: Side, long: Side, parts: Split, decay: jax.Array, crosswise: bool) -> tuple:
    r"""Both sides after they took the parts of a gradient in.

    With ``L`` and ``R`` the sides as they were (``crosswise``), else identities:

    .. math:: L \leftarrow \beta L + (1-\beta)\,\tfrac1b G R^{-1} G^T,\quad
              R \leftarrow \beta R + (1-\beta)\,\tfrac1a G^T L^{-1} G

    Args:
      short: the side of columns, of length ``a``.
      long: the side of rows, of length ``b``.
      parts: of the gradient.
      decay: ``beta``, ``(n,)``.
      crosswise: whether each side sees the gradient whitened by the other one.
    """
    ones = lambda side: tuple(map(jnp.ones_like, side.eigenvalues))
    first, second = (side.eigenvalues if crosswise else ones(side) for side in (short, long))
    mirrored = Split(parts.inside, parts.below, parts.right, parts.corner)
    return (
        _turned(short, parts, second, long.directions.shape[1], decay, False),
        _turned(long, mirrored, first, short.directions.shape[1], decay, True),
    )


def _turned(side: Side, parts: Split, other, length: int, decay: jax.Array, across: bool) -> Side:
    """The side of columns after it took the parts in, whitened by the other side's eigenvalues.

    Args:
      side: the side.
      parts: of the gradient, by what this side and the other one hold of it.
      other: the other side's eigenvalues, along its directions ``(n, s)`` and outside ``(n, 1)``.
      length: the other side's.
      decay: of the averages, ``(n,)``.
      across: whether it is the side of rows. Then all parts are read as their transposes, which
        products do at no cost.
    """
    q = side.directions
    _, d, r = q.shape
    count = parts.inside.shape[1] * length
    by = lambda lam: lam[:, None, :, None] if across else lam[:, None, None, :]

    def summed(x: jax.Array, y: jax.Array) -> jax.Array:
        """``x y^T`` over a group's matrices."""
        return jnp.sum(times(x, y, "x" if across else "y"), axis=1)

    inside = parts.inside / by(other[0])
    moments = summed(inside, parts.inside)
    if parts.right is not None:
        right = parts.right / by(other[1])
        moments = moments + summed(right, parts.right)
    mix = lambda old, new: decay.reshape(-1, *[1] * (old.ndim - 1)) * (old - new) + new
    moments, rest = mix(side.moments, moments / count), side.rest
    if parts.below is not None:
        outer = jnp.sum(parts.below**2 / by(other[0]), axis=(1, 2, 3))
        towards = summed(parts.below, inside)
        if parts.corner is not None:
            outer = outer + jnp.sum(parts.corner**2, axis=(1, 2, 3)) / other[1][:, 0]
            towards = towards + summed(parts.corner, right)
        rest = mix(rest, outer / count / (d - r))
        if r:
            lam = Side(q, moments, rest).eigenvalues[0][:, None]
            step = (1 - decay)[:, None, None] * towards / count / lam
            q = orthonormal(orthonormal(q + _short(step)))
    if r:
        turn = rotation(moments)
        q = orthonormal(times(q, turn))
        moments = times(times(turn, moments, "x"), turn)
    return Side(q, moments, rest)


def _each(side: Side, m: int) -> jax.Array:
    """The directions for each of a group's ``m`` matrices, ``(n, m, d, r)``."""
    n, d, r = side.directions.shape
    return jnp.broadcast_to(side.directions[:, None], (n, m, d, r))


def rotation(moments: jax.Array) -> jax.Array:
    """One rotation ``T``, ``(n, r, r)``, after which ``T^T moments T`` is more nearly diagonal.

    All pairs turn at once by the angles of Jacobi's method, which are right to first order, the sum
    cut to `REACH`. ``T`` is orthogonal but for terms of the fifth order.
    """
    size = moments.shape[1]
    along = diagonal(moments)
    gap = along[:, None, :] - along[:, :, None]
    order = (jnp.arange(size)[:, None] - jnp.arange(size)[None])[None]
    # Of two equal moments the sign of the angle is that of their order.
    gap = jnp.where(gap == 0, order * jnp.finfo(gap.dtype).tiny, gap)
    angles = jnp.where(order == 0, 0, 0.5 * jnp.arctan(2 * moments / gap))
    square = times(angles, angles)
    cut = _cut(jnp.sqrt(jnp.linalg.norm(square, axis=(1, 2))))
    angles, square = cut * angles, cut**2 * square
    eye = jnp.eye(size, dtype=moments.dtype)[None]
    # (I + K)(I + K²/2): one Newton-Schulz step from I + K, since (I + K)^T (I + K) = I - K².
    return times(eye + angles, eye + square / 2)


def orthonormal(q: jax.Array) -> jax.Array:
    """One Newton-Schulz step of columns ``(n, d, r)`` towards orthonormal ones, to second order."""
    return 1.5 * q - 0.5 * times(q, times(q, q, "x"))


def _short(step: jax.Array) -> jax.Array:
    """A step of the directions, cut to `REACH`."""
    gram = times(step, step, "x")
    return _cut(jnp.sqrt(jnp.linalg.norm(gram, axis=(1, 2)))) * step


def _cut(norm: jax.Array) -> jax.Array:
    """What brings a norm to `REACH` if it is larger."""
    return (REACH / jnp.maximum(norm, REACH))[:, None, None]
