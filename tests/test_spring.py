"""`spring` against dense algebra, closed forms and a wavefunction; what weighs residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

squares = lro.least_squares


def batches(seed, count, shape=(6, 10)):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape), rng.normal(size=shape[0])) for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_the_sources(momentum, x64):
    tx = lro.spring(0.3, momentum=momentum, damping=0.1)
    step = jax.jit(lambda a, b, x, s: tx.update(x, s, x, residuals_fn=lambda x: a @ x - b))
    x, phi = np.ones(10), np.zeros(10)
    state = tx.init(jnp.asarray(x))
    for a, b in batches(0, 3):
        r = a @ x - b - momentum * a @ phi
        phi = momentum * phi + a.T @ np.linalg.solve(a @ a.T + 0.1 * np.eye(6), r)
        updates, state = step(a, b, jnp.asarray(x), state)
        np.testing.assert_allclose(updates, -0.3 * phi, rtol=1e-9)
        x = x - 0.3 * phi


def test_updates_are_no_longer_than_allowed(x64):
    (a, b), *_ = batches(1, 1)
    fn = lambda x: a @ x - b
    x = jnp.ones(10)
    free, short = (lro.spring(damping=1e-3, max_norm=n) for n in (None, 0.03))
    long, cut = (tx.update(x, tx.init(x), x, residuals_fn=fn)[0] for tx in (free, short))
    assert jnp.linalg.norm(long) > 0.03
    np.testing.assert_allclose(cut, long * 0.03 / jnp.linalg.norm(long), rtol=1e-9)


def trained(noise, steps=150):
    """A line of 12 coefficients from batches of 8 noisy points."""
    tx = lro.spring(0.2)
    truth = jnp.linspace(-1, 1, 12)

    @jax.jit
    def run(x, state):
        def body(carry, key):
            x, state = carry
            one, two = jax.random.split(key)
            a = jax.random.normal(one, (8, 12)) / 8**0.5
            y = a @ truth + noise * jax.random.normal(two, (8,)) / 8**0.5
            updates, state = tx.update(x, state, x, residuals_fn=lambda x: a @ x - y)
            return (optax.apply_updates(x, updates), state), jnp.linalg.norm(x - truth)

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(body, (x, state), keys)

    (_, state), errors = run(jnp.zeros(12), tx.init(jnp.zeros(12)))
    return state, errors


def test_the_damping_is_not_fooled_by_noise():
    """A batch of 8 points can be met by 12 coefficients, noise and all: the next one tells."""
    clean, errors = trained(0.0)
    assert errors[-1] < 1e-3
    noisy, errors = trained(1.0)
    assert float(noisy.damping) > 1e3 * float(clean.damping)
    assert np.mean(errors[-30:]) < np.mean(errors[20:50]) < 1.5


def test_what_is_not_finite_changes_nothing_and_is_counted():
    tx, x = lro.spring(), jnp.array([1.0, 2.0])
    fn = lambda x, bad: (x**2 - 2) * bad
    step = jax.jit(lambda s, bad: tx.update(x, s, x, residuals_fn=lambda x: fn(x, bad)))
    _, state = step(tx.init(x), 1.0)
    zero, after = step(state, jnp.nan)
    np.testing.assert_array_equal(zero, 0)
    expected = state._replace(count=state.count + 1, nonfinite=state.nonfinite + 1)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"damping": 0.0}, {"max_norm": 0.0}, {"learning_rate": -1.0}]
)
def test_values_are_checked(options):
    with pytest.raises(ValueError, match="pass"):
        lro.spring(**options)


# A wavefunction ----------------------------------------------------------------------------------


def test_energy_residuals_make_the_gradient_of_the_energy(x64):
    """On a quadrature grid of ``psi²`` the sum is exact: ``J^T r`` is half the energy's slope."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=400))
    log_psi = lambda p, x: -p["a"] * x**2 - p["b"] * x**4
    energy = lambda p, x: p["a"] * x**2 + jnp.cos(x)  # any local energy
    params = {"a": jnp.array(0.4), "b": jnp.array(0.1)}
    fit = squares.energy_residuals(log_psi, energy, x)
    (r,) = fit.residuals(params)
    got = jax.tree.map(lambda j: r @ j, fit.gradients(params))
    e = jax.vmap(energy, (None, 0))(params, x)
    for name, o in {"a": -(x**2), "b": -(x**4)}.items():
        np.testing.assert_allclose(got[name], jnp.mean(e * o) - jnp.mean(e) * jnp.mean(o))
    by_residuals = jax.jacrev(lambda p: fit.residuals(p)[0])(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
        fit.gradients(params),
        by_residuals,
    )


def test_helium_in_one_exponent():
    """``psi = exp(-a (r1 + r2))`` has ``a = 27/16`` and ``E = -(27/16)²``; samples are exact."""
    charge = 2.0

    def log_psi(a, p):
        return -a * jnp.sum(jnp.linalg.norm(p, axis=-1))

    def energy(a, p):
        near = jnp.linalg.norm(p, axis=-1)
        apart = jnp.linalg.norm(p[0] - p[1])
        return -(a**2) + jnp.sum((a - charge) / near) + 1 / apart

    tx = lro.spring(0.5, momentum=0.8, damping=1e-3)

    @jax.jit
    def run(a):
        def body(carry, key):
            a, state = carry
            one, two = jax.random.split(key)
            far = jax.random.gamma(one, 3.0, (500, 2, 1)) / (2 * a)
            way = jax.random.normal(two, (500, 2, 3))
            p = far * way / jnp.linalg.norm(way, axis=-1, keepdims=True)
            fit = squares.energy_residuals(log_psi, energy, p)
            mean = jnp.mean(jax.vmap(energy, (None, 0))(a, p))
            updates, state = tx.update(
                a, state, a, residuals_fn=fit.residuals, per_example_grads=fit.gradients(a)
            )
            return (optax.apply_updates(a, updates), state), (a, mean)

        return jax.lax.scan(body, (a, tx.init(a)), jax.random.split(jax.random.key(0), 150))[1]

    exponents, energies = run(jnp.array(1.2))
    assert abs(float(jnp.mean(exponents[-80:])) - 27 / 16) < 0.02
    assert abs(float(jnp.mean(energies[-80:])) + (27 / 16) ** 2) < 0.02


# Residuals of points, and what weighs them -------------------------------------------------------


def test_points_give_residuals_and_their_gradients(x64):
    params = {"w": jnp.array([0.3, -0.7]), "b": jnp.array(0.2)}
    scalar = lambda p, x: jnp.tanh(p["w"] @ x) + p["b"]
    vector = lambda p, x: jnp.outer(jnp.sin(p["w"] * x["t"]), jnp.ones(3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    w = jnp.array([1.0, 2.0, 0.0, 4.0, 9.0])
    fit = squares.at_points((scalar, x, w), (vector, {"t": x[:4, 0]}))
    first, second = fit.residuals(params)
    np.testing.assert_allclose(first, np.sqrt(w / 5) * jax.vmap(scalar, (None, 0))(params, x))
    assert second.shape == (4, 2, 3)
    parts = squares.at_points((scalar, x, w), (vector, {"t": x[:4, 0]}), chunk=2)
    for got, want in zip(parts.residuals(params), (first, second), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    push = lambda fit: jax.jvp(fit.residuals, (params,), (params,))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), push(parts), push(fit))
    flat = lambda p: jnp.concatenate([jnp.ravel(r) for r in fit.residuals(p)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        fit.gradients(params),
        jax.jacrev(flat)(params),
    )
    assert not np.any(
        jax.grad(lambda w: jnp.sum(squares.at_points((scalar, x, w)).residuals(params)[0]))(w)
    )  # weights are not differentiated


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (3.0,),
        ((lambda p, x: x, {"a": jnp.ones(3), "b": jnp.ones(4)}),),
        ((lambda p, x: x, jnp.ones(3), jnp.ones(2)),),
    ],
    ids=["nothing", "a_number", "points_of_two_lengths", "weights_of_another_length"],
)
def test_parts_are_checked(parts):
    with pytest.raises(ValueError, match="pass"):
        squares.at_points(*parts)


def test_attention_settles_where_its_equation_says(x64):
    """For residuals that stay, the weights end at ``eta / (1 - gamma) q / max q``."""
    r = jnp.array([0.1, -0.4, 0.2, 0.0])
    for temperature in (None, 0.5):
        w = jnp.ones(4)
        for _ in range(300):
            w = squares.attention_weights(w, r, decay=0.9, rate=0.1, temperature=temperature)
        size = np.abs(r)
        q = size if temperature is None else np.exp(size / (temperature * size.max()))
        np.testing.assert_allclose(w, q / q.max(), rtol=1e-9, atol=1e-12)
    for bad in (jnp.zeros(4), jnp.array([1.0, jnp.nan, 0, 0])):
        np.testing.assert_array_equal(squares.attention_weights(w, bad), w)


def test_later_times_wait_for_earlier_ones(x64):
    losses = jnp.array([0.5, 0.1, jnp.nan, 2.0])
    w = squares.causal_weights(losses, 2.0)
    np.testing.assert_allclose(w, [1.0, np.exp(-1.0), np.exp(-1.2), 0.0])
    assert not np.any(jax.grad(lambda x: squares.causal_weights(x)[1])(losses[:2]))


def test_points_are_drawn_as_the_density_says():
    x = jnp.arange(4)
    r = jnp.array([0.0, 1.0, 2.0, 5.0])
    draw = jax.jit(jax.vmap(lambda key: squares.resample(key, x, r, 1)[0]))
    drawn = draw(jax.random.split(jax.random.key(0), 20000))
    chance = r / 2 + 1
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, chance / 8, atol=0.015)
    both = squares.resample(jax.random.key(1), {"a": x, "b": x + 1}, r, 4)
    assert sorted(both["a"].tolist()) == [0, 1, 2, 3]  # without replacement
    np.testing.assert_array_equal(both["b"], both["a"] + 1)
    with pytest.raises(ValueError, match="at most 4"):
        squares.resample(jax.random.key(0), x, r, 5)


def test_conditions_are_built_in():
    u = squares.hard_constraint(lambda p, x: p * jnp.exp(x), jnp.cos, lambda x: x * (1 - x))
    np.testing.assert_allclose([u(7.0, 0.0), u(7.0, 1.0)], np.cos([0.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(u(2.0, 0.5), np.cos(0.5) + 0.25 * 2 * np.exp(0.5), rtol=1e-6)


# As any optax transformation ---------------------------------------------------------------------

PARAMS = {"a": jnp.array([0.5, -1.0, 0.2]), "b": jnp.array([0.1, 0.2])}
RESIDUALS = lambda p: jnp.tanh(p["a"]) @ jnp.arange(6.0).reshape(3, 2) + p["b"] - 0.3


def one(tx, params, fn=RESIDUALS):
    return jax.jit(lambda p: tx.update(p, tx.init(p), p, residuals_fn=fn)[0])(params)


def test_wrappers_of_optax():
    plain = one(lro.spring(0.3), PARAMS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, one(optax.inject_hyperparams(lro.spring)(0.3), PARAMS), plain)
    jax.tree.map(close, one(optax.MultiSteps(lro.spring(0.3), 1), PARAMS), plain)
    held = optax.partition(
        {"fit": lro.spring(0.3), "hold": optax.set_to_zero()}, {"a": "fit", "b": "hold"}
    )
    got = one(held, PARAMS)
    fn = lambda p: RESIDUALS({"a": p["a"], "b": PARAMS["b"]})
    close(got["a"], one(lro.spring(0.3), {"a": PARAMS["a"]}, fn)["a"])
    np.testing.assert_array_equal(got["b"], 0)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    tx = lro.spring(0.3)
    step = lambda p: tx.update(p, tx.init(p), p, residuals_fn=RESIDUALS)[0]
    for x, y in zip(jax.tree.leaves(jax.vmap(step)(many)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x[0], y, rtol=1e-4, atol=1e-6)
