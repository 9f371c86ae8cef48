"""Koopman codes without collapse: a latent prediction loss and the von Neumann entropy.

Codes that are to predict their own future linearly, with nothing to reconstruct,

    L = E‖z' - M z‖² / E‖z‖²,  z = A v,  M the least-squares map,

collapse onto what is most predictable. The entropy of ``H / tr H`` keeps them apart. What was found
is checked by residuals: with ``w^H M = λ w^H``, the function ``g(v) = w^H A v`` is an eigenfunction
of the Koopman operator as far as

    res² = E|g(v') - λ g(v)|² / E|g(v)|²

is small; for a true one of a system driven by noise it is ``1 - |λ|²``, what noise makes of it.

The stream: three damped rotations of different memory, unit variance, under louder white noise.

Source: Cheng et al., "Information shapes Koopman representation", 2025, for collapse and the
entropy; Colbrook and Townsend, "Rigorous data-driven computation of spectral properties of Koopman
operators for dynamical systems", Communications on Pure and Applied Mathematics 2024, for
residuals.

    python benchmarks/neighbour_koopman.py
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import show

import lowrank_optax as lro

MODES = np.array([0.98, 0.96, 0.8]) * np.exp(1j * np.array([0.3, 0.9, 1.6]))


def stream(key: jax.Array, n: int = 20_000, noise: int = 14) -> jax.Array:
    """``(n, 6 + noise)``, mixed by a random rotation."""
    keys = jax.random.split(key, 3)
    lam = jnp.repeat(jnp.abs(MODES), 2)
    blocks = [np.array([[m.real, -m.imag], [m.imag, m.real]]) for m in MODES]
    turn = jax.scipy.linalg.block_diag(*blocks).astype(jnp.float32)

    def step(x, e):
        x = turn @ x + jnp.sqrt(1 - lam**2) * e
        return x, x

    _, x = jax.lax.scan(step, jnp.zeros(6), jax.random.normal(keys[0], (n, 6)))
    loud = 2 * jax.random.normal(keys[1], (n, noise))
    mix = jnp.linalg.qr(jax.random.normal(keys[2], (6 + noise, 6 + noise)))[0]
    return jnp.concatenate([x, loud], axis=1) @ mix


def fit(z: Any, after: Any) -> jax.Array:
    """``M``, the least-squares map from codes ``(n, r)`` to those that follow."""
    past = z.T @ z
    ridge = 1e-5 * jnp.trace(past) * jnp.eye(len(past))
    return jnp.linalg.solve(past + ridge, z.T @ after).T


def latent(operator: lro.online.Operator, batch: lro.online.Batch) -> jax.Array:
    z, after = operator.encode(batch.vectors), operator.encode(batch.extra["after"])
    return jnp.sum((after - z @ fit(z, after).T) ** 2) / jnp.sum(z**2)


@partial(jax.jit, static_argnums=(1, 3))
def codes(vectors: jax.Array, rank: int, entropy: Any, steps: int, seed: int = 0) -> jax.Array:
    """The stream's codes after learning with a weight of the entropy."""
    purposes = (
        lro.online.Custom(1.0, latent, names=("after",)),
        lro.online.Entropy(lambda count: entropy),  # a schedule, which may be traced
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    learner = lro.online.learner(rank, purposes, optimizer, reconstruction=0.0, orthonormal=False)
    first, rest = jax.random.split(jax.random.key(seed))
    starts = jax.random.randint(rest, (steps,), 0, len(vectors) - 512)

    def step(state, start):
        pairs = jax.lax.dynamic_slice_in_dim(vectors, start, 513)
        return learner.update(state, pairs[:-1], after=pairs[1:])[0], None

    state = jax.lax.scan(step, learner.init(first, vectors[0]), starts)[0]
    return learner.operator(state).encode(vectors)


def effective_rank(z: Any) -> float:
    """``exp`` of the von Neumann entropy of the codes' moments."""
    lam = jnp.linalg.eigvalsh(z.T @ z)
    lam = jnp.maximum(lam, 0) / lam.sum()
    return float(jnp.exp(-jnp.sum(jax.scipy.special.xlogy(lam, lam))))


def spectrum(z: Any) -> tuple[np.ndarray, np.ndarray]:
    """Koopman eigenvalues and their squared residuals, the smallest residual first."""
    z, after = np.asarray(z[:-1], float), np.asarray(z[1:], float)
    lam, w = np.linalg.eig(np.asarray(fit(z, after)).T)
    residual = np.mean(np.abs(after @ w - lam * (z @ w)) ** 2, 0) / np.mean(np.abs(z @ w) ** 2, 0)
    order = np.argsort(residual)
    return lam[order], residual[order]


def main() -> None:
    vectors, rank = stream(jax.random.key(0)), 4
    rows = []
    pca = np.linalg.svd(np.asarray(vectors), full_matrices=False)[2][:rank]
    found = {f"entropy {w:g}": codes(vectors, rank, w, steps=2000) for w in (0.0, 0.1, 1.0)}
    for name, z in {**found, "PCA": vectors @ pca.T}.items():
        for lam, residual in zip(*spectrum(z), strict=True):
            if lam.imag < 0:
                continue  # the conjugate of another
            size, angle = float(abs(lam)), float(np.angle(lam))
            row = {"eff": effective_rank(z), "size": size, "angle": angle, "ideal": 1 - size**2}
            rows.append({"codes": name, **row, "res": float(residual)})
    columns = {"codes": "codes", "eff": "effective rank", "size": "|λ|", "angle": "angle"}
    show("Koopman eigenvalues", rows, columns | {"res": "res²", "ideal": "1 - |λ|²"})
    print("true:", ", ".join(f"|λ| {abs(m):.2f}, angle {np.angle(m):.2f}" for m in MODES))


if __name__ == "__main__":
    main()
