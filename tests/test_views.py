"""How leaves are seen: real modules of flax and equinox, and batches of matrices as single ones."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax import basis, inner

KEY = jax.random.key(0)


def noise(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def table(tree, **options):
    """``{path: (batch, rows, columns)}`` of all leaves that are seen as matrices."""
    seen = lro.diagnose.views(tree, **options).leaves
    return {each.path: each.matrices for each in seen if each.matrices is not None}


def shapes(spec):
    """A tree of shapes from paths such as ``"block/attention/query/kernel"``."""
    tree = {}
    for path, shape in spec.items():
        *modules, name = path.split("/")
        at = tree
        for module in modules:
            at = at.setdefault(module, {})
        at[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


# flax's linen -------------------------------------------------------------------------------------


class Block(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(2, use_bias=self.bias)
        x += attention(nn.RMSNorm()(x))
        hidden = nn.Dense(24, use_bias=self.bias)(nn.LayerNorm(use_bias=self.bias)(x))
        return x + nn.Dense(8, use_bias=self.bias)(hidden), None


def scanned(bias):
    return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(bias)


class Words(nn.Module):
    """A transformer whose layers are scanned, experts by `nn.vmap`, and a recurrent layer."""

    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, 8)(x) + self.param("pos_embedding", nn.initializers.ones, (1, 5, 8))
        x, _ = scanned(self.bias)(x, None)
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=4,
        )
        x = jnp.sum(experts(6, use_bias=self.bias)(x), axis=0)
        x = nn.RNN(nn.LSTMCell(7))(x)
        x = nn.RNN(nn.GRUCell(7))(x)
        return nn.Dense(11, use_bias=self.bias, name="head")(x)


class Images(nn.Module):
    """Convolutions of every kind."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(x)
        x = nn.GroupNorm(2)(nn.Conv(6, (1, 1))(x))
        x = nn.BatchNorm(use_running_average=True)(nn.ConvTranspose(5, (2, 2))(x))
        x = nn.ConvLocal(4, (2, 2), padding="VALID")(x)
        x = nn.Conv(9, (3,))(x.reshape(len(x), -1, 4))
        x = nn.Conv(9, (3,), feature_group_count=9)(x)
        return nn.DenseGeneral((2, 3), axis=(-2, -1))(x)


ATTENTION = "['MultiHeadDotProductAttention_0']"
LINEN = {
    "words": (
        Words(),
        jnp.zeros((2, 5), int),
        {
            "['Embed_0']['embedding']": (1, 11, 8),
            "['pos_embedding']": (1, 5, 8),
            f"['ScanBlock_0']{ATTENTION}['query']['kernel']": (3, 8, 8),
            f"['ScanBlock_0']{ATTENTION}['key']['kernel']": (3, 8, 8),
            f"['ScanBlock_0']{ATTENTION}['value']['kernel']": (3, 8, 8),
            f"['ScanBlock_0']{ATTENTION}['out']['kernel']": (3, 8, 8),
            "['ScanBlock_0']['Dense_0']['kernel']": (3, 8, 24),
            "['ScanBlock_0']['Dense_1']['kernel']": (3, 24, 8),
            "['VmapDense_0']['kernel']": (4, 8, 6),
            **{f"['LSTMCell_0']['i{gate}']['kernel']": (1, 6, 7) for gate in "ifgo"},
            **{f"['LSTMCell_0']['h{gate}']['kernel']": (1, 7, 7) for gate in "ifgo"},
            **{f"['GRUCell_0']['{n}{g}']['kernel']": (1, 7, 7) for n in "ih" for g in "rzn"},
            "['head']['kernel']": (1, 7, 11),
        },
    ),
    "images": (
        Images(),
        jnp.zeros((1, 6, 6, 3)),
        {
            "['Conv_0']['kernel']": (1, 27, 8),
            "['Conv_2']['kernel']": (1, 8, 6),
            "['ConvTranspose_0']['kernel']": (1, 24, 5),
            "['ConvLocal_0']['kernel']": (25, 20, 4),
            "['Conv_3']['kernel']": (1, 12, 9),
            "['DenseGeneral_0']['kernel']": (1, 225, 6),
        },
    ),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, x, want = LINEN[name]
    assert table(jax.eval_shape(module.init, KEY, x)["params"]) == want


def test_linen_without_biases():
    """Norms tell of the layers of a scan, names of the experts."""
    module, x, want = LINEN["words"]
    params = jax.eval_shape(module.clone(bias=False).init, KEY, x)["params"]
    assert table(params) == want


def test_heads_are_rows_or_columns_whatever_their_number():
    """Where the width, the heads and their width are all one, too."""
    x = jnp.zeros((1, 4, 16))
    module = nn.MultiHeadDotProductAttention(4)
    seen = lro.diagnose.views(jax.eval_shape(module.init, KEY, x)).leaves
    axes = {each.path.split("'")[3]: each.axes for each in seen if each.axes is not None}
    spread = lro.MatrixAxes((0,), (1, 2))
    want = dict.fromkeys(("key", "query", "value"), spread)
    assert axes == want | {"out": lro.MatrixAxes((0, 1), (2,))}
    same = shapes({"query/kernel": (4, 4, 4), "query/bias": (4, 4)})
    assert lro.diagnose.views(same).leaves[1].axes == spread


# flax's nnx ---------------------------------------------------------------------------------------


class Pieces(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.each = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.lift = nnx.LinearGeneral(8, (3, 4), rngs=rngs)
        self.low_rank = nnx.LoRA(8, 2, 6, rngs=rngs)
        self.memory = nnx.OptimizedLSTMCell(4, 8, rngs=rngs)
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 6, rngs=rngs)

        self.layers = make(rngs)


NNX = {
    "['first']['kernel']": (1, 27, 8),
    "['attention']['query']['kernel']": (1, 8, 8),
    "['attention']['key']['kernel']": (1, 8, 8),
    "['attention']['value']['kernel']": (1, 8, 8),
    "['attention']['out']['kernel']": (1, 8, 8),
    "['lift']['kernel']": (1, 8, 12),
    "['low_rank']['lora_a']": (1, 8, 2),
    "['low_rank']['lora_b']": (1, 2, 6),
    "['memory']['dense_i']['kernel']": (1, 4, 32),
    "['memory']['dense_h']['kernel']": (1, 8, 32),
    "['tokens']['embedding']": (1, 11, 8),
    "['layers']['kernel']": (3, 8, 6),
}


def test_nnx():
    state = nnx.state(Pieces(nnx.Rngs(0)))
    params = nnx.state(Pieces(nnx.Rngs(0)), (nnx.Param, nnx.LoRAParam))
    assert jax.tree.structure(params) != jax.tree.structure(state)  # statistics, keys
    assert {path.removesuffix(".value"): s for path, s in table(params).items()} == NNX
    assert table(nnx.to_pure_dict(params)) == NNX


# equinox ------------------------------------------------------------------------------------------


def stacked(make, count):
    return eqx.filter_vmap(make)(jax.random.split(KEY, count))


EQUINOX = {
    "linear": (lambda: eqx.nn.Linear(4, 6, key=KEY), {".weight": (1, 6, 4)}),
    "mlp": (
        lambda: eqx.nn.MLP(4, 3, 16, 1, key=KEY),
        {".layers[0].weight": (1, 16, 4), ".layers[1].weight": (1, 3, 16)},
    ),
    "conv1d": (lambda: eqx.nn.Conv1d(5, 6, 3, key=KEY), {".weight": (1, 15, 6)}),
    "conv1d without bias": (
        lambda: eqx.nn.Conv1d(5, 6, 3, use_bias=False, key=KEY),
        {".weight": (1, 15, 6)},
    ),
    "conv2d": (lambda: eqx.nn.Conv2d(5, 6, 3, key=KEY), {".weight": (1, 45, 6)}),
    "transposed": (lambda: eqx.nn.ConvTranspose2d(5, 6, 3, key=KEY), {".weight": (1, 45, 6)}),
    "depthwise": (lambda: eqx.nn.Conv2d(6, 6, 3, groups=6, key=KEY), {}),
    "attention": (
        lambda: eqx.nn.MultiheadAttention(2, 8, key=KEY),
        {f".{name}_proj.weight": (1, 8, 8) for name in ("query", "key", "value", "output")},
    ),
    "lstm": (
        lambda: eqx.nn.LSTMCell(4, 8, key=KEY),
        {".weight_ih": (1, 32, 4), ".weight_hh": (1, 32, 8)},
    ),
    "layers of gru": (
        lambda: stacked(lambda key: eqx.nn.GRUCell(4, 8, key=key), 3),
        {".weight_ih": (3, 24, 4), ".weight_hh": (3, 24, 8)},
    ),
    "layers of linear": (
        lambda: stacked(lambda key: eqx.nn.Linear(4, 6, key=key), 3),
        {".weight": (3, 6, 4)},
    ),
    "layers of conv": (
        lambda: stacked(lambda key: eqx.nn.Conv2d(5, 6, 3, key=key), 3),
        {".weight": (3, 45, 6)},
    ),
    "norms": (
        lambda: [eqx.nn.LayerNorm(8), eqx.nn.LayerNorm((4, 8)), eqx.nn.GroupNorm(2, 8)],
        {},
    ),
    "embedding": (lambda: {"token_embedding": eqx.nn.Embedding(11, 8, key=KEY)}, (1, 11, 8)),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name):
    make, want = EQUINOX[name]
    params = eqx.filter(make(), eqx.is_inexact_array)
    want = {"['token_embedding'].weight": want} if isinstance(want, tuple) else want
    assert table(params) == want


# Names and neighbours -----------------------------------------------------------------------------

LEAVES = {
    "layers of a scan by hand": (
        {"w": (3, 4, 5), "b": (3, 5), "w2": (3, 5, 6), "b2": (3, 6), "scale": (3, 4)},
        {"['w']": (3, 4, 5), "['w2']": (3, 5, 6)},
    ),
    "a leaf named b that is no bias": (
        {"a": (4, 6), "b": (4, 6)},
        {"['a']": (1, 4, 6)} | {"['b']": (1, 4, 6)},
    ),
    "an ensemble of models": (
        {"one/kernel": (5, 4, 6), "one/bias": (5, 6), "embed/embedding": (5, 11, 4)},
        {"['embed']['embedding']": (5, 11, 4), "['one']['kernel']": (5, 4, 6)},
    ),
    "experts in layers of a scan": (
        {"norm/scale": (3, 8), "experts/wi": (3, 4, 8, 9), "experts/wo": (3, 4, 9, 8)},
        {"['experts']['wi']": (12, 8, 9), "['experts']['wo']": (12, 9, 8)},
    ),
    "a list of experts": (
        {"experts/0/kernel": (3, 3, 4, 5), "experts/1/kernel": (3, 3, 4, 5)},
        {f"['experts']['{i}']['kernel']": (1, 36, 5) for i in range(2)},
    ),
    "two ways through experts without a name": (
        {"moe/router/kernel": (8, 4), "moe/up": (4, 8, 9), "moe/down": (4, 9, 8)},
        {
            "['moe']['router']['kernel']": (1, 8, 4),
            "['moe']['up']": (4, 8, 9),
            "['moe']['down']": (4, 9, 8),
        },
    ),
    "convolutions that widen and narrow": (
        {"conv0/kernel": (3, 8, 9), "conv1/kernel": (3, 9, 8)},
        {"['conv0']['kernel']": (1, 24, 9), "['conv1']['kernel']": (1, 27, 8)},
    ),
    "a scan over time, whose parameters are no layers": (
        {"ScanCell_0/i/kernel": (3, 3, 4, 5), "ScanCell_0/i/bias": (5,)},
        {"['ScanCell_0']['i']['kernel']": (1, 36, 5)},
    ),
    "a scan without a vector": (
        {"ScanBlock_0/up/kernel": (3, 4, 6)},
        {"['ScanBlock_0']['up']['kernel']": (3, 4, 6)},
    ),
    "single heads": (
        {"key/kernel": (8, 1, 4), "key/bias": (1, 4), "out/kernel": (1, 4, 8), "out/bias": (8,)},
        {"['key']['kernel']": (1, 8, 4), "['out']['kernel']": (1, 4, 8)},
    ),
    "gray images and single rows": (
        {
            "conv/kernel": (3, 3, 1, 8),
            "row": (1, 8),
            "token": (1, 1, 8),
            "number": (),
            "no": (0, 3),
        },
        {},
    ),
    "patches": ({"patch_embed/kernel": (4, 4, 3, 8)}, {"['patch_embed']['kernel']": (1, 48, 8)}),
    "no names": ({"x": (2, 6, 2), "y": (64, 4, 16)}, {"['x']": (1, 2, 12), "['y']": (1, 64, 64)}),
}


@pytest.mark.parametrize("name", LEAVES)
def test_names_and_neighbours(name):
    leaves, want = LEAVES[name]
    assert table(shapes(leaves)) == want


LANGUAGE = shapes(
    {
        "wte/embedding": (50, 8),
        "positions": (6, 8),
        "mlp/kernel": (8, 32),
        "unnamed/kernel": (8, 50),
        "classifier/kernel": (8, 3),
    }
)


def test_embeddings_and_heads_go_where_one_says():
    view = lambda **options: lambda path, shape: lro.default_matrix_view(path, shape, **options)
    everything = {"['wte']['embedding']", "['positions']", "['mlp']['kernel']"}
    heads = {"['unnamed']['kernel']", "['classifier']['kernel']"}
    assert table(LANGUAGE).keys() == everything | heads
    assert table(LANGUAGE, view=view(heads=False)).keys() == everything
    both = view(embeddings=False, heads=False)
    assert table(LANGUAGE, view=both).keys() == {"['mlp']['kernel']"}
    state = lro.soap(1e-2, view=both).init(jax.tree.map(lambda x: jnp.zeros(x.shape), LANGUAGE))
    assert state[0].matrices.keys() == {"8x32"}


def test_long_sides_are_told_as_they_are_treated():
    params = shapes({"short": (4, 6), "half": (4, 60), "whole": (50, 60), "bias": (6,)})
    tx = lro.soap(1e-2, largest=20)
    seen = {each.path: each for each in lro.diagnose.views(params, tx=tx).leaves}
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape), params))[0]
    assert state.matrices.keys() == {"4x6", "4x60"}
    assert seen["['short']"].why == "matrix" and seen["['bias']"].why == "vector"
    assert seen["['half']"].why == "matrix; 60 > largest=20: no basis there"
    assert seen["['whole']"].axes is None
    assert seen["['whole']"].why == "matrix; 60 > 50 > largest=20"
    one = lro.diagnose.views(params, tx=lro.galore(1e-2, rank=2, largest=20)).leaves
    assert {each.path for each in one if each.axes} == {"['short']", "['half']"}
    for wrong in ({"tx": lro.lre(1.0)}, {"tx": tx, "view": lambda path, shape: None}):
        with pytest.raises(ValueError, match="pass one of them"):
            lro.diagnose.views(params, **wrong)


def test_axes_are_checked():
    for call, words in (
        (lambda: lro.MatrixAxes(0, (1,)), "pass a tuple of axis numbers"),
        (lambda: lro.MatrixAxes((0,), (-1,)), "pass a tuple of axis numbers"),
        (lambda: lro.MatrixAxes((0,), ()), "pass a tuple of axis numbers"),
        (lambda: lro.MatrixAxes((0,), (1, 0)), r"axes \[0\] are named twice"),
        (
            lambda: lro.orthogonalize(view=lambda *_: lro.MatrixAxes((0,), (1,))).update(
                jnp.ones((2, 3, 4)), optax.EmptyState()
            ),
            r"orthogonalize: view gives MatrixAxes.*name every one of its axes \(0, 1, 2\) once",
        ),
        (
            lambda: lro.diagnose.views(
                jnp.ones((0, 3)), lambda path, shape: lro.MatrixAxes((0,), (1,))
            ),
            "has no entries; return None",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_leaves_become_matrices_and_back():
    x = noise(0, 2, 3, 4, 5)
    axes = lro.MatrixAxes(rows=(3, 1), columns=(2,), batch=(0,))
    got = axes.matrices(x)
    assert got.shape == (2, 15, 4) and axes.sizes(x.shape) == (2, 15, 4)
    np.testing.assert_array_equal(got, jnp.einsum("aijb->abij", x).reshape(2, 15, 4))
    np.testing.assert_array_equal(axes.leaf(got, x.shape), x)
    np.testing.assert_array_equal(axes.turned.matrices(x), jnp.swapaxes(got, 1, 2))


# A batch of matrices is many matrices -------------------------------------------------------------

TXS = {
    "soap": lambda **options: lro.soap(0.1, update_every=2, **options),
    "galore": lambda **options: lro.galore(0.1, rank=2, update_every=2, **options),
    "soap_muon": lambda **options: lro.soap_muon(0.1, update_every=1, weight_decay=0.1, **options),
    "shampoo": lambda **options: lro.scale_by_matrix_lre(
        basis.FullMatrix(None), basis.FullMatrix(None), inner.LInvSqrt(), **options
    ),
    "one side, a complement": lambda **options: lro.scale_by_matrix_lre(
        None, basis.SubspaceIteration(2), inner.Adam(), complement=0.3, **options
    ),
    "a momentum beside": lambda **options: lro.scale_by_matrix_lre(
        basis.GGT(2), None, inner.Adam(), complement=optax.trace(0.9), **options
    ),
    "orthogonalize": lambda **options: lro.orthogonalize(**options),
}
COUNT = 4


def apart(tree):
    """The places of the batch as leaves of their own."""
    return {str(i): jax.tree.map(lambda x, i=i: x[i], tree) for i in range(COUNT)}


def together(tree):
    return jax.tree.map(lambda *x: jnp.stack(x), *(tree[str(i)] for i in range(COUNT)))


def run(tx, grads):
    params = jax.tree.map(jnp.ones_like, grads[0])
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        found.append(updates)
    return found, state


def gradients(dtype, steps=4, broken=None):
    """Of layers that stand, lie and are no matrices; in one step one layer is not finite."""
    out = []
    for t in range(steps):
        shape = {"wide/kernel": (5, 7), "wide/bias": (7,), "tall/kernel": (7, 5), "tall/bias": (5,)}
        tree = {
            path: noise(10 * t + i, COUNT, *size, dtype=dtype)
            for i, (path, size) in enumerate(shape.items())
        }
        if t == broken:
            tree["wide/kernel"] = tree["wide/kernel"].at[1, 2, 3].set(jnp.nan)
        nested = {n: {k: tree[f"{n}/{k}"] for k in ("kernel", "bias")} for n in ("wide", "tall")}
        out.append(nested)
    return out


def assert_same(got, want, tolerance):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", TXS)
def test_a_batch_is_as_if_its_matrices_were_leaves(x64, name):
    """Also where one of them is not finite: others go on, and it alone has counted a drop."""
    tx, grads = TXS[name](), gradients(jnp.float64, broken=2)
    got, state = run(tx, grads)
    want, single = run(tx, [apart(g) for g in grads])
    for g, w in zip(got, want, strict=True):
        assert_same(g, together(w), 1e-9)
    if name != "orthogonalize":
        state, single = (x if hasattr(x, "matrices") else x[0] for x in (state, single))
        kinds = lambda state: jax.tree.map(jnp.shape, state.matrices)
        assert kinds(state) == kinds(single)
        dropped = state.matrices["5x7"].events.nonfinite
        assert dropped.shape == (2 * COUNT,) and int(jnp.sum(dropped)) == 1


def test_a_batch_of_other_axes(x64):
    """The batch last, or in the middle, and rows that stand behind the columns."""
    grads = [g["wide"]["kernel"] for g in gradients(jnp.float64)]
    view = lambda path, shape: lro.MatrixAxes((2,), (0,), (1,))
    for name in ("soap_muon", "a momentum beside"):
        got, _ = run(TXS[name](view=view), [jnp.transpose(g, (2, 0, 1)) for g in grads])
        want, _ = run(TXS[name](), [apart(g) for g in grads])
        for g, w in zip(got, want, strict=True):
            assert_same(jnp.transpose(g, (1, 2, 0)), together(w), 1e-9)


def test_layers_of_a_batch_share_with_their_like_only(x64):
    """``groups`` joins leaves: the first matrices of them, the second ones, ..."""
    grads = gradients(jnp.float64)
    every = lambda path: "all"
    got, state = run(TXS["shampoo"](groups=every), grads)
    assert state.matrices.keys() == {"2x5x7"} and state.matrices["2x5x7"].steps.shape == (COUNT,)
    layer = lambda path: path[0].key
    want, _ = run(TXS["shampoo"](groups=layer), [apart(g) for g in grads])
    for g, w in zip(got, want, strict=True):
        assert_same(g, together(w), 1e-9)


def test_leaves_of_other_counts_do_not_share():
    params = {"kernel": jnp.zeros((3, 4, 6)), "bias": jnp.zeros((3, 6)), "alone": jnp.zeros((4, 6))}
    state = TXS["shampoo"](groups=lambda path: "all").init(params)
    assert state.matrices["4x6"].steps.shape == (4,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_of_a_batch(dtype):
    grads = gradients(dtype)
    got, _ = run(TXS["soap_muon"](), grads)
    want, _ = run(TXS["soap_muon"](), [apart(g) for g in grads])
    for g, w in zip(got, want, strict=True):
        assert all(x.dtype == dtype for x in jax.tree.leaves(g))
        assert_same(g, together(w), 1e-2 if dtype != jnp.float32 else 1e-4)


def test_masks_and_partitions(x64):
    """A name, or a view, tells of layers where the leaves beside are hidden."""
    grads = [{"ScanBlock_0": g} for g in gradients(jnp.float64)]
    own = jax.tree.map(lambda x: x.ndim == 3, grads[0])
    view = lambda path, shape: lro.MatrixAxes((1,), (2,), (0,))
    want, _ = run(lro.soap(0.1), [apart(g) for g in grads])
    labels = jax.tree.map(lambda on: "ours" if on else "theirs", own)
    both = {"ours": lro.soap(0.1), "theirs": optax.adam(0.1, 0.95, 0.95)}
    for tx in (optax.masked(lro.soap(0.1, view=view), own), optax.partition(both, labels)):
        got, _ = run(tx, grads)
        for g, w in zip(got, want, strict=True):
            ours, theirs = (
                {side: x[side]["kernel"] for side in ("wide", "tall")}
                for x in (g["ScanBlock_0"], together(w)["ScanBlock_0"])
            )
            assert_same(ours, theirs, 1e-9)


def test_the_polar_factor_of_a_stack_is_that_of_every_layer():
    g = {"kernel": noise(0, 3, 8, 12), "bias": jnp.zeros((3, 12))}
    tx = lro.orthogonalize(rms=1.0)
    out = tx.update(g, tx.init(g))[0]["kernel"] / 12**0.5
    for layer in out:
        s = np.linalg.svd(layer, compute_uv=False)
        assert 0.6 < s.min() and s.max() < 1.3
