"""Subspace trackers and sketches: what each has to reach, and what it promises on every stream."""

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from dense import absorbed, spectrum, vectors
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import lowrank_optax as lro
from lowrank_optax._core import linalg
from lowrank_optax._core.layout import Layout
from lowrank_optax.basis import (
    GROUSE,
    OPAST,
    CayleyAdamG,
    Eigen,
    FrequentDirections,
    GradientRule,
    Hebbian,
    Nystrom,
    RandomizedEigen,
    StiefelRule,
)

RULES = {"oja": GradientRule(), "stiefel": StiefelRule(), "cayley": CayleyAdamG()}
BASES = {
    "opast": OPAST(6),
    "grouse": GROUSE(6),
    **{f"hebbian-{name}": Hebbian(6, rule=rule) for name, rule in RULES.items()},
    "frequent_directions": FrequentDirections(6),
    "robust": FrequentDirections(6, robust=True),
    "averaged": FrequentDirections(6, 0.99),
    "randomized": RandomizedEigen(6, 0.99, oversample=2),
    "nystrom": Nystrom(6),
}


def layout_of(d, dtype):
    return Layout.of([jax.ShapeDtypeStruct((d,), dtype)], None)


def _run(basis, state, x, every):
    """All that is absorbed (``every``) or the last state; ``x`` is ``(steps, k, d)``."""
    layout = layout_of(x.shape[-1], x.dtype)

    def step(carry, y):
        state, i = carry
        given = lro.SymmetricCorrection([y], weights=jnp.ones((1, y.shape[0]), layout.dtype))
        key = jax.random.fold_in(jax.random.key(1), i)
        done = basis.absorb(layout, state, given, jnp.ones(1, bool), key)
        return (done.state, i + 1), done if every else done.failed

    (state, _), out = jax.lax.scan(step, (state, 0), x)
    return (state, out) if every else (state, jnp.any(out))


run_long = jax.jit(_run, static_argnums=(0, 3))
run_short = jax.jit(_run, static_argnums=(0, 3))


def absorb(basis, stream, k=1, dtype=jnp.float32, every=False):
    x = jnp.asarray(stream, dtype)
    x = x[: len(x) // k * k].reshape(-1, k, x.shape[-1])
    start = basis.init(layout_of(x.shape[-1], dtype), jax.random.key(0))
    state, out = (run_long if len(x) > 1000 else run_short)(basis, start, x, every)
    if not every:
        assert not out
        return state
    assert not np.any(out.failed)
    return out


def rows(basis, state, index=()):
    """``Q^T`` in float64, from what is stored."""
    w = np.asarray(state.rows[0], np.float64)[index]
    return np.asarray(state.t, np.float64)[index][0, : basis.rank] @ w


def matrix(basis, state):
    """``Q diag(lam) Q^T`` as the basis measured it."""
    q, lam = rows(basis, state), np.asarray(basis.measured(state), np.float64)[0]
    return (q.T * lam) @ q


def captured(q, x):
    """Energy of ``x`` inside the rows, against that of the best subspace of the same dimension."""
    best = np.linalg.svd(x, compute_uv=False)[: len(q)]
    return np.sum((x @ q.T) ** 2) / np.sum(best**2)


def spiked(d=500, n=10_000, spikes=10):
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(d, spikes)))[0]
    z = rng.normal(size=(n, spikes)) * np.sqrt(np.linspace(20, 4, spikes))
    return (rng.normal(size=(n, d)) + z @ u.T).astype(np.float32)


def digits():
    x = load_digits().data
    return np.random.default_rng(0).permutation(x - x.mean(0)).astype(np.float32)


# Streams ----------------------------------------------------------------------------------------

fading = CayleyAdamG(lambda n: 2 / jnp.sqrt(n + 400.0))
# Vectors of the spiked stream, and the share of the energy to be captured there and on the digits,
# of the bases that are no trackers (tests/test_online_trackers.py has those).
GATES = {
    "stiefel": (Hebbian(10, None, StiefelRule()), 5000, 0.98, 0.975),
    "cayley": (Hebbian(10, None, fading), 5000, 0.965, 0.955),
}


@pytest.mark.parametrize("name", GATES)
def test_principal_subspace_in_one_pass(name):
    basis, n, *gates = GATES[name]
    for x, gate in zip((spiked()[:n], digits()), gates, strict=True):
        state = absorb(basis, x)
        assert captured(rows(basis, state), x.astype(np.float64)) > gate
        top = np.linalg.svd(x, compute_uv=False)[0] ** 2
        assert np.asarray(state.lam)[0, 0] == pytest.approx(top, rel=0.1)


@pytest.mark.parametrize(
    "basis", [OPAST(10, None), GROUSE(10, None)], ids=lambda basis: type(basis).__name__
)
def test_several_columns_at_once(basis):
    x = digits()
    assert captured(rows(basis, absorb(basis, x, k=4)), x.astype(np.float64)) > 0.985


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_orthonormal_after_many_updates(name, noise):
    rng = np.random.default_rng(1)
    d, n, basis = 40, 2000, BASES[name]
    u, v = rng.normal(size=(2, 8, d))
    turn = np.linspace(0, 1, n)[:, None]  # the subspace moves all the time
    z = rng.normal(size=(n, 8)) * np.geomspace(3, 0.3, 8)
    state = absorb(basis, (1 - turn) * (z @ u) + turn * (z @ v) + noise * rng.normal(size=(n, d)))
    q, live = rows(basis, state), np.asarray(basis.measured(state))[0] != 0
    assert live.sum() >= 5
    assert np.max(np.abs(q @ q.T - np.diag(live))) < 1e-5


# Every basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_change_of_basis_and_coordinates(name, x64):
    """What the engine is told agrees with the rows; it is exact while there is room for all."""
    basis, n, k, d = BASES[name], 10, 3, 12
    x = np.random.default_rng(2).normal(size=(n, k, d))
    out = absorb(basis, x.reshape(-1, d), k, jnp.float64, every=True)
    before = np.zeros((basis.rank, d))
    for i in range(n):
        state = jax.tree.map(lambda a, i=i: a[i], out.state)
        q, lam = rows(basis, state), np.asarray(basis.measured(state))[0]
        np.testing.assert_allclose(q @ q.T, np.diag(lam != 0), atol=1e-9)
        np.testing.assert_allclose(out.c[i, 0], q @ before.T, atol=1e-7)
        np.testing.assert_allclose(out.u[i, 0], q @ x[i].T, atol=1e-6)
        assert np.all(lam >= 0) and np.all(np.diff(lam) <= 1e-9 * lam[0])
        before = q
        if (i + 1) * k <= basis.rank:
            ages = np.arange(i, -1, -1)
            shares = np.ones(i + 1) if basis.beta is None else basis.beta**ages * (1 - basis.beta)
            exact = np.einsum("i,ikd,ike->de", shares, x[: i + 1], x[: i + 1])
            moments = (q.T * np.asarray(state.lam)[0, : basis.rank]) @ q
            np.testing.assert_allclose(moments, exact, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in BASES if n != "randomized"])
def test_weights_of_both_signs_are_refused(name):
    layout, basis = layout_of(5, jnp.float32), BASES[name]
    signed = lro.SymmetricCorrection(
        [jnp.ones((2, 5))], weights=jnp.array([[1.0, -1.0]]), signed=True
    )
    with pytest.raises(ValueError, match="both signs.*Eigen"):
        jax.eval_shape(
            lambda key: basis.absorb(
                layout, basis.init(layout, key), signed, jnp.ones(1, bool), key
            ),
            jax.random.key(0),
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: OPAST(0),
        lambda: OPAST(3, 1.0),
        lambda: GROUSE(3, learning_rate=0.0),
        lambda: Hebbian(3, rule="gradient"),
        lambda: GradientRule(-1.0),
        lambda: StiefelRule(0.0),
        lambda: CayleyAdamG(0.0),
        lambda: CayleyAdamG(b1=1.0),
        lambda: CayleyAdamG(iterations=0),
        lambda: FrequentDirections(3, 2.0),
        lambda: RandomizedEigen(3, oversample=-1),
        lambda: RandomizedEigen(3, power_iterations=0.5),
        lambda: Nystrom(1.5),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match="pass"):
        make()


# The methods themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_opast_is_recursive_least_squares(k, x64):
    """``W C_aa = C_xa`` with the coordinates of every time in the basis of that time."""
    r, d, beta = 4, 10, 0.9
    x = np.random.default_rng(4).normal(size=(60, d)) * np.geomspace(3, 0.3, d)
    basis = OPAST(r, beta, eig_tol=0.0)
    start, end = (rows(basis, absorb(basis, x[:n], k, jnp.float64)) for n in (12, 60))
    first = np.asarray(absorb(basis, x[:12], k, jnp.float64).lam)[0]
    q, moments = start.T, np.diag(first)
    for i in range(12, 60, k):
        y = x[i : i + k].T
        a = q.T @ y
        cross = beta * q @ moments + (1 - beta) * y @ a.T
        moments = beta * moments + (1 - beta) * a @ a.T
        u, _, v = np.linalg.svd(cross @ np.linalg.inv(moments), full_matrices=False)
        q = u @ v
    np.testing.assert_allclose(end.T @ end, q @ q.T, atol=1e-8)
    lam = np.asarray(absorb(basis, x, k, jnp.float64).lam)[0]
    np.testing.assert_allclose(lam, np.linalg.eigvalsh(moments)[::-1], rtol=1e-8)


def test_grouse_turns_by_its_angle(x64):
    """One step is a rotation in one plane, of the captured part and the residual."""
    basis = GROUSE(3, None, 0.5, eig_tol=0.0)
    x = np.random.default_rng(5).normal(size=(20, 8))
    old, new = absorb(basis, x[:-1], dtype=jnp.float64), absorb(basis, x, dtype=jnp.float64)
    p, q, y = rows(basis, old), rows(basis, new), x[-1]
    inside = p.T @ p @ y
    rho = y - inside
    angle = 0.5 * np.linalg.norm(inside) * np.linalg.norm(rho) / np.asarray(new.lam)[0, 0]
    cosines = np.linalg.svd(p @ q.T, compute_uv=False)
    np.testing.assert_allclose(cosines, [1, 1, np.cos(angle)], atol=1e-12)
    unit = lambda v: v / np.linalg.norm(v)
    turned = np.cos(angle) * unit(inside) + np.sin(angle) * unit(rho)
    np.testing.assert_allclose(q.T @ q @ turned, turned, atol=1e-10)


def test_oja_spans_what_its_rule_says(x64):
    basis = Hebbian(3, None, GradientRule(0.5), eig_tol=0.0)
    x = np.random.default_rng(6).normal(size=(20, 8))
    old, new = absorb(basis, x[:-1], dtype=jnp.float64), absorb(basis, x, dtype=jnp.float64)
    p, q, y = rows(basis, old), rows(basis, new), x[-1]
    step = p + 0.5 / np.asarray(new.lam)[0, 0] * np.outer(p @ y, y)
    span = np.linalg.qr(step.T)[0]
    np.testing.assert_allclose(q.T @ q, span @ span.T, atol=1e-10)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_cayley_adam_keeps_its_momentum(b1, x64):
    """Against the algorithm on the whole Stiefel manifold, momentum in all dimensions."""
    rule = CayleyAdamG(0.1, b1=b1, b2=0.9)
    basis, d = Hebbian(3, 0.9, rule, eig_tol=0.0), 9
    x = np.random.default_rng(7).normal(size=(40, d)) * np.geomspace(2, 0.5, d)
    out = absorb(basis, x, dtype=jnp.float64, every=True)
    at = lambda i: jax.tree.map(lambda a: np.asarray(a)[i], out.state)
    state = at(9)
    point = rows(basis, state).T
    every = state.t[0] @ state.rows[0]
    momentum, v = (state.memory.momentum[0] @ every).T, float(state.memory.root[0]) ** 2
    for i in range(10, 40):
        g = -(np.sqrt(0.1) ** 2) * np.outer(x[i], x[i]) @ point
        momentum = b1 * momentum + (1 - b1) * g
        v = 0.9 * v + 0.1 * np.sum(g**2)
        scale = (1 - b1 ** (i + 1)) * np.sqrt(v / (1 - 0.9 ** (i + 1)) + 1e-8)
        hat = momentum @ point.T - point @ (point.T @ momentum @ point.T) / 2
        w = (hat - hat.T) / scale
        momentum = scale * w @ point
        alpha = min(0.1, 1 / (np.linalg.norm(w) + 1e-8))
        y = point - alpha * w @ point
        for _ in range(2):
            y = point - alpha / 2 * w @ (point + y)
        point, upper = np.linalg.qr(y)
        point = point * np.sign(np.diag(upper))
        q = rows(basis, at(i))
        np.testing.assert_allclose(q.T @ q, point @ point.T, atol=1e-5 if b1 else 1e-9)


def test_nystrom_never_exceeds_the_stream(x64):
    basis = Nystrom(8, None)
    x = np.random.default_rng(8).normal(size=(100, 20)) * np.geomspace(3, 0.03, 20)
    rest = x.T @ x - matrix(basis, absorb(basis, x, dtype=jnp.float64))
    assert np.min(np.linalg.eigvalsh(rest)) > -1e-6 * np.linalg.norm(rest, 2)


@pytest.mark.parametrize("decay", ["fast", "slow"])
def test_sketches_are_nearly_optimal(decay, x64):
    """Errors in the nuclear norm against the best of the same rank, on decaying spectra."""
    rng = np.random.default_rng(9)
    d, n, r = 60, 240, 8
    s = 0.7 ** np.arange(d) if decay == "fast" else 1 / np.arange(1.0, d + 1)
    u, v = (np.linalg.qr(rng.normal(size=(size, d)))[0] for size in (n, d))
    x = (u * s) @ v.T
    exact, optimum = x.T @ x, np.sum(s[r:] ** 2)
    nuclear = lambda basis: np.sum(
        np.abs(np.linalg.eigvalsh(exact - matrix(basis, absorb(basis, x, 12, jnp.float64))))
    )
    randomized = RandomizedEigen(r, None, oversample=4, buffer=12, eig_tol=1e-8)
    truncated = Eigen(r, None, buffer=12, eig_tol=1e-8)
    error = nuclear(randomized)
    assert error < 1.05 * nuclear(truncated)
    assert error < 1.25 * optimum
    # Tropp et al.: l samples reach the best of rank p times 1 + p / (l - p - 1).
    samples = 2 * r + 1
    assert nuclear(Nystrom(samples, None, eig_tol=1e-6)) < 2.2 * optimum


# Frequent Directions ----------------------------------------------------------------------------


def bound(x, r):
    """``min_k ‖A - A_k‖_F² / (l - k)`` for the ``l = r + 1`` of a sketch that cuts the next one."""
    tails = np.append(np.cumsum((np.linalg.svd(x, compute_uv=False) ** 2)[::-1])[::-1], 0)
    return min(tails[min(k, len(tails) - 1)] / (r + 1 - k) for k in range(r + 1))


def streams(n=24, d=7):
    sizes = st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, -1.0, 2.0, 30.0, 1e3])
    # Squares have to be numbers of float32.
    entries = st.one_of(sizes, st.floats(-2, 2, width=32).map(lambda x: x * (abs(x) > 1e-15)))
    dense = hypothesis.extra.numpy.arrays(np.float64, (n, d), elements=entries)
    few = hypothesis.extra.numpy.arrays(np.float64, (3, d), elements=entries)
    repeated = st.builds(
        lambda a, order: a[np.array(order)],
        few,
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
    )
    scaled = st.builds(
        lambda a, scale: a * np.array(scale)[:, None],
        dense,
        st.lists(st.sampled_from([1e-3, 1.0, 1e3]), min_size=n, max_size=n),
    )
    return st.one_of(dense, repeated, scaled)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("robust", [False, True], ids=["plain", "robust"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_frequent_directions_bound(dtype, robust, k):
    basis = FrequentDirections(3, robust=robust, buffer=4)

    @hypothesis.settings(max_examples=50)
    @hypothesis.given(streams())
    def check(x):
        with enable_x64(dtype == jnp.float64):
            state = absorb(basis, x, k, dtype)
            cut = float(state.memory[0])
            lam = np.asarray(state.lam, np.float64)[0]
        q = rows(basis, state)
        sketch = (q.T * lam) @ q + (cut / 2 * np.eye(x.shape[1]) if robust else 0)
        half = 2 if robust else 1
        error = np.linalg.norm(x.T @ x - sketch, 2)
        # What the rows do not resolve of a column, `Frame` takes for rounding.
        rounding = np.sqrt(1e3 * np.finfo(dtype).eps) * np.sum(x**2)
        assert error <= bound(x, 3) / half + rounding
        assert error <= cut / half + rounding

    check()


def test_frequent_directions_erases_what_the_bound_allows():
    """Its bound is tight: equal energy in more directions than it has room for cancels."""
    basis = FrequentDirections(3)
    state = absorb(basis, np.tile(np.eye(8), (5, 1)))
    assert not np.any(np.asarray(state.lam)) or float(state.memory[0]) > 0
    assert (
        np.linalg.norm(5 * np.eye(8) - matrix(basis, state), 2)
        <= bound(np.tile(np.eye(8), (5, 1)), 3) + 1e-4
    )


def test_robust_steps_see_what_was_cut():
    x = np.random.default_rng(10).normal(size=(50, 8))
    plain, robust = FrequentDirections(3), FrequentDirections(3, robust=True)
    state = absorb(robust, x)
    np.testing.assert_allclose(
        robust.measured(state) - plain.measured(state), state.memory[0] / 2, rtol=1e-6
    )
    np.testing.assert_allclose(robust.eigenbasis(state).lam, robust.measured(state))


def test_opast_takes_the_gain_of_its_new_moments(x64):
    """``polar(Q + rho g^T)`` with ``g = (1 - beta) S a``: with ``S a`` it would turn ten times."""
    rng, rank, beta = np.random.default_rng(14), 3, 0.9
    x = rng.normal(size=(12, 1, 8)) * np.geomspace(2, 0.5, 8)
    state = absorbed(OPAST(rank, beta), x, np.ones((12, 1)))
    q, lam = vectors(state), spectrum(state)
    for t in range(rank, 12):
        a = q[t - 1] @ x[t, 0]
        rho = x[t, 0] - q[t - 1].T @ a
        s = np.linalg.inv(beta * np.diag(lam[t - 1]) + (1 - beta) * np.outer(a, a))
        want = np.linalg.qr(q[t - 1].T + np.outer(rho, (1 - beta) * s @ a))[0]
        np.testing.assert_allclose(q[t].T @ q[t], want @ want.T, atol=1e-9)


# Small algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_orthonormalize_rows(condition):
    rng = np.random.default_rng(11)
    u, v = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (6, 40))
    a = jnp.asarray((u * np.geomspace(condition, 1, 6)) @ v.T, jnp.float32)
    q = linalg.orthonormalize_rows(a.at[2].set(0))
    np.testing.assert_allclose(q @ q.T, jnp.eye(6).at[2, 2].set(0), atol=2e-6)
    np.testing.assert_allclose(
        jnp.tril(a @ linalg.orthonormalize_rows(a).T),
        a @ linalg.orthonormalize_rows(a).T,
        atol=1e-4 * condition,
    )


@pytest.mark.parametrize("k", [1, 3])
def test_lean_is_the_polar_factor_and_the_geodesic(k, x64):
    rng = np.random.default_rng(12)
    a = np.linalg.qr(rng.normal(size=(9, 4)))[0].T
    g, rho = rng.normal(size=(4, k)), rng.normal(size=(9, k))
    rho = rho - a.T @ a @ rho
    u, _, v = np.linalg.svd(a + g @ rho.T, full_matrices=False)
    polar = linalg.lean(jnp.asarray(a), jnp.asarray(g), jnp.asarray(rho), jnp.arctan)
    np.testing.assert_allclose(polar, u @ v, atol=1e-12)
    geodesic = linalg.lean(jnp.asarray(a), jnp.asarray(g), jnp.asarray(rho), lambda s: s)
    tangent = a.T @ g @ rho.T
    flow = jax.scipy.linalg.expm(jnp.asarray(tangent.T - tangent))
    np.testing.assert_allclose(geodesic, a @ flow.T, atol=1e-10)
