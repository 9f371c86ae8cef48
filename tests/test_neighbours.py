"""The neighbours in benchmarks/, tiny: the claim of each, against an oracle."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


@pytest.fixture
def neighbour(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return lambda name: importlib.import_module(f"neighbour_{name}")


def test_prefix_reconstruction_orders_the_eigenvectors(neighbour):
    vectors = jax.random.normal(jax.random.key(0), (500, 8)) * jnp.array([8, 6, 4.5, 3, 1, 1, 1, 1])
    vectors = vectors @ jnp.linalg.qr(jax.random.normal(jax.random.key(1), (8, 8)))[0]
    found = neighbour("prefix").compare(vectors, rank=3, steps=600)
    assert found["prefixes"].min() > 0.99
    assert found["reconstruction"].min() < 0.9  # the right subspace, but rotated


def test_prefix_loss_is_least_at_eigenvectors(neighbour):
    vectors = jax.random.normal(jax.random.key(0), (50, 4)) * jnp.arange(4.0, 0, -1)
    batch = lro.online.Batch(vectors, jnp.full(50, 1 / 50), {})
    lam, q = jnp.linalg.eigh(vectors.T @ vectors)
    loss = lambda rows: neighbour("prefix").prefix(lro.online.Operator.of(rows, jnp.eye(2)), batch)
    best, swapped = loss(q.T[:1:-1]), loss(q.T[2:])
    share = lam / lam.sum()
    np.testing.assert_allclose(best, 1 - share[3] - share[2] / 2, rtol=1e-5)
    np.testing.assert_allclose(swapped, 1 - share[2] - share[3] / 2, rtol=1e-5)


def test_residuals_tell_anomalies_from_few_shots(neighbour):
    script = neighbour("anomaly")
    rng = np.random.default_rng(0)
    known = rng.normal(size=(30, 64)) @ np.diag(np.geomspace(1, 1e-2, 64))
    mean, subspace = script.normal_subspace(jnp.asarray(known, jnp.float32), 0.9)
    _, s, vt = np.linalg.svd(known - known.mean(0), full_matrices=False)
    rank = np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.9) + 1
    inside = (known - known.mean(0)) @ vt[:rank].T @ vt[:rank]
    expected = np.sum((known - known.mean(0) - inside) ** 2, axis=1)
    np.testing.assert_allclose(script.score(known, mean, subspace), expected, rtol=1e-3)
    residual, _ = script.auroc(shots=5, explained=0.9)
    assert residual > 0.9


def test_stored_heavy_rows_save_the_top_eigenvector(neighbour):
    script = neighbour("heavy_rows")
    rows = script.stream(jax.random.key(0), n=1000, d=40, heavy=6, gap=1.5)
    key, top = jax.random.key(1), np.linalg.svd(rows)[2][0]
    error = lambda op: 1 - float(jnp.vdot(op.eigenvectors()[0], top) ** 2)
    stored = error(script.heavy_and_light(rows, key, block=200))
    plain = error(script.tracked(script.trackers.NoisyPower(1, block=200), rows, key))
    assert 6 <= int(script.heavy_rows(rows).sum()) <= 10
    assert stored < 0.03 < plain


def test_geodesics_reach_the_leading_eigenspace(neighbour):
    script = neighbour("grassmann")
    s = script.random_subspaces(jax.random.key(0), 3, 2, 6)
    h = script.tangent(s, jax.random.normal(jax.random.key(1), s.shape))
    moved = script.geodesic(s, h)
    np.testing.assert_allclose(moved @ moved.mT, np.tile(np.eye(2), (3, 1, 1)), atol=1e-5)
    angles = np.arccos(np.clip(np.linalg.svd(s @ moved.mT, compute_uv=False), 0, 1))
    lengths = np.linalg.svd(h, compute_uv=False)  # the principal angles, up to a quarter turn
    folded = np.abs((lengths + np.pi / 2) % np.pi - np.pi / 2)
    np.testing.assert_allclose(np.sort(angles), np.sort(folded), atol=1e-3)

    c = np.diag([5.0, 4.0, 1.0, 1.0, 0.5, 0.1])
    tx = script.riemannian_sgd(0.02)
    state = tx.init(s)
    energy = lambda s: -jnp.einsum("ckd,de,cke->", s, c, s)
    for _ in range(100):
        updates, state = tx.update(jax.grad(energy)(s), state, s)
        s = optax.apply_updates(s, updates)
    np.testing.assert_allclose(-energy(s), 3 * 9.0, rtol=1e-4)


def test_grassmann_classes_beat_their_own_pca(neighbour):
    accuracy = neighbour("grassmann").compare(k=2, steps=300)
    assert accuracy["Grassmann"] > accuracy["CLAFIC"] + 0.01 > 0.9


def test_coso_keeps_old_tasks(neighbour):
    script = neighbour("coso")
    setting = {"tasks": 3, "steps": 150, "rate": 3e-3, "seed": 0}
    plain, kept = (script.run(method, **setting) for method in (script.fine_tune, script.coso))
    assert kept["old"] > plain["old"] + 0.1
    assert kept["new"] > 0.8


def test_coso_updates_are_orthogonal_to_what_is_remembered(neighbour):
    script = neighbour("coso")
    old = lro.online.Operator.of(jnp.zeros((4, 6)), jnp.eye(4))
    task = lro.online.Operator.of(jnp.eye(3, 6), jnp.diag(jnp.array([8.0, 1.0, 0.5])))
    kept = script.remember(old, task, 0.9)  # 8 of 9.5 is too little, 9 enough
    v = jnp.arange(1.0, 7.0)
    np.testing.assert_allclose(kept.residual(v), [0, 0, 3, 4, 5, 6], atol=1e-5)
    more = script.remember(kept, lro.online.Operator.of(jnp.eye(1, 6, 4), jnp.eye(1)), 0.9)
    np.testing.assert_allclose(more.residual(v), [0, 0, 3, 4, 0, 6], atol=1e-5)


def test_trajectories_need_fewer_dimensions(neighbour):
    script = neighbour("intrinsic_dimension")
    full, few = script.sweep(ranks=(8,), steps=200, names=("random", "trajectory"))
    assert few["random"] < 0.6 < 0.9 * full["full"] < few["trajectory"]
    rows = [{"rank": 99, "full": 1.0}, {"rank": 1, "a": 0.5}, {"rank": 2, "a": 0.95}]
    assert script.dimension(rows, "a") == 2
    assert script.dimension(rows, "b") is None


def test_entropy_keeps_koopman_codes_apart(neighbour):
    script = neighbour("koopman")
    vectors = script.stream(jax.random.key(0), n=6000, noise=6)
    alone, together = (script.codes(vectors, 4, w, steps=600) for w in (0.0, 0.1))
    assert script.effective_rank(alone) < 2.5 < 3.5 < script.effective_rank(together)
    lam, residual = script.spectrum(together)
    slow = np.sort_complex(np.concatenate([script.MODES[:2], script.MODES[:2].conj()]))
    np.testing.assert_allclose(np.sort_complex(lam), slow, atol=0.03)
    np.testing.assert_allclose(residual, 1 - np.abs(lam) ** 2, atol=0.02)
