"""The small algebra against dense float64 references: bases, laws, groups, complement, freedoms."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, INNERS, ROTATION_FREE, STEADY
from dense import absorbed, after_each, matrix, outer, recursion, spectrum, vectors, window
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax._core import linalg

COVARIANCE = lro.curvature.Covariance()
EIGEN = lro.basis.Eigen


class Stream(NamedTuple):
    """Corrections of random shape: ``columns`` (steps, k, d), ``weights`` (steps, k)."""

    sizes: tuple[int, ...]
    rank: int
    columns: np.ndarray
    weights: np.ndarray


@st.composite
def streams(draw, signed=False):
    sizes = tuple(draw(st.lists(st.integers(0, 6), max_size=2))) + (draw(st.integers(1, 6)),)
    k, steps = draw(st.integers(1, 3)), 9
    rank = draw(st.integers(k, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = rng.normal(size=(steps, k, sum(sizes))) * 10 ** draw(st.integers(-3, 3))
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=(steps, k))
    if signed:
        weights *= rng.choice([-1, 1], size=(steps, k))
    weights[0, 0] = 1.0
    return Stream(sizes, rank, columns, weights)


def dense_gradients(steps=6, d=8, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, d))


def assert_same(ours, reference, tol=1e-9):
    """Equal to ``tol`` times the reference's own size, step by step."""
    size = np.abs(reference).reshape(len(reference), -1).max(1)
    error = np.abs(ours - reference).reshape(len(reference), -1).max(1)
    np.testing.assert_array_less(error, tol * size + 1e-300)


def assert_eigenpairs(state, reference, tol=1e-9):
    """``Q`` orthonormal on live slots, ``lam`` descending by size, ``Q lam Q^T`` the reference."""
    q, lam = vectors(state), spectrum(state)
    live = (lam != 0).astype(float)
    np.testing.assert_allclose(
        q @ np.swapaxes(q, -1, -2), live[..., None] * np.eye(lam.shape[-1]), atol=tol
    )
    assert np.all(np.diff(np.abs(lam), axis=-1) <= tol * np.abs(lam[:, :1]))
    assert_same(matrix(state), reference, tol)


# Bases ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@settings(max_examples=4)
@given(streams(), st.sampled_from([None, 1.0, 0.7]))
def test_ggt_is_the_svd_of_its_window(stream, beta):
    basis = lro.basis.GGT(stream.rank, beta=beta, eig_tol=1e-10)
    state = absorbed(basis, stream.columns, stream.weights, sizes=stream.sizes)
    reference = window(stream.columns, stream.weights, stream.rank, beta)
    assert_eigenpairs(state, reference, 1e-6)
    # The leading eigenvalues, which no tolerance touches, from singular values.
    for lam, dense in zip(spectrum(state), reference, strict=True):
        np.testing.assert_allclose(lam[0], np.linalg.svd(dense)[1][0], rtol=1e-10)


@pytest.mark.usefixtures("x64")
@settings(max_examples=3)
@given(streams(signed=True))
def test_ggt_with_signed_weights(stream):
    basis = lro.basis.GGT(stream.rank, eig_tol=1e-10)
    state = absorbed(basis, stream.columns, stream.weights, sizes=stream.sizes, signed=True)
    assert_eigenpairs(state, window(stream.columns, stream.weights, stream.rank), 1e-6)


@pytest.mark.usefixtures("x64")
def test_ggt_takes_the_last_columns_that_are_on():
    rng = np.random.default_rng(0)
    columns, weights = rng.normal(size=(6, 4, 9)), rng.choice([0.0, 1.0], size=(6, 4))
    state = absorbed(lro.basis.GGT(2), columns, weights)
    assert_eigenpairs(state, window(columns, weights, 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "every, basis",
    [(2, lro.basis.GGT(3, beta=0.5)), (5, lro.basis.GGT(3)), (5, EIGEN(3, 0.5, eig_tol=1e-6))],
    ids=["in_order", "window", "recursion"],
)
def test_collected_gradients(every, basis):
    """Between two updates the last ``rank`` gradients are kept."""
    g = dense_gradients(11)
    tx = lro.scale_by_lre(COVARIANCE, basis, lro.inner.NanToZero(), update_every=every)
    _, states = after_each(tx, jnp.asarray(g))
    columns, weights = np.zeros((0, 3, 8)), np.zeros((0, 3))
    for last in range(0, 11, every):
        since = g[max(0, last - every + 1) : last + 1][-3:]
        pad = 3 - len(since)
        columns = np.concatenate([columns, np.pad(since, ((pad, 0), (0, 0)))[None]])
        weights = np.concatenate([weights, np.repeat([0.0, 1.0], [pad, len(since)])[None]])
    if isinstance(basis, EIGEN):
        reference = recursion(columns, weights, 3, 0.5, 1e-6)
    else:
        reference = window(columns, weights, 3, basis.beta)
    due = jax.tree.map(lambda x: x[::every], states.basis)
    assert_eigenpairs(due, reference)


@pytest.mark.usefixtures("x64")
@settings(max_examples=4)
@given(streams(), st.sampled_from([None, 0.9, 0.5]), st.booleans(), st.integers(3, 5))
def test_eigen_is_the_truncated_recursion(stream, beta, signed, buffer):
    weights = stream.weights * (np.array([1, -1, 1])[: stream.weights.shape[1]] if signed else 1)
    basis = EIGEN(stream.rank, beta, eig_tol=1e-6, buffer=buffer)
    state = absorbed(basis, stream.columns, weights, sizes=stream.sizes, signed=signed)
    reference = recursion(stream.columns, weights, stream.rank, beta, 1e-6)
    assert_eigenpairs(state, reference)


@pytest.mark.usefixtures("x64")
def test_eigen_takes_more_columns_than_it_buffers_in_chunks():
    rng = np.random.default_rng(0)
    columns, weights = rng.normal(size=(5, 5, 9)), np.ones((5, 5))
    state = absorbed(EIGEN(3, buffer=2), columns, weights)
    assert_eigenpairs(state, recursion(columns, weights, 3, 0.9, 1e-4, buffer=2))


@pytest.mark.usefixtures("x64")
def test_rotations_change_nothing():
    """At a rank that truncates, over many rotations of different rhythm."""
    columns = np.random.default_rng(0).normal(size=(40, 1, 12))
    weights = np.ones((40, 1))
    kept = [matrix(absorbed(EIGEN(5, buffer=b), columns, weights)) for b in (1, 7, 50)]
    for other in kept[1:]:
        assert_same(other, kept[0], 1e-11)


@pytest.mark.usefixtures("x64")
@settings(max_examples=3)
@given(streams(), st.sampled_from([None, 0.9]), st.booleans())
def test_full_matrix(stream, beta, signed):
    weights = stream.weights * (np.array([1, -1, 1])[: stream.weights.shape[1]] if signed else 1)
    b, reference = np.eye(stream.columns.shape[-1]), []
    for many, ws in zip(stream.columns, weights, strict=True):
        if ws.any():  # with every column switched off there is no correction
            b = b + outer(many, ws) if beta is None else beta * b + (1 - beta) * outer(many, ws)
        lam, q = np.linalg.eigh(b)
        reference.append(b if signed else (q * np.maximum(lam, 0)) @ q.T)
    state = absorbed(
        lro.basis.FullMatrix(beta), stream.columns, weights, sizes=stream.sizes, signed=signed
    )
    assert_eigenpairs(state, np.stack(reference))


@pytest.mark.parametrize(
    "basis",
    [lro.basis.GGT(5), EIGEN(5, buffer=3), lro.basis.FullMatrix()],
    ids=lambda basis: type(basis).__name__,
)
def test_single_precision(basis):
    columns = dense_gradients(12, 9).astype(np.float32)[:, None]
    weights = np.ones((12, 1), np.float32)
    exact = columns.astype(np.float64)
    if isinstance(basis, lro.basis.GGT):
        reference = window(exact, weights, 5)
    elif isinstance(basis, EIGEN):
        reference = recursion(exact, weights, 5, 0.9, 1e-4)
    else:
        b, reference = np.eye(9), []
        for many in exact:
            b = 0.9 * b + 0.1 * outer(many, np.ones(1))
            reference.append(b)
        reference = np.stack(reference)
    assert_eigenpairs(absorbed(basis, columns, weights), reference, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options, formula",
    [
        ({"eig_tol": 0.2}, lambda lam: np.where(lam > 0.2 * lam.max(), lam, 0)),
        ({"damping": 0.5}, lambda lam: lam + 0.5),
        ({"rdamping": 0.1}, lambda lam: lam + 0.1 * lam.max()),
        ({"truncate": 2}, lambda lam: np.where(np.arange(4) < 2, lam, 0)),
        (
            {"eig_tol": 0.1, "damping": 0.5, "truncate": 3},
            lambda lam: np.where((lam > 0.1 * lam.max()) & (np.arange(4) < 3), lam + 0.5, 0),
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_spectrum_options(options, formula):
    """In the state without prefix, for the step alone with ``update_``."""
    g = dense_gradients(4)
    lam, q = np.linalg.eigh(g.T @ g)
    lam, q = lam[:-5:-1], q[:, :-5:-1]
    power = np.divide(1, formula(lam), where=formula(lam) != 0, out=np.zeros(4))
    step = (q * power) @ q.T @ g[-1]

    for prefix in ("", "update_"):
        basis = lro.basis.GGT(4, **({"eig_tol": 0.0} | {prefix + k: v for k, v in options.items()}))
        tx = lro.scale_by_lre(COVARIANCE, basis, lro.inner.LInv())
        updates, states = after_each(tx, jnp.asarray(g))
        np.testing.assert_allclose(updates[-1], step, rtol=1e-9)
        stored = formula(lam) if prefix == "" else lam
        np.testing.assert_allclose(states.basis.lam[-1, 0], stored, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_spectrum_abs():
    columns = np.random.default_rng(0).normal(size=(1, 3, 6))
    weights = np.array([[1.0, -2.0, 0.5]])
    plain = spectrum(absorbed(lro.basis.GGT(3), columns, weights, signed=True))
    assert (plain < 0).any()
    positive = absorbed(lro.basis.GGT(3, abs=True), columns, weights, signed=True)
    np.testing.assert_allclose(spectrum(positive), np.abs(plain))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [None, 0.9])
def test_eigen_step_sees_corrected_and_damped_eigenvalues(beta):
    g = dense_gradients(5)
    tx = lro.scale_by_lre(COVARIANCE, EIGEN(3, beta, update_damping=0.25), lro.inner.LInv())
    updates, _ = after_each(tx, jnp.asarray(g))
    kept = recursion(g[:, None], np.ones((5, 1)), 3, beta, 1e-4)
    for i, (b, update) in enumerate(zip(kept, updates, strict=True)):
        lam, q = np.linalg.eigh(b)
        lam, q = lam[-min(3, i + 1) :], q[:, -min(3, i + 1) :]
        lam = (lam + (0.25 if i else 0)) / (1 if beta is None else 1 - beta ** (i + 1))
        np.testing.assert_allclose(update, (q / lam) @ q.T @ g[i], rtol=1e-8)


# Orthonormality ---------------------------------------------------------------------------------

NOISE = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1)


def orthogonality(basis, dimension, signals, condition):
    """Worst ``|Q^T Q - I|`` at every noise level over 2000 updates in float32, and that in units
    of ``eps * lam_max / lam_min``. ``Q`` is rebuilt in float64; each level is a group."""
    rng = np.random.default_rng(dimension)
    mix = np.stack([np.linalg.qr(rng.normal(size=(dimension, signals)))[0].T for _ in NOISE])
    mix = np.geomspace(1, 1 / condition, signals)[:, None] * mix
    noise = np.array(NOISE)[:, None, None] / dimension**0.5
    tx = lro.scale_by_lre(COVARIANCE, basis, lro.inner.NanToZero(), groups=lro.per_leaf)
    state = tx.init([jnp.zeros(dimension)] * len(NOISE))
    run = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), s, g)[0])
    errors, units = [], []
    for _ in range(20):
        g = rng.normal(size=(len(NOISE), 100, signals)) @ mix
        g = g + noise * rng.normal(size=(len(NOISE), 100, dimension))
        state = run(state, list(jnp.asarray(g, jnp.float32)))
        lam = np.asarray(state.basis.lam, np.float64)
        live = lam != 0
        q = np.stack(
            [
                np.asarray(t, np.float64) @ np.asarray(w, np.float64)
                for t, w in zip(state.basis.t, state.basis.rows, strict=True)
            ]
        )
        error = np.abs(q @ np.swapaxes(q, 1, 2) - live[..., None] * np.eye(lam.shape[1]))
        errors.append(error.max((1, 2)))
        units.append(np.finfo(np.float32).eps * lam.max(1) / np.where(live, lam, np.inf).min(1))
    return np.max(errors, 0), np.max(np.divide(errors, units), 0)


STREAMS = [(300, 4, 1), (1500, 10, 100)]


@pytest.mark.parametrize(
    "basis, bound",
    [
        (EIGEN(16), 3e-6),
        (EIGEN(16, None, eig_tol=1e-8), 3e-6),
        # What a Gram matrix resolves of the weakest direction that is kept: eps / eig_tol.
        (lro.basis.GGT(16, eig_tol=1e-2), 2e2 * np.finfo(np.float32).eps),
    ],
    ids=["eigen", "eigen_sum", "ggt"],
)
@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_orthonormal(basis, bound, stream):
    errors, _ = orthogonality(basis, *stream)
    assert (errors <= bound).all(), errors


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_ggt_is_as_orthonormal_as_a_gram_matrix_allows(stream):
    errors, in_units = orthogonality(lro.basis.GGT(16), *stream)
    assert (in_units <= 4).all(), in_units
    if stream == (300, 4, 1):
        assert (errors[:-1] <= 1e-5).all(), errors


# Laws -------------------------------------------------------------------------------------------


def carry(c, ledger):
    """Every law as its formula says, on full tensors."""
    diagonal = lambda t: np.einsum("i" * t.ndim + "->i", t)
    third = np.zeros((len(c),) * 3)
    np.einsum("iii->i", third)[:] = ledger["third"]
    mean, second = ledger["pair"]
    cubed = np.einsum("ai,bj,ck,ijk->abc", c, c, c, third)
    return {
        "scalar": ledger["scalar"],
        "vector": c @ ledger["vector"],
        "second": np.diag(c @ np.diag(ledger["second"]) @ c.T),
        "third": diagonal(cubed),
        "matrix": c @ ledger["matrix"] @ c.T,
        "tensor": np.einsum("ai,bj,ck,ijk->abc", c, c, c, ledger["tensor"]),
        "pair": (c @ mean, np.diag(c @ np.diag(second - mean**2) @ c.T) + (c @ mean) ** 2),
    }


def powers(u):
    """What a step with coordinates ``u`` adds to the ledger."""
    return {
        "scalar": 1.0,
        "vector": u,
        "second": u**2,
        "third": u**3,
        "matrix": u[:, None] * u,
        "tensor": u[:, None, None] * u[:, None] * u,
        "pair": (0.1 * u, u**2),
    }


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A state under every law."""

    @property
    def laws(self):
        return {
            "scalar": lro.SCALAR,
            "vector": lro.VECTOR,
            "second": lro.SECOND_MOMENT,
            "third": lro.THIRD_MOMENT,
            "matrix": lro.MATRIX,
            "tensor": lro.TENSOR,
            "pair": lro.MOMENTS,
        }

    def init(self, rank, dtype):
        zeros = powers(jnp.zeros(rank, dtype)) | {"scalar": jnp.zeros((), dtype)}
        return zeros | {"pair": lro.inner.adaptive.GradientMoments(*zeros["pair"])}

    def update(self, u, state, context):
        new = powers(u)
        new["pair"] = lro.inner.adaptive.GradientMoments(*new["pair"])
        return u, jax.tree.map(jnp.add, state, new)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("basis", BASES)
def test_states_follow_their_laws(basis, every):
    g = dense_gradients()
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], Ledger(), update_every=every)
    updates, states = after_each(tx, jnp.asarray(g))
    q = vectors(states.basis)
    last = np.zeros_like(q[0])
    expected = jax.tree.map(lambda x: np.zeros(x.shape[2:]), states.inner)
    expected["pair"] = tuple(expected["pair"])
    for i in range(len(g)):
        if i % every == 0:
            expected = carry(q[i] @ last.T, expected)
            last = q[i]
        expected = jax.tree.map(np.add, expected, powers(q[i] @ g[i]))
        found = jax.tree.map(lambda x, i=i: x[i, 0], states.inner)
        found["pair"] = tuple(found["pair"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)
        np.testing.assert_allclose(updates[i], q[i].T @ q[i] @ g[i], atol=1e-10)


# Groups -----------------------------------------------------------------------------------------

TREE_SIZES = {"a": (3, 2), "b": (5,), "c": (), "d": (4,)}


def tree_gradients(steps=7, seed=1):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=(steps, *s))) for k, s in TREE_SIZES.items()}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    "groups, members",
    [(lro.per_leaf, ["a", "c"]), (lambda path: path[0].key in "ad", ["bc"])],
    ids=["per_leaf", "function"],
)
def test_groups_are_separate_optimizers(basis, groups, members):
    g = tree_gradients()
    options = {"curvature": COVARIANCE, "basis": BASES[basis], "inner": STEADY}
    together, _ = after_each(lro.scale_by_lre(**options, groups=groups), g)
    for names in members:
        alone, _ = after_each(lro.scale_by_lre(**options), {k: g[k] for k in names})
        for k in names:
            np.testing.assert_allclose(together[k], alone[k], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", BASES)
def test_how_a_vector_is_cut_into_pieces_does_not_matter(basis):
    g = tree_gradients()
    flat = jnp.concatenate([x.reshape(7, -1) for x in g.values()], axis=1)
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], STEADY)
    cut, whole = after_each(tx, g)[0], after_each(tx, flat)[0]
    cut = np.concatenate([np.reshape(x, (7, -1)) for x in cut.values()], axis=1)
    np.testing.assert_allclose(cut, whole, atol=1e-12)


# Complement -------------------------------------------------------------------------------------


COMPLEMENTS = {
    "none": (None, lambda apart: 0 * apart),
    "zero": (0.0, lambda apart: 0 * apart),
    "scale": (0.3, lambda apart: 0.3 * apart),
    "optax": (
        optax.trace(0.5),
        lambda apart: np.stack(
            [sum(0.5 ** (i - j) * apart[j] for j in range(i + 1)) for i in range(len(apart))]
        ),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", ["ggt", "eigen"])
@pytest.mark.parametrize("name", COMPLEMENTS)
def test_complement(basis, name):
    g = tree_gradients()
    complement, formula = COMPLEMENTS[name]
    # Between two updates of the basis, the gradient is not inside it.
    options = {"complement": complement, "update_every": 2}
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], lro.inner.NanToZero(), **options)
    updates, states = after_each(tx, g)
    flat = lambda tree: np.concatenate([np.reshape(x, (7, -1)) for x in tree.values()], axis=1)
    q = vectors(states.basis)
    inside = np.einsum("sri,srj,sj->si", q, q, flat(g))
    assert np.abs(inside).max() > 0.1 and np.abs(flat(g) - inside).max() > 0.1
    np.testing.assert_allclose(flat(updates), inside + formula(flat(g) - inside), atol=1e-10)


# Freedoms of the eigenvectors -------------------------------------------------------------------


def chain(names):
    parts = [INNERS[name] for name in names]
    return [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]


def flipped(a):
    """`eigh` with other signs, which change with the data from step to step."""
    lam, vectors = EIGH(a)
    hidden = jnp.sin(1e3 * jnp.arange(1, len(lam) + 1) * jnp.sum(jnp.abs(lam)) / (lam[0] + 1e-30))
    return lam, vectors * jnp.where(hidden > 0, 1.0, -1.0)[:, None]


def turned(a):
    """`eigh` with other eigenvectors of repeated eigenvalues."""
    lam, vectors = EIGH(a)
    same = jnp.abs(lam[:, None] - lam) < 1e-9 * (1e-30 + jnp.abs(lam[0]))
    noise = jax.random.normal(jax.random.key(0), a.shape, a.dtype)
    return lam, jax.scipy.linalg.expm(jnp.where(same, noise - noise.T, 0)) @ vectors


EIGH = linalg.eigh


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", BASES)
def test_signs_of_eigenvectors_do_not_matter(basis, monkeypatch):
    g = jnp.asarray(dense_gradients(8))
    parts = ("amsgrad", "cautious", "fulladam", "clip_norm_by_ema", "lion")
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], chain(parts))
    plain, before = after_each(tx, g)
    monkeypatch.setattr(linalg, "eigh", flipped)
    other, after = after_each(tx, g)
    signs = np.sum(vectors(before.basis) * vectors(after.basis), axis=-1)
    assert (signs < -0.5).any() and (signs > 0.5).any()
    np.testing.assert_allclose(other, plain, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", ["ggt", "eigen_sum", "full"])
def test_rotations_of_repeated_eigenvectors_do_not_matter(basis, monkeypatch):
    """Gradients go round four axes, so that eigenvalues repeat."""
    g = jnp.asarray(np.tile(np.eye(4, 8), (3, 1)))
    parts = BASES | {"eigen_sum": EIGEN(4, None)}
    tx = lro.scale_by_lre(COVARIANCE, parts[basis], chain(ROTATION_FREE))
    plain, before = after_each(tx, g)
    monkeypatch.setattr(linalg, "eigh", turned)
    other, after = after_each(tx, g)
    assert np.abs(np.abs(vectors(before.basis)) - np.abs(vectors(after.basis))).max() > 0.1
    np.testing.assert_allclose(other, plain, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("basis", BASES)
def test_turned_parameters_turn_the_updates(basis):
    g = dense_gradients(8)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0]
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], (*STEADY, lro.inner.FullMatrixAdam()))
    plain, turned = jax.vmap(lambda g: after_each(tx, g)[0])(jnp.stack([g, g @ turn]))
    np.testing.assert_allclose(turned, plain @ turn, atol=1e-8)


# Corrections with two sides ---------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "basis",
    [lro.basis.GGT(6), EIGEN(6, None), lro.basis.FullMatrix(None)],
    ids=lambda basis: type(basis).__name__,
)
@pytest.mark.parametrize("signed", [False, True])
def test_symmetrize(basis, signed):
    rng = np.random.default_rng(0)
    y, z = rng.normal(size=(2, 1, 2, 7))
    weights = np.array([[1.0, -0.5 if signed else 0.5]])
    start = np.eye(7) if isinstance(basis, lro.basis.FullMatrix) else np.zeros((7, 7))
    both = np.einsum("sk,ski,skj->ij", weights, y, z)
    exact = absorbed(basis, y, weights, right=z, signed=signed, symmetrize=False)
    np.testing.assert_allclose(matrix(exact)[0], start + (both + both.T) / 2, atol=1e-10)
    single = absorbed(basis, y, weights, right=z, signed=signed, symmetrize=True)
    np.testing.assert_allclose(
        matrix(single)[0], start + outer((y[0] + z[0]) / 2, weights[0]), atol=1e-10
    )
