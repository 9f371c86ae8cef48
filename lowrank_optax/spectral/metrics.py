"""How far eigenvalues and functions are from known ones: pure functions of values at points."""

from typing import Any

import numpy as np

from lowrank_optax._core.checks import check


def relative_error(values: Any, truth: Any) -> np.ndarray:
    """``|value - truth| / |truth|`` of every mode; absolute where the truth is 0.

    Args:
      values: ``(L,)``.
      truth: ``(L,)``.

    Raises:
      ValueError: for different shapes.

    Example:
      >>> from lowrank_optax import spectral
      >>> print(spectral.relative_error([1.1, 2.0], [1.0, 2.0]).round(2))
      [0.1 0. ]
    """
    values, truth = np.asarray(values, np.float64), np.asarray(truth, np.float64)
    check(
        values.shape == truth.shape,
        f"relative_error: shapes {values.shape} and {truth.shape} came; pass equal ones.",
    )
    return np.abs(values - truth) / np.where(truth == 0, 1, np.abs(truth))


def blocks(truth: Any, tolerance: float = 1e-6) -> list[slice]:
    """Runs of equal values, relative to the largest: the degenerate eigenspaces.

    Args:
      truth: ``(L,)`` sorted.
      tolerance: of equality.

    Example:
      >>> from lowrank_optax import spectral
      >>> spectral.blocks([1.0, 0.5, 0.5])
      [slice(0, 1, None), slice(1, 3, None)]
    """
    truth = np.asarray(truth, np.float64)
    cuts = np.flatnonzero(np.abs(np.diff(truth)) > tolerance * np.abs(truth).max()) + 1
    edges = [0, *cuts.tolist(), len(truth)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def subspace_distance(f: Any, phi: Any, weights: Any = None) -> float:
    r"""``1 - tr(P P') / k`` of the spans of two sets of functions.

    Args:
      f: ``(n, k)`` values at ``n`` points.
      phi: ``(n, k)`` values of the others at the same points.
      weights: ``(n,)`` of the points in inner products, or ones.

    Returns:
      0 for equal spans, 1 for orthogonal ones.

    Raises:
      ValueError: for different shapes.

    Cost: ``4 n k²`` flops.
    """
    a, b = _orthonormal("subspace_distance", f, phi, weights)
    return float(1 - np.sum((a.T @ b) ** 2) / a.shape[1])


def angles(f: Any, phi: Any, weights: Any = None) -> np.ndarray:
    """The angle, in radians, between each function and its partner, whatever their signs.

    Args:
      f: ``(n, k)``.
      phi: ``(n, k)``.
      weights: ``(n,)`` of the points in inner products, or ones.

    Raises:
      ValueError: for different shapes.
    """
    a, b = _weighed("angles", f, phi, weights)
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    sign = np.where(np.sum(a * b, 0) < 0, -1, 1)
    # The arc sine of half the chord keeps small angles that the cosine loses.
    return 2 * np.arcsin(np.minimum(np.linalg.norm(a - sign * b, axis=0) / 2, 1))


def align(f: Any, phi: Any, weights: Any = None) -> np.ndarray:
    """``f`` turned by the rotation that brings it closest to ``phi`` (orthogonal Procrustes).

    Args:
      f: ``(n, k)``, a basis of a degenerate eigenspace.
      phi: ``(n, k)``, the basis to compare with.
      weights: ``(n,)`` of the points in inner products, or ones.

    Raises:
      ValueError: for different shapes.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
    """
    a, b = _weighed("align", f, phi, weights)
    u, _, vt = np.linalg.svd(a.T @ b)
    return np.asarray(f, np.float64) @ (u @ vt)


def vamp_score(gram_x: Any, gram_y: Any, cross: Any) -> float:
    r"""The VAMP-2 score ``‖C_00^{-1/2} C_01 C_11^{-1/2}‖_F²`` of features of pairs.

    Args:
      gram_x: ``(L, L)``, ``<f(x), f(x)>``.
      gram_y: ``(M, M)``, ``<g(y), g(y)>``.
      cross: ``(L, M)``, ``<f(x), g(y)>``.

    Source: Wu and Noé, "Variational approach for learning Markov processes from time series data",
    2020.
    """
    x = np.linalg.cholesky(np.asarray(gram_x, np.float64))
    y = np.linalg.cholesky(np.asarray(gram_y, np.float64))
    left = np.linalg.solve(x, np.asarray(cross, np.float64))
    return float(np.sum(np.linalg.solve(y, left.T) ** 2))


def _weighed(owner: str, f: Any, phi: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    f, phi = np.asarray(f, np.float64), np.asarray(phi, np.float64)
    check(
        f.ndim == 2 and f.shape == phi.shape,
        f"{owner}: shapes {f.shape} and {phi.shape} came; pass (n, k) twice.",
    )
    root = 1 if weights is None else np.sqrt(np.asarray(weights, np.float64))[:, None]
    return f * root, phi * root


def _orthonormal(owner: str, f: Any, phi: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _weighed(owner, f, phi, weights)
    return np.linalg.qr(a)[0], np.linalg.qr(b)[0]
