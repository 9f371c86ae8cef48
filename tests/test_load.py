"""Under load: many runs in one call, many steps in one program, many leaves in one tree."""

import functools
import gc
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BASES, CURVATURES, INNERS, MORE_BASES, STEADY, provider
from compiling import Traced

import lowrank_optax as lro

B, C = lro.basis, lro.curvature
ROOT = Path(lro.__file__).parents[1]
PARAMS = {"b": jnp.linspace(-1.0, 1.0, 5), "w": jnp.linspace(0.5, 1.5, 12).reshape(3, 4)}
SCALE = {"b": 10.0 ** jnp.linspace(0, -2, 5), "w": jnp.linspace(0.2, 2.0, 12).reshape(3, 4)}


def residuals(params):
    return jnp.concatenate(
        [jnp.ravel(jnp.sqrt(SCALE[name]) * (p - 0.3)) for name, p in params.items()]
    )[:6]


def value_fn(params):
    return 0.5 * sum(jnp.sum(SCALE[name] * (p - 0.3) ** 2) for name, p in params.items())


EXTRA = {
    "value_fn": value_fn,
    "losses_fn": residuals,
    "residuals_fn": residuals,
    "value": jnp.ones(()),
}


def optimizers():
    """Makers of every registered part in an optimizer, and of the recipes that are no such."""

    def engine(measured, kept, inside, **options):
        return lambda rate=1e-2: optax.chain(
            lro.scale_by_lre(CURVATURES[measured], kept, INNERS[inside], **options),
            optax.scale_by_learning_rate(rate),
        )

    everything = BASES | MORE_BASES
    made = {}
    for name in CURVATURES:
        needs = {"complement": lro.inner.LInv()} if "complement" in CURVATURES[name].needs else {}
        made[f"curvature-{name}"] = engine(name, BASES["eigen"], "default", **needs)
    for name, kept in everything.items():
        made[f"basis-{name}"] = engine(provider(name, "default"), kept, "default")
    for name in INNERS:
        made[f"inner-{name}"] = engine(provider("ggt", name), BASES["ggt"], name)
    options = {
        "update_every": lambda count: 2 + count // 4,
        "complement": optax.scale_by_adam(),
        "groups": lro.per_leaf,
        "dtype": jnp.bfloat16,
    }
    made["options"] = engine("covariance", BASES["eigen"], "default", **options)
    return made | {
        "galore": lambda rate=1e-2: lro.galore(rate, rank=2, update_every=3),
        "soap": lambda rate=1e-2: lro.soap(rate),
        "soap_muon": lambda rate=1e-2: lro.soap_muon(rate),
        "whitened_adam": lambda rate=1e-2: lro.whitened_adam(rate, rank=4),
        "levenberg_marquardt": lambda rate=1e-2: lro.levenberg_marquardt(),
        "by_products": lambda rate=1e-2: lro.levenberg_marquardt(rank=2),
        "spring": lambda rate=1e-2: lro.spring(rate),
    }


OPTIMIZERS = optimizers()


@pytest.fixture(scope="module", params=OPTIMIZERS)
def made(request):
    """A maker of optimizers, one made, and its fresh state."""
    make = OPTIMIZERS[request.param]
    tx = make()
    return make, tx, tx.init(PARAMS)


def types(tree):
    """What a compiled function is chosen by."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


# One program for all steps ----------------------------------------------------------------------


def test_a_step_leaves_the_types_of_the_state(made):
    """Structure, shapes, dtypes, weak types: whoever compiled one step has compiled them all."""
    _, tx, state = made
    after = jax.eval_shape(lambda g, s: tx.update(g, s, PARAMS, **EXTRA), PARAMS, state)
    assert jax.tree.structure(after[1]) == jax.tree.structure(state)
    assert types(after[1]) == types(jax.eval_shape(lambda: state))
    assert types(after[0]) == types(jax.eval_shape(lambda: PARAMS))


def test_optimizers_built_alike_share_their_states(made):
    make, _, state = made
    again = jax.eval_shape(make().init, PARAMS)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert types(again) == types(jax.eval_shape(lambda: state))


def test_every_leaf_of_a_fresh_state_has_its_own_buffer(made):
    """Two that shared one could not both be donated."""
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(made[2]) if x.size]
    assert len(set(where)) == len(where)


def test_one_program_for_changing_rates_and_rebuilt_optimizers():
    """The rate is an argument, the optimizer is built in the step; schedules count in the state."""

    @Traced
    def step(rate, params, state):
        updates, state = lro.lre(rate, basis=B.GGT(3)).update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, lro.lre(1e-2, basis=B.GGT(3)).init(PARAMS)
    for rate in (1e-2, 1e-3):
        params, state = step(jnp.float32(rate), params, state)
    step(jnp.float32(1.0), params, lro.lre(5.0, basis=B.GGT(3)).init(PARAMS))
    assert step.count == 1

    scheduled = lro.lre(optax.cosine_decay_schedule(1e-2, 10), basis=B.GGT(3))
    update = Traced(scheduled.update)
    state, sizes = scheduled.init(PARAMS), []
    for _ in range(12):
        updates, state = update(PARAMS, state, PARAMS)
        sizes.append(float(optax.tree.norm(updates)))
    assert update.count == 1 and sizes[0] > sizes[5] > sizes[-1] == 0


# Memory -----------------------------------------------------------------------------------------


def live():
    gc.collect()
    return len(jax.live_arrays()), sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
def test_memory_is_flat_over_steps(donate):
    tx = lro.lre(
        1e-2, C.HutchinsonHessian(), B.Eigen(4, buffer=3), lro.inner.Adam(), update_every=2
    )

    @functools.partial(Traced, donate_argnums=(0, 1) if donate else ())
    def step(params, state):
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    with jax.checking_leaks():
        params, state = step(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))
    before = live()
    for _ in range(500):
        params, state = step(params, state)
    assert live() == before
    assert step.count == 1 and bool(value_fn(params) < value_fn(PARAMS))


def test_dropped_optimizers_leave_nothing():
    """The functions hold the engine; nothing else in the library may."""
    lro.lre(1e-2, basis=B.GGT(2)).init(PARAMS)
    before, engines = live(), []
    for i in range(1000):
        tx = lro.lre(1e-2 * (i + 1), basis=B.GGT(2 + i % 3), weight_decay=1e-3 * i)
        engines.append(weakref.ref(tx.update))
        if i % 100 == 0:
            tx.init(PARAMS)
    del tx
    assert live() == before
    assert not [ref for ref in engines if ref() is not None]


RECIPES = ("soap", "galore", "soap_muon", "levenberg_marquardt", "options")


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_state_can_be_donated(name):
    tx = OPTIMIZERS[name]()

    def step(params, state):
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, **EXTRA)
        return optax.apply_updates(params, updates), state

    ends = []
    for donated in ((), (0, 1)):
        params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
        run = jax.jit(step, donate_argnums=donated)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of buffers that could not be used
            for _ in range(3):
                given, (params, state) = (params, state), run(params, state)
        ends.append((params, state))
        assert all(x.is_deleted() == bool(donated) for x in jax.tree.leaves(given) if x.size)
    jax.tree.map(np.testing.assert_array_equal, *ends)


# Many runs in one call --------------------------------------------------------------------------

FAULTY = jnp.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]])
SWEEPS = {
    "lre": lambda rate: lro.lre(rate, basis=B.GGT(4), inner=STEADY),
    "eigen": lambda rate: lro.lre(rate, basis=B.Eigen(3, buffer=2), inner=STEADY),
    "every": lambda rate: lro.lre(rate, basis=B.GGT(4), inner=STEADY, update_every=2),
    "soap_muon": lambda rate: lro.soap_muon(rate, update_every=2),
}


@pytest.mark.parametrize("name", ["eigen", "every", "soap_muon"])
def test_runs_of_a_batch_do_not_touch_each_other(name):
    """A gradient of some runs is not finite now and then: their loops run when others' do not."""

    def train(rate, faults):
        tx = SWEEPS[name](rate)

        def step(carry, at):
            (params, state), (fault, turn) = carry, at
            grads = jax.tree.map(
                lambda g: jnp.where(fault > 0, jnp.nan, g + turn * jnp.roll(g, 1)),
                jax.grad(value_fn)(params),
            )
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        turns = jnp.cos(jnp.arange(8.0))
        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (faults, turns))[0][0]

    rates = jnp.array([1e-2, 1e-1, 3e-2])
    many, one = jax.jit(jax.vmap(train))(rates, FAULTY), jax.jit(train)
    for i, rate in enumerate(rates):
        alone = one(rate, FAULTY[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-5), many, alone
        )


@pytest.mark.parametrize("name", ["lre", "eigen", "every"])
def test_a_batch_of_steps_copies_no_rows(name):
    """Memory beside the state is that of the single steps, and rows are written where they lie."""
    size, runs = 4001, 5
    tx = lambda rate: SWEEPS[name](rate)
    step = lambda rate, g, state: tx(rate).update(g, state, g)
    g, rates = jnp.ones(size), jnp.linspace(0.1, 1, runs)
    one = jax.eval_shape(tx(0.1).init, g)
    many = jax.eval_shape(jax.vmap(lambda rate: tx(rate).init(g)), rates)
    alone = jax.jit(step, donate_argnums=2).lower(0.1, g, one).compile().memory_analysis()
    batch = jax.jit(jax.vmap(step), donate_argnums=2)
    batch = batch.lower(rates, jnp.ones((runs, size)), many).compile()
    assert batch.memory_analysis().temp_size_in_bytes <= 1.5 * runs * alone.temp_size_in_bytes
    shape = rf"f32\[{runs},{lro.diagnose.find(one).basis.rows[0].shape[0]},{size}\]"
    copying = rf"= {shape}\S* (?:copy|select|concatenate|transpose|pad)\("
    assert not re.findall(copying, batch.as_text())


def test_injected_rates_are_a_batch_of_states():
    """One optimizer; the rates lie in the state, along its leading axis."""
    tx = optax.inject_hyperparams(lro.lre, static_args=("curvature", "basis", "inner"))(
        learning_rate=1.0, curvature=C.Covariance(), basis=B.GGT(4), inner=STEADY
    )
    rates = jnp.array([1e-2, 1e-1])

    def start(rate):
        state = tx.init(PARAMS)
        return state._replace(hyperparams=state.hyperparams | {"learning_rate": rate})

    grads = jax.grad(value_fn)(PARAMS)
    update = lambda state: tx.update(grads, state, PARAMS)[0]
    many = jax.jit(jax.vmap(update))(jax.vmap(start)(rates))
    for i, rate in enumerate(rates):
        plain = lro.lre(rate, basis=B.GGT(4), inner=STEADY)
        alone = jax.jit(lambda tx=plain: tx.update(grads, tx.init(PARAMS), PARAMS)[0])()
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6), many, alone
        )


# Many leaves ------------------------------------------------------------------------------------

MODELS = {
    "ggt": lambda: lro.lre(1e-2, basis=B.GGT(4)),
    "eigen": lambda: lro.lre(1e-2, basis=B.Eigen(4, buffer=3)),
    "per_leaf": lambda: lro.lre(1e-2, basis=B.GGT(4), groups=lro.per_leaf),
    "soap": lambda: lro.soap(1e-2),
}
# In `soap` these leaves are Adam's, and each is judged by itself: 55 lines are Adam, the rest that.
LINES = {"ggt": 110, "eigen": 500, "per_leaf": 120, "soap": 235}


@pytest.mark.parametrize("name", MODELS)
def test_programs_grow_linearly_with_the_leaves(name):
    """Every further leaf adds so many lines of optimized HLO, whatever the number of leaves.

    Sums over the leaves that XLA copies into what reads them add as many again for a few leaves.
    """
    tx, lines = MODELS[name](), []
    for leaves in (6, 14):
        params = [jnp.zeros(20 + i) for i in range(leaves)]
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
        lines.append(len(compiled.as_text().splitlines()))
    assert lines[1] - lines[0] <= 8 * LINES[name]


# Import -----------------------------------------------------------------------------------------


def test_importing_computes_nothing_and_needs_jax_and_optax_alone():
    """With a backend that does not exist any array that an import made would fail."""
    script = """if True:
        import os, sys
        os.environ["JAX_PLATFORMS"] = "there is none"
        import jax, optax, chex
        before = {name.split(".")[0] for name in sys.modules}
        import lowrank_optax
        new = {name.split(".")[0] for name in sys.modules} - before
        assert new - set(sys.stdlib_module_names) == {"lowrank_optax"}, new
        assert "lowrank_optax.spectral" not in sys.modules
        try:
            jax.numpy.zeros(())
        except RuntimeError:
            print("sound")
    """
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, text=True, cwd=ROOT).strip() == "sound"
