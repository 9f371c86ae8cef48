"""Levenberg-Marquardt on large Jacobians: by eigenvalues, and by products alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.least_squares._jacobian import by_products, dense


def graded(shape, powers, seed=0):
    """A matrix with given powers of ten for its singular values."""
    rng = np.random.default_rng(seed)
    m = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in shape)
    return (u * np.logspace(0, powers, m)) @ v.T


def damped(a, mu, y):
    """``(A^T A + mu I)^{-1} A^T y`` by a QR decomposition of the extended matrix."""
    whole = np.concatenate([a, np.sqrt(mu) * np.eye(a.shape[1])])
    target = np.concatenate([y, np.zeros(a.shape[1])])
    return np.linalg.lstsq(whole, target, rcond=None)[0]


# One array ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(260, 300), (300, 260)], ids=["wide", "tall"])
@pytest.mark.parametrize("mu", [1e-4, 1e-13, 1e-20], ids=str)
def test_large_matrices_are_solved_as_small_ones(shape, mu, x64):
    """By eigenvalues of the Gram matrix above its rounding, by singular values below."""
    a = graded(shape, -4 if mu > 1e-10 else -7)
    y = np.random.default_rng(1).normal(size=shape[0])
    step = jax.jit(lambda a, y: dense(a, lambda top: mu * top).solve(mu, y))(a, y)
    want = damped(a, mu, y)
    error = np.linalg.norm(step - want) / np.linalg.norm(want)
    # Steps through the Gram matrix carry its rounding, relative to the damping.
    assert error < (5 * 2e-16 / mu if 1e-14 < mu < 1e-10 else 1e-6)


# Products ----------------------------------------------------------------------------------------


def space_of(a, start, more, r):
    push, pull = (lambda v: jnp.asarray(a) @ v), (lambda w: jnp.asarray(a).T @ w)
    same = lambda x: x
    return by_products(push, pull, same, jnp.asarray(r), jnp.asarray(start), more, jnp.array(True))


@pytest.mark.parametrize("kept, more", [(0, 7), (3, 5), (3, 40)])
def test_steps_are_the_best_ones_in_the_space(kept, more, x64):
    a, rng = graded((40, 30), -3), np.random.default_rng(2)
    r, y, start = rng.normal(size=40), rng.normal(size=40), rng.normal(size=(kept, 30))
    solver, w, products = space_of(a, start, min(more, 30), r)
    w = np.asarray(w)
    w = w[np.linalg.norm(w, axis=1) > 0.5]
    np.testing.assert_allclose(w @ w.T, np.eye(len(w)), atol=1e-12)
    # What it holds: the start, and the Krylov space of the gradient beside.
    inside = lambda v: np.linalg.norm(v - w.T @ (w @ v)) / np.linalg.norm(v)
    for v in [*start, a.T @ r]:
        assert inside(v) < 1e-10
    if not kept:
        krylov = [a.T @ r]
        for _ in range(more - 1):
            krylov.append(a.T @ (a @ krylov[-1]) / np.linalg.norm(krylov[-1]))
        assert inside(krylov[3]) < 1e-8
        assert int(products) == 1 + 2 * more
    for mu in (1e-6, 1e-2):
        step = np.asarray(solver.solve(mu, y))
        want = w.T @ damped(a @ w.T, mu, y)
        np.testing.assert_allclose(step, want, rtol=1e-7, atol=1e-9 * np.linalg.norm(want))
        if len(w) == 30:
            np.testing.assert_allclose(step, damped(a, mu, y), rtol=1e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=["over", "under"])
def test_with_the_whole_space_it_is_the_damped_solution(shape, x64):
    rng = np.random.default_rng(0)
    a, b, x = rng.normal(size=shape), rng.normal(size=shape[0]), rng.normal(size=shape[1])
    mu = 0.3 * np.linalg.norm(a, 2) ** 2
    options = {"damping": 0.3, "trials": 1, "momenta": (0.1,), "order": 1, "rank": 9}
    tx = lro.levenberg_marquardt(**options)
    fn = lambda x: jnp.asarray(a) @ x - b
    step = jax.jit(lambda x, s: tx.update(x, s, x, residuals_fn=fn))
    state, last = tx.init(jnp.asarray(x)), np.zeros(shape[1])
    for _ in range(2):  # argmin_p ‖A p + r‖² + mu ‖p - q/10‖², q the last step
        last = last / 10 + damped(a, mu, -(a @ x - b) - a @ last / 10)
        updates, state = step(jnp.asarray(x), state)
        np.testing.assert_allclose(updates, last, rtol=1e-9)
        x = x + last
        np.testing.assert_allclose(state.loss, np.sum((a @ x - b) ** 2) / 2, rtol=1e-10)
    assert int(state.products) > 0 and int(state.refused) == 0


def test_the_leading_directions_are_kept(x64):
    a = graded((30, 25), -6)
    tx = lro.levenberg_marquardt(rank=4)
    step = jax.jit(lambda x, s: tx.update(x, s, x, residuals_fn=lambda x: jnp.asarray(a) @ x - 1))
    x = jnp.zeros(25)
    state = tx.init(x)
    for _ in range(3):
        updates, state = step(x, state)
        x = x + updates
    right = np.linalg.svd(a)[2][:4]
    np.testing.assert_allclose(np.linalg.svd(right @ state.rows.T)[1], 1, atol=1e-6)
    np.testing.assert_allclose(state.rows @ state.rows.T, np.eye(4), atol=1e-12)


POINTS = jnp.linspace(0, 1, 30)


def boundary_value(p):
    """``u'' = -π² sin πx`` with zero ends, by 12 tanh units."""
    u = lambda x: jnp.tanh(p[:, 0] * x + p[:, 1]) @ p[:, 2]
    inside = lambda x: jax.grad(jax.grad(u))(x) + jnp.pi**2 * jnp.sin(jnp.pi * x)
    return {"in": jax.vmap(inside)(POINTS), "ends": 10 * jnp.stack([u(0.0), u(1.0)])}


def fit(tx, fn, params, steps):
    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, residuals_fn=fn)
            return (optax.apply_updates(params, updates), state), state.loss

        return jax.lax.scan(body, (params, state), None, length=steps)

    return run(params, tx.init(params))


@pytest.mark.parametrize("precision, bound", [("float64", 3e-4), ("float32", 3e-4)])
def test_a_network_is_fitted_in_a_space_of_few_directions(precision, bound):
    with jax.enable_x64(precision == "float64"):
        start = np.random.default_rng(0).normal(size=(12, 3)) * [3, 1, 0.3]
        tx = lro.levenberg_marquardt(rank=12)
        (params, state), losses = fit(tx, boundary_value, jnp.asarray(start, precision), 60)
        u = jnp.tanh(POINTS[:, None] * params[:, 0] + params[:, 1]) @ params[:, 2]
        assert float(jnp.max(jnp.abs(u - jnp.sin(jnp.pi * POINTS)))) < bound
        assert np.all(np.diff(losses) <= 1e-3 * np.asarray(losses[:-1]) + 1e-8)
        assert 16 < int(state.products) <= 2 + 12 + 1 + 1 + 2 * 12  # fewer where all is found


@pytest.mark.parametrize("where", ["gradient", "residuals", "jacobian"])
def test_what_is_not_finite_changes_nothing_and_is_counted(where):
    bad, good = jnp.array([1.0, jnp.nan]), lambda x: x**2 - 2
    fn = (lambda x: good(x) * bad) if where == "residuals" else good
    if where == "jacobian":
        fn = lambda x: jnp.sqrt(x - jax.lax.stop_gradient(x)) + x  # a slope of infinity
    tx, x = lro.levenberg_marquardt(rank=1), jnp.array([1.0, 2.0])
    _, state = jax.jit(lambda x: tx.update(x, tx.init(x), x, residuals_fn=good))(x)
    g = bad if where == "gradient" else x
    zero, after = jax.jit(lambda g, s, x: tx.update(g, s, x, residuals_fn=fn))(g, state, x)
    np.testing.assert_array_equal(zero, 0)
    assert int(after.nonfinite) == 1 and int(after.refused) == 0
    for name in ("damping", "step", "rows", "loss"):
        np.testing.assert_array_equal(getattr(after, name), getattr(state, name))


def test_a_step_that_no_damping_makes_better_is_refused():
    wrong = lambda x: 2 * jax.lax.stop_gradient(x) - x + 1
    tx, x = lro.levenberg_marquardt(rank=2), jnp.ones(2)
    updates, state = jax.jit(lambda x: tx.update(x, tx.init(x), x, residuals_fn=wrong))(x)
    np.testing.assert_array_equal(updates, 0)
    assert int(state.refused) == 1


def test_sizes_choose():
    """One array up to 4096 on the shorter side and 2^25 entries, products above."""

    def state_after(k, d, **options):
        tx = lro.levenberg_marquardt(order=1, trials=1, momenta=(0.0,), **options)
        params = jax.ShapeDtypeStruct((d,), jnp.float32)
        fn = lambda p: jnp.sin(jnp.arange(k) * jnp.mean(p))
        run = lambda p: tx.update(p, tx.init(p), p, residuals_fn=fn)
        text = str(jax.make_jaxpr(run)(params))
        return f"f32[{k},{d}]" in text, jax.eval_shape(run, params)[1].rows

    assert state_after(300, 500) == (True, ())
    whole, rows = state_after(5000, 6000)
    assert not whole and rows.shape == (48, 6000)
    assert state_after(300, 500, rank=7)[1].shape == (7, 500)
    assert state_after(50000, 1000) == (False, ())
    assert state_after(100, 5000)[0]


# As any optax transformation ---------------------------------------------------------------------

PARAMS = {"a": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array([0.1, 0.2])}
RESIDUALS = lambda p: jnp.tanh(p["a"]) @ jnp.arange(6.0).reshape(3, 2) + p["b"] - 0.3
QUICK = {"rank": 2, "trials": 2, "momenta": (0.0,), "order": 2}


def one(tx, params, fn=RESIDUALS):
    return jax.jit(lambda p: tx.update(p, tx.init(p), p, residuals_fn=fn)[0])(params)


def test_wrappers_of_optax():
    plain = one(lro.levenberg_marquardt(**QUICK), PARAMS)
    make = optax.inject_hyperparams(
        lro.levenberg_marquardt, static_args=("trials", "order", "rank")
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    jax.tree.map(close, one(make(**QUICK), PARAMS), plain)
    twice = optax.MultiSteps(lro.levenberg_marquardt(**QUICK), 1)
    got = jax.jit(lambda p: twice.update(p, twice.init(p), p, residuals_fn=RESIDUALS)[0])(PARAMS)
    jax.tree.map(close, got, plain)
    # A mask holds the rest fixed: the fit of what is left.
    tx = optax.partition(
        {"fit": lro.levenberg_marquardt(**QUICK), "hold": optax.set_to_zero()},
        {"a": "fit", "b": "hold"},
    )
    got = one(tx, PARAMS)
    alone = one(
        lro.levenberg_marquardt(**QUICK),
        {"a": PARAMS["a"]},
        lambda p: RESIDUALS({"a": p["a"], "b": PARAMS["b"]}),
    )
    close(got["a"], alone["a"])
    np.testing.assert_array_equal(got["b"], 0)


def test_many_seeds_at_once():
    tx = lro.levenberg_marquardt(**QUICK)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x - 1]), PARAMS)
    got = jax.jit(jax.vmap(lambda p: tx.update(p, tx.init(p), p, residuals_fn=RESIDUALS)[0]))(many)
    for i in range(3):
        want = one(tx, jax.tree.map(lambda x, i=i: x[i], many))
        close = lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, got, want)


def test_auxiliary_output_is_left_alone():
    tx = lro.levenberg_marquardt(has_aux=True)
    got = one(tx, PARAMS, lambda p: (RESIDUALS(p), {"any": "thing"}))
    jax.tree.map(np.testing.assert_array_equal, got, one(lro.levenberg_marquardt(), PARAMS))
    with pytest.raises(ValueError, match="residuals, aux"):
        one(tx, PARAMS)


def test_scaled_columns_in_a_space(x64):
    """With ``scaling`` the damping is relative to columns' norms, which a product estimates."""
    a = graded((12, 8), -2) * np.logspace(0, 5, 8)
    tx = lro.levenberg_marquardt(rank=8, scaling=1.0)
    (x, state), _ = fit(tx, lambda x: jnp.asarray(a) @ (x - 1), jnp.zeros(8), 40)
    np.testing.assert_allclose(x, 1, rtol=1e-3)
    ratio = np.asarray(state.norms) / np.linalg.norm(a, axis=0)
    assert np.all(ratio > 0.3) and np.all(ratio < 4)
