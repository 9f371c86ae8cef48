"""Matrix-shaped parameters against dense Kronecker products, and what the engine promises."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, INNERS, MORE_BASES
from compiling import Traced
from test_optax_contract import _common_test

import lowrank_optax as lro
from lowrank_optax import basis, inner
from lowrank_optax._core import linalg

KEEP = inner.Optax(optax.identity(), laws=optax.EmptyState())
FULL = basis.SubspaceIteration(None, 0.8)


def noise(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def steps(tx, grads):
    """Updates of every step, stacked like the gradients, and the last state."""

    @jax.jit
    def run(grads):
        step = lambda state, g: tx.update(g, state)[::-1]
        state, updates = jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)
        return updates, state

    return run(grads)


# The algebra ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("law", ["VECTOR", "SECOND_MOMENT", "THIRD_MOMENT", "MOMENTS", "MATRIX"])
def test_transport_by_factors_is_transport_by_their_product(x64, law, sides):
    law, a, b = getattr(lro, law), 3, 4
    factors = tuple(noise(n, n, n) if on else None for n, on in zip((a, b), sides, strict=True))
    whole = jnp.kron(
        *(noise(n, n, n) if on else jnp.eye(n) for n, on in zip((a, b), sides, strict=True))
    )
    state = noise(2, *[a * b] * law.axes)
    state = inner.adaptive.GradientMoments(state, state**2 + 1) if law.centred else state
    got, want = (linalg.transport(law, c, state) for c in (factors, whole))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), got, want)


class Dense:
    """The definition: averages of both sides, ``Q = Q_S (x) Q_L`` and ``C = Q_new^T Q_old``."""

    def __init__(self, sides, beta):
        self.sides, self.beta = sides, beta
        self.averages, self.n, self.q = [0.0, 0.0], 0, None

    def turn(self, g):
        """Eigenvalues, ``Q`` and ``C`` after a gradient."""
        self.n += 1
        lams, qs = [], []
        for i, square in enumerate((g @ g.T, g.T @ g)):
            self.averages[i] = self.beta * self.averages[i] + (1 - self.beta) * square
            lam, q = np.linalg.eigh(self.averages[i] / (1 - self.beta**self.n))
            live = lam > 1e-12 * lam[-1]
            on = self.sides[i]
            lams.append(np.where(live, lam, 0) if on else np.ones(len(lam)))
            qs.append(q * live if on else np.eye(len(lam)))
        old, self.q = self.q, np.kron(*qs)
        lam = np.kron(*lams) ** (1 / sum(self.sides))
        return lam, self.q, np.eye(len(lam)) if old is None else self.q.T @ old

    def adam(self, grads, centred, b1=0.9, b2=0.99, eps=1e-3):
        """With ``m`` and ``v`` from zero; LDAdam's law is for both corrected for that."""
        m = v = 0.0
        for t, g in enumerate(grads, 1):
            _, q, c = self.turn(g)
            m, v, u = np.broadcast_to(m, len(q)), np.broadcast_to(v, len(q)), q.T @ g.reshape(-1)
            if centred and t > 1:
                mean, second = m / (1 - b1 ** (t - 1)), v / (1 - b2 ** (t - 1))
                spread = c**2 @ (second - mean**2)
                v = (1 - b2 ** (t - 1)) * np.abs(spread + (c @ mean) ** 2)
            else:
                v = c**2 @ v
            m, v = b1 * (c @ m) + (1 - b1) * u, b2 * v + (1 - b2) * u**2
            yield (q @ (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))).reshape(g.shape)

    def power(self, grads, p):
        for g in grads:
            lam, q, _ = self.turn(g)
            scale = np.where(lam > 0, np.where(lam > 0, lam, 1) ** p, 0)
            yield (q @ (scale * (q.T @ g.reshape(-1)))).reshape(g.shape)


@pytest.mark.parametrize(
    "shape, sides", [((6, 4), (True, True)), ((2, 6, 2), (True, False)), ((4, 6), (False, True))]
)
@pytest.mark.parametrize("rule", ["adam", "centred", "power"])
def test_against_the_kronecker_product(x64, shape, sides, rule):
    grads = noise(0, 5, *shape)
    part = {
        "adam": inner.Adam(eps=1e-3),
        "centred": inner.Adam(eps=1e-3, centred=True),
        "power": inner.LInvSqrt(),
    }[rule]
    side = basis.SubspaceIteration(None, 0.8, floor=0.0)
    tx = lro.scale_by_matrix_lre(*(side if on else None for on in sides), part)
    views = [np.asarray(lro.default_matrix_view((), shape).matrices(g)[0]) for g in grads]
    short = [g if g.shape[0] <= g.shape[1] else g.T for g in views]
    dense = Dense(sides, 0.8)
    want = dense.power(short, -0.5) if rule == "power" else dense.adam(short, rule == "centred")
    for got, step, view in zip(steps(tx, grads)[0], want, views, strict=True):
        step = step if step.shape == view.shape else step.T
        np.testing.assert_allclose(got, step.reshape(shape), rtol=1e-6, atol=1e-7)


def test_full_matrix_sides_are_shampoo(x64):
    """``L^{-1/4} G R^{-1/4}`` with sums, as Gupta et al. define it."""
    grads, side = noise(1, 6, 3, 3), basis.FullMatrix(None)
    updates, _ = steps(lro.scale_by_matrix_lre(side, side, inner.LInvSqrt()), grads)
    left = right = 0.0
    for g, got in zip(np.asarray(grads), updates, strict=True):
        left, right = left + g @ g.T, right + g.T @ g
        power = [(q * lam**-0.25) @ q.T for lam, q in map(np.linalg.eigh, (left, right))]
        np.testing.assert_allclose(got, power[0] @ g @ power[1], rtol=1e-6, atol=1e-9)


def test_whitening_turns_with_the_gradients(x64):
    """Rotating columns and rows rotates the update: there is no preferred axis."""
    tx = lro.scale_by_matrix_lre(FULL, FULL, inner.LInvSqrt())
    grads = noise(3, 4, 5, 7)
    u, v = (np.linalg.qr(np.asarray(noise(n, n, n)))[0] for n in (5, 7))
    got, plain = steps(tx, u @ grads @ v)[0], steps(tx, grads)[0]
    np.testing.assert_allclose(got, u @ plain @ v, rtol=1e-8, atol=1e-10)


# The bases of many columns ----------------------------------------------------------------------


def test_galore_projects_onto_the_leading_singular_directions(x64):
    """For one update, and with the complement the rest of the gradient comes back scaled."""
    g = noise(5, 8, 40) * 0.5 ** jnp.arange(8)[:, None]
    p = np.linalg.svd(g)[0][:, :3]
    for complement in (0.0, 0.5):
        side = basis.SubspaceIteration(3, 0.0, oversample=2, iterations=12)
        tx = lro.scale_by_matrix_lre(side, None, KEEP, complement=complement)
        want = p @ p.T @ g
        got, state = steps(tx, g[None])
        np.testing.assert_allclose(got[0], want + complement * (g - want), atol=1e-6)
        captured = jnp.sum(want**2) / jnp.sum(g**2)
        np.testing.assert_allclose(state.matrices["8x40"].metrics.captured, captured, rtol=1e-9)
    whole = lro.scale_by_matrix_lre(basis.SubspaceIteration(8, 0.0), None, KEEP)
    np.testing.assert_allclose(steps(whole, g[None])[0][0], g, atol=1e-12)


def test_subspace_iteration_is_nearly_optimal():
    """In two iterations from a random start, and exact where the columns have low rank."""
    d, k, r = 60, 200, 8
    scales = jnp.asarray(0.85 ** np.arange(d), jnp.float32)[:, None]
    for g, least in (
        (noise(0, d, k) * scales, 0.995),
        (noise(1, d, 5) @ noise(2, 5, k), 1 - 1e-5),
    ):
        tx = lro.scale_by_matrix_lre(basis.SubspaceIteration(r, 0.9), None, KEEP)
        g = g.astype(jnp.float32)
        _, state = steps(tx, g[None])
        state = state.matrices["60x200"]
        best = np.sum(np.linalg.svd(g, compute_uv=False)[:r] ** 2) / np.sum(g**2)
        assert least * best <= state.metrics.captured[0] <= best * (1 + 1e-5)
        gram = state.basis.short.t[0] @ state.basis.short.t[0].T
        live = state.basis.short.lam[0] > 0
        assert int(jnp.sum(live)) == min(r, np.linalg.matrix_rank(g))
        np.testing.assert_allclose(gram, jnp.diag(live), atol=1e-5)


@pytest.mark.parametrize("rank", [4, None])
def test_subspace_iteration_is_the_truncated_average(x64, rank):
    """``B <- trunc(beta B + (1 - beta) sum w y y^T)``, padded groups and idle columns included."""
    from dense import absorbed, leading, matrix

    columns, weights = noise(0, 5, 12, 9), np.abs(noise(1, 5, 12))
    weights = np.where(np.arange(12) % 5 == 0, 0, weights)
    columns = jnp.where(weights[..., None] == 0, jnp.nan, columns)
    kept = basis.SubspaceIteration(rank, 0.7, oversample=5)
    got = matrix(absorbed(kept, columns, weights))
    b = np.zeros((9, 9))
    for y, w, have in zip(np.nan_to_num(columns), weights, got, strict=True):
        b = leading(0.7 * b + 0.3 * (y.T * w) @ y, rank)
        np.testing.assert_allclose(have, b, atol=1e-10)


def test_full_matrix_turns_now_and_then(x64):
    """It averages every gradient, and its eigenvectors are those of the last turn."""
    grads = noise(2, 7, 3, 4)
    often, seldom = (
        steps(lro.scale_by_matrix_lre(basis.FullMatrix(0.9, update_every=n), None, KEEP), grads)[1]
        for n in (1, 3)
    )
    often, seldom = (s.matrices["3x4"].basis.short for s in (often, seldom))
    np.testing.assert_allclose(often.matrix, seldom.matrix, rtol=1e-12)
    np.testing.assert_allclose(often.t, seldom.t, rtol=1e-12)  # the seventh is a turn for both
    state = steps(
        lro.scale_by_matrix_lre(basis.FullMatrix(0.9, update_every=3), None, KEEP), grads[:6]
    )
    state = state[1].matrices["3x4"].basis.short
    b = sum(0.1 * 0.9 ** (3 - i) * np.asarray(g @ g.T) for i, g in enumerate(grads[:4]))
    np.testing.assert_allclose(state.t[0].T * state.lam[0] @ state.t[0], b, atol=1e-12)


@pytest.mark.parametrize("name", ["ggt", "eigen", "nystrom", "random", "topk", "learned"])
def test_every_basis_is_a_side(name):
    """Without a rule inside, the update is an orthogonal projection of the gradient."""
    side = (BASES | MORE_BASES)[name]
    grads = noise(0, 3, 6, 7, dtype=jnp.float32)
    updates, state = steps(lro.scale_by_matrix_lre(None, side, KEEP, update_every=2), grads)
    for g, u in zip(grads, updates, strict=True):
        np.testing.assert_allclose(jnp.vdot(g, u), jnp.vdot(u, u), rtol=1e-4)
    captured = state.matrices["6x7"].metrics.captured[0]
    np.testing.assert_allclose(captured, jnp.sum(u**2) / jnp.sum(g**2), rtol=1e-4)
    assert captured > 1e-3


# Matrices that share bases, and what is measured ------------------------------------------------


def shampoo(groups=None, sides=(True, True), **options):
    """One update of both sides, ``L^{-1/4} G R^{-1/4}``, or of one, ``L^{-1/2} G``."""
    short, long = (basis.FullMatrix(None) if on else None for on in sides)
    return lro.scale_by_matrix_lre(short, long, inner.LInvSqrt(), groups=groups, **options)


def root(a, power):
    """``A^power`` of a symmetric matrix, without the directions that it does not have."""
    lam, q = np.linalg.eigh(a)
    return (q[:, lam > 1e-9] * lam[lam > 1e-9] ** power) @ q[:, lam > 1e-9].T


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_matrices_of_a_group_share_their_bases(x64, sides):
    """``L = sum_j G_j G_j^T`` over a group, also of matrices that stand on end."""
    grads = {"one": noise(0, 4, 6), "other": noise(1, 6, 4), "alone": noise(2, 4, 6)}
    label = lambda path: "alone" if "alone" in jax.tree_util.keystr(path) else "pair"
    updates, state = steps(shampoo(label, sides), jax.tree.map(lambda g: g[None], grads))
    assert state.matrices.keys() == {"4x6", "2x4x6"}
    pair = [np.asarray(grads["one"]), np.asarray(grads["other"]).T]
    power = -0.25 if all(sides) else -0.5
    for members, seen in (
        ([grads["alone"]], [updates["alone"][0]]),
        (pair, [updates["one"][0], updates["other"][0].T]),
    ):
        left = root(sum(g @ g.T for g in members), power) if sides[0] else np.eye(4)
        right = root(sum(g.T @ g for g in members), power) if sides[1] else np.eye(6)
        for g, u in zip(members, seen, strict=True):
            np.testing.assert_allclose(u, left @ g @ right, atol=1e-8)


@pytest.mark.parametrize("inside", ["adam", "adam_centred"])
def test_inner_states_of_a_group_move_with_its_bases(x64, inside):
    """As those of the same matrices side by side, ``[G_1 G_2]``, of which the one basis is."""
    side, rule = basis.SubspaceIteration(2, 0.5), INNERS[inside]
    one, other = noise(0, 6, 3, 5), noise(1, 6, 3, 5)
    shared = lro.scale_by_matrix_lre(side, None, rule, groups=lambda path: "all")
    updates, state = steps(shared, {"one": one, "other": other})
    beside = jnp.concatenate([one, other], axis=2)
    wide, _ = steps(lro.scale_by_matrix_lre(side, None, rule), beside)
    got = jnp.concatenate([updates["one"], updates["other"]], axis=2)
    np.testing.assert_allclose(got, wide, rtol=1e-6, atol=1e-9)
    assert state.matrices["2x3x5"].steps.shape == (1,)


def test_a_group_is_dropped_or_taken_together():
    grads = {"one": noise(0, 4, 6), "other": noise(1, 4, 6), "alone": noise(2, 4, 6)}
    grads["other"] = grads["other"].at[0, 0].set(jnp.nan)
    label = lambda path: "alone" if "alone" in jax.tree_util.keystr(path) else "pair"
    updates, state = steps(shampoo(label), jax.tree.map(lambda g: g[None], grads))
    assert not np.any(updates["one"]) and not np.any(updates["other"]) and np.any(updates["alone"])
    assert int(state.matrices["2x4x6"].events.nonfinite[0]) == 1


def test_metrics_of_matrices_are_those_of_their_kronecker_products(x64):
    grads = noise(3, 5, 4, 6)
    side = lambda rank: basis.SubspaceIteration(rank, 0.5, iterations=3)
    tx = lro.scale_by_matrix_lre(side(2), side(3), inner.Adam())
    state, before = tx.init(grads[0]), None
    for g in grads:
        before = state.matrices["4x6"].basis
        _, state = tx.update(g, state)
    now = state.matrices["4x6"]
    q, old = (jnp.kron(b.short.t[0], b.long.t[0]) for b in (now.basis, before))
    g = jnp.reshape(grads[-1], -1)
    captured = jnp.sum((q @ g) ** 2) / jnp.sum(g**2)
    np.testing.assert_allclose(now.metrics.captured[0], captured, rtol=1e-9)
    drift = 1 - jnp.sum((q @ old.T) ** 2) / len(old)
    np.testing.assert_allclose(now.metrics.drift[0], drift, rtol=1e-6)
    assert 0 < float(now.metrics.cosine[0]) < 1


@dataclasses.dataclass(frozen=True)
class MomentumCovariance(lro.curvature.SideCurvature):
    """The covariance of a momentum, written from outside."""

    decay: float = 0.5

    def init(self, like):
        return jnp.zeros(like.shape, like.dtype)

    def measure(self, g, state, accept):
        m = jnp.where(accept[:, None, None, None], self.decay * state + g, state)
        return lro.curvature.SideCovariance().measure(m, (), accept)[0], m


def test_what_is_measured_on_matrices_is_a_choice(x64):
    """And a step that is dropped leaves its state as it was."""
    grads = noise(0, 3, 4, 6)
    broken = jnp.concatenate([grads[:2], grads[:1] * jnp.nan, grads[2:]])
    tx = shampoo(curvature=MomentumCovariance())
    for given in (grads, broken):
        updates, state = steps(tx, given)
        left, right, m = np.zeros((4, 4)), np.zeros((6, 6)), 0.0
        for g in np.asarray(grads):
            m = 0.5 * m + g
            left, right = left + m @ m.T, right + m.T @ m
        want = root(left, -0.25) @ grads[-1] @ root(right, -0.25)
        np.testing.assert_allclose(updates[-1], want, atol=1e-7)
        np.testing.assert_allclose(state.matrices["4x6"].curvature[0, 0], m, rtol=1e-12)


def test_a_curvature_of_vectors_is_no_curvature_of_matrices():
    with pytest.raises(ValueError, match=r"SideCovariance\(\)"):
        shampoo(curvature=lro.curvature.Covariance())


# What the engine promises -----------------------------------------------------------------------

PARAMS = {
    "square": jnp.ones((12, 12)),
    "wide": jnp.ones((12, 24), jnp.bfloat16),
    "tall": jnp.ones((24, 12), jnp.bfloat16),
    "heads": jnp.ones((12, 3, 4)),
    "bias": jnp.ones(12, jnp.float16),
    "empty": jnp.zeros((0, 3)),
    "none": None,
}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


TXS = {
    "galore": lro.galore(1e-2, rank=3, update_every=2),
    "soap": lro.soap(1e-2, update_every=2),
    "soap_low_rank": lro.soap(1e-2, rank=3, update_every=2),
}


@pytest.mark.parametrize("name", TXS)
def test_what_is_not_finite_changes_nothing(name):
    tx = TXS[name]
    update = Traced(tx.update, donate_argnums=1)
    start = tx.init(PARAMS)
    for seed in (3, 4):  # the first may only fill the bases
        _, start = update(gradients(seed), start)
    bad = gradients(1)
    bad["tall"] = bad["tall"].at[0, 0].set(jnp.nan)
    bad["bias"] = bad["bias"].at[0].set(jnp.inf)
    updates, after = update(bad, jax.tree.map(jnp.copy, start))
    for leaf, p in PARAMS.items():
        if p is not None:
            assert updates[leaf].dtype == p.dtype and bool(jnp.all(jnp.isfinite(updates[leaf])))
            assert bool(jnp.any(updates[leaf])) == (leaf in ("square", "wide", "heads"))
    old, new = start[0], after[0]
    for moment in ("mu", "nu"):
        before, now = (optax.tree.get(s.rest, moment) for s in (old, new))
        np.testing.assert_array_equal(now["bias"], before["bias"])
    assert int(new.dropped) == 1
    kind = "12x24"
    assert new.matrices[kind].events.nonfinite.tolist() == [1, 0]  # tall, wide
    mine = [s.matrices[kind]._replace(events=()) for s in (old, new)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), *mine)
    updates, _ = update(gradients(2), after)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    assert update.count == 1


@pytest.mark.parametrize("name", ["soap", "soap_low_rank"])
def test_nothing_of_the_size_of_the_whole_curvature(name):
    tx = TXS[name]
    params = {"w": jnp.zeros((40, 50))}
    state = tx.init(params)
    text = jax.jit(tx.update).lower(params, state).compile().as_text()
    sizes = re.findall(r"f32\[([\d,]+)\]", text)
    assert max(np.prod([int(n) for n in size.split(",")]) for size in sizes) <= 3 * 50 * 50


def test_vmap_is_many_optimizers():
    grads = noise(0, 4, 2, 5, 6, dtype=jnp.float32)
    tx = lro.soap(0.1, rank=2, update_every=2)
    both = jax.vmap(lambda g: steps(tx, g)[0], in_axes=1, out_axes=1)(grads)
    for i in range(2):
        np.testing.assert_allclose(both[:, i], steps(tx, grads[:, i])[0], atol=1e-5)


def test_injected_hyperparameters():
    tx = optax.inject_hyperparams(lro.soap, ("weight_decay",))(optax.linear_schedule(0.1, 0.01, 5))
    plain = lro.soap(optax.linear_schedule(0.1, 0.01, 5))
    grads = noise(0, 3, 4, 5, dtype=jnp.float32)
    for a, b in zip(steps(tx, grads)[0], steps(plain, grads)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    injected = optax.inject_hyperparams(lro.scale_by_matrix_lre)(
        FULL, None, inner.Adam(), update_every=2, complement=0.1
    )
    named = lro.scale_by_matrix_lre(FULL, None, inner.Adam(), update_every=2, complement=0.1)
    for a, b in zip(steps(injected, grads)[0], steps(named, grads)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_state_is_smaller_than_adams():
    params = {"square": jnp.zeros((96, 96)), "wide": jnp.zeros((96, 384))}
    shapes = lambda tx: jax.tree.leaves(jax.eval_shape(tx.init, params))
    size = lambda tx: sum(x.size * x.dtype.itemsize for x in shapes(tx))
    adam, small = size(optax.adam(1e-3)), 4 * 200
    for rank in (8, 16, 32):
        two = sum(rank * (a + b) + 2 * rank**2 for a, b in ((96, 96), (96, 384)))
        one = sum(rank * a + 2 * rank * b for a, b in ((96, 96), (96, 384)))
        assert 4 * two <= size(lro.soap(1e-3, rank=rank)) <= 4 * two + small < adam
        assert 4 * one <= size(lro.galore(1e-3, rank=rank)) <= 4 * one + small < adam


def test_bad_arguments_say_what_to_pass():
    make, side = lro.scale_by_matrix_lre, basis.SubspaceIteration(2)
    for call, words in (
        (lambda: make(None, None, KEEP), "pass a basis for one side"),
        (lambda: make(3, None, KEEP), "pass a part from lowrank_optax.basis"),
        (lambda: make(side, None, inner.FullMatrixAdam()), "pass elementwise parts"),
        (lambda: make(basis.Random(2), side, inner.LInv()), "combine it with"),
        (lambda: make(side, side, KEEP, update_every=0), "of at least 1"),
        (lambda: make(side, side, KEEP, complement=-1.0), "of at least 0"),
        (lambda: make(side, side, KEEP, view=(2, 3)), "a function of a leaf's path and shape"),
        (lambda: make(side, side, KEEP, rest=3), "optax.GradientTransformation"),
        (lambda: make(side, side, KEEP, dtype=int), "floating-point dtype"),
        (
            lambda: make(side, side, KEEP, view=lambda path, shape: (3, 3)).init(jnp.ones((3, 3))),
            r"return axes, such as lowrank_optax.MatrixAxes\(rows",
        ),
        (lambda: make(side, side, KEEP).init(jnp.ones((3, 3), int)), "floating-point leaves"),
        (
            lambda: make(side, side, KEEP).update(
                jnp.ones((3, 4)), make(side, side, KEEP).init(jnp.ones((3, 3)))
            ),
            "shaped like the parameters",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


class MatrixContribTest(
    _common_test(
        "matrix",
        [
            {
                "opt_name": "soap",
                "opt_kwargs": {"learning_rate": 1e-2},
                "wrapper_name": None,
                "wrapper_kwargs": None,
            }
        ],
    )
):
    """optax's own tests of contributed optimizers."""

    def test_optimizers_can_be_wrapped_in_inject_hyperparams0(self):
        """As optax has it, on gradients that reach every direction.

        optax's are of rank one: of the directions without a gradient a basis has some, which two
        programs choose differently, and the states that the test compares hold them.
        """
        plain = lro.soap(1e-2)
        injected = optax.inject_hyperparams(lro.soap, "weight_decay")(learning_rate=1e-2)
        grads = noise(11, 4, 6, 6, dtype=jnp.float32)
        (ours, state), (same, other) = steps(injected, grads), steps(plain, grads)
        np.testing.assert_allclose(ours, same, atol=1e-4)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        jax.tree.map(close, state.inner_state, other)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it is one batched call")
def test_factorisations_run_one_by_one():
    """Batches of them, several at once, wait for each other in XLA's threads for ever."""
    a = noise(6, 2, 3, 5, 5, dtype=jnp.float32)
    a = a + jnp.swapaxes(a, -1, -2)
    compiled = jax.jit(jax.vmap(jax.vmap(linalg.eigh))).lower(a).compile()
    calls = [x for x in compiled.as_text().splitlines() if "syevd" in x]
    assert calls and not any(re.search(r"f32\[[23],|f32\[6,", x) for x in calls)
    lam, rows = compiled(a)
    again = np.einsum("...ri,...r,...rj->...ij", rows, lam, rows)
    np.testing.assert_allclose(again, a, atol=1e-5)


# Orthogonal updates -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 5)])
def test_orthogonalize_is_the_polar_factor(shape):
    """Newton-Schulz leaves singular values between .7 and 1.2, and the vectors as they are."""
    g = noise(4, *shape, dtype=jnp.float32)
    tx = lro.orthogonalize(rms=0.5)
    out = np.asarray(tx.update(g, tx.init(g))[0])
    _, a, b = lro.default_matrix_view((), shape).sizes(shape)
    u, _, vt = np.linalg.svd(np.asarray(g).reshape(a, b), full_matrices=False)
    inside = u.T @ out.reshape(a, b) @ vt.T / (0.5 * max(a, b) ** 0.5)
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-5)
    assert 0.6 < np.diag(inside).min() and np.diag(inside).max() < 1.3
    assert not tx.init(g)  # no state


def test_orthogonalize_leaves_the_rest_alone():
    updates = {
        "vector": jnp.arange(3.0),
        "zero": jnp.zeros((2, 3)),
        "broken": jnp.array([[jnp.nan, 1.0], [2.0, 3.0]]),
        "half": jnp.ones((2, 3), jnp.bfloat16),
    }
    tx = lro.orthogonalize()
    out, _ = jax.jit(tx.update)(updates, tx.init(updates))
    for name in ("vector", "zero", "broken"):
        np.testing.assert_array_equal(out[name], updates[name])
    assert out["half"].dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(out["half"])))


def test_orthogonalize_takes_matrices_of_one_shape_together():
    """A loop for every shape and dtype, and what one matrix alone gives."""
    shapes = {"a": (4, 6), "b": (4, 6), "c": (6, 4), "d": (2, 3)}
    updates = {name: noise(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    updates = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
    tx = lro.orthogonalize()
    step = jax.jit(lambda updates: tx.update(updates, optax.EmptyState())[0])
    assert step.lower(updates).compile().as_text().count(" while(") == 3
    for name, out in step(updates).items():
        alone = tx.update(updates[name], optax.EmptyState())[0]
        np.testing.assert_allclose(out, alone, atol=1e-6)


@pytest.mark.parametrize(("largest", "one_sided"), [(5, True), (3, False)])
def test_longer_sides_have_no_basis(largest, one_sided):
    grads = noise(3, 5, 4, 7, dtype=jnp.float32)
    ours, state = steps(lro.scale_by_matrix_lre(FULL, FULL, inner.Adam(), largest=largest), grads)
    if one_sided:
        expected, _ = steps(lro.scale_by_matrix_lre(FULL, None, inner.Adam()), grads)
    else:
        expected, _ = steps(optax.scale_by_adam(), grads)
        assert not state.matrices
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_largest_is_checked():
    with pytest.raises(ValueError, match="largest is 0"):
        lro.scale_by_matrix_lre(FULL, None, inner.Adam(), largest=0)


def test_diagnose_matrices():
    tx = optax.chain(lro.scale_by_matrix_lre(FULL, None, inner.Adam()), optax.scale(-1.0))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    seen = lro.diagnose.matrices(state)["12x24"]
    assert seen.short.shape == (2, 12) and seen.long is None
    np.testing.assert_allclose(seen.captured_energy, 1, atol=1e-2)
    assert seen.dropped.tolist() == [0, 0]
    with pytest.raises(ValueError, match="holds no state of scale_by_matrix_lre"):
        lro.diagnose.matrices(optax.sgd(1.0).init(PARAMS))


# Every direction counts ---------------------------------------------------------------------------

EVERYTHING = {
    "soap": lambda: lro.soap(1.0),
    "soap_muon": lambda: lro.soap_muon(1.0),
    "soap_low_rank": lambda: lro.soap(1.0, rank=4),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_gradient_where_the_first_had_none_is_not_lost(name):
    """Until the bases turn it lies in directions that the first gradient did not reach."""
    tx, shape = EVERYTHING[name](), (8, 64)
    first = noise(0, *shape, dtype=jnp.float32).at[:, 32:].set(0)
    second = noise(1, *shape, dtype=jnp.float32).at[:, :32].set(0)
    updates, _ = steps(tx, jnp.stack([first, second]))
    share = jnp.sum(updates[1, :, 32:] ** 2) / jnp.sum(updates[1] ** 2)
    assert share > 0.5


@pytest.mark.parametrize("name", ["soap", "soap_muon"])
def test_a_row_that_comes_back_after_a_pause_goes_downhill(name):
    """At the first step and at every one after it, as a row of an embedding does."""
    grads = noise(0, 312, 64, 8, dtype=jnp.float32).at[:304, 0].set(0).at[304:, 0].set(1)
    updates, _ = steps(EVERYTHING[name](), grads)
    rows = updates[304:, 0]
    cosines = -jnp.sum(rows, axis=1) / (jnp.linalg.norm(rows, axis=1) * 8**0.5)
    assert jnp.min(cosines) > 0.5


def test_rounding_is_not_a_direction():
    """Where a gradient is zero in truth, a basis of its own rounding is not blown up by Adam."""
    u, v = noise(0, 12, 1, dtype=jnp.float32), noise(1, 20, 1, dtype=jnp.float32)
    grads = jnp.stack([k * u @ v.T for k in (1.0, 0.7, 1.3, 0.9)])
    updates, _ = steps(lro.soap(1.0), grads)
    size = jnp.linalg.norm(u) * jnp.linalg.norm(v)
    inside = u @ (u.T @ updates[-1] @ v) @ v.T / size**2
    np.testing.assert_allclose(updates[-1], inside, atol=1e-4 * float(jnp.max(jnp.abs(inside))))


def test_all_shapes_turn_in_one_loop():
    """An accelerator waits for each loop, to know whether it runs."""
    params = {f"layer{n}": jnp.zeros((4 + n, 9 + n)) for n in range(5)}
    tx = lro.soap(1e-2)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
    assert len(re.findall(r"\bwhile\[", str(jaxpr))) == 1
