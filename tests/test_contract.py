"""What every combination of parts must do: keep dtypes, compile once, survive a NaN."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from cases import BASES, CURVATURES, INNERS, MORE_BASES, combinations

import lowrank_optax as lro
from lowrank_optax.inner import as_inner

PARAMS = {
    "scalar": jnp.asarray(0.5, jnp.float16),
    "vector": jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16),
    "matrix": jnp.linspace(1, 2, 12, dtype=jnp.float32).reshape(3, 4),
    "empty": jnp.zeros((0, 2)),
    "none": None,
}


def noise(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def residuals(params):
    leaves = [x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(params)]
    x = jnp.concatenate(leaves)
    return jnp.concatenate([x[:-1] * x[1:] - 1, x - 0.3])[:6]


def loss(params):
    return jnp.sum(residuals(params) ** 2) / 2


EXTRA = {
    "value_fn": loss,
    "losses_fn": lambda params: residuals(params) ** 2 / 2,
    "residuals_fn": residuals,
    "nobody_asked_for_this": None,
}


def keep_the_contract(*parts):
    """Three steps of an optimizer of these parts, one of them with a NaN."""
    tx = lro.scale_by_lre(*parts, complement=0.1 if "complement" in parts[0].needs else None)
    traces = []

    @jax.jit
    def step(params, state, noise):
        traces.append(None)
        value, grads = jax.value_and_grad(loss)(params)
        grads = optax.tree.add(grads, noise)
        updates, state = tx.update(grads, state, params, value=value, **EXTRA)
        moved = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
        return updates, moved, state

    params, state = PARAMS, tx.init(PARAMS)
    # Orbax saves no arrays without entries, so that there are none but those of empty leaves.
    filled = {name: x for name, x in PARAMS.items() if name != "empty"}
    assert all(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, filled)))
    moved = False
    for seed in range(3):
        if seed == 2:
            bad = noise(seed) | {"vector": jnp.full(5, jnp.nan, jnp.bfloat16)}
            updates, same, after = step(params, state, bad)
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
            assert int(after.events.nonfinite[0]) == 1
            assert int(after.count) == int(state.count) + 1
            after = after._replace(count=state.count, events=state.events)
            jax.tree.map(np.testing.assert_array_equal, after, state)
        updates, params, state = step(params, state, noise(seed))
        assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(PARAMS), strict=True):
            assert u.dtype == p.dtype and u.shape == p.shape
            assert np.all(np.isfinite(u))
            moved |= bool(np.any(u))
    assert moved
    assert len(traces) == 1
    assert sum(int(n[0]) for n in state.events) == 0


@pytest.mark.parametrize("names", list(combinations()), ids="-".join)
def test_every_combination(names):
    curvature, basis, inner = names
    keep_the_contract(CURVATURES[curvature], (BASES | MORE_BASES)[basis], INNERS[inner])


@pytest.mark.parametrize("name", [*BASES, *MORE_BASES, "outside"])
def test_a_column_of_weight_zero_has_no_effect(name):
    """Whatever finite numbers it holds: the same basis as beside another one of weight zero."""
    basis = (BASES | MORE_BASES | {"outside": outside.OneDirection()})[name]
    layout = lro.Layout.of(jnp.zeros(6), None)

    @jax.jit
    def run(idle):
        state = basis.init(layout, jax.random.key(0))
        for seed in range(3):
            live = jax.random.normal(jax.random.key(seed), (1, 6))
            columns = [jnp.concatenate([live, jnp.full((1, 6), idle)])]
            given = lro.SymmetricCorrection(columns, jnp.array([[1.0, 0.0]]), params=jnp.zeros(6))
            state = basis.absorb(
                layout, state, given, jnp.array([True]), jax.random.key(seed)
            ).state
        # Rows of dead slots may hold anything: nobody reads them.
        return basis.project(layout, state, [jnp.eye(6)]), basis.eigenbasis(state)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, run(3.0), run(-500.0))


def test_the_whole_product_builds_or_says_what_to_combine():
    """Every curvature with every basis and inner part: a need is met, or named before any step."""
    built = 0
    for measured in CURVATURES.values():
        for kept in (BASES | MORE_BASES).values():
            for inside in INNERS.values():
                needs = measured.needs | kept.needs | getattr(as_inner(inside), "needs", set())
                missing = needs - measured.provides - kept.provides - {"complement"}
                if missing:
                    with pytest.raises(ValueError, match="combine it with"):
                        lro.scale_by_lre(measured, kept, inside, complement=0.1)
                else:
                    lro.scale_by_lre(measured, kept, inside, complement=0.1)
                    built += 1
    assert built > 1000


@pytest.mark.parametrize("module", [lro.basis, lro.online, lro.online.trackers])
def test_parts_are_abstract_or_final(module):
    """No part changes what another part is: it would inherit that one's documentation, too."""
    for part in (getattr(module, name) for name in module.__all__):
        if inspect.isclass(part) and dataclasses.is_dataclass(part):
            above = [c for c in part.__mro__[1:] if c.__module__.startswith("lowrank_optax")]
            assert all(inspect.isabstract(c) for c in above), part


@pytest.mark.parametrize(
    "modules, registry, base",
    [
        ((lro.curvature, lro.experimental), CURVATURES, lro.curvature.Curvature),
        ((lro.basis, lro.online), BASES | MORE_BASES, lro.basis.Basis),
        ((lro.inner,), INNERS, None),
    ],
    ids=["curvature", "basis", "inner"],
)
def test_no_part_is_left_out(modules, registry, base):
    tried = {
        type(p)
        for part in registry.values()
        for p in (part if isinstance(part, tuple) else (part,))
    }
    parts = (getattr(module, name) for module in modules for name in module.__all__)
    public = {
        x
        for x in parts
        if inspect.isclass(x)
        and not inspect.isabstract(x)
        and (issubclass(x, base) if base else hasattr(x, "laws"))
    }
    assert public - {lro.inner.Chain} == tried
