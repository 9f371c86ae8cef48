"""Functions that users pass: what works, and what is refused by its name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

X = jnp.array([0.5, -1.0, 2.0])
RESIDUALS = lambda x: jnp.array([x[0] * x[1] - 1, x[1] + x[2], jnp.sin(x[2]), x[0] - x[2]])


def squares(fn, x=X):
    """The first step of `levenberg_marquardt`."""
    tx = lro.levenberg_marquardt(trials=1, momenta=(0.0,), order=1)
    updates, state = jax.jit(lambda x: tx.update(x, tx.init(x), x, residuals_fn=fn))(x)
    return updates, state.loss


@functools.cache
def curvature(kind, name, fn):
    tx = lro.lre(0.1, curvature=kind, basis=lro.basis.Eigen(4), inner=(lro.inner.LInv(),))
    return jax.jit(lambda x: tx.update(x, tx.init(x), x, **{name: fn})[0])(X)


def gauss_newton(fn):
    return curvature(lro.curvature.GaussNewton(), "residuals_fn", fn)


def fisher(fn):
    return curvature(lro.curvature.EmpiricalFisher(), "losses_fn", fn)


def hessian(fn):
    return curvature(lro.curvature.HutchinsonHessian(), "value_fn", fn)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: RESIDUALS(x).reshape(2, 2),
        lambda x: tuple(RESIDUALS(x)),
        lambda x: {"a": RESIDUALS(x)[:1], "b": [RESIDUALS(x)[1:].reshape(1, 3), None]},
    ],
    ids=["matrix", "tuple", "tree"],
)
def test_residuals_are_any_tree(fn):
    want, _ = squares(RESIDUALS)
    np.testing.assert_allclose(squares(fn)[0], want, rtol=1e-5)
    np.testing.assert_allclose(gauss_newton(fn), gauss_newton(RESIDUALS), rtol=1e-5)


def test_complex_residuals_are_two_each():
    """An imaginary part counts: ``‖r‖² = Σ |r|²``."""
    parts = lambda x: jnp.concatenate([RESIDUALS(x)[:2], RESIDUALS(x)[2:]])
    joined = lambda x: jax.lax.complex(RESIDUALS(x)[:2], RESIDUALS(x)[2:])
    for a, b in zip(squares(joined), squares(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gauss_newton(joined), gauss_newton(parts), rtol=1e-6)


def test_no_residuals_and_no_parameters_change_nothing():
    updates, loss = squares(lambda x: x[:0])
    np.testing.assert_array_equal(updates, 0)
    assert float(loss) == 0
    for empty in ({}, {"a": jnp.zeros((0, 3))}):
        updates, loss = squares(lambda p: jnp.ones(2), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty) and float(loss) == 1


@pytest.mark.parametrize(
    "bad",
    [lambda x: jnp.arange(3), lambda x: None, lambda x: {"a": x, "b": x > 0}, lambda x: "no", 3.0],
    ids=["integers", "nothing", "booleans", "text", "no function"],
)
@pytest.mark.parametrize("run", [squares, gauss_newton])
def test_residuals_are_refused_by_name(run, bad):
    with pytest.raises(ValueError, match="residuals_fn.*; pass"):
        run(bad)


LOSSES = lambda x: RESIDUALS(x) ** 2


@pytest.mark.parametrize(
    "fn",
    [lambda x: LOSSES(x)[:, None], lambda x: LOSSES(x)[None], lambda x: (LOSSES(x), {"a": x})],
    ids=["column", "row", "with aux"],
)
def test_losses_have_one_axis(fn):
    np.testing.assert_allclose(fisher(fn), fisher(LOSSES), rtol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: jnp.sum(LOSSES(x)),
        lambda x: LOSSES(x).reshape(2, 2),
        lambda x: LOSSES(x) + 0j,
        lambda x: {"a": LOSSES(x)},
        lambda x: jnp.arange(3),
    ],
    ids=["scalar", "matrix", "complex", "dictionary", "integers"],
)
def test_losses_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="losses_fn.*; pass"):
        fisher(bad)


LOSS = lambda x: jnp.sum(RESIDUALS(x) ** 2) / 2


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: LOSS(x)[None],
        lambda x: LOSS(x).reshape(1, 1),
        lambda x: (LOSS(x), {"logits": x}),
        lambda x: (LOSS(x), LOSS(x)),
    ],
    ids=["vector", "matrix", "with aux", "with a scalar"],
)
def test_losses_of_one_entry_are_scalars(fn):
    np.testing.assert_allclose(hessian(fn), hessian(LOSS), rtol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x,
        lambda x: LOSS(x) + 0j,
        lambda x: (LOSS(x), x, x),
        lambda x: [LOSS(x)] * 2,
        lambda x: None,
        lambda x: 3,
    ],
    ids=["vector", "complex", "triple", "list", "nothing", "integer"],
)
def test_losses_that_are_no_scalar_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="value_fn.*; pass"):
        hessian(bad)


def test_flax_modules_with_statistics_and_dropout():
    """`nnx.split` outside and `nnx.merge` inside; what the copy changes stays in the copy."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(6, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))

    data = jax.random.normal(jax.random.key(0), (8, 2))
    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
    before = [str(x) for x in jax.tree.leaves(nnx.to_pure_dict(rest))]

    def residuals(params):
        copy = jax.tree.map(lambda x: x, rest)  # merged variables are changed in place
        return nnx.merge(graph, params, copy)(data)[:, 0] - data[:, 0]

    tx = lro.levenberg_marquardt()
    state = tx.init(params)
    with jax.checking_leaks():
        step = jax.jit(lambda p, s: tx.update(p, s, p, residuals_fn=residuals))
        for _ in range(3):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
    assert float(state.loss) < 0.1 * float(jnp.sum(data[:, 0] ** 2) / 2)
    for a, b in zip(jax.tree.leaves(nnx.to_pure_dict(rest)), before, strict=True):
        np.testing.assert_array_equal(str(a), b)  # keys of random numbers have no entries
