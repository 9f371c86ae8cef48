"""`levenberg_marquardt` against dense algebra, certified fits and a boundary value problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64

import lowrank_optax as lro


def optimizer(residuals, **options):
    """A jitted step ``(x, state) -> (update, state)`` and the transformation."""
    tx = lro.levenberg_marquardt(**options)
    grad = jax.grad(lambda x: jnp.sum(residuals(x) ** 2) / 2)
    return tx, jax.jit(lambda x, state: tx.update(grad(x), state, x, residuals_fn=residuals))


def descend(residuals, x, steps, **options):
    tx, _ = optimizer(residuals, **options)

    @jax.jit
    def run(x, state):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(jnp.zeros_like(x), state, x, residuals_fn=residuals)
            return (optax.apply_updates(x, updates), state), state.loss

        return jax.lax.scan(body, (x, state), None, length=steps)

    (x, state), losses = run(x, tx.init(x))
    return x, state, losses


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=["under", "over"])
def test_step_on_linear_residuals_is_the_damped_solution(shape, x64):
    rng = np.random.default_rng(0)
    a, b, start = rng.normal(size=shape), rng.normal(size=shape[0]), rng.normal(size=shape[1])
    residuals = lambda x: a @ x - b
    mu = 0.3 * np.linalg.norm(a, 2) ** 2
    tx, step = optimizer(residuals, damping=0.3, trials=1, momenta=(0.1,))
    x, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    last = np.zeros(shape[1])
    for _ in range(2):  # argmin_p ‖A p + r‖² + mu ‖p - q/10‖², q the last step
        whole = np.concatenate([a, np.sqrt(mu) * np.eye(shape[1])])
        target = np.concatenate([b - a @ x, np.sqrt(mu) * last / 10])
        last = np.linalg.lstsq(whole, target, rcond=None)[0]
        updates, state = step(x, state)
        np.testing.assert_allclose(updates, last, rtol=1e-10)
        np.testing.assert_allclose(state.damping, mu, rtol=1e-12)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(state.loss, np.sum((a @ x - b) ** 2) / 2, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_follow_the_curve_on_which_residuals_fall(order, x64):
    """``r(x(t)) = (1 - t) r(x(0))`` is met up to ``O(t^(order + 1))``."""
    residuals = lambda x: jnp.array([jnp.expm1(x[0]) + x[1], jnp.sin(x[1]) - x[0] * x[1] / 3])
    tx = lro.levenberg_marquardt(damping=1e-15, trials=1, momenta=(0.0,), order=order)

    @jax.jit
    def left(t):
        fn = lambda x: residuals(x) - t * jnp.array([1.0, -0.5])
        step, _ = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2), residuals_fn=fn)
        return jnp.linalg.norm(fn(step))

    ratio = left(0.02) / left(0.01)
    np.testing.assert_allclose(ratio, 2 ** (order + 1), rtol=0.1)


def test_float32_keeps_what_squaring_the_jacobian_loses():
    """Singular values down to 1e-5 of the largest, of which ``J J^T`` knows nothing in float32."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, 12)))[0] for n in (12, 30))
    a = ((u * np.logspace(0, -5, 12)) @ v.T).astype(np.float32)
    x = np.asarray(v @ np.ones(12), np.float32)
    b = a.astype(float) @ x
    residuals = lambda x: jnp.asarray(a) @ x - jnp.asarray(b, jnp.float32)
    found, state, _ = descend(residuals, jnp.zeros(30), 30)
    gram = jnp.linalg.solve(a @ a.T, residuals(jnp.zeros(30)))
    norm = lambda y: np.linalg.norm(a.astype(float) @ np.asarray(y, float) - b)
    assert norm(found) < 3e-6 < norm(-a.T @ gram) / 10
    np.testing.assert_allclose(found, x, atol=0.05)


MGH09 = (
    [0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246],
    [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625],
)
CERTIFIED = [0.19280693458, 0.19128232873, 0.12305650693, 0.13606233068]


@pytest.mark.parametrize("start", [[25, 39, 41.5, 39], [0.25, 0.39, 0.415, 0.39]])
def test_certified_curve(start, x64):
    """NIST's MGH09, "difficult for some very good algorithms", to ten digits."""
    y, x = (jnp.asarray(v, float) for v in MGH09)
    residuals = lambda b: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]) - y
    b, state, losses = descend(residuals, jnp.asarray(start, float), 80)
    np.testing.assert_allclose(b, CERTIFIED, rtol=1e-9)
    np.testing.assert_allclose(2 * losses[-1], 3.0750560385e-4, rtol=1e-10)


@pytest.mark.parametrize("precision, bound", [("float64", 5e-8), ("float32", 5e-6)])
def test_boundary_value_problem_by_a_network(precision, bound):
    """``u'' = -π² sin πx`` with zero ends, by 12 tanh units at 30 points."""
    with enable_x64(precision == "float64"):
        points = jnp.linspace(0, 1, 30)
        params = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)) * [3, 1, 0.3], precision)
        u = lambda p, x: jnp.tanh(p[:, 0] * x + p[:, 1]) @ p[:, 2]
        inside = lambda p, x: jax.grad(jax.grad(u, 1), 1)(p, x) + jnp.pi**2 * jnp.sin(jnp.pi * x)

        def residuals(p):
            ends = jnp.stack([u(p, 0.0), u(p, 1.0)])
            return jnp.concatenate([jax.vmap(inside, (None, 0))(p, points), 10 * ends])

        params, state, _ = descend(residuals, params, 150)
        found = jax.vmap(u, (None, 0))(params, points)
        assert float(jnp.max(jnp.abs(found - jnp.sin(jnp.pi * points)))) < bound
        assert int(state.count) == 150 and int(state.nonfinite) == 0 and params.dtype == precision


def test_given_and_chunked_jacobians_are_the_same(x64):
    residuals = lambda p: jnp.tanh(jnp.outer(p["a"], jnp.arange(3.0) + p["b"])).ravel() - 0.3
    params = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(0.2)}
    whole = lro.levenberg_marquardt()
    parts = lro.levenberg_marquardt(chunk=4)
    jac = jax.jacrev(residuals)(params)
    steps = [
        jax.jit(
            lambda p, tx=tx, extra=extra: tx.update(
                p, tx.init(p), p, residuals_fn=residuals, **extra
            )[0]
        )(params)
        for tx, extra in [(whole, {}), (whole, {"per_example_grads": jac}), (parts, {})]
    ]
    for got in steps[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, steps[0])


def test_damping_goes_up_within_a_step(x64):
    """Every step of Newton's size leaves the domain, where the residual is not finite."""
    residuals = lambda x: jnp.where(jnp.abs(x - 1) < 1e-3, x, jnp.nan)
    tx, step = optimizer(residuals, damping=1e-12)
    x = jnp.ones(1)
    state = tx.init(x)
    for _ in range(3):
        updates, state = step(x, state)
        x = optax.apply_updates(x, updates)
        assert int(state.refused) == 0 and float(state.damping) > 100
    assert 0.999 < float(x[0]) < 1 and int(state.nonfinite) == 0


def test_a_step_that_no_damping_makes_better_is_refused(x64):
    """The derivative has the wrong sign, then the right one: the state says so, and goes on."""
    wrong = lambda x: 2 * jax.lax.stop_gradient(x) - x
    tx, step = optimizer(lambda x: wrong(x) + 1)
    x = jnp.ones(2)
    updates, state = step(x, tx.init(x))
    np.testing.assert_array_equal(updates, 0)
    assert int(state.refused) == 1 and float(state.damping) > 1e15
    updates, state = jax.jit(lambda s: tx.update(x, s, x, residuals_fn=lambda x: x + 1))(state)
    assert int(state.refused) == 1
    np.testing.assert_allclose(updates, -2, rtol=1e-2)


def test_a_refused_trial_costs_no_decomposition():
    """One decomposition in the program, outside of the loop over dampings."""
    tx, x = lro.levenberg_marquardt(), jnp.ones(3)
    text = str(
        jax.make_jaxpr(lambda s: tx.update(x, s, x, residuals_fn=lambda x: x**2))(tx.init(x))
    )
    assert text.count("svd[") == 1
    assert "svd[" not in text[text.index(" while[") :]


@pytest.mark.parametrize("where", ["gradient", "residuals", "jacobian"])
def test_what_is_not_finite_changes_nothing_and_is_counted(where):
    bad = jnp.array([1.0, jnp.nan])
    good = lambda x: x**2 - 2
    tx, step = optimizer(good)
    x = jnp.array([1.0, 2.0])
    updates, state = step(x, tx.init(x))
    fn = (lambda x: good(x) * bad) if where == "residuals" else good
    if where == "jacobian":
        fn = lambda x: jnp.sqrt(x - jax.lax.stop_gradient(x)) + x  # a slope of infinity
    g = bad if where == "gradient" else x
    zero, after = jax.jit(lambda g, s, x: tx.update(g, s, x, residuals_fn=fn))(g, state, x)
    np.testing.assert_array_equal(zero, 0)
    assert int(after.nonfinite) == 1
    expected = state._replace(count=state.count + 1, nonfinite=state.nonfinite + 1)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_nothing_left_to_gain():
    """At a root, and where no parameter matters, the update is zero and the state stays finite."""
    for residuals in (lambda x: x - 1, lambda x: jnp.ones(2) + 0 * x[0]):
        tx, step = optimizer(residuals)
        x = jnp.ones(3)
        state = tx.init(x)
        for _ in range(3):
            updates, state = step(x, state)
            np.testing.assert_array_equal(updates, 0)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_updates_have_the_parameters_dtype(dtype):
    params = {"w": jnp.ones((2, 2), dtype), "b": jnp.zeros((), dtype)}
    residuals = lambda p: jnp.ravel(p["w"] @ p["w"]) + p["b"] - 3
    tx = lro.levenberg_marquardt()
    step = jax.jit(lambda p, state: tx.update(p, state, p, residuals_fn=residuals))
    state = tx.init(params)
    start = jnp.sum(residuals(params).astype("float32") ** 2) / 2
    for _ in range(4):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert all(x.dtype == dtype for x in jax.tree.leaves((updates, params)))
    assert float(state.loss) < 1e-2 * float(start)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"trials": 0},
        {"spread": 1.0},
        {"momenta": ()},
        {"momenta": (1.5,)},
        {"order": 0},
        {"chunk": 0},
    ],
    ids=str,
)
def test_values_are_checked(options):
    with pytest.raises(ValueError, match="pass"):
        lro.levenberg_marquardt(**options)


def test_missing_and_misshapen_arguments_are_named():
    tx, x = lro.levenberg_marquardt(), jnp.ones(2)
    state = tx.init(x)
    with pytest.raises(ValueError, match="residuals_fn"):
        tx.update(x, state, x)
    with pytest.raises(ValueError, match="parameters"):
        tx.update(x, state, residuals_fn=lambda x: x)
    with pytest.raises(ValueError, match="3 rows of 2 entries for 2 residuals"):
        tx.update(x, state, x, residuals_fn=lambda x: x, per_example_grads=jnp.ones((3, 2)))


# An ordinary optax transformation -----------------------------------------------------------------

RESIDUALS = lambda p: jnp.tanh(p["a"]) @ jnp.arange(6.0).reshape(3, 2) + p["b"] - 0.3
PARAMS = {"a": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array([0.1, 0.2])}
QUICK = {"trials": 2, "momenta": (0.0,), "order": 2}


def one(tx, params, grads=None, fn=RESIDUALS):
    grads = params if grads is None else grads
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, residuals_fn=fn)[0])(grads, params)


def test_dtypes_of_gradients_and_numpy_do_not_matter():
    cast = lambda dtype: jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    tx = lro.levenberg_marquardt(**QUICK)
    want = one(tx, PARAMS)
    for params, grads in [("bfloat16", "float32"), ("float32", "float16"), ("float16", "float32")]:
        got = one(tx, cast(params), cast(grads))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))  # as optax promotes
        close = lambda a, b: np.testing.assert_allclose(a.astype("float32"), b, atol=0.02)
        jax.tree.map(close, got, want)
    doubles = jax.tree.map(lambda x: np.asarray(x, "float64"), PARAMS)
    updates, _ = tx.update(doubles, tx.init(doubles), doubles, residuals_fn=RESIDUALS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, want)


def test_injected_numbers_can_be_changed_and_sizes_are_static():
    make = optax.inject_hyperparams(lro.levenberg_marquardt, static_args=("trials", "order"))
    tx = make(scaling=1.0, **QUICK)
    plain = lro.levenberg_marquardt(scaling=1.0, **QUICK)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        one(tx, PARAMS),
        one(plain, PARAMS),
    )
    state = tx.init(PARAMS)
    update = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, residuals_fn=RESIDUALS))
    before, _ = update(state)
    state.hyperparams["damping"] *= 1e4
    after, _ = update(state)
    assert optax.tree.norm(after) < 0.5 * optax.tree.norm(before)
    with pytest.raises(ValueError, match="static_args"):
        one(optax.inject_hyperparams(lro.levenberg_marquardt)(trials=2), PARAMS)


def test_concrete_arrays_pass_for_numbers():
    numbers = {"trials": jnp.array(2), "order": np.int32(2), "momenta": (jnp.array(0.0),)}
    tx = lro.levenberg_marquardt(damping=jnp.array(1e-3), spread=np.float32(4), **numbers)
    jax.tree.map(
        np.testing.assert_array_equal,
        one(tx, PARAMS),
        one(lro.levenberg_marquardt(**QUICK), PARAMS),
    )


def test_many_fits_at_once():
    tx = lro.levenberg_marquardt(scaling=1.0, **QUICK)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x - 1]), PARAMS)
    step = lambda p: tx.update(p, tx.init(p), p, residuals_fn=RESIDUALS)[0]
    got = jax.jit(jax.vmap(step))(many)
    for i in range(3):
        want = one(tx, jax.tree.map(lambda x, i=i: x[i], many))
        close = lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, got, want)


def test_ranks_are_not_promoted():
    fn = lambda p: jnp.tanh(p["a"]) + jnp.sum(p["b"])
    with jax.numpy_rank_promotion("raise"):
        for scaling in (None, 1.0):
            tx = lro.levenberg_marquardt(scaling=scaling, chunk=2, **QUICK)
            one(tx, PARAMS, fn=lambda p: {"x": fn(p), "y": 2 * fn(p)})


def test_calls_outside_of_jit_compile_once():
    compiled = []
    listen = lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    fn = lambda p: jnp.concatenate([RESIDUALS(p), jnp.sin(p["a"]), p["b"] ** 2])
    tx, params = lro.levenberg_marquardt(chunk=2, **QUICK), PARAMS
    state, counts = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(params, state, params, residuals_fn=fn)
        params = optax.apply_updates(params, updates)
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[3] == counts[1]


def test_params_in_the_state_are_none():
    """The step is one vector over all leaves, so `optax.tree.map_params` leaves everything."""
    tx = lro.levenberg_marquardt(scaling=0.0)
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)
