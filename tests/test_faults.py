"""What goes wrong: bad gradients, failing eigenproblems, wrong arguments, odd trees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, DEFAULT, STEADY
from compiling import Traced
from dense import spectrum, vectors

import lowrank_optax as lro
from lowrank_optax import inner
from lowrank_optax._core import linalg

COVARIANCE = lro.curvature.Covariance()
PARAMS = {"a": jnp.zeros(5), "b": jnp.zeros((2, 3))}
ROTATION_FREE = (inner.EMA(debias=True), inner.ClipNormByEMA(normalize=True))
HUGE = 1e6
"""A gradient of this size is what the doctored parts below fail on."""


def good(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * factor, tree)


def failing_eigh(a):
    """As LAPACK's, which gives neither eigenvalues nor eigenvectors where it does not converge."""
    bad = jnp.max(jnp.abs(a)) > HUGE
    return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), EIGH(a))


EIGH = linalg.eigh

FAULTS = {
    "nan": ("nonfinite", lambda g: g | {"a": g["a"].at[2].set(jnp.nan)}),
    "inf": ("nonfinite", lambda g: g | {"b": g["b"].at[1, 1].set(-jnp.inf)}),
    "overflow": ("nonfinite", lambda g: scaled(g, 1e30)),
    "zero": ("zero", lambda g: scaled(g, 0)),
    "eigh": ("eigh", lambda g: scaled(g, HUGE)),
}

OPTIONS = {
    "default": {},
    "every3": {"update_every": 3},
    "warmup": {"warmup_steps": 4},
    "scale": {"complement": 0.1},
    "optax": {"complement": optax.trace(0.9), "update_every": 2},
}


def history(update, state, grads):
    """Updates and states after every step."""
    result = []
    for g in grads:
        updates, state = update(g, state)
        result.append((updates, state))
    return result


def same(state, other, event=""):
    """Equal to the last bit, but for the count of calls and the events.

    Before an eigenproblem fails, rows may have been rotated that were due for it (the basis stays)
    and a gradient written behind the collected ones.
    """
    ours = state._replace(count=other.count, events=other.events)
    if event == "eigh":
        for view in (vectors, spectrum):
            np.testing.assert_allclose(view(state.basis), view(other.basis), atol=1e-5)
        ours = ours._replace(basis=other.basis, since=other.since)
        if hasattr(ours.curvature, "columns"):
            columns = other.curvature.columns
            ours = ours._replace(curvature=ours.curvature._replace(columns=columns))
    jax.tree.map(np.testing.assert_array_equal, ours, other)


def still(updates):
    return not any(np.any(u) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("basis", BASES)
def test_a_bad_step_leaves_no_trace(basis, options, monkeypatch):
    """Every fault at every point of a run: the first step, and where Eigen rotates."""
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], DEFAULT, **OPTIONS[options])
    update, fresh = Traced(tx.update), tx.init(PARAMS)
    clean = history(update, fresh, [good(i) for i in range(7)])
    for name, (event, spoil) in FAULTS.items():
        for at in range(7):
            before = clean[at - 1][1] if at else fresh
            updates, state = update(spoil(good(10)), before)
            if name == "eigh" and at % OPTIONS[options].get("update_every", 1):
                continue  # no eigenproblem was due
            assert still(updates)
            assert sum(state.events) == getattr(state.events, event) == 1
            assert int(state.count) == at + 1
            same(state, before, name)
            for i in range(at, 7):
                updates, state = update(good(i), state)
                jax.tree.map(np.testing.assert_array_equal, updates, clean[i][0])
            same(state, clean[6][1], name)
    assert update.count == 1


@pytest.mark.parametrize("options", ["default", "every3", "warmup", "optax"])
@pytest.mark.parametrize("basis", BASES)
def test_only_the_bad_group_skips(basis, options, monkeypatch, x64):
    """In float64: two programs round differently, and Adam divides by what is nearly zero.

    A full matrix has repeated eigenvalues of zero at first, whose eigenvectors are rounding alone:
    there the inner parts are some that do not depend on them.
    """
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    parts = COVARIANCE, BASES[basis], ROTATION_FREE if basis == "full" else STEADY
    tx = lro.scale_by_lre(*parts, groups=lro.per_leaf, **OPTIONS[options])
    alone = lro.scale_by_lre(*parts, **OPTIONS[options])
    update, separate = jax.jit(tx.update), jax.jit(alone.update)
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    for name in ("nan", "zero", "eigh"):
        event, spoil = FAULTS[name]
        grads = [jax.tree.map(lambda x: x.astype(float), good(i)) for i in range(7)]
        bad = 4 if options == "optax" else 3  # a step at which the basis is due
        grads[bad] = {"a": spoil(grads[bad])["a"], "b": grads[bad]["b"]}
        steps = history(update, tx.init(params), grads)
        last = steps[-1][1]
        assert getattr(last.events, event).tolist() == [1, 0]
        assert still(steps[bad][0]["a"]) and (options == "warmup" or not still(steps[bad][0]["b"]))
        for leaf in params:
            mine = [{leaf: g[leaf]} for i, g in enumerate(grads) if leaf == "b" or i != bad]
            theirs = history(separate, alone.init({leaf: params[leaf]}), mine)
            ours = [u for i, (u, _) in enumerate(steps) if leaf == "b" or i != bad]
            for x, (y, _) in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x[leaf], y[leaf], rtol=1e-7, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Touchy(inner.compose.Stateless):
    """Gives NaN where its input is huge."""

    def update(self, u, state, context):
        return jnp.where(jnp.max(jnp.abs(u)) > HUGE, jnp.nan, u), state


@pytest.mark.parametrize("basis", BASES)
def test_inner_part_that_gives_nan(basis):
    """The basis keeps what it learned, the inner state moves with it but takes no step."""
    grads = [good(0), scaled(good(1), 1e2 * HUGE), good(2)]
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], (inner.EMA(), Touchy()))
    steps = history(jax.jit(tx.update), tx.init(PARAMS), grads)
    (_, before), (updates, after), (later, _) = steps
    assert still(updates)
    assert [int(n[0]) for n in after.events] == [0, 0, 0, 1]
    assert int(after.steps[0]) == int(after.inner[0].count[0]) == 1

    plain = lro.scale_by_lre(COVARIANCE, BASES[basis], inner.NanToZero())
    learned = history(jax.jit(plain.update), plain.init(PARAMS), grads)[1][1]
    for view in (vectors, spectrum):
        np.testing.assert_allclose(view(after.basis), view(learned.basis), rtol=1e-5, atol=1e-5)
    carried = vectors(after.basis) @ vectors(before.basis).T @ before.inner[0].mean[0]
    np.testing.assert_allclose(after.inner[0].mean[0], carried, atol=1e-5)
    assert not still(later) and all(np.isfinite(u).all() for u in jax.tree.leaves(later))


def test_failure_of_an_inner_eigenproblem(monkeypatch):
    monkeypatch.setattr(linalg, "eigh", failing_eigh)
    tx = lro.scale_by_lre(COVARIANCE, BASES["eigen"], inner.FullMatrixAdam(), update_every=2)
    update = jax.jit(tx.update)
    steps = history(update, tx.init(PARAMS), [good(0), scaled(good(0), HUGE), good(2)])
    assert still(steps[1][0]) and not still(steps[2][0])
    assert [int(n[0]) for n in steps[1][1].events] == [0, 0, 0, 1]
    jax.tree.map(np.testing.assert_array_equal, steps[1][1].inner, steps[0][1].inner)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_survives_any_size(basis, dtype):
    """From the smallest to the largest number of the dtype, updates stay finite."""
    tx = lro.scale_by_lre(COVARIANCE, BASES[basis], DEFAULT)
    params = jnp.zeros(6, dtype)
    update, state = jax.jit(tx.update), tx.init(params)
    info = jnp.finfo(dtype)
    for i, size in enumerate([1.0, float(info.tiny), 1e-3, float(info.max), 1.0]):
        g = np.random.default_rng(i).uniform(0.5, 1, size=6) * size
        updates, state = update(jnp.asarray(g, dtype), state)
        assert updates.dtype == dtype and np.isfinite(updates).all()
    assert np.any(updates)


# Arguments --------------------------------------------------------------------------------------


def build(*args, **kwargs):
    return lambda: lro.scale_by_lre(*args, **kwargs)


def first(tx, grads=None):
    """Traces the first step of ``tx`` on gradients that may not be those of its parameters."""
    return jax.eval_shape(tx.update, good(0) if grads is None else grads, tx.init(PARAMS))


GGT, ADAM = lro.basis.GGT(4), inner.Adam()
TX = lro.lre(1e-2, basis=GGT)
WITHOUT_LAWS = optax.scale_by_adam()

WRONG = {
    "rank 0": (lambda: lro.basis.GGT(0), "0", "rank"),
    "rank negative": (lambda: lro.basis.Eigen(-3), "-3", "rank"),
    "rank no number": (lambda: lro.basis.GGT(2.5), "2.5", "rank"),
    "buffer 0": (lambda: lro.basis.Eigen(3, buffer=0), "0", "buffer"),
    "beta of GGT": (lambda: lro.basis.GGT(3, beta=1.5), "1.5", "[0, 1]"),
    "beta of Eigen": (lambda: lro.basis.Eigen(3, 1.0), "1.0", "[0, 1)"),
    "beta of FullMatrix": (lambda: lro.basis.FullMatrix(-0.1), "-0.1", "[0, 1)"),
    "beta NaN": (lambda: lro.basis.Eigen(3, float("nan")), "nan", "[0, 1)"),
    "eig_tol": (lambda: lro.basis.GGT(3, eig_tol=-1.0), "-1.0", "[0, 1)"),
    "update_damping": (lambda: lro.basis.GGT(3, update_damping=-1.0), "-1.0", "at least 0"),
    "truncate": (lambda: lro.basis.GGT(3, truncate=0), "0", "at least 1"),
    "b1": (lambda: inner.Adam(b1=1.0), "1.0", "[0, 1)"),
    "b2": (lambda: inner.FullMatrixAdam(b2=-0.5), "-0.5", "[0, 1)"),
    "eps": (lambda: inner.Adam(eps=-1e-8), "-1e-08", "at least 0"),
    "Lion's b1": (lambda: inner.Lion(b1=2), "2", "[0, 1)"),
    "EMA's beta": (lambda: inner.EMA("0.9"), "'0.9'", "[0, 1)"),
    "max_norm": (lambda: inner.ClipNorm(0.0), "0.0", "above 0"),
    "max_value": (lambda: inner.ClipValue(-1.0), "-1.0", "above 0"),
    "max_growth": (lambda: inner.ClipNormByEMA(max_growth=0.5), "0.5", "at least 1"),
    "power": (lambda: inner.LPower(float("inf")), "inf", "finite"),
    "no inner parts": (build(COVARIANCE, GGT, ()), "inner is empty", "Adam()"),
    "inner class": (build(COVARIANCE, GGT, inner.Adam), "Adam", "Adam()"),
    "inner string": (build(COVARIANCE, GGT, "adam"), "'adam'", "Adam()"),
    "inner of inner": (build(COVARIANCE, GGT, [ADAM, 3]), "3", "Adam()"),
    "curvature class": (build(lro.curvature.Covariance, GGT, ADAM), "Covariance", "Covariance()"),
    "curvature is a basis": (build(GGT, GGT, ADAM), "GGT", "Covariance()"),
    "basis number": (build(COVARIANCE, 20, ADAM), "20", "GGT(rank=100)"),
    "parts swapped": (build(COVARIANCE, ADAM, GGT), "Adam(b1=0.9", "GGT(rank=100)"),
    "update_every 0": (build(COVARIANCE, GGT, ADAM, update_every=0), "0", "at least 1"),
    "update_every float": (build(COVARIANCE, GGT, ADAM, update_every=1.5), "1.5", "whole"),
    "warmup_steps": (build(COVARIANCE, GGT, ADAM, warmup_steps=-1), "-1", "at least 0"),
    "complement": (build(COVARIANCE, GGT, ADAM, complement=-0.5), "-0.5", "at least 0"),
    "complement string": (build(COVARIANCE, GGT, ADAM, complement="sgd"), "'sgd'", "optax"),
    "groups": (build(COVARIANCE, GGT, ADAM, groups="leaf"), "'leaf'", "per_leaf"),
    "dtype": (build(COVARIANCE, GGT, ADAM, dtype=jnp.int8), "int8", "bfloat16"),
    "optax without laws": (build(COVARIANCE, GGT, WITHOUT_LAWS), "GradientTransformation", "laws="),
    "Optax without laws": (
        lambda: first(lro.scale_by_lre(COVARIANCE, GGT, inner.Optax(WITHOUT_LAWS))),
        "ScaleByAdamState",
        "laws=",
    ),
    "Optax of no optax": (lambda: inner.Optax(3), "3", "GradientTransformation"),
    "weight decay negative": (lambda: lro.lre(1e-2, weight_decay=-1.0), "-1.0", "at least 0"),
    "weight decay without params": (
        lambda: first(lro.lre(1e-2, basis=GGT, weight_decay=0.1)),
        "0.1",
        "params",
    ),
    "integer leaf": (lambda: TX.init({"n": jnp.arange(3)}), "int32", "optax.masked"),
    "integer gradient": (
        lambda: first(TX, grads={"a": jnp.arange(5), "b": jnp.ones((2, 3))}),
        "['a']",
        "optax.masked",
    ),
    "complex leaf": (
        lambda: TX.init({"z": jnp.zeros(2, jnp.complex64)}),
        "complex64",
        "split_real_and_imaginary",
    ),
    "leaf of another size": (
        lambda: first(TX, grads={"a": jnp.ones(4), "b": jnp.ones((2, 3))}),
        "(['a'] (4,), ['b'] (2, 3))",
        "init",
    ),
    "leaf missing": (lambda: first(TX, grads={"a": jnp.ones(5)}), "(['a'] (5,))", "init"),
    "leaf more": (lambda: first(TX, grads=good(0) | {"c": jnp.ones(2)}), "'c'", "init"),
    "leaf of another size, full": (
        lambda: first(
            lro.lre(1e-2, basis=lro.basis.FullMatrix()),
            grads={"a": jnp.ones(4), "b": jnp.ones((2, 3))},
        ),
        "10",
        "init",
    ),
    "no state": (lambda: lro.diagnose.summary(optax.sgd(1.0).init(PARAMS)), "tuple", "lre"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_came_and_what_to_pass(case):
    make, came, instead = WRONG[case]
    with pytest.raises(ValueError) as error:
        make()
    assert came in str(error.value) and instead in str(error.value), str(error.value)


def test_structure_may_not_change_inside_jit():
    state = TX.init(PARAMS)
    with pytest.raises(ValueError, match="init"):
        jax.jit(TX.update)({"a": jnp.ones(5)}, state)


# Trees ------------------------------------------------------------------------------------------

TREES = {
    "scalar": (jnp.asarray(2.0), None),
    "number": (2.0, None),
    "nested": ([jnp.ones(2), (jnp.ones((2, 1)), {"x": jnp.ones(())})], None),
    "none": ({"a": jnp.ones(3), "b": None}, "a"),
    "masked": ({"a": jnp.ones(3), "b": optax.MaskedNode()}, "a"),
    "zero-size": ({"a": jnp.ones(3), "b": jnp.ones((0, 4))}, "a"),
}


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", TREES)
def test_odd_trees(basis, name):
    params, only = TREES[name]
    tx = lro.lre(1e-1, basis=BASES[basis])
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert not still(updates)
    if only:
        state = tx.init(params[only])
        for _ in range(2):
            alone, state = update(params[only], state, params[only])
        np.testing.assert_array_equal(updates[only], alone)


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}, {"a": jnp.ones((0, 3))}], ids=str)
@pytest.mark.parametrize("basis", BASES)
def test_nothing_to_optimize(basis, params):
    tx = lro.lre(1e-1, basis=BASES[basis], complement=0.1)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert int(lro.diagnose.find(state).count) == 2
