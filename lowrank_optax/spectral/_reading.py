"""What is read from moments: rotations of a span, quotients, errors, and which modes were found."""

from typing import Any

import jax
import numpy as np

from lowrank_optax.spectral.methods import SideMoments

Sides = tuple[SideMoments, ...]
"""Moments of every side; arrays of numpy."""

LOOSE = 0.1
"""The largest error of a mode that counts as found, as a part of its eigenvalue."""

ROUNDING = 2 * float(np.finfo(np.float32).eps) ** 0.5
"""The least residual, as a part of the eigenvalue, that moments in float32 can tell from 0."""

LEAST = 0.05
"""The part of the largest eigenvalue below which an eigenvalue is no measure of its own error."""


def mean(moments: Sides) -> Sides:
    """The means over the batches."""
    return jax.tree.map(lambda a: a.mean(0), moments)


def turned(sides: Sides, rotation: tuple[np.ndarray, ...]) -> Sides:
    """The moments of rotated functions; images of a side carry the other side's rotation."""
    found = []
    for side, own, other in zip(sides, rotation, rotation[::-1], strict=True):
        gram, cross, image = own.T @ side.gram @ own, own.T @ side.cross @ other, other.T
        found.append(SideMoments(gram, cross, image @ side.image @ other))
    return tuple(found)


def quotients(sides: Sides) -> np.ndarray:
    """``<f, T f> / ‖f‖²``, or ``<f, T g> / (‖f‖ ‖g‖)`` with two sides, ``(L,)``."""
    norms = np.sqrt(np.diagonal(sides[0].gram) * np.diagonal(sides[-1].gram))
    return np.diagonal(sides[0].cross) / np.where(norms > 0, norms, 1)


def ritz_rotation(sides: Sides) -> tuple[np.ndarray, ...]:
    """``W`` of every side, ``(L, L)``, that diagonalises the operator in the span.

    Where outputs depend on each other, columns of zeros take the last places.
    """
    if not all(np.isfinite(x).all() for side in sides for x in side):
        return raw_rotation(sides)  # the start of a fit that is about to be refused
    whiten = [_whitening(side.gram) for side in sides]
    between = whiten[0].T @ sides[0].cross @ whiten[-1]
    if len(sides) == 1:
        values, vectors = np.linalg.eigh((between + between.T) / 2)
        turns = [vectors[:, np.argsort(-values)]]
    else:
        u, _, vt = np.linalg.svd(between, full_matrices=False)
        turns = [u, vt.T]
    modes = len(sides[0].gram)
    rotation = [w @ turn for w, turn in zip(whiten, turns, strict=True)]
    return tuple(np.pad(r, ((0, 0), (0, modes - r.shape[1]))) for r in rotation)


def raw_rotation(sides: Sides) -> tuple[np.ndarray, ...]:
    """``W`` of every side that orders and normalises the outputs and does not mix them."""
    sizes = [np.sqrt(np.diagonal(side.gram)) for side in sides]
    inverse = [np.divide(1.0, s, out=np.zeros_like(s), where=s > 0) for s in sizes]
    with np.errstate(invalid="ignore"):  # the start of a fit that is about to be refused
        values = np.diagonal(sides[0].cross) * inverse[0] * inverse[-1]
    if len(sides) == 2:
        inverse[1] = np.where(values < 0, -inverse[1], inverse[1])
        values = np.abs(values)
    order = np.argsort(-values, kind="stable")
    return tuple(np.diag(scale)[:, order] for scale in inverse)


def in_order(rotation: tuple[np.ndarray, ...], sides: Sides) -> tuple[np.ndarray, ...]:
    """The rotation with its modes in descending order of their values, empty ones last."""
    values = quotients(turned(sides, rotation))
    empty = ~rotation[0].any(axis=0)
    order = np.argsort(np.where(empty, np.inf, -values), kind="stable")
    return tuple(r[:, order] for r in rotation)


def sampling(moments: Sides, rotation: tuple[np.ndarray, ...]) -> np.ndarray:
    """The jackknife's standard errors of the quotients over batches; ``nan`` for one batch."""
    count = len(moments[0].gram)
    if count < 2:
        return np.full(moments[0].gram.shape[-1], np.nan)
    total = mean(moments)
    values = []
    for i in range(count):
        without = jax.tree.map(
            lambda whole, each, i=i: (count * whole - each[i]) / (count - 1), total, moments
        )
        values.append(quotients(turned(without, rotation)))
    deviations = np.stack(values) - np.mean(values, 0)
    return np.sqrt((count - 1) * np.mean(deviations**2, 0))


def residuals(sides: Sides) -> np.ndarray:
    """``‖T f - lam f‖`` of rotated modes; with two sides the root mean square of both."""
    # ‖T f‖² - lam² for f of norm one, since lam is the quotient.
    images = [
        np.diagonal(side.image) * _inverse(np.diagonal(other.gram))
        for side, other in zip(sides, sides[::-1], strict=True)
    ]
    return np.sqrt(np.maximum(np.mean(images, 0) - quotients(sides) ** 2, 0))


def moved(history: tuple[dict[str, Any], ...], values: np.ndarray, step: int) -> np.ndarray:
    """How far every value is from the one read at half the steps or before; ``nan`` if unknown.

    What falls like ``1/t`` is as far from its end as from its value at half the time, and what
    falls faster is nearer to its end.
    """
    earlier = [r for r in history if 2 * r["step"] <= step]
    if not earlier or len(earlier[-1]["eigenvalues"]) != len(values):
        return np.full(len(values), np.nan)
    return np.abs(np.sort(earlier[-1]["eigenvalues"])[::-1] - np.sort(values)[::-1])


def found(
    values: np.ndarray, errors: np.ndarray, drift: np.ndarray, live: np.ndarray, least: float
) -> np.ndarray:
    """Which modes are above ``least``, known to a tenth, and no longer on their way."""
    known = np.where(np.isnan(errors), 0, errors)
    above = values - 2 * known > least if np.isfinite(least) else np.isfinite(values)
    size = np.maximum(np.abs(values), LEAST * np.abs(values[live]).max(initial=0))
    return live & above & (known <= LOOSE * size) & ~(drift > LOOSE * size)


def score(sides: Sides, seen: Sides, rotation: tuple[np.ndarray, ...]) -> float:
    r"""How much of the operator a model of rank ``L`` explains on moments that it has not seen.

    .. math:: \|T\|^2 - \|T - \sum_l s_l f_l g_l^T\|^2 = 2 \sum_l s_l <f_l, T g_l>
              - \sum_{lm} s_l s_m <f_l, f_m> <g_l, g_m>
    """
    sizes, at = quotients(turned(seen, rotation)), turned(sides, rotation)
    explained = 2 * sizes @ np.diagonal(at[0].cross)
    return float(explained - sizes @ (at[0].gram * at[-1].gram) @ sizes)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)


def _whitening(gram: np.ndarray) -> np.ndarray:
    """``(L, k)``, ``W^T G W = 1``: a basis of what moments in float32 can tell apart."""
    size = np.sqrt(np.diagonal(gram))
    size = np.where(size > 0, size, 1)
    values, vectors = np.linalg.eigh(gram / size[:, None] / size)
    live = values > len(gram) * np.finfo(np.float32).eps * values[-1]
    return vectors[:, live] / np.sqrt(values[live]) / size[:, None]
