"""Few-shot anomaly scores from a subspace residual, on digits.

A few normal images, augmented, span the subspace of normal variation: the leading eigenvectors
around their mean that explain a share ``explained`` of the variance. The score of an image is what
is left of it, ``‖(I - Q Q^T)(x - mean)‖²``. The paper takes a network's patch features and
rotated copies; here the features are pixels and the copies are shifted.

Every digit in turn is normal and the other nine are the anomalies. The baseline is the squared
distance to the nearest of the same shots and copies.

Source: Lendering, Akdag and Bondarev, "SubspaceAD: training-free few-shot anomaly detection via
subspace modeling", CVPR 2026.

    python benchmarks/neighbour_anomaly.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from online_setup import digits, pca
from report import show
from sklearn.metrics import roc_auc_score

import lowrank_optax as lro


def shifted(x: jax.Array) -> jax.Array:
    """``(9 n, 64)``: images and their copies moved by up to one pixel."""
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moves = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return jnp.concatenate(moves).reshape(-1, 64)


@jax.jit
def normal_subspace(x: jax.Array, explained: float) -> tuple[jax.Array, lro.online.Operator]:
    """The mean, and the fewest eigenvectors around it that explain a share of the variance."""
    mean = x.mean(0)
    found = pca(min(len(x), x.shape[1]), x - mean)
    lam = jnp.maximum(found.eigenvalues(), 0)
    # Rows of zeros, rather than fewer rows, so that one compiled function serves every rank.
    needed = jnp.cumsum(lam) - lam < explained * lam.sum()
    rows = found.eigenvectors() * needed[:, None]
    return mean, lro.online.Operator.of(rows, jnp.diag(lam * needed))


@jax.jit
def score(x: jax.Array, mean: jax.Array, subspace: lro.online.Operator) -> jax.Array:
    """``(n,)``, in squared units of the images."""
    return jnp.sum(subspace.residual(x - mean) ** 2, axis=1)


def auroc(shots: int, explained: float, seed: int = 0) -> tuple[float, float]:
    """Of the residual and of the nearest neighbour, averaged over the ten normal digits."""
    data, found = digits(seed), []
    for digit in range(10):
        known = shifted(data.x[np.flatnonzero(data.y == digit)[:shots]])
        residual = score(data.x_test, *normal_subspace(known, explained))
        nearest = jnp.min(jnp.sum((data.x_test[:, None] - known) ** 2, axis=-1), axis=1)
        strange = data.y_test != digit
        found.append([roc_auc_score(strange, s) for s in (residual, nearest)])
    residual, nearest = np.mean(found, axis=0)
    return float(residual), float(nearest)


def main() -> None:
    rows = []
    for shots in (1, 5, 20):
        scores = np.array([auroc(shots, 0.9, seed) for seed in range(3)])
        (residual, nearest), spread = np.median(scores, axis=0), np.ptp(scores[:, 0])
        rows.append({"k": shots, "res": residual, "spread": spread, "nearest": nearest})
    title = "Digits, one normal: AUROC, mean of ten digits, median of three seeds"
    columns = {"k": "shots", "res": "residual", "spread": "its range", "nearest": "nearest shot"}
    show(title, rows, columns)


if __name__ == "__main__":
    main()
