"""Online trackers: their gates, textbook references, missing entries, merging, faults."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TRACKERS
from test_trackers import bound, digits, spiked

import lowrank_optax as lro
from lowrank_optax.online import Operator, merge, trackers
from lowrank_optax.online.trackers._tracker import OnRows

CHUNK, D = 599, 500  # 1797 digits are three chunks

# Gates of trackers of rank 10 on the spiked stream and on digits.
GATES = {
    "Oja, 20 at once": (0.98, 0.975),
    "Krasulina": (0.98, 0.965),
    "AdaOja": (0.975, 0.98),
    "Sanger": (0.965, 0.955),
    "CCIPCA": (0.995, 0.997),
    "Brand, m = r": (0.999, 0.985),
    "Brand": (0.9995, 0.999),
    "HistoryPCA": (0.999, 0.99),
    "OPAST": (0.999, 0.99),
    "PAST": (0.999, 0.985),
    "PETRELS": (0.999, 0.985),
    "GROUSE": (0.99, 0.985),
    "NoisyPower": (0.97, 0.98),
    "EigenGame": (0.90, 0.975),
    "FrequentDirections": (0.0, 0.999),
}
ROWS = {
    "sanger": trackers.Sanger(3),
    "eigen_game": trackers.EigenGame(3),
    "ccipca": trackers.CCIPCA(3),
    "past": trackers.PAST(3),
    "petrels": trackers.PETRELS(3),
    "noisy_power": trackers.NoisyPower(3, block=2),
}
SMALL = ROWS | {
    "ada_oja": trackers.ada_oja(3),
    "history": trackers.history_pca(3, 0.9, iterations=2),
    "averaged": trackers.brand(3, 0.9),
}


def _run(tracker, state, x):
    return jax.lax.scan(lambda s, v: (tracker.update(s, v), None), state, x)[0]


run = jax.jit(_run, static_argnums=0)
run_short = jax.jit(_run, static_argnums=0)
resume = jax.jit(lambda tracker, op, n: tracker.resume(op, n), static_argnums=0)


def along(tracker, x, k=1):
    """Chunks of one shape, so that one program serves all streams."""
    state = tracker.init(jax.random.key(0), x[0])
    x = x if k == 1 else x[: len(x) // k * k].reshape(-1, k, x.shape[-1])
    size = CHUNK // k
    for i in range(len(x) // size):
        state = run(tracker, state, x[i * size : (i + 1) * size])
    return state


def dense(op):
    q = np.asarray(op.rows, np.float64)
    return q.T @ np.asarray(op.h, np.float64) @ q


def projector(rows):
    q = np.linalg.qr(np.asarray(rows, np.float64).T)[0]
    return q @ q.T


@functools.cache
def gate_streams():
    """The spiked stream and the digits, with the energies of their best ten directions."""
    # To a basis, which starts from the stream, zeros change nothing; they spare a program.
    streams = spiked(), np.pad(digits(), ((0, 0), (0, D - 64)))
    moments = [x.astype(np.float64).T @ x for x in streams]
    return [
        (x, np.linalg.eigvalsh(m)[:-11:-1] / len(x)) for x, m in zip(streams, moments, strict=True)
    ]


def test_no_tracker_is_left_out():
    public = {name: getattr(trackers, name) for name in trackers.__all__}
    made = [make(10, 800) for make, _ in TRACKERS.values()]
    # A function makes a tracker of a basis, a class is one.
    functions = [x for x in public.values() if inspect.isfunction(x)]
    bases = {type(x.basis) for x in made if isinstance(x, trackers.FromBasis)}
    assert {type(f(10).basis) for f in functions} == bases
    assert GATES.keys() >= TRACKERS.keys() - {"Oja"}  # whose gate is that of twenty at once
    kinds = {x for x in public.values() if inspect.isclass(x) and issubclass(x, trackers.Tracker)}
    assert {x for x in kinds if not inspect.isabstract(x)} == {type(x) for x in made}


# Streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    (make, k), gates = TRACKERS[name], GATES[name]
    for (x, best), gate in zip(gate_streams(), gates, strict=True):
        tracker = make(10, len(x))
        if isinstance(tracker, OnRows):  # starts at random, so that zeros would be dimensions to it
            x = x[:, np.any(x != 0, axis=0)]
        state = along(tracker, x, k)
        op = tracker.operator(state)
        q, lam = np.asarray(op.rows, np.float64), np.diag(op.h)
        assert np.sum((x @ q.T) ** 2) / len(x) > gate * np.sum(best)
        np.testing.assert_allclose(q @ q.T, np.eye(10), atol=1e-5)
        assert np.all(np.diff(lam) <= 1e-6 * lam[0]) and int(state.skipped) == 0
        if name != "FrequentDirections":  # which gives lower bounds
            assert lam[0] == pytest.approx(best[0], rel=0.1)


@pytest.mark.parametrize("robust", [False, True], ids=["plain", "robust"])
def test_frequent_directions_bound(robust, x64):
    """Of what is kept, at 4 slots, for the sum of the stream."""
    tracker = trackers.frequent_directions(4, slots=4, robust=robust)
    x = np.random.default_rng(0).normal(size=(40, 12)) * np.geomspace(3, 0.3, 12)
    state = run_short(tracker, tracker.init(jax.random.key(0), x[0]), x)
    half = float(state.memory.memory[0]) / 2 if robust else 0.0
    op = tracker.operator(state)
    sketch = len(x) * dense(op)
    if robust:  # what was given back, also outside
        q = np.asarray(op.rows)
        sketch += half * (np.eye(12) - q.T @ q)
    error = np.linalg.norm(x.T @ x - sketch, 2)
    assert 0 < error <= bound(x, 4) / (2 if robust else 1) + 1e-9


def test_missing_entries():
    """Half the entries of vectors of rank 3 are enough for their subspace; NaN stands there."""
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.normal(size=(40, 3)))[0]
    x = (rng.normal(size=(1500, 3)) * [3, 2, 1]) @ u.T
    there = rng.uniform(size=x.shape) < 0.5
    x = {"a": x[:, :15].reshape(-1, 5, 3), "b": x[:, 15:]}
    there = {"a": there[:, :15].reshape(-1, 5, 3), "b": there[:, 15:]}
    given = jax.tree.map(lambda v, m: jnp.where(m, v, jnp.nan).astype(jnp.float32), x, there)
    tracker = trackers.PETRELS(3, 0.98)

    @jax.jit
    def follow(state, given, there):
        step = lambda s, vm: (tracker.update(s, *vm), None)
        return jax.lax.scan(step, state, (given, there))[0]

    state = follow(
        tracker.init(jax.random.key(0), jax.tree.map(lambda v: v[0], given)), given, there
    )
    op = tracker.operator(state)
    rows = np.concatenate([np.reshape(w, (3, -1)) for w in (op.rows["a"], op.rows["b"])], axis=1)
    assert np.linalg.norm(rows - rows @ u @ u.T, 2) < 2e-3
    z = (rows @ np.concatenate([v.reshape(1500, -1) for v in x.values()], axis=1).T).T
    exact = np.einsum("n,ni,nj->ij", 0.98 ** np.arange(1500.0)[::-1] * 0.02, z, z)
    np.testing.assert_allclose(op.h, exact, atol=0.02 * exact[0, 0])
    assert int(state.skipped) == 0


# References -------------------------------------------------------------------------------------


def unit(w):
    return w / np.linalg.norm(w, axis=-1, keepdims=True)


def lower(c, strict):
    return np.tril(c, -1 if strict else 0)


def sanger(q, lam, n, x, game=False, c=8.0):
    w, s = q.copy(), lam * n
    for v in x:
        a = w @ v
        eta = c / (s.max() + c * v @ v)
        gradient = np.outer(a, v) - lower(np.outer(a, a), game) @ w
        if game:
            gradient -= np.sum(gradient * w, axis=1, keepdims=True) * w
        w, s = w + eta * gradient, s + a**2
        w = unit(w) if game else w
    return w


def ccipca(q, lam, n, x, amnesia=2.0):
    w = q * lam[:, None]
    for t, v in enumerate(x, n + 1):
        u = v.copy()
        for i in range(len(w)):
            c = (t - 1 - amnesia) / t
            w[i] = c * w[i] + (1 + amnesia) / t * u * (u @ w[i]) / np.linalg.norm(w[i])
            u = u - (u @ unit(w[i])) * unit(w[i])
    return w


def past(q, lam, n, x):
    w, p = q.T.copy(), np.diag(1 / (lam * n))
    for v in x:
        y = w.T @ v
        h = p @ y
        g = h / (1 + y @ h)
        p = p - np.outer(g, h)
        w = w + np.outer(v - w @ y, g)
    return w.T


def petrels(q, lam, n, x):
    d, r = q.T.copy(), [np.diag(lam.mean() + lam * n) for _ in q.T]
    for v in x:
        there = v != 0
        a = np.linalg.lstsq(d[there], v[there], rcond=None)[0]
        for j in np.flatnonzero(there):
            r[j] = r[j] + np.outer(a, a)
            d[j] += (v[j] - a @ d[j]) * np.linalg.solve(r[j], a)
    return d.T


def noisy_power(q, lam, n, x):
    for i in range(0, len(x) - 1, 2):
        q = np.linalg.qr(x[i : i + 2].T @ x[i : i + 2] @ q.T + 0)[0].T
    return q


REFERENCES = {
    "sanger": sanger,
    "eigen_game": lambda *args: sanger(*args, game=True),
    "ccipca": ccipca,
    "past": past,
    "petrels": petrels,
}


def beginning(seed=2, d=9, r=3):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(d, r)))[0].T
    lam = np.array([4.0, 2.0, 1.0])
    op = Operator.of(jnp.asarray(q), jnp.diag(jnp.asarray(lam)))
    # `resume` takes eigenvectors, whose signs are its own.
    return op, np.asarray(op.eigenvectors()), lam, rng.normal(size=(5, d))


@pytest.mark.parametrize("name", REFERENCES)
def test_textbook(name, x64):
    op, q, lam, x = beginning()
    if name == "petrels":
        x = x * (np.random.default_rng(3).uniform(size=x.shape) < 0.7)
    tracker, n = ROWS[name], 7
    state = resume(tracker, op, n)
    if name == "petrels":
        step = jax.jit(tracker.update)
        for v in x:
            state = step(state, v, v != 0)
        rows = state.memory.rows[0][0]
    else:
        rows = run_short(tracker, state, x).memory.rows[0]
    np.testing.assert_allclose(rows, REFERENCES[name](q, lam, n, x), atol=1e-7)


def test_noisy_power_iterates_on_blocks(x64):
    tracker = trackers.NoisyPower(2, block=4)
    op, q, lam, _ = beginning()
    x = np.random.default_rng(4).normal(size=(10, 9))
    state = run_short(tracker, resume(tracker, op, 7), x)
    q = q[:2]
    for block in (x[:4], x[4:8]):
        s = q @ block.T @ block / 4
        q = np.linalg.qr((s + 1e-3 * np.linalg.norm(s) * q).T)[0].T
    found = tracker.operator(state)
    np.testing.assert_allclose(projector(found.rows), projector(q), atol=1e-9)
    sizes = np.linalg.svd(s @ q.T, compute_uv=False)
    np.testing.assert_allclose(found.eigenvalues(), sizes, rtol=1e-9)


def test_history_is_a_power_iteration(x64):
    op, q, lam, x = beginning()
    tracker, n = SMALL["history"], 7
    state = run_short(tracker, resume(tracker, op, n), x)
    q, sizes, weight = q.T, lam * (1 - 0.9**n), n
    for v in x:
        b = 0.9 * q @ np.diag(sizes) @ q.T + 0.1 * np.outer(v, v)
        for _ in range(2):
            s = b @ q
            q = np.linalg.qr(s)[0]
        sizes, weight = np.linalg.norm(s, axis=0), weight + 1
        order = np.argsort(-sizes)
        q, sizes = q[:, order], sizes[order]
    found = tracker.operator(state)
    np.testing.assert_allclose(projector(found.rows), q @ q.T, atol=1e-9)
    np.testing.assert_allclose(np.diag(found.h), sizes / (1 - 0.9**weight), rtol=1e-9)


def test_ada_oja_spans_what_its_rule_says(x64):
    op, q, _, x = beginning()
    tracker = trackers.ada_oja(3)
    state = resume(tracker, op, 7)
    for v in x[:2]:
        p = np.asarray(tracker.operator(state).rows)
        old, lam = np.asarray(state.memory.memory[0]), np.asarray(state.memory.lam[0])
        a = p @ v
        v_, turn = np.linalg.eigh(np.diag(lam) + np.outer(a, a))
        turn = turn.T[::-1]
        squares = turn**2 @ old + (turn @ a) ** 2 * (v @ v)
        p = turn @ p
        stepped = p + np.outer(p @ v, v) / np.sqrt(squares)[:, None]
        state = run_short(tracker, state, v[None])
        np.testing.assert_allclose(
            projector(tracker.operator(state).rows), projector(stepped), atol=1e-9
        )
        np.testing.assert_allclose(state.memory.memory[0], squares, rtol=1e-9)


# Merging and going on ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_resume_is_what_was_found(name, x64):
    op, *_ = beginning()
    state = resume(SMALL[name], op, 7)
    found = SMALL[name].operator(state)
    np.testing.assert_allclose(dense(found), dense(op), atol=1e-9)
    assert int(state.seen) == 7


def test_resume_from_fewer_directions(x64):
    op, q, lam, _ = beginning()
    found = (more := trackers.PAST(5)).operator(resume(more, op, 7))
    np.testing.assert_allclose(found.rows @ found.rows.T, np.eye(5), atol=1e-9)
    np.testing.assert_allclose(dense(found), dense(op), atol=1e-9)


def test_merged_halves_go_on(x64):
    """Two sketches of two halves are the sketch of the whole while nothing is truncated."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(45, 4)) @ rng.normal(size=(4, 12))
    tracker = trackers.brand(4, slots=4)
    first = tracker.init(jax.random.key(0), x[0])
    parts = [run_short(tracker, first, part) for part in x.reshape(3, 15, 12)]
    ops = [tracker.operator(state) for state in parts]
    both = merge(ops[0], ops[1], weights=(0.5, 0.5))
    np.testing.assert_allclose(dense(both), x[:30].T @ x[:30] / 30, atol=1e-8)
    on = run_short(tracker, resume(tracker, both, 30), x[30:])
    np.testing.assert_allclose(dense(tracker.operator(on)), x.T @ x / 45, atol=1e-8)


# Faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_nothing_destroys_a_state(name):
    """Through the programs that the gates have compiled."""
    make, k = TRACKERS[name]
    tracker = make(10, 800)
    x = gate_streams()[0][0][: CHUNK // k * k]
    shaped = lambda x: jnp.asarray(x if k == 1 else x.reshape(-1, k, D))
    state = run(tracker, tracker.init(jax.random.key(0), x[0]), shaped(x))
    bad = x.copy()
    bad[:, 3] = np.tile([np.nan, np.inf, -np.inf, 1e30], len(x))[: len(x)]
    skipped = run(tracker, state, shaped(bad))
    assert int(skipped.skipped) == len(x) and int(skipped.seen) == int(state.seen)
    jax.tree.map(np.testing.assert_array_equal, skipped.memory, state.memory)
    for harmless in (np.zeros_like(x), np.tile(x[:1], (len(x), 1))):
        for begun in (state, tracker.init(jax.random.key(0), x[0])):
            after = run(tracker, begun, shaped(harmless))
            op = tracker.operator(after)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((after.memory, op)))
            assert int(after.skipped) == 0
    constant = np.asarray(op.rows @ x[0])
    np.testing.assert_allclose(constant @ constant, x[0] @ x[0], rtol=0.02)


@pytest.mark.parametrize("name", ["ccipca", "noisy_power", "averaged"])
def test_bad_vectors_among_good_ones(name, x64):
    """A block with vectors to skip is the block of the others."""
    tracker = dataclasses.replace(SMALL[name], rank=2)
    x = np.random.default_rng(6).normal(size=(6, 5))
    holes = np.insert(x, [1, 4], np.nan, axis=0)
    update = jax.jit(tracker.update)
    state = tracker.init(jax.random.key(0), x[0])
    good, some = update(state, x), update(state, holes)
    assert (int(some.seen), int(some.skipped)) == (6, 2)
    np.testing.assert_allclose(
        dense(tracker.operator(some)), dense(tracker.operator(good)), atol=1e-7
    )


def test_states_map(x64):
    tracker = trackers.CCIPCA(2)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(4, 6, 5)))
    follow = lambda v: tracker.update(tracker.init(jax.random.key(0), v[0]), v)
    mapped, follow = jax.jit(jax.vmap(follow))(x), jax.jit(follow)
    for i, v in enumerate(x):
        alone = follow(v)
        np.testing.assert_allclose(mapped.memory.rows[0][i], alone.memory.rows[0], atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_are_checked(name):
    tracker = SMALL[name]
    state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(5))
    for wrong in (jnp.zeros(6), jnp.zeros((2, 6)), {"a": jnp.zeros(5)}):
        with pytest.raises(ValueError, match=type(tracker).__name__):
            jax.eval_shape(tracker.update, state, wrong)
    with pytest.raises(ValueError, match="rank is 3.*2 entries"):
        tracker.init(jax.random.key(0), jnp.zeros(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: trackers.oja(0),
        lambda: trackers.krasulina(2, learning_rate=0.0),
        lambda: trackers.grouse(2, 1.0),
        lambda: trackers.history_pca(2, iterations=0),
        lambda: trackers.brand(3, slots=2),
        lambda: trackers.frequent_directions(3, -0.1),
        lambda: trackers.Sanger(2, learning_rate=-1.0),
        lambda: trackers.CCIPCA(2, amnesia=-1.0),
        lambda: trackers.PAST(2, 1.5),
        lambda: trackers.NoisyPower(2, block=0),
        lambda: trackers.PAST(2).resume(lro.online.Operator.of(jnp.eye(2, 3), jnp.eye(2)), 0),
        lambda: (t := trackers.PETRELS(2)).update(
            t.init(jax.random.key(0), jnp.zeros(3)), jnp.zeros(3), jnp.zeros((2, 3))
        ),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match="pass"):
        make()


@pytest.mark.parametrize("beta", [0.95, 0.99])
def test_petrels_forgets_on_a_stream_that_stands_still(beta):
    """Long enough for what is not symmetric in an inverse to grow like ``beta^-t``."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(20, 20)))[0].T[:3]
    x = rng.normal(size=(2000, 3)) * [3, 2.5, 2] @ q + 0.3 * rng.normal(size=(2000, 20))
    tracker, x = trackers.PETRELS(3, beta), jnp.asarray(x, jnp.float32)
    state = tracker.init(jax.random.key(0), x[0])
    run = jax.jit(lambda s, x: jax.lax.scan(lambda s, v: (tracker.update(s, v), None), s, x)[0])
    state = run(state, x)
    assert float(jnp.sum(tracker.operator(state).project(jnp.asarray(q, jnp.float32)) ** 2)) > 2.85
    lengths = np.linalg.norm(state.memory.rows[0][0], axis=1)
    assert np.all((lengths > 0.4) & (lengths < 2.5)) and int(state.skipped) == 0
