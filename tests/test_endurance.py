"""Whatever comes: failing eigenproblems in every basis, spoiled numbers, long and odd streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trials
from cases import BASES, DEFAULT, INNERS, MORE_BASES, RULES
from dense import spectrum, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax import online
from lowrank_optax._core import linalg
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Context, Eigenbasis, SymmetricCorrection

COVARIANCE = lro.curvature.Covariance()
RNG = np.random.default_rng(0)
NOISE = jax.tree.map(jnp.asarray, trials.tree(RNG.normal(size=(16, trials.SIZE))))
LAYOUT = Layout.of(jax.tree.map(lambda x: x[0], NOISE), None)
LAST = 2**31 - 2
EIGH, HUGE = linalg.eigh, 1e6


def failing_eigh(a):
    """As LAPACK's: where it does not converge there are neither eigenvalues nor eigenvectors."""
    return jax.tree.map(lambda x: jnp.where(jnp.max(jnp.abs(a)) > HUGE, jnp.nan, x), EIGH(a))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Bases ------------------------------------------------------------------------------------------

DECOMPOSING = sorted(
    (MORE_BASES | RULES).keys()
    - {"random", "histogram", "topk", "permutation", "weighted_permutation", "common_directions"}
    - {"drop_oldest", "drop_smallest"}
)


@pytest.mark.parametrize("name", DECOMPOSING)
def test_a_failed_eigenproblem_is_seen_and_counters_may_end(name, monkeypatch):
    """NaN in place of an eigenbasis must not pass for an empty one."""
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    basis = (MORE_BASES | RULES)[name]

    @jax.jit
    def absorb(state, i, size):
        columns = [size * x[None] for x in LAYOUT.flatten(jax.tree.map(lambda x: x[i], NOISE))]
        given = SymmetricCorrection(columns, jnp.ones((1, 1)))
        key = jax.random.fold_in(jax.random.key(0), i)
        done = basis.absorb(LAYOUT, state, given, jnp.ones(1, bool), key)
        return done, basis.eigenbasis(done.state)

    state = basis.init(LAYOUT, jax.random.key(0))
    for i in range(9):
        done, view = absorb(state, i, 1.0)
        state = done.state
    failed, after = absorb(state, 9, HUGE)
    assert failed.failed.all() and not done.failed.any()
    assert view.live.any() and trials.whole(failed.state)
    assert_same(after, view)
    assert_same(failed.c, jnp.eye(failed.c.shape[-1])[None]) if name != "learned" else None

    state = trials.aged(state, LAST)
    for i in range(9, 14):
        done, view = absorb(state, i, 1.0)
        state = done.state
        assert not done.failed.any() and view.live.any()
        assert 0.01 < float(view.lam[0, 0]) < 1e3
    assert all(np.all(x >= 0) for x in jax.tree.leaves(state) if x.dtype == jnp.int32)


@pytest.mark.parametrize("name", INNERS)
def test_counters_of_inner_parts_may_end(name):
    """A part that has counted to the end of its integers goes on as it did just before."""
    part = lro.inner.as_inner(INNERS[name])
    eye = jnp.eye(3)
    context = Context(
        jnp.array([1.0, -2.0, 0.5]),
        Eigenbasis(jnp.array([3.0, 2.0, 1.0]), jnp.ones(3, bool)),
        jnp.asarray(True),
        eye,
        jnp.ones(3),
        jnp.ones(3),
        jnp.array([1.0, 2.0, 3.0]),
    )
    start = part.init(3, jnp.float32)
    ends = []
    for at in (2**30, LAST):
        state = trials.aged(start, at)
        for _ in range(4):
            u, state = part.update(context.g, state, context)
        assert np.all(np.isfinite(u)) and np.any(u)
        ends.append(u)
    assert_same(*ends)


@pytest.mark.parametrize("period", [1, 3, 7])
def test_tally_keeps_its_remainder(period):
    counter = jnp.asarray(LAST - LAST % period, jnp.int32)
    for i in range(1, 30):
        counter = linalg.tally(counter, 1, period)
        assert int(counter) > 2**31 - 32 and int(counter) % period == i % period
    assert int(linalg.tally(jnp.asarray(5), 4)) == 9
    assert int(linalg.tally(counter, 1000)) == int(counter)


def test_a_full_matrix_turns_after_its_counter_has_ended():
    basis = lro.basis.FullMatrix(0.9, update_every=3)
    state = trials.aged(basis.init(LAYOUT, jax.random.key(0)), LAST - LAST % 3)
    turns = []
    absorb = jax.jit(
        lambda state, g: basis.absorb(
            LAYOUT,
            state,
            SymmetricCorrection([x[None] for x in g], jnp.ones((1, 1))),
            jnp.ones(1, bool),
            jax.random.key(0),
        )
    )
    for i in range(7):
        done = absorb(state, LAYOUT.flatten(jax.tree.map(lambda x, i=i: x[i], NOISE)))
        turns.append(bool(np.any(done.state.t != state.t)))
        state = done.state
    assert turns == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["random", "permutation", "weighted_permutation"])
def test_draws_go_on_after_the_counters_have_ended(name):
    tx = lro.scale_by_lre(COVARIANCE, MORE_BASES[name], lro.inner.EMA(0.0))
    state = trials.aged(tx.init(jax.tree.map(lambda x: x[0], NOISE)), LAST)
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 6, axis=0), NOISE)
    run = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, g))
    end, updates = run(state, same)
    steps = np.concatenate([np.reshape(u, (6, -1)) for u in jax.tree.leaves(updates)], axis=1)
    assert len(np.unique(steps, axis=0)) == 6 and int(end.steps[0]) > LAST - 2 * linalg.DRAWS


# Streams ----------------------------------------------------------------------------------------

BOUNDS = {"eigen": 1.5e-6, "ggt": 5e-2, "opast": 3e-6, "subspace_iteration": 3e-6, "cayley": 2e-6}
"""``|Q^T Q - I|``: of `GGT` what a Gram matrix resolves at ``eig_tol=1e-5``, else a few tens of
float32's roundings, of which every processor has its own."""


@pytest.mark.parametrize("name", BOUNDS)
def test_odd_streams_leave_the_basis_orthonormal(name):
    """Ten thousand steps of every kind of stream, one kind after the other."""
    many = 10_000 // len(trials.STREAMS)
    parts = [make(np.random.default_rng(i), many) for i, make in enumerate(trials.STREAMS.values())]
    run = jax.jit(trials.watch((BASES | MORE_BASES | RULES)[name], DEFAULT))
    (_, state), (updates, pictures) = run(trials.tree(np.concatenate(parts)))
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert trials.whole(state) and int(state.events.eigh[0] + state.events.inner[0]) == 0
    assert trials.orthogonality(pictures).max() <= BOUNDS[name]


# Numbers ----------------------------------------------------------------------------------------


def runner(tx):
    start = trials.tree(np.zeros(trials.SIZE))
    step = lambda state, g: tx.update(g, state, start)[::-1]
    return jax.jit(lambda g: jax.lax.scan(step, tx.init(start), g))


SPOILED = {
    "ggt": lro.scale_by_lre(COVARIANCE, BASES["ggt"], lro.inner.Adam(), update_every=3),
    "cayley": lro.scale_by_lre(COVARIANCE, RULES["cayley"], lro.inner.Adam()),
    "soap_muon": lro.soap_muon(1e-2),
}
RUNNERS = {}


@settings(max_examples=10)
@given(
    st.sampled_from(sorted(SPOILED)),
    st.integers(0, 2**32 - 1),
    st.sets(st.sampled_from(sorted(trials.VALUES)), min_size=1),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_spoiled_gradients_do_no_harm(name, seed, values, share):
    """Updates and state stay finite, and sound steps move again."""
    run = RUNNERS.setdefault(name, runner(SPOILED[name]))
    rng = np.random.default_rng(seed)
    state, updates = run(trials.tree(trials.spoiled(rng, 60, share, sorted(values))))
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert trials.whole(state)
    assert all(np.any(np.reshape(u[-10:], (10, -1)), axis=1).all() for u in updates.values())


@pytest.mark.parametrize("name", ["PAST", "PETRELS"])
def test_spoiled_vectors_leave_a_tracker_that_can_be_read(name):
    """Huge vectors let rows of least squares grow until moments in their units overflowed."""
    tracker = getattr(online.trackers, name)(3)
    start = tracker.init(jax.random.key(0), jnp.zeros(trials.SIZE))
    rng = np.random.default_rng(0)
    streams = [trials.spoiled(rng, 200, 0.1, ["fourth power overflows"]) for _ in range(20)]
    ends = jax.jit(jax.vmap(lambda v: tracker.update(start, v)))(np.stack(streams))
    assert trials.whole(ends.memory)
    assert np.all(np.isfinite(jax.vmap(lambda s: tracker.operator(s).rows)(ends)))


def test_what_was_collected_cannot_block_the_basis(monkeypatch):
    """A gradient on which the eigenproblem fails, taken in by a step that was not due."""
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    run = runner(lro.scale_by_lre(COVARIANCE, BASES["ggt"], DEFAULT, update_every=3))
    g = jax.tree.map(lambda x: jnp.asarray(x).at[4].multiply(HUGE), NOISE)
    state, updates = run(g)
    assert int(state.events.eigh[0]) == 2 and int(state.steps[0]) == 14
    assert all(np.any(u[-1]) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_loss_that_is_not_finite_is_not_collected(value):
    tx = lro.scale_by_lre(
        lro.experimental.CovarianceTimesLoss(), BASES["ggt"], DEFAULT, update_every=3
    )
    step = lambda state, given: (tx.update(given[0], state, value=given[1])[1], None)
    state = tx.init(jax.tree.map(lambda x: x[0], NOISE))
    values = jnp.linspace(2, 1, 16).at[4].set(value)
    state, _ = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(state, (NOISE, values))
    assert int(state.events.eigh[0]) == 0 and int(state.steps[0]) == 16 and trials.whole(state)


@pytest.mark.parametrize("bad", [np.nan, 1e25])
def test_columns_that_are_not_finite_leave_the_basis(bad):
    """Of examples or of a Hessian: the gradient beside them is sound."""
    tx = lro.scale_by_lre(lro.curvature.EmpiricalFisher(), BASES["eigen"], lro.inner.Adam())
    update = jax.jit(lambda g, s, given: tx.update(g, s, per_example_grads=given))
    state = tx.init(jax.tree.map(lambda x: x[0], NOISE))
    for i in range(8):
        examples = jax.tree.map(lambda x, i=i: x[i : i + 3] * (bad if i in (0, 4) else 1), NOISE)
        before = state
        updates, state = update(jax.tree.map(lambda x, i=i: x[i], NOISE), state, examples)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
        if i in (0, 4):
            assert_same(state.inner, before.inner)
            for view in (vectors, spectrum):  # rows may have been rotated that were due for it
                np.testing.assert_allclose(view(state.basis), view(before.basis), atol=1e-6)
    assert [int(n[0]) for n in state.events] == [0, 0, 2, 0]
    assert np.any(updates["a"]) and int(state.steps[0]) == 6 and trials.whole(state)


# Matrices ---------------------------------------------------------------------------------------


def test_a_side_whose_eigenproblem_fails_stays(monkeypatch):
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    tx = lro.scale_by_matrix_lre(
        lro.basis.FullMatrix(0.9), lro.basis.SubspaceIteration(2), lro.inner.Adam()
    )
    update = jax.jit(tx.update)
    state = tx.init(jax.tree.map(lambda x: x[0], NOISE))
    for i in range(4):
        before = state
        g = jax.tree.map(lambda x, i=i: x[i] * (HUGE if i == 3 else 1), NOISE)
        updates, state = update(g, state)
    (old,), (new,) = before.matrices.values(), state.matrices.values()
    assert int(new.events.eigh[0]) == 1 and not np.any(updates["a"]) and np.any(updates["b"])
    assert_same(
        (new.basis.short, new.basis.long, new.inner), (old.basis.short, old.basis.long, old.inner)
    )


@dataclasses.dataclass(frozen=True)
class Failing(lro.basis.SubspaceIteration):
    """Fails on gradients of norm above 100 and stays as it was."""

    def absorb(self, layout, state, correction, accept, key):
        size = jnp.sqrt(sum(jnp.sum(jnp.square(c)) for c in correction.columns))
        done = super().absorb(layout, state, correction, accept & (size < 100), key)
        return done._replace(failed=done.failed | (accept & (size >= 100)))


def test_the_inner_state_follows_a_side_that_turned_where_the_other_failed():
    tx = lro.scale_by_matrix_lre(lro.basis.SubspaceIteration(2), Failing(2), lro.inner.EMA(0.5))
    grads = np.random.default_rng(7).normal(size=(4, 3, 5)).astype(np.float32)
    grads[3] *= 1e3
    state = tx.init(jnp.zeros((3, 5)))
    for g in grads:
        before = state
        updates, state = jax.jit(tx.update)(jnp.asarray(g), state)
    (old,), (new,) = before.matrices.values(), state.matrices.values()
    assert int(new.events.eigh[0]) == 1 and not np.any(updates)
    np.testing.assert_array_equal(new.basis.long.t, old.basis.long.t)
    c = new.basis.short.t[0] @ old.basis.short.t[0].T
    assert np.max(np.abs(c - np.eye(2))) > 1e-2  # it turned
    moved = c @ old.inner.mean[0].reshape(2, 2)
    np.testing.assert_allclose(new.inner.mean[0].reshape(2, 2), moved, atol=1e-5)


def test_the_rest_drops_a_step_whose_square_overflows():
    """Adam's second moment would be infinite, and its update zero for ever."""
    tx = lro.soap(1.0)
    state = tx.init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    update = jax.jit(tx.update)
    for size in (1.0, 1e25, 1.0):
        g = {"w": jnp.ones((2, 3)), "b": size * jnp.ones(3)}
        updates, state = update(g, state)
        assert bool(np.any(updates["b"])) == (size == 1)
    assert trials.whole(state)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25, 3e38])
def test_polar_factors_have_no_size(size):
    tx = lro.orthogonalize()
    g = jnp.array([[1.0, 0.2, 0.0], [0.0, -0.3, 0.5]])
    of = lambda g: tx.update(g, tx.init(g))[0]
    np.testing.assert_allclose(of(jnp.float32(size) * g), of(g), atol=1e-6)


# Learners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [np.nan, np.inf, 1e15, 1e18])
def test_a_learner_of_dynamics_recovers(spoil):
    """The vector before the next one is remembered, and one that is none must not be."""
    learn = online.learner(3, (online.Dynamics(1.0),), optax.adam(1e-2))
    x = RNG.normal(size=(20, 4, 8)).astype(np.float32)
    x[5, -1, 2] = spoil
    state = learn.init(jax.random.key(0), x[0, 0])
    state, _ = jax.jit(lambda s, x: jax.lax.scan(learn.update, s, x))(state, x)
    assert int(state.count) + int(state.failed) == 20 and int(state.failed) <= 2
    assert trials.whole(state) and bool(state.after)


def test_ada_oja_leaves_out_what_overflows_its_squares():
    tracker = online.trackers.ada_oja(2)
    x = RNG.normal(size=(12, 6)).astype(np.float32)
    x[5] *= 1e12
    update, state = jax.jit(tracker.update), tracker.init(jax.random.key(0), x[0])
    for v in x:
        state = update(state, v)
    assert int(state.skipped) == 1 and int(state.seen) == 11 and trials.whole(state.memory)
