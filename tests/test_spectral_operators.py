"""Operators against dense references and closed forms, the Laplacian against the Hessian."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import spectral as s
from lowrank_optax.spectral import operators as ops
from lowrank_optax.spectral.methods import moments


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


W = np.asarray(normal(3, 16), np.float64)
V = np.asarray(normal(16, 4, seed=1), np.float64)
FUNCTIONS = {
    "network": lambda x: jax.nn.softplus(jnp.tanh(x @ W) @ V),
    "custom derivatives": lambda x: jax.nn.gelu(x @ W) @ V * jnp.exp(-jnp.linalg.norm(x)),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + y * y[0], x),
    "branch": lambda x: jnp.where(x[0] > 0, x**3, jnp.cos(x)) / (1 + x @ x),
    "algebra": lambda x: jnp.linalg.inv(4 * jnp.eye(3) + jnp.outer(x, x)),
    "reduction": lambda x: jax.nn.logsumexp(x @ W) * jnp.sort(x)[0],
    "constant": lambda x: jnp.ones(2),
    "flax": lambda x: FLAX.apply(PARAMS, x),
}
FLAX = s.networks.MLP(2, (8, 8), features=s.networks.ScaleFeatures(waves=4))
PARAMS = jax.jit(FLAX.init)(jax.random.key(0), jnp.ones(3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_laplacian_is_the_hessians_trace(name):
    with jax.enable_x64(True):
        f, x = FUNCTIONS[name], jnp.asarray([0.3, -0.8, 1.1])
        jet = jax.jit(lambda x: s.laplacian(f, x))(x)
        hessian = jnp.trace(jax.jit(jax.hessian(f))(x), axis1=-2, axis2=-1)
        jacobian = jnp.moveaxis(jax.jit(jax.jacobian(f))(x), -1, 0)
        # 1e-12 where the functions are in float64; flax computes in float32.
        rtol = 1e-5 if name == "flax" else 1e-12
        np.testing.assert_allclose(jet.value, f(x), rtol=rtol)
        np.testing.assert_allclose(jet.gradient, jacobian, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(jet.laplacian, hessian, rtol=rtol, atol=rtol)


def test_laplacian_leaves_its_function_differentiable():
    """The value's gradient passes; that is all a cotangent needs."""
    f = lambda w, x: jnp.tanh(w * x)
    grad = jax.grad(lambda w: jnp.sum(s.laplacian(lambda x: f(w, x), jnp.ones(2)).value))(0.5)
    np.testing.assert_allclose(grad, 2 / np.cosh(0.5) ** 2, rtol=1e-5)


def test_network_parts_at_the_origin():
    features = s.networks.FourierFeatures(8, kink=True)
    net = s.networks.MLP(
        3, (8,), features=features, shared=True, envelope=s.networks.Envelope(3, 2.0)
    )
    params = jax.jit(net.init)(jax.random.key(0), jnp.ones(2))
    jet = jax.jit(lambda x: s.laplacian(lambda x: net.apply(params, x), x))(jnp.zeros(2))
    assert jet.value.shape == (3,) and all(np.isfinite(part).all() for part in jet)
    far = [net.apply(params, jnp.array([0.0, r])) for r in (30.0, 60.0)]
    assert np.abs(far[1]).max() < 1e-3 * np.abs(far[0]).max()  # e^{-30/2}, over a slow network


def galerkin(operator, basis, size, batches=8):
    """Rayleigh-Ritz in the span of fixed functions: no training, only the operator."""
    network = tuple((lambda key, x: (), lambda p, x, f=f: f(x)) for f in np.atleast_1d(basis))
    network = network if operator.sides == 2 else network[0]
    from lowrank_optax.spectral.decomposition import functions_of, networks_of

    networks = networks_of(network, operator.sides)
    functions = functions_of(networks, ((),) * operator.sides)

    @jax.jit
    def seen(key):
        out = operator.apply(*functions, operator.sample(key, size, operator.init()))
        return moments(tuple(zip(out[::2], out[1::2], strict=True)))

    each = [seen(k) for k in jax.random.split(jax.random.key(1), batches)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    return s.Decomposition.of(operator, networks, ((),) * operator.sides, stacked)


def hermite(x):
    t = jnp.squeeze(x)
    return t ** jnp.arange(6) * jnp.exp(-(t**2) / 4)


def test_oscillator_in_the_span_of_its_modes():
    operator = ops.Schrodinger(ops.Harmonic(), ops.MultiScale(1, (1.0,)), shift=2.0, scale=0.5)
    found = galerkin(operator, hermite, 20_000)
    np.testing.assert_allclose(found.eigenvalues, operator.truth(6), atol=0.01)
    assert found.residuals.max() < 0.05
    x = jnp.linspace(-2, 2, 9)[:, None]
    ground = np.exp(-(x[:, 0] ** 2) / 2) / np.pi**0.25
    np.testing.assert_allclose(np.abs(found(x)[:, 0]), ground, rtol=0.03)  # norms are sampled


@pytest.mark.parametrize("mask", [ops.BoxMask(1.5), ops.RootMask(1.5)], ids=["box", "root"])
def test_infinite_well(mask):
    operator = ops.Schrodinger(ops.InfiniteWell(1.5), ops.Box(2, 1.5), mask=mask)
    basis = lambda x: jnp.outer(x[0] ** jnp.arange(5), x[1] ** jnp.arange(5)).ravel()
    found = galerkin(operator, basis, 4000)
    np.testing.assert_allclose(found.eigenvalues[:4], operator.truth(4), rtol=0.03)


def test_closed_forms():
    np.testing.assert_allclose(
        ops.Hydrogen().energies(10, 2), -1 / np.array([1, 3, 3, 3, *[5] * 5, 7]) ** 2
    )
    np.testing.assert_allclose(ops.Hydrogen(2.0).energies(6, 3), [-1, *[-1 / 4] * 4, -1 / 9])
    np.testing.assert_allclose(ops.Harmonic(2.0).energies(4, 2), [4, 8, 8, 12])
    np.testing.assert_allclose(ops.Harmonic().energies(5, 3), [3, 5, 5, 5, 7])
    brute = sorted(a**2 + b**2 for a in range(1, 40) for b in range(1, 40))[:60]
    np.testing.assert_allclose(ops.InfiniteWell(np.pi / 2).energies(60, 2), brute)


def test_hydrogens_ground_state_in_the_plane():
    """``e^{-r}`` is exact, cusp and all, under a mixture of scales: no variance, no residual."""
    operator = ops.Schrodinger(ops.Hydrogen(), ops.geometric(2, 0.5, 8.0))

    def exact(x):
        envelope = operator.proposal.log_density(x, operator.init()) / 2
        r = jnp.linalg.norm(x)
        return jnp.exp(-r - envelope)[None]

    found = galerkin(operator, exact, 2000, 2)
    np.testing.assert_allclose(found.eigenvalues, 1, rtol=1e-4)
    assert found.residuals[0] < 1e-2


def test_proposals_adapt_to_the_span_and_stay_unbiased():
    proposal = ops.MultiScale(2, (0.3, 1.0, 3.0, 10.0), rate=0.3)
    density = lambda x: jnp.exp(-jnp.sum(x**2) / 2) / (2 * jnp.pi)  # N(0, 1)
    state = proposal.init()

    @jax.jit
    def step(state, key):
        x = proposal.draw(key, 4000, state)
        log_q = jax.vmap(lambda x: proposal.log_density(x, state))(x)
        weight = jax.vmap(density)(x) / jnp.exp(log_q)
        return proposal.adapt(state, x, weight), jnp.mean(weight)

    masses = []
    for key in jax.random.split(jax.random.key(0), 40):
        state, mass = step(state, key)
        masses.append(mass)
    weights = np.exp(state.log_weights)
    assert weights.argmax() == 1 and weights[1] > 0.6 and weights.min() > 0.05
    assert state.efficiency > 0.7 > 0.3
    np.testing.assert_allclose(np.mean(masses), 1, atol=5e-3)
    bad = proposal.adapt(state, jnp.ones((4, 2)), jnp.array([jnp.nan, 1, 1, 1]))
    np.testing.assert_array_equal(bad.log_weights, state.log_weights)


@dataclasses.dataclass(frozen=True)
class Lattice(ops.Box):
    """Evenly spaced points of a line in place of random ones: quadrature."""

    def draw(self, key, size, state):
        return self.half_width * (2 * (jnp.arange(size)[:, None] + 0.5) / size - 1)


def rbf(centers, width):
    return lambda x: jnp.exp(-((x[0] - centers) ** 2) / (2 * width**2))


@pytest.mark.parametrize(
    ("kind", "potential", "half_width"),
    [
        (ops.Langevin, ops.DoubleWell(3.0), 2.5),
        (ops.FokkerPlanck, ops.DoubleWell(3.0), 2.5),
        (ops.Langevin, ops.Prinz(), 1.3),
    ],
    ids=["double well", "fokker-planck", "prinz"],
)
def test_langevin_against_a_fine_grid(kind, potential, half_width):
    operator = kind(potential, Lattice(1, half_width), beta=1.5, friction=0.8, shift=0.1)
    centers = jnp.linspace(-half_width, half_width, 60)
    found = galerkin(operator, rbf(centers, half_width / 30), 4000, 1)
    truth = operator.truth(4, half_width=half_width, cells=600)
    np.testing.assert_allclose(truth[0], 0.1, atol=1e-6)
    np.testing.assert_allclose(found.eigenvalues[:4], truth, rtol=0.02, atol=2e-3)


def test_grid_knows_the_ornstein_uhlenbeck_process():
    operator = ops.Langevin(lambda x: x[0] ** 2, ops.gaussian(1, 1.0), friction=0.5)
    np.testing.assert_allclose(operator.truth(4), [0, -4, -8, -12], rtol=2e-3, atol=1e-6)


def test_fokker_planck_densities_are_the_boltzmann_weight_times_the_generators():
    operator = ops.FokkerPlanck(ops.DoubleWell(), ops.Box(1, 2.0), beta=2.0)
    x = jnp.array([0.4])
    np.testing.assert_allclose(
        operator.dress(lambda x: x)(x), x * jnp.exp(-2 * (0.4**2 - 1) ** 2), rtol=1e-6
    )


def autoregression(n, a=0.7):
    """``x' = a x + noise``, reversible, with eigenvalues ``a^k``."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return x[:, None], (a * x + (1 - a * a) ** 0.5 * rng.normal(size=n))[:, None]


def powers(x):
    return x[0] ** jnp.arange(1, 4)


def test_koopman_of_an_autoregression():
    x, y = autoregression(100_000)
    found = galerkin(ops.Koopman(x, y), powers, 100_000, 1)
    np.testing.assert_allclose(found.eigenvalues, 0.7 ** np.arange(4), atol=0.02)
    times = ops.timescales(found.eigenvalues[1], 2.0)
    np.testing.assert_allclose(times, -2 / np.log(0.7), rtol=0.05)
    assert found.residuals is None


def test_canonical_dependence_of_an_autoregression():
    x, y = autoregression(100_000)
    operator = ops.CanonicalDependence(x, y)
    found = galerkin(operator, [powers, powers], 100_000, 1)
    np.testing.assert_allclose(found.singular_values, 0.7 ** np.arange(4), atol=0.02)
    # VAMP-2 of the features is the sum of squared canonical correlations.
    side = [m.gram[0] for m in found.moments]
    score = s.vamp_score(side[0], side[1], found.moments[0].cross[0])
    np.testing.assert_allclose(score, np.sum(found.singular_values**2), rtol=1e-4)
    np.testing.assert_allclose(found(x[:100], side=1).shape, (100, 4))


def test_pairs():
    x, y = ops.lagged_pairs([np.arange(5), np.arange(10, 13)], 2)
    np.testing.assert_array_equal(x, [0, 1, 2, 10])
    np.testing.assert_array_equal(y, [2, 3, 4, 12])


def rows(a):
    a = jnp.asarray(a)
    return lambda i: a[i]


def test_rectangular_matrix():
    k = np.asarray(normal(9, 6, seed=3))
    left, right = rows(normal(9, 9, seed=4)), rows(normal(6, 9, seed=5))
    found = galerkin(ops.RectangularMatrix(k, everything=True), [left, right], 1, 1)
    np.testing.assert_allclose(
        found.singular_values[:6], np.linalg.svd(k, compute_uv=False), rtol=1e-3
    )
    found = galerkin(
        ops.RectangularMatrix(k), [lambda i: left(i)[:3], lambda i: right(i)[:3]], 20_000
    )
    exact = galerkin(
        ops.RectangularMatrix(lambda g: k @ g, lambda f: k.T @ f, (9, 6), everything=True),
        [lambda i: left(i)[:3], lambda i: right(i)[:3]],
        1,
        1,
    )
    np.testing.assert_allclose(found.singular_values, exact.singular_values, rtol=0.05)


@pytest.mark.parametrize("everything", [True, False])
def test_graph_laplacian(everything):
    rng = np.random.default_rng(1)
    edges = np.array([(i, (i + 1) % 7) for i in range(7)] + [(0, 3), (2, 5)])
    weights = rng.uniform(0.5, 2, len(edges))
    operator = ops.GraphLaplacian(edges, weights, shift=0.0, everything=everything)
    w = np.zeros((7, 7))
    w[tuple(edges.T)] = weights
    w += w.T
    laplacian = np.eye(7) - w / w.sum(1, keepdims=True)
    dense = np.sort(-np.linalg.eigvals(laplacian).real)[::-1]
    np.testing.assert_allclose(operator.truth(7), dense, atol=1e-6)
    found = galerkin(operator, rows(np.eye(7)), 20_000)
    np.testing.assert_allclose(found.eigenvalues, dense, atol=2e-5 if everything else 0.03)


def test_kernel_integral():
    data = np.asarray(normal(400, 2))
    kernel = lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2))
    found = galerkin(ops.KernelIntegral(kernel, data), polynomials, 400, 10)
    gram = np.exp(-((data[:, None] - data[None]) ** 2).sum(-1)) / 399
    np.fill_diagonal(gram, 0)  # no point is paired with itself
    basis = np.asarray(jax.vmap(polynomials)(data))
    q = np.linalg.qr(basis)[0]
    dense = np.sort(np.linalg.eigvalsh(q.T @ gram @ q))[::-1]
    np.testing.assert_allclose(found.eigenvalues, dense, atol=0.01 * dense[0])


def polynomials(x):
    return jnp.stack([jnp.ones(()), x[0], x[1], x[0] * x[1]])


def test_neural_tangent_kernel_is_the_kernel_it_stands_for():
    net = nn.Dense(3)
    params = net.init(jax.random.key(0), jnp.ones(2))
    model = lambda p, x: jnp.tanh(net.apply(p, x))
    data = normal(20, 2)
    kernel = lambda x, y: sum(
        jnp.sum(a * b)
        for a, b in zip(
            *(jax.tree.leaves(jax.jacobian(model)(params, z)) for z in (x, y)), strict=True
        )
    )
    tangent = ops.NeuralTangentKernel(data=data, model=model, params=params)
    batch = tangent.sample(jax.random.key(0), 12)
    for got, want in zip(
        tangent.apply(polynomials, batch),
        ops.KernelIntegral(kernel, data).apply(polynomials, batch),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_matrix_by_matvec_is_the_array():
    a = np.asarray(normal(5, 5))
    a = a + a.T
    by = [ops.Matrix(a), ops.Matrix(lambda f: a @ f, 5)]
    batch = jnp.array([3, 1, 1])
    one, two = (o.apply(rows(normal(5, 2, seed=2)), batch) for o in by)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ops.Matrix(np.ones((2, 3))), "symmetric"),
        (lambda: ops.Matrix(np.triu(np.ones((3, 3)))), "symmetric"),
        (lambda: ops.Matrix(lambda f: f), "size"),
        (lambda: ops.RectangularMatrix(lambda f: f), "transpose"),
        (lambda: ops.Hydrogen(0.0), "charge"),
        (lambda: ops.Hydrogen().energies(3, 1), "dimension"),
        (lambda: ops.Box(0, 1.0), "dimension"),
        (lambda: ops.MultiScale(1, ()), "scales"),
        (lambda: ops.MultiScale(2, (1.0,), center=(1.0,)), "center"),
        (lambda: ops.geometric(1, 2.0, 1.0), "smallest"),
        (lambda: ops.Schrodinger(ops.Harmonic(), ops.Box(1, 1.0), scale=0.0), "scale"),
        (lambda: ops.Schrodinger(ops.DoubleWell(), ops.Box(1, 1.0)).truth(2), "closed form"),
        (lambda: ops.Langevin(ops.DoubleWell(), ops.Box(2, 1.0)).truth(2), "one dimension"),
        (lambda: ops.Koopman(np.ones((3, 1)), np.ones((2, 1))), "rows"),
        (lambda: ops.Koopman(np.full((3, 1), np.nan), np.ones((3, 1))), "finite"),
        (lambda: ops.GraphLaplacian(np.ones((3, 3), int)), r"\(E, 2\)"),
        (lambda: ops.GraphLaplacian([[0, 1]], [-1.0]), "positive"),
        (lambda: ops.lagged_pairs(np.arange(3), 5), "lag"),
        (lambda: ops.timescales([0.5], 0), "lag"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_proposals_end_at_walls_that_are_far_above_the_energy():
    """Density, points and functions of a Morse potential, whose one wall is steeper than any."""
    morse = lambda x: 16 * jnp.square(1 - jnp.exp(-x[0]))
    points = ops.classical(morse, 1, energy=16.0)
    (end,) = points.low
    assert points.high is None and 16 + 64 * 16 < morse(jnp.array([end])) < 2000
    assert ops.classical(ops.Harmonic(), 2, 16.0).low is None  # beyond the reach of its scales
    x = np.linspace(end, 200, 8001, dtype=np.float32)[:, None]
    state = points.init()
    density = np.exp(np.asarray(jax.jit(jax.vmap(lambda x: points.log_density(x, state)))(x)))
    np.testing.assert_allclose(np.trapezoid(density, x[:, 0]), 1, rtol=1e-4)
    drawn = np.asarray(points.draw(jax.random.key(0), 20000, state))[:, 0]
    assert drawn.min() >= end
    near = np.trapezoid(np.where(x[:, 0] < 1, density, 0), x[:, 0])
    np.testing.assert_allclose(np.mean(drawn < 1), near, atol=0.015)
    at = lambda x: float(points.boundary(jnp.array([x])))
    assert at(end) == at(end - 1) == 0 and at(end + 10) == pytest.approx(1)
    with pytest.raises(ValueError, match="low"):
        ops.MultiScale(1, (1.0,), low=(1.0,))
