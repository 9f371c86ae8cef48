"""Checks that need several devices, run by `test_sharding.py` in processes of their own.

``python tests/on_devices.py NAME ...`` prints a line of JSON for every check: its name and what
went wrong, if anything.
"""

import functools
import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import BASES, DEFAULT, MORE_BASES, STEADY, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# A transformer and its shardings -----------------------------------------------------------------

WIDTH, VOCABULARY = 16, 24
SHAPES = {
    "embedding": (VOCABULARY, WIDTH),
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
    "scale": (WIDTH,),
    "bias": (4 * WIDTH,),
    "temperature": (),
}
AXES = ("a", "b")
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, size=(16, 9))


def transformer():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.3 * rng.normal(size=s) + (len(s) < 2), float)
        for name, s in SHAPES.items()
    }


def loss(p, tokens):
    p = jax.tree.map(gathered, p)
    hot = jax.nn.one_hot(tokens, VOCABULARY)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]
    x = hot[:, :-1] @ p["embedding"]
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
    s = jnp.einsum("bth,bsh->bts", q, k) / WIDTH**0.5
    s = jnp.where(jnp.tril(jnp.ones(s.shape[1:], bool)), s, -1e9)
    x = x + jax.nn.softmax(s) @ v @ p["out"]
    x = x + jax.nn.gelu(norm(x) @ p["up"] + p["bias"]) @ p["down"]
    logits = norm(x) @ p["embedding"].T * p["temperature"]
    return -jnp.mean(jnp.sum(hot[:, 1:] * jax.nn.log_softmax(logits), axis=-1))


def gathered(x):
    """Parameters on all devices, as explicit axes need them beside a batch over the same axes."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, P()))


def mesh_of(kind):
    return jax.make_mesh((4, 2), AXES, axis_types=(kind,) * 2)


def fsdp(shape):
    """The largest axis over all devices, where they divide it."""
    fits = [i for i in np.argsort([-s for s in shape], kind="stable") if shape[i] % 8 == 0]
    return P(*(AXES if i == fits[0] else None for i in range(len(shape)))) if fits else P()


def tensor(shape):
    """The last axis over one axis of the mesh, the first over the other."""
    return P("a", *[None] * (len(shape) - 2), "b") if len(shape) > 1 else P(*["b"] * len(shape))


def place(mesh, tree, rule):
    return jax.device_put(tree, jax.tree.map(lambda x: NamedSharding(mesh, rule(x.shape)), tree))


def gradients(count=4, seed=2):
    """Of no loss, for checks of the step alone."""
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.normal(size=s), float)
    return [{name: draw(s) for name, s in SHAPES.items()} for _ in range(count)]


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


# What is asserted --------------------------------------------------------------------------------


def assert_close(a, b, tolerance=1e-9):
    """Trees of arrays wherever they are, to rounding of their largest entries."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x, float), np.asarray(y, float)
        where = jax.tree_util.keystr(path)
        assert np.isfinite(x).all() and x.shape == y.shape, where
        error = np.abs(x - y).max(initial=0)
        assert error <= tolerance * max(np.abs(y).max(initial=0), 1e-3), f"{where}: {error}"


def assert_placed(tree, places):
    for (path, x), place in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True
    ):
        same = x.sharding.is_equivalent_to(place, x.ndim)
        assert same, f"{jax.tree_util.keystr(path)}: {x.sharding} instead of {place}"


def placements(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


# The engine --------------------------------------------------------------------------------------


TX = lro.lre(1.0, basis=lro.basis.GGT(4), inner=STEADY)


def train_step(params, state, tokens):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@functools.cache
def trained_alone():
    params, values, step = transformer(), [], quick_jit(train_step)
    state = TX.init(params)
    for _ in range(5):
        params, state, value = step(params, state, TOKENS)
        values.append(float(value))
    return params, state, np.array(values)


def train(kind, rule):
    """Five steps of a transformer, on the devices of a mesh and on one."""
    mesh = mesh_of(KINDS[kind])
    spread, tokens = place(mesh, transformer(), rule), place(mesh, TOKENS, lambda _: P(AXES))
    where, state = placements(spread), jax.jit(TX.init)(spread)
    assert_placed(state, lro.shardings(TX.init, spread))
    homes, on_mesh, values = placements(state), quick_jit(train_step, donate_argnums=(0, 1)), []
    compiled = 0
    for _ in range(5):
        spread, state, value = on_mesh(spread, state, tokens)
        values.append(float(value))
        compiled = compiled or (len(values) == 2 and on_mesh._cache_size())
    assert on_mesh._cache_size() == compiled  # the first step may spell specs otherwise
    assert values[-1] < values[0] - 0.1
    assert_close((spread, state, np.array(values)), trained_alone())
    assert_placed(spread, where)
    assert_placed(state, homes)


for kind in KINDS:
    for rule in (fsdp, tensor):
        CHECKS[f"train_{kind}_{rule.__name__}"] = lambda k=kind, r=rule: train(k, r)


def step_alone(name):
    """Each basis on a tree of which leaves split eight ways, four ways and not at all."""
    shapes = {"eight": (6, 16), "four": (5, 4), "none": (7,)}
    rng = np.random.default_rng(3)
    draw = lambda: {n: jnp.asarray(rng.normal(size=s), float) for n, s in shapes.items()}
    rule = lambda shape: {16: P(None, AXES), 4: P(None, "a")}.get(shape[-1], P())
    mesh, params = mesh_of(AxisType.Auto), draw()
    tx = lro.scale_by_lre(lro.curvature.Covariance(), (BASES | MORE_BASES)[name], STEADY)
    where = place(mesh, params, rule)
    state, alone, homes = tx.init(where), tx.init(params), None
    on_mesh, on_one = quick_jit(lambda g, s, p: tx.update(g, s, p)), quick_jit(tx.update)
    for _ in range(6):
        g = draw()
        u, state = on_mesh(place(mesh, g, rule), state, where)
        v, alone = on_one(g, alone, params)
        assert_close(u, v)
        assert_placed(u, placements(where))
        homes = homes or placements(state)
        assert_placed(state, homes)
    assert on_mesh._cache_size() == on_one._cache_size() == 1, (
        on_mesh._cache_size(),
        on_one._cache_size(),
    )


MATRICES = {
    "galore": lambda: lro.scale_by_matrix_lre(
        lro.basis.SubspaceIteration(2, 0.0), None, lro.inner.EMA(0.5), update_every=2
    ),
    "soap": lambda: lro.scale_by_matrix_lre(
        lro.basis.FullMatrix(0.9, every=2), lro.basis.Eigen(3), lro.inner.EMA(0.5)
    ),
}


def matrices(kind, name):
    """Eight matrices of one shape, which lie on one device each, and two of another."""
    rng = np.random.default_rng(6)
    shapes = {f"layer{i}": (6, 8) if i % 2 else (8, 6) for i in range(8)}
    shapes |= {"up": (8, 32), "down": (32, 8), "bias": (8,)}
    draw = lambda: {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    rule = lambda shape: P(*(AXES if size % 8 == 0 else None for size in shape))
    rule = lambda shape, rule=rule: P(None, AXES) if shape == (8, 32) else rule(shape)
    mesh, params, tx = mesh_of(KINDS[kind]), draw(), MATRICES[name]()
    where = place(mesh, params, rule)
    state, alone, homes = tx.init(where), tx.init(params), None
    assert_placed(state, lro.shardings(tx.init, where))
    moments = state.matrices["6x8 float64"].inner.mean
    assert moments.addressable_shards[0].data.shape[0] == 1, moments.sharding
    on_mesh, on_one = quick_jit(lambda g, s, p: tx.update(g, s, p)), quick_jit(tx.update)
    for _ in range(4):
        g = draw()
        u, state = on_mesh(place(mesh, g, rule), state, where)
        v, alone = on_one(g, alone, params)
        assert_close(u, v)
        assert_placed(u, placements(where))
        homes = homes or placements(state)
        assert_placed(state, homes)


for kind in KINDS:
    for name in MATRICES:
        CHECKS[f"{name}_{kind}"] = lambda k=kind, n=name: matrices(k, n)


for name in BASES | MORE_BASES:
    CHECKS[f"basis_{name}"] = lambda n=name: step_alone(n)


# What else is sharded ----------------------------------------------------------------------------


def learner(kind):
    """The online operator, with an optimizer's state as large as its rows."""
    parts = lro.online.Dynamics(1.0), lro.online.Whitening(0.1)
    learner = lro.online.learner(4, parts, optax.adam(1e-2), orthonormal=False)
    rng, key = np.random.default_rng(4), jax.random.key(0)
    stream = {"w": jnp.asarray(rng.normal(size=(5, 2, 6, 16))), "b": jnp.ones((5, 2, 7))}
    first = jax.tree.map(lambda x: x[0, 0], stream)
    mesh = mesh_of(KINDS[kind])
    rule = lambda shape: P(*[None] * (len(shape) - 1), AXES) if shape[-1] == 16 else P()
    state, alone = learner.init(key, place(mesh, first, rule)), learner.init(key, first)
    rows = state.operator.rows["w"]
    assert rows.addressable_shards[0].data.shape == (4, 12), rows.sharding
    homes = placements(state)
    assert_close(state, alone)
    on_mesh, on_one = quick_jit(learner.update), quick_jit(learner.update)
    for i in range(4):
        vectors = jax.tree.map(lambda x, i=i: x[i], stream)
        state, info = on_mesh(state, place(mesh, vectors, rule))
        alone, other = on_one(alone, vectors)
        assert_close(info, other)
    assert_close(state, alone)
    assert_placed(state, homes)
    assert info.moved


for kind in KINDS:
    CHECKS[f"learner_{kind}"] = lambda k=kind: learner(k)


CURVATURES_OF_FUNCTIONS = {
    "hessian": lambda: (lro.curvature.HutchinsonHessian(), "value_fn"),
    "fisher": lambda: (lro.curvature.EmpiricalFisher(), "losses_fn"),
    "gauss_newton": lambda: (lro.curvature.GaussNewton(), "residuals_fn"),
}


def functions(kind, name):
    """Curvatures of functions of sharded parameters and data."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(8, 16)), rng.normal(size=(8, 3))
    params = {"w": jnp.asarray(rng.normal(size=(16, 3))), "b": jnp.zeros(3)}
    part, argument = CURVATURES_OF_FUNCTIONS[name]()
    tx = lro.scale_by_lre(part, lro.basis.Eigen(5), lro.inner.LInv(), complement=1.0)

    def step(params, state, x, y):
        residuals = lambda p: y - jnp.tanh(x @ gathered(p["w"]) + gathered(p["b"]))
        losses = lambda p: jnp.sum(residuals(p) ** 2, axis=1)
        value = lambda p: jnp.mean(losses(p))
        wanted = {"value_fn": value, "losses_fn": losses, "residuals_fn": residuals}[argument]
        updates, state = tx.update(jax.grad(value)(params), state, params, **{argument: wanted})
        return jax.tree.map(lambda p, u: p - 0.01 * u, params, updates), state

    mesh, alone = mesh_of(KINDS[kind]), params
    spread = place(mesh, params, lambda shape: P(AXES) if shape == (16, 3) else P())
    data = place(mesh, (x, y), lambda _: P(AXES))
    state, other = tx.init(spread), tx.init(params)
    on_mesh, on_one = quick_jit(step), quick_jit(step)
    for _ in range(3):
        spread, state = on_mesh(spread, state, *data)
        alone, other = on_one(alone, other, x, y)
    assert_close((spread, state.basis.lam), (alone, other.basis.lam))
    assert not any(np.any(x) for x in state.events) and np.any(state.basis.lam)


for kind in KINDS:
    for name in CURVATURES_OF_FUNCTIONS:
        CHECKS[f"{name}_{kind}"] = lambda k=kind, n=name: functions(k, n)


@check
def data_parallel_by_shard_map():
    """Inside `jax.shard_map` every device takes the whole step on the mean gradient."""
    mesh = mesh_of(AxisType.Auto)

    def step(params, state, tokens):
        grads = jax.grad(lambda p: jax.lax.pmean(loss(p, tokens), AXES))(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = quick_jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(AXES)), out_specs=(P(), P()))
    )
    params, state = transformer(), TX.init(transformer())
    for _ in range(5):
        params, state = step(params, state, TOKENS)
    assert_close((params, state), trained_alone()[:2])


def main(names):
    import time

    for name in names or CHECKS:
        wrong = ""
        start = time.process_time()
        try:
            CHECKS[name]()
        except Exception:
            wrong = traceback.format_exc()
        print(
            json.dumps(
                {"name": name, "wrong": wrong, "seconds": round(time.process_time() - start, 1)}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
