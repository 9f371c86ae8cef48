"""Figures that cannot mislead: held-out data, shifts and units, refusals, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import spectral as s
from lowrank_optax.spectral import _choices as choices
from lowrank_optax.spectral import _training as training
from lowrank_optax.spectral import operators as ops

LINE = ops.gaussian(1, 1.0)
SMOOTH = s.Network(
    lambda key, x: jax.random.normal(key, (3, 12)),
    lambda w, x: (
        w @ jnp.concatenate([jnp.cos(x[0] * jnp.arange(6.0)), jnp.sin(x[0] + jnp.arange(6.0))])
    ),
)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: ops.Koopman(x, x),
        lambda x: ops.CanonicalDependence(x, x),
        lambda x: ops.KernelIntegral(lambda a, b: a @ b, x),
        lambda x: ops.NeuralTangentKernel(model=lambda w, x: w @ x, params=jnp.ones(1), data=x),
        lambda x: ops.GraphLaplacian(np.stack([x, x], 1)),
    ],
)
def test_what_is_read_was_never_learned_from(make):
    x = np.arange(200.0, dtype=np.float32)[:, None]
    operator = make(x)
    learned, batches = operator.held_out()
    whole = set(range(200))
    drawn = learned.sample(jax.random.key(0), 4000, learned.init())
    seen = {int(v) for leaf in jax.tree.leaves(drawn) for v in np.ravel(leaf)}
    held = {int(v) for v in np.ravel(jax.tree.leaves(batches)[0])}
    assert not seen & held and len(held) == 40
    if not isinstance(operator, ops.GraphLaplacian):
        assert seen | held == whole
    again, _ = learned.held_out()  # nothing is held out twice
    assert isinstance(operator, ops.GraphLaplacian | ops.NeuralTangentKernel) or again is learned


def test_trajectories_are_held_out_whole():
    many = [np.full((10 + i, 1), i, np.float32) for i in range(10)]
    operator = ops.Koopman.from_trajectories(many, 2)
    learned, batches = operator.held_out()
    held = set(np.ravel(batches[0]).astype(int))
    assert len(held) == 2 and not held & set(np.ravel(learned.x).astype(int))
    assert len(operator.x) == sum(8 + i for i in range(10))
    few, batches = ops.Koopman(np.ones((8, 1)), np.ones((8, 1))).held_out()
    assert len(few.x) == 8 and np.ravel(batches[0]).size == 8
    with pytest.raises(ValueError, match="trajectory"):
        ops.Koopman(np.ones((8, 1)), np.ones((8, 1)), groups=np.arange(3))
    with pytest.raises(ValueError, match="held_out_part"):
        ops.Koopman(np.ones((8, 1)), np.ones((8, 1)), held_out_part=1.0)


def test_data_learned_by_heart_are_told():
    """A table of 60 states that never come again: 1 on what was learned, 0 on what was not."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200, 1)).astype(np.float32)
    operator = ops.CanonicalDependence(x, y)
    waves = np.asarray(30 * rng.normal(size=40), np.float32)
    network = (
        lambda key, x: jnp.zeros((2, 80)) + 0.1 * jax.random.normal(key, (2, 80)),
        lambda w, x: w @ jnp.concatenate([jnp.sin(x[0] * waves), jnp.cos(x[0] * waves)]),
    )
    found = s.fit(operator, network, optimizer=optax.adam(0.02), steps=600, batch_size=200)
    assert found.seen is not None and found.eigenvalues[0] == pytest.approx(1)
    assert (np.abs(found.eigenvalues[1:]) < 3 * found.errors[1:]).all()
    assert not found.converged[1:].any()
    scores = [r["score"] for r in found.history]
    assert found.step == found.history[int(np.argmax(scores))]["step"]
    np.testing.assert_allclose(found.score, max(scores), rtol=1e-5)


def test_scores_are_what_a_model_of_low_rank_explains():
    """Against the norms of matrices, with moments of the same and of another measure."""
    rng = np.random.default_rng(0)
    t, f = rng.normal(size=(6, 6)), rng.normal(size=(6, 2))
    t = t + t.T
    tf = t @ f
    seen = s.SideMoments(*(x[None] / 6 for x in (f.T @ f, f.T @ tf, tf.T @ tf)))
    found = s.Decomposition.of(ops.Matrix(t), (), (), (seen,), (seen,))
    modes = f @ found.rotation[0] / 6**0.5
    rest = t - (modes * found.eigenvalues) @ modes.T
    np.testing.assert_allclose(found.score, np.sum(t**2) - np.sum(rest**2), rtol=1e-9)
    np.testing.assert_allclose(found.fitted_eigenvalues, found.eigenvalues)


@pytest.mark.parametrize("shift", [0.0, 12.0])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_neither_shift_nor_unit_decides(shift, unit):
    """A matrix with or without positive eigenvalues in any unit; one program for all of them."""
    lam = unit * (np.array([-1.0, -2.0, -4.0, -7.0, -9.0, -10.0]) + shift)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    operator = ops.Matrix(jnp.asarray((q * lam) @ q.T, jnp.float32))
    found = s.fit(operator, 3, steps=400)
    np.testing.assert_allclose(found.eigenvalues, lam[:3], rtol=1e-3)
    assert found.converged.all() and "NestedLoRA" in found.method


def test_shifts_lift_the_smallest_mode_above_zero():
    at = lambda low, high: [
        float(x) for x in training.shift_and_unit(training.Gauge(jnp.array(low), jnp.array(high)))
    ]
    assert at(0.5, 4.0) == [0.0, 4.0]
    for low, high in ((-4.0, -2.0), (-2.0, -2.0), (-3.0, 0.0), (-4e4, -2e4)):
        shift, unit = at(low, high)
        assert low + shift > 0 and unit == pytest.approx(high + shift)
    assert at(0.0, 0.0)[1] == 1.0


def test_few_bound_states_are_told_from_free_ones():
    well = ops.Schrodinger(lambda x: -6.0 * jnp.exp(-jnp.sum(x**2)), ops.geometric(1, 0.5, 4.0))
    assert well.least == pytest.approx(0.0, abs=1e-6)
    assert ops.Schrodinger(ops.Harmonic(), LINE).least < -50
    assert (
        ops.Schrodinger(ops.InfiniteWell(), ops.Box(1, 1.0), mask=ops.RootMask(1.0)).least
        == -np.inf
    )


TRACES = []


def counted(w, x):
    TRACES.append(x)
    return w @ jnp.concatenate([x, x**2])


def test_the_same_fit_on_other_data_compiles_nothing():
    network = s.Network(lambda key, x: jax.random.normal(key, (2, 4)), counted)
    rng = np.random.default_rng(0)
    kernel = lambda a, b: jnp.exp(-jnp.sum((a - b) ** 2))
    options = {"steps": 20, "batch_size": 16, "evaluate_every": 8}
    make = lambda: s.fit(ops.KernelIntegral(kernel, rng.normal(size=(50, 2))), network, **options)
    one = make()
    traced = len(TRACES)
    two = make()
    s.fit(two.operator, network, **options, optimizer=None, seed=3)
    assert len(TRACES) == traced and not np.array_equal(one.eigenvalues, two.eigenvalues)
    one(np.ones((5, 2)))
    traced = len(TRACES)
    np.testing.assert_allclose(one(np.ones((7, 2)))[0], one(np.ones((8, 2)))[-1])
    one.raw()(np.ones((6, 2)))
    assert len(TRACES) == traced


def test_equal_parts_are_recognised_and_no_others():
    from lowrank_optax.spectral._fingerprint import identity

    same = lambda a, b: identity(a) == identity(b)
    assert same(optax.adam(1e-3), optax.adam(1e-3)) and same(s.NestedLoRA(), s.NestedLoRA())
    assert not same(optax.adam(1e-3), optax.sgd(1e-3))
    assert not same(optax.adam(1e-3), optax.adam(2e-3))
    assert same(choices._optimizer(0.1, None, True), choices._optimizer(0.1, None, True))
    make = lambda c: lambda x: c * x
    one = make(1)
    assert same(one, one) and not same(one, make(1))  # it may read what is defined elsewhere
    assert not same(s.networks.MLP(2, (4,)), s.networks.MLP(2, (5,)))


def test_rounds_have_a_cosine_each():
    rate = choices._rounds(1.0)
    first = choices.FIRST
    for k in range(3):
        start = first * (2**k - 1)
        assert float(rate(jnp.array(start))) == pytest.approx(1.0, abs=1e-3)
        assert float(rate(jnp.array(start + first * 2**k // 2))) == pytest.approx(0.5, abs=0.01)
        assert float(rate(jnp.array(start + first * 2**k - 1))) < 1e-3


def test_the_default_stops_when_nothing_changes_and_says_so():
    found = s.fit(ops.Matrix(np.diag([3.0, 2, 1, 0.5]).astype(np.float32)), np.int64(2))
    np.testing.assert_allclose(found.eigenvalues, [3, 2], rtol=1e-4)
    assert "no eigenvalue has changed" in found.message and found.step == 1500


def product(scale):
    return lambda g: scale * g


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ops.Schrodinger(lambda x: x**2, ops.gaussian(2, 1.0)), "gives a scalar"),
        (lambda: ops.Langevin(lambda x: x**2, ops.gaussian(2, 1.0)), "gives a scalar"),
        (lambda: ops.Schrodinger(lambda x: jnp.sum(jnp.sqrt(x)), LINE), "Schrodinger: .*NaN"),
        (lambda: ops.Schrodinger(ops.Harmonic, LINE), "function of one point"),
        (lambda: ops.Schrodinger(ops.Harmonic(), 1.0), "pass a Proposal"),
        (lambda: ops.Matrix(lambda g: jnp.roll(g, 1, 0), size=5), "symmetric product"),
        (lambda: ops.Matrix(lambda g: g[0], size=5), "shapes"),
        (lambda: ops.RectangularMatrix(product(1.0), product(2.0), (4, 4)), "transpose of"),
        (lambda: ops.KernelIntegral(lambda x, y: x[0] - y[0], np.eye(4)), "not symmetric"),
        (lambda: ops.KernelIntegral(lambda x, y: x * y, np.eye(4)), "a scalar"),
        (lambda: ops.KernelIntegral(lambda x, y: 1 / (x @ y - x @ y), np.eye(4)), "not finite"),
        (lambda: s.fit(np.eye(3), 2), r"array of shape \(3, 3\); pass an operator"),
        (lambda: s.fit(ops.Matrix, 2), "the class Matrix"),
        (lambda: s.fit("hydrogen", 2), "pass an operator"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), 2, method="sequential"), "NestedLoRA"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), 2, method=s.NestedLoRA), "the class NestedLoRA"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), 2, optimizer=0.1), "optax.adam"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), 2, optimizer=optax.lbfgs()), "more than gradients"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), True), "number of modes"),
        (lambda: s.fit(ops.Matrix(np.eye(3)), 2.0), "number of modes"),
        (lambda: s.fit(ops.Schrodinger(ops.Harmonic(), LINE), SMOOTH, method=s.VAMP2()), "lowest"),
        (lambda: s.fit(ops.Schrodinger(ops.Harmonic(), LINE), SMOOTH, method=s.DPNet()), "lowest"),
        (
            lambda: s.fit(
                ops.Schrodinger(ops.Harmonic(), ops.gaussian(2, 1.0)),
                s.networks.MLP(2, (8,), jax.nn.relu),
            ),
            "kinks",
        ),
        (
            lambda: s.fit(
                ops.Koopman(np.ones((4, 1)), np.ones((4, 1))),
                (lambda key, x: (), lambda p, x: jnp.ones((2, 1))),
            ),
            r"shape \(2, 1\)",
        ),
    ],
)
def test_what_is_no_operator_or_no_part_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_sides_that_are_not_there_are_refused():
    moments = s.SideMoments(*(np.eye(2)[None],) * 3)
    found = s.Decomposition.of(ops.Matrix(np.eye(2)), (), (), (moments,))
    for call in (lambda: found(np.arange(2), side=1), lambda: found.function(1)):
        with pytest.raises(ValueError, match=r"has \[0\]"):
            call()


def test_graphs_given_whole_are_exact():
    """Nodes with all of their edges: the walk of the dense solver."""
    graph = ops.GraphLaplacian([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]], [1.0, 2, 1, 3, 1])
    found = s.fit(graph, 3, steps=600)
    np.testing.assert_allclose(found.eigenvalues[0], graph.truth(3)[0], rtol=1e-4)
    f, tf = found.operator.apply(
        lambda i: jnp.eye(4)[i], found.operator.sample(jax.random.key(0), 0)
    )
    np.testing.assert_allclose(
        np.linalg.eigvals(np.linalg.solve(f.T @ f, f.T @ tf)).real.max(), 1, rtol=1e-5
    )
    walk = np.sort(np.linalg.eigvals(np.linalg.solve(f.T @ f, f.T @ tf)).real)[::-1]
    np.testing.assert_allclose(walk, graph.truth(4), atol=1e-5)
