"""Which leaves of a tree are joined: small ones, since XLA compiles work on every array anew."""

import math
from collections.abc import Sequence
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

SMALL = 2**16
"""The largest leaf that is joined with others: what joining copies is little beside the rows."""

WHOLE = 2**18
"""The largest piece that leaves are joined into."""

DEVICES = 32
"""Leaves that are joined can be split over as many devices, up to this number, as each alone.

So each is cut into so many shares, if it can be, and a piece has the first share of all its leaves,
then the second: on several devices each joins what it has.
"""


def shares(size: int) -> int:
    """How many equal shares a leaf in a piece is cut into."""
    return math.gcd(size, DEVICES)


def joined(flat: Sequence[jax.Array]) -> jax.Array:
    """Flat leaves ``(..., leaf.size)`` as a piece ``(..., size)``."""
    head, k = flat[0].shape[:-1], shares(flat[0].shape[-1])
    parts = [jnp.reshape(x, (*head, k, x.shape[-1] // k)) for x in flat]
    return jnp.reshape(jnp.concatenate(parts, axis=-1), (*head, sum(x.shape[-1] for x in flat)))


def parted(piece: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """A piece as flat leaves of the ``sizes``: the inverse of `joined`."""
    head, k = piece.shape[:-1], shares(sizes[0])
    side_by_side = jnp.reshape(piece, (*head, k, sum(sizes) // k))
    parts = jnp.split(side_by_side, np.cumsum(sizes)[:-1] // k, axis=-1)
    return [jnp.reshape(x, (*head, n)) for x, n in zip(parts, sizes, strict=True)]


def widest_of(pieces: Sequence[Sequence[int]], dtypes: Sequence[Any]) -> tuple[Any, ...]:
    """Of the dtypes of a piece's leaves the one that holds them all, for every piece."""
    return tuple(jnp.result_type(*(dtypes[i] for i in piece)) for piece in pieces)


def pieces_of(
    labels: Sequence[Any], shapes: Sequence[Any], joined: bool
) -> tuple[tuple[int, ...], ...]:
    """The places of the leaves of every piece: each leaf alone, or small ones of a group joined.

    It depends on shapes alone, not on dtypes or devices, so that a state fits whatever it meets.
    """
    pieces: list[list[int]] = []
    last: dict[Any, int] = {}
    for i, (label, shape) in enumerate(zip(labels, shapes, strict=True)):
        size = math.prod(shape)
        kind = label, shares(size)
        at = last.get(kind) if joined and size <= SMALL else None
        if at is not None and sum(math.prod(shapes[j]) for j in pieces[at]) + size <= WHOLE:
            pieces[at].append(i)
            continue
        if size <= SMALL:
            last[kind] = len(pieces)
        pieces.append([i])
    return tuple(map(tuple, pieces))
