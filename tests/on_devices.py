"""Checks that need several devices, run by `test_sharding.py` in processes of their own.

``python tests/on_devices.py NAME ...`` prints a line of JSON for every check: its name and what
went wrong, if anything. With ``--process I N PORT`` before the names it is the ``I``-th of ``N``
processes. In float64 (``JAX_ENABLE_X64=1``), where rounding is far below all else.
"""

import functools
import json
import re
import sys
import time
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import BASES, MORE_BASES, STEADY
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
    count = jax.device_count()
    shape = (count // 2, 2) if count > 2 else (count, 1)
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 2)


def fsdp(shape):
    """The largest axis over all devices, where they divide it."""
    fits = [
        i
        for i in np.argsort([-s for s in shape], kind="stable")
        if shape[i] % jax.device_count() == 0
    ]
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
    a = fetch(a)
    if jax.process_index():  # what it is to be is known to the first process alone
        return
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x, float), np.asarray(y, float)
        where = jax.tree_util.keystr(path)
        assert np.isfinite(x).all() and x.shape == y.shape, where
        error = np.abs(x - y).max(initial=0)
        assert error <= tolerance * max(np.abs(y).max(initial=0), 1e-3), f"{where}: {error}"


def fetch(tree):
    """Arrays that other processes have parts of."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        everywhere = NamedSharding(x.sharding.mesh, P())
        return jax.jit(lambda x: x, out_shardings=everywhere)(x)

    return jax.tree.map(whole, tree)


def on_the_first(function):
    """For references: nothing in the other processes."""
    return functools.cache(lambda *args: None if jax.process_index() else function(*args))


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


@on_the_first
def trained_alone():
    params, values, step = transformer(), [], jax.jit(train_step)
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
    homes, on_mesh, values = placements(state), jax.jit(train_step, donate_argnums=(0, 1)), []
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
    draw = lambda: {n: rng.normal(size=s) for n, s in shapes.items()}
    rule = lambda shape: {16: P(None, AXES), 4: P(None, "a")}.get(shape[-1], P())
    mesh, params, grads = mesh_of(AxisType.Auto), draw(), [draw() for _ in range(6)]
    tx = lro.scale_by_lre(
        lro.curvature.Covariance(), (BASES | MORE_BASES)[name], lro.inner.EMA(0.5)
    )
    where = place(mesh, params, rule)
    state, homes, found = tx.init(where), None, []
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for g in grads:
        u, state = update(place(mesh, g, rule), state, where)
        found.append(u)
        assert_placed(u, placements(where))
        homes = homes or placements(state)
        assert_placed(state, homes)
    assert update._cache_size() == 1

    @on_the_first
    def alone():
        update, state, found = jax.jit(tx.update), tx.init(params), []
        for g in grads:
            u, state = update(g, state, params)
            found.append(u)
        return found

    assert_close(found, alone())


def layers(kind):
    """`jax.vmap` over the axis of layers of a scanned model: an optimizer for each layer."""
    rng = np.random.default_rng(8)
    draw = lambda: {"w": rng.normal(size=(3, 6, 16)), "b": rng.normal(size=(3, 5))}
    rule = lambda shape: P(None, None, AXES) if len(shape) == 3 else P()
    mesh, params, grads = mesh_of(KINDS[kind]), draw(), [draw() for _ in range(5)]
    tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(3), lro.inner.EMA(0.5))
    where, update = place(mesh, params, rule), jax.jit(jax.vmap(tx.update))
    state, found = jax.vmap(tx.init)(where), []
    for g in grads:
        u, state = update(place(mesh, g, rule), state, where)
        found.append(u)
    assert state.basis.rows[1].addressable_shards[0].data.shape == (3, 3, 12)

    @on_the_first
    def alone():
        update, found = jax.jit(tx.update), []
        layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        for i in range(3):
            state = tx.init(layer(params, i))
            found.append([])
            for g in grads:
                u, state = update(layer(g, i), state, layer(params, i))
                found[i].append(u)
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    assert_close(found, alone())


for kind in KINDS:
    CHECKS[f"layers_{kind}"] = lambda k=kind: layers(k)


MATRICES = {
    "galore": lambda: lro.scale_by_matrix_lre(
        lro.basis.SubspaceIteration(2, 0.0), None, lro.inner.EMA(0.5), update_every=2
    ),
    "soap": lambda: lro.scale_by_matrix_lre(
        lro.basis.FullMatrix(0.9, update_every=2), lro.basis.FullMatrix(0.9), lro.inner.EMA(0.5)
    ),
}


def matrices(kind, name):
    """Eight matrices of one shape, which lie on one device each, and two of another."""
    rng = np.random.default_rng(6)
    shapes = {f"layer{i}": (6, 8) if i % 2 else (8, 6) for i in range(8)}
    shapes |= {"up": (8, 32), "down": (32, 8), "bias": (8,)}
    draw = lambda: {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    rule = fsdp
    mesh, params, tx = mesh_of(KINDS[kind]), draw(), MATRICES[name]()
    where = place(mesh, params, rule)
    state, alone, homes = tx.init(where), tx.init(params), None
    assert_placed(state, lro.shardings(tx.init, where))
    moments = state.matrices["6x8"].inner.mean
    assert moments.addressable_shards[0].data.shape[0] == 1, moments.sharding
    on_mesh, on_one = jax.jit(lambda g, s, p: tx.update(g, s, p)), jax.jit(tx.update)
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


def stacks(kind, spec):
    """Layers of a scan in one leaf, split over the devices by layers or along a side."""
    rng = np.random.default_rng(7)
    draw = lambda: {
        "kernel": jnp.asarray(rng.normal(size=(8, 6, 8))),
        "bias": jnp.asarray(rng.normal(size=(8, 8))),
    }
    rule = lambda shape: P(*spec) if len(shape) == 3 else fsdp(shape)
    mesh, params, tx = mesh_of(KINDS[kind]), draw(), lro.soap_muon(1e-2, update_every=1)
    where = place(mesh, params, rule)
    state, alone, homes = tx.init(where), tx.init(params), None
    assert_placed(state, lro.shardings(tx.init, where))
    on_mesh, on_one = jax.jit(lambda g, s, p: tx.update(g, s, p)), jax.jit(tx.update)
    for _ in range(4):
        g = draw()
        u, state = on_mesh(place(mesh, g, rule), state, where)
        v, alone = on_one(g, alone, params)
        assert_close(u, v)
        assert_placed(u, placements(where))
        homes = homes or placements(state)
        assert_placed(state, homes)


for kind in KINDS:
    CHECKS[f"stack_by_layers_{kind}"] = lambda k=kind: stacks(k, (AXES,))
    CHECKS[f"stack_by_columns_{kind}"] = lambda k=kind: stacks(k, (None, None, AXES))


def recipe(kind):
    """`soap_muon`: bases of both sides, orthogonal steps, Adam for vectors.

    Two gradients span every side: a direction that none has reached is an arbitrary one of many.
    """
    rng = np.random.default_rng(8)
    shapes = {"one": (6, 8), "two": (6, 8), "up": (8, 16), "bias": (8,)}
    draw = lambda: {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    mesh, params, tx = mesh_of(KINDS[kind]), draw(), lro.soap_muon(1e-2, update_every=1)
    where = place(mesh, params, fsdp)
    state, alone = tx.init(where), tx.init(params)
    on_mesh, on_one = jax.jit(lambda g, s, p: tx.update(g, s, p)), jax.jit(tx.update)
    for _ in range(4):
        g = draw()
        u, state = on_mesh(place(mesh, g, fsdp), state, where)
        v, alone = on_one(g, alone, params)
        assert_close(u, v)
        assert_placed(u, placements(where))


for kind in KINDS:
    CHECKS[f"recipe_{kind}"] = lambda k=kind: recipe(k)


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
    assert rows.addressable_shards[0].data.size * jax.device_count() == rows.size, rows.sharding
    homes = placements(state)
    assert_close(state, alone)
    on_mesh, on_one = jax.jit(learner.update), jax.jit(learner.update)
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
    on_mesh, on_one = jax.jit(step), jax.jit(step)
    for _ in range(3):
        spread, state = on_mesh(spread, state, *data)
        alone, other = on_one(alone, other, x, y)
    assert_close((spread, state.basis.lam), (alone, other.basis.lam))
    assert not any(np.any(x) for x in state.events) and np.any(state.basis.lam)


for kind in KINDS:
    for name in CURVATURES_OF_FUNCTIONS:
        CHECKS[f"{name}_{kind}"] = lambda k=kind, n=name: functions(k, n)


@check
def spectral_fit():
    """Batches, parameters and the optimizer's state over the devices of the current mesh."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(64, 8))
    data, seen = (x, x + 0.1 * rng.normal(size=(64, 8))), {}

    class Watched(lro.spectral.operators.CanonicalDependence):
        def apply(self, f, g, batch):
            jax.debug.inspect_array_sharding(batch[0], callback=partial(see, "batch"))
            return super().apply(f, g, batch)

    def see(name, sharding):
        seen[name] = sharding

    def watch(updates, state, params):
        jax.debug.inspect_array_sharding(params[0]["in"], callback=partial(see, "params"))
        jax.debug.inspect_array_sharding(state["in"], callback=partial(see, "state"))
        return updates, state

    watched = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p[0]), watch)
    adam = optax.chain(optax.adam(1e-2), watched)

    def init(key, x):
        keys = jax.random.split(key, 2)
        shapes = {"in": (8, 16), "out": (16, 3)}
        return {
            n: 0.3 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)
        }

    def apply(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    fit = lambda: lro.spectral.fit(
        Watched(*data),
        (init, apply),
        optimizer=adam,
        steps=6,
        batch_size=32,
        evaluate_every=6,
        evaluate_batches=2,
    )
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        there = fit()
    count, shapes = jax.device_count(), {"batch": (32, 8), "params": (8, 16), "state": (8, 16)}
    for name, shape in shapes.items():
        local = seen[name].shard_shape(shape)
        assert np.prod(local) * count == np.prod(shape), f"{name}: {seen[name]}"
    alone = fit() if not jax.process_index() else there
    assert_close(there.params, alone.params, 1e-7)
    assert_close(there.eigenvalues, alone.eigenvalues, 1e-7)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(there.params))


@check
def data_parallel_by_shard_map():
    """Inside `jax.shard_map` every device takes the whole step on the mean gradient."""
    mesh = mesh_of(AxisType.Auto)

    def step(params, state, tokens):
        grads = jax.grad(lambda p: jax.lax.pmean(loss(p, tokens), AXES))(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(AXES)), out_specs=(P(), P()))
    )
    params, state = transformer(), TX.init(transformer())
    for _ in range(5):
        params, state = step(params, state, TOKENS)
    assert_close((params, state), trained_alone()[:2])


def replicas(name, **options):
    """Devices with parts of a batch, in `jax.pmap` and `jax.shard_map`: one optimizer of it all."""
    x = jax.random.normal(jax.random.key(0), (16, 4))
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    losses = lambda p, x: (x @ jnp.tanh(p) - 1) ** 2 / 16

    def end(tx, x, mean):
        params, state = jnp.ones(4), tx.init(jnp.ones(4))
        for _ in range(3):
            tell = {"value_fn": lambda p: mean(jnp.sum(losses(p, x)))}
            tell["losses_fn"] = lambda p: losses(p, x) / 8
            tell["residuals_fn"] = lambda p: losses(p, x) - 0.1
            grads = mean(jax.grad(lambda p: jnp.sum(losses(p, x)))(params))
            updates, state = tx.update(grads, state, params, **tell)
            params = optax.apply_updates(params, updates)
        return params

    make = lambda **more: optax.with_extra_args_support(getattr(lro, name)(**options, **more))
    total = lambda v: jax.lax.pmean(v, "i")
    alone = jax.jit(lambda: end(make(), x, lambda v: jax.tree.map(lambda y: y / 8, v)))()
    each = lambda x: end(make(axis_name="i"), x, total)
    by_pmap = jax.pmap(each, axis_name="i")(x.reshape(8, 2, 4))
    local = jax.shard_map(
        lambda x: each(x)[None], mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False
    )
    for params in (*by_pmap, *jax.jit(local)(x)):
        assert_close(params, alone, 1e-6)
    try:
        jax.pmap(lambda x: end(make(), x, total), axis_name="i")(x.reshape(8, 2, 4))
    except ValueError as error:
        assert "axis_name='i'" in str(error)
    else:
        raise AssertionError("replicas drift without a word")


for name in ("sophia_h", "lowrank_newton", "natural_gradient"):
    CHECKS[f"replicas_{name}"] = lambda n=name: replicas(n, learning_rate=0.1, rank=3)
CHECKS["replicas_levenberg_marquardt"] = lambda: replicas("levenberg_marquardt")
CHECKS["replicas_by_products"] = lambda: replicas("levenberg_marquardt", rank=4)
CHECKS["replicas_spring"] = lambda: replicas("spring")


def products_gather_nothing():
    """Residuals stay where they are: only sums over them are exchanged."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    quick = {"trials": 2, "momenta": (0.0,), "order": 2, "axis_name": "i"}

    def text(rank):
        tx = lro.levenberg_marquardt(rank=rank, **quick)

        def step(x):
            p = jnp.ones(4)
            return tx.update(p, tx.init(p), p, residuals_fn=lambda p: jnp.tanh(x @ p) - 0.1)[0]

        local = jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=P(), check_vma=False)
        return jax.jit(local).lower(jnp.ones((16, 4))).compile().as_text()

    assert "all-reduce" in text(2) and "all-gather" not in text(2)
    assert "all-gather" in text(0)


CHECKS["products_gather_nothing"] = products_gather_nothing


# What the compiled step exchanges ----------------------------------------------------------------

EXCHANGES = (
    "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
)


COPIES = ("copy", "concatenate", "transpose", "select", "convert")


def instructions(hlo):
    """``(computation, types, opcode)`` of every instruction; a computation that is ENTRY is so."""
    where = None
    for line in hlo.splitlines():
        if line and not line[0].isspace() and "{" in line:
            where = "ENTRY" if line.startswith("ENTRY") else line.split()[0]
        found = re.match(r"\s+(?:ROOT )?%\S+ = (.*?) ([a-z][\w-]*)\(", line)
        if found:
            yield where, re.findall(r"\w+\[([\d,]*)\]", found[1]), found[2].removesuffix("-start")


def entries(shape):
    return int(np.prod([int(x) for x in shape.split(",") if x]))


def exchanged(basis, entry, loops, room=1):
    """A step sends the gradient once there and once back, and small sums; never rows."""
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((32, 128)), "b": jnp.ones(8)}
    mesh = mesh_of(AxisType.Auto)
    params = place(mesh, params, lambda shape: P(*[None] * (len(shape) - 1), AXES))
    tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.EMA(0.5))
    state = tx.init(params)
    rows = jax.tree.leaves(state.basis.rows)
    m, d = rows[0].shape[0], sum(x.size for x in jax.tree.leaves(params))
    compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    found = {True: {}, False: {}}
    for where, shapes, opcode in instructions(compiled.as_text()):
        if re.fullmatch(EXCHANGES, opcode):
            sizes = found[where == "ENTRY"]
            sizes[opcode] = sizes.get(opcode, 0) + sum(map(entries, shapes))
    moved = found[True].pop("all-to-all")
    assert d // 8 <= moved <= 2 * d // 8, moved
    assert set(found[True]) <= {"all-reduce"} and found[True]["all-reduce"] <= entry(m), found
    assert set(found[False]) <= {"all-reduce"}, found
    assert found[False].get("all-reduce", 0) <= loops(m), found
    local = {f"{m},{w.shape[1] // 8}" for w in rows}
    copies = [
        x
        for x in instructions(compiled.as_text())
        if local & set(x[1]) and x[2] in COPIES and "fused" not in x[0]
    ]
    assert not copies, copies
    memory = compiled.memory_analysis()
    mine = sum(w.nbytes for w in rows) / 8
    assert mine <= memory.alias_size_in_bytes and memory.temp_size_in_bytes < room * mine


EXCHANGED = {
    "ggt": lambda: exchanged(lro.basis.GGT(8), lambda m: m + 1, lambda m: 0),
    "eigen": lambda: exchanged(lro.basis.Eigen(8), lambda m: m + 3, lambda m: m * m + 4 * m),
    # Blocks of rows this short are all of them, and are drawn with a key for each column.
    "random": lambda: exchanged(lro.basis.Random(8), lambda m: m + 1, lambda m: 6 * m * m, room=8),
}
for name, exchange in EXCHANGED.items():
    CHECKS[f"exchange_{name}"] = exchange


@check
def init_places_the_state():
    """Compiled from shapes alone: every device makes its own part of the rows and nothing else."""
    mesh = mesh_of(AxisType.Auto)
    split = NamedSharding(mesh, P(None, AXES))
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)}
    tx = optax.chain(lro.scale_by_lre(*PARTS), optax.adam(1e-2))
    places = lro.shardings(tx.init, params)
    assert places[1][0].mu["w"] == split
    for options in ({"out_shardings": places}, {}):
        compiled = jax.jit(tx.init, **options).lower(params).compile()
        where = compiled.output_shardings
        rows, found = places[0].basis.rows[0], where[0].basis.rows[0]
        assert rows.is_equivalent_to(found, 2) and rows.shard_shape((8, 4096)) == (8, 512)
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 4 * 4096
        moments = 2 * 4096 * 4 / (8 if options else 1)  # without shardings Adam's are everywhere
        assert memory.output_size_in_bytes < 8 * 512 * 4 + moments + 4000


@check
def memory_of_a_device():
    """`diagnose.memory` says beforehand what each device will hold."""
    mesh = mesh_of(AxisType.Auto)
    split = NamedSharding(mesh, P(None, AXES))
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)}
    for tx in (optax.chain(lro.scale_by_lre(*PARTS), optax.adam(1e-2)), lro.soap_muon(1e-2)):
        found = lro.diagnose.memory(params, tx)
        places = lro.shardings(tx.init, params)
        zeros = {"w": jnp.zeros((64, 64), jnp.float32)}
        state = jax.jit(tx.init, out_shardings=places)(zeros)
        arrays = jax.tree.leaves(state)
        held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        assert held == found.per_device < found.total == sum(x.nbytes for x in arrays)


PARTS = lro.curvature.Covariance(), lro.basis.GGT(8), lro.inner.EMA(0.5)


@check
def types_of_the_state():
    """What optax asks of its own optimizers: init and update, compiled or not, agree on types."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = lro.scale_by_lre(*PARTS, complement=optax.scale_by_adam())
    with jax.set_mesh(mesh):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=P(None, "x"))
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        compiled = jax.jit(tx.update)(params, state, params)
        types = lambda tree: jax.tree.map(jax.typeof, tree)
        assert types(state) == types(jax.jit(tx.init)(params)) == types(after)
        assert types(compiled) == types((updates, after)) and types(updates) == types(params)
    assert types(tx.init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))).count.shape == ()


def main(arguments):
    names = arguments
    if names[:1] == ["--process"]:
        index, count, port = map(int, names[1:4])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
        assert jax.process_count() == count
        names = names[4:]
    for name in names or CHECKS:
        wrong, begin = "", time.process_time()
        try:
            CHECKS[name]()
        except Exception:
            wrong = traceback.format_exc()
        seconds = round(time.process_time() - begin, 1)
        print(json.dumps({"name": name, "wrong": wrong, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
