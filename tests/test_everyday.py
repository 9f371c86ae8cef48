"""What an ordinary loop meets, over every public recipe: a new one is a line in `cases.RECIPES`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    BASES,
    CURVATURES,
    FURTHER,
    INNERS,
    MORE_BASES,
    RECIPES,
    combinations,
    recipe,
)

import lowrank_optax as lro

NAMES = [*RECIPES, *FURTHER]
SQUARES = ("levenberg_marquardt", "spring")
KEYS = [jax.random.key(i) for i in range(3)]
X, Y = jax.random.normal(KEYS[0], (6, 6)), jax.random.normal(KEYS[1], (6, 4))
PARAMS = {"w": 0.3 * jax.random.normal(KEYS[2], (6, 4)), "b": jnp.zeros(4)}


def residuals(p):
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), p)
    return jnp.ravel(jnp.tanh(X @ wide["w"] + wide["b"]) - Y)


def losses(p):
    return residuals(p) ** 2 / 2


def loss(p):
    return jnp.sum(losses(p))


TELL = {"value_fn": loss, "losses_fn": losses, "residuals_fn": residuals}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def step_of(tx, grads=jax.grad(loss), **extra):
    """One step of a loop: ``(params, state) -> (params, state, updates)``."""

    def step(params, state):
        updates, state = tx.update(grads(params), state, params, **(TELL | extra))
        return optax.apply_updates(params, updates), state, updates

    return step


def run(step, params, state, steps):
    step = jax.jit(step)
    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates


def kinds(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def test_every_recipe_is_tried():
    public = {name: getattr(lro, name) for name in lro.__all__}
    makers = {
        name
        for name, f in public.items()
        if inspect.isfunction(f)
        and f.__module__.startswith(("lowrank_optax.recipes", "lowrank_optax.least_squares"))
    }
    assert makers == set(RECIPES)


# Dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_updates_have_the_dtypes_of_optax_and_states_keep_theirs(name):
    """Over all pairs, by shapes alone."""
    kinds_of = (jnp.float32, jnp.bfloat16, jnp.float16)
    tx, plain = recipe(name), optax.adamw(1e-2)
    for own in kinds_of:
        for given in kinds_of:
            params, grads = cast(PARAMS, own), cast(PARAMS, given)

            def after(tx, params=params, grads=grads):
                state = tx.init(params)
                updates, new = tx.update(grads, state, params, **TELL)
                return updates, state, new

            updates, state, new = jax.eval_shape(lambda: after(tx))
            expected = jax.eval_shape(lambda: after(optax.with_extra_args_support(plain)))[0]
            assert kinds(updates) == kinds(expected), (own, given)
            assert kinds(state) == kinds(new), (own, given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", [("bfloat16", "float32"), ("float32", "float16")], ids="-".join)
def test_mixed_precision_trains(name, pair):
    own, given = map(jnp.dtype, pair)
    params, tx = cast(PARAMS, own), recipe(name)
    grads = lambda p: cast(jax.grad(loss)(p), given)
    end, _, _ = run(step_of(tx, grads), params, tx.init(params), 5)
    assert kinds(end) == kinds(params) and float(loss(end)) < 0.995 * float(loss(params))


@pytest.mark.parametrize("name", NAMES)
def test_a_dead_unit_in_float16_stops_nobody(name):
    params, tx = cast(PARAMS, jnp.float16), recipe(name)

    def dead(p):
        return cast(jax.grad(loss)(p) | {"b": jax.grad(loss)(p)["b"].at[1].set(0)}, jnp.float16)

    end, _, updates = run(step_of(tx, dead), params, tx.init(params), 4)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    alive = jnp.array([0, 2, 3])
    assert bool(jnp.all(end["b"][alive] != 0)) and bool(jnp.any(end["w"] != params["w"]))


@pytest.mark.parametrize("name", NAMES)
def test_numpy_parameters_of_float64(name):
    params, tx = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS), recipe(name)
    state = tx.init(params)
    assert kinds(state) == kinds(tx.init(PARAMS))
    shapes = jax.eval_shape(lambda: tx.update(params, state, params, **TELL))
    assert kinds(shapes) == kinds((PARAMS, state))


@pytest.mark.parametrize("name", ["lre", "whitened_adam"])
def test_a_state_of_another_dtype_is_refused_by_name(name):
    tx = recipe(name)
    state = tx.init(cast(PARAMS, jnp.bfloat16))
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        tx.update(PARAMS, state, PARAMS)


# Hyperparameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_injected_hyperparameters(name):
    """Defaults as they are; sizes traced are refused in a sentence that says what to do."""
    maker = getattr(lro, name)
    rate = {k: v for k, v in RECIPES[name].items() if k == "learning_rate"}
    tx = optax.with_extra_args_support(optax.inject_hyperparams(maker)(**rate))
    state = tx.init(PARAMS)
    shapes = jax.eval_shape(step_of(tx), PARAMS, state)
    assert kinds(shapes[1]) == kinds(state)
    if rate:
        assert float(state.hyperparams["learning_rate"]) == np.float32(rate["learning_rate"])
    for size in {"rank", "batch", "largest"} & inspect.signature(maker).parameters.keys():
        tx = optax.with_extra_args_support(optax.inject_hyperparams(maker)(**rate, **{size: 24}))
        with pytest.raises(ValueError, match="static_args"):
            jax.eval_shape(step_of(tx), PARAMS, tx.init(PARAMS))
        fixed = optax.inject_hyperparams(maker, static_args=size)(**rate, **{size: 24})
        jax.eval_shape(step_of(optax.with_extra_args_support(fixed)), PARAMS, fixed.init(PARAMS))


@pytest.mark.parametrize("name", ["whitened_adam", "sophia_h", "soap_muon"])
def test_injected_is_plain(x64, name):
    options, params = {"weight_decay": 0.1}, cast(PARAMS, jnp.float64)
    static = set(RECIPES[name]) - {"learning_rate"}
    make = optax.inject_hyperparams(getattr(lro, name), static_args=static)
    injected = optax.with_extra_args_support(make(**RECIPES[name] | options))
    plain = recipe(name, **options)
    ends = [run(step_of(tx), params, tx.init(params), 3)[0] for tx in (injected, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), *ends)


def test_weight_decay_may_be_a_schedule(x64):
    params = cast(PARAMS, jnp.float64)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    injected = optax.inject_hyperparams(lro.whitened_adam)(1e-2, weight_decay=schedule)
    plain = lro.whitened_adam(1e-2, weight_decay=schedule)
    txs = map(optax.with_extra_args_support, (injected, plain))
    ends = [run(step_of(tx), params, tx.init(params), 3)[0] for tx in txs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), *ends)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_may_be_concrete_arrays(name):
    maker, kwargs = FURTHER.get(name) or (name, RECIPES[name])
    arrays = {k: jnp.asarray(v) if isinstance(v, int | float) else v for k, v in kwargs.items()}
    tx = optax.with_extra_args_support(getattr(lro, maker)(**arrays))
    jax.eval_shape(step_of(tx), PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", NAMES)
def test_map_params(name):
    tx = recipe(name)
    state = tx.init(PARAMS)
    same = optax.tree.map_params(tx, lambda x, p: x, state, PARAMS)
    assert jax.tree.structure(same) == jax.tree.structure(state)


# Trees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_tree_is_optimized_with_the_rest_held_fixed(x64, name):
    """Under `optax.partition` and `optax.masked`: as the optimizer of a function of that part."""
    tx, params = recipe(name), cast(PARAMS, jnp.float64)
    other = optax.partition({"ours": tx, "fixed": optax.set_to_zero()}, {"w": "ours", "b": "fixed"})
    mine = lambda f: lambda p: f(p | {"b": params["b"]})
    alone = {"w": params["w"]}
    tell = {name: mine(f) for name, f in TELL.items()}
    expected = run(step_of(tx, jax.grad(mine(loss)), **tell), alone, tx.init(alone), 3)[0]["w"]
    ours = run(step_of(other), params, other.init(params), 3)[0]
    np.testing.assert_allclose(ours["w"], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(ours["b"], params["b"])
    masked = optax.masked(tx, {"w": True, "b": False})
    updates = jax.eval_shape(step_of(masked), params, masked.init(params))[2]
    assert kinds(updates) == kinds(params)


def test_a_function_of_hidden_parameters_is_refused_in_a_sentence():
    tx = recipe("sophia_h")
    hidden = {"w": PARAMS["w"], "b": optax.MaskedNode()}
    with pytest.raises(ValueError, match="value_fn is a function of all parameters"):
        tx.update(hidden, tx.init(hidden), hidden, value_fn=loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_functions_and_settings_as_parameters(name):
    """As equinox's users pass it: gradients have ``None`` where there is nothing to optimize."""
    foreign = {"activation": jnp.tanh, "name": "linear", "count": 3, "key": jax.random.key(0)}
    model = PARAMS | foreign | {"nothing": None}
    empty = dict.fromkeys([*foreign, "nothing"])
    own = lambda p: {k: p[k] for k in PARAMS}
    seen = {k: (lambda p, f=f: f(own(p)) + 0 * len(p["name"])) for k, f in TELL.items()}
    tx = recipe(name)
    state = tx.init(PARAMS | empty)
    updates, _ = tx.update(jax.grad(loss)(PARAMS) | empty, state, model, **seen)
    expected = step_of(tx)(PARAMS, tx.init(PARAMS))[2]
    assert all(updates[k] is None for k in empty)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own(updates), expected
    )


@pytest.mark.parametrize(
    "leaf, said",
    [
        (jnp.tanh, "PjitFunction|function"),
        ("linear", "str"),
        (jax.random.key(0), "key"),
        (jnp.zeros(3, jnp.float8_e4m3fn), "float8"),
        (jnp.arange(3), "int32"),
        (jnp.zeros(3, jnp.complex64), "complex64"),
    ],
    ids=["function", "string", "key", "float8", "integer", "complex"],
)
@pytest.mark.parametrize("name", ["lre", "soap_muon"])
def test_a_leaf_that_cannot_be_optimized_is_named(name, leaf, said):
    with pytest.raises(ValueError, match=rf"\['x'\] is .*({said})"):
        recipe(name).init({"w": PARAMS["w"], "x": leaf})


@pytest.mark.parametrize("name", ["lre", "whitened_adam", "soap_muon"])
def test_other_containers_than_the_gradients_get_a_sentence(name):
    flax = pytest.importorskip("flax")
    tx = recipe(name)
    with pytest.raises(ValueError, match="same containers"):
        tx.update(flax.core.freeze(PARAMS), tx.init(PARAMS), PARAMS, **TELL)


@jax.tree_util.register_pytree_node_class
class Checked:
    """A container that refuses fields it does not know: matrices of six rows and vectors."""

    def __init__(self, w, b):
        for x, shape in ((w, (6, 4)), (b, (4,))):
            if hasattr(x, "shape") and x.shape != shape:
                raise ValueError(f"{x.shape} is not {shape}")
        self.w, self.b = w, b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SQUARES])
def test_containers_that_check_their_fields(name):
    tx, params = recipe(name), Checked(**PARAMS)
    seen = {k: (lambda p, f=f: f({"w": p.w, "b": p.b})) for k, f in TELL.items()}
    state = tx.init(params)
    after = lambda p, s: tx.update(p, s, p, **seen)
    updates, new = jax.eval_shape(after, params, state)
    assert isinstance(updates, Checked) and kinds(new) == kinds(state)


def test_rows_do_not_inherit_the_axes_of_a_parameter():
    nn = pytest.importorskip("flax.linen")
    boxed = {"w": nn.Partitioned(PARAMS["w"], names=("rows", "columns")), "b": PARAMS["b"]}
    for name in ("lre", "soap_muon", "whitened_adam"):
        state = recipe(name).init(boxed)
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
            # Adam's moments beside are like the parameter, and have its axes.
            box = isinstance(x, nn.Partitioned) and not isinstance(x.value, optax.MaskedNode)
            assert not box or x.value.shape == PARAMS["w"].shape
        nn.get_partition_spec(state)


def test_a_view_sees_path_and_shape():
    def view(path, shape):
        return lro.MatrixAxes((1,), (0,)) if "w" in jax.tree_util.keystr(path) else None

    state = lro.soap(1e-2, view=view).init(PARAMS | {"other": jnp.zeros((6, 4))})
    assert set(state[0].matrices) == {"4x6"} and state[0].matrices["4x6"].steps.shape == (1,)


# Loops ------------------------------------------------------------------------------------------


class Compilations:
    """Counts what is compiled, from when it was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event, duration, **_):
        self.count += "backend_compile" in event


COMPILED = Compilations()


@pytest.mark.parametrize("name", NAMES)
def test_without_jit_a_step_compiles_once(name):
    tx = recipe(name)
    grads = jax.jit(jax.grad(loss))
    params, state = PARAMS, tx.init(PARAMS)
    eager = step_of(tx, grads)
    for _ in range(2):
        params, state, _ = eager(params, state)
    jitted = run(step_of(tx), PARAMS, tx.init(PARAMS), 2)[0]
    assert abs(loss(params) - loss(jitted)) < 0.02 * loss(PARAMS)
    for _ in range(7):  # rotations of rows, among what comes now and then, have run by then
        params, state, _ = eager(params, state)
    before = COMPILED.count
    for _ in range(3):
        params, state, _ = eager(params, state)
    assert COMPILED.count == before


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_costs_nothing(name):
    """No step, no momentum, no decay; and the next one is as if there had been none."""
    options = {} if name in ("whiten", *SQUARES) else {"weight_decay": 0.1}
    tx = recipe(name, **options)
    step = jax.jit(step_of(tx))
    params, state, _ = step(PARAMS, tx.init(PARAMS))
    params, state, _ = step(params, state)
    broken = step_of(tx, lambda p: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), p))
    after, bad, updates = jax.jit(broken)(params, state)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, np.zeros_like(u)), updates)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    one, two = step(params, state)[2], step(params, bad)[2]
    if name not in ("galore", "soap_low_rank"):  # which draw anew at every call
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


@pytest.mark.parametrize("name", ["lre", "whitened_adam", "soap_muon"])
def test_differentiating_through_several_steps_is_refused_in_a_sentence(name):
    make = lambda rate: recipe(name, learning_rate=rate)

    def end(rate, steps):
        tx = make(rate)
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(steps):
            params, state, _ = step_of(tx)(params, state)
        return loss(params)

    with pytest.raises(ValueError, match="derivative of a step"):
        jax.grad(end)(0.1, 2)
    with pytest.raises(ValueError, match="derivative of a step"):
        jax.jvp(lambda rate: end(rate, 2), (0.1,), (1.0,))


# Parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", sorted(set(combinations())), ids="-".join)
def test_every_part_takes_other_dtypes_and_foreign_leaves(product):
    """By shapes alone: gradients of other dtypes than the parameters, a function among these."""
    measured, kept, inside = product
    tx = lro.scale_by_lre(
        CURVATURES[measured], (BASES | MORE_BASES)[kept], INNERS[inside], complement=0.1
    )
    own = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"], "f": None}
    grads = {"w": PARAMS["w"], "b": PARAMS["b"].astype(jnp.float16), "f": None}
    model = own | {"f": jnp.tanh}
    tell = {k: (lambda p, f=f: f({k: p[k] for k in PARAMS})) for k, f in TELL.items()}

    def after():
        state = tx.init(own)
        return *tx.update(grads, state, model, value=1.0, **tell), state

    updates, new, state = jax.eval_shape(after)
    assert kinds(updates) == [((4,), jnp.float32), ((6, 4), jnp.float32)]
    assert kinds(new) == kinds(state)
