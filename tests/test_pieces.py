"""Small leaves joined into pieces: what is where, and that nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax._core.pieces import DEVICES, SMALL, WHOLE, shares

SHAPES = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 3, 32, 48])), max_size=7)


@given(shapes=SHAPES)
def test_joining_is_undone(shapes):
    rng = np.random.default_rng(len(shapes))
    tree = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    layout = lro.Layout.of(tree, None, small=True)
    vector = layout.flatten(tree)
    assert [x.size for x in vector] == list(layout.sizes)
    assert sorted(i for piece in layout.pieces for i in piece) == list(range(len(tree)))
    jax.tree.map(np.testing.assert_array_equal, layout.unflatten(vector), tree)
    many = [jnp.stack([x, 2 * x]) for x in tree]
    columns, _ = layout.columns(many, "test")
    jax.tree.map(np.testing.assert_array_equal, layout.vectors(columns), many)
    for x, y in zip(columns, vector, strict=True):
        np.testing.assert_array_equal(x, np.stack([y, 2 * y]))


def test_every_device_joins_its_own_part_of_the_leaves():
    leaves = [jnp.arange(96.0), 1000 + jnp.arange(64.0).reshape(2, 32), jnp.ones(33)]
    layout = lro.Layout.of(leaves, None, small=True)
    assert layout.pieces == ((0, 1), (2,))
    (piece, _), k = layout.flatten(leaves), shares(96)
    own = np.concatenate([np.reshape(x, (k, -1)) for x in leaves[:2]], axis=1)
    assert k == DEVICES
    np.testing.assert_array_equal(np.reshape(piece, (k, -1)), own)


def test_large_leaves_and_groups_stay_apart():
    shape = lambda *sizes: [jax.ShapeDtypeStruct((n,), jnp.float32) for n in sizes]
    pieces = lambda tree, groups=None: lro.Layout.of(tree, groups, small=True).pieces
    assert pieces(shape(SMALL, SMALL + 32, SMALL)) == ((0, 2), (1,))
    full = WHOLE // SMALL
    assert pieces(shape(*[SMALL] * (full + 1))) == (tuple(range(full)), (full,))
    assert pieces(shape(32, 32), lro.per_leaf) == ((0,), (1,))


def test_a_bad_bias_stops_all_that_is_no_matrix_and_no_matrix():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6), "c": jnp.ones(3)}
    tx = lro.soap_muon(0.1)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(2):
        _, state = step(params, state, params)
    updates, after = step(params | {"b": params["b"].at[1].set(jnp.nan)}, state, params)
    assert not np.any(updates["b"]) and not np.any(updates["c"]) and np.all(updates["w"] != 0)
    assert int(after[0].dropped) == int(state[0].dropped) + 1
    jax.tree.map(np.testing.assert_array_equal, after[0].rest, state[0].rest)
