"""Bases of coordinates and random bases against their dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax._core import linalg
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.rows import cholesky_qr, rewrite

SHAPES = {"a": (), "b": (5,), "c": (3, 4), "d": (0, 2), "e": (7,)}
GROUPS = {
    "one": None,
    "pairs": lambda path: jax.tree_util.keystr(path) in ("['a']", "['c']"),
    "per_leaf": lro.per_leaf,
}
B = lro.basis
SELECTIONS = {
    "permutation": B.RandomPermutation(4),
    "permutation_slow": B.RandomPermutation(4, update_every=2),
    "permutation_all": B.RandomPermutation(30),
    "topk": B.TopK(4),
    "topk_sum": B.TopK(4, beta=None),
    "topk_all": B.TopK(30, beta=0.0),
    "weighted": B.WeightedPermutation(4),
    "weighted_even": B.WeightedPermutation(6, power=0.0),
    "histogram": B.Histogram(4),
    "histogram_last": B.Histogram(3, beta=0.0),
}
BASES = SELECTIONS | {
    "random": B.Random(4),
    "random_all": B.Random(30, update_every=2),
}
SIGNED = ("topk", "topk_sum", "weighted")


def tree(rng, *lead):
    return {k: jnp.asarray(rng.normal(size=(*lead, *shape))) for k, shape in SHAPES.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def absorb(basis, layout, state, columns, weights, key, accept=True):
    accept = accept & (np.array(layout.dims) > 0)
    weights = jnp.broadcast_to(jnp.asarray(weights, layout.dtype), (layout.n, len(weights)))
    given = lro.SymmetricCorrection(columns, weights=weights, signed=True)
    return basis.absorb(layout, state, given, accept, key)


def dense(basis, layout, state):
    """``Q^T`` of every group by projecting the unit vectors: ``(n, r, d)``."""
    d = sum(layout.sizes)
    eye = np.split(np.eye(d), np.cumsum(layout.sizes)[:-1], axis=1)
    return np.asarray(project(basis, layout, state, [jnp.asarray(x) for x in eye]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def project(basis, layout, state, vector):
    return basis.project(layout, state, vector)


@functools.partial(jax.jit, static_argnums=(0, 1))
def unproject(basis, layout, state, u):
    return basis.unproject(layout, state, u), basis.unproject(layout, state, u[:, 0])


def member(layout):
    """``(n, d)``: which entries belong to each group."""
    of = np.repeat(layout.group, layout.sizes)
    return of == np.arange(layout.n)[:, None]


def flat(vector):
    return np.concatenate([np.asarray(x) for x in vector], axis=-1)


CASES = [(name, "pairs") for name in BASES if name != "random"]
CASES += [("topk", "per_leaf"), ("histogram", "per_leaf")]


@pytest.mark.parametrize(("name", "groups"), CASES)
def test_equals_the_dense_matrix(name, groups, x64):
    basis, rng = BASES[name], np.random.default_rng(0)
    layout = Layout.of(tree(rng), GROUPS[groups])
    r, inside = basis.rank, member(layout)
    state = basis.init(layout, jax.random.key(0))
    q_old = dense(basis, layout, state)
    assert not np.any(q_old)
    for i in range(3):
        columns = [jnp.reshape(x, (2, -1)) for x in tree(rng, 2).values()]
        weights, key = np.array([1.0, 0.5]), jax.random.key(i)
        done = absorb(basis, layout, state, columns, weights, key)
        # What is not accepted changes nothing, whatever it holds, and groups are independent.
        bad = [jnp.full_like(x, jnp.nan) for x in columns]
        still = absorb(basis, layout, state, bad, weights, key, np.zeros(layout.n, bool))
        jax.tree.map(np.testing.assert_array_equal, still.state, state)
        first = absorb(basis, layout, state, columns, weights, key, np.arange(layout.n) == 0).state
        np.testing.assert_array_equal(first.lam[0], done.state.lam[0])
        np.testing.assert_array_equal(first.lam[1:], state.lam[1:])
        state = done.state
        q = dense(basis, layout, state)
        assert not np.any(done.failed)
        # Orthonormal on live slots, within the group; everything else is zero.
        live = np.asarray(basis.eigenbasis(state).live)
        eye = live[:, :, None] * np.eye(r)
        np.testing.assert_allclose(q @ np.swapaxes(q, 1, 2), eye, atol=1e-12)
        assert not np.any(np.where(inside[:, None], 0, q))
        np.testing.assert_allclose(done.c, q @ np.swapaxes(q_old, 1, 2), atol=1e-12)
        np.testing.assert_allclose(done.u, q @ flat(columns).T, atol=1e-12)
        v = rng.normal(size=(layout.n, 3, r))
        want = np.einsum("nkr,nrd->kd", v, q)
        many, one = unproject(basis, layout, state, v)
        np.testing.assert_allclose(flat(many), want, atol=1e-12)
        np.testing.assert_allclose(flat(one), want[0], atol=1e-12)
        if not name.startswith(("random", "histogram")):
            assert set(np.unique(q)) <= {0.0, 1.0}
            assert np.array_equal(live.sum(1), np.minimum(inside.sum(1), r))
        q_old = q


@pytest.mark.parametrize("name", SIGNED)
def test_diagonal_and_eigenvalues(name, x64):
    basis, rng = SELECTIONS[name], np.random.default_rng(2)
    layout = Layout.of(tree(rng), GROUPS["pairs"])
    state, v = basis.init(layout, jax.random.key(0)), 0.0
    weights = np.array([1.0, -0.7])
    for i in range(5):
        columns = [jnp.reshape(x, (2, -1)) for x in tree(rng, 2).values()]
        state = absorb(basis, layout, state, columns, weights, jax.random.key(i)).state
        new = weights @ flat(columns) ** 2
        v = v + new if basis.beta is None else basis.beta * v + (1 - basis.beta) * new
    np.testing.assert_allclose(flat(jax.tree.leaves(state.rows))[0], v, rtol=1e-12)
    q, lam = dense(basis, layout, state), np.asarray(state.lam)
    measured = np.einsum("nrd,d->nr", q, v) / (1 if basis.beta is None else 1 - basis.beta**5)
    np.testing.assert_allclose(lam, measured, rtol=1e-12)
    assert np.all(np.diff(np.abs(lam)) <= 0)
    if name.startswith("topk"):
        for values, mine in zip(lam, member(layout), strict=True):
            want = np.sort(np.abs(v[mine]))[::-1][: basis.rank]
            if basis.beta is not None:
                want = want / (1 - basis.beta**5)
            np.testing.assert_allclose(np.abs(values), want, rtol=1e-12)


@pytest.mark.parametrize("name", ("histogram", "histogram_last"))
def test_histogram_bins(name, x64):
    basis, rng, mean = SELECTIONS[name], np.random.default_rng(3), 0.0
    layout = Layout.of(tree(rng), GROUPS["pairs"])
    state = basis.init(layout, jax.random.key(0))
    weights = np.array([1.0, 0.0, 2.0])
    for i in range(3):
        columns = [jnp.reshape(x, (3, -1)) for x in tree(rng, 3).values()]
        state = absorb(basis, layout, state, columns, weights, jax.random.key(i)).state
        mean = basis.beta * mean + (1 - basis.beta) * flat(columns)[[0, 2]].mean(0)
    bins = flat(jax.tree.leaves(state.rows))[0]
    for counts, mine in zip(np.asarray(state.counts), member(layout), strict=True):
        want, edges = np.histogram(mean[mine], bins=basis.rank)
        np.testing.assert_array_equal(counts, want)
        place = np.clip(np.digitize(mean[mine], edges) - 1, 0, basis.rank - 1)
        np.testing.assert_array_equal(bins[mine], place)


def test_all_coordinates_are_plain_adam():
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    rng = np.random.default_rng(4)
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(4)
    ]
    adam = optax.scale_by_adam(0.9, 0.99)
    for basis in (B.WeightedPermutation(20), B.RandomPermutation(16)):
        tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.Adam())
        state, plain = tx.init(params), adam.init(params)
        update = jax.jit(tx.update)
        for g in grads:
            u, state = update(g, state)
            want, plain = adam.update(g, plain)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), u, want)


def test_draws_are_uniform_and_weighted():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    layout = Layout.of(params, None)
    g = np.array([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 2.0, 2.0])
    columns = [jnp.asarray(x[None], jnp.float32) for x in np.split(g, [3])]

    def counts(basis, draws=4000):
        start = basis.init(layout, jax.random.key(0))
        ones = np.ones(1)
        one = lambda key: absorb(basis, layout, start, columns, ones, key).state.indices[0]
        index = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))
        assert all(len(set(row)) == len(row) for row in index[:50].tolist())
        return np.bincount(np.asarray(index).ravel(), minlength=8) / draws

    np.testing.assert_allclose(counts(B.RandomPermutation(3)), 3 / 8, atol=0.04)
    np.testing.assert_allclose(counts(B.WeightedPermutation(1)), g / g.sum(), atol=0.04)
    square = counts(B.WeightedPermutation(1, power=1.0))
    np.testing.assert_allclose(square, g**2 / np.sum(g**2), atol=0.04)
    np.testing.assert_allclose(counts(B.WeightedPermutation(1, power=0.0)), (g > 0) / 7, atol=0.04)


@pytest.mark.parametrize("d", (20, 3000))
def test_random_is_orthonormal_in_float32(d):
    basis = B.Random(20)
    tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.EMA(0.9))
    params = {"a": jnp.zeros((d - 10,)), "b": jnp.zeros((2, 5))}
    state = tx.init(params)
    rng, update = np.random.default_rng(5), jax.jit(tx.update)
    before = None
    for _ in range(3):
        g = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        _, state = update(g, state)
        s = state.basis
        rows = np.concatenate([np.asarray(x, float) for x in jax.tree.leaves(s.rows)], axis=1)
        q = np.asarray(s.t[0], float) @ rows
        assert np.max(np.abs(q @ q.T - np.eye(20))) < 1e-6
        gradient = flat(lro.Layout.of(params, None, small=True).flatten(g))  # as rows are ordered
        if before is not None:  # momentum moved by the true C, then the average
            q_old, m_old = before
            want = 0.9 * q @ (q_old.T @ m_old) + 0.1 * q @ gradient
            np.testing.assert_allclose(state.inner.mean[0], want, atol=2e-6 * np.sqrt(d))
            assert np.max(np.abs(q @ q_old.T - np.eye(20))) > 0.1
        before = q, np.asarray(state.inner.mean[0], float)
    assert lro.diagnose.orthogonality_error(state)[0] < 1e-6


def test_random_redraws_when_it_should():
    cases = ((B.Random(3, update_every=None), [0, 0, 0]), (B.RandomPermutation(3, 2), [0, 1, 0]))
    for basis, changes in cases:
        tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.Adam())
        state, seen = tx.init(jnp.zeros(50)), []
        update = jax.jit(tx.update)
        for i in range(4):
            _, state = update(jnp.ones(50) + i, state)
            seen.append(np.ravel(getattr(state.basis, "indices", state.basis.rows)))
        moved = [int(np.any(a != b)) for a, b in zip(seen, seen[1:], strict=False)]
        assert moved == changes


@pytest.mark.parametrize("condition", (1e1, 1e3, 1e5))
def test_shifted_cholesky_qr(condition):
    rng, r = np.random.default_rng(6), 12
    layout = Layout.of(
        {"a": jnp.zeros(700), "b": jnp.zeros((3, 9)), "c": jnp.zeros(40)},
        lambda path: str(path) == str((jax.tree_util.DictKey("c"),)),
    )
    u, _ = np.linalg.qr(rng.normal(size=(r, r)))
    w = []
    for size in layout.sizes:
        v, _ = np.linalg.qr(rng.normal(size=(size, r)))
        w.append(jnp.asarray(u * np.geomspace(1, 1 / condition, r) @ v.T, jnp.float32))
    w[2] = w[2].at[4].set(0.0)

    @jax.jit
    def run(rows, when):
        keep = lambda leaf, start, block: block
        rows, gram, cross = rewrite(rows, layout, when, r, keep, cross=True)
        return (gram, cross, *cholesky_qr(rows, layout, gram, when))

    gram, cross, rows, _, t, total = run(w, jnp.array([True, True]))
    np.testing.assert_allclose(gram, cross, atol=1e-6)
    for group, leaves in ((0, (0, 1)), (1, (2,))):
        before = np.concatenate([np.asarray(w[i], float) for i in leaves], axis=1)
        q = np.asarray(t[group], float) @ np.concatenate(
            [np.asarray(rows[i], float) for i in leaves], axis=1
        )
        eye = np.diag((np.arange(r) != 4) | (group == 0)).astype(float)
        assert np.max(np.abs(q @ q.T - eye)) < 2e-6
        # The same span, and the factors' product says how.
        assert np.max(np.abs(before - before @ q.T @ q)) < 1e-5
        np.testing.assert_allclose(
            np.asarray(total[group], float) @ before, q, atol=3e-7 * condition
        )
    still = run(w, jnp.array([False, True]))[2]
    np.testing.assert_array_equal(still[0], w[0])
    assert bool(linalg.finite(*still))


PARAMS = {
    "scalar": jnp.asarray(0.5, jnp.float16),
    "vector": jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16),
    "matrix": jnp.linspace(1, 2, 12, dtype=jnp.float32).reshape(3, 4),
    "empty": jnp.zeros((0, 2)),
}


def run_with_nan(basis, **options):
    """Three jitted steps of Adam on mixed shapes, with one gradient that is not finite between."""
    rng = np.random.default_rng(7)
    grads = lambda: jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
    tx = lro.lre(1e-2, basis=basis, inner=lro.inner.Adam(), **options)
    state, params, update = tx.init(PARAMS), PARAMS, jax.jit(tx.update)
    for i in range(4):
        bad = i == 2
        g = grads()
        if bad:
            g = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), g)
        u, after = update(g, state, params)
        for x, p in zip(jax.tree.leaves(u), jax.tree.leaves(PARAMS), strict=True):
            assert x.dtype == p.dtype and x.shape == p.shape and np.all(np.isfinite(x))
        old, new = lro.diagnose.find(state), lro.diagnose.find(after)
        if bad:
            assert not any(np.any(x) for x in jax.tree.leaves(u))
            same = new._replace(count=old.count, events=old.events)
            jax.tree.map(np.testing.assert_array_equal, same, old)
        else:
            assert any(np.any(x) for x in jax.tree.leaves(u))
        params, state = jax.tree.map(jnp.add, params, u), after
    events = lro.diagnose.find(state).events
    assert np.max(events.nonfinite) == 1 and not np.any(events.eigh) and not np.any(events.inner)
    assert np.all(np.isfinite(lro.diagnose.summary(state).orthogonality_error))


@pytest.mark.parametrize("name", ("permutation", "topk", "weighted", "histogram", "random"))
def test_steps(name):
    run_with_nan(BASES[name])


@pytest.mark.parametrize("name", ("topk", "histogram", "random_all"))
def test_steps_per_leaf(name):
    run_with_nan(BASES[name], groups=lro.per_leaf, update_every=2)


def test_refusals():
    for basis in (B.Random(3), B.RandomPermutation(3), B.Histogram(3), B.CommonDirections(4)):
        with pytest.raises(ValueError, match="eigenvalues"):
            lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInv())
    lro.scale_by_lre(lro.curvature.Covariance(), B.TopK(3), lro.inner.LInv())
    for make in (
        lambda: B.Random(0),
        lambda: B.Random(3, update_every=0),
        lambda: B.RandomPermutation(2.5),
        lambda: B.TopK(3, beta=1.0),
        lambda: B.WeightedPermutation(3, power=-1.0),
        lambda: B.Histogram(3, beta=None),
        lambda: B.RandomPermutation(3, update_every=0),
    ):
        with pytest.raises(ValueError, match="pass a"):
            make()
    huge = {"w": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}
    with pytest.raises(ValueError, match="per_leaf"):
        B.TopK(3).init(Layout.of(huge, None), jax.random.key(0))
    for basis in BASES.values():
        assert eval(repr(basis), vars(B)) == basis
