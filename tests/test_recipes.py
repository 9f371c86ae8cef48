"""Named recipes: each does what its name says, and nonsense is refused with advice."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import RECIPES as CASES

import lowrank_optax as lro
from lowrank_optax import basis, curvature, inner

A = np.random.default_rng(0).normal(size=(8, 6))
B = np.random.default_rng(1).normal(size=8)
START = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}


def residuals(params):
    x = jnp.concatenate([jnp.ravel(params["w"]), params["b"]])
    return jnp.asarray(A, x.dtype) @ x - jnp.asarray(B, x.dtype)


def losses(params):
    return residuals(params) ** 2 / 2


def loss(params):
    return jnp.sum(losses(params))


LOWEST = float(np.linalg.lstsq(A, B, rcond=None)[1][0] / 2)
EXTRA = {"value_fn": loss, "losses_fn": losses, "residuals_fn": residuals}
RECIPES = {
    "soap_muon": lro.soap_muon(optax.cosine_decay_schedule(0.3, 60)),
    "lre": lro.lre(optax.cosine_decay_schedule(0.3, 60), basis=basis.GGT(6)),
    "ggt": lro.ggt(optax.cosine_decay_schedule(0.3, 60), rank=20),
    "full_matrix_adam": lro.full_matrix_adam(optax.cosine_decay_schedule(0.1, 60), rank=6),
    "bfgs": lro.lowrank_newton(rank=6),
    "bfgs_of_low_rank": lro.lowrank_newton(rank=3),
    "bfgs_from_gradients": lro.lowrank_newton(
        rank=6, curvature=curvature.BFGS(product=curvature.GradientDifference())
    ),
    "sr1": lro.lowrank_newton(rank=6, curvature=curvature.SR1()),
    "adahessian": lro.adahessian(0.2, rank=6, b2=0.99),
    "sophia_h": lro.sophia_h(
        optax.cosine_decay_schedule(0.1, 60), rank=6, b1=0.9, gamma=0.1, update_every=2
    ),
    "natural_gradient": lro.natural_gradient(0.3, rank=6, damping=10.0),
    "gauss_newton": lro.gauss_newton(0.5, batch=8, damping=1e-3),
    "whitened_adam": lro.whitened_adam(optax.cosine_decay_schedule(0.3, 60), rank=6),
}


def _parameters(make):
    return inspect.signature(make).parameters if inspect.isfunction(make) else {}


def minimise(tx, params, steps, fn=loss, **extra):
    """The losses on the way, and the last parameters."""

    def body(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(fn)(params)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda *start: jax.lax.scan(body, start, None, length=steps))
    (params, _), values = run(params, tx.init(params))
    return np.append(values, fn(params)), params


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in dir(lro)
        if "rank" in _parameters(getattr(lro, name)) and name != "levenberg_marquardt"
    ],
)
def test_a_rank_may_follow_the_learning_rate_without_its_name(name):
    make = getattr(lro, name)
    before = [0.1] if "learning_rate" in _parameters(make) else []
    by_position, by_name = make(*before, 2), make(*before, rank=2)
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    assert jax.eval_shape(by_position.init, params) == jax.eval_shape(by_name.init, params)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_minimise(name):
    values, _ = minimise(RECIPES[name], START, 60, **EXTRA)
    assert values[-1] - LOWEST < 0.02 * (values[0] - LOWEST)


def test_ggt_is_the_inverse_root_of_the_whole_matrix(x64):
    """Inside and outside of the window, on a window that does not span the space."""
    gradients = np.random.default_rng(2).normal(size=(7, 5))
    tx = lro.ggt(1.0, rank=3, b1=0.0, eps=0.5)
    state = tx.init(jnp.zeros(5))
    for g in gradients:
        updates, state = jax.jit(tx.update)(jnp.asarray(g), state)
    window = gradients[-3:]
    lam, q = np.linalg.eigh(window.T @ window + 0.25 * np.eye(5))
    np.testing.assert_allclose(updates, -(q / np.sqrt(lam)) @ q.T @ gradients[-1], rtol=1e-9)


def sketch(gradients, rank, beta=None):
    """Frequent Directions of size ``rank + 1`` and its escaped mass after every row, by its SVD."""
    rows, mass, gain = np.zeros((rank, gradients.shape[1])), 0.0, 1.0
    for t, g in enumerate(gradients, 1):
        if beta is not None:
            rows, mass, gain = np.sqrt(beta) * rows, beta * mass, 1 - beta
        _, s, v = np.linalg.svd(np.vstack([rows, np.sqrt(gain) * g]), full_matrices=False)
        mass, s = mass + s[rank] ** 2, np.sqrt(np.maximum(s**2 - s[rank] ** 2, 0))
        rows = s[:rank, None] * v[:rank]
        start = 1 if beta is None else 1 - beta**t
        yield rows.T @ rows / start, mass / start


@pytest.mark.parametrize("beta", [None, 0.9], ids=["sum", "average"])
def test_s_adagrad_adds_the_escaped_mass_inside_and_outside(x64, beta):
    """``(G + rho I)^{-1/2} g`` on the whole space; before anything escaped, the pseudo-inverse."""
    gradients = np.random.default_rng(6).normal(size=(9, 7)) * np.geomspace(3, 0.3, 7)
    tx = lro.scale_by_lre(
        curvature.Covariance(),
        basis.FrequentDirections(3, beta, escaped=1.0),
        inner.LInvSqrt(),
        complement=inner.LInvSqrt(),
    )
    state, update = tx.init(jnp.zeros(7)), jax.jit(tx.update)
    for g, (b, rho) in zip(gradients, sketch(gradients, 3, beta), strict=True):
        u, state = update(jnp.asarray(g), state)
        lam, q = np.linalg.eigh(b + rho * np.eye(7))
        root = np.where(lam > 1e-10 * lam[-1], np.abs(lam) ** -0.5, 0)
        np.testing.assert_allclose(u, (q * root) @ q.T @ g, rtol=1e-6, atol=1e-8)
    assert rho > 0.01


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_full_matrix_adam_is_the_root_of_what_was_seen(x64, unit):
    """On a window that holds all: ``(M_hat)^{+1/2} m_hat``, steps of one size in any unit."""
    gradients = unit * np.random.default_rng(7).normal(size=(12, 5))
    tx = lro.full_matrix_adam(1.0, rank=20)
    state, update = tx.init(jnp.zeros(5)), jax.jit(tx.update)
    m, second = np.zeros(5), np.zeros((5, 5))
    for t, g in enumerate(gradients, 1):
        u, state = update(jnp.asarray(g), state)
        m, second = 0.9 * m + 0.1 * g, 0.99 * second + 0.01 * np.outer(g, g)
        lam, q = np.linalg.eigh(second / (1 - 0.99**t))
        root = np.where(lam > 1e-12 * lam[-1], np.abs(lam) ** -0.5, 0)
        want = (q * root) @ q.T @ m / (1 - 0.9**t)
        np.testing.assert_allclose(u, -want, rtol=1e-4, atol=1e-6)
        if t == 1:
            np.testing.assert_allclose(np.linalg.norm(u), 1, rtol=1e-6)


def test_natural_gradient_is_the_damped_inverse_of_the_whole_matrix(x64):
    """``(F_hat + mu I)^{-1} g`` in a space larger than the basis: mu was mu / (1 - beta^n)."""
    random, d, rank, beta, mu = np.random.default_rng(8), 6, 4, 0.99, 0.3
    tx = lro.natural_gradient(1.0, rank=rank, beta=beta, damping=mu)
    state, update = tx.init(jnp.zeros(d)), jax.jit(tx.update)
    f, seen = np.zeros((d, d)), np.linalg.qr(random.normal(size=(d, rank)))[0]
    for t in range(1, 5):
        examples = random.normal(size=(3, rank)) @ seen.T  # as much as the basis has room for
        g = random.normal(size=d)  # and a gradient that has more
        u, state = update(jnp.asarray(g), state, per_example_grads=jnp.asarray(examples))
        f = beta * f + (1 - beta) * examples.T @ examples
        want = -np.linalg.solve(f / (1 - beta**t) + mu * np.eye(d), g)
        np.testing.assert_allclose(u, 0 * want if t == 1 else want, rtol=1e-8)


def test_natural_gradient_damps_the_first_eigenvalues(x64):
    g, mu = np.array([3.0, 0.0, 4.0]), 5.0
    tx = lro.natural_gradient(1.0, rank=2, damping=mu, warmup_steps=0)
    u, _ = tx.update(jnp.asarray(g), tx.init(jnp.zeros(3)), per_example_grads=jnp.asarray(g[None]))
    np.testing.assert_allclose(u, -g / (25 + mu), rtol=1e-9)


def test_newton_with_a_full_basis_minimises_a_quadratic_in_one_step(x64):
    """SR1 knows a Hessian after as many probes as it has rows; until then nothing moves."""
    d = 5
    h = np.random.default_rng(3).normal(size=(d, d))
    h, b = h @ h.T + np.eye(d), np.arange(1.0, d + 1)
    fn = lambda x: x @ jnp.asarray(h) @ x / 2 - jnp.asarray(b) @ x
    tx = lro.lowrank_newton(
        rank=d,
        rdamping=0.0,
        curvature=curvature.SR1(probe=curvature.NormalProbe()),
        warmup_steps=d,
    )
    values, x = minimise(tx, jnp.zeros(d), d + 1, fn, value_fn=fn)
    np.testing.assert_array_equal(values[: d + 1], values[0])
    np.testing.assert_allclose(x, np.linalg.solve(h, b), rtol=1e-6)


def test_what_lies_outside_the_basis_is_not_dropped():
    """Twenty directions of 300 hold little of this gradient; the rest has to be followed, too."""
    d, rng = 300, np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    h = jnp.asarray((q * np.geomspace(1e-2, 1e2, d)) @ q.T, jnp.float32)
    fn = lambda x: x @ h @ x / 2
    start = jnp.asarray(rng.normal(size=d), jnp.float32)
    for tx, most in ((lro.adahessian(0.3), 0.02), (lro.sophia_h(0.03), 0.2)):
        values, _ = minimise(tx, start, 150, fn, value_fn=fn)
        assert values[-1] < most * values[0]


def test_newton_survives_pairs_that_put_an_eigenvalue_near_zero():
    """Every gradient and product is of another sample; undamped, one step goes far out."""
    d, rng = 60, np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(256, d)) * np.geomspace(0.1, 3, d), jnp.float32)

    def step(carry, batch):
        x, state = carry
        fn = lambda x: jnp.mean(jnp.log(jnp.cosh(rows[batch] @ (x - 1))))
        value, g = jax.value_and_grad(fn)(x)
        updates, state = tx.update(g, state, x, value_fn=fn)
        return (x + updates, state), value

    batches = jnp.asarray(rng.integers(0, 256, size=(300, 64)))
    for part in (curvature.BFGS(), curvature.SR1()):
        tx = lro.lowrank_newton(0.3, rank=10, curvature=part)
        run = jax.jit(lambda b, tx=tx: jax.lax.scan(step, (jnp.zeros(d), tx.init(jnp.zeros(d))), b))
        values = run(batches)[1]
        assert jnp.max(values) < 3 * values[0]
        assert jnp.mean(values[-20:]) < 0.5 * values[0]


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=["under", "over"])
def test_gauss_newton_solves_linear_least_squares_in_one_step(x64, shape):
    a = jnp.asarray(np.random.default_rng(4).normal(size=shape))
    b = jnp.arange(1.0, shape[0] + 1)
    r = lambda x: a @ x - b
    fn = lambda x: jnp.sum(r(x) ** 2) / 2
    tx = lro.gauss_newton(batch=shape[0], damping=1e-12)
    _, x = minimise(tx, jnp.zeros(shape[1]), 1, fn, residuals_fn=r)
    np.testing.assert_allclose(x, np.linalg.lstsq(a, b, rcond=None)[0], rtol=1e-6)


@pytest.mark.parametrize("batch", [4, 9, 100])
@pytest.mark.parametrize("same", [True, False], ids=["one_problem", "a_new_batch_a_step"])
def test_gauss_newton_is_exact_on_the_current_batch(x64, batch, same):
    """Also with room for more rows than come: |r + J u| / |r| was .5 and more from step two on."""
    random, mu = np.random.default_rng(5), 1e-9
    tx = lro.gauss_newton(batch=batch, damping=mu)
    x, a = jnp.zeros(9), random.normal(size=(4, 9))
    state = tx.init(x)

    @jax.jit
    def step(x, state, a, b):
        r = a @ x - b
        return r, *tx.update(a.T @ r, state, x, residuals_fn=lambda x: a @ x - b)

    for i in range(4):
        # A target of its own for every step, so that there is something left to solve.
        a = a if same else random.normal(size=(4 - i % 2, 9))
        b = random.normal(size=len(a))
        r, u, state = step(x, state, jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(
            u, -a.T @ np.linalg.solve(a @ a.T + mu * np.eye(len(a)), r), rtol=1e-7
        )
        assert np.linalg.norm(r + a @ u) < 1e-7 * np.linalg.norm(r)
        x = x + u


def test_gauss_newton_refuses_more_residuals_than_it_holds():
    a = jnp.ones((5, 9))
    tx = lro.gauss_newton(batch=4)
    with pytest.raises(ValueError, match="5 columns .* pass a rank of at least 5"):
        tx.update(jnp.ones(9), tx.init(jnp.ones(9)), jnp.ones(9), residuals_fn=lambda x: a @ x)


def test_gauss_newton_inside_a_basis_is_the_same_step(x64):
    r = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    fn = lambda x: jnp.sum(r(x) ** 2) / 2
    outer = lro.gauss_newton(batch=2, damping=1e-10)
    part = lro.lre(
        1.0,
        curvature.GaussNewton(),
        basis.GGT(2, eig_tol=0.0),
        inner.DampedLeastSquares(1e-10, 0.0),
    )
    start = jnp.array([-1.2, 1.0])
    a, x = minimise(outer, start, 3, fn, residuals_fn=r)
    b, y = minimise(part, start, 3, fn, residuals_fn=r)
    np.testing.assert_allclose(a[:2], b[:2], rtol=1e-6)
    np.testing.assert_allclose(x, [1, 1], atol=1e-6)
    np.testing.assert_allclose(y, [1, 1], atol=1e-6)


def test_cubic_newton_leaves_a_saddle_that_newton_finds(x64):
    fn = lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2
    parts = {"newton": inner.LInv(), "cubic": inner.CubicNewton(1.0, adaptive=True)}
    found = {}
    for name, part in parts.items():
        tx = lro.lre(
            1.0,
            curvature.SR1(probe=curvature.NormalProbe()),
            basis.Eigen(2, None, eig_tol=1e-8, update_damping=0.0),
            part,
            warmup_steps=2,
        )
        found[name] = minimise(tx, jnp.array([0.05, 1.0]), 40, fn, value_fn=fn)[1]
    np.testing.assert_allclose(found["newton"], [0, 0], atol=1e-3)
    np.testing.assert_allclose(np.abs(found["cubic"]), [1, 0], atol=1e-3)


@pytest.mark.parametrize(
    "make, advice",
    [
        (lambda: lro.adahessian(1.0, curvature=curvature.Covariance()), "HutchinsonHessian"),
        (lambda: lro.sophia_h(1.0, curvature=curvature.EmpiricalFisher()), "HutchinsonHessian"),
        (lambda: lro.lowrank_newton(curvature=curvature.HutchinsonHessian()), "BFGS or SR1"),
        (lambda: lro.lre(1.0, curvature.BFGS(), basis.GGT(3), inner.LInv()), "Eigen"),
        (
            lambda: lro.lre(1.0, curvature.Covariance(), basis.Eigen(3), inner.NaturalGradient()),
            "EmpiricalFisher",
        ),
        (
            lambda: lro.lre(
                1.0, curvature.BFGS(), basis.Eigen(3, None), inner.DampedLeastSquares()
            ),
            "EmpiricalFisher or GaussNewton",
        ),
        (lambda: lro.lre(1.0, curvature.Covariance(), basis.Random(3), inner.LInv()), "Eigen"),
        (
            lambda: lro.lre(1.0, curvature.Covariance(), basis.Random(3), inner.CubicNewton()),
            "Eigen",
        ),
        (
            lambda: lro.lre(1.0, curvature.Covariance(), basis.TopK(3), complement=inner.LInv()),
            "BFGS or SR1",
        ),
    ],
)
def test_nonsense_is_refused_with_advice(make, advice):
    with pytest.raises(ValueError, match=f"combine it with .*{advice}"):
        make()


@pytest.mark.parametrize(
    "name, missing",
    [
        ("adahessian", "value_fn"),
        ("sophia_h", "value_fn"),
        ("bfgs", "value_fn"),
        ("natural_gradient", "losses_fn"),
        ("gauss_newton", "residuals_fn"),
    ],
)
def test_missing_arguments_are_named(name, missing):
    tx = RECIPES[name]
    with pytest.raises(ValueError, match=missing):
        tx.update(START, tx.init(START), START)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lro.ggt(1.0, rank=0),
        lambda: lro.ggt(1.0, eps=0.0),
        lambda: lro.ggt(1.0, b1=1.0),
        lambda: lro.full_matrix_adam(1.0, b2=-1.0),
        lambda: lro.lowrank_newton(rank=0),
        lambda: lro.sophia_h(1.0, gamma=-1.0),
        lambda: lro.natural_gradient(1.0, damping=-1.0),
        lambda: lro.gauss_newton(batch=0),
    ],
)
def test_values_are_checked(make):
    with pytest.raises(ValueError, match="pass a"):
        make()


def test_numbers_can_be_injected():
    """Under `optax.inject_hyperparams` every number is traced but those named static."""
    tx = optax.inject_hyperparams(lro.full_matrix_adam, static_args=("rank",))(0.1, rank=2)
    plain = lro.full_matrix_adam(0.1, rank=2)
    g, x = jnp.array([1.0, -2.0, 3.0]), jnp.zeros(3)
    updates, _ = jax.jit(tx.update)(g, tx.init(x), x)
    expected, _ = jax.jit(plain.update)(g, plain.init(x), x)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"levenberg_marquardt", "spring"}))
def test_what_follows_the_learning_rate_is_named(name):
    """But for a rank, the one size that recipes share; `lre` has its three parts.

    Those of residuals have steps of their own, without decay.
    """
    kinds = {k: p.kind for k, p in inspect.signature(getattr(lro, name)).parameters.items()}
    positional = [k for k, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if name == "lre":
        assert positional == ["learning_rate", "curvature", "basis", "inner"]
    else:
        assert positional == [k for k in ("learning_rate", "rank") if k in kinds]
    assert name == "whiten" or {"weight_decay", "mask"} <= kinds.keys()


def test_weight_decay_is_added_to_the_step_and_masked(x64):
    """In a recipe that passes it on to `lre`: ``x - rate (step + decay x)``, leaf by leaf."""
    params = {"w": jnp.ones((2, 2), float), "b": jnp.arange(2.0)}
    grads = jax.tree.map(lambda x: x + 1, params)
    make = lambda **options: lro.ggt(0.5, rank=3, **options)
    plain, decayed = make(), make(weight_decay=0.1, mask={"w": True, "b": False})
    (one, _), (two, _) = (tx.update(grads, tx.init(params), params) for tx in (plain, decayed))
    np.testing.assert_allclose(two["w"], one["w"] - 0.5 * 0.1 * params["w"], rtol=1e-9)
    np.testing.assert_array_equal(two["b"], one["b"])


def test_parts_that_are_left_out_are_those_of_the_original():
    named = lro.lre(0.1, curvature.Covariance())
    spelled = lro.lre(
        0.1,
        curvature.Covariance(),
        basis.GGT(100),
        (inner.Adam(), inner.Cautious(), inner.ClipNormByEMA(normalize=True)),
    )
    shapes = [jax.eval_shape(tx.init, START) for tx in (named, spelled)]
    assert shapes[0] == shapes[1]
