"""The online operator against dense algebra, autodiff, finite differences and closed forms."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import Traced
from jax.flatten_util import ravel_pytree

import lowrank_optax as lro
from lowrank_optax import online

RNG = np.random.default_rng
HEAD = RNG(0).normal(size=(3, 7))


def operator(r=3, seed=0):
    """An operator over trees with rows of any length, and its dense ``A`` and ``G``."""
    rng = RNG(seed)
    rows = {"a": rng.normal(size=(r, 2, 2)), "b": rng.normal(size=(r, 3))}
    h = rng.normal(size=(r, r))
    op = online.Operator.of(jax.tree.map(jnp.asarray, rows), jnp.asarray(h @ h.T))
    a = np.concatenate([rows["a"].reshape(r, -1), rows["b"]], axis=1)
    return op, a, a.T @ (h @ h.T) @ a


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def tree(x):
    """A flat vector of 7 entries, or several, as the example's tree."""
    x = jnp.asarray(x)
    return {"a": x[..., :4].reshape(*x.shape[:-1], 2, 2), "b": x[..., 4:]}


# The operator ------------------------------------------------------------------------------------


def test_operator_is_its_dense_matrix(x64):
    op, a, g = operator()
    v = RNG(1).normal(size=7)
    np.testing.assert_allclose(op.encode(tree(v)), a @ v, rtol=1e-12)
    np.testing.assert_allclose(flat(op.decode(a @ v)), a.T @ a @ v, rtol=1e-12)
    np.testing.assert_allclose(flat(op(tree(v))), g @ v, rtol=1e-12)
    lam, q = np.linalg.eigh(g)
    lam, q = lam[-3:], q[:, -3:]
    np.testing.assert_allclose(op.eigenvalues(), lam[::-1], rtol=1e-10)
    for p in (-1.0, -0.5, 0.5, 2.0):
        expected = q @ (lam**p * (q.T @ v))
        np.testing.assert_allclose(flat(op.power(tree(v), p)), expected, rtol=1e-8)
    expected = np.linalg.solve(g + 0.3 * np.eye(7), v)
    np.testing.assert_allclose(flat(op.solve(tree(v), 0.3)), expected, rtol=1e-9)
    np.testing.assert_allclose(flat(op.residual(tree(v))), v - q @ q.T @ v, atol=1e-10)
    e = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], op.eigenvectors())) for i in range(3)])
    np.testing.assert_allclose(np.abs(e @ q[:, ::-1]), np.eye(3), atol=1e-10)


def test_operator_takes_several_vectors_at_once(x64):
    op, a, _ = operator()
    v = RNG(1).normal(size=(5, 7))
    for call in (op.encode, op, lambda v: op.power(v, -0.5), lambda v: op.solve(v, 0.1)):
        each = [call(tree(x)) for x in v]
        together = jax.tree.map(lambda *x: jnp.stack(x), *each)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), call(tree(v)), together
        )
    np.testing.assert_allclose(op.decode(v @ a.T)["b"], (v @ a.T @ a)[:, 4:], rtol=1e-9)


def test_merge_is_the_svd_of_the_concatenation(x64):
    (one, _, g1), (two, _, g2) = operator(3, 0), operator(2, 1)
    whole = online.merge(one, two, rank=5, weights=(2.0, 0.5))
    v = RNG(1).normal(size=7)
    np.testing.assert_allclose(flat(whole(tree(v))), (2 * g1 + g2 / 2) @ v, rtol=1e-9)
    best = np.linalg.eigvalsh(2 * g1 + g2 / 2)[::-1][:2]
    kept = online.merge(one, two, rank=2, weights=(2.0, 0.5))
    np.testing.assert_allclose(kept.eigenvalues(), best, rtol=1e-9)
    np.testing.assert_allclose(kept.gram, np.eye(2), atol=1e-9)


@pytest.mark.parametrize("n", [30, 1])
def test_signed_pca_is_the_dense_one(n, x64):
    """With more vectors than entries, and with fewer."""
    rng = RNG(0)
    c, keep, avoid = rng.normal(size=(n, 7)), rng.normal(size=(3, 7)), rng.normal(size=(2, 7))
    op = online.signed_pca(3, (1.0, tree(c)), (0.7, tree(keep)), (-3.0, tree(avoid)))
    dense = c.T @ c / n + 0.7 * keep.T @ keep / 3 - 3 * avoid.T @ avoid / 2
    lam, q = np.linalg.eigh(dense)
    np.testing.assert_allclose(op.eigenvalues(), lam[::-1][:3], rtol=1e-9)
    v = rng.normal(size=7)
    np.testing.assert_allclose(flat(op.project(tree(v))), q[:, -3:] @ q[:, -3:].T @ v, rtol=1e-8)


# Gradients in closed form ------------------------------------------------------------------------

MLP = (
    lambda key, z: {"w": jax.random.normal(key, (4, z.size)), "v": jnp.ones((z.size, 4)) / 3},
    lambda theta, z: theta["v"] @ jnp.tanh(theta["w"] @ z),
)

PURPOSES = {
    "reconstruction": online.Reconstruction(0.7),
    "old": online.OldTask(0.7),
    "avoid": online.Avoidance(1.3),
    "whitening": online.Whitening(0.4),
    "whitening-absolute": online.Whitening(0.4, relative=False),
    "entropy": online.Entropy(0.8),
    "dynamics": online.Dynamics(1.1),
    "dynamics-f": online.Dynamics(1.1, MLP),
    "edits": online.EditLocality(0.6),
    "activation": online.Activation(
        0.9, lambda h: jnp.asarray(HEAD) @ jnp.tanh(ravel_pytree(h)[0])
    ),
    "custom": online.Custom(0.5, lambda op, batch: jnp.sum(op.encode(batch.vectors) ** 4)),
}


def stated(name, a, theta, view, memory):
    """The loss as its docstring states it, of a dense ``A``: what autodiff differentiates.

    Moments are those before the batch, with the derivative of an average over the stream.
    """
    through = lambda constant, x: constant + x - jax.lax.stop_gradient(x)
    join = lambda columns: jnp.concatenate(columns, axis=1)
    x, w = join(view.stream.columns), view.stream.weights
    z, e = x @ a.T, view.energy
    h = through(view.operator.h, (z.T * w) @ z)
    mean = lambda values, weights: jnp.sum(weights * values)
    other = lambda key: (join(view.extra[key].columns), view.extra[key].weights)
    r = a.shape[0]
    if name == "reconstruction":
        return mean(jnp.sum((x - z @ a) ** 2, axis=1), w) / e
    if name == "old":
        u, wu = other("old")
        return mean(jnp.sum((u - u @ a.T @ a) ** 2, axis=1), wu) / e
    if name == "avoid":
        u, wu = other("avoid")
        return mean(jnp.sum((u @ a.T) ** 2, axis=1), wu) / e
    if name == "whitening":
        return r * jnp.sum(h**2) / jnp.trace(h) ** 2 - 1
    if name == "whitening-absolute":
        return jnp.sum((h - jnp.trace(h) / r * jnp.eye(r)) ** 2)
    if name == "entropy":
        lam = jnp.linalg.eigvalsh(h / jnp.trace(h))
        return jnp.log(r) + jnp.sum(lam * jnp.log(lam))
    if name.startswith("dynamics"):
        s, t, wp = (
            join(view.pairs.sources),
            join(view.pairs.targets.columns),
            view.pairs.targets.weights,
        )
        if name == "dynamics":
            past = memory.past + 1e-4 * jnp.trace(memory.past) / r * jnp.eye(r)
            m = jax.lax.stop_gradient(jnp.linalg.inv(a @ a.T) @ memory.lag @ jnp.linalg.inv(past))
            predicted = s @ a.T @ m.T
        else:
            predicted = jax.vmap(lambda z: MLP[1](theta, z))(s @ a.T)
        return mean(jnp.sum((t - predicted @ a) ** 2, axis=1), wp) / e
    if name == "edits":
        k, wk = other("edits")
        rest = k - k @ a.T @ a
        q = jnp.sum((rest @ x.T) ** 2 * w, axis=1)
        return mean(q / jnp.sum(rest * k, axis=1) ** 2, wk)
    if name == "activation":
        logits = lambda h: jnp.tanh(h) @ HEAD.T
        p, q = jax.nn.log_softmax(logits(x)), jax.nn.log_softmax(logits(z @ a))
        return mean(jnp.sum(jnp.exp(p) * (p - q), axis=1), w)
    assert name == "custom"
    return jnp.sum(z**4)


@pytest.mark.parametrize("name", PURPOSES)
def test_factors_are_the_gradient(name, x64):
    """The composite's cotangents against autodiff of the stated loss and finite differences."""
    rng, r = RNG(3), 3
    purpose = PURPOSES[name]
    op, a, _ = operator(r)
    stream = lambda k: online.purposes.Stream(
        [jnp.asarray(rng.normal(size=(k, 4))), jnp.asarray(rng.normal(size=(k, 3)))],
        jnp.full(k, 1 / k),
    )
    batch, sources = stream(5), stream(4)
    view = online.purposes.View(
        op,
        batch,
        op.codes(batch.columns),
        online.purposes.Pairs(sources.columns, op.codes(sources.columns), stream(4)),
        {key: stream(k) for key, k in (("old", 2), ("avoid", 3), ("edits", 4))},
        jnp.asarray(2.3),
        (),
    )
    theta = purpose.theta(jax.random.key(0), r, jnp.float64)
    moments = rng.normal(size=(2, r, r))
    memory = (
        online.purposes.Lagged(moments[0] @ moments[0].T, moments[1]) if name == "dynamics" else ()
    )
    loss = lambda rows, theta: online.composite(
        (purpose,), False, (purpose.weight,), rows, (theta,), view, (memory,)
    )[0]
    value, (rows, bar) = jax.value_and_grad(loss, argnums=(0, 1))(op.rows, theta)
    dense = lambda a, theta: purpose.weight * stated(name, a, theta, view, memory)
    expected, (da, dt) = jax.value_and_grad(dense, argnums=(0, 1))(jnp.asarray(a), theta)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    got = np.concatenate([rows["a"], rows["b"]], axis=1)
    np.testing.assert_allclose(got, da, rtol=1e-10, atol=1e-12 * np.abs(da).max())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13), bar, dt)
    if not name.startswith(("whitening", "entropy")) and name != "dynamics":
        # Central differences of sixth order, where no moment stands for an average.
        direction, h = rng.normal(size=a.shape), 3e-4
        at = jax.jit(lambda t: dense(jnp.asarray(a + t * direction), theta))
        slope = sum(c * (at(i * h) - at(-i * h)) for i, c in ((1, 45), (2, -9), (3, 1))) / (60 * h)
        np.testing.assert_allclose(np.vdot(got, direction), slope, rtol=1e-10)


@pytest.mark.parametrize("name, k", [("reconstruction", 1), ("edits", 5), ("custom", 2)])
def test_tangent_gradients_leave_rows_orthonormal_to_first_order(name, k, x64):
    rng = RNG(4)
    q = np.linalg.qr(rng.normal(size=(7, 3)))[0].T
    op = online.Operator.of(tree(q), jnp.eye(3))
    stream = lambda k: online.purposes.Stream(
        [jnp.asarray(rng.normal(size=(k, 4))), jnp.asarray(rng.normal(size=(k, 3)))],
        jnp.full(k, 1 / k),
    )
    batch = stream(k)
    view = online.purposes.View(
        op, batch, op.codes(batch.columns), None, {"edits": stream(k)}, jnp.ones(()), ()
    )
    gradients = [
        jax.grad(
            lambda rows, t=tangent: online.composite(
                (PURPOSES[name],), t, (1.0,), rows, ((),), view, ((),)
            )[0]
        )(op.rows)
        for tangent in (False, True)
    ]
    plain, tangent = (np.concatenate([g["a"], g["b"]], axis=1) for g in gradients)
    np.testing.assert_allclose(tangent @ q.T + q @ tangent.T, 0, atol=1e-10)
    within = plain @ q.T if name != "custom" else (plain @ q.T + q @ plain.T) / 2
    np.testing.assert_allclose(tangent, plain - within @ q, atol=1e-10)


def test_gradient_through_the_average_is_nearly_unbiased(x64):
    """Over a stationary stream, against the loss of the true moments; one step's is 1 - β of it."""
    rng, r, decay = RNG(5), 3, 0.95
    scales = np.array([2.0, 1.5, 1.0, 0.8, 0.6, 0.5, 0.4])
    a = rng.normal(size=(r, 7)) / 2
    frozen = optax.set_to_zero()
    learn = online.learner(
        r, (online.Whitening(1.0, relative=False),), frozen, reconstruction=0.0, decay=decay
    )
    state = learn.init(jax.random.key(0), jnp.zeros(7))
    state = state._replace(
        operator=dataclasses.replace(state.operator, rows=jnp.asarray(a), gram=jnp.asarray(a @ a.T))
    )
    x = jnp.asarray(rng.normal(size=(40000, 7)) * scales)

    def step(state, v):
        view = online.purposes.View(
            state.operator,
            online.purposes.Stream([v[None]], jnp.ones(1)),
            state.operator.codes([v[None]]),
            None,
            {},
            jnp.ones(()),
            (),
        )
        g = jax.grad(
            lambda rows: online.composite(learn.purposes, False, (1.0,), rows, ((),), view, ((),))[
                0
            ]
        )(state.operator.rows)
        return learn.update(state, v)[0], g

    _, g = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(state, x)
    mean = np.mean(np.asarray(g)[1000:], axis=0)
    c = np.diag(scales**2)
    h = a @ c @ a.T
    exact = 4 * (h - np.trace(h) / r * np.eye(r)) @ a @ c
    assert np.linalg.norm(mean - exact) < 0.05 * np.linalg.norm(exact)


# Optima ------------------------------------------------------------------------------------------


def train(learn, x, batch, epochs, key=0, **streams):
    """Passes over a stream in batches."""
    state = learn.init(jax.random.key(key), jax.tree.map(lambda v: jnp.zeros(v.shape[1:]), x))
    cut = lambda v: v[: len(v) // batch * batch].reshape(-1, batch, *v.shape[1:])
    x, streams = jax.tree.map(cut, x), jax.tree.map(cut, streams)

    def step(state, batch):
        return learn.update(state, batch[0], **batch[1])

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: jax.lax.scan(step, s, (x, streams)), state, length=epochs)

    return run(state)


def test_whitening_shapes_the_scales_and_leaves_the_span(x64):
    """The optimum of MATH's first form: leading eigenspace, p_i = (1 + λα)/(1 + λ λ_i)."""
    lam, r, weight = np.array([3.0, 2.0, 1.0, 0.3, 0.2, 0.1]), 3, 0.5
    q = np.linalg.qr(RNG(6).normal(size=(6, 6)))[0]
    # Six vectors whose second moments are exactly those.
    x = jnp.asarray(np.sqrt(6 * lam)[:, None] * q.T)
    learn = online.learner(
        r,
        (online.Whitening(weight, relative=False),),
        optax.sgd(0.02),
        relative=False,
        decay=0.0,
    )
    state, info = train(learn, x, 6, 6000)
    a = np.asarray(state.operator.rows)
    p = np.linalg.eigvalsh(a @ a.T)[::-1]
    top = q[:, :r]
    np.testing.assert_allclose(a @ top @ top.T, a, atol=1e-5)
    # The codes' variances are μ_i = p_i λ_i, and α is their mean.
    scales = np.diagonal(top.T @ a.T @ a @ top)
    alpha = np.mean(scales * lam[:r])
    np.testing.assert_allclose(scales, (1 + weight * alpha) / (1 + weight * lam[:r]), rtol=1e-4)
    np.testing.assert_allclose(np.sort(scales), np.sort(p), rtol=1e-4)


@pytest.mark.parametrize("purpose", ["pca", "old", "avoid"])
def test_quadratic_purposes_reach_their_signed_pca(purpose, x64):
    rng = RNG(7)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    make = lambda scales, n=64: rng.normal(size=(n, 8)) * scales @ basis.T
    x = make(np.array([3, 2.5, 2, 1, 0.5, 0.2, 0.1, 0.1]))
    u = make(np.array([0.1, 0.1, 0.1, 0.1, 0.1, 3, 4, 0.1]))
    w = make(np.array([4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    streams, purposes, oracle = {
        "pca": ({}, (), ()),
        "old": ({"old": u}, (online.OldTask(2.0),), ((2.0, u),)),
        "avoid": ({"avoid": w}, (online.Avoidance(2.0),), ((-2.0, w),)),
    }[purpose]
    learn = online.learner(2, purposes, optax.adam(1e-2), decay=0.9)
    state, _ = train(learn, x, 64, 1500, **streams)
    best = online.signed_pca(2, (1.0, x), *oracle)
    overlap = np.linalg.norm(np.asarray(best.eigenvectors()) @ state.operator.rows.T) ** 2 / 2
    assert overlap > 0.9999, overlap
    np.testing.assert_allclose(state.operator.rows @ state.operator.rows.T, np.eye(2), atol=1e-9)


@pytest.mark.parametrize("f", [None, "matrix"])
def test_exact_linear_dynamics_are_recovered(f, x64):
    """A rotation of two dimensions under a louder noise: the plane, and its angle."""
    rng, angle = RNG(8), 0.3
    q = np.linalg.qr(rng.normal(size=(12, 5)))[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    code = np.stack([np.linalg.matrix_power(turn, t) @ [1.0, 0.0] for t in range(1, 2001)])
    x = code @ q[:, :2].T + 3 * rng.normal(size=(2000, 3)) @ q[:, 2:].T
    matrix = (lambda key, z: jnp.eye(z.size) * 0.5, lambda m, z: m @ z)
    dynamics = online.Dynamics(1.0, matrix if f else None)
    learn = online.learner(2, (dynamics,), optax.adam(1e-2), reconstruction=0.0)
    state, _ = train(learn, x, 200, 100)
    a = np.asarray(state.operator.rows)
    assert np.linalg.norm(a @ q[:, :2]) ** 2 / 2 > 0.97
    m = state.theta[0] if f else dynamics.linear(state.memory[0], state.operator.gram)
    eig = np.linalg.eigvals(np.asarray(m))
    np.testing.assert_allclose(np.abs(np.angle(eig)), angle, atol=0.03)


def test_moments_follow_the_codes(x64):
    """H ← C H C^T keeps H the moments of codes as far as the span is shared."""
    rng = RNG(9)
    x = jnp.asarray(rng.normal(size=(512, 5)) * np.array([3, 2, 1, 0.1, 0.1]))
    learn = online.learner(
        5,
        (lambda op, b: jnp.sum(op.encode(b.vectors)[:, 0] ** 2) / 100,),
        optax.sgd(0.1),
        decay=0.99,
    )
    state, info = train(learn, x, 8, 30)
    a = np.asarray(state.operator.rows)
    np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-9)  # a rotation, so nothing is lost
    exact = a @ np.asarray(x.T @ x / 512) @ a.T
    assert np.linalg.norm(state.operator.h - exact) < 0.12 * np.linalg.norm(exact)
    assert bool(jnp.all(info.moved))


# The learner as a program ------------------------------------------------------------------------


def test_one_vector_and_several_trees_and_jit():
    learn = online.learner(2, (online.Dynamics(1.0), online.Entropy(0.1)), decay=0.9)
    x = RNG(10).normal(size=(48, 7)).astype(np.float32)
    as_tree, _ = train(learn, tree(x), 4, 1)
    assert as_tree.operator.rows["a"].shape == (2, 4) and int(as_tree.count) == 12
    state = learn.init(jax.random.key(0), tree(jnp.zeros(7)))
    update = Traced(learn.update, donate_argnums=0)
    for i in range(0, 48, 4):
        state, info = update(state, tree(x[i : i + 4]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, as_tree)
    assert update.count == 1
    single, _ = update(state, tree(x[0]))
    assert np.isfinite(info.loss) and int(single.count) == 13


def test_successors_are_those_of_the_stream_or_those_given(x64):
    """Lagged moments ``E z' z^T`` after one batch, with rows that stand still."""
    x = RNG(11).normal(size=(4, 6))
    learn = online.learner(2, (online.Dynamics(1.0),), optax.sgd(0.0), reconstruction=0.0)
    state = learn.init(jax.random.key(0), jnp.zeros(6))
    update, a = jax.jit(learn.update), np.asarray(state.operator.rows)
    lag = lambda before, after: (after @ a.T).T @ (before @ a.T) / len(before)
    sequence, _ = update(state, x)
    np.testing.assert_allclose(sequence.memory[0].lag, lag(x[:-1], x[1:]), rtol=1e-9)
    given, _ = update(state, x[:3], next=x[[3, 0, 1]])
    np.testing.assert_allclose(given.memory[0].lag, lag(x[:3], x[[3, 0, 1]]), rtol=1e-9)
    # The pair across two batches: the second one's first vector follows the first one's last.
    later, _ = update(sequence, x[:1])
    rate = 0.01 / (1 - 0.99**2)
    expected = (1 - rate) * lag(x[:-1], x[1:]) + rate * lag(x[3:], x[:1])
    np.testing.assert_allclose(later.memory[0].lag, expected, rtol=1e-9)


def test_no_vectors_are_no_step():
    """Of a learner, a tracker and an operator; of a closed form they are refused."""
    none = jnp.zeros((0, 6))
    learn = online.learner(2, (online.OldTask(1.0), online.Dynamics(1.0)))
    state = learn.init(jax.random.key(0), jnp.zeros(6))
    same, info = learn.update(state, none, old=jnp.ones((3, 6)))
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert info.loss == 0 and not info.moved and len(info.values) == 3
    assert jnp.isfinite(learn.update(state, jnp.ones((2, 6)), old=none)[1].loss)
    for tracker in (online.trackers.brand(2), online.trackers.PETRELS(2)):
        state = tracker.init(jax.random.PRNGKey(0), jnp.zeros(6))
        jax.tree.map(np.testing.assert_array_equal, tracker.update(state, none), state)
    op = online.Operator.of(jnp.eye(2, 6), jnp.eye(2))
    assert op.encode(none).shape == (0, 2) and op.decode(jnp.zeros((0, 2))).shape == (0, 6)
    for out in (op(none), op.power(none, -0.5), op.solve(none, 1.0), op.project(none)):
        assert out.shape == (0, 6)
    with pytest.raises(ValueError, match="signed_pca: a stream holds no vectors"):
        online.signed_pca(1, (1.0, none))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_skipped(bad):
    learn = online.learner(2, (online.Dynamics(1.0),), optax.adam(1e-2))
    state = learn.init(jax.random.key(0), jnp.zeros(5))
    x = RNG(12).normal(size=(6, 5)).astype(np.float32)
    update = jax.jit(learn.update)
    for v in x:
        state, _ = update(state, v)
    broken = x[0].copy()
    broken[2] = bad
    after, info = update(state, broken)
    same = after._replace(skipped=state.skipped, after=state.after)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert int(after.skipped) == 1 and int(after.failed) == 0 and not bool(after.after)
    # In a batch the others count.
    mixed, _ = update(state, np.stack([x[0], broken, x[1]]))
    assert int(mixed.skipped) == 1 and int(mixed.count) == 7
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(mixed))


def test_a_loss_that_is_not_finite_leaves_everything():
    blow_up = lambda op, batch: jnp.log(-jnp.sum(op.encode(batch.vectors) ** 2))
    learn = online.learner(2, (blow_up,), optax.adam(1e-2))
    state = learn.init(jax.random.key(0), jnp.zeros(5))
    after, _ = learn.update(state, jnp.ones(5))
    assert int(after.failed) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        after._replace(failed=state.failed),
        state._replace(after=after.after),
    )


@pytest.mark.parametrize("stream", [np.zeros((50, 5)), np.ones((50, 5)), 1e-20 * np.ones((50, 5))])
def test_dull_streams_stay_finite(stream):
    purposes = (online.Dynamics(1.0), online.Entropy(0.1))
    for learn in (
        online.learner(3, purposes, optax.adam(1e-2)),
        online.learner(3, (online.Whitening(1.0),), optax.adam(1e-2)),
    ):
        state, info = train(learn, stream.astype(np.float32), 1, 1)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, info)))
        assert int(state.failed) == 0


def test_resume_is_bit_for_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    learn = online.learner(2, (online.Dynamics(1.0, MLP),), optax.MultiSteps(optax.adam(1e-2), 3))
    state = learn.init(jax.random.key(0), tree(jnp.zeros(7)))
    x = RNG(13).normal(size=(20, 7)).astype(np.float32)
    update = jax.jit(learn.update)
    for v in x[:10]:
        state, _ = update(state, tree(v))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", state)
    for v in x[10:]:
        state, back = update(state, tree(v))[0], update(back, tree(v))[0]
    jax.tree.map(np.testing.assert_array_equal, state, back)


def test_a_slow_schedule_moves_rarely():
    learn = online.learner(2, (), optax.MultiSteps(optax.adam(1e-2), 5))
    x = RNG(14).normal(size=(20, 5)).astype(np.float32)
    _, info = train(learn, x, 1, 1)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(info.moved)[0]), [4, 9, 14, 19])
    assert np.all(np.asarray(info.change)[0, :4] == np.eye(2))


def test_rows_can_be_given_to_start_from(x64):
    rows = RNG(19).normal(size=(2, 5))
    for learn in (LEARN(2), LEARN(2, (online.Whitening(1.0),))):
        op = learn.operator(learn.init(jax.random.key(0), jnp.zeros(5), rows))
        v = RNG(20).normal(size=5)
        span = np.linalg.qr(rows.T)[0]
        np.testing.assert_allclose(op.project(v), span @ span.T @ v, rtol=1e-9)
        if learn.orthonormal:
            np.testing.assert_allclose(op.gram, np.eye(2), atol=1e-12)
        else:
            np.testing.assert_array_equal(op.rows, rows)
    with pytest.raises(ValueError, match="rows hold 3 vectors; pass 2"):
        LEARN(2).init(jax.random.key(0), jnp.zeros(5), jnp.ones((3, 5)))


def test_weights_can_be_schedules(x64):
    schedule = optax.piecewise_constant_schedule(1.0, {2: 0.0})
    learn = online.learner(
        2, (online.Avoidance(schedule, "avoid"),), optax.sgd(0.0), reconstruction=0
    )
    x = RNG(15).normal(size=(4, 5))
    _, info = train(learn, x, 1, 1, avoid=x)
    np.testing.assert_array_equal(np.asarray(info.loss)[0, 3:], 0)
    np.testing.assert_array_equal(np.asarray(info.loss)[0, :2], np.asarray(info.values)[0][0, :2])


@hypothesis.given(
    r=st.integers(1, 4),
    k=st.integers(1, 5),
    shape=st.sampled_from([(4,), (2, 3), (5, 1, 1)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@hypothesis.settings(max_examples=5)
def test_shapes_and_dtypes(r, k, shape, dtype):
    learn = online.learner(r, (online.Dynamics(1.0),), optax.sgd(1e-2))
    state = learn.init(jax.random.key(0), jnp.zeros(shape, dtype))
    v = jnp.asarray(RNG(16).normal(size=(k, *shape)), dtype)
    state, info = jax.jit(learn.update)(state, v)
    op = learn.operator(state)
    assert state.operator.rows.dtype == dtype and state.operator.h.dtype == jnp.float32
    assert op(v).dtype == dtype and op(v).shape == v.shape and op.encode(v).shape == (k, r)
    assert np.isfinite(info.loss)


MESSAGES = {
    "rank is 6, but vectors have 5": lambda: LEARN(6).init(jax.random.key(0), jnp.zeros(5)),
    "pass floating-point": lambda: LEARN(2).init(jax.random.key(0), jnp.zeros(5, int)),
    "has shape (4,); pass (5,)": lambda: LEARN(2).update(STATE(), jnp.zeros(4)),
    "has shape (2, 4); pass (5,)": lambda: LEARN(2).update(STATE(), jnp.zeros((2, 4))),
    "structure is not that": lambda: operator()[0].encode({"a": jnp.zeros((2, 2))}),
    "needs the stream `old`": lambda: LEARN(2, (online.OldTask(1.0),)).update(STATE(), jnp.ones(5)),
    "no purpose asks for old": lambda: LEARN(2).update(STATE(), jnp.ones(5), old=jnp.ones(5)),
    "next holds another number": lambda: LEARN(2).update(
        STATE(), jnp.ones(5), next=jnp.ones((2, 5))
    ),
    "Whitening needs rows of any length": lambda: LEARN(
        2, (online.Whitening(1.0),), orthonormal=True
    ),
    "no purposes": lambda: LEARN(2, reconstruction=0.0),
    "is not a purpose": lambda: LEARN(2, ("whitening",)),
    "optimizer is 0.1": lambda: LEARN(2, (), 0.1),
    "weight is -1": lambda: online.Entropy(-1),
    "f is 'linear'": lambda: online.Dynamics(1.0, "linear"),
    "head is None": lambda: online.Activation(1.0),
    "decay is 1.5": lambda: LEARN(2, decay=1.5),
    "damping is 0": lambda: operator()[0].solve(tree(jnp.ones(7)), 0),
    "z has shape (2,)": lambda: operator()[0].decode(jnp.ones(2)),
}
LEARN = online.learner


def STATE():
    return LEARN(2).init(jax.random.key(0), jnp.zeros(5))


@pytest.mark.parametrize("message", MESSAGES)
def test_errors_say_what_to_pass(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_a_million_vectors_at_constant_memory():
    """The compiled scan's temporaries do not grow with its length."""
    learn = online.learner(2, (online.Dynamics(1.0),))
    state = learn.init(jax.random.key(0), jnp.zeros(8))

    def run(state, n):
        def step(state, key):
            return learn.update(state, jax.random.normal(key, (8,)))[0], None

        return jax.lax.scan(
            lambda s, i: step(s, jax.random.fold_in(jax.random.key(1), i)), state, jnp.arange(n)
        )[0]

    sizes = [
        jax.jit(run, static_argnums=1)
        .lower(state, n)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for n in (1000, 2000)
    ]
    assert sizes[1] - sizes[0] <= 8 * 1000  # the counter alone
    end = jax.jit(run, static_argnums=1)(state, 1_000_000)
    assert int(end.count) == 1_000_000
    rows = np.asarray(end.operator.rows)
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)


def test_nothing_is_copied_or_square():
    """The compiled update holds nothing d × d, and temporaries of a few copies of A."""
    d, r = 20_000, 4
    learn = online.learner(r, (online.Dynamics(1.0),), optax.sgd(1e-2))
    state = learn.init(jax.random.key(0), jnp.zeros(d))
    compiled = jax.jit(learn.update, donate_argnums=0).lower(state, jnp.zeros(d)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * r * d * 4


# In the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, lro.per_leaf], ids=["one", "leaf"])
def test_a_learned_basis_steps_in_its_eigenbasis(groups, x64):
    """Updates of L^-1/2 are G^-1/2 g with the learner's own operator, group by group."""
    learn = online.learner(3, (online.Dynamics(1.0),), optax.MultiSteps(optax.adam(1e-2), 2))
    tx = lro.scale_by_lre(
        lro.curvature.Covariance(),
        online.Learned(learn, eig_tol=1e-9),
        lro.inner.LInvSqrt(),
        groups=groups,
    )
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(5)}
    state, update = tx.init(params), jax.jit(tx.update)
    rng = RNG(17)
    for _ in range(9):
        g = {"a": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=5))}
        updates, state = update(g, state, params)
    learners = state.basis.learners
    assert len(learners) == (1 if groups is None else 2) and int(learners[0].count) == 9
    parts = [["a", "b"]] if groups is None else [["a"], ["b"]]
    for names, inside in zip(parts, learners, strict=True):
        expected = inside.operator.power([jnp.ravel(g[n]) for n in names], -0.5)
        for name, x in zip(names, expected, strict=True):
            np.testing.assert_allclose(updates[name].ravel(), x, rtol=1e-6)


def test_a_learned_basis_moves_the_inner_state_by_c(x64):
    learn = online.learner(2, (), optax.adam(3e-2), decay=0.8)
    basis = online.Learned(learn, eig_tol=0.0)
    layout = lro._core.layout.Layout.of(jnp.zeros(6), None)
    state = basis.init(layout, jax.random.key(0))
    q = lambda state: np.asarray(state.t[0] @ state.learners[0].operator.rows[0])
    rng = RNG(18)
    for i in range(6):
        y = [jnp.asarray(rng.normal(size=(2, 6)))]
        new = basis.absorb(
            layout,
            state,
            lro.SymmetricCorrection(y, jnp.array([[1.0, 0.5]])),
            jnp.ones(1, bool),
            jax.random.key(i),
        )
        np.testing.assert_allclose(new.c[0], q(new.state) @ q(state).T, atol=1e-9)
        np.testing.assert_allclose(new.u[0], q(new.state) @ np.asarray(y[0]).T, atol=1e-9)
        state = new.state
    np.testing.assert_allclose(q(state) @ q(state).T, np.eye(2), atol=1e-9)


def test_a_learned_basis_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="pass lro.online.learner"):
        online.Learned(4)
    with pytest.raises(ValueError, match="need the streams old"):
        online.Learned(LEARN(2, (online.OldTask(1.0),)))
    basis, layout = online.Learned(LEARN(2)), lro._core.layout.Layout.of(jnp.zeros(3), None)
    signed = lro.SymmetricCorrection([jnp.ones((1, 3))], jnp.ones((1, 1)), signed=True)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="weights of both signs"):
        basis.absorb(layout, basis.init(layout, key), signed, jnp.ones(1, bool), key)
