"""Bases that keep columns, against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import absorbed, after_each, leading, matrix, outer, spectrum, vectors, window
from test_selection import run_with_nan

import lowrank_optax as lro
from lowrank_optax.basis import (
    GGT,
    CommonDirections,
    DropOldest,
    DropSmallest,
    LowRankFactor,
    Reconstruct,
)

D, SIZES = 12, (5, 1, 6)


def stream(seed, steps, k, signed=False):
    """Columns ``(steps, k, D)`` and weights ``(steps, k)``, some of them 0."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(steps, k, D)) * rng.uniform(0.5, 3, size=(steps, k, 1))
    weights = rng.uniform(0.5, 2, size=(steps, k))
    if k > 1:
        weights *= rng.random((steps, k)) < 0.8
    if signed:
        weights *= rng.choice([-1, 1], size=(steps, k))
    return columns, weights


def reconstructed(columns, weights, rank, keep):
    """``B`` after every correction: summed while there is room, else cut to ``keep`` eigenpairs."""
    b, held, result = np.zeros((D, D)), 0, []
    for many, ws in zip(columns, weights, strict=True):
        b, held = b + outer(many, ws), held + np.count_nonzero(ws)
        if held > rank:
            b, held = leading(b, keep), keep
        result.append(b)
    return np.stack(result)


def largest(columns, weights, rank):
    """``B`` of the ``rank`` columns of the largest ``|w| ‖y‖²`` so far."""
    past, result = [], []
    for many, ws in zip(columns, weights, strict=True):
        past += [(y, w) for y, w in zip(many, ws, strict=True) if w]
        past = sorted(past, key=lambda c: -abs(c[1]) * (c[0] @ c[0]))[:rank]
        result.append(sum(w * np.outer(y, y) for y, w in past))
    return np.stack(result)


RULES = {
    "half": (Reconstruct(), lambda c, w: reconstructed(c, w, 6, 3)),
    "all": (Reconstruct(6), lambda c, w: reconstructed(c, w, 6, 6)),
    "smallest": (DropSmallest(), lambda c, w: largest(c, w, 6)),
}


def check_basis(state, want):
    q, lam = vectors(state), spectrum(state)
    live = np.eye(q.shape[1]) * (lam != 0)[..., None]
    np.testing.assert_allclose(q @ np.swapaxes(q, 1, 2), live, atol=1e-9)
    scale = np.abs(want).max()
    np.testing.assert_allclose(matrix(state), want, atol=1e-9 * scale)
    assert np.all(np.diff(np.abs(lam), axis=1) <= 1e-12 * scale)


@pytest.mark.parametrize(("k", "signed"), ((1, False), (2, True), (9, False), (9, True)))
@pytest.mark.parametrize("rule", RULES)
def test_factor_equals_its_definition(rule, k, signed, x64):
    overflow, reference = RULES[rule]
    columns, weights = stream(k, 10, k, signed)
    # Signs can cancel eigenvalues to almost nothing; what is dropped must not matter.
    basis = LowRankFactor(6, overflow, eig_tol=1e-12)
    state = absorbed(basis, columns, weights, sizes=SIZES, signed=signed)
    check_basis(state, reference(columns, weights))


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("rank", [5, D + 3])
def test_a_window_that_renews_holds_the_last_correction_alone(k, rank, x64):
    columns, weights = stream(k, 6, k, signed=True)
    weights[3] = 0  # no correction: the window stays
    basis = GGT(rank, renew=True, eig_tol=1e-12)
    state = absorbed(basis, columns, weights, sizes=SIZES, signed=True)
    last = [0, 1, 2, 2, 4, 5]
    check_basis(state, np.stack([outer(columns[i], weights[i]) for i in last]))


def test_drop_oldest_is_ggt(x64):
    columns, weights = stream(7, 9, 3, signed=True)
    same = [
        absorbed(basis, columns, weights, sizes=SIZES, signed=True)
        for basis in (GGT(5), LowRankFactor(5, DropOldest()))
    ]
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.parametrize(("beta", "signed"), ((None, False), (1.0, False), (None, True)))
def test_a_window_higher_than_wide_is_decomposed_itself(beta, signed, x64):
    """The same basis as from its Gram matrix, and what is beyond ``d`` dimensions is dead."""
    columns, weights = stream(12, 40, 2, signed)
    basis = GGT(D + 8, beta=beta, eig_tol=1e-12)
    state = absorbed(basis, columns, weights, sizes=SIZES, signed=signed)
    check_basis(state, window(columns, weights, D + 8, beta))
    assert np.count_nonzero(spectrum(state)[-1]) == D and not np.any(state.t[-1, 0, D:])


def test_no_decomposition_is_larger_than_the_vectors():
    tx = lro.scale_by_lre(lro.curvature.Covariance(), GGT(50), lro.inner.LInvSqrt())
    params = jnp.zeros(D)
    text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    solved = [line for line in text.splitlines() if "custom-call(" in line]
    assert len(solved) == 1 and f"(f32[50,{D}]" in solved[0]


def test_a_short_window_in_float32_stays_orthonormal():
    """To ``eps`` times the root of the condition number, where the Gram matrix has the number."""
    rng = np.random.default_rng(13)
    grads = [jnp.asarray(rng.normal(size=(60, D)) * np.geomspace(1, 1e-2, D), jnp.float32)]
    state = after_each(
        lro.scale_by_lre(lro.curvature.Covariance(), GGT(30), lro.inner.LInvSqrt()), grads
    )[1].basis
    q = vectors(state)[-1]
    np.testing.assert_allclose(q @ q.T, np.diag(np.arange(30) < D), atol=3e-5)


def test_more_columns_than_rows(x64):
    columns, weights = stream(8, 4, 9)
    state = absorbed(LowRankFactor(4, DropOldest()), columns, weights)
    flat, ws = columns.reshape(-1, D), weights.ravel()
    last = np.flatnonzero(ws)[-4:]
    np.testing.assert_allclose(matrix(state)[-1], outer(flat[last], ws[last]), atol=1e-10)


@pytest.mark.parametrize(
    "basis",
    (
        CommonDirections(5),
        LowRankFactor(4),
        LowRankFactor(4, DropSmallest()),
        GGT(4, renew=True),
    ),
    ids=("common", "reconstruct", "smallest", "renewed"),
)
def test_momentum_moves_by_the_true_change_of_basis(basis, x64):
    rng = np.random.default_rng(9)
    grads = [jnp.asarray(rng.normal(size=(9, size))) for size in SIZES]
    params = [jnp.asarray(rng.normal(size=(9, size))) for size in SIZES]
    tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.EMA(0.9))

    def step(state, now):
        _, state = tx.update(now[0], state, now[1])
        return state, state

    start = tx.init(jax.tree.map(lambda x: x[0], params))
    state = jax.jit(lambda: jax.lax.scan(step, start, (grads, params))[1])()
    q, g = vectors(state.basis), np.concatenate(grads, axis=1)
    mean, old = np.zeros(q.shape[1]), np.zeros(q.shape[1:])
    for i in range(9):
        mean = 0.9 * q[i] @ (old.T @ mean) + 0.1 * q[i] @ g[i]
        np.testing.assert_allclose(state.inner.mean[i, 0], mean, atol=1e-9)
        old = q[i]


def test_groups_are_independent(x64):
    columns, weights = stream(10, 8, 2)
    whole = absorbed(LowRankFactor(4), columns, weights, sizes=(D - 5, 5), groups=lro.per_leaf)
    alone = absorbed(LowRankFactor(4), columns[..., -5:], weights)
    np.testing.assert_allclose(whole.lam[:, 1], alone.lam[:, 0], atol=1e-10)


def test_reconstruct_in_float32_stays_orthonormal():
    rng = np.random.default_rng(11)
    mix = np.linalg.qr(rng.normal(size=(60, 60)))[0] * np.geomspace(1, 1e-3, 60)
    grads = [jnp.asarray(rng.normal(size=(200, 60)) @ mix, jnp.float32)]
    for keep in (None, 8):
        tx = lro.scale_by_lre(
            lro.curvature.Covariance(), LowRankFactor(8, Reconstruct(keep)), lro.inner.LInvSqrt()
        )
        state = after_each(tx, grads)[1]
        q = vectors(state.basis)
        live = np.eye(8) * (spectrum(state.basis) != 0)[..., None]
        assert np.max(np.abs(q @ np.swapaxes(q, 1, 2) - live)) < 2e-3
        b = outer(np.asarray(grads[0], float), np.ones(200))
        error = np.linalg.norm(b - matrix(state.basis)[-1], 2)
        assert error < 0.5 * np.linalg.norm(b, 2)
        assert not np.any(state.events.eigh)


@pytest.mark.parametrize("update_every", (1, 2))
def test_common_directions_span_the_last_gradients_and_steps(update_every, x64):
    steps, rank = 9, 6
    rng = np.random.default_rng(12)
    grads = {
        "a": jnp.asarray(rng.normal(size=(steps, 2, 4))),
        "b": jnp.asarray(rng.normal(size=(steps, 7))),
    }
    walk = jax.tree.map(lambda g: jnp.asarray(1e-3 * rng.normal(size=g.shape).cumsum(0)), grads)
    tx = lro.scale_by_lre(
        lro.curvature.Covariance(),
        CommonDirections(rank),
        lro.inner.Adam(),
        update_every=update_every,
    )
    update, state = jax.jit(tx.update), tx.init(jax.tree.map(lambda x: x[0], walk))
    flat = lambda tree, i: np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(tree)])
    past, pending, last = [], [], None
    for i in range(steps):
        now = lambda x, i=i: x[i]
        _, state = update(jax.tree.map(now, grads), state, jax.tree.map(now, walk))
        pending.append(flat(grads, i))
        if i % update_every == 0:
            past += [] if last is None else [flat(walk, i) - last]
            past, pending, last = past + pending, [], flat(walk, i)
        q = vectors(state.basis)
        want = np.stack(past[-rank:])
        assert np.sum(np.asarray(state.basis.lam)) == len(want)
        np.testing.assert_allclose(want @ q.T @ q, want, atol=1e-10)
        np.testing.assert_allclose(q @ q.T, np.diag(state.basis.lam[0]), atol=1e-10)


def test_common_directions_without_new_steps():
    g, x = jnp.array([1.0, 2.0, 0.0]), jnp.ones(3)
    tx = lro.scale_by_lre(lro.curvature.Covariance(), CommonDirections(4), lro.inner.Normalize())
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(3):  # the parameters never move
        u, state = update(g, state, x)
    np.testing.assert_allclose(u, g / jnp.linalg.norm(g), rtol=1e-6)
    assert np.sum(np.asarray(state.basis.lam)) == 1
    with pytest.raises(ValueError, match="params"):
        tx.update(g, state)


@pytest.mark.parametrize(
    "basis",
    (
        CommonDirections(4),
        LowRankFactor(3),
        LowRankFactor(3, DropOldest()),
        LowRankFactor(3, DropSmallest()),
    ),
    ids=("common", "reconstruct", "oldest", "smallest"),
)
def test_steps(basis):
    run_with_nan(basis)


@pytest.mark.parametrize(
    "basis", (CommonDirections(3), LowRankFactor(2)), ids=("common", "reconstruct")
)
def test_steps_per_leaf(basis):
    run_with_nan(basis, groups=lro.per_leaf, update_every=2)


def test_refusals():
    for make in (
        lambda: LowRankFactor(0),
        lambda: LowRankFactor(4, "drop_oldest"),
        lambda: LowRankFactor(4, Reconstruct(5)),
        lambda: Reconstruct(0),
        lambda: CommonDirections(1),
        lambda: CommonDirections(4, eig_tol=1.0),
    ):
        with pytest.raises(ValueError, match="pass"):
            make()
    assert LowRankFactor(4) == LowRankFactor(4, Reconstruct())
    assert eval(repr(LowRankFactor(4, DropSmallest()))) == LowRankFactor(4, DropSmallest())


def test_whitening_passes_what_its_window_dropped(x64):
    """One gradient far larger than the rest leaves one eigenvalue above the tolerance: the others'
    part passes, scaled as the largest eigenvalue that may have been dropped."""
    grads = np.random.default_rng(0).normal(size=(12, 30))
    grads[3] *= 1e4
    tx = lro.whiten(10)
    state = tx.init(jnp.zeros(30))
    for g in grads:
        update, state = jax.jit(tx.update)(jnp.asarray(g), state)
    window = grads[-10:]
    lam, q = np.linalg.eigh(window.T @ window / 10)
    kept = lam > 1e-5 * lam[-1]
    assert kept.sum() == 1
    inside = q[:, kept] @ (lam[kept] ** -0.25 * (q[:, kept].T @ grads[-1]))
    rest = grads[-1] - q[:, kept] @ (q[:, kept].T @ grads[-1])
    np.testing.assert_allclose(update, inside + (1e-5 * lam[-1]) ** -0.25 * rest, rtol=1e-6)
