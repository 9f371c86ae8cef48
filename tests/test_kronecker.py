"""Momentum whitened along both sides: against dense float64 algebra and closed forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.engine import spikes
from lowrank_optax.engine.orthogonal import polar

RANKS = [(6, 9), (6, 4), (3, 9), (3, 4), (0, 4), (6, 0), (0, 0)]


def sides(r, s, n=2, a=6, b=9):
    """Directions that are nobody's, with eigenvalues 1, 2, ... along them and .5 outside."""
    made = []
    for seed, (size, rank) in enumerate(((a, r), (b, s))):
        side = spikes.start(n, size, rank, jax.random.key(seed), float)
        q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, size, size)))[0]
        made.append(
            side._replace(
                directions=jnp.asarray(q[:, :, :rank]),
                moments=jnp.broadcast_to(jnp.diag(1.0 + jnp.arange(rank)), (n, rank, rank)),
                rest=jnp.full(n, 0.5 if rank < size else 0.0),
            )
        )
    return made


def dense(side):
    """``Q Λ Q^T + λ (I - Q Q^T)``, with the floor that a side counts with."""
    q, (along, rest) = np.asarray(side.directions), map(np.asarray, side.eigenvalues)
    outside = np.eye(q.shape[1]) - q @ np.swapaxes(q, 1, 2)
    return q * along[:, None] @ np.swapaxes(q, 1, 2) + rest[:, :, None] * outside


def dense_inverse(side):
    return np.linalg.inv(dense(side))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_parts_of_a_matrix_make_it_up(x64, ranks):
    """And their squares its square; coordinates have their sizes."""
    short, long = sides(*ranks)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 6, 9)))
    parts = spikes.split(short, long, x)
    u = spikes.sizes(short, long, parts)
    np.testing.assert_allclose(spikes.joined(short, long, parts, u, 3 * u), 3 * x, atol=1e-12)
    total = sum(jnp.sum(part**2) for part in parts if part is not None and part is not parts.right)
    rest = 0 if parts.right is None else jnp.sum(parts.right**2)
    np.testing.assert_allclose(total + rest, jnp.sum(x**2), rtol=1e-12)


@pytest.mark.parametrize("crosswise", [True, False])
@pytest.mark.parametrize("ranks", RANKS[1:], ids=str)
def test_averages_along_and_outside_are_those_of_the_dense_matrices(x64, ranks, crosswise):
    """``Q^T S Q`` and the mean of what is outside, before the directions turn."""
    short, long = sides(*ranks)
    g = np.random.default_rng(6).normal(size=(2, 3, 6, 9))
    whitened = (dense_inverse(short), dense_inverse(long)) if crosswise else (np.eye(6), np.eye(9))
    wanted = (
        np.einsum("nmab,nbc,nmdc->nad", g, np.broadcast_to(whitened[1], (2, 9, 9)), g) / 27,
        np.einsum("nmab,nac,nmcd->nbd", g, np.broadcast_to(whitened[0], (2, 6, 6)), g) / 18,
    )
    parts = spikes.split(short, long, jnp.asarray(g))
    found = spikes.turned(short, long, parts, jnp.zeros(2), crosswise)
    for side, new, s in zip((short, long), found, wanted, strict=True):
        q = np.asarray(side.directions)
        along = np.swapaxes(q, 1, 2) @ s @ q
        size, rank = q.shape[1:]
        if rank:  # a rotation keeps the trace and the norm
            np.testing.assert_allclose(
                np.trace(new.moments, axis1=1, axis2=2),
                np.trace(along, axis1=1, axis2=2),
                rtol=2e-2,
            )
        if rank < size:
            outside = np.trace(s, axis1=1, axis2=2) - np.trace(along, axis1=1, axis2=2)
            np.testing.assert_allclose(new.rest, outside / (size - rank), rtol=1e-6)
        eye = np.swapaxes(new.directions, 1, 2) @ np.asarray(new.directions)
        np.testing.assert_allclose(eye, np.broadcast_to(np.eye(rank), eye.shape), atol=2e-3)


def test_rotations_find_eigenvectors(x64):
    """From a covariance that moved a little, to rounding; from anywhere, in the end."""
    r = np.random.default_rng(0)
    q = np.linalg.qr(r.normal(size=(32, 32)))[0]
    values = np.diag(np.logspace(0, -2, 32))
    moved = 0.05 * r.normal(size=(32, 32))
    near = np.linalg.qr(np.eye(32) + moved - moved.T)[0]
    for moments, times in ((near @ values @ near.T, 20), (q @ values @ q.T, 60)):
        found, t = jnp.asarray(moments)[None], np.eye(32)
        for _ in range(times):
            t = np.asarray(spikes.orthonormal(t[None] @ spikes.rotation(found)))[0]
            found = jnp.asarray(t.T @ moments @ t)[None]
        np.testing.assert_allclose(
            np.sort(np.diag(found[0])), np.linalg.eigvalsh(moments), rtol=1e-6
        )
        np.testing.assert_allclose(t.T @ t, np.eye(32), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (8, 40)], ids=str)
def test_the_polar_factor_keeps_singular_vectors(x64, shape):
    """Of those above a hundredth of the largest the values end near one: straight and by Gram."""
    r = np.random.default_rng(1)
    u, _, v = np.linalg.svd(r.normal(size=shape), full_matrices=False)
    g = 7e3 * u @ np.diag(np.logspace(0, -1.9, 8)) @ v
    factor, sound = polar(jnp.asarray(np.stack([g, 0 * g, np.full(shape, np.nan)])))
    np.testing.assert_array_equal(sound, [True, False, False])
    inside = u.T @ np.asarray(factor[0]) @ v.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-9)
    assert np.all((np.diag(inside) > 0.86) & (np.diag(inside) < 1.14))


def run(tx, gradients, shape):
    params = {"w": jnp.zeros(shape, gradients[0].dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        step, state = update({"w": g}, state, params)
    whole = state if isinstance(state, lro.ScaleByMatrixLREState) else state[0]
    return np.asarray(step["w"]), whole.matrices


def test_without_directions_it_is_muon(x64):
    """Nesterov's momentum's polar factor, of the size of Adam's updates."""
    r = np.random.default_rng(2)
    gradients = [jnp.asarray(r.normal(size=(5, 7))) for _ in range(4)]
    m = np.zeros((5, 7))
    for g in gradients:
        m = 0.9 * m + 0.1 * np.asarray(g)
    x = 0.9 * m + 0.1 * np.asarray(gradients[-1])
    u, _, v = np.linalg.svd(x, full_matrices=False)
    step, _ = run(lro.muon(1.0, b1=0.9, rms=0.3), gradients, (5, 7))
    inside = u.T @ (-step / (0.3 * 7**0.5)) @ v.T
    np.testing.assert_allclose(inside, np.eye(5), atol=0.14)


def test_shampoo_of_complete_sides_is_the_dense_one(x64):
    """``L^{-1/2} M R^{-1/2}`` with both sides' own averages, once their directions have settled."""
    r = np.random.default_rng(3)
    left, right = (np.diag(np.linspace(1, 3, n)) for n in (4, 6))
    base = [left @ r.normal(size=(4, 6)) @ right for _ in range(6)]
    gradients = [jnp.asarray(base[i % 6]) for i in range(400)]
    tx = lro.kl_shampoo(1.0, b1=0.0, update_every=1, beta=0.99)
    step, matrices = run(tx, gradients, (4, 6))
    short, long = matrices["4x6"].basis
    half = []
    for side in (short, long):
        values, vectors = np.linalg.eigh(dense(side)[0])
        half.append(vectors @ np.diag(values**-0.5) @ vectors.T)
    wanted = half[0] @ np.asarray(gradients[-1]) @ half[1]
    np.testing.assert_allclose(-step, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())


def test_a_spike_and_a_flat_rest_lose_nothing(x64):
    """Where the truth is spike and flat, two directions whiten as all of them do."""
    r = np.random.default_rng(4)
    scale = np.diag([9.0, 5.0, 1, 1, 1, 1, 1, 1])
    gradients = [jnp.asarray(r.normal(size=(5, 8)) @ scale) for _ in range(300)]
    few, _ = run(lro.scale_by_kronecker(None, 2, lro.inner.LInvSqrt()), gradients, (5, 8))
    all_, _ = run(lro.scale_by_kronecker(None, None, lro.inner.LInvSqrt()), gradients, (5, 8))
    cosine = np.sum(few * all_) / np.linalg.norm(few) / np.linalg.norm(all_)
    assert cosine > 0.97
    np.testing.assert_allclose(np.linalg.norm(few), np.linalg.norm(all_), rtol=0.1)


def test_matrices_take_turns(x64):
    """After the first ten steps every one of seven turns in one of three steps, and only there."""
    make = lambda: lro.scale_by_kronecker(None, 0, lro.inner.RMSProp(), update_every=3)
    params = [jnp.zeros((4, 5)) for _ in range(7)]
    tx, r = make(), np.random.default_rng(7)
    state, update = tx.init(params), jax.jit(tx.update)
    turned = []
    for _ in range(16):
        before = state.matrices["4x5"].basis.short.directions
        g = [jnp.asarray(r.normal(size=(4, 5))) for _ in params]
        _, state = update(g, state, params)
        moved = jnp.any(before != state.matrices["4x5"].basis.short.directions, axis=(1, 2))
        turned.append(np.asarray(moved))
    assert np.all(turned[:10])
    np.testing.assert_array_equal(np.sum(turned[10:13], axis=0), np.ones(7))
    np.testing.assert_array_equal(turned[10:13], turned[13:16])
    assert max(np.sum(turned[10:], axis=1)) == 3


def test_a_stack_is_its_matrices_one_by_one(x64):
    r = np.random.default_rng(8)
    g = [jnp.asarray(r.normal(size=(5, 4, 6))) for _ in range(9)]
    axes = lambda path, shape: lro.MatrixAxes((1,), (2,), (0,)) if len(shape) == 3 else None
    together, _ = run(lro.soap_muon(1.0, view=axes), g, (5, 4, 6))
    for i in range(5):
        alone, _ = run(lro.soap_muon(1.0), [x[i] for x in g], (4, 6))
        np.testing.assert_allclose(together[i], alone, atol=1e-10)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_a_bad_gradient_of_one_matrix_changes_nothing_of_it(bad):
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    tx = lro.soap_muon(0.1)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(4):
        g = {k: jax.random.normal(jax.random.key(i), (4, 6)) for k in params}
        _, state = update(g, state, params)
    step, new = update({"a": jnp.full((4, 6), bad), "b": jnp.ones((4, 6))}, state, params)
    old, now = state[0].matrices["4x6"], new[0].matrices["4x6"]
    for x, y in zip(*(jax.tree.leaves(each.basis) for each in (old, now)), strict=True):
        np.testing.assert_array_equal(x[0], y[0])
    np.testing.assert_array_equal(old.curvature[0], now.curvature[0])
    np.testing.assert_array_equal(step["a"], 0)
    assert np.all(step["b"] != 0)
    assert int(now.events.zero[0] + now.events.nonfinite[0]) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("rank", [None, 4], ids=["all", "few"])
def test_no_step_factorises(platform, rank):
    """As it is lowered for each platform: no eigenvectors, no QR, no triangular systems."""
    tx = lro.soap_muon(0.1, rank)
    params = {"w": jnp.zeros((16, 48)), "b": jnp.zeros(3)}
    step = jax.jit(tx.update).trace(params, tx.init(params), params)
    text = step.lower(lowering_platforms=(platform,)).as_text()
    assert not re.search("custom_call|triangular_solve|cholesky", text)


def test_nothing_has_the_square_of_a_long_side():
    """And there is less state than Adam's, which has two numbers for every entry."""
    tx, params = lro.soap_muon(0.1), {"w": jnp.zeros((160, 768))}
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update).trace(params, state, params)
    assert "768x768x" not in step.lower().as_text()
    assert state[0].matrices["160x768"].basis.short.directions.shape == (1, 160, 64)
    assert sum(x.size for x in jax.tree.leaves(state[0].matrices)) < 2 * 160 * 768


def test_what_is_no_matrix_goes_through_adam():
    """As if it were alone."""
    r = np.random.default_rng(11)
    g = [{"w": r.normal(size=(4, 3)), "b": r.normal(size=5)} for _ in range(6)]
    g = [jax.tree.map(jnp.float32, each) for each in g]
    ours, alone = lro.soap_muon(0.1), optax.adam(0.1)
    state, other = ours.init(g[0]), alone.init(g[0]["b"])
    for each in g:
        step, state = ours.update(each, state, each)
        wanted, other = alone.update(each["b"], other)
        np.testing.assert_allclose(step["b"], wanted, atol=1e-6)


def test_neurons_get_steps_of_one_size(x64):
    """NorMuon's link: columns of the update divided by their own averages, then one size."""
    r = np.random.default_rng(9)
    tx = lro.scale_by_neuron_rms(0.5, 0.2, eps=0.0)
    x = [r.normal(size=(6, 3)) * [1.0, 10.0, 100.0] for _ in range(3)]
    state, v = tx.init({"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)}), np.zeros(3)
    for i, each in enumerate(x):
        step, state = tx.update({"w": jnp.asarray(each), "b": jnp.ones(3)}, state)
        v = 0.5 * v + 0.5 * np.mean(each**2, axis=0)
        wanted = each / np.sqrt(v / (1 - 0.5 ** (i + 1)))
        wanted *= 0.2 / np.sqrt(np.mean(wanted**2))
        np.testing.assert_allclose(step["w"], wanted, rtol=1e-10)
    np.testing.assert_array_equal(step["b"], np.ones(3))


@pytest.mark.parametrize("power", [-0.25, -0.5])
def test_shampoo_is_the_dense_one(x64, power):
    """Momentum between the roots of both averages, as pseudo-inverses."""
    r = np.random.default_rng(10)
    gradients = [jnp.asarray(r.normal(size=(4, 3)) @ np.diag([1.0, 1, 0])) for _ in range(5)]
    step, _ = run(lro.shampoo(1.0, power=power, beta=0.9, update_every=1), gradients, (4, 3))
    left, right, m = np.zeros((4, 4)), np.zeros((3, 3)), 0
    for g in map(np.asarray, gradients):
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        m = 0.9 * m + 0.1 * g
    whole = 1 - 0.9**5

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        big = values > 1e-6 * values[-1]
        return vectors[:, big] @ np.diag(values[big] ** power) @ vectors[:, big].T

    scale = [root(left), root(right)]
    wanted = scale[0] @ (m / whole) @ scale[1]
    ratio = np.sum(step * wanted) / np.sum(wanted**2)
    np.testing.assert_allclose(step, ratio * wanted, atol=1e-8 * np.abs(step).max())
    assert ratio < 0


def test_one_sided_soap_has_one_basis():
    state = lro.soap(0.1, one_sided=True).init({"w": jnp.zeros((4, 9))})[0].matrices["4x9"]
    assert state.basis.short.matrix.shape == (1, 4, 4)
    assert state.basis.long == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"short": -1, "long": 0}, "short is -1"),
        ({"short": 1, "long": 0, "beta": 1.0}, "beta is 1.0"),
        ({"short": 1, "long": 0, "b1": -0.1}, "b1 is -0.1"),
        ({"short": 1, "long": 0, "orthogonal": 0.0}, "orthogonal is 0.0"),
        ({"short": 1, "long": 0, "update_every": 0}, "update_every is 0"),
        ({"short": 1, "long": 0, "inner": lro.inner.FullMatrixAdam()}, "elementwise parts"),
    ],
)
def test_nonsense_is_refused_with_advice(options, said):
    options = {"inner": lro.inner.RMSProp()} | options
    with pytest.raises(ValueError, match=re.escape(said)):
        lro.scale_by_kronecker(**options)


def test_every_recipe_of_this_family_goes_through_a_chain():
    """What `optax.chain` and a schedule give: the loss of a small least-squares problem falls."""
    target = jax.random.normal(jax.random.key(0), (6, 4))
    loss = lambda p: jnp.sum((p["w"] - target) ** 2) + jnp.sum((p["b"] - 1) ** 2)
    for make in (lro.soap_muon, lro.muon, lro.normuon, lro.kl_soap, lro.kl_shampoo, lro.shampoo):
        tx = optax.chain(optax.clip_by_global_norm(10.0), make(optax.linear_schedule(0.3, 0, 80)))
        params = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(3)}
        state = tx.init(params)

        def body(_, now, tx=tx):
            params, state = now
            step, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, step), state

        params, _ = jax.jit(lambda now, body=body: jax.lax.fori_loop(0, 80, body, now))(
            (params, state)
        )
        assert loss(params) < 0.02 * float(loss({"w": jnp.zeros((6, 4)), "b": jnp.zeros(3)})), make
