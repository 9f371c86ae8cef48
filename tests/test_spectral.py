"""Cotangents against autodiff, and every method on problems whose spectrum is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import spectral as s
from lowrank_optax.spectral import operators as ops

HALVES, PAIRED, WHOLE = s.Halves(), s.UStatistic(), s.WholeBatch()


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def cotangent(method, *pairs):
    """The gradient of the surrogate in the outputs."""

    def loss(fs):
        images = [tf for _, tf in pairs]
        return s.surrogate(method, tuple(zip(fs, images, strict=True)), method.init(3))[0]

    return jax.grad(loss)(tuple(f for f, _ in pairs))


@pytest.fixture
def exact():
    with jax.enable_x64(True):
        yield


def problem(n=12, modes=3):
    """A symmetric T of mean n over a whole batch of n points, and functions on it."""
    a = np.asarray(normal(n, n), np.float64)
    return jnp.asarray(a @ a.T / n), jnp.asarray(np.asarray(normal(n, modes, seed=1), np.float64))


def inner(f, h):
    return jnp.sum(f * h) / len(f)


def stopped(loss):
    """Sum over modes of a loss of ``(f_m, earlier f with their gradient stopped)``."""

    def whole(f):
        earlier = jax.lax.stop_gradient(f)
        return sum(loss(f[:, m], earlier[:, :m]) for m in range(f.shape[1]))

    return whole


def lora(t):
    def loss(f, earlier):
        pull = -2 * inner(f, t @ f) + inner(f, f) ** 2
        return pull + 2 * sum(inner(f, e) ** 2 for e in earlier.T)

    return stopped(loss)


def joint(t, weights=(0.5, 1.0, 0.25)):
    def loss(f):
        total = 0.0
        for many, w in enumerate(weights, 1):
            p = f[:, :many]
            gram = p.T @ p / len(p)
            total += w * (jnp.sum(gram**2) - 2 * jnp.trace(p.T @ t @ p) / len(p))
        return total

    return loss


def orbital(t):
    def loss(f, earlier):
        own = -2 * inner(f, t @ f) + inner(f, f) * inner(f, t @ f)
        return own + 2 * sum(inner(f, e) * inner(f, t @ e) for e in earlier.T)

    return stopped(loss)


def neural_ef(penalty):
    def whole(t):
        def loss(f, earlier):
            f = f / jnp.sqrt(inner(f, f))
            e = earlier / jnp.sqrt(jnp.mean(earlier**2, 0))
            return -inner(f, t @ f) + sum(penalty(t, f, x) for x in e.T)

        return stopped(loss)

    return whole


def alpha(t, f, e):
    return inner(e, t @ f) ** 2 / inner(e, t @ e)


def mu(t, f, e):
    return 2 * jax.lax.stop_gradient(inner(e, t @ f)) * inner(e, f)


def trace(t):
    def loss(f):
        gram = f.T @ f / len(f)
        return -jnp.trace(jnp.linalg.solve(gram, f.T @ t @ f / len(f)))

    return loss


def relative(t):
    def loss(f):
        whiten = jnp.linalg.inv(jnp.linalg.cholesky(f.T @ f))
        lam = jnp.linalg.eigvalsh(whiten @ f.T @ t @ f @ whiten.T)
        return -jnp.sum(jnp.arcsinh(lam / (0.2 * jax.lax.stop_gradient(lam[-1]))))

    return loss


def vamp(t):
    def loss(f):
        c = jnp.linalg.solve(f.T @ f, f.T @ t @ f)
        return -jnp.trace(c @ c)

    return loss


def penalised(t):
    def loss(f):
        gram = f.T @ f / len(f)
        off = gram - jnp.eye(len(gram))
        return -jnp.trace(f.T @ t @ f) / len(f) + 0.35 * jnp.sum(off**2)

    return loss


def dp(t):
    def loss(f):
        gram, cross = f.T @ f / len(f), f.T @ t @ f / len(f)
        held = jnp.trace(gram @ gram - gram) - jnp.linalg.slogdet(gram)[1]
        return held - jnp.sum(cross**2) / jnp.linalg.norm(gram, 2) ** 2

    return loss


LOSSES = {
    "sequential": (s.NestedLoRA(moments=WHOLE), lora),
    "joint": (s.NestedLoRA(s.JointNesting((0.5, 1.0, 0.25)), WHOLE), joint),
    "orbital": (s.OrbitalMinimization(moments=WHOLE), orbital),
    "alpha": (s.NeuralEF(), neural_ef(alpha)),
    "mu": (s.NeuralEF(s.MuPenalty()), neural_ef(mu)),
    "eigenmaps": (
        s.NeuralEF(s.SquaredPenalty(0.7)),
        neural_ef(lambda t, f, e: 0.7 * inner(e, t @ f) ** 2),
    ),
    "energy": (s.VariationalEnergy(), trace),
    "floor": (s.VariationalEnergy(0.2), relative),
    "vamp": (s.VAMP2(), vamp),
    "penalty": (s.TracePenalty(0.7, moments=WHOLE), penalised),
    "dpnet": (s.DPNet(), dp),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cotangent_is_the_gradient_of_the_methods_losses(exact, name):
    method, loss = LOSSES[name]
    t, f = problem()
    (got,) = jax.jit(lambda f: cotangent(method, (f, t @ f)))(f)
    np.testing.assert_allclose(got, jax.jit(jax.grad(loss(t)))(f), rtol=1e-6, atol=1e-9)


def test_two_sided_cotangents_are_the_gradients_of_the_printed_loss(exact):
    k, f = np.asarray(normal(12, 12), np.float64), problem()[1]
    g = f[::-1] ** 2

    def printed(f, g):
        n = len(f)
        return jnp.sum((f.T @ f) * (g.T @ g)) / n**2 - 2 * jnp.sum(f * (k @ g)) / n

    def whitened(f, g):
        left, right, between = f.T @ f, g.T @ g, f.T @ k @ g
        return -jnp.trace(jnp.linalg.solve(left, between) @ jnp.linalg.solve(right, between.T))

    for method, loss in (
        (s.NestedLoRA(s.Unnested(), WHOLE), printed),
        (s.VAMP2(), whitened),
    ):
        got = cotangent(method, (f, k @ g), (g, k.T @ f))
        for a, b in zip(got, jax.grad(loss, (0, 1))(f, g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_halves_are_the_formula(exact):
    t, f = problem()
    (got,) = cotangent(s.NestedLoRA(moments=HALVES), (f, t @ f))
    one, two = f[:6], f[6:]
    mask = np.triu(np.ones((3, 3)))
    moment = lambda h: mask * (h.T @ h / 6)
    want = -4 / 12 * t @ f + np.concatenate([2 / 6 * one @ moment(two), 2 / 6 * two @ moment(one)])
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "biased"),
    [
        (s.NestedLoRA(moments=HALVES), s.NestedLoRA(moments=WHOLE)),
        (s.NestedLoRA(moments=PAIRED), s.NestedLoRA(moments=WHOLE)),
        (s.OrbitalMinimization(moments=PAIRED), s.OrbitalMinimization(moments=WHOLE)),
        (s.ALLO(moments=HALVES), s.ALLO(moments=WHOLE)),
    ],
    ids=["lora halves", "lora pairs", "orbital", "allo"],
)
def test_small_batches_are_unbiased(exact, method, biased):
    """The mean over many batches of 4 of 12 points, as functions of the points, is the whole's."""
    t, f = problem()
    rows = jax.random.randint(jax.random.key(3), (60_000, 4), 0, 12)

    def mean(method):
        memory = method.init(3)
        one = lambda i: (
            jnp.zeros_like(f).at[i].add(method.cotangents(((f[i], (t @ f)[i]),), memory)[0][0])
        )
        each = jax.vmap(one)(rows)
        return each.mean(0), each.std(0) / len(rows) ** 0.5

    whole = dataclasses.replace(method, moments=WHOLE)
    want = whole.cotangents(((f, t @ f),), tuple(method.init(3)) and method.init(3))[0][0]
    got, error = mean(method)
    assert np.abs((got - want) / error).max() < 5  # 36 entries: beyond 5 once in 5e4
    off, error = mean(biased)
    assert np.abs((off - want) / error).max() > 20


def test_determinant_trick_is_the_energys_gradient_on_average(exact):
    t, f = problem(modes=2)
    want = cotangent(s.VariationalEnergy(), (f, t @ f))[0]
    method = s.ExcitedStates()
    # All ordered pairs of points: the batch of pairs is then the whole product measure.
    i, j = (a.ravel() for a in np.meshgrid(np.arange(12), np.arange(12)))
    rows = np.stack([i, j], 1).ravel()
    ((each,), _) = jax.jit(method.cotangents)(((f[rows], (t @ f)[rows]),), ())
    got = jnp.zeros_like(f).at[rows].add(each)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


def test_cotangents_leave_images_and_memory_alone():
    f, tf = normal(6, 3), normal(6, 3, seed=1)
    method = s.ALLO()
    g = jax.grad(lambda tf, m: s.surrogate(method, ((f, tf),), m)[0], (0, 1))(tf, method.init(3))
    assert all(not np.any(x) for x in jax.tree.leaves(g))


def test_masks():
    v, m = s.JointNesting().masks(3)
    np.testing.assert_allclose(v, [1, 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(m, np.minimum(v[:, None], v), rtol=1e-6)
    np.testing.assert_array_equal(s.SequentialNesting().masks(2)[1], [[1, 1], [0, 1]])
    np.testing.assert_array_equal(s.Unnested().masks(2)[1], np.ones((2, 2)))


# What each method promises: modes in order and orthogonal, or a span; norms it ends at.
SQRT, ONE, FREE = "sqrt", "one", "free"
METHODS = {
    "lora sequential": (s.NestedLoRA(), True, SQRT),
    "lora joint": (s.NestedLoRA(s.JointNesting()), True, SQRT),
    "lora pairs": (s.NestedLoRA(moments=PAIRED), True, SQRT),
    "lora unnested": (s.NestedLoRA(s.Unnested()), False, FREE),
    "orbital sequential": (s.OrbitalMinimization(), True, ONE),
    "orbital": (s.OrbitalMinimization(s.Unnested()), False, ONE),
    "trace penalty": (s.TracePenalty(5.0), False, FREE),
    "graph drawing": (s.TracePenalty(5.0, s.JointNesting()), True, FREE),
    "allo": (s.ALLO(barrier=5.0, rate=0.05), True, ONE),
    "spin": (s.SpIN(), False, FREE),
    "neuralef": (s.NeuralEF(), True, FREE),
    "mu-eigengame": (s.NeuralEF(s.MuPenalty()), True, FREE),
    "eigenmaps": (s.NeuralEF(s.SquaredPenalty(1.0)), True, FREE),
    "vamp2": (s.VAMP2(), False, FREE),
    "dpnet": (s.DPNet(penalty=5.0), False, FREE),
    "energy": (s.VariationalEnergy(), False, FREE),
    "energy, floor": (s.VariationalEnergy(0.01), False, FREE),
    "excited states": (s.ExcitedStates(), False, FREE),
    "spectralnet": (s.SpectralNet(), False, FREE),
    "oja": (s.Oja(), False, ONE),
    "sanger": (s.Oja(s.SequentialNesting()), True, ONE),
    "krasulina": (s.Krasulina(), False, FREE),
    "noisy power": (s.NoisyPower(), True, ONE),
    "low-rank product": (s.LowRankProduct(), False, FREE),
}


STEPS = 1500
RATES = {"dpnet": 0.1}
"""Adam's, where a flat score asks for longer steps."""
SPECTRUM = (3.0, 2.0, 1.2, 0.5, 0.4, 0.3, 0.2, 0.1)
CLUSTERED = (-0.001, -0.002, -0.003, -1.0, -1.1, -1.2, -1.3, -1.4)
"""For SpectralNet, whose norms nothing holds: its limit is asserted on the oscillator."""


def matrix(lam):
    q, _ = np.linalg.qr(np.asarray(normal(len(lam), len(lam), seed=5)))
    return (q * lam) @ q.T, np.array(lam), q


def cosine(steps, rate):
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def check_modes(found, truth, tolerance, ordered, norms):
    """Span by Rayleigh-Ritz; order, orthogonality and norms where the method promises them."""
    np.testing.assert_allclose(found.eigenvalues, truth, rtol=tolerance)
    outputs = found.moments[0].gram.mean(0)
    if ordered:
        np.testing.assert_allclose(found.raw().eigenvalues, truth, rtol=2 * tolerance)
        # Before any rotation, too: output l is mode l.
        raw = np.diagonal(found.moments[0].cross.mean(0)) / np.diagonal(outputs)
        np.testing.assert_allclose(raw, truth, rtol=2 * tolerance)
        assert np.abs(found.raw().gram - np.eye(len(truth))).max() < 5 * tolerance**0.5
    if norms == SQRT:
        # In units of the first: `fit` shows methods an operator whose largest eigenvalue is 1.
        sizes = np.diagonal(outputs) / outputs[0, 0]
        np.testing.assert_allclose(sizes, truth / truth[0], rtol=5 * tolerance)
    if norms == ONE:
        np.testing.assert_allclose(np.diagonal(outputs), 1, rtol=5 * tolerance)


def trained(names, methods, optimizers, sample, start, steps):
    """Weights of every method on the same batches ``h, T h`` of the functions they combine."""

    def step(carry, key):
        h, th = sample(key)
        for name in names:
            w, memory, state = carry[name]
            pair = h @ w, th @ w
            value = lambda f, pair=pair, memory=memory, name=name: s.surrogate(
                methods[name], ((f, pair[1]),), memory
            )
            g, memory = jax.grad(value, has_aux=True)(pair[0])
            updates, state = optimizers[name].update(h.T @ g, state)
            carry = carry | {name: (optax.apply_updates(w, updates), memory, state)}
        return carry, None

    @jax.jit
    def run():
        begin = {n: (start, methods[n].init(3), optimizers[n].init(start)) for n in names}
        begin = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), begin)
        return jax.lax.scan(step, begin, jax.random.split(jax.random.key(0), steps))[0]

    return {name: carry[0] for name, carry in run().items()}


def read(operator, h, th, w):
    """A decomposition by weights ``w`` of functions ``h``, ``(n, B, K)`` in ``n`` batches."""
    f, tf = np.asarray(h) @ w, np.asarray(th) @ w
    moments = s.methods.SideMoments.of
    stacked = jax.tree.map(lambda *each: np.stack(each), *map(moments, f, tf))
    return s.Decomposition.of(operator, (), (), (stacked,))


WHOLE_METHODS = {
    name: dataclasses.replace(method, moments=WHOLE) if hasattr(method, "moments") else method
    for name, (method, _, _) in METHODS.items()
    if name not in ("excited states", "lora pairs")
}


@pytest.fixture(scope="module")
def on_a_matrix():
    """Tables of values at all points: no sampling, only the methods."""
    found = {}
    for lam, names in (
        (SPECTRUM, WHOLE_METHODS.keys() - {"spectralnet"}),
        (CLUSTERED, {"spectralnet"}),
    ):
        a, _, q = matrix(lam)
        a, eye = jnp.asarray(a), jnp.eye(8)
        rates = {n: cosine(STEPS, RATES.get(n, 0.03)) for n in names} | {
            "spectralnet": optax.sgd(8e-3)
        }
        # SpectralNet comes from nearby: it collapses on the way from anywhere.
        start = q[:, :3] + 0.3 * normal(8, 3) if lam is CLUSTERED else 0.5 * normal(8, 3)
        weights = trained(
            sorted(names), WHOLE_METHODS, rates, lambda key, a=a, eye=eye: (eye, a), start, STEPS
        )
        operator = ops.Matrix(a, everything=True)
        found |= {n: read(operator, eye[None], a[None], w) for n, w in weights.items()}
        found |= {f"{n} table": w for n, w in weights.items()}
    return found


@pytest.mark.parametrize("name", WHOLE_METHODS)
def test_every_method_on_a_matrix(name, on_a_matrix):
    _, ordered, norms = METHODS[name]
    _, lam, q = matrix(CLUSTERED if name == "spectralnet" else SPECTRUM)
    check_modes(on_a_matrix[name], lam[:3], 2e-3, ordered, norms)
    ritz = np.asarray(on_a_matrix[f"{name} table"]) @ on_a_matrix[name].rotation[0]
    assert s.subspace_distance(ritz, q[:, :3]) < 1e-3
    assert s.angles(ritz, q[:, :3]).max() < 0.05


def hermite(x):
    """The first five modes over the square root of a normal density, up to one factor."""
    rows = [jnp.ones_like(x), 2**0.5 * x]
    for n in range(2, 5):
        rows.append((2 / n) ** 0.5 * x * rows[-1] - ((n - 1) / n) ** 0.5 * rows[-2])
    return jnp.stack(rows) * jnp.exp(-(x**2) / 4)


MIXED = np.linalg.qr(np.asarray(normal(5, 5, seed=8)))[0]
OSCILLATOR = ops.Schrodinger(ops.Harmonic(), ops.gaussian(1, 1.0), shift=10.0)


def mixed(x):
    """Five functions that span the oscillator's first five modes exactly."""
    return hermite(x[0]) @ MIXED


@pytest.fixture(scope="module")
def on_the_oscillator():
    def sample(key, size=256):
        return OSCILLATOR.apply(mixed, OSCILLATOR.sample(key, size, OSCILLATOR.init()))

    methods = {name: method for name, (method, _, _) in METHODS.items()}
    rates = {name: cosine(800, RATES.get(name, 0.03)) for name in METHODS}
    weights = trained(sorted(METHODS), methods, rates, sample, 0.5 * normal(5, 3), 800)
    batches = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(1), 40))
    return {name: read(OSCILLATOR, *batches, w) for name, w in weights.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_the_oscillator(name, on_the_oscillator):
    """Sampled batches and a differential operator, against the closed form 10 - (1, 3, 5)."""
    _, ordered, norms = METHODS[name]
    found, truth = on_the_oscillator[name], OSCILLATOR.truth(3)
    np.testing.assert_allclose(truth, [9, 7, 5])
    if name == "spectralnet":  # on its way when its growing norms stop it
        error = s.relative_error(found.eigenvalues, truth)
        assert 0.01 < error.max() < 0.1
        return
    check_modes(found, truth, 0.02, ordered, norms)
    np.testing.assert_allclose(OSCILLATOR.energies(found.eigenvalues), [1, 3, 5], atol=0.15)


def test_a_fit_on_the_oscillator():
    """The same by `fit`, whose averages and batches are its own."""
    network = (lambda key, x: 0.5 * jax.random.normal(key, (5, 3)), lambda w, x: mixed(x) @ w)
    found = s.fit(
        OSCILLATOR,
        network,
        method=s.NestedLoRA(),
        optimizer=cosine(800, 0.03),
        steps=800,
        batch_size=256,
        evaluate_every=800,
        evaluate_batches=40,
    )
    check_modes(found, OSCILLATOR.truth(3), 0.02, True, SQRT)


def test_residuals_of_energies_vanish_on_exact_modes(exact):
    """Whatever the batch, so that there the cotangent has no noise; and floors scale with T."""
    f = problem()[1]
    for method in (s.VariationalEnergy(), s.VariationalEnergy(0.01)):
        (g,) = cotangent(method, (f, f @ jnp.diag(jnp.array([3.0, 1.0, 0.02]))))
        np.testing.assert_allclose(g, 0, atol=1e-12)
    t, f = problem()
    one, many = (cotangent(s.VariationalEnergy(0.01), (f, c * t @ f))[0] for c in (1.0, 1e6))
    np.testing.assert_allclose(one, many, rtol=1e-9, atol=1e-12)
