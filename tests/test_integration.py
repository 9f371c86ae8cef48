"""Beside others: flax's train states, orbax, pickle, donation, vmap."""

import dataclasses
import functools
import pickle
import warnings

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import BASES, CURVATURES, DEFAULT, INNERS, MORE_BASES, STEADY
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.training import TrainState

COVARIANCE, HESSIAN = lro.curvature.Covariance(), lro.curvature.HutchinsonHessian()
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
Y = jnp.sin(X @ jnp.array([[1.0], [-1.0], [0.5]]))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(4)}
GRADS = [
    jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), PARAMS) for _ in range(8)
]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Train states -----------------------------------------------------------------------------------


def test_train_state_forwards_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optax.chain(recorder, optax.sgd(1.0))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    value_fn = lambda params: 0.0
    state = state.apply_gradients(grads=GRADS[0], value_fn=value_fn, value=2.0)
    assert seen == {"value_fn": value_fn, "value": 2.0}
    assert state.step == 1
    assert_same(state.params, optax.tree.sub(PARAMS, GRADS[0]))


def test_train_state_with_a_plain_transformation_and_fields_to_replace():
    class WithStatistics(TrainState):
        statistics: int = 0

    state = WithStatistics.create(apply_fn=None, params=PARAMS, tx=optax.sgd(1.0))
    state = state.apply_gradients(grads=GRADS[0], value_fn=None, replace={"statistics": 7})
    assert state.statistics == 7 and state.step == 1


def test_linen_model_trains_on_curvature_of_its_loss():
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(1)])
    tx = lro.lre(1e-1, HESSIAN, lro.basis.Eigen(12), lro.inner.Adam())
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X), tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        value_fn = lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2)
        value, grads = jax.value_and_grad(value_fn)(state.params)
        return state.apply_gradients(grads=grads, value=value, value_fn=value_fn), value

    values = []
    for _ in range(60):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lro.lre(1e-1, basis=lro.basis.GGT(6)), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(X) - Y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value)
        return value

    values = [float(step(model, optimizer)) for _ in range(60)]
    assert values[-1] < 0.2 * values[0]
    assert int(optimizer.step[...]) == 60


# Saving -----------------------------------------------------------------------------------------


def build(basis):
    """An optimizer whose state has everything a state can have."""
    return lro.lre(
        1e-2,
        COVARIANCE,
        BASES[basis],
        (lro.inner.Adam(amsgrad_decay=1.0), *DEFAULT[1:]),
        groups=lro.per_leaf,
        update_every=2,
        complement=optax.trace(0.9),
    )


def run(update, state, grads):
    updates = []
    for g in grads:
        u, state = update(g, state)
        updates.append(u)
    return updates, state


def orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.tree.map(jnp.zeros_like, state))


def flax_bytes(state, path):
    zeros = jax.tree.map(jnp.zeros_like, state)
    return flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(state))


@pytest.mark.parametrize(
    "keep",
    [orbax, flax_bytes, lambda s, _: pickle.loads(pickle.dumps(s))],
    ids=["orbax", "flax", "pickle"],
)
@pytest.mark.parametrize("basis", BASES)
def test_resumed_run_is_the_uninterrupted_one(basis, keep, tmp_path):
    tx = build(basis)
    update = jitted(basis)
    whole, last = run(update, tx.init(PARAMS), GRADS)
    _, half = run(update, tx.init(PARAMS), GRADS[:5])
    restored = keep(half, tmp_path)
    assert_same(restored, half)
    rest, resumed = run(update, restored, GRADS[5:])
    assert_same(rest, whole[5:])
    assert_same(resumed, last)


@functools.cache
def jitted(basis):
    return jax.jit(build(basis).update)


@pytest.mark.parametrize("basis", BASES)
def test_state_can_be_donated(basis):
    state = build(basis).init(PARAMS)
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(where)) == len(where)
    update = jax.jit(build(basis).update, donate_argnums=1)
    plain, kept = run(jitted(basis), build(basis).init(PARAMS), GRADS[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        donated, state = run(update, state, GRADS[:3])
    assert_same(donated, plain)
    assert_same(state, kept)


# Parts ------------------------------------------------------------------------------------------

PARTS = {
    f"{kind}-{name}": part
    for kind, registry in [
        ("curvature", CURVATURES),
        ("basis", BASES | MORE_BASES),
        ("inner", INNERS),
    ]
    for name, part in registry.items()
    if not isinstance(part, tuple)
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_values(name):
    part = PARTS[name]
    again = dataclasses.replace(part)
    assert again == part and hash(again) == hash(part) and again is not part
    assert repr(part).startswith(type(part).__name__ + "(")
    assert not callable(part)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.anything = 1
    if not isinstance(part, lro.inner.Optax | lro.online.Learned):  # these hold optax's closures
        assert pickle.loads(pickle.dumps(part)) == part
    assert all(part != other for key, other in PARTS.items() if key != name)


# Batches of runs --------------------------------------------------------------------------------


def last(tx):
    """Parameters after four steps on a quartic with a known start."""
    value_fn = lambda p: sum(jnp.sum((x - 0.3) ** 4) for x in jax.tree.leaves(p))

    def step(carry, g):
        params, state = carry
        grads = optax.tree.add(jax.grad(value_fn)(params), g)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    grads = jax.tree.map(lambda *g: jnp.stack(g), *GRADS[:4])
    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)[0][0]


@pytest.mark.parametrize(
    "parts",
    [(HESSIAN, BASES["eigen"]), (COVARIANCE, lro.basis.Random(3))],
    ids=["hessian", "random"],
)
def test_seeds(parts):
    """The same seed gives the same run, another one another; a vmap over seeds is those runs."""
    one = jax.jit(lambda seed: last(lro.lre(1e-1, *parts, seed=seed)))
    many = jax.jit(jax.vmap(lambda seed: last(lro.lre(1e-1, *parts, seed=seed))))(jnp.arange(3))
    runs = [one(jnp.asarray(seed)) for seed in (0, 1, 2, 1)]
    assert_same(runs[1], runs[3])
    assert np.abs(runs[0]["w"] - runs[1]["w"]).max() > 1e-4
    static = jax.jit(lambda: last(lro.lre(1e-1, *parts, seed=2)))()
    for i, alone in enumerate(runs[:3]):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-4), many, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), static, runs[2])


@pytest.mark.parametrize("basis", BASES)
def test_vmap_over_learning_rates(basis):
    rates = jnp.array([1e-3, 1e-1])
    train = lambda rate: last(lro.lre(rate, basis=BASES[basis], inner=STEADY))
    many = jax.jit(jax.vmap(train))(rates)
    alone = jax.jit(train)
    for i, rate in enumerate(rates):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-4), many, alone(rate)
        )
