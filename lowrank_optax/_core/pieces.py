"""Which leaves of a tree are joined: small ones, since XLA compiles work on every array anew."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

SMALL = 2**16
"""The largest leaf that is joined with others: what joining copies is little beside the rows."""

WHOLE = 2**18
"""The largest piece that leaves are joined into."""

DEVICES = 32
"""Leaves that are joined can be split over as many devices, up to this number, as each alone."""


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
        kind = label, math.gcd(size, DEVICES)
        at = last.get(kind) if joined and size <= SMALL else None
        if at is not None and sum(math.prod(shapes[j]) for j in pieces[at]) + size <= WHOLE:
            pieces[at].append(i)
            continue
        if size <= SMALL:
            last[kind] = len(pieces)
        pieces.append([i])
    return tuple(map(tuple, pieces))
