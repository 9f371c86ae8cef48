"""A spectral basis in order: prefix reconstruction as a purpose of the user's own.

With orthonormal rows ``E‖v - A^T A v‖²`` is the same for every rotation of the codes: its minimum
is a subspace, not a basis. The average over prefixes, with ``A_k`` the first ``k`` rows,

    L = (1/r) sum_k E‖v - A_k^T A_k v‖² / E‖v‖²

has one minimum up to signs, the eigenvectors in the order of their eigenvalues.

Source: Rippel, Gelbart and Adams, "Learning ordered representations with nested dropout", ICML
2014; the loss without sampling: Bao et al., "Regularized linear autoencoders recover the principal
components, eventually", NeurIPS 2020.

    python benchmarks/neighbour_prefix.py
"""

import jax
import jax.numpy as jnp
import optax
from online_setup import digits, learn
from report import show

import lowrank_optax as lro


def prefix(operator: lro.online.Operator, batch: lro.online.Batch) -> jax.Array:
    """The loss over a batch, from the reconstructions that every prefix of the codes gives."""
    z, v = operator.encode(batch.vectors), batch.vectors
    masks = jnp.tri(operator.rank)  # row k keeps the first k + 1 codes

    def lost(mask: jax.Array) -> jax.Array:
        return batch.weights @ jnp.sum((v - operator.decode(z * mask)) ** 2, axis=1)

    energy = batch.weights @ jnp.sum(v**2, axis=1)
    return jax.vmap(lost)(masks).mean() / energy


def alignment(rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """``|cos|`` of every row with the eigenvector of the same place in the order."""
    reference = jnp.linalg.eigh(vectors.T @ vectors)[1].T[::-1]
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.abs(jnp.sum(rows * reference[: len(rows)], axis=1))


def compare(vectors: jax.Array, rank: int, steps: int, seed: int = 0) -> dict[str, jax.Array]:
    """The rows' alignment after learning with either loss."""
    out = {}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))
    for name, purposes, anchor in (("prefixes", (prefix,), 0.0), ("reconstruction", (), 1.0)):
        learner = lro.online.learner(rank, purposes, optimizer, reconstruction=anchor)
        op = learn(learner, jax.random.key(seed), vectors, steps, batch=256)
        out[name] = alignment(op.layout.leaves(op.rows)[0], vectors)
    return out


def main() -> None:
    x = digits(seed=0).x
    found = compare(x - x.mean(0), rank=6, steps=2000)
    columns = {"loss": "loss", **{str(i): f"row {i + 1}" for i in range(6)}}
    rows = [
        {"loss": name, **{str(i): float(c) for i, c in enumerate(cos)}}
        for name, cos in found.items()
    ]
    show("Digits: |cos| with the eigenvector of the same rank", rows, columns)


if __name__ == "__main__":
    main()
