"""optax's own tests of contributed optimizers, and optax's wrappers, on ours.

The cases of `optax.contrib._common_test` are made from lists when its class is created, so its
installed source is executed here with our optimizers in these lists.
"""

import ast
import importlib.util
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import Traced

import lowrank_optax as lro


def _case(wrapper=None, wrapper_kwargs=None, learning_rate=1e-2, name="lre", **kwargs):
    return {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": learning_rate} | kwargs,
        "wrapper_name": wrapper,
        "wrapper_kwargs": wrapper_kwargs,
    }


DEFAULT = {"basis": lro.basis.GGT(rank=10)}
PLAIN = (
    _case(**DEFAULT),
    _case(basis=lro.basis.Eigen(rank=10)),
    _case(basis=lro.basis.FullMatrix()),
)
# The recipes that a gradient is enough for; those for matrices are in test_matrix.py, and what the
# others need no wrapper of optax passes on: see test_everyday.py.
RECIPES = (
    _case(name="ggt", rank=10, learning_rate=1e-1),
    _case(name="full_matrix_adam", rank=10),
    _case(name="whitened_adam", rank=10),
)
WRAPPED = (
    _case("mechanize", {"weight_decay": 0.0}, 1.0, **DEFAULT),
    _case("schedule_free", {"learning_rate": 1e-2}, **DEFAULT),
)


def _common_test(name, cases):
    """`ContribTest` of optax's installed `_common_test`, over ``cases`` of our optimizers."""
    origin = importlib.util.find_spec("optax.contrib._common_test").origin
    module = types.ModuleType(f"{__name__}.{name}")
    ours = {
        "_MAIN_OPTIMIZERS_UNDER_TEST": cases,
        "_ALL_OPTIMIZERS_UNDER_TEST": cases,
        "_get_opt_factory": lambda name: getattr(lro, name),
    }
    for node in ast.parse(Path(origin).read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert vars(module).keys() >= ours.keys()
            vars(module).update(ours)
        exec(compile(ast.Module([node], []), origin, "exec"), vars(module))
    return module.ContribTest


class ContribTest(_common_test("plain", PLAIN + RECIPES)):
    def skipTest(self, reason):
        self.fail(f"optax would leave this out: {reason}")


class WrappedContribTest(_common_test("wrapped", WRAPPED)):
    """Those of the tests that look at the wrapper."""


for _name in dir(WrappedContribTest):
    if _name.startswith("test") and not re.fullmatch(
        r"test_optimizers(_accept_extra_args)?\d+", _name
    ):
        setattr(WrappedContribTest, _name, None)


# Wrappers ---------------------------------------------------------------------------------------

TX = lro.lre(1e-1, **DEFAULT)
PARAMS = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
RNG = np.random.default_rng(0)
GRADS = {
    "a": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(6, 2, 2)), jnp.float32),
}


def trajectory(tx, params=PARAMS, grads=GRADS, extra=()):
    """The updates of every step, stacked, and the last state."""

    @jax.jit
    def run(params, state):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, **dict(extra))
            return (optax.apply_updates(params, updates), state), updates

        (_, state), updates = jax.lax.scan(step, (params, state), grads)
        return updates, state

    return run(params, tx.init(params))


def assert_close(a, b, rtol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def only(tree, *names):
    return {name: tree[name] for name in names}


def test_masked_sees_its_leaves_only():
    masked, state = trajectory(optax.masked(TX, {"a": True, "b": False}))
    alone, _ = trajectory(TX, only(PARAMS, "a"), only(GRADS, "a"))
    assert_close(only(masked, "a"), alone)
    assert_close(only(masked, "b"), only(GRADS, "b"))
    (rows,) = lro.diagnose.find(state).basis.rows
    assert rows.shape == (10, 3)


def test_partition_is_two_optimizers():
    other = lro.lre(1e-2, basis=lro.basis.Eigen(3), inner=lro.inner.Lion())
    tx = optax.partition({"x": TX, "y": other}, {"a": "x", "b": "y"})
    both, _ = trajectory(tx)
    assert_close(only(both, "a"), trajectory(TX, only(PARAMS, "a"), only(GRADS, "a"))[0])
    assert_close(only(both, "b"), trajectory(other, only(PARAMS, "b"), only(GRADS, "b"))[0])


def test_integer_leaves_can_be_partitioned_away():
    tx = optax.partition({"x": TX, "frozen": optax.set_to_zero()}, {"a": "x", "n": "frozen"})
    params = {"a": PARAMS["a"], "n": jnp.arange(2)}
    grads = {"a": GRADS["a"], "n": jnp.zeros((6, 2), jnp.int32)}
    updates, _ = trajectory(tx, params, grads)
    assert_close(updates["a"], trajectory(TX, only(PARAMS, "a"), only(GRADS, "a"))[0]["a"])


def test_injected_hyperparameters_can_be_changed():
    tx = optax.inject_hyperparams(lro.lre)(1e-1, **DEFAULT, weight_decay=0.5)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda g: g[0], GRADS)
    update = Traced(tx.update)
    before, _ = update(grads, state, PARAMS)
    state.hyperparams["learning_rate"] *= 2
    assert_close(update(grads, state, PARAMS)[0], jax.tree.map(lambda u: 2 * u, before))
    state.hyperparams["weight_decay"] *= 0
    plain, _ = TX.update(grads, TX.init(PARAMS), PARAMS)
    assert_close(update(grads, state, PARAMS)[0], jax.tree.map(lambda u: 2 * u, plain))
    assert update.count == 1


def test_injected_schedule():
    schedule = optax.linear_schedule(1e-1, 1e-2, 5)
    injected, _ = trajectory(optax.inject_hyperparams(lro.lre)(schedule, **DEFAULT))
    assert_close(injected, trajectory(lro.lre(schedule, **DEFAULT))[0])


def test_engine_takes_injected_numbers():
    """All that `inject_hyperparams` makes an array, seed and number of steps included."""
    make = optax.inject_hyperparams(lro.scale_by_lre)
    parts = lro.curvature.Covariance(), lro.basis.GGT(10), lro.inner.Adam()
    options = {"update_every": 2, "warmup_steps": 1, "complement": 0.1, "seed": 3}
    injected, _ = trajectory(make(*parts, **options))
    assert_close(injected, trajectory(lro.scale_by_lre(*parts, **options))[0])


def test_multi_steps_averages():
    updates, state = trajectory(optax.MultiSteps(TX, 3).gradient_transformation())
    means = jax.tree.map(lambda g: g.reshape(2, 3, *g.shape[1:]).mean(1), GRADS)
    alone, _ = trajectory(TX, grads=means)
    assert_close(jax.tree.map(lambda u: u[2::3], updates), alone)
    assert int(lro.diagnose.find(state).count) == 2
    quiet = jax.tree.map(lambda u: u.reshape(2, 3, -1)[:, :2], updates)
    assert all(not np.any(u) for u in jax.tree.leaves(quiet))


def test_apply_if_finite_keeps_the_step_from_us():
    grads = jax.tree.map(lambda g: g.at[2].set(jnp.nan), GRADS)
    without = jax.tree.map(lambda g: jnp.delete(g, 2, axis=0), GRADS)
    updates, state = trajectory(optax.apply_if_finite(TX, 5), grads=grads)
    assert_close(
        jax.tree.map(lambda u: jnp.delete(u, 2, axis=0), updates), trajectory(TX, grads=without)[0]
    )
    assert int(lro.diagnose.find(state).events.nonfinite[0]) == 0
    assert int(state.total_notfinite) == 1


def test_learning_rate_schedule():
    schedule = optax.polynomial_schedule(1.0, 0.1, 1, 6)
    scheduled, _ = trajectory(lro.lre(schedule, **DEFAULT))
    constant, _ = trajectory(lro.lre(1.0, **DEFAULT))
    rates = jnp.stack([schedule(i) for i in range(6)])
    scale = lambda u: u * rates.reshape(-1, *[1] * (u.ndim - 1))
    assert_close(scheduled, jax.tree.map(scale, constant))


def test_update_every_as_schedule():
    number, _ = trajectory(lro.lre(1e-1, **DEFAULT, update_every=3))
    constant, _ = trajectory(lro.lre(1e-1, **DEFAULT, update_every=lambda step: 3))
    assert_close(number, constant)

    tx = lro.lre(1e-1, **DEFAULT, update_every=lambda step: jnp.where(step < 2, 1, 3))
    update = jax.jit(tx.update)
    state, spectra = tx.init(PARAMS), []
    for i in range(6):
        _, state = update(jax.tree.map(lambda g, i=i: g[i], GRADS), state)
        spectra.append(np.asarray(lro.diagnose.find(state).basis.lam))
    moved = [i for i in range(1, 6) if (spectra[i] != spectra[i - 1]).any()]
    assert moved == [1, 4]


@pytest.mark.parametrize("kwargs", [case["opt_kwargs"] for case in PLAIN])
def test_init_from_shapes(kwargs):
    tx = lro.lre(**kwargs, update_every=2, complement=optax.trace(0.9))
    state = tx.init(PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert_close(tx.init(shapes), state)
    same = jax.tree.map(
        lambda s, x: s.shape == x.shape and s.dtype == x.dtype,
        jax.eval_shape(tx.init, shapes),
        state,
    )
    assert jax.tree.all(same)


def test_complex_parameters_split():
    split = lambda x: {"real": jnp.real(x), "imag": jnp.imag(x)}
    params, grads = jnp.array([1 + 2j, -1j]), RNG.normal(size=(6, 2, 2))
    grads = jnp.asarray(grads[..., 0] + 1j * grads[..., 1], jnp.complex64)
    updates, _ = trajectory(optax.contrib.split_real_and_imaginary(TX), params, grads)
    assert updates.dtype == jnp.complex64
    assert_close(split(updates), trajectory(TX, split(params), split(grads))[0])
