"""The top eigenvector of ``A^T A`` from rows in random order, a few of them heavy.

A row is heavy if ``‖a‖² >= ‖A‖_F² / d``: there are at most ``d``, and they are what breaks
algorithms that see a row once. They are stored; the light rows go through a block power method, for
which blocks of a random order are samples of the whole. Both are operators, and `merge` takes the
top eigenvector of their sum. ``‖A‖_F²`` is ``n`` times the running mean of ``‖a‖²`` so far.

The paper's threshold has powers of ``log d`` besides, and it samples light rows by their norms,
which makes a space bound of it; here light rows have similar norms. How heavy and light are put
together at the end is ours. The stream: the top direction comes from light rows, heavy rows in
other directions are next, and ``R`` is the ratio of these eigenvalues without the noise. Trackers
that see every row once are the comparison.

Source: Kacham and Woodruff, "Approximating the top eigenvector in random order streams", NeurIPS
2024. For Oja's rule without heavy rows: Price and Xun, FOCS 2024.

    python benchmarks/neighbour_heavy_rows.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from report import show

import lowrank_optax as lro
from lowrank_optax.online import trackers


def stream(key: jax.Array, n: int = 4000, d: int = 100, heavy: int = 20, gap: float = 2.0):
    """``(n, d)``: a spike over noise, and ``heavy`` rows of size ``√(spike / gap)`` besides."""
    keys = jax.random.split(key, 4)
    noise = jax.random.normal(keys[0], (n - heavy, d)) / jnp.sqrt(d)
    spike = 0.4 * jax.random.normal(keys[1], (n - heavy, 1)) * jnp.eye(1, d)
    others = jnp.linalg.qr(jax.random.normal(keys[2], (d, d)))[0][:heavy]
    rows = jnp.concatenate([noise + spike, jnp.sqrt(0.16 * n / gap) * others])
    return jax.random.permutation(keys[3], rows)


def heavy_rows(rows: jax.Array) -> jax.Array:
    """``(n,)``: which rows are heavy for what has been seen when they come."""
    squares = jnp.sum(rows**2, axis=1)
    seen = jnp.arange(1, len(rows) + 1)
    frobenius = len(rows) * jnp.cumsum(squares) / seen
    return squares >= frobenius / rows.shape[1]


@partial(jax.jit, static_argnums=0)
def tracked(tracker: trackers.Tracker, rows: jax.Array, key: jax.Array) -> lro.online.Operator:
    step = lambda state, row: (tracker.update(state, row), None)
    return tracker.operator(jax.lax.scan(step, tracker.init(key, rows[0]), rows)[0])


@partial(jax.jit, static_argnums=2)
def heavy_and_light(rows: jax.Array, key: jax.Array, block: int = 500) -> lro.online.Operator:
    """The operator of rank one from stored heavy rows and the block power method on the others."""
    heavy = heavy_rows(rows)
    # Zeros instead of other lengths, so that one compiled function serves every stream.
    kept = rows[jnp.argsort(~heavy)[: rows.shape[1]]]
    light = tracked(trackers.NoisyPower(1, block=block), rows * ~heavy[:, None], key)
    stored = lro.online.signed_pca(len(kept), (1.0, kept))
    return lro.online.merge(light, stored, rank=1, weights=(len(rows), len(kept)))


def correlations(seed: int, **options) -> dict[str, float]:
    """``⟨v, v_1⟩²`` for each method, against the offline SVD."""
    rows = stream(jax.random.key(seed), **options)
    top = jnp.linalg.svd(rows, full_matrices=False)[2][0]
    key = jax.random.key(seed + 1000)
    methods = {
        "heavy rows stored": heavy_and_light(rows, key),
        "noisy power": tracked(trackers.NoisyPower(1, block=500), rows, key),
        "Oja": tracked(trackers.oja(1), rows, key),
        "AdaOja": tracked(trackers.ada_oja(1), rows, key),
        "Brand, 2 slots": tracked(trackers.brand(1), rows, key),
    }
    return {name: float(jnp.vdot(op.eigenvectors()[0], top) ** 2) for name, op in methods.items()}


def main() -> None:
    rows = []
    for gap in (1.5, 2.0, 4.0):
        runs = [correlations(seed, gap=gap) for seed in range(5)]
        for name in runs[0]:
            values = np.array([run[name] for run in runs])
            row = {"R": gap, "method": name, "median": float(np.median(values))}
            rows.append({**row, "least": float(values.min())})
    columns = {"R": "R", "method": "method", "median": "median", "least": "least of five"}
    show("Squared correlation with the top eigenvector", rows, columns)


if __name__ == "__main__":
    main()
