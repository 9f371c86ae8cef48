"""Grassmann class representation on digits: every class is a subspace, not a vector.

Class ``c`` is the span of ``S_c``, ``(k, d)`` with orthonormal rows, and its logit the length of
the feature's projection on it,

    logit_c = ‖S_c x̂‖,  x̂ = scale x / ‖x‖

under cross-entropy. Riemannian SGD moves along geodesics: with the tangent part
``H = -lr (M - M S^T S)`` of the momentum ``M``, and its singular values ``H = U Σ V^T``,

    S <- U cos(Σ) U^T S + U sin(Σ) V^T

and the momentum is carried over by projection. In the paper features come from a network that is
trained along; here they are the pixels, which makes it a linear classifier's neighbour. Beside it:
softmax regression, and CLAFIC, where each subspace is the PCA of its own class.

Source: Wang, Li and Zhang, "Get the best of both worlds: improving accuracy and transferability by
Grassmann class representation", ICCV 2023; geodesics: Edelman, Arias and Smith, "The geometry of
algorithms with orthogonality constraints", SIAM J. Matrix Anal. Appl. 1998; CLAFIC: Watanabe, 1973.

    python benchmarks/neighbour_grassmann.py
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from online_setup import Split, accuracy, digits, network, pca, train
from report import show


def tangent(s: jax.Array, g: jax.Array) -> jax.Array:
    """The part of ``g`` orthogonal to the rows of ``s``, for one subspace or many."""
    return g - (g @ s.mT) @ s


def geodesic(s: jax.Array, h: jax.Array) -> jax.Array:
    """Rows after moving along the tangent ``h``, ``(..., k, d)``; orthonormal like ``s``."""
    u, size, vt = jnp.linalg.svd(h, full_matrices=False)
    along = u.mT @ s
    return u @ (jnp.cos(size)[..., None] * along + jnp.sin(size)[..., None] * vt)


class MomentumState(NamedTuple):
    momentum: jax.Array


def riemannian_sgd(rate: float, momentum: float = 0.9) -> optax.GradientTransformation:
    """SGD on subspaces ``(..., k, d)``; its updates end where the geodesics do."""

    def init(s):
        return MomentumState(jnp.zeros_like(s))

    def update(g, state, s):
        m = tangent(s, momentum * state.momentum + g)
        q, r = jnp.linalg.qr(geodesic(s, -rate * m).mT)  # takes out what rounding has added
        new = (q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]).mT
        return new - s, MomentumState(m)

    return optax.GradientTransformation(init, update)


def logits(s: jax.Array, x: jax.Array, scale: float = 25.0) -> jax.Array:
    """``(n, classes)`` lengths of the features' projections."""
    x = scale * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.linalg.norm(jnp.einsum("ckd,nd->nck", s, x), axis=-1)


def loss(s: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(s, x), y).mean()


@partial(jax.jit, static_argnums=(0, 1, 5))
def descend(loss: Callable, tx, s: jax.Array, data: Split, key: jax.Array, steps: int) -> jax.Array:
    def step(carry, key):
        s, state = carry
        i = jax.random.randint(key, (64,), 0, len(data.x))
        updates, state = tx.update(jax.grad(loss)(s, data.x[i], data.y[i]), state, s)
        return (optax.apply_updates(s, updates), state), None

    return jax.lax.scan(step, (s, tx.init(s)), jax.random.split(key, steps))[0][0]


def random_subspaces(key: jax.Array, classes: int, k: int, d: int) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, (classes, d, k)))[0].mT


@partial(jax.jit, static_argnums=1)
def clafic(data: Split, k: int) -> jax.Array:
    """``(10, k, d)``: the leading directions of each class."""
    own = lambda c: pca(k, data.x * (data.y == c)[:, None]).eigenvectors()
    return jax.vmap(own)(jnp.arange(10))


def compare(k: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Accuracies on held-out digits with subspaces of dimension ``k``."""
    data, key = digits(seed), jax.random.key(seed)
    correct = lambda s: float((logits(s, data.x_test).argmax(1) == data.y_test).mean())
    start = random_subspaces(key, 10, k, 64)
    learned = descend(loss, riemannian_sgd(0.03), start, data, key, steps)
    return {"CLAFIC": correct(clafic(data, k)), "Grassmann": correct(learned)}


def softmax_regression(steps: int, seed: int = 0) -> float:
    data, key = digits(seed), jax.random.key(seed)
    params = train(network(key, (64, 10)), data.x, data.y, optax.adam(1e-2), steps, key)
    return accuracy(params, data.x_test, data.y_test)


def main() -> None:
    seeds, steps = range(3), 1500
    linear = float(np.median([softmax_regression(steps, seed) for seed in seeds]))
    rows = [{"k": "–", "softmax": linear}]
    for k in (1, 2, 4, 8):
        runs = [compare(k, steps, seed) for seed in seeds]
        rows.append({"k": k, **{n: float(np.median([r[n] for r in runs])) for n in runs[0]}})
    columns = {"k": "dimension", "softmax": "softmax", "CLAFIC": "CLAFIC", "Grassmann": "Grassmann"}
    show("Digits held out: accuracy, median of three seeds", rows, columns)


if __name__ == "__main__":
    main()
