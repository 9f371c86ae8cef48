"""The engine's own options and what it reports, against dense float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, DEFAULT, STEADY
from dense import after_each, matrix, spectrum, vectors

import lowrank_optax as lro

COVARIANCE = lro.curvature.Covariance()


def gradients(steps=7, d=9, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(steps, d)), dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", BASES)
def test_warmup_builds_the_basis_and_moves_nothing(basis):
    g = gradients()
    parts = COVARIANCE, BASES[basis], lro.inner.EMA(0.5)
    updates, states = after_each(lro.scale_by_lre(*parts, warmup_steps=3), g)
    plain = after_each(lro.scale_by_lre(*parts), g)[1]
    np.testing.assert_allclose(matrix(states.basis), matrix(plain.basis), atol=1e-12)
    assert not np.any(updates[:3]) and np.any(updates[3])
    assert states.inner.count[:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    # Its first step is that of a momentum which has seen nothing.
    q = vectors(states.basis)[3]
    np.testing.assert_allclose(updates[3], 0.5 * q.T @ q @ g[3], atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
def test_narrow_rows_and_wide_algebra(basis):
    """Rows in bfloat16: what bfloat16 cannot resolve is lost, and no more."""
    g = gradients(dtype=np.float32)
    parts = COVARIANCE, BASES[basis], STEADY
    narrow, state = after_each(lro.scale_by_lre(*parts, dtype=jnp.bfloat16), g)
    wide, _ = after_each(lro.scale_by_lre(*parts), g.astype(jnp.bfloat16).astype(jnp.float32))
    assert narrow.dtype == jnp.float32
    assert state.basis.lam.dtype == state.basis.t.dtype == jnp.float32
    if hasattr(state.basis, "rows"):
        assert state.basis.rows[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow, wide, atol=3e-2 * np.abs(wide).max())


def test_weight_decay_and_mask():
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    grads = {"w": jnp.array([0.5, 1.0]), "b": jnp.array([-1.0])}
    options = {"basis": lro.basis.GGT(3)}
    plain = lro.lre(0.1, **options)
    decayed = lro.lre(0.1, **options, weight_decay=0.5, mask={"w": True, "b": False})
    before, _ = plain.update(grads, plain.init(params), params)
    after, _ = decayed.update(grads, decayed.init(params), params)
    np.testing.assert_allclose(after["w"], before["w"] - 0.1 * 0.5 * params["w"], rtol=1e-6)
    np.testing.assert_allclose(after["b"], before["b"], rtol=1e-6)


def test_lre_descends_and_the_engine_ascends():
    g = jnp.array([1.0, 2.0, -2.0])
    parts = COVARIANCE, lro.basis.GGT(2), lro.inner.NanToZero()
    up, _ = lro.scale_by_lre(*parts).update(g, lro.scale_by_lre(*parts).init(g))
    down, _ = lro.lre(0.1, *parts).update(g, lro.lre(0.1, *parts).init(g))
    np.testing.assert_allclose(up, g, rtol=1e-6)
    np.testing.assert_allclose(down, -0.1 * g, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("basis", ["ggt", "eigen"])
def test_summary(basis, every):
    """Each figure from its definition, with the dense ``Q`` of every step."""
    g = gradients()
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], lro.inner.LInvSqrt(), update_every=every)
    updates, states = after_each(tx, g)
    summary = jax.vmap(lro.diagnose.summary)(states)
    q, lam = vectors(states.basis), spectrum(states.basis)
    old = np.zeros_like(q[0])
    for i, u in enumerate(updates):
        inside = q[i] @ g[i]
        energy = inside @ inside / (g[i] @ g[i])
        np.testing.assert_allclose(summary.captured_energy[i, 0], energy, atol=1e-9)
        cosine = g[i] @ u / np.linalg.norm(g[i]) / np.linalg.norm(u)
        np.testing.assert_allclose(summary.cosine[i, 0], cosine, atol=1e-9)
        stayed, live = np.sum((q[i] @ old.T) ** 2), np.sum(np.abs(old).max(1) > 0)
        drift = 1 - stayed / live if live else 1.0
        np.testing.assert_allclose(summary.drift[i, 0], drift if i % every == 0 else 0, atol=1e-9)
        error = np.abs(q[i] @ q[i].T - np.diag((lam[i] != 0).astype(float))).max()
        np.testing.assert_allclose(summary.orthogonality_error[i, 0], error, atol=1e-9)
        p = lam[i] / lam[i].sum()
        rank = np.exp(-np.sum(p[p > 0] * np.log(p[p > 0])))
        np.testing.assert_allclose(summary.effective_rank[i, 0], rank, rtol=1e-9)
        old = q[i]
    np.testing.assert_array_equal(summary.spectrum, states.basis.lam)
    assert not any(np.any(x) for x in (summary.nonfinite, summary.zero, summary.eigh))


def test_summary_of_groups_and_of_whatever_holds_the_state():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optax.chain(
        optax.clip(1.0),
        lro.scale_by_lre(COVARIANCE, lro.basis.GGT(4), DEFAULT, groups=lro.per_leaf),
        optax.adam(1e-2),
    )
    update = jax.jit(lambda g, s: tx.update(g, s))
    bad = {"a": jnp.full(3, jnp.nan), "b": jnp.ones(2)}
    _, state = update(bad, tx.init(params))
    _, state = update(params, state)
    summary = jax.jit(lro.diagnose.summary)(state)
    assert summary.nonfinite.tolist() == [1, 0]
    np.testing.assert_allclose(summary.spectrum[:, 0], [3.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(summary.effective_rank, [1.0, 1.0], rtol=1e-6)
