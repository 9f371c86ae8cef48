"""Curvatures against what defines them: secant equations, dense sums, exact Hessians, counts."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import basis, curvature, inner

D = 6


def quadratic(seed=0, indefinite=False):
    """A Hessian ``(D, D)`` with eigenvalues 1 to 20, and the loss ``½ x^T H x - b·x``."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    lam = np.geomspace(1, 20, D)
    if indefinite:
        lam[::2] *= -1
    h, b = jnp.asarray((q * lam) @ q.T), jnp.asarray(rng.normal(size=D))
    return h, b, lambda x: 0.5 * x @ h @ x - b @ x


def full(rank=D, **options):
    return basis.Eigen(rank, None, eig_tol=0.0, update_damping=0.0, **options)


def dense(state, gamma=0.0, lam=None):
    """``B = Q diag(lam) Q^T + gamma (I - Q Q^T)`` of the first group, from the stored rows."""
    if hasattr(state.basis, "matrix"):
        return np.asarray(state.basis.matrix[0])
    rows = np.concatenate([np.asarray(w, float) for w in jax.tree.leaves(state.basis.rows)], axis=1)
    q = np.asarray(state.basis.t[0]) @ rows
    lam = np.asarray(state.basis.lam[0]) if lam is None else lam
    return (q.T * lam) @ q + gamma * (np.eye(q.shape[1]) - q.T @ q)


def optimizer(*parts, **options):
    """``init`` and a compiled ``update(grads, state, params, **extra)`` with static functions."""
    tx = lro.scale_by_lre(*parts, **options)

    def compiled(**functions):
        return jax.jit(lambda g, s, x=None, **arrays: tx.update(g, s, x, **arrays, **functions))

    return tx.init, compiled


def outside(tx_curvature, state):
    return float(tx_curvature.outside(state.curvature)[0])


# --- quasi-Newton ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, kept",
    [
        (curvature.BFGS(), full(8)),
        (curvature.BFGS(damping=None, gamma=2.0), basis.FullMatrix(None)),
        (curvature.BFGS(product=curvature.GradientDifference()), basis.FullMatrix(None)),
        (curvature.SR1(), full(8)),
        (curvature.SR1(gamma=0.5), basis.FullMatrix(None)),
        (curvature.SR1(probe=curvature.RademacherProbe()), full(8)),
        (curvature.SR1(product=curvature.GradientDifference()), basis.FullMatrix(None)),
    ],
    ids=repr,
)
def test_secant_equation(part, kept, x64):
    h, _, loss = quadratic()
    tx = lro.scale_by_lre(part, kept, inner.LInv(), complement=inner.LInv())
    update = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=loss))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=D))
    state = tx.init(x)
    grad = jax.grad(loss)
    _, state = update(grad(x), state, x)
    for _ in range(8):
        old, before = x, state
        x = x + jnp.asarray(rng.normal(size=D))
        _, state = update(grad(x), state, x)
        s = np.asarray(x - old)
        y = np.asarray(h @ s)
        if isinstance(part.probe, curvature.RademacherProbe):
            key = jax.random.fold_in(jax.random.wrap_key_data(before.key), jnp.max(before.steps))
            key = jax.random.split(jax.random.split(key)[0], 1)[0]
            s = np.asarray(jax.random.rademacher(key, (D,), float))
            y = np.asarray(h @ s)
        b = dense(state, outside(part, state))
        np.testing.assert_allclose(b @ s, y, rtol=1e-9, atol=1e-8)
        np.testing.assert_allclose(b, b.T, atol=1e-10)
    if isinstance(part, curvature.BFGS):
        assert np.all(np.linalg.eigvalsh(b) > 0)
    assert [int(n[0]) for n in state.events] == [0, 0, 0, 0]


def test_first_sr1_update_keeps_the_matrix_positive(x64):
    h, _, loss = quadratic()
    part = curvature.SR1(probe=curvature.NormalProbe())
    init, update = optimizer(part, full(), inner.LInv())
    x = jnp.ones(D)
    _, state = update(value_fn=loss)(jax.grad(loss)(x), init(x), x)
    assert np.linalg.eigvalsh(dense(state, outside(part, state)))[0] > 0.1


def test_bfgs_stays_positive_on_indefinite_hessian(x64):
    h, _, loss = quadratic(indefinite=True)
    part = curvature.BFGS(probe=curvature.NormalProbe())
    tx = lro.scale_by_lre(part, full(), inner.LInv())
    update = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=loss))
    x = jnp.ones(D)
    state = tx.init(x)
    for _ in range(15):
        _, state = update(jax.grad(loss)(x), state, x)
        assert np.all(np.linalg.eigvalsh(dense(state, outside(part, state))) > 0)
    assert int(state.basis.updates[0]) > 5


def test_powell_damping(x64):
    """In an empty basis ``B = gamma I``; a pair with ``y·s < c s·Bs`` is damped to equality."""
    c, gamma = 0.2, 3.0
    h = jnp.diag(jnp.asarray([0.1, 0.2, -1.0]))
    loss = lambda x: 0.5 * x @ h @ x
    x = jnp.asarray([1.0, -2.0, 0.3])
    part = curvature.BFGS(probe=curvature.GradientProbe(), damping=c, gamma=gamma)
    init, update = optimizer(part, full(3), inner.LInv())
    _, state = update(value_fn=loss)(jax.grad(loss)(x), init(x), x)
    s = np.asarray(jax.grad(loss)(x))
    bs, y = gamma * s, np.asarray(h @ s)
    assert s @ y < c * s @ bs
    theta = (1 - c) * (s @ bs) / (s @ bs - s @ y)
    y = theta * y + (1 - theta) * bs
    expected = gamma * np.eye(3) + np.outer(y, y) / (y @ s) - np.outer(bs, bs) / (s @ bs)
    np.testing.assert_allclose(dense(state, gamma), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(s @ expected @ s, c * gamma * s @ s)


@pytest.mark.parametrize("indefinite", [False, True])
def test_sr1_recovers_hessian_and_newton_is_exact(indefinite, x64):
    h, b, loss = quadratic(indefinite=indefinite)
    part = curvature.SR1(probe=curvature.NormalProbe())
    tx = lro.scale_by_lre(part, full(D + 2), inner.LInv(), complement=inner.LInv())
    update = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=loss))
    x = jnp.ones(D)
    state = tx.init(x)
    for _ in range(D):
        direction, state = update(jax.grad(loss)(x), state, x)
    np.testing.assert_allclose(dense(state, outside(part, state)), h, atol=1e-8)
    np.testing.assert_allclose(x - direction, jnp.linalg.solve(h, b), atol=1e-8)
    columns = int(state.basis.columns[0])
    _, after = update(jax.grad(loss)(x), state, x)
    assert int(after.basis.columns[0]) == columns  # B s = y already: skipped, nothing counted
    jax.tree.map(np.testing.assert_array_equal, after.basis, state.basis)
    assert float(after.metrics.drift[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("part", [curvature.BFGS, curvature.SR1])
def test_no_pair_before_the_first_step(part, x64):
    _, _, loss = quadratic()
    init, update = optimizer(
        part(product=curvature.GradientDifference()), full(), inner.LInv(), complement=inner.LInv()
    )
    x = jnp.ones(D)
    g = jax.grad(loss)(x)
    direction, state = update()(g, init(x), x)
    np.testing.assert_allclose(direction, g)  # gamma is 1 until a pair tells
    assert int(state.basis.columns[0]) == 0 and int(state.basis.updates[0]) == 0
    assert not np.any(state.basis.lam) and not np.any(state.basis.rows)
    assert int(state.steps[0]) == 1


@pytest.mark.parametrize("part", [curvature.BFGS(), curvature.SR1()], ids=["bfgs", "sr1"])
def test_quasi_newton_minimises(part, x64):
    h, b, loss = quadratic()
    tx = lro.lre(1.0, part, full(D + 2, update_abs=True), inner.LInv(), complement=inner.LInv())
    update = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x, value_fn=loss))
    x = jnp.zeros(D)
    state = tx.init(x)
    for _ in range(25):
        u, state = update(x, state)
        x = x + u
    np.testing.assert_allclose(x, jnp.linalg.solve(h, b), atol=1e-8)


@pytest.mark.parametrize("kind", ["bfgs", "sr1"])
@pytest.mark.parametrize(
    "kept", [basis.Eigen, lambda *a, **k: basis.RandomizedEigen(*a, oversample=9, **k)]
)
def test_truncation_keeps_what_differs_most_from_gamma(kind, kept, x64):
    """A direction that is dropped goes back to ``gamma``; the dense ``B`` is cut the same way."""
    gamma, rank = 9.0, 3
    h, _, loss = quadratic()
    probe = curvature.GradientProbe()
    part = (
        curvature.BFGS(probe=probe, gamma=gamma)
        if kind == "bfgs"
        else curvature.SR1(probe=probe, gamma=gamma)
    )
    init, update = optimizer(part, kept(rank, None, eig_tol=0.0, update_damping=0.0), inner.LInv())
    update, rng = update(value_fn=loss), np.random.default_rng(2)
    state, b = init(jnp.zeros(D)), gamma * np.eye(D)
    for _ in range(10):
        s = rng.normal(size=D)
        _, state = update(jnp.asarray(s), state, jnp.zeros(D))
        y, bs = np.asarray(h @ s), b @ s
        if kind == "bfgs":
            assert s @ y >= 0.2 * s @ bs  # so far from it that nothing is damped
            b = b + np.outer(y, y) / (y @ s) - np.outer(bs, bs) / (s @ bs)
        else:
            b = b + np.outer(y - bs, y - bs) / ((y - bs) @ s)
        lam, q = np.linalg.eigh(b - gamma * np.eye(D))
        lam[np.argsort(-np.abs(lam))[rank:]] = 0
        b = gamma * np.eye(D) + (q * lam) @ q.T
        np.testing.assert_allclose(dense(state, gamma), b, atol=1e-8)
    assert np.min(state.basis.lam) < gamma < np.max(state.basis.lam)  # both kinds were kept


@pytest.mark.parametrize("part, most", [(curvature.BFGS(), 1e-7), (curvature.SR1(), 1e-5)])
def test_truncated_quasi_newton_minimises(part, most, x64):
    """A tenth of the directions of a quadratic at condition 1e3, 200 steps."""
    d, rng = 100, np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    h = jnp.asarray((q * np.geomspace(1, 1e3, d)) @ q.T)
    loss = lambda x: x @ h @ x / 2
    tx = lro.lowrank_newton(rank=10, curvature=part)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(h @ x, state, x, value_fn=loss)
        return (x + updates, state), loss(x)

    x = jnp.asarray(rng.normal(size=d))
    values = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), None, length=200))(x)[1]
    assert values[-1] < most * values[0]


def test_first_step_of_negative_curvature_descends():
    """The first correction's eigenvalues are not regularised, but they lose their sign."""
    loss = lambda x: -2 * x[0] ** 2 + 0.1 * x[0] ** 4 + 0.5 * x[1] ** 2
    x = jnp.array([0.5, 0.1])
    tx = lro.lowrank_newton(rank=2, curvature=curvature.SR1())
    g = jax.grad(loss)(x)
    updates, state = tx.update(g, tx.init(x), x, value_fn=loss)
    assert np.min(lro.diagnose.find(state).basis.lam) < 0  # as measured
    assert g @ updates < 0 and loss(x + updates) < loss(x)


def test_product_that_is_not_finite_is_counted(x64):
    loss = lambda x: jnp.sum(jnp.sqrt(x))
    for part in (curvature.BFGS(), curvature.SR1(), curvature.HutchinsonHessian()):
        init, update = optimizer(part, basis.FullMatrix(None), inner.LInv())
        start, update = init(jnp.ones(3)), update(value_fn=loss)
        for bad in (jnp.zeros(3), -jnp.ones(3)):
            u, state = update(jnp.ones(3), start, bad)
            assert not np.any(u)
            assert int(state.events.eigh[0]) == 1
            jax.tree.map(np.testing.assert_array_equal, state.basis, start.basis)
        u, state = update(jnp.ones(3), state, jnp.ones(3) + jnp.arange(3))
        assert np.any(u) and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_shor_dilates_space(x64):
    """In an empty basis ``B = gamma I``: the metric shrinks by ``alpha²`` along ``y``."""
    h, _, loss = quadratic()
    part = curvature.ShorR(probe=curvature.GradientProbe(), alpha=0.5, gamma=2.0)
    init, update = optimizer(part, full(), inner.LPower(1.0), complement=inner.LPower(1.0))
    update, x = update(value_fn=loss), jnp.ones(D)
    g = jax.grad(loss)(x)
    u, state = update(g, init(x), x)
    b = 2 * np.eye(D)
    for _ in range(2):
        y = np.asarray(h @ g)
        by = b @ y
        b = b - 0.75 * np.outer(by, by) / (y @ by)
        np.testing.assert_allclose(dense(state, 2.0), b, atol=1e-10)
        np.testing.assert_allclose(u, b @ g, rtol=1e-9)
        x = x - 0.01 * u
        g = jax.grad(loss)(x)
        u, state = update(g, state, x)


# --- products and probes --------------------------------------------------------------------------


def layout_of(tree, groups=None):
    from lowrank_optax._core.layout import Layout

    return Layout.of(tree, groups)


def evidence(params, loss, seed=0, due=None):
    layout = layout_of(params)
    g = layout.flatten(jax.grad(loss)(params))
    due = jnp.ones(layout.n, bool) if due is None else due
    same = lambda v, gamma=None: v
    return layout, curvature.Evidence(
        g, due, params, {"value_fn": loss}, jax.random.key(seed), same, same
    )


def test_products_agree(x64):
    params = {"a": jnp.linspace(-1, 1, 4).reshape(2, 2), "b": jnp.asarray([0.3, 0.2, 0.1])}
    loss = lambda p: jnp.sum(jnp.sin(p["a"]) ** 2) * jnp.sum(p["b"] ** 3) + jnp.sum(p["b"] ** 4)
    layout, seen = evidence(params, loss)
    z = curvature.NormalProbe().draw(layout, jax.random.key(1), seen.g, None)
    hessian, tangent = jax.hessian(loss)(params), layout.unflatten(z)
    rows = [
        sum(jnp.tensordot(hessian[i][j], tangent[j], tangent[j].ndim) for j in "ab") for i in "ab"
    ]
    products = {
        curvature.ExactProduct(): 1e-12,
        curvature.ForwardDifference(1e-6): 1e-4,
        curvature.ForwardDifference(): 1e-1,
        curvature.CentralDifference(): 1e-5,
    }
    for product, error in products.items():
        out = product.multiply("test", layout, seen, z)
        for a, b in zip(out, rows, strict=True):
            np.testing.assert_allclose(a, b.ravel(), atol=error)


def test_probes():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(5)}
    layout = layout_of(params)
    g = [x.ravel() for x in jax.tree.leaves(params)]
    step = [2 * x for x in g]
    still = [0 * x for x in g]
    key = jax.random.key(0)
    draw = lambda probe, s=step, key=key: probe.draw(layout, key, g, s)
    z = draw(curvature.RademacherProbe())
    assert all(np.all(np.abs(x) == 1) for x in z) and not np.array_equal(z[0][:5], z[1])
    assert [x.shape for x in draw(curvature.NormalProbe())] == [(6,), (5,)]
    jax.tree.map(np.testing.assert_array_equal, draw(curvature.StepProbe()), step)
    jax.tree.map(np.testing.assert_array_equal, draw(curvature.StepProbe(), still), g)
    jax.tree.map(np.testing.assert_array_equal, draw(curvature.GradientProbe()), g)
    mixed = curvature.MixedProbe((curvature.StepProbe(), curvature.GradientProbe()))
    assert mixed.steps and not curvature.MixedProbe((curvature.NormalProbe(),)).steps
    ways = {float(draw(mixed, key=jax.random.key(i))[0][0]) for i in range(12)}
    assert ways == {1.0, 2.0}


def test_hutchinson_is_unbiased(x64):
    """The mean of many exact corrections is the Hessian."""
    h, _, loss = quadratic(indefinite=True)
    x = jnp.ones(D)
    layout, seen = evidence(x, loss)
    for probe in (curvature.RademacherProbe(), curvature.NormalProbe()):
        part = curvature.HutchinsonHessian(probe=probe)

        def one(key, part=part):
            c, _ = part.correct(layout, part.init(layout, 1), seen._replace(key=key))
            y, z = c.columns[0][0], c.right[0][0]
            return (jnp.outer(y, z) + jnp.outer(z, y)) / 2

        count = 20000
        mean = jnp.mean(
            jax.lax.map(one, jax.random.split(jax.random.key(3), count), batch_size=1000), axis=0
        )
        # The entries' standard deviation is of the size of |H|_F.
        np.testing.assert_allclose(mean, h, atol=5 * float(jnp.linalg.norm(h)) / count**0.5)


@pytest.mark.parametrize(
    "kept",
    [
        basis.Eigen(D, None, eig_tol=0.0, update_damping=0.0),
        basis.GGT(2 * D, eig_tol=0.0),
        basis.FullMatrix(None),
    ],
    ids=["eigen", "ggt", "full"],
)
def test_hutchinson_exact_correction(kept, x64):
    """``within=False`` keeps ``(Hz z^T + z z^T H)/2``, negative eigenvalues and all."""
    h, _, loss = quadratic(indefinite=True)
    part = curvature.HutchinsonHessian(probe=curvature.GradientProbe(), within=False)
    init, update = optimizer(part, kept, inner.LPower(1.0))
    update, x = update(value_fn=loss), jnp.ones(D)
    state, expected = init(x), np.eye(D) * isinstance(kept, basis.FullMatrix)
    for _ in range(2):
        g = np.asarray(jax.grad(loss)(x))
        expected = expected + (np.outer(g, h @ g) + np.outer(h @ g, g)) / 2
        u, state = update(jnp.asarray(g), state, x)
        np.testing.assert_allclose(u, expected @ g, rtol=1e-8)
        x = x + 0.1


def test_orthogonalized_probe(x64):
    h, _, loss = quadratic()
    part = curvature.HutchinsonHessian(orthogonalize=True)
    init, update = optimizer(part, full(), inner.LInv())
    update, x = update(value_fn=loss), jnp.ones(D)
    state, g = init(x), jax.grad(loss)(x)
    for i in range(1, D + 3):
        _, state = update(g, state, x)
        # Each probe is a new direction; once the basis holds all, there is nothing to correct.
        assert int(jnp.sum(state.basis.lam != 0)) == min(i, D)
        assert int(state.basis.columns[0]) == 2 * min(i, D)


def spiked(scale, d=200):
    """Five eigenvalues of ``d``, the loss that has them, and the five eigenvectors as rows."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0][:, :5]
    h = jnp.asarray(scale * (q * SPIKES) @ q.T, jnp.float32)
    return lambda x: x @ h @ x / 2, q.T, h


SPIKES = np.array([100.0, 80.0, 60.0, 40.0, 20.0])


def learned(part, kept, loss, d, steps, inside=None, **options):
    """The state after so many updates at one point, with gradients that are noise."""
    tx = lro.scale_by_lre(part, kept, inside or inner.LInv(), **options)
    grads = jax.random.normal(jax.random.key(1), (steps, d))
    step = lambda s, g: (tx.update(g, s, jnp.zeros(d), value_fn=loss)[1], None)
    return jax.jit(lambda s: jax.lax.scan(step, s, grads)[0])(tx.init(jnp.zeros(d)))


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-4])
@pytest.mark.parametrize("part", [curvature.HutchinsonHessian(), curvature.SquaredHessian()])
def test_hessian_bases_do_not_depend_on_the_unit_of_the_loss(part, scale):
    """The leading directions are found and their eigenvalues are those of the Hessian."""
    loss, q, _ = spiked(scale)
    kept = basis.Eigen(10, 0.99, update_damping=0.0)
    state = learned(part, kept, loss, q.shape[1], 400)
    rows = np.asarray(state.basis.t[0]) @ np.asarray(state.basis.rows)
    assert np.sum((rows @ q.T) ** 2) > 0.99 * 5
    lam = np.asarray(kept.eigenbasis(state.basis).lam[0])[:5]
    if isinstance(part, curvature.SquaredHessian):
        lam = np.sqrt(lam)
    np.testing.assert_allclose(lam / scale, SPIKES, rtol=0.3)


def test_short_columns_in_half_precision():
    """The first product's second column is rounding alone; its scale is beyond float16."""
    x = jnp.ones(6, jnp.float16)
    loss = lambda x: jnp.sum(x.astype(jnp.float32) ** 2 * jnp.arange(1.0, 7))
    tx = lro.scale_by_lre(curvature.HutchinsonHessian(), basis.Eigen(4), inner.LInv())
    state = tx.init(x)
    for _ in range(3):
        u, state = jax.jit(lambda s: tx.update(jax.grad(loss)(x), s, x, value_fn=loss))(state)
        assert np.all(np.isfinite(u)) and np.any(u)


def test_hutchinson_within_the_basis(x64):
    """The correction is the dense one with what neither basis nor product spans left out of z."""
    h, _, loss = quadratic(indefinite=True)
    part = curvature.HutchinsonHessian(probe=curvature.GradientProbe())
    init, update = optimizer(part, full(), inner.LInv())
    update, rng = update(value_fn=loss), np.random.default_rng(3)
    state, b, span = init(jnp.zeros(D)), np.zeros((D, D)), np.zeros((D, 0))
    for i in range(D):
        z = rng.normal(size=D)
        _, state = update(jnp.asarray(z), state, jnp.zeros(D))
        hz = np.asarray(h @ z)
        span = np.linalg.qr(np.column_stack([span, hz]))[0]
        pz = span @ (span.T @ z)
        b = b + (np.outer(hz, pz) + np.outer(pz, hz)) / 2
        np.testing.assert_allclose(dense(state), b, atol=1e-8)
        assert int(jnp.sum(state.basis.lam != 0)) == i + 1


@pytest.mark.parametrize("d", [30, 300])
@pytest.mark.parametrize(
    "part",
    [
        inner.HutchinsonAdam(b2=0.99),
        inner.HutchinsonAdam(gamma=0.01),
        inner.FullMatrixHutchinsonAdam(b2=0.9),
        inner.FullMatrixBFGSAdam(b2=0.9),
    ],
    ids=["adahessian", "sophia", "full_hutchinson", "full_bfgs"],
)
def test_hutchinson_parts_of_the_identity_measure_one(part, d):
    """Along a pair that its basis has just absorbed they would measure about d/8."""
    kept, steps = basis.Eigen(10, eig_tol=1e-8), 80
    loss = lambda x: jnp.sum(x**2) / 2
    state = learned(curvature.HutchinsonHessian(), kept, loss, d, steps, part).inner
    if isinstance(part, inner.HutchinsonAdam):
        found = state.diagonal.inside[0] / (1 - 0.99**steps)
        found = jnp.sqrt(found) if part.gamma is None else found
        outside = state.diagonal.outside[0] / (1 - 0.99**steps)
    else:
        found = jnp.diagonal(state.hessian.inside[0])
        outside = state.hessian.outside[0] / (1 - 0.9**steps)
    np.testing.assert_allclose(outside, 1, rtol=1e-3)
    np.testing.assert_allclose(np.mean(found), 1, atol=0.35)
    assert np.max(found) < 2.5 and np.min(found) > 0.4


def test_measured_diagonal_is_unbiased(x64):
    """Over many probes, in the basis that each of them leaves behind."""
    h, _, loss = quadratic()
    part = inner.HutchinsonAdam(b2=0.0, gamma=1.0)
    tx = lro.scale_by_lre(curvature.HutchinsonHessian(), basis.Eigen(3), part)
    x, g = jnp.zeros(D), jnp.ones(D)
    update = lambda state: tx.update(g, state, x, value_fn=loss)[1]
    start, step = tx.init(x), jax.jit(update)
    for _ in range(4):
        start = step(start)

    def error(key):
        state = update(start._replace(key=jax.random.key_data(key)))
        q = state.basis.t[0] @ state.basis.rows[0]
        return state.inner.diagonal.inside[0] - jnp.diagonal(q @ h @ q.T)

    errors = jax.jit(jax.vmap(error))(jax.random.split(jax.random.key(0), 4000))
    deviation = np.std(errors, axis=0) / len(errors) ** 0.5
    assert np.all(deviation > 0)  # no slot was empty
    np.testing.assert_array_less(np.abs(np.mean(errors, axis=0)), 4 * deviation)


def test_curvature_outside_a_hessian_basis():
    """What ``LInv()`` divides the complement by is the size of the eigenvalues outside."""
    _, q, h = spiked(1.0)
    h = h + 2 * (jnp.eye(len(h)) - q.T @ q)
    loss = lambda x: x @ h.astype(x.dtype) @ x / 2
    for part, inside in (
        (curvature.HutchinsonHessian(), inner.LInv()),
        (curvature.SquaredHessian(), inner.LInvSqrt()),
    ):
        state = learned(part, basis.Eigen(10, 0.99), loss, len(h), 200, inside, complement=inside)
        known = part.outside(state.curvature)[0] ** -inside.p
        assert 1.8 < known < 4  # a little of the five is outside at first


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        curvature.HutchinsonHessian(),
        curvature.BFGS(),
        curvature.SR1(),
        curvature.EmpiricalFisher(),
        curvature.GaussNewton(chunk=2),
    ],
    ids=lambda part: type(part).__name__,
)
def test_products_only_on_updates(part):
    calls = []
    count = lambda: jax.debug.callback(lambda: calls.append(None))

    def vector(x):
        count()
        return (x - jnp.arange(3.0)) ** 2

    extra = {"value_fn": lambda x: jnp.sum(vector(x)), "losses_fn": vector, "residuals_fn": vector}
    kept = basis.FullMatrix(None)
    tx = lro.scale_by_lre(part, kept, inner.LInv(), update_every=3)
    step = jax.jit(lambda g, s, x: tx.update(g, s, x, **extra))
    x = jnp.ones(3)
    state = tx.init(x)
    counts = []
    for i in range(8):
        _, state = step(jnp.ones(3) + i, state, x)
        jax.block_until_ready(state)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


# --- one column a step ----------------------------------------------------------------------------


def stream(steps=7):
    rng = np.random.default_rng(5)
    return rng.normal(size=(steps, D)), rng.normal(size=(steps, D)), rng.uniform(1, 2, size=steps)


def columns_of(part, grads, params, values):
    """The columns as defined, one for each step."""
    if isinstance(part, lro.experimental.CovarianceTimesLoss):
        lowest = [
            0.0 if i == 0 or not part.adaptive else values[:i].min() for i in range(len(values))
        ]
        return grads * (values - lowest)[:, None]
    if isinstance(part, curvature.GradientEMA):
        out, mean = [], grads[0]
        for g in grads:
            mean = mean + (1 - part.beta) * (g - mean)
            out.append(mean)
        return np.array(out)
    if isinstance(part, lro.experimental.Parameters):
        return params
    if isinstance(part, lro.experimental.Updates):
        return np.concatenate([grads[:1], np.diff(params, axis=0)])
    return grads


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "part",
    [
        curvature.Covariance(),
        lro.experimental.CovarianceTimesLoss(),
        lro.experimental.CovarianceTimesLoss(adaptive=False),
        curvature.GradientEMA(0.7),
        lro.experimental.Parameters(),
        lro.experimental.Updates(),
        lro.experimental.UnrolledGaussNewton(history=3),
    ],
    ids=repr,
)
def test_collected_columns(part, every, x64):
    grads, params, values = stream()
    kept = basis.FullMatrix(None)
    tx = lro.scale_by_lre(part, kept, inner.LPower(1.0), update_every=every)
    step = jax.jit(lambda g, s, x, v: tx.update(g, s, x, value=v))
    state = tx.init(jnp.zeros(D))
    ys, b, since = columns_of(part, grads, params, values), np.eye(D), 0
    for t in range(len(grads)):
        u, state = step(
            *map(jnp.asarray, (grads[t],)), state, jnp.asarray(params[t]), jnp.asarray(values[t])
        )
        if t % every == 0:
            b = b + ys[since : t + 1].T @ ys[since : t + 1]
            since = t + 1
        g = grads[t]
        if isinstance(part, lro.experimental.UnrolledGaussNewton):
            recent = slice(max(0, t - 2), t + 1)
            g = grads[recent].T @ values[recent]
        np.testing.assert_allclose(dense(state), b, atol=1e-9)
        np.testing.assert_allclose(u, b @ g, atol=1e-8)


def test_dropped_step_is_not_collected(x64):
    grads, params, values = stream()
    for part, every in (
        (lro.experimental.CovarianceTimesLoss(), 2),
        (curvature.GradientEMA(), 1),
        (lro.experimental.Updates(), 2),
        (lro.experimental.UnrolledGaussNewton(), 1),
        (curvature.BFGS(), 1),
    ):
        init, update = optimizer(part, basis.FullMatrix(None), inner.LInv(), update_every=every)
        update, state = update(value_fn=lambda x: jnp.sum(x**4)), init(jnp.zeros(D))
        _, state = update(jnp.asarray(grads[0]), state, jnp.asarray(params[0]), value=values[0])
        u, after = update(jnp.full(D, jnp.nan), state, jnp.asarray(params[1]), value=values[1])
        assert not np.any(u)
        jax.tree.map(np.testing.assert_array_equal, after.curvature, state.curvature)
        jax.tree.map(np.testing.assert_array_equal, after.basis, state.basis)


def test_unrolled_survives_a_loss_that_is_not_finite(x64):
    grads, params, values = stream()
    init, update = optimizer(lro.experimental.UnrolledGaussNewton(), basis.GGT(3), inner.LInv())
    update, state = update(), init(jnp.zeros(D))
    for t, v in enumerate([1.0, jnp.inf, 2.0]):
        u, state = update(jnp.asarray(grads[t]), state, value=v)
        assert np.all(np.isfinite(u)) and np.any(u)


def test_differences_of_parameters_are_not_rounded_to_the_rows():
    """Steps far below the rows' precision still give the right pair."""
    h, _, _ = quadratic()
    h = h.astype(jnp.float32)
    loss = lambda x: 0.5 * (x - 100) @ h @ (x - 100)
    part = lro.experimental.Updates()
    init, update = optimizer(part, basis.GGT(3), inner.LPower(1.0), dtype=jnp.bfloat16)
    x = jnp.full(D, 101.0)
    update, state = update(), init(x)
    for _ in range(2):
        _, state = update(jax.grad(loss)(x), state, x)
        s = jnp.arange(D) * 1e-3
        x = x + s
    step = state.curvature.step[0][0]
    assert step.dtype == jnp.float32
    np.testing.assert_allclose(step, s, atol=1e-5)


# --- examples -------------------------------------------------------------------------------------


def network(seed=0, k=5):
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "v": jnp.asarray(rng.normal(size=2))}
    data, target = jnp.asarray(rng.normal(size=(k, 3))), jnp.asarray(rng.normal(size=k))
    residuals = lambda p: jnp.tanh(data @ p["w"]) @ p["v"] - target
    return params, residuals, lambda p: residuals(p) ** 2 / 2


@pytest.mark.parametrize(
    "kind, how, kept",
    [
        ("fisher", "whole", basis.GGT(6, eig_tol=0.0)),
        ("fisher", "uneven", full(8, buffer=2)),
        ("fisher", "given", basis.GGT(6, eig_tol=0.0)),
        ("gauss_newton", "whole", full(8)),
        ("gauss_newton", "chunked", basis.GGT(6, eig_tol=0.0)),
        ("gauss_newton", "given", basis.GGT(6, eig_tol=0.0)),
    ],
    ids=repr,
)
def test_examples_equal_dense_sums(kind, how, kept, x64):
    params, residuals, losses = network()
    fn, name = (losses, "losses_fn") if kind == "fisher" else (residuals, "residuals_fn")
    part = (curvature.EmpiricalFisher if kind == "fisher" else curvature.GaussNewton)(
        chunk={"chunked": 5, "uneven": 2}.get(how)
    )
    jac = jax.jacrev(fn)(params)
    init, update = optimizer(part, kept, inner.LPower(1.0))
    g = jax.grad(lambda p: jnp.sum(losses(p)))(params)
    u, state = (
        update()(g, init(params), per_example_grads=jac)
        if how == "given"
        else update(**{name: fn})(g, init(params), params)
    )
    # In the order of the state's coordinates, which is that of the pieces.
    layout = lro.Layout.of(params, None, small=True)
    j = np.concatenate(layout.columns(jac, "test")[0], axis=1)
    flat = lambda t: np.concatenate(layout.flatten(t))
    np.testing.assert_allclose(dense(state), j.T @ j, atol=1e-10)
    np.testing.assert_allclose(flat(u), j.T @ j @ flat(g), rtol=1e-8)


def test_dual_gauss_newton_step(x64):
    params, residuals, losses = network(k=4)
    init, update = optimizer(curvature.GaussNewton(), basis.GGT(4, eig_tol=0.0), inner.LInv())
    g = jax.grad(lambda p: jnp.sum(losses(p)))
    update, state = update(residuals_fn=residuals), init(params)
    for _ in range(2):
        u, state = update(g(params), state, params)
        j = np.concatenate(
            [np.asarray(x).reshape(4, -1) for x in jax.tree.leaves(jax.jacrev(residuals)(params))],
            axis=1,
        )
        step = j.T @ np.linalg.solve(j @ j.T, np.asarray(residuals(params)))
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(u)])
        np.testing.assert_allclose(flat, step, rtol=1e-8)
        params = jax.tree.map(lambda p, d: p - 0.5 * d, params, u)


# --- messages, groups -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, name, given",
    [
        (lro.experimental.CovarianceTimesLoss(), "value", {}),
        (lro.experimental.UnrolledGaussNewton(), "value", {}),
        (curvature.HutchinsonHessian(), "value_fn", {}),
        (curvature.HutchinsonHessian(product=curvature.CentralDifference()), "value_fn", {}),
        (curvature.HutchinsonHessian(product=curvature.ForwardDifference()), "value_fn", {}),
        (curvature.BFGS(), "value_fn", {}),
        (curvature.SR1(), "value_fn", {}),
        (curvature.ShorR(), "value_fn", {}),
        (curvature.EmpiricalFisher(), "losses_fn", {}),
        (curvature.EmpiricalFisher(), "per_example_grads", {}),
        (curvature.GaussNewton(), "residuals_fn", {}),
        (lro.experimental.Parameters(), "params", None),
        (lro.experimental.Updates(), "params", None),
        (curvature.HutchinsonHessian(), "params", None),
        (curvature.BFGS(), "params", None),
        (curvature.GaussNewton(), "params", None),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_missing_arguments_are_named(part, name, given):
    tx = lro.scale_by_lre(part, full(), inner.LInv())
    x = jnp.ones(3)
    extra = (
        {}
        if given is not None
        else {"value_fn": jnp.sum, "residuals_fn": lambda x: x, "losses_fn": lambda x: x}
    )
    with pytest.raises(ValueError, match=rf"{type(part).__name__}.*{name}"):
        tx.update(x, tx.init(x), None if given is None else x, **extra)


@pytest.mark.parametrize(
    "make",
    [
        lambda: curvature.GradientEMA(1.0),
        lambda: curvature.BFGS(damping=1.0),
        lambda: curvature.BFGS(damping=0.0),
        lambda: curvature.BFGS(gamma=0.0),
        lambda: curvature.SR1(tol=-1.0),
        lambda: curvature.ShorR(alpha=1.0),
        lambda: curvature.ShorR(gamma=None),
        lambda: curvature.EmpiricalFisher(chunk=0),
        lambda: lro.experimental.UnrolledGaussNewton(history=0),
        lambda: curvature.ForwardDifference(0.0),
        lambda: curvature.CentralDifference(-1.0),
        lambda: curvature.MixedProbe(()),
        lambda: curvature.MixedProbe(("normal",)),
        lambda: curvature.HutchinsonHessian(probe="rademacher"),
        lambda: curvature.HutchinsonHessian(product=curvature.RademacherProbe()),
        lambda: curvature.HutchinsonHessian(product=curvature.GradientDifference()),
        lambda: lro.scale_by_lre(curvature.BFGS(), basis.GGT(4), inner.LInv()),
        lambda: lro.scale_by_lre(
            curvature.SR1(product=curvature.GradientDifference()), full(), inner.LInv()
        ),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(ValueError, match="pass|combine"):
        make()


def test_per_example_grads_of_another_shape():
    tx = lro.scale_by_lre(curvature.EmpiricalFisher(), full(), inner.LInv())
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=r"per_example_grads.*\(k, \*leaf.shape\)"):
        tx.update(x, tx.init(x), per_example_grads=jnp.ones((4, 2)))


@pytest.mark.parametrize(
    "part, every",
    [
        (lro.experimental.CovarianceTimesLoss(), 2),
        (curvature.GradientEMA(), 1),
        (lro.experimental.Parameters(), 2),
        (lro.experimental.Updates(), 1),
        (lro.experimental.UnrolledGaussNewton(history=2), 1),
        (curvature.HutchinsonHessian(probe=curvature.GradientProbe(), orthogonalize=True), 1),
        (curvature.BFGS(), 2),
        (curvature.SR1(product=curvature.GradientDifference()), 1),
        (curvature.GaussNewton(), 1),
    ],
    ids=repr,
)
def test_groups_are_independent(part, every, x64):
    """Per leaf, on a separable loss, the result is that of one optimizer for each leaf."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(2, 2))), "b": jnp.asarray(rng.normal(size=3))}
    residual = {"a": lambda x: jnp.sin(x).ravel(), "b": lambda x: jnp.ravel(x**3 + 1)}

    def extras(names):
        tree = lambda p: p if isinstance(p, dict) else {names[0]: p}
        res = lambda p: jnp.concatenate([residual[n](tree(p)[n]) for n in names])
        return {
            "residuals_fn": res,
            "losses_fn": lambda p: res(p) ** 2,
            "value": 1.5,
            "value_fn": lambda p: jnp.sum(res(p) ** 2),
        }

    signed_or_many = curvature.BFGS | curvature.SR1 | curvature.GaussNewton
    kept = full(4) if isinstance(part, signed_or_many) else basis.GGT(4)
    make = lambda **options: lro.lre(
        0.05, part, kept, inner.LInvSqrt(), update_every=every, complement=0.1, **options
    )
    grads = jax.grad(extras("ab")["value_fn"])

    def run(tx, x, names):
        state = tx.init(x)
        step = jax.jit(lambda g, s, x: tx.update(g, s, x, **extras(names)))
        for t in range(4):
            g = grads(x) if names == "ab" else jax.grad(extras(names)["value_fn"])(x)
            if t == 2:  # one bad leaf leaves the other alone
                g = g | {"a": jnp.full_like(g["a"], jnp.nan)} if names == "ab" else g
            u, state = step(g, state, x)
            x = jax.tree.map(jnp.add, x, u)
        return x

    whole, alone = run(make(groups=lro.per_leaf), params, "ab"), run(make(), params["b"], "b")
    np.testing.assert_allclose(whole["b"], alone, rtol=1e-9, atol=1e-12)
    assert np.any(alone != params["b"]) and np.all(np.isfinite(whole["a"]))


# --- the house ------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [curvature, inner], ids=["curvature", "inner"])
def test_no_part_inherits_from_a_concrete_part(package):
    parts = [x for x in vars(package).values() if inspect.isclass(x)]
    bases = {b for part in parts for b in part.__mro__[1:] if "lowrank_optax" in b.__module__}
    assert bases and all(inspect.isabstract(b) for b in bases), bases
