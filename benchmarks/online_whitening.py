"""Whitening shapes the scaling of the leading eigenspace: it cannot gain anything over PCA's span.

Independent normal vectors in 64 dimensions: 8 directions with variances from 30 down to 0.8, a tail
of 0.2. A free ``A`` is learned for ``E‖v - A^T A v‖² + λ‖H - αI‖²``. Its optimum is known: the span
of the leading eigenvectors, scaled by ``√p_i``, ``p_i = (1 + λα)/(1 + λλ_i)``, so that ``cond H =
(λ_1/λ_r)(1 + λλ_r)/(1 + λλ_1)``, 37.5 at λ = 0 and 1.24 at λ = 5. Reported are cond H of the true
covariance in the codes learned, and how much of the leading eigenspace the span holds. PCA has both
the span and, through ``operator.power(v, -0.5)``, the exact inverse root: where only white codes
are wanted that is the simpler way. (That whitens the 20000 vectors seen; under the true covariance
cond H is then 1.08.)

    python benchmarks/online_whitening.py [--quick] [--seeds 5] [--out DIR]
"""

from functools import partial

import numpy as np
from online_setup import arguments, decaying, jax, jnp, learn, lro, pca, publish

D, RANK, SAMPLES = 64, 8, 20000
VARIANCES = np.geomspace(30, 0.8, RANK)
WEIGHTS = (0.0, 0.05, 0.5, 5.0)
METHODS = {
    "pca": "PCA",
    "root": "PCA, power(v, -1/2)",
    **{f"learned {w:g}": f"learned, λ = {w:g}" for w in WEIGHTS},
}


def run(seed: int, steps: int) -> dict:
    key, axes, first = jax.random.split(jax.random.key(seed), 3)
    q = jnp.linalg.qr(jax.random.normal(axes, (D, D)))[0]
    scale = jnp.sqrt(jnp.append(VARIANCES, np.full(D - RANK, 0.2)))
    vectors = jax.random.normal(key, (SAMPLES, D)) * scale @ q.T
    root = (scale * q).T  # rows: C = root^T root

    exact = pca(RANK, vectors)
    basis = exact.eigenvectors()
    span = lambda op: float(jnp.sum(op.project(q[:, :RANK].T) ** 2) / RANK)
    out: dict = {
        "pca": {"condition": condition(root @ basis.T), "span": span(exact)},
        "root": {"condition": condition(exact.power(root, -0.5) @ basis.T), "span": span(exact)},
    }
    for weight in WEIGHTS:
        learner = lro.online.learner(
            RANK,
            (lro.online.Whitening(weight, relative=False),),
            decaying(0.01, steps),
            relative=False,
        )
        op = learn(learner, first, vectors, steps, batch=64)
        codes = op.encode(root)
        # Scales along the eigenvectors: |A q_i|².
        p = jnp.sum(op.encode(q[:, :RANK].T) ** 2, axis=1)
        out[f"learned {weight:g}"] = {
            "condition": condition(codes),
            "span": span(op),
            "p": p.tolist(),
        }
    return out


def condition(codes: jax.Array) -> float:
    return float(jnp.linalg.cond(codes.T @ codes))


def predicted(weight: float) -> tuple[float, np.ndarray]:
    """cond H and the scales ``p`` in closed form; α = mean of ``p_i λ_i`` is solved for."""
    shrink = VARIANCES / (1 + weight * VARIANCES)
    alpha = shrink.mean() / (1 - weight * shrink.mean())
    return shrink.max() / shrink.min(), (1 + weight * alpha) / (1 + weight * VARIANCES)


def scales(axis, runs) -> None:
    """The scales learned over the closed form."""
    for weight, color in zip(WEIGHTS, ("gray", "tab:green", "tab:orange", "tab:red"), strict=True):
        axis.loglog(VARIANCES, predicted(weight)[1], color=color, label=f"λ = {weight:g}")
        for out in runs:
            axis.loglog(VARIANCES, out[f"learned {weight:g}"]["p"], "o", color=color, alpha=0.4)
    axis.set_xlabel("variance λᵢ (lines: closed form)")
    axis.set_ylabel("scale pᵢ = |A qᵢ|²")
    axis.legend()


def main() -> None:
    args = arguments(__doc__, {"steps": 300}, steps=3000)
    runs = [run(seed, args.steps) for seed in range(args.seeds)]
    metrics = {"condition": "cond H", "span": "share of the leading eigenspace"}
    closed = {f"{w:g}": predicted(w)[0] for w in WEIGHTS}
    print("cond H in closed form:", ", ".join(f"λ = {k}: {v:.3f}" for k, v in closed.items()))
    publish(
        "online_whitening",
        "Whitening, rank 8",
        runs,
        METHODS,
        metrics,
        args,
        [partial(scales, runs=runs)],
        closed_form=closed,
    )


if __name__ == "__main__":
    main()
