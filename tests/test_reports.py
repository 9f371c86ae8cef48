"""Situations that users of optimizers report, each a short loop: see docs/guides/reliability.md.

Whole loops in a few recipes at tiny shapes. What is a matter of types alone is traced and not run.
"""

import copy
import functools
import pickle
import warnings

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, CURVATURES, DEFAULT, INNERS, MORE_BASES, provider
from flax.core import freeze

import lowrank_optax as lro
from lowrank_optax import spectral
from lowrank_optax.online import trackers

RECIPES = {
    "lre": lambda rate: lro.lre(rate, basis=lro.basis.GGT(3)),
    "soap_muon": lambda rate: lro.soap_muon(rate),
    "whitened_adam": lambda rate: lro.whitened_adam(rate, rank=3),
    "sophia_h": lambda rate: lro.sophia_h(rate, rank=3, update_every=2),
    "galore": lambda rate: lro.galore(rate, rank=2, update_every=2),
}
OPTIMIZERS = {name: make(1e-2) for name, make in RECIPES.items()}
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.linspace(-1, 1, 4)}

every_recipe = pytest.mark.parametrize("name", RECIPES)


def loss(params):
    """Smooth, with a Hessian that differs from entry to entry."""
    parts = [jnp.sum(x**2) + jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params)]
    return sum(parts, jnp.zeros((), parts[0].dtype))


def one_step(tx, params, state, loss=loss):
    updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
    return optax.apply_updates(params, updates), state


@functools.cache
def step_of(name):
    """Compiled once a recipe."""
    return jax.jit(functools.partial(one_step, OPTIMIZERS[name]))


@functools.cache
def update_of(name):
    """The same with the gradients given."""
    tx = OPTIMIZERS[name]
    return jax.jit(lambda g, state, params: tx.update(g, state, params, value_fn=loss))


def steps(name, count, params=PARAMS, state=None):
    state = OPTIMIZERS[name].init(params) if state is None else state
    for _ in range(count):
        params, state = step_of(name)(params, state)
    return params, state


def typed(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), x.weak_type), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


# Trees and shapes -------------------------------------------------------------------------------

ODD = {
    "scalar": jnp.ones(()),
    "empty": jnp.zeros((0, 3)),
    "row": jnp.ones((1, 4)),
    "column": jnp.ones((4, 1)),
    "depthwise": jnp.linspace(-1, 1, 12).reshape(2, 2, 1, 3),
    "list": [jnp.ones(2), (jnp.ones((2, 2)),)],
    "nothing": None,
}


@every_recipe
def test_scalars_empty_leaves_thin_matrices_and_depthwise_kernels(name):
    params, state = steps(name, 3, ODD)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ODD)
    assert finite(params)
    for before, after in zip(jax.tree.leaves(ODD), jax.tree.leaves(params), strict=True):
        assert before.size == 0 or not np.array_equal(before, after)


@every_recipe
def test_dictionaries_with_numbers_for_keys_and_frozen_ones(name):
    tx = OPTIMIZERS[name]
    numbers = {0: PARAMS["w"], 1: {7: PARAMS["b"]}}
    for params in (numbers, freeze(PARAMS)):
        new, state = jax.eval_shape(functools.partial(one_step, tx), params, tx.init(params))
        assert jax.tree.structure(new) == jax.tree.structure(params)
    mask = {"w": True, "b": False}
    masked = optax.masked(tx, freeze(mask))
    jax.eval_shape(functools.partial(one_step, masked), freeze(PARAMS), masked.init(freeze(PARAMS)))


@every_recipe
@pytest.mark.parametrize("kind, says", [("complex64", "imaginary"), ("int32", "floating-point")])
def test_leaves_of_another_kind_are_refused_in_a_sentence(name, kind, says):
    with pytest.raises(ValueError, match=f"{kind}; .*{says}"):
        OPTIMIZERS[name].init(PARAMS | {"ids": jnp.zeros((3, 4), kind)})


# Gradients --------------------------------------------------------------------------------------


@every_recipe
def test_a_first_gradient_of_zeros_leaves_no_nan(name):
    zero, tx = jax.tree.map(jnp.zeros_like, PARAMS), OPTIMIZERS[name]
    updates, state = update_of(name)(zero, tx.init(PARAMS), PARAMS)
    assert finite((updates, state)) and not any(np.any(u) for u in jax.tree.leaves(updates))
    params, state = steps(name, 2, PARAMS, state)
    assert finite(params) and not np.array_equal(params["w"], PARAMS["w"])


@every_recipe
@pytest.mark.parametrize("frozen", PARAMS)
def test_a_leaf_whose_gradient_stays_zero_stays(name, frozen):
    """A layer that is not reached yet, or frozen by `jax.lax.stop_gradient`."""
    tx, params = OPTIMIZERS[name], PARAMS
    state = tx.init(params)
    for _ in range(3):
        g = jax.grad(loss)(params)
        g = g | {frozen: jnp.zeros_like(g[frozen])}
        updates, state = update_of(name)(g, state, params)
        params = optax.apply_updates(params, updates)
    other = next(leaf for leaf in PARAMS if leaf != frozen)
    assert finite((params, state)) and not np.array_equal(params[other], PARAMS[other])
    if name == "sophia_h":  # whose curvature is that of value_fn, frozen leaf and all
        return
    np.testing.assert_allclose(params[frozen], PARAMS[frozen], atol=1e-5)


@pytest.mark.parametrize("name", ["lre", "soap_muon", "whitened_adam"])
def test_a_learning_rate_that_is_far_too_large_spoils_no_state(name):
    """Parameters overflow, gradients are NaN, and the state stays what it was."""
    tx, params = RECIPES[name](3e38), PARAMS
    state, run = tx.init(params), jax.jit(functools.partial(one_step, tx))
    for _ in range(4):
        params, state = run(params, state)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(params))
    assert not largest < 1e30 and finite(state)  # not a number, or as good as one


@every_recipe
def test_clipping_before_and_after(name):
    """After the optimizer it bounds the step; before it, a NaN in the norm changes nothing."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name], optax.clip(1e-3))
    state = tx.init(PARAMS)
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS, value_fn=loss))
    updates, state = update(jax.grad(loss)(PARAMS), state)
    assert 0 < max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates)) <= 1.001e-3
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), PARAMS)
    updates, state = update(bad, state)
    assert finite((updates, state))


# Types ------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_type_of_the_state_changes_in_a_loop(name, dtype):
    """As `jax.lax.scan` and `jax.jit` without a second compilation ask for."""
    tx = OPTIMIZERS[name]
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    state = tx.init(params)
    body = lambda carry, _: (one_step(tx, *carry), None)
    out, _ = jax.eval_shape(lambda c: jax.lax.scan(body, c, length=2), (params, state))
    assert typed(out) == typed((params, state))


@every_recipe
def test_accumulation_in_16_bits(name):
    """`optax.MultiSteps` has two branches, whose types have to agree."""
    tx = optax.MultiSteps(OPTIMIZERS[name], 2)
    for params in (PARAMS, jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)):
        state = tx.init(params)
        new = jax.eval_shape(functools.partial(one_step, tx), params, state)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
            lambda x: x.dtype, (params, state)
        )


@every_recipe
def test_a_state_cast_to_16_bits_is_refused_by_name(name):
    """Halved by hand to save memory: small algebra is float32 at least, and rows have a dtype."""
    tx = OPTIMIZERS[name]
    half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    state = jax.tree.map(half, steps(name, 1)[1])
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        one_step(tx, PARAMS, state)


def products():
    """Every part once."""
    yield from ((provider(b, "default"), b, "default") for b in BASES | MORE_BASES)
    yield from ((c, "eigen", "default") for c in CURVATURES if c != "bfgs_of_gradients")
    yield from ((provider("eigen", i), "eigen", i) for i in INNERS)


ALL_RECIPES = {
    "ggt": lro.ggt(0.1, rank=3),
    "full_matrix_adam": lro.full_matrix_adam(0.1, rank=3),
    "lowrank_newton": lro.lowrank_newton(0.1, rank=3),
    "adahessian": lro.adahessian(0.1, rank=3),
    "natural_gradient": lro.natural_gradient(0.1, rank=3),
    "gauss_newton": lro.gauss_newton(0.1, batch=4),
    "levenberg_marquardt": lro.levenberg_marquardt(),
    "by_products": lro.levenberg_marquardt(rank=2),
    "spring": lro.spring(),
    "soap": lro.soap(0.1),
    "whiten": lro.whiten(rank=3),
    **OPTIMIZERS,
}


def traced(tx):
    """One step, traced under a flag that JAX has no way to tell apart in its caches."""
    residuals = lambda p: p["b"] ** 2 - 1
    extra = {"residuals_fn": residuals, "losses_fn": lambda p: residuals(p) ** 2, "value": 1.0}

    def run(params):
        state = tx.init(params)
        return tx.update(jax.grad(loss)(params), state, params, value_fn=loss, **extra)

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(run, PARAMS)


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_no_recipe_promotes_ranks(name):
    traced(ALL_RECIPES[name])


@pytest.mark.parametrize("product", sorted(set(products())), ids="-".join)
def test_no_part_promotes_ranks(product):
    measured, kept, inside = product
    basis = (BASES | MORE_BASES)[kept]
    rule = INNERS.get(inside, DEFAULT)
    traced(lro.scale_by_lre(CURVATURES[measured], basis, rule))


def test_no_stream_and_no_fit_promotes_ranks():
    learner = lro.online.learner(2, (lro.online.Dynamics(),))
    with jax.numpy_rank_promotion("raise"):
        for part in (trackers.brand(2), trackers.PAST(2), trackers.PETRELS(2), learner):

            def run(v, part=part):
                state = part.update(part.init(jax.random.key(0), v[0]), v)
                operator = part.operator(state[0] if part is learner else state)
                return operator.eigenvectors(), operator.power(v, -0.5), operator.solve(v, 1.0)

            jax.eval_shape(run, jnp.ones((3, 6)))
        well = spectral.operators.Langevin(
            spectral.operators.DoubleWell(), spectral.operators.gaussian(1, 1.0)
        )
        spectral.fit(well, 2, steps=1, batch_size=8, evaluate_batches=2)


# Debugging --------------------------------------------------------------------------------------


@every_recipe
def test_no_nan_on_the_way(name):
    """Under ``jax_debug_nans`` a healthy run has none, also where what is not used is masked."""
    with jax.debug_nans(True):
        params, state = steps(name, 3)
    assert finite((params, state))


def test_enabled_checks():
    with jax.enable_checks(True):
        for name in ("whitened_adam", "galore"):
            jax.eval_shape(
                functools.partial(one_step, OPTIMIZERS[name]), PARAMS, OPTIMIZERS[name].init(PARAMS)
            )


# States as values -------------------------------------------------------------------------------


@every_recipe
def test_every_leaf_of_a_state_is_an_array_and_copies_go_on(name):
    params, state = steps(name, 2)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    end = steps(name, 2, params, state)
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_same(steps(name, 2, params, copied), end)


@every_recipe
def test_a_transformation_travels_to_another_process(name):
    tx = cloudpickle.loads(cloudpickle.dumps(OPTIMIZERS[name]))
    assert typed(tx.init(PARAMS)) == typed(OPTIMIZERS[name].init(PARAMS))


def test_parts_and_transformations_as_static_arguments():
    """Equal parts are one key of the cache; a transformation is one by identity, as optax's are."""
    assert lro.basis.GGT(3) == lro.basis.GGT(3) and hash(lro.basis.GGT(3)) == hash(lro.basis.GGT(3))

    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def init(tx, params):
        traced.append(tx)
        return tx.init(params)

    init(OPTIMIZERS["lre"], PARAMS)
    init(OPTIMIZERS["lre"], PARAMS)
    assert len(traced) == 1


def test_one_array_as_two_leaves_cannot_be_donated():
    """What XLA says; tied weights are one leaf, or copies."""
    shared = jnp.ones((3, 4))
    tied, tx = {"in": shared, "out": shared}, OPTIMIZERS["whitened_adam"]
    step = jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, RuntimeError), match="(?i)donate"):
            jax.block_until_ready(step(tied, tx.init(tied)))
        copies = jax.tree.map(jnp.copy, tied)
        params, _ = step(copies, tx.init(copies))
    assert finite(params)


@every_recipe
def test_a_schedule_resumes_where_it_was(name):
    """The count is in the state: a new transformation and the old state go on along it."""
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    first, second = RECIPES[name](schedule), RECIPES[name](schedule)
    run = jax.jit(functools.partial(one_step, first))
    params, state = PARAMS, first.init(PARAMS)
    for _ in range(4):
        params, state = run(params, state)
    stopped, _ = jax.jit(functools.partial(one_step, second))(params, state)
    assert_same(stopped, params)


# Loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lre", "whitened_adam", "galore"])
def test_an_ensemble_is_trained_as_its_members_are(name):
    tx = OPTIMIZERS[name]
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x + 0.1]), PARAMS)
    state = jax.vmap(tx.init)(many)
    run = jax.jit(jax.vmap(functools.partial(one_step, tx)))
    trained = many
    for _ in range(3):
        trained, state = run(trained, state)
    for i in range(2):
        alone, _ = steps(name, 3, jax.tree.map(lambda x, i=i: x[i], many))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-3), trained, alone
        )


@every_recipe
def test_averages_lookahead_and_schedule_free(name):
    """optax's wrappers of parameters, traced: their branches ask for equal types."""
    tx = OPTIMIZERS[name]
    fast = optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(PARAMS)

    def looked_ahead(both, state):
        # lookahead forwards no extra arguments; what needs them cannot be wrapped by it.
        updates, state = fast.update(jax.grad(loss)(both.fast), state, both)
        return optax.apply_updates(both, updates), state

    if name != "sophia_h":
        new = jax.eval_shape(looked_ahead, both, fast.init(both))
        assert jax.tree.structure(new[0]) == jax.tree.structure(both)
    free = optax.contrib.schedule_free(tx, 1e-2)
    new = jax.eval_shape(functools.partial(one_step, free), PARAMS, free.init(PARAMS))
    assert typed_shapes(new[0]) == typed_shapes(PARAMS)


def typed_shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_curvature_of_a_rematerialised_loss():
    """Products with a Hessian go through `jax.checkpoint`."""
    plain, _ = steps("sophia_h", 2)
    tx = OPTIMIZERS["sophia_h"]
    run = jax.jit(functools.partial(one_step, tx, loss=jax.checkpoint(loss)))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = run(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, plain)


def test_a_window_costs_what_its_rows_cost():
    """The state of whitening in front of Adam: rank rows and two moments of what they are for."""
    params = jnp.zeros(10_000)
    state = jax.eval_shape(lro.whitened_adam(0.1, rank=20).init, params)
    entries = sum(x.size for x in jax.tree.leaves(state))
    assert 22 * 10_000 <= entries < 22.2 * 10_000
