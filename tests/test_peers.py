"""The references that optimizers are compared with in benchmarks/, against oracles."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import importlib

    return importlib.import_module


def dense_klsoap(gradients, b=0.95, start=0.1):
    """KL-SOAP of one matrix in float64, with inverses written out."""
    rows, columns = gradients[0].shape
    first = gradients[0]
    left, right = (1 - b) * first @ first.T / columns, (1 - b) * first.T @ first / rows
    q, p = (np.linalg.eigh(x)[1][:, ::-1] for x in (left, right))
    values = [np.full(rows, start), np.full(columns, start)]
    m = v = np.zeros((rows, columns))
    steps = [m]
    for t, g in enumerate(gradients[1:], 1):
        seen = q.T @ g @ p
        m, v = b * m + (1 - b) * seen, b * v + (1 - b) * seen**2
        steps.append(q @ (m / (np.sqrt(v) + 1e-8)) @ p.T)
        inverse = [u @ np.diag(1 / lam) @ u.T for u, lam in zip((q, p), values, strict=True)]
        new_left, new_right = g @ inverse[1] @ g.T / columns, g.T @ inverse[0] @ g / rows
        left, right = b * left + (1 - b) * new_left, b * right + (1 - b) * new_right
        found = np.diag(q.T @ new_left @ q), np.diag(p.T @ new_right @ p)
        values = [
            np.maximum(b * lam + (1 - b) * x, 1e-2) for lam, x in zip(values, found, strict=True)
        ]
        if t % 10 == 0:
            whole = q @ m @ p.T
            q, p = np.linalg.qr(left @ q)[0], np.linalg.qr(right @ p)[0]
            m = q.T @ whole @ p
    return steps


def test_klsoap_is_the_dense_one(script):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4)) * [3, 2, 1, 0.5]
    gradients = [rng.normal(size=(4, 4)) @ mix for _ in range(25)]
    tx = script("peers").scale_by_klsoap()
    state, update = tx.init(jnp.zeros((4, 4))), jax.jit(tx.update)
    for g, wanted in zip(gradients, dense_klsoap(gradients), strict=True):
        step, state = update(jnp.asarray(g, jnp.float32), state)
        np.testing.assert_allclose(step, wanted, atol=1e-4)


def test_peers_see_layers_apart(script):
    methods = script("methods")
    key = jax.random.key(0)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (3, 4, 5))
    wrapped = methods.apart(partial(script("peers").klsoap), 0.1)
    alone = script("peers").klsoap(0.1)
    state = wrapped.init({"layers": draw(0)})
    states = [alone.init(x) for x in draw(0)]
    for i in range(1, 13):
        steps, state = wrapped.update({"layers": draw(i)}, state, {"layers": draw(0)})
        for j, g in enumerate(draw(i)):
            step, states[j] = alone.update(g, states[j])
            np.testing.assert_allclose(steps["layers"][j], step, atol=1e-5)


def test_kept_aside_is_what_the_seed_says(script):
    tasks = script("tasks")
    assert len(tasks.KEPT_ASIDE) == 4
    assert set(tasks.KEPT_ASIDE) <= set(script("networks").TASKS)
    assert tasks.KEPT_ASIDE == ("residual", "vit", "code", "diffusion")


def test_muon_sees_convolutions_and_leaves_depthwise_ones(script):
    shapes = {"a": (3, 3, 8, 4), "b": (3, 3, 1, 4), "c": (4, 5), "d": (4,)}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    spec = optax.contrib.MuonDimensionNumbers
    seen = script("methods").muon_dimensions(params)
    assert seen == {"a": spec((0, 1, 2), (3,)), "b": None, "c": spec(), "d": None}
