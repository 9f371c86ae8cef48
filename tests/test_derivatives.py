"""Differentiating through a step: refused in one sentence, at no cost to a plain step."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax._core.derivatives import undifferentiated

PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(2)}
X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def loss(params):
    return jnp.mean((X @ params["w"].T + params["b"] - X[:, :2]) ** 2)


def guarded(tx):
    """As an engine does: the first line of its update."""

    def update(updates, state, params=None, **extra):
        return tx.update(undifferentiated("scale_by_lre", updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


ENGINE = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(3), lro.inner.Adam())
GUARDED = guarded(ENGINE)


def step(rate, params, state, tx=GUARDED):
    tx = optax.chain(tx, optax.scale_by_learning_rate(rate))
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def start(tx=GUARDED):
    return optax.chain(tx, optax.scale_by_learning_rate(0.1)).init(PARAMS)


def unrolled(rate, step=step):
    params, state = PARAMS, start()
    for _ in range(3):
        params, state = step(rate, params, state)
    return loss(params)


def jitted(rate):
    return unrolled(rate, jax.jit(step))


def scanned(rate):
    body = lambda carry, _: (step(rate, *carry), None)
    return loss(jax.lax.scan(body, (PARAMS, start()), length=3)[0][0])


def remembered(rate):
    return unrolled(rate, jax.checkpoint(step))


def batched(rate):
    return jax.vmap(unrolled)(rate * jnp.ones(2)).sum()


@pytest.mark.parametrize("train", [unrolled, jitted, scanned, remembered, batched])
@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_training_is_not_differentiated(train, mode):
    with pytest.raises(ValueError, match="scale_by_lre: .* finite differences") as error:
        mode(train)(0.1)
    assert str(error.value).count(". ") == 0


def test_the_derivative_of_one_step_by_its_rate_is_exact(x64):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    state = optax.chain(GUARDED, optax.scale_by_learning_rate(0.1)).init(params)
    after = lambda rate: loss(step(rate, params, state)[0])
    h = 1e-4
    central = (after(0.1 + h) - after(0.1 - h)) / (2 * h)
    for mode in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(mode(after)(0.1), central, rtol=1e-5)


def test_what_does_not_run_through_the_gradients_is_differentiated():
    def stopped(rate):
        params, state = PARAMS, start()
        tx = optax.chain(GUARDED, optax.scale_by_learning_rate(rate))
        for _ in range(3):
            grads = jax.lax.stop_gradient(jax.grad(loss)(params))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    assert jnp.isfinite(jax.grad(stopped)(0.1))


def test_an_inner_product_with_the_hessian_is_no_derivative_of_a_step():
    tx = guarded(lro.sophia_h(0.1, rank=3))
    state = tx.init(PARAMS)
    updates, _ = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p, value_fn=loss))(
        PARAMS, state
    )
    assert optax.tree.norm(updates) > 0


def test_the_tree_stays_what_it_is():
    tree = {"a": jnp.ones(2), "b": None, "c": (np.ones(2), 1.0, "name", len), "d": jnp.arange(3)}
    same = undifferentiated("engine", tree)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
    assert same["a"] is tree["a"] and same["c"][2:] == ("name", len)
    assert undifferentiated("engine", ()) == ()


def test_a_plain_step_compiles_to_the_same_program():
    """Donation included: what of the state is updated where it lies is part of the text."""

    def program(tx):
        run = lambda params, state: step(0.1, params, state, tx)
        text = jax.jit(run, donate_argnums=(0, 1)).lower(PARAMS, start(tx)).compile().as_text()
        return re.sub(r"metadata=\{[^}]*\}|HloModule \S+", "", text.split("FileNames")[0])

    assert program(GUARDED) == program(ENGINE)


def test_donation_and_devices():
    mesh = jax.make_mesh((1,), ("data",))
    run = jax.jit(step, donate_argnums=(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, state = jax.tree.map(jnp.copy, (PARAMS, start()))
        expected = step(0.1, params, state)[0]
        params, state = run(0.1, params, state)
    P = jax.sharding.PartitionSpec
    parts = jax.jit(
        jax.shard_map(
            lambda p, s: step(0.1, p, s)[0], mesh=mesh, in_specs=(P(), P()), out_specs=P()
        )
    )(PARAMS, start())
    for got in (params, parts):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, expected)


def test_within_a_function_with_its_own_derivative():
    @jax.custom_vjp
    def trained(rate):
        return unrolled(rate)

    trained.defvjp(lambda rate: (unrolled(rate), None), lambda _, ct: (2 * ct,))
    assert jax.grad(trained)(0.1) == 2
