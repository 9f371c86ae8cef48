"""Inner parts against the formulas and identities that define them, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import Context, Eigenbasis, Law, inner
from lowrank_optax._core.linalg import transport
from lowrank_optax._core.types import SURROUNDED_DIAGONAL, SURROUNDED_MATRIX
from lowrank_optax.inner.hessian import Surrounded

pytestmark = pytest.mark.usefixtures("x64")


def rng(seed=0):
    return np.random.default_rng(seed)


def context(g, lam=None, moved=True, **seen):
    """What a step shows to a part; every slot with an eigenvalue is live."""
    lam = jnp.ones(len(g)) if lam is None else jnp.asarray(lam)
    seen = {name: jnp.asarray(x) for name, x in seen.items()}
    return Context(jnp.asarray(g), Eigenbasis(lam, lam != 0), jnp.asarray(moved), **seen)


def step(part, state, g, **seen):
    u, state = part.update(jnp.asarray(g), state, context(g, **seen))
    return np.asarray(u), state


def start(part, rank):
    return part.init(rank, jnp.float64)


def move(part, state, c):
    """The state in another basis, as its laws say."""

    def carry(law, x):
        if law.axes == 0:
            return x
        return (
            transport(law, c, x)
            if law.centred or law.surrounded
            else jax.tree.map(lambda a: transport(law, c, a), x)
        )

    return jax.tree.map(carry, part.laws, state, is_leaf=lambda x: isinstance(x, Law))


def stream(rank, steps, seed=0):
    """Gradients, probes and products with one positive definite Hessian."""
    random = rng(seed)
    h = random.normal(size=(rank, rank))
    h = h @ h.T + np.eye(rank)
    g, z = random.normal(size=(2, steps, rank))
    return g, z, z @ h, h


# Moments of the gradient.


def ldadam(grads, bases, b1=0.9, b2=0.99):
    """Steps by the published rule: moments from zero, corrected where the law subtracts them."""
    m = v = np.zeros(len(bases[0]))
    last = np.zeros_like(bases[0])
    for t, (g, q) in enumerate(zip(grads, bases, strict=True), 1):
        c, u, last = q @ last.T, q @ g, q
        if t > 1:
            mean, second = m / (1 - b1 ** (t - 1)), v / (1 - b2 ** (t - 1))
            v = (1 - b2 ** (t - 1)) * np.abs(c**2 @ (second - mean**2) + (c @ mean) ** 2)
            m = c @ m
        m, v = b1 * m + (1 - b1) * u, b2 * v + (1 - b2) * u**2
        yield q.T @ ((m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8))


def test_centred_moments_are_those_of_ldadam():
    """In bases that turn, keep three of four directions, and lose one now and then."""
    random = rng(3)
    grads = random.normal(size=(12, 4)) + 1
    bases = [np.linalg.qr(random.normal(size=(4, 3)))[0].T for _ in grads]
    bases[1] = bases[0]  # one that stays
    part = inner.Adam(centred=True)
    state, last = start(part, 3), np.zeros((3, 4))
    for g, q, want in zip(grads, bases, ldadam(grads, bases), strict=True):
        u, state = step(part, move(part, state, q @ last.T), q @ g)
        np.testing.assert_allclose(q.T @ u, want, rtol=1e-9)
        last = q


def test_centred_adam_on_a_constant_gradient_takes_steps_of_one():
    """The variance is zero, whatever the decays: moments without correction gave .49."""
    tx = lro.scale_by_lre(
        lro.curvature.Covariance(), lro.basis.GGT(3), inner.Adam(b1=0.9, b2=0.999, centred=True)
    )
    g, update = jnp.array([3.0, 0.0, 4.0]), jax.jit(tx.update)
    state = tx.init(g)
    for _ in range(20):
        u, state = update(g, state)
        np.testing.assert_allclose(jnp.linalg.norm(u), 1, rtol=1e-6)


# The decaying maximum of the second moment.


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.0])
def test_amsgrad_is_its_rule_with_a_decay(decay):
    """The maximum is of the moment before its correction, and is corrected as the moment is."""
    random, part = rng(4), inner.Adam(b1=0.9, b2=0.8, eps=1e-3, amsgrad_decay=decay)
    state, m, v, top = start(part, 5), np.zeros(5), np.zeros(5), np.zeros(5)
    held = 0
    for t in range(1, 13):
        g = random.normal(size=5) * 0.7**t  # shrinking, so that the maximum matters
        u, state = step(part, state, g)
        m, v = 0.9 * m + 0.1 * g, 0.8 * v + 0.2 * g**2
        top = np.maximum(decay * top, v)
        root = np.sqrt(top / (1 - 0.8**t))
        np.testing.assert_allclose(u, m / (1 - 0.9**t) / (root + 1e-3), rtol=1e-12)
        held += np.sum(top > v)
    assert (held > 0) == (decay > 0)


def test_amsgrad_without_decay_has_the_maximum_of_the_moments_of_optax():
    random, part, plain = rng(5), inner.Adam(amsgrad_decay=1.0), optax.scale_by_adam(b2=0.99)
    state, theirs, top = start(part, 4), plain.init(jnp.zeros(4)), 0.0
    for t in range(8):
        g = random.normal(size=4) * 0.5**t
        _, state = step(part, state, g)
        _, theirs = plain.update(jnp.asarray(g), theirs)
        top = np.maximum(top, theirs.nu)
        np.testing.assert_allclose(state.largest, top, rtol=1e-12)


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("identity", [True, False])
def test_amsgrad_on_the_diagonal_of_a_matrix(decay, identity):
    """In bases that turn, densely: the maximum is the diagonal of the matrix that it is part of."""
    random = rng(6)
    part = inner.FullMatrixAdam(b2=0.8, eps=1e-2, identity=identity, amsgrad_decay=decay)
    state, m, cov, raised = start(part, 3), np.zeros(3), np.eye(3) * identity, np.zeros((3, 3))
    for t in range(1, 9):
        c = np.linalg.qr(random.normal(size=(3, 3)))[0] if t % 3 == 0 else np.eye(3)
        state = move(part, state, c)
        m, cov, raised = c @ m, c @ cov @ c.T, c @ raised @ c.T
        g = random.normal(size=3) * 0.6**t
        u, state = step(part, state, g)
        m, cov = 0.9 * m + 0.1 * g, 0.8 * cov + 0.2 * np.outer(g, g)
        top = np.maximum(decay * np.diag(raised), np.diag(cov))
        raised = cov + np.diag(top - np.diag(cov))
        lam, q = np.linalg.eigh(raised / (1 - 0.8**t) + identity * 1e-2 * np.eye(3))
        live = lam > 1e-12 * lam[-1]  # what was not seen yet stays out
        lam = lam + (1e-8 + 1e-8 * lam[-1] if identity else 1e-2)
        root = np.where(live, np.abs(lam) ** -0.5, 0)
        np.testing.assert_allclose(u, (q * root) @ q.T @ m / (1 - 0.9**t), rtol=1e-8, atol=1e-12)
    assert np.any(top > 2 * np.diag(cov))


@pytest.mark.parametrize("gamma", [None, 0.01])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_amsgrad_of_estimates_falls_with_their_number(decay, gamma):
    g, z, hz, _ = stream(5, 9)
    part = inner.HutchinsonAdam(b2=0.8, eps=1e-8, gamma=gamma, amsgrad_decay=decay)
    state, m, d, top, n = start(part, 5), np.zeros(5), np.zeros(5), np.zeros(5), 0
    for t in range(1, 10):
        measured = t % 3 != 0
        p, hp = z[t - 1] * 0.6**t, hz[t - 1]
        u, state = step(part, state, g[t - 1], probe=p, product=hp, moved=measured)
        m = 0.9 * m + 0.1 * g[t - 1]
        if measured:
            n, v = n + 1, p * hp if gamma else (p * hp) ** 2
            d = 0.8 * d + 0.2 * v
            top = np.maximum(decay * top, d)
        mean, size = m / (1 - 0.9**t), top / (1 - 0.8**n)
        want = mean / np.maximum(gamma * size, 1e-8) if gamma else mean / (np.sqrt(size) + 1e-8)
        np.testing.assert_allclose(u, want, rtol=1e-10)
    assert np.any(top > d)


def test_the_maximum_turns_with_the_second_moment():
    """As ``diag(C diag(v) C^T)``, and with the average outside for the estimates' directions."""
    random = rng(7)
    old, new = (np.linalg.qr(random.normal(size=(5, 5)))[0][:3] for _ in range(2))
    c, top, s = new @ old.T, random.uniform(1, 2, size=3), 3.0
    adam, hutchinson = inner.Adam(amsgrad_decay=0.9), inner.HutchinsonAdam(amsgrad_decay=0.9)
    state = start(adam, 3)._replace(largest=jnp.asarray(top))
    turned = np.diag(c @ np.diag(top) @ c.T)
    np.testing.assert_allclose(move(adam, state, c).largest, turned)
    outside = Surrounded(jnp.asarray(top), jnp.asarray(s))
    state = start(hutchinson, 3)._replace(largest=outside)
    turned = turned + s * (1 - np.diag(c @ c.T))
    np.testing.assert_allclose(move(hutchinson, state, c).largest.inside, turned)


@pytest.mark.parametrize("part", [inner.Adam(), inner.FullMatrixAdam(), inner.HutchinsonAdam()])
def test_without_a_maximum_none_is_stored(part):
    with_maximum = dataclasses.replace(part, amsgrad_decay=0.9)
    size = lambda part: sum(x.size for x in jax.tree.leaves(start(part, 7)))
    assert start(part, 7)[-1] is None and size(part) < size(with_maximum) <= size(part) + 8


NO_EPS = {
    "adam": inner.Adam(eps=0.0),
    "amsgrad": inner.Adam(eps=0.0, amsgrad_decay=1.0),
    "full_amsgrad": inner.FullMatrixAdam(eps=0.0, amsgrad_decay=0.9),
    "adahessian_amsgrad": inner.HutchinsonAdam(eps=0.0, amsgrad_decay=0.9),
    "centred": inner.Adam(eps=0.0, centred=True),
    "cubic": inner.CubicAdam(eps=0.0),
    "full": inner.FullMatrixAdam(eps=0.0),
    "adahessian": inner.HutchinsonAdam(eps=0.0),
    "sophia": (inner.HutchinsonAdam(eps=0.0, gamma=0.01), inner.ClipValue()),
    "full_hessian": inner.FullMatrixHutchinsonAdam(eps=0.0),
    "full_bfgs": inner.FullMatrixBFGSAdam(eps=0.0),
    "optax": inner.Optax(
        optax.scale_by_adam(eps=0.0),
        laws=optax.ScaleByAdamState(lro.SCALAR, lro.VECTOR, lro.SECOND_MOMENT),
    ),
}


@pytest.mark.parametrize("name", NO_EPS)
def test_without_eps_dead_slots_stop_nothing(name):
    """Two dimensions leave dead slots in a basis of four; 0/0 there would drop every step."""
    fn = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 3.0]))
    tx = lro.scale_by_lre(
        lro.curvature.HutchinsonHessian(), lro.basis.Eigen(4, eig_tol=1e-8), NO_EPS[name]
    )
    x = jnp.array([0.0, 2.0])
    state, update = tx.init(x), jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=fn))
    for _ in range(5):
        u, state = update(jax.grad(fn)(x), state, x)
        x = x - 0.1 * u
    assert sum(int(n[0]) for n in state.events) == 0 and np.any(u)


# Averages of the curvature.


def test_adahessian_is_its_published_rule():
    g, z, hz, _ = stream(5, 7)
    part = inner.HutchinsonAdam(b1=0.9, b2=0.999, eps=1e-8)
    state, m, d = start(part, 5), np.zeros(5), np.zeros(5)
    for t in range(7):
        u, state = step(part, state, g[t], probe=z[t], product=hz[t])
        m = 0.9 * m + 0.1 * g[t]
        d = 0.999 * d + 0.001 * (z[t] * hz[t]) ** 2
        root = np.sqrt(d / (1 - 0.999 ** (t + 1)))
        np.testing.assert_allclose(u, m / (1 - 0.9 ** (t + 1)) / (root + 1e-8), rtol=1e-12)


def test_sophia_is_its_published_rule():
    g, z, hz, _ = stream(5, 24)
    part = inner.as_inner(
        (
            inner.HutchinsonAdam(b1=0.965, b2=0.99, eps=1e-12, gamma=0.01, debias=False),
            inner.ClipValue(1.0),
        )
    )
    state, m, h = start(part, 5), np.zeros(5), np.zeros(5)
    clipped = 0
    for t in range(24):
        measured = t % 3 == 0
        g[t] *= 0.01
        u, state = step(part, state, g[t], probe=z[t], product=hz[t], moved=measured)
        m = 0.965 * m + 0.035 * g[t]
        h = 0.99 * h + 0.01 * z[t] * hz[t] if measured else h
        expected = np.clip(m / np.maximum(0.01 * h, 1e-12), -1, 1)
        np.testing.assert_allclose(u, expected, rtol=1e-12)
        clipped += np.sum(np.abs(expected) == 1)
    assert 0 < clipped < 5 * 24


def test_sophia_agrees_with_optax():
    """optax measures after its step, so its next step is the one that uses the estimate."""
    g, z, hz, _ = stream(4, 6)
    g = g / 100
    ours = inner.HutchinsonAdam(b1=0.0, b2=0.99, eps=1e-8, gamma=0.01, debias=False)
    measure = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params=None, estimate=None: (estimate, state)
    )
    theirs = optax.contrib.sophia(
        1.0, b1=0.0, update_interval=1, weight_decay=0.0, hessian_diagonal_fn=measure
    )
    state, other = start(ours, 4), theirs.init(jnp.zeros(4))
    for t in range(6):
        _, other = theirs.update(
            jnp.ones(4), other, jnp.zeros(4), estimate=jnp.asarray(z[t] * hz[t])
        )
        expected, _ = theirs.update(jnp.asarray(g[t]), other, jnp.zeros(4), estimate=jnp.zeros(4))
        u, state = step(ours, state, g[t], probe=z[t], product=hz[t])
        np.testing.assert_allclose(np.clip(u, -1, 1), -expected, rtol=1e-12)


@pytest.mark.parametrize(
    "part",
    [
        inner.HutchinsonAdam(),
        inner.HutchinsonAdam(gamma=0.01),
        inner.FullMatrixHutchinsonAdam(),
        inner.FullMatrixBFGSAdam(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_averages_wait_for_products(part):
    g, z, hz, _ = stream(4, 3)
    _, state = step(part, start(part, 4), g[0], probe=z[0], product=hz[0])
    _, after = step(part, state, g[1], probe=z[1], product=hz[1], moved=False)
    jax.tree.map(np.testing.assert_array_equal, after[3], state[3])
    assert int(after.estimates) == 1 and int(after.count) == 2
    u, _ = step(part, start(part, 4), g[0], probe=z[0], product=hz[0], moved=False)
    assert np.all(np.isfinite(u))


def test_full_matrix_hutchinson_inverts_the_size_of_the_hessian():
    h = jnp.diag(jnp.array([4.0, -0.5, 2.0]))
    part = inner.FullMatrixHutchinsonAdam(b1=0.0, b2=0.99, eps=0.0)

    def body(state, z):
        return part.update(jnp.ones(3), state, context(jnp.ones(3), probe=z, product=h @ z))[::-1]

    probes = jnp.sqrt(3) * jnp.tile(jnp.eye(3), (500, 1))  # their mean z z^T is the identity
    _, u = jax.lax.scan(body, start(part, 3), probes)
    np.testing.assert_allclose(u[-1], [0.25, 2.0, 0.5], rtol=0.02)


def test_full_matrix_bfgs_satisfies_the_secant_equation():
    part = inner.FullMatrixBFGSAdam(b1=0.0, b2=0.0, eps=0.0)
    _, z, hz, _ = stream(5, 4)
    state = start(part, 5)
    for t in range(4):
        u, state = step(part, state, hz[t], probe=z[t], product=hz[t])
        np.testing.assert_allclose(u, z[t], rtol=1e-8)
    u, _ = step(part, state, hz[3], probe=z[0], product=-z[0])  # negative curvature: skipped
    np.testing.assert_allclose(u, z[3], rtol=1e-8)


def test_cubic_adam_steps_to_the_minimum_of_its_cubic():
    part = inner.CubicAdam(b1=0.5, b2=0.9, b3=0.8)
    state = start(part, 200)
    random = rng()
    for _ in range(4):
        u, state = step(part, state, random.normal(size=200) + 0.5)
    a = np.cbrt(state.third / (1 - 0.8**4))
    b = np.sqrt(state.second / (1 - 0.9**4))
    c = np.asarray(state.mean / (1 - 0.5**4))
    has = b * b >= 4 * a * c
    x = -u
    assert 20 < has.sum() < 180
    np.testing.assert_allclose((a * x * x + b * x + c)[has], 0, atol=1e-12)
    assert np.all((2 * a * x + b)[has] >= 0)
    np.testing.assert_allclose(x[~has], (-c / (b + 1e-8))[~has])


# Models of the loss.


SPECTRA = {
    "convex": np.array([5.0, 2.0, 1.0, 0.1]),
    "ill_conditioned": np.array([1e6, 1.0, 1e-6, 1e-9]),
    "indefinite": np.array([5.0, 2.0, -0.5, -3.0]),
    "concave": np.array([-1.0, -2.0, -3.0, -4.0]),
}


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_cubic_newton_finds_the_global_minimum(spectrum, sigma, size):
    """``(Λ + ρI) u = g``, ``ρ = σ‖u‖`` and ``Λ + ρI ≥ 0`` hold at the global minimum only."""
    lam, part = SPECTRA[spectrum], inner.CubicNewton(sigma)
    for seed in range(3):
        g = size * rng(seed).normal(size=4)
        u, state = step(part, start(part, 4), g, lam=lam)
        rho = sigma * np.linalg.norm(u)
        assert rho + lam.min() >= -1e-10 * np.abs(lam).max()
        rounding = 1e-14 * np.abs(lam).max() * np.linalg.norm(u)
        np.testing.assert_allclose(
            (lam + rho) * u, g, rtol=0, atol=1e-7 * np.abs(g).max() + rounding
        )
        np.testing.assert_allclose(state.shift, rho, rtol=1e-9)


def test_cubic_newton_in_the_hard_case():
    lam, g = np.array([2.0, 1.0, -1.0]), np.array([0.1, 0.2, 0.0])
    part = inner.CubicNewton(1.0)
    u, _ = step(part, start(part, 3), g, lam=lam)
    np.testing.assert_allclose(np.linalg.norm(u), 1.0, rtol=1e-6)
    np.testing.assert_allclose((lam + 1) * u, g, atol=1e-6)


def test_cubic_newton_ignores_dead_slots_and_zero_gradients():
    part = inner.CubicNewton()
    u, _ = step(part, start(part, 3), [1.0, 0.0, 0.0], lam=[2.0, 0.0, 0.0])
    np.testing.assert_allclose(u, [np.sqrt(2) - 1, 0, 0])
    u, state = step(part, start(part, 3), np.zeros(3), lam=np.zeros(3))
    assert not np.any(u) and np.isfinite(state.shift)


def test_cubic_newton_beats_newton():
    """Where Newton's method diverges, and where it climbs to a saddle."""

    def descend(part, grad, hessian, x, steps):
        state, update = start(part, len(x)), jax.jit(part.update)
        for _ in range(steps):
            g = grad(x)
            u, state = update(jnp.asarray(g), state, context(g, hessian(x)))
            x = x - np.asarray(u)
        return x

    flat = (lambda x: x / np.sqrt(1 + x**2), lambda x: (1 + x**2) ** -1.5, np.array([3.0, 0.1]))
    double = (lambda x: x**3 - x, lambda x: 3 * x**2 - 1, np.array([0.1, 2.0]))
    cubic = inner.CubicNewton(1.0, adaptive=True)
    with np.errstate(all="ignore"):
        assert not np.all(np.abs(descend(inner.LInv(), *flat, 6)) < 1e3)
    np.testing.assert_allclose(descend(cubic, *flat, 30), 0, atol=1e-8)
    np.testing.assert_allclose(np.abs(descend(inner.LInv(), *double, 30)), [0, 1], atol=1e-8)
    np.testing.assert_allclose(np.abs(descend(cubic, *double, 30)), [1, 1], atol=1e-8)


def cubic_polynomial(seed, rank):
    random = rng(seed)
    t = random.normal(size=(rank,) * 3)
    t = (
        sum(
            np.transpose(t, p)
            for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        )
        / 6
    )
    h = random.normal(size=(rank, rank))
    return random.normal(size=rank), h @ h.T + 3 * np.eye(rank), t


def test_third_order_learns_a_cubic_polynomial():
    """The basis turns with the Hessian at every step; the tensor has to turn with it."""
    rank = 4
    _, h, t = cubic_polynomial(0, rank)
    part = inner.ThirdOrder()
    state, q = start(part, rank), np.eye(rank)
    x = np.zeros(rank)
    for s in [np.zeros(rank), *np.eye(rank)]:  # independent directions, one after the other
        x = x + 0.1 * s
        lam, vectors = np.linalg.eigh(h + t @ x)
        c, q = vectors.T @ q, vectors
        state = move(part, state, c)._replace(step=jnp.asarray(0.1 * q.T @ s))
        _, state = step(part, state, np.zeros(rank), lam=lam)
    found = np.einsum("ijk,ai,bj,ck->abc", state.tensor, q, q, q)
    np.testing.assert_allclose(found, t, atol=1e-10)


def test_third_order_minimises_its_model():
    g, h, t = cubic_polynomial(1, 4)
    lam, q = np.linalg.eigh(h)
    t = np.einsum("ijk,ia,jb,kc->abc", t, q, q, q)
    g, sigma = 0.1 * q.T @ g, 0.5
    part = inner.ThirdOrder(sigma)
    state = start(part, 4)._replace(tensor=jnp.asarray(t), hessian=jnp.diag(lam))
    y = -step(part, state, g, lam=lam)[0]
    slope = g + lam * y + np.einsum("ijk,j,k->i", t, y, y) / 2 + sigma * (y @ y) * y
    curvature = np.diag(lam) + t @ y + sigma * (y @ y * np.eye(4) + 2 * np.outer(y, y))
    np.testing.assert_allclose(slope, 0, atol=1e-9)
    assert np.linalg.eigvalsh(curvature).min() > 0


@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize(
    "part",
    [inner.NaturalGradient(0.3, 0.1), inner.DampedLeastSquares(0.3, 0.1)],
    ids=lambda part: type(part).__name__,
)
def test_damped_solves_are_the_dense_ones(part, k):
    random = rng(k)
    a, w, g = random.normal(size=(5, k)), random.uniform(1, 2, size=k), random.normal(size=5)
    w[0] = 0.0  # switched off
    matrix = (a * w) @ a.T
    if isinstance(part, inner.NaturalGradient):
        matrix = matrix / w.sum()
    matrix = matrix + (0.3 + 0.1 * np.trace(matrix)) * np.eye(5)
    u, state = step(part, start(part, 5), g, columns=a, weights=w)
    np.testing.assert_allclose(u, np.linalg.solve(matrix, g), rtol=1e-9)
    u, _ = step(part, state, 2 * g, columns=0 * a, weights=0 * w, moved=False)
    np.testing.assert_allclose(u, 2 * np.linalg.solve(matrix, g), rtol=1e-9)


def test_undamped_least_squares_is_the_shortest_solution():
    random = rng()
    a, r = random.normal(size=(6, 3)), random.normal(size=3)
    part = inner.DampedLeastSquares(0.0, 0.0)
    u, _ = step(part, start(part, 6), a @ r, columns=a, weights=np.ones(3))
    np.testing.assert_allclose(u, np.linalg.pinv(a.T) @ r, rtol=1e-9)


# How states move.


PARTS = {
    "adam_amsgrad": (inner.Adam(amsgrad_decay=0.9), False),
    "fulladam_amsgrad": (inner.FullMatrixAdam(amsgrad_decay=0.9), False),
    "hutchinson": (inner.HutchinsonAdam(), False),
    "hutchinson_amsgrad": (inner.HutchinsonAdam(amsgrad_decay=0.9), False),
    "sophia": (inner.HutchinsonAdam(gamma=0.1, eps=1e-3), False),
    "cubic_adam": (inner.CubicAdam(), False),
    "full_hutchinson": (inner.FullMatrixHutchinsonAdam(), True),
    "full_bfgs": (inner.FullMatrixBFGSAdam(), True),
    "cubic_newton": (inner.CubicNewton(adaptive=True), True),
    "third_order": (inner.ThirdOrder(), True),
    "natural": (inner.NaturalGradient(), True),
    "damped_least_squares": (inner.DampedLeastSquares(1e-2), True),
}


@pytest.mark.parametrize("name", PARTS)
def test_turning_the_basis_commutes_with_the_update(name):
    """By any orthogonal C where the rule knows no axes, by signed permutations where it does."""
    part, rotates = PARTS[name]
    g, z, hz, _ = stream(4, 6)
    random = rng(1)
    columns = random.normal(size=(6, 4, 3))
    still = turned = start(part, 4)
    update = jax.jit(part.update)
    q = np.eye(4)
    for t in range(6):
        c = (
            np.linalg.qr(random.normal(size=(4, 4)))[0]
            if rotates
            else (np.eye(4)[random.permutation(4)] * random.choice([-1, 1], size=4))
        )
        if t == 0:
            c = np.eye(4)
        q = c @ q
        moved, lam = t % 3 != 2, np.full(4, 1.0 + t)
        if not moved:
            lam, q, c = np.full(4, float(t)), c.T @ q, np.eye(4)
        outputs = []
        for state, turn in ((still, np.eye(4)), (move(part, turned, c), q)):
            seen = context(
                turn @ g[t],
                lam,
                moved,
                columns=turn @ columns[t],
                weights=np.ones(3),
                probe=turn @ z[t],
                product=turn @ hz[t],
            )
            outputs.append(update(seen.g, state, seen))
        (expected, still), (u, turned) = outputs
        np.testing.assert_allclose(u, q @ expected, rtol=1e-6, atol=1e-9)
    assert np.any(expected)


def test_directions_that_enter_bring_what_is_outside():
    """The diagonal and the matrix of ``Q M Q^T + s (I - Q Q^T)`` in another basis, densely."""
    random = rng(2)
    old, new = (np.linalg.qr(random.normal(size=(7, 7)))[0][:3] for _ in range(2))
    v, s = random.uniform(1, 2, size=3), 5.0
    whole = (old.T * v) @ old + s * (np.eye(7) - old.T @ old)
    diagonal, outside = transport(
        SURROUNDED_DIAGONAL, jnp.asarray(new @ old.T), Surrounded(jnp.asarray(v), jnp.asarray(s))
    )
    np.testing.assert_allclose(diagonal, np.diagonal(new @ whole @ new.T))
    matrix, _ = transport(
        SURROUNDED_MATRIX,
        jnp.asarray(new @ old.T),
        Surrounded(jnp.diag(jnp.asarray(v)), jnp.asarray(s)),
    )
    np.testing.assert_allclose(matrix, new @ whole @ new.T)
    assert outside == s


def test_values_are_checked():
    for make in (
        lambda: inner.HutchinsonAdam(b1=1.0),
        lambda: inner.HutchinsonAdam(gamma=0.0),
        lambda: inner.FullMatrixBFGSAdam(eps=-1.0),
        lambda: inner.CubicAdam(b3=-0.1),
        lambda: inner.Adam(amsgrad_decay=1.1),
        lambda: inner.FullMatrixAdam(amsgrad_decay=-0.1),
        lambda: inner.HutchinsonAdam(amsgrad_decay=True),
        lambda: inner.CubicNewton(0.0),
        lambda: inner.CubicNewton(iterations=0),
        lambda: inner.ThirdOrder(-1.0),
        lambda: inner.NaturalGradient(-1.0),
        lambda: inner.DampedLeastSquares(rdamping=-1.0),
    ):
        with pytest.raises(ValueError, match="pass a"):
            make()


@pytest.mark.parametrize(
    "part",
    [
        inner.HutchinsonAdam(),
        inner.FullMatrixHutchinsonAdam(),
        inner.NaturalGradient(),
        inner.DampedLeastSquares(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_products_without_what_a_part_needs_are_refused(part):
    with pytest.raises(ValueError, match="combine it with"):
        lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(3), part)
