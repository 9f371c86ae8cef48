"""Use under load: sweeps in one call, memory over thousands of steps, compiling, importing.

*Sweeps*: 32 learning rates (and seeds) as one jitted, vmapped step on a vector of ``d`` entries,
against the same 32 states stepped one after the other by one compiled step, in turns in the same
run; medians of the ratio. Beside it the temporary memory of the batch over 32 times that of a step.

*Memory*: one optimizer for thousands of jitted steps, with and without donation: the process's
resident memory and the live arrays after the first tenth and at the end; then optimizers built,
initialised and dropped.

*Compiling*: seconds to trace, lower and compile one step on models of 100 leaves, a transformer's
eleven shapes and some fifty different ones, for every kind of part, and for `optax.adam` beside it,
which is what such a model costs anyway: XLA compiles every operation of every leaf anew. Lines of
optimized HLO a leaf show how that grows.

*Eager*: ``update`` outside of `jax.jit` on twelve small leaves: seconds of the first call, and
milliseconds of the later ones.

*Importing*: milliseconds of ``import lowrank_optax`` after jax, optax and chex, in fresh processes.

    python benchmarks/load.py [--quick] [--out DIR] [--only sweeps,memory,compiling,eager,importing]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report

import lowrank_optax as lro

B, C, RUNS = lro.basis, lro.curvature, 32
SECTIONS = ("sweeps", "memory", "compiling", "eager", "importing")


def main() -> None:
    args = arguments()
    path = Path(args.out) / "load.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results.pop("machine", None)  # sections that are not measured now stay as they are
    results |= {name: globals()[name](args.quick) for name in args.only}
    report.save(path, **results)


# Sweeps -----------------------------------------------------------------------------------------


def rank_of(d: int) -> int:
    return min(20, d)


SWEEPS = {
    "lre": lambda x, d: lro.lre(x, basis=B.GGT(rank_of(d))),
    "whitening, Adam": lambda x, d: lro.whitened_adam(x, rank=rank_of(d)),
    "Eigen": lambda x, d: lro.lre(x, basis=B.Eigen(rank_of(d))),
    "Hessian": lambda x, d: lro.lre(
        x, C.HutchinsonHessian(), B.Eigen(rank_of(d)), lro.inner.Adam()
    ),
    "Hessian, seeds": lambda x, d: lro.lre(
        1e-2, C.HutchinsonHessian(), B.Eigen(rank_of(d)), lro.inner.Adam(), seed=x
    ),
    "every 4": lambda x, d: lro.lre(x, basis=B.GGT(rank_of(d)), update_every=4),
    "soap_muon": lambda x, d: lro.soap_muon(x),
    "optax adam": lambda x, d: optax.adam(x),
}


def sweeps(quick: bool) -> list[dict]:
    rows = []
    for d in (1000,) if quick else (1000, 30_000):
        for name in list(SWEEPS)[:2] if quick else SWEEPS:
            rows.append(sweep(name, d, 3 if quick else 7))
            print("{name}, d={d}: {ratio:.2f}".format(**rows[-1]), flush=True)
    report.show(
        f"{RUNS} runs as one vmapped step, over the same one by one",
        rows,
        {
            "name": "optimizer",
            "d": "d",
            "together_ms": "together ms",
            "separate_ms": "separate ms",
            "ratio": "ratio",
            "memory": "temporaries, ratio",
            "apart": "largest difference",
        },
    )
    return rows


def sweep(name: str, d: int, samples: int) -> dict:
    shape = (d // 40, 40) if name == "soap_muon" else (d,)
    scale = (10.0 ** jnp.linspace(0, -2, d)).reshape(shape)
    value_fn = lambda p: 0.5 * jnp.sum(scale * (p - 1) ** 2)
    swept = jnp.arange(RUNS) if "seeds" in name else jnp.logspace(-3, -1, RUNS)

    def init(x, params):
        return params, SWEEPS[name](x, d).init(params)

    def step(x, params, state):
        tx = optax.with_extra_args_support(SWEEPS[name](x, d))
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    start = jnp.zeros(shape)
    single = jax.jit(init)
    one = jax.jit(step, donate_argnums=(1, 2)).lower(swept[0], *single(swept[0], start)).compile()
    batch = jax.jit(jax.vmap(init))(swept, jnp.zeros((RUNS, *shape)))
    many = jax.jit(jax.vmap(step), donate_argnums=(1, 2)).lower(swept, *batch).compile()
    alone = [jax.tree.map(jnp.copy, single(x, start)) for x in swept]

    def together():
        nonlocal batch
        batch = many(swept, *batch)
        jax.block_until_ready(batch)

    def separate():
        nonlocal alone
        alone = [one(x, *each) for x, each in zip(swept, alone, strict=True)]
        jax.block_until_ready(alone)

    for _ in range(3):
        together(), separate()
    apart = max(
        float(jnp.max(jnp.abs(batch[0][i] - each[0]))) for i, each in enumerate(alone)
    ) / float(jnp.max(jnp.abs(batch[0])))
    times = np.array([(seconds(together, 8), seconds(separate, 8)) for _ in range(samples)])
    temporary = [f.memory_analysis().temp_size_in_bytes for f in (many, one)]
    return {
        "name": name,
        "d": d,
        "together_ms": float(np.median(times[:, 0]) * 1e3),
        "separate_ms": float(np.median(times[:, 1]) * 1e3),
        "ratio": float(np.median(times[:, 0] / times[:, 1])),
        "memory": temporary[0] / max(1, RUNS * temporary[1]),
        "apart": apart,
    }


def seconds(f, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - start) / repeats


# Memory -----------------------------------------------------------------------------------------


def memory(quick: bool) -> list[dict]:
    steps, built = (500, 50) if quick else (20_000, 1000)
    rows = [flat(steps, donate) for donate in (False, True)]

    def build():
        for i in range(built):
            lro.lre(1e-2 * (i + 1), basis=B.GGT(2 + i % 5)).init(jnp.zeros(1000))

    build()
    early = resident()
    build()
    rows.append({"what": f"{built} optimizers built and dropped", "growth": difference(early)})
    report.show(
        "Memory from the first tenth to the end",
        [row | row["growth"] for row in rows],
        {"what": "what", "resident_mb": "resident MB", "arrays": "arrays", "bytes": "bytes"},
    )
    return rows


def flat(steps: int, donate: bool) -> dict:
    tx = lro.lre(1e-2, C.HutchinsonHessian(), B.Eigen(10), lro.inner.Adam(), update_every=2)
    value_fn = lambda p: 0.5 * jnp.sum((p - 1) ** 2)

    def step(params, state):
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    params = jnp.zeros(20_000)
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state)
        if i == steps // 10:
            jax.block_until_ready(params)
            early = resident()
    jax.block_until_ready(params)
    what = f"{steps} steps, {'donated' if donate else 'kept'}"
    return {"what": what, "growth": difference(early), "programs": step._cache_size()}


def resident() -> dict:
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    arrays = jax.live_arrays()
    return {
        "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "arrays": len(arrays),
        "bytes": sum(x.nbytes for x in arrays),
    }


def difference(early: dict) -> dict:
    return {key: value - early[key] for key, value in resident().items()}


# Compiling --------------------------------------------------------------------------------------


def transformer(blocks: int, d: int = 32) -> dict:
    """Kernels and biases of blocks of attention and MLP, eight leaves each, and four beside."""
    block = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    leaves = {"embedding": (100, d), "head": (d, 101), "bias": (101,), "scale": (d + 1,)}
    for i in range(blocks):
        for name, shape in block.items():
            leaves |= {f"{name}{i}": shape, f"{name}{i} bias": shape[1:]}
    return {name: jnp.zeros(shape) for name, shape in leaves.items()}


def pyramid(leaves: int) -> dict:
    """Kernels and biases, of some 50 shapes for 100 leaves."""
    shape = lambda i: (16 + i % 7,) if i % 2 else (8 + i % 10, 16 + i // 10)
    return {f"leaf{i}": jnp.zeros(shape(i)) for i in range(leaves)}


def losses(params):
    total = lambda c: sum(jnp.sum((x - c) ** 2) for x in jax.tree.leaves(params))
    return jnp.stack([total(c) for c in (0.0, 0.1, 0.2, 0.3)])


COMPILED = {
    "optax adam": lambda: optax.adam(1e-3),
    "optax muon": lambda: optax.contrib.muon(1e-2),
    "SOAP, a reference": lambda: peers.soap(3e-3),
    "whiten, optax adam": lambda: optax.chain(lro.whiten(), optax.adam(1e-3)),
    "lre, GGT(20)": lambda: lro.lre(1.0, basis=B.GGT(20)),
    "per leaf": lambda: lro.lre(1.0, basis=B.GGT(20), groups=lro.per_leaf),
    "whitened_adam": lambda: lro.whitened_adam(1e-2),
    "Eigen": lambda: lro.lre(1.0, basis=B.Eigen(20)),
    "TopK": lambda: lro.lre(1.0, basis=B.TopK(20)),
    "sophia_h": lambda: lro.sophia_h(1e-2, rank=20),
    "lowrank_newton": lambda: lro.lowrank_newton(1e-2, rank=20),
    "galore": lambda: lro.galore(1e-2, rank=4),
    "soap": lambda: lro.soap(1e-2),
    "soap_muon": lambda: lro.soap_muon(1e-2),
    "muon": lambda: lro.muon(1e-2),
    "normuon": lambda: lro.normuon(1e-2),
    "kl_soap": lambda: lro.kl_soap(1e-2),
    "kl_shampoo": lambda: lro.kl_shampoo(1e-2),
    "shampoo": lambda: lro.shampoo(1e-2),
    "ggt": lambda: lro.ggt(1e-2),
    "full_matrix_adam": lambda: lro.full_matrix_adam(1e-2),
    "adahessian": lambda: lro.adahessian(1e-2),
    "natural_gradient": lambda: lro.natural_gradient(1e-2),
    "gauss_newton": lambda: lro.gauss_newton(1e-2),
    "levenberg_marquardt": lambda: lro.levenberg_marquardt(),
}


def compiling(quick: bool) -> list[dict]:
    models = {"transformer": transformer(1 if quick else 12)}
    models |= {} if quick else {"all different": pyramid(100)}
    rows = []
    for model, params in models.items():
        for name in list(COMPILED)[:2] if quick else COMPILED:
            rows.append({"model": model, **compiled(name, params)})
            total = {row["name"]: row["total"] for row in rows if row["model"] == model}
            rows[-1]["over_adam"] = total[name] / total["optax adam"]
            rows[-1]["over_muon"] = total[name] / total.get("optax muon", float("nan"))
            print("{model}, {name}: {total:.1f} s".format(**rows[-1]), flush=True)
    report.show(
        "Seconds to compile a step",
        rows,
        {
            "model": "model",
            "leaves": "leaves",
            "name": "optimizer",
            "trace": "trace",
            "lower": "lower",
            "compile": "compile",
            "total": "total",
            "over_adam": "over Adam",
            "over_muon": "over Muon",
            "lines": "HLO lines a leaf",
        },
    )
    return rows


def compiled(name: str, params: dict) -> dict:
    tx = optax.with_extra_args_support(COMPILED[name]())
    state = jax.eval_shape(tx.init, params)
    extra = {"value_fn": lambda p: jnp.sum(losses(p)), "losses_fn": losses, "residuals_fn": losses}
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra), donate_argnums=1)
    clock = [time.perf_counter()]
    traced = step.trace(params, state, params)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    text = lowered.compile().as_text()
    clock.append(time.perf_counter())
    parts = dict(zip(("trace", "lower", "compile"), map(float, np.diff(clock)), strict=True))
    return {
        "name": name,
        "leaves": len(params),
        **parts,
        "total": clock[-1] - clock[0],
        "lines": len(text.splitlines()) / len(params),
    }


# Eager ------------------------------------------------------------------------------------------


def eager(quick: bool) -> list[dict]:
    params = {f"w{i}": jnp.ones((8, 16)) for i in range(6)} | {
        f"b{i}": jnp.ones(16) for i in range(6)
    }
    extra = {"value_fn": lambda p: jnp.sum(losses(p)), "losses_fn": losses, "residuals_fn": losses}
    rows = []
    for name in list(COMPILED)[:2] if quick else COMPILED:
        tx = optax.with_extra_args_support(COMPILED[name]())
        state, times = tx.init(params), []
        given = {} if name.startswith("optax") else extra
        for _ in range(3 if quick else 6):
            start = time.perf_counter()
            state = jax.block_until_ready(tx.update(params, state, params, **given))[1]
            times.append(time.perf_counter() - start)
        rows.append(
            {"name": name, "first": times[0], "later_ms": 1e3 * float(np.median(times[2:]))}
        )
        print("{name}: {first:.1f} s, {later_ms:.1f} ms".format(**rows[-1]), flush=True)
    report.show(
        "Without jit",
        rows,
        {"name": "optimizer", "first": "first call, s", "later_ms": "later, ms"},
    )
    return rows


# Importing --------------------------------------------------------------------------------------


def importing(quick: bool) -> dict:
    script = (
        "import time; a = time.perf_counter(); import jax, jax.numpy, optax, chex; "
        "b = time.perf_counter(); import lowrank_optax; c = time.perf_counter(); "
        "import lowrank_optax.online, lowrank_optax.spectral; d = time.perf_counter(); "
        "print(b - a, c - b, d - c)"
    )
    command = [sys.executable, "-c", script]
    times = [
        [float(x) * 1e3 for x in subprocess.check_output(command, text=True).split()]
        for _ in range(2 if quick else 9)
    ]
    names = ("jax, optax, chex", "lowrank_optax", "online and spectral, when asked for")
    middle, least = np.median(times[1:], axis=0), np.min(times, axis=0)
    rows = [
        {"what": name, "ms": float(x), "least": float(y)}
        for name, x, y in zip(names, middle, least, strict=True)
    ]
    report.show("Importing", rows, {"what": "what", "ms": "median ms", "least": "least ms"})
    return {row["what"]: {"ms": row["ms"], "least": row["least"]} for row in rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda x: x.split(","), default=list(SECTIONS))
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    args = parser.parse_args()
    unknown = set(args.only) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    main()
