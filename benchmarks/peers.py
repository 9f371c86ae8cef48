"""SOAP, KL-SOAP and PSGD-Kron, for which no JAX package works with current optax: references.

Written from the papers and the authors' published defaults; they stand in for the originals and are
not part of the library.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def _gram(g: jax.Array, axis: int) -> jax.Array:
    """``G G^T`` of one axis, summed over all others."""
    rest = [i for i in range(g.ndim) if i != axis]
    return jnp.tensordot(g, g, (rest, rest))


def _turn(x: jax.Array, bases: list[Any], back: bool = False) -> jax.Array:
    """``Q^T`` applied along every axis that has a basis, or ``Q``."""
    for axis, q in enumerate(bases):
        if q is not None:
            x = jnp.moveaxis(jnp.tensordot(x, q, ([axis], [1 if back else 0])), -1, axis)
    return x


def _eigenvectors(k: jax.Array) -> jax.Array:
    """Eigenvectors as columns, the largest eigenvalue first."""
    return jnp.linalg.eigh(k)[1][:, ::-1]


class SOAPState(NamedTuple):
    """Moments in the eigenbasis (``m``, ``v``), and per leaf and axis ``L`` and its basis ``Q``."""

    count: jax.Array
    m: Any
    v: Any
    grams: Any
    bases: Any


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    frequency: int = 10,
    largest: int = 10000,
) -> optax.GradientTransformation:
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioners.

    Every axis of a leaf with two or more has its own basis unless it is longer than ``largest``;
    vectors are Adam's. The first step only starts the preconditioners. The bases are refreshed
    every ``frequency`` steps by one power iteration and a QR decomposition; the second moment stays
    as it is then, permuted where eigenvalues change places.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025.
    """

    def axes(x) -> list[bool]:
        return [x.ndim > 1 and n <= largest for n in x.shape]

    def init(params: Any) -> SOAPState:
        square = lambda x: [
            jnp.zeros((n, n)) if on else None for n, on in zip(x.shape, axes(x), strict=True)
        ]
        leaves = jax.tree.leaves(params)
        zeros = [jnp.zeros_like(x) for x in leaves]
        grams = [square(x) for x in leaves]
        bases = jax.tree.map(lambda k: jnp.eye(len(k)), grams)
        return SOAPState(jnp.zeros((), jnp.int32), zeros, zeros, grams, bases)

    def refresh(m, v, grams, bases):
        m = _turn(m, bases, back=True)
        fresh = []
        for axis, (k, q) in enumerate(zip(grams, bases, strict=True)):
            if q is not None:
                order = jnp.argsort(-jnp.einsum("ij,ik,kj->j", q, k, q))
                v = jnp.take(v, order, axis)
                q = jnp.linalg.qr(k @ q[:, order])[0]
            fresh.append(q)
        return _turn(m, fresh), v, fresh

    def update(updates: Any, state: SOAPState, params: Any = None):
        leaves, tree = jax.tree.flatten(updates)
        first = state.count == 0
        t = state.count.astype(jnp.float32)  # the first step does not count
        steps, ms, vs, all_grams, all_bases = [], [], [], [], []
        for g, m, v, grams, bases in zip(
            leaves, state.m, state.v, state.grams, state.bases, strict=True
        ):
            u = _turn(g, bases)
            m1 = jnp.where(first, m, b1 * m + (1 - b1) * u)
            v1 = jnp.where(first, v, b2 * v + (1 - b2) * u**2)
            scale = jnp.sqrt(1 - b2**t) / jnp.where(first, 1, 1 - b1**t)
            step = _turn(m1 / (jnp.sqrt(v1) + eps) * scale, bases, back=True)
            steps.append(jnp.where(first, 0, step))
            grams = [
                None if k is None else b2 * k + (1 - b2) * _gram(g, i) for i, k in enumerate(grams)
            ]
            if any(k is not None for k in grams):
                start = lambda m, v, grams, bases: (m, v, jax.tree.map(_eigenvectors, grams))
                keep = lambda m, v, grams, bases: (m, v, bases)
                branch = jnp.where(first, 0, jnp.where(state.count % frequency == 0, 1, 2))
                m1, v1, bases = jax.lax.switch(branch, (start, refresh, keep), m1, v1, grams, bases)
            for kept, new in zip(
                (ms, vs, all_grams, all_bases), (m1, v1, grams, bases), strict=True
            ):
                kept.append(new)
        return tree.unflatten(steps), SOAPState(state.count + 1, ms, vs, all_grams, all_bases)

    return optax.GradientTransformation(init, update)


def soap(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformation:
    """`scale_by_soap`, decoupled weight decay, learning rate."""
    return optax.chain(
        scale_by_soap(**options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


class KLSOAPState(NamedTuple):
    """Moments in the eigenbasis, and per leaf and axis ``S``, its basis, and ``1 / sqrt(lam)``."""

    count: jax.Array
    m: Any
    v: Any
    grams: Any
    bases: Any
    roots: Any


def scale_by_klsoap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    frequency: int = 10,
    start: float = 0.1,
    largest: int = 10000,
) -> optax.GradientTransformation:
    """KL-SOAP: SOAP whose statistics of each side are of the gradient whitened by the others.

    ``L <- b2 L + (1 - b2) G R^-1 G^T / columns``, ``R <- b2 R + (1 - b2) G^T L^-1 G / rows``, where
    the inverses have the bases ``Q`` and eigenvalues that are averaged by themselves, from
    ``start``; their inverse roots are cut at the side, at least 10 and at most 4000. As in the
    authors' program the first step only starts the bases (from ``G G^T``), Adam corrects no bias,
    statistics follow the step, one power iteration and a QR decomposition turn the bases every
    ``frequency`` steps, and the second moment stays as it is then. Vectors are Adam's.

    Source: Lin et al., "Understanding and Improving Shampoo and SOAP via Kullback-Leibler
    Minimization", ICLR 2026 (arXiv 2509.03378); defaults as in the program, with SOAP's decays.
    """

    def init(params: Any) -> KLSOAPState:
        def sides(x, make):
            return [make(n) if x.ndim > 1 and n <= largest else None for n in x.shape]

        leaves = jax.tree.leaves(params)
        zeros = [jnp.zeros_like(x) for x in leaves]
        grams = [sides(x, lambda n: jnp.zeros((n, n))) for x in leaves]
        bases = [sides(x, jnp.eye) for x in leaves]
        roots = [sides(x, lambda n: jnp.full(n, start**-0.5)) for x in leaves]
        return KLSOAPState(jnp.zeros((), jnp.int32), zeros, zeros, grams, bases, roots)

    def whitened(g, bases, roots, skip):
        """The gradient in the bases of all axes but one, divided by the roots there."""
        scaled = [
            None if q is None or axis == skip else q * r
            for axis, (q, r) in enumerate(zip(bases, roots, strict=True))
        ]
        return _turn(g, scaled)

    def learn(g, grams, bases, roots):
        new_grams, new_roots = [], []
        for axis, (k, q, r) in enumerate(zip(grams, bases, roots, strict=True)):
            if q is not None:
                w = whitened(g, bases, roots, axis)
                k = b2 * k + (1 - b2) * _gram(w, axis) * len(q) / g.size
                w = jnp.moveaxis(jnp.tensordot(w, q, ([axis], [0])), -1, axis)
                found = jnp.mean(w**2, [i for i in range(g.ndim) if i != axis])
                root = 1 / jnp.sqrt(b2 / r**2 + (1 - b2) * found)
                r = jnp.minimum(root, max(10, min(len(q), 4000)))
            new_grams.append(k)
            new_roots.append(r)
        return new_grams, new_roots

    def refresh(m, grams, bases):
        m = _turn(m, bases, back=True)
        bases = jax.tree.map(lambda k, q: jnp.linalg.qr(k @ q)[0], grams, bases)
        return _turn(m, bases), bases

    def update(updates: Any, state: KLSOAPState, params: Any = None):
        leaves, tree = jax.tree.flatten(updates)
        first = state.count == 0
        t = jnp.maximum(state.count, 1).astype(jnp.float32)
        columns: list[list[Any]] = [[] for _ in range(6)]
        for g, m, v, grams, bases, roots in zip(leaves, *state[1:], strict=True):
            u = _turn(g, bases)
            m1 = jnp.where(first, m, b1 * m + (1 - b1) * u)
            v1 = jnp.where(first, v, b2 * v + (1 - b2) * u**2)
            step = _turn(m1 / (jnp.sqrt(v1) + eps), bases, back=True)
            if g.ndim < 2:
                step = step * jnp.sqrt(1 - b2**t) / (1 - b1**t)
            elif any(q is not None for q in bases):
                begun = [
                    None if k is None else (1 - b2) * _gram(g, i) * len(k) / g.size
                    for i, k in enumerate(grams)
                ]
                learnt = learn(g, grams, bases, roots)
                grams, roots = jax.tree.map(
                    lambda x, y: jnp.where(first, x, y), (begun, roots), learnt
                )
                branch = jnp.where(first, 0, jnp.where(state.count % frequency == 0, 1, 2))
                m1, bases = jax.lax.switch(
                    branch,
                    (
                        lambda m, grams, bases: (m, jax.tree.map(_eigenvectors, grams)),
                        refresh,
                        lambda m, grams, bases: (m, bases),
                    ),
                    m1,
                    grams,
                    bases,
                )
            kept = jnp.where(first, 0, step), m1, v1, grams, bases, roots
            for column, new in zip(columns, kept, strict=True):
                column.append(new)
        return tree.unflatten(columns[0]), KLSOAPState(state.count + 1, *columns[1:])

    return optax.GradientTransformation(init, update)


def klsoap(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """`scale_by_klsoap` and a learning rate."""
    return optax.chain(scale_by_klsoap(**options), optax.scale_by_learning_rate(learning_rate))


class KronState(NamedTuple):
    """Momentum, and per leaf and axis a factor ``Q``: triangular, or a diagonal."""

    count: jax.Array
    m: Any
    factors: Any
    key: jax.Array


def scale_by_kron(
    b1: float = 0.9,
    factor_rate: float = 0.1,
    largest: int = 8192,
    clip: float = 1.0,
    seed: int = 0,
) -> optax.GradientTransformation:
    """PSGD with Kronecker-factored triangular preconditioners fitted to whiten the momentum.

    ``P = Q^T Q`` minimises ``E[m^T P m + v^T P^{-1} v]`` by steps on the Lie group of triangular
    matrices. Factors move with a probability that falls from 1 to .03, as published; vectors and
    axes longer than ``largest`` have diagonal factors; the update's root mean square is clipped.

    Source: Li, "Preconditioned Stochastic Gradient Descent", IEEE TNNLS 2018, and "Stochastic
    Hessian Fittings with Lie Groups", 2024; the schedule and defaults of the published Kron.
    """
    tiny = 1e-30

    def init(params: Any) -> KronState:
        def factors(x):
            dense = x.ndim > 1
            shape = x.shape or (1,)
            return [jnp.eye(n) if dense and n <= largest else jnp.ones(n) for n in shape]

        leaves = jax.tree.leaves(params)
        return KronState(
            jnp.zeros((), jnp.int32),
            [jnp.zeros_like(x) for x in leaves],
            [factors(x) for x in leaves],
            jax.random.key_data(jax.random.key(seed)),
        )

    def along(q: jax.Array, x: jax.Array, axis: int, transpose: bool = False) -> jax.Array:
        """``Q`` or ``Q^T`` applied along an axis."""
        if q.ndim == 1:
            return x * jnp.expand_dims(q, [i for i in range(x.ndim) if i != axis])
        return jnp.moveaxis(jnp.tensordot(x, q, ([axis], [0 if transpose else 1])), -1, axis)

    def solve(q: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        """``Q^{-T}`` applied along an axis."""
        if q.ndim == 1:
            return x / jnp.expand_dims(q, [i for i in range(x.ndim) if i != axis])
        flat = jnp.moveaxis(x, axis, 0)
        out = jax.scipy.linalg.solve_triangular(q, flat.reshape(len(q), -1), trans="T")
        return jnp.moveaxis(out.reshape(flat.shape), 0, axis)

    def norm_bound(a: jax.Array) -> jax.Array:
        """Cheap lower bound of the spectral norm of a symmetric matrix, tight for such sums."""
        top = jnp.max(jnp.abs(a)) + tiny
        a = a / top
        row = a[jnp.argmax(jnp.sum(a**2, axis=1))]
        return top * jnp.linalg.norm(a @ (row / (jnp.linalg.norm(row) + tiny)))

    def fit(factors, g, key):
        """One step on every factor of one leaf."""
        g = g + 1e-9 * jnp.mean(jnp.abs(g)) * jax.random.normal(key, g.shape)
        a, b = g, jax.random.normal(jax.random.fold_in(key, 1), g.shape)
        for axis, q in enumerate(factors):
            a, b = along(q, a, axis), solve(q, b, axis)
        moved = []
        for axis, q in enumerate(factors):
            rest = [i for i in range(g.ndim) if i != axis]
            if q.ndim == 1:
                t1, t2 = jnp.sum(a**2, rest), jnp.sum(b**2, rest)
                step = factor_rate * (t1 - t2) / (jnp.max(t1 + t2) + tiny) * q
            else:
                t1, t2 = jnp.tensordot(a, a, (rest, rest)), jnp.tensordot(b, b, (rest, rest))
                step = factor_rate / (norm_bound(t1 + t2) + tiny) * jnp.triu(t1 - t2) @ q
            moved.append(q - step)
        # Factors of equal norms, of which the product alone is determined.
        norms = jnp.stack([jnp.max(jnp.abs(q)) for q in moved])
        mean = jnp.exp(jnp.mean(jnp.log(norms)))
        return [q * mean / n for q, n in zip(moved, norms, strict=True)]

    def update(updates: Any, state: KronState, params: Any = None):
        leaves, tree = jax.tree.flatten(updates)
        count = state.count + 1
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
        chance = jnp.clip(jnp.exp(-0.001 * (count - 250.0)), 0.03, 1.0)
        go = jax.random.uniform(key) < chance
        steps, ms, all_factors = [], [], []
        for i, (g, m, factors) in enumerate(zip(leaves, state.m, state.factors, strict=True)):
            m = b1 * m + (1 - b1) * g
            unbiased = jnp.atleast_1d(m / (1 - b1**count))
            own = jax.random.fold_in(key, i)
            factors = jax.lax.cond(
                go, lambda f, x, own=own: fit(f, x, own), lambda f, x: f, factors, unbiased
            )
            step = unbiased
            for axis, q in enumerate(factors):
                step = along(q, along(q, step, axis), axis, transpose=True)
            rms = jnp.sqrt(jnp.mean(step**2))
            step = step * jnp.minimum(1.0, clip / (rms + tiny))
            steps.append(jnp.reshape(step, g.shape))
            ms.append(m)
            all_factors.append(factors)
        return tree.unflatten(steps), KronState(count, ms, all_factors, state.key)

    return optax.GradientTransformation(init, update)


def kron(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """`scale_by_kron` and a learning rate."""
    return optax.chain(scale_by_kron(**options), optax.scale_by_learning_rate(learning_rate))
