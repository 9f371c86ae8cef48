"""Rounding to rows of 16 bits that keeps, on average, updates smaller than what they resolve."""

from typing import Any

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: Any, at: jax.Array, salt: jax.Array) -> jax.Array:
    """``x``, ``(m, width)``, rounded up or down at random so that its mean is ``x``.

    Rounding to the nearest would lose every update below half a unit in the last place, however
    many there are. Draws are a hash of row, column ``at`` and ``salt``, so that they do not depend
    on how the columns are divided. Dtypes of 32 bits and more are rounded to the nearest.
    """
    if jnp.finfo(dtype).bits >= 32:
        return x.astype(dtype)
    near = x.astype(dtype)
    rest = x - near.astype(x.dtype)
    other = jnp.nextafter(near, jnp.where(rest > 0, jnp.inf, -jnp.inf).astype(dtype))
    gap = jnp.abs(other.astype(x.dtype) - near.astype(x.dtype))
    chance = jnp.where(gap > 0, jnp.abs(rest) / jnp.where(gap > 0, gap, 1), 0)
    return jnp.where(_uniform(x.shape[0], at, salt) < chance, other, near)


def _uniform(rows: int, at: jax.Array, salt: jax.Array) -> jax.Array:
    """Numbers in [0, 1), ``(rows, width)``: MurmurHash3's finaliser over row, column and salt."""
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1)
    bits = row ^ (at.astype(jnp.uint32)[None] * jnp.uint32(0x85EBCA77))
    bits = bits ^ (salt.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float32) / 2.0**32
