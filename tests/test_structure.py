"""What the compiled step does with the stored rows: read from its HLO, never timed."""

import re

import jax
import jax.numpy as jnp
import pytest
from compiling import Traced

import lowrank_optax as lro

RANK = 24
WIDTH, VOCABULARY, LAYERS = 64, 96, 2


def one_leaf():
    return jnp.zeros(120_011)


def transformer():
    """The 27 leaves of a two-layer transformer with tied embeddings."""
    layer = {
        "norm1": {"scale": (WIDTH,), "bias": (WIDTH,)},
        "attention": {"kernel": (WIDTH, 3, WIDTH), "bias": (3, WIDTH)},
        "out": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
        "norm2": {"scale": (WIDTH,), "bias": (WIDTH,)},
        "up": {"kernel": (WIDTH, 4 * WIDTH), "bias": (4 * WIDTH,)},
        "down": {"kernel": (4 * WIDTH, WIDTH), "bias": (WIDTH,)},
    }
    shapes = {f"layer{i}": layer for i in range(LAYERS)}
    shapes |= {"embedding": (VOCABULARY, WIDTH), "norm": {"scale": (WIDTH,), "bias": (WIDTH,)}}
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = {"one_leaf": one_leaf, "transformer": transformer}
BASES = {
    "ggt": lro.basis.GGT(RANK),
    "ggt_mean": lro.basis.GGT(RANK, beta=1.0),
    "eigen": lro.basis.Eigen(RANK),
    "eigen_sum": lro.basis.Eigen(RANK, beta=None, buffer=4),
}
OPTIONS = {
    "plain": {},
    "complement": {"complement": 0.1},
    "per_leaf": {"groups": lro.per_leaf},
}


class Compiled:
    """One compiled step with donated state."""

    def __init__(self, basis, params, **options):
        self.params = params
        self.tx = lro.lre(1e-2, basis=basis, **options)
        self.state = self.tx.init(params)
        self.step = jax.jit(self.tx.update, donate_argnums=1)
        compiled = self.step.lower(params, self.state).compile()
        self.hlo = compiled.as_text()
        self.memory = compiled.memory_analysis()
        self.rows = jax.tree.leaves(lro.diagnose.find(self.state).basis.rows)
        self.d = sum(x.size for x in jax.tree.leaves(params))

    @property
    def row_types(self):
        return {f"f32[{m},{size}]" for m, size in (w.shape for w in self.rows)}

    def operations(self):
        """``(computation, name, type, opcode, operands)`` of every instruction."""
        where = None
        for line in self.hlo.splitlines():
            if line and not line[0].isspace() and "{" in line:
                where = "ENTRY" if line.startswith("ENTRY") else line.split()[0]
            found = re.match(r"\s+(?:ROOT )?(%\S+) = (\w+\[[\d,]*\])\S* ([\w-]+)\((.*)", line)
            if found:
                name, kind, opcode, rest = found.groups()
                yield where, name, kind, opcode, re.findall(r"%[\w.-]+", rest.split("), ")[0])


@pytest.fixture(scope="module")
def compiled():
    """Compiles each product once for all the tests of this file."""
    cache = {}

    def get(basis, params, options="plain"):
        key = basis, params, options
        if key not in cache:
            cache[key] = Compiled(BASES[basis], PARAMS[params](), **OPTIONS[options])
        return cache[key]

    return get


PRODUCTS = [
    ("ggt", "one_leaf", "plain"),
    ("ggt", "transformer", "plain"),
    ("eigen", "one_leaf", "plain"),
    ("eigen", "transformer", "plain"),
    ("ggt_mean", "one_leaf", "complement"),
    ("eigen_sum", "one_leaf", "complement"),
    ("ggt", "transformer", "per_leaf"),
]


@pytest.mark.parametrize("product", PRODUCTS, ids="-".join)
def test_rows_are_never_copied(compiled, product):
    step = compiled(*product)
    copies = [
        op
        for op in step.operations()
        if op[2] in step.row_types
        and op[3] in ("copy", "copy-start", "concatenate", "transpose", "convert", "select", "pad")
    ]
    assert not copies
    # All rows of the state are updated where they lie.
    assert step.memory.alias_size_in_bytes >= sum(w.nbytes for w in step.rows)


@pytest.mark.parametrize("product", PRODUCTS, ids="-".join)
def test_two_products_over_the_rows(compiled, product):
    """One to project and one to unproject; what runs now and then is inside loops."""
    step = compiled(*product)
    kinds = {name: kind for _, name, kind, _, _ in step.operations()}
    passes = [
        op
        for op in step.operations()
        if op[0] == "ENTRY"
        and op[3] == "dot"
        and any(kinds.get(x) in step.row_types for x in op[4])
    ]
    assert len(passes) == 2 * len(step.rows)


@pytest.mark.parametrize("product", PRODUCTS, ids="-".join)
def test_memory(compiled, product):
    """Temporaries within four gradients, a state of rank·d plus small algebra, nothing d × d."""
    step = compiled(*product)
    m, groups = step.rows[0].shape[0], len(step.rows) if product[2] == "per_leaf" else 1
    assert step.memory.temp_size_in_bytes <= 4 * 4 * step.d + 40 * groups * m * m
    state = sum(x.nbytes for x in jax.tree.leaves(step.state))
    assert state <= 4 * (m * step.d + 6 * groups * m * m)
    largest = max(
        eval("*".join(re.findall(r"\d+", kind[kind.index("[") :])) or "1")
        for _, _, kind, _, _ in step.operations()
    )
    assert largest <= m * max(w.shape[1] for w in step.rows)


@pytest.mark.parametrize("basis", ["ggt", "eigen_sum"])
def test_second_step_does_not_recompile(compiled, basis):
    step = compiled(basis, "one_leaf")
    grads = jnp.linspace(-1, 1, step.d)
    state, update = step.tx.init(step.params), Traced(step.tx.update, donate_argnums=1)
    for _ in range(7):  # past a rotation of eigen_sum's rows
        _, state = update(grads, state)
    assert update.count == 1


def test_layers_along_an_axis():
    """`jax.vmap` over the layers of a scanned model copies no rows either."""
    tx = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(6), lro.inner.EMA(0.5))
    params = jnp.zeros((3, 5000))
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(lambda g, s: tx.update(g, s)), donate_argnums=1)
    # As users have it: tests compile fusions in a simpler form, which has no scatter.
    compiled = update.lower(params, state).compile({"xla_cpu_use_fusion_emitters": True})
    opcodes = re.findall(r"f32\[3,6,5000\]\S* ([\w-]+)\(", compiled.as_text())
    assert opcodes.count("scatter") == 1
    assert not {"copy", "select", "transpose", "concatenate", "convert"} & set(opcodes)
    assert compiled.memory_analysis().temp_size_in_bytes < params.nbytes


def test_what_is_done_now_and_then_stays_in_its_loop():
    """XLA takes out of loops what does not depend on them, and would do it at every step."""
    side = lro.basis.FullMatrix(update_every=10)
    tx = lro.scale_by_matrix_lre(side, None, lro.inner.Adam())
    leaf = jnp.zeros((5, 9))
    entry = entry_of(jax.jit(tx.update), leaf, tx.init(leaf))
    assert "syevd" not in entry

    a = jnp.ones((37, 41))
    fn = lambda x: jnp.sum(jnp.tanh(a @ x))
    curvature = lro.curvature.HutchinsonHessian()
    counts = []
    for every in (1, 10):
        tx = lro.scale_by_lre(curvature, lro.basis.Eigen(3), lro.inner.Adam(), update_every=every)
        step = jax.jit(lambda x, state, tx=tx: tx.update(x, state, x, value_fn=fn))
        x = jnp.ones(41)
        counts.append(len(re.findall(r"37.* dot\(", entry_of(step, x, tx.init(x)))))
    assert counts[0] > 0 and counts[1] == 0


def entry_of(step, *args):
    """The computation that every step goes through, without the bodies of its loops."""
    hlo = step.lower(*args).compile().as_text()
    return hlo[hlo.index("\nENTRY") :]
