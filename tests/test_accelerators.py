"""What a GPU and a TPU are given, read from the program lowered for them: no accelerator needed."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

B, C = lro.basis, lro.curvature
PLATFORMS = ("cuda", "tpu")
PARAMS = {"b": jnp.zeros(37), "w": jnp.zeros((12, 31))}
RANK = 6


def value_fn(params):
    return jnp.sum((params["w"] @ params["w"].T) ** 2) + jnp.sum(params["b"] ** 2)


OPTIMIZERS = {
    "ggt": lambda **options: lro.lre(1e-2, basis=B.GGT(RANK), **options),
    "eigen": lambda **options: lro.lre(1e-2, basis=B.Eigen(RANK, buffer=3), **options),
    "whitening": lambda **options: optax.chain(
        lro.scale_by_lre(C.Covariance(), B.GGT(RANK), lro.inner.LInvSqrt(), **options),
        optax.adam(1e-2),
    ),
    "hessian": lambda **options: lro.lre(
        1e-2, C.HutchinsonHessian(), B.Eigen(RANK, buffer=3), lro.inner.Adam(), **options
    ),
    "per_leaf": lambda: lro.lre(1e-2, basis=B.GGT(RANK), groups=lro.per_leaf),
    "every": lambda: lro.lre(1e-2, basis=B.GGT(RANK), update_every=5, complement=0.1),
    "galore": lambda: lro.galore(1e-2, rank=4),
    "soap_muon": lambda: lro.soap_muon(1e-2),
}
FACTORISATIONS = {"cuda": {"cusolver_syevd_ffi"}, "tpu": {"Eigh"}}


def lowered(name, platform, **options):
    """StableHLO of one step, and the shapes of the stored rows."""
    tx = OPTIMIZERS[name](**options)
    state = jax.eval_shape(tx.init, PARAMS)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=value_fn), donate_argnums=1)
    text = step.trace(PARAMS, state, PARAMS).lower(lowering_platforms=(platform,)).as_text()
    found = lro.diagnose.find(state) if name not in ("galore", "soap_muon") else None
    return text, set() if found is None else {
        f"{w.shape[0]}x{w.shape[1]}" for w in jax.tree.leaves(found.basis.rows)
    }


def dots(text):
    """``(line, whether full precision is asked for)`` of every product."""
    return [(line, "HIGHEST, HIGHEST" in line) for line in text.splitlines() if "dot_gen" in line]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_lower_for_accelerators(name, platform):
    """Float32 products of the library are float32 there, too; factorisations are the platform's."""
    text, rows = lowered(name, platform)
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert calls == (set() if name == "soap_muon" else FACTORISATIONS[platform])
    theirs = [line for line, exact in dots(text) if not exact]
    if name == "hessian":  # a product in the loss, in its gradient, and in the derivative of that
        assert theirs and all("12x31" in line or "31x12" in line for line in theirs)
    elif name == "soap_muon":  # four steps on the Gram matrix are meant to be rough, no more
        assert len(theirs) == 11
    else:
        assert not theirs
    for line in text.splitlines():
        if any(f"tensor<{shape}x" in line for shape in rows):
            assert not re.search(r"stablehlo\.(transpose|concatenate|convert|pad|select) ", line)


@pytest.mark.parametrize("name", ["ggt", "eigen", "whitening"])
def test_short_rows_are_read_as_they_are(name):
    """16-bit rows go into products without a conversion, with sums in float32."""
    text, rows = lowered(name, "tpu", dtype=jnp.bfloat16)
    stored = [f"tensor<{shape}xbf16>" for shape in rows]
    over = [line for line, _ in dots(text) if any(kind in line for kind in stored)]
    assert len(over) >= 2 * len(rows)
    for line in over:
        assert "HIGHEST" not in line and re.search(r"-> tensor<[\dx]*xf32>", line)
    widened = [
        line
        for line in text.splitlines()
        if "stablehlo.convert" in line and any(f"tensor<{shape}xf32>" in line for shape in rows)
    ]
    assert not widened


def test_loops_that_the_host_decides_on_are_few():
    """A GPU waits for the host before a loop of unknown length: none a leaf, but those of a leaf's
    blocks inside the one loop of a rotation."""

    def whiles(leaves):
        tx = lro.lre(1e-2, basis=B.Eigen(RANK, buffer=3))
        params = [jnp.zeros(20 + i) for i in range(leaves)]
        state = jax.eval_shape(tx.init, params)
        jaxpr = jax.make_jaxpr(tx.update)(params, state)
        return sum(eqn.primitive.name == "while" for eqn in jaxpr.eqns)

    assert whiles(2) == whiles(5) == 2


def test_what_users_pass_keeps_their_precision():
    """Whatever the setting outside: the loss has it, and the optimizer does not."""
    tx = OPTIMIZERS["hessian"]()
    state = jax.eval_shape(tx.init, PARAMS)
    step = lambda g, s, p: tx.update(g, s, p, value_fn=value_fn)
    with jax.default_matmul_precision("high"):
        traced = jax.jit(step).trace(PARAMS, state, PARAMS)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    theirs = [line for line, exact in dots(text) if not exact]
    assert theirs and all("[HIGH, HIGH]" in line for line in theirs)
    assert jax.config.jax_default_matmul_precision is None
