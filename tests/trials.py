"""What is done to an optimizer to find out whether it breaks: streams and spoiled numbers.

Shared by the tests, which do a little of it, and by ``benchmarks/faults.py``, which does a lot.
"""

import jax
import jax.numpy as jnp
import numpy as np
from dense import join

import lowrank_optax as lro
from lowrank_optax._core.layout import Layout

SHAPES = {"a": (3, 4), "b": (12,)}
SIZE = 24
"""Entries of one gradient of these shapes."""


def tree(flat):
    """Vectors ``(..., 24)`` as trees of `SHAPES`."""
    a, b = np.split(np.asarray(flat, np.float32), [12], axis=-1)
    return {"a": a.reshape(*a.shape[:-1], 3, 4), "b": b}


# Streams ----------------------------------------------------------------------------------------


def _unit(rng, count):
    q = np.linalg.qr(rng.normal(size=(SIZE, count)))[0].T
    return q


def _cycle(count):
    return lambda rng, n: _unit(rng, count)[np.arange(n) % count]


def _jumps(rng, n):
    """Vectors whose size changes by up to 1e20 from one to the next."""
    return rng.normal(size=(n, SIZE)) * rng.choice([1e-10, 1e-3, 1.0, 1e10], size=(n, 1))


def _repeats(rng, n):
    """Blocks of one to forty exact repeats of a vector."""
    lengths = rng.integers(1, 40, size=n)
    return np.repeat(rng.normal(size=(n, SIZE)), lengths, axis=0)[:n]


STREAMS = {
    "noise": lambda rng, n: rng.normal(size=(n, SIZE)),
    "constant": _cycle(1),
    "alternating": lambda rng, n: _unit(rng, 1) * np.where(np.arange(n) % 2, 1, -1)[:, None],
    "two in turn": _cycle(2),
    "three in turn": _cycle(3),
    "seven in turn": _cycle(7),
    "all in turn": _cycle(SIZE),
    "repeats": _repeats,
    "two dimensions": lambda rng, n: rng.normal(size=(n, 2)) @ _unit(rng, 2),
    "nearly dependent": lambda rng, n: (
        rng.normal(size=(n, 4)) * 10.0 ** -np.arange(0, 8, 2) @ _unit(rng, 4)
    ),
    "noise of 1e-7": lambda rng, n: _unit(rng, 1) + 1e-7 * rng.normal(size=(n, SIZE)),
    "noise of 1e-4": lambda rng, n: (
        rng.normal(size=(n, 3)) @ _unit(rng, 3) + 1e-4 * rng.normal(size=(n, SIZE))
    ),
    "jumps of 1e20": _jumps,
    "one huge": lambda rng, n: (
        rng.normal(size=(n, SIZE)) * np.where(np.arange(n) == n // 3, 1e17, 1)[:, None]
    ),
    "growing": lambda rng, n: rng.normal(size=(n, SIZE)) * np.geomspace(1e-17, 1e17, n)[:, None],
    "fading": lambda rng, n: rng.normal(size=(n, SIZE)) * np.geomspace(1e17, 1e-17, n)[:, None],
    "mostly zero": lambda rng, n: rng.normal(size=(n, SIZE)) * (rng.random((n, SIZE)) < 0.04),
}
"""Makers of ``(n, 24)`` gradients, from a generator and ``n``."""

REPLIES = {
    "orthogonal to all kept": lambda v, inside: v - inside,
    "nearly inside": lambda v, inside: inside + 1e-3 * (v - inside),
    "just inside": lambda v, inside: inside + 3e-4 * (v - inside),
    "inside": lambda v, inside: inside,
}
"""Streams that answer the basis: of noise ``v`` and its part inside the basis, the gradient."""


def watch(basis, inner, reply=None):
    """A function of gradients that runs them all, and tells what it saw.

    Returns the last parameters and state, and of every step updates and `picture`.
    """
    tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, inner)

    def step(carry, g):
        params, state = carry
        if reply is not None:
            layout = Layout.of(g, None)
            v = layout.flatten(g)
            inside = basis.unproject(layout, state.basis, basis.project(layout, state.basis, v))
            some = state.steps[0] > 0
            v = [jnp.where(some, reply(x, y), x) for x, y in zip(v, inside, strict=True)]
            g = layout.unflatten(v)
        updates, state = tx.update(g, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return (params, state), (updates, picture(basis, state, g))

    start = tree(np.zeros(SIZE))
    return lambda grads: jax.lax.scan(step, (start, tx.init(start)), grads)


def picture(basis, state, like):
    """``T``, ``W`` and which slots are live; ``T`` is 1 where the basis has no rows."""
    layout, kept = Layout.of(like, None), state.basis
    live = basis.eigenbasis(kept).live[0]
    if hasattr(kept, "t") and hasattr(kept, "rows"):
        return kept.t[0, : len(live)], layout.stored(kept.rows), live
    if hasattr(kept, "learners"):
        return kept.t[0], list(kept.learners[0].operator.rows), live
    eye = jnp.eye(len(live), dtype=layout.dtype)
    return eye, basis.unproject(layout, kept, eye[None]), live


def orthogonality(pictures):
    """``max |Q^T Q - I|`` on live slots and ``|q|`` on dead ones, ``(n,)``, in float64."""
    t, rows, live = pictures
    q = np.asarray(t, np.float64) @ join(rows)
    gram = q @ np.swapaxes(q, -1, -2)
    ideal = np.asarray(live, np.float64)[..., None] * np.eye(gram.shape[-1])
    return np.abs(gram - ideal).max((-1, -2))


# Spoiled numbers --------------------------------------------------------------------------------

MOST = float(np.finfo(np.float32).max)
VALUES = {
    "NaN": np.nan,
    "infinite": np.inf,
    "-infinite": -np.inf,
    "largest": MOST,
    "square overflows": 1e25,
    "fourth power overflows": 3e12,
    "denormal": 1e-40,
    "square is denormal": 1e-21,
    "zero": 0.0,
}
"""By name, a number that is put into gradients."""


def spoil(rng, flat, value):
    """One entry, one leaf or all of a gradient ``(24,)`` replaced by a value of random signs."""
    flat = np.array(flat)
    where = [[rng.integers(SIZE)], range(12), range(12, SIZE), range(SIZE)][rng.integers(4)]
    flat[where] = value * rng.choice([-1, 1], size=len(where))
    return flat


def spoiled(rng, steps, share, values=tuple(VALUES)):
    """Gradients ``(steps, 24)`` of noise, a ``share`` of them spoiled, the last twenty sound."""
    flat = rng.normal(size=(steps, SIZE)).astype(np.float32)
    for i in np.flatnonzero(rng.random(steps - 20) < share):
        flat[i] = spoil(rng, flat[i], VALUES[values[rng.integers(len(values))]])
    return flat


def whole(state):
    """Whether all of a state is finite, but for what is infinite at the start."""
    kept = [
        (jax.tree_util.keystr(path), x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return all(np.all(np.isfinite(x)) for path, x in kept if "lowest" not in path)


# Long runs --------------------------------------------------------------------------------------

COUNTERS = ("count", "steps", "updates", "columns", "estimates", "seen", "skipped")


def aged(state, at):
    """The state as if all its counters had come to ``at``."""

    def age(path, x):
        counts = x.dtype == jnp.int32 and any(f".{name}" in map(str, path) for name in COUNTERS)
        return jnp.full_like(x, at) if counts else x

    return jax.tree_util.tree_map_with_path(age, state)
