"""Distances of eigenvalues and functions from known ones: functions of values at points."""

from typing import Any

import numpy as np

from lowrank_optax._core.checks import check


def relative_error(values: Any, truth: Any) -> np.ndarray:
    """The error ``|value - truth| / |truth|`` of every mode; absolute where the truth is 0.

    Args:
      values: the values, ``(L,)``.
      truth: the true values, ``(L,)``.

    Returns:
      The errors, ``(L,)``.

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
      truth: the values, ``(L,)`` and sorted.
      tolerance: largest difference of equal neighbours, relative to the largest value, 1e-6 by
        default.

    Returns:
      A slice of the modes for every run.

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
    """The distance ``1 - tr(P P') / k`` of the spans of two sets of functions.

    Args:
      f: values of ``k`` functions at ``n`` points, ``(n, k)``.
      phi: values of the others at the same points, ``(n, k)``.
      weights: weights of the points in inner products, ``(n,)``; ones by default.

    Returns:
      0 for equal spans, 1 for orthogonal ones.

    Raises:
      ValueError: for different shapes.

    Cost: ``4 n k²`` flops.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> line, other = np.array([[1.0], [0.0]]), np.array([[1.0], [1.0]])
      >>> print(round(spectral.subspace_distance(line, other), 3))  # the squared sine of 45°
      0.5
    """
    a, b = _orthonormal("subspace_distance", f, phi, weights)
    return float(1 - np.sum((a.T @ b) ** 2) / a.shape[1])


def angles(f: Any, phi: Any, weights: Any = None) -> np.ndarray:
    """The angle, in radians, between each function and its partner, whatever their signs.

    Args:
      f: values of ``k`` functions at ``n`` points, ``(n, k)``.
      phi: values of their partners, ``(n, k)``.
      weights: weights of the points in inner products, ``(n,)``; ones by default.

    Returns:
      The angles, ``(k,)``, from 0 to ``pi / 2``.

    Raises:
      ValueError: for different shapes.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> found, truth = np.array([[1.0], [0.0]]), np.array([[-1.0], [-1.0]])
      >>> print(np.degrees(spectral.angles(found, truth)).round(3))
      [45.]
    """
    a, b = _weighed("angles", f, phi, weights)
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    sign = np.where(np.sum(a * b, 0) < 0, -1, 1)
    # The arc sine of half the chord keeps small angles that the cosine loses.
    return 2 * np.arcsin(np.minimum(np.linalg.norm(a - sign * b, axis=0) / 2, 1))


def align(f: Any, phi: Any, weights: Any = None) -> np.ndarray:
    """The functions ``f``, turned by the rotation that brings them closest to ``phi``.

    Args:
      f: values of a basis of a degenerate eigenspace, ``(n, k)``.
      phi: values of the basis to compare with, ``(n, k)``.
      weights: weights of the points in inner products, ``(n,)``; ones by default.

    Returns:
      The turned values, ``(n, k)``.

    Raises:
      ValueError: for different shapes.

    Cost: ``4 n k²`` flops and an ``svd`` of ``k x k``.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> turned = np.array([[0.6, -0.8], [0.8, 0.6]])
      >>> bool(np.allclose(spectral.align(turned, np.eye(2)), np.eye(2)))
      True
    """
    a, b = _weighed("align", f, phi, weights)
    u, _, vt = np.linalg.svd(a.T @ b)
    return np.asarray(f, np.float64) @ (u @ vt)


def vamp_score(gram_x: Any, gram_y: Any, cross: Any) -> float:
    """The VAMP-2 score ``‖C_00^{-1/2} C_01 C_11^{-1/2}‖_F²`` of features of pairs.

    Args:
      gram_x: inner products ``<f(x), f(x)>``, ``(L, L)``.
      gram_y: inner products ``<g(y), g(y)>``, ``(M, M)``.
      cross: inner products ``<f(x), g(y)>``, ``(L, M)``.

    Returns:
      The score, the sum of the squared singular values.

    Cost: two Cholesky factorisations, in float64.

    Source: Wu and Noé, "Variational approach for learning Markov processes from time series data",
    2020.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> print(spectral.vamp_score(np.eye(2), 4 * np.eye(2), np.diag([1.0, 0.5])))
      0.3125
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
