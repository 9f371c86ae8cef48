"""What a step costs on the device that is there, and what its small eigenproblem costs beside it.

*Step*: the time of a step over that of two passes through its rows, float32 and bfloat16, with the
state donated; medians over samples that time both in turns. `benchmarks/step_cost.py` does more of
this for CPUs; here the question is what waits for what on a device.

*Latency*: one eigenproblem of size ``n`` by every public way of jax: `jax.lax.linalg.eigh` with
its implementations and the SVD with its algorithms (a dash where the platform lacks one), 32 at
once (on a CPU one after the other, as in the library), the Cholesky factor that CholeskyQR is made
of, and twenty products of ``n × n`` matrices, the least that a polar iteration (Newton and Schulz)
needs. On a GPU or TPU these are latency: compare them with the two passes.

*Hiding*: what makes it small beside the passes: the update period, and groups whose eigenproblems
are one batch, against one group.

    python benchmarks/accelerator.py [--quick] [--out DIR]

Without an accelerator it runs on the CPU, at small sizes, and the JSON says so under ``machine``.
"""

import argparse
import functools
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import report

import lowrank_optax as lro

B, C = lro.basis, lro.curvature


def main() -> None:
    args = arguments()
    cpu = jax.default_backend() == "cpu"
    d = 10_000 if args.quick else 100_000 if cpu else 30_000_000
    ranks = (10,) if args.quick else (20, 100)
    samples = 3 if args.quick else 9
    steps = [
        step_cost(name, d, rank, dtype, samples)
        for rank in ranks
        for name in ("GGT", "Eigen")
        for dtype in ("float32", "bfloat16")
    ]
    report.show(
        f"A step over two passes, {d} parameters, on {jax.default_backend()}",
        steps,
        {"basis": "basis", "rank": "rank", "rows": "rows", "step_ms": "step ms"}
        | {"passes_ms": "two passes ms", "ratio": "ratio", "temporary_mb": "temporaries MB"},
    )
    small = [row for n in ((10,) if args.quick else (20, 50, 100, 200)) for row in latency(n)]
    report.show(
        "Small factorisations",
        small,
        {"what": "what", "n": "n", "ms": "ms", "error": "relative error"},
    )
    hidden = hiding(d, ranks[-1], samples)
    report.show(
        f"What hides the eigenproblem, rank {ranks[-1]}",
        hidden,
        {"what": "what", "step_ms": "step ms", "passes_ms": "two passes ms", "ratio": "ratio"},
    )
    report.save(
        f"{args.out}/accelerator.json",
        backend=jax.default_backend(),
        steps=steps,
        small=small,
        hidden=hidden,
    )


# Steps ------------------------------------------------------------------------------------------


def step_cost(name: str, d: int, rank: int, dtype: str, samples: int) -> dict:
    basis = getattr(B, name)(rank)
    tx = lro.scale_by_lre(C.Covariance(), basis, lro.inner.Adam(), dtype=jnp.dtype(dtype))
    row = timed(tx, jnp.ones(d), rank, dtype, samples, 2 * max(getattr(basis, "capacity", 4), 4))
    return {"basis": name, "rank": rank, "rows": dtype, **row}


def timed(tx, params, rank: int, dtype: str, samples: int, cycle: int) -> dict:
    """A step on gradients of white noise over two passes through ``rank`` rows, in turns."""
    d = sum(x.size for x in jax.tree.leaves(params))
    noise = lambda key: jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    grads = [noise(jax.random.key(i)) for i in range(4)]
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=1).lower(grads[0], state).compile()
    w, g, c = (jnp.ones(shape, dtype) for shape in ((rank, d), d, rank))
    passes = jax.jit(two_passes).lower(w, g, c).compile()

    def steps(count):
        nonlocal state
        for i in range(count):
            updates, state = step(grads[i % 4], state)
        jax.block_until_ready(updates)

    def floor(count):
        for _ in range(count):
            out = passes(w, g, c)
        jax.block_until_ready(out)

    steps(rank + 1 if d < 10**6 else 2 * cycle), floor(2)
    times = np.array([(seconds(steps, cycle), seconds(floor, cycle)) for _ in range(samples)])
    return {
        "step_ms": float(np.median(times[:, 0]) * 1e3),
        "passes_ms": float(np.median(times[:, 1]) * 1e3),
        "ratio": float(np.median(times[:, 0] / times[:, 1])),
        "temporary_mb": step.memory_analysis().temp_size_in_bytes / 1e6,
    }


def seconds(f, count: int) -> float:
    start = time.perf_counter()
    f(count)
    return (time.perf_counter() - start) / count


def two_passes(w, g, c):
    """The floor: ``W g`` and ``c W``, exact in what is stored."""
    exact = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(
        jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32
    )
    return dot(w, g, (((1,), (0,)), ((), ()))), dot(c, w, (((0,), (0,)), ((), ())))


# Small algebra ----------------------------------------------------------------------------------


def latency(n: int) -> list[dict]:
    a = jax.random.normal(jax.random.key(0), (n, 2 * n))
    a = a @ a.T / n
    rebuilt = lambda v, lam: (v * lam) @ v.T
    ways = {"eigh, the default": lambda a: rebuilt(*jax.lax.linalg.eigh(a))}
    for kind in getattr(jax.lax.linalg, "EighImplementation", ()):  # jax 0.9 and later
        ways[f"eigh, {kind.name}"] = functools.partial(
            lambda a, kind: rebuilt(*jax.lax.linalg.eigh(a, implementation=kind)), kind=kind
        )
    for kind in getattr(jax.lax.linalg, "SvdAlgorithm", ()):
        ways[f"svd, {kind.name}"] = functools.partial(_by_svd, kind=kind)
    many = jax.lax.map if jax.default_backend() == "cpu" else lambda f, x: jax.vmap(f)(x)
    ways["32 of eigh at once"] = lambda a: many(
        lambda x: rebuilt(*jax.lax.linalg.eigh(x)), jnp.broadcast_to(a, (32, n, n))
    )[0]
    ways["Cholesky factor"] = lambda a: (lambda f: f @ f.T)(jnp.linalg.cholesky(a))
    ways["20 products"] = lambda a: functools.reduce(lambda x, _: x @ a / n, range(20), a)
    rows = []
    for what, way in ways.items():
        row = {"what": what, "n": n}
        try:
            with jax.default_matmul_precision("highest"):
                f = jax.jit(way).lower(a).compile()
        except NotImplementedError as error:
            rows.append(row | {"missing": str(error).splitlines()[0]})  # not on this platform
            continue
        back = jax.block_until_ready(f(a))
        call = functools.partial(repeated, f, a)
        row["ms"] = float(np.median([seconds(call, 5) for _ in range(7)]) * 1e3)
        if "products" not in what:
            row["error"] = float(jnp.linalg.norm(back - a) / jnp.linalg.norm(a))
        rows.append(row)
    return rows


def repeated(f, a, count: int) -> None:
    for _ in range(count):
        jax.block_until_ready(f(a))


def _by_svd(a, kind):
    u, s, v = jax.lax.linalg.svd(a, full_matrices=False, algorithm=kind)
    return (u * s) @ v


# Hiding it --------------------------------------------------------------------------------------


def hiding(d: int, rank: int, samples: int) -> list[dict]:
    parts = 8
    split = {f"part{i}": jnp.ones(d // parts) for i in range(parts)}
    make = lambda **options: lro.scale_by_lre(
        C.Covariance(), B.GGT(rank), lro.inner.Adam(), **options
    )
    cases = {"every step": (make(), split)}
    cases |= {f"every {n} steps": (make(update_every=n), split) for n in (4, 16)}
    cases[f"{parts} groups, one batch"] = (make(groups=lro.per_leaf), split)
    return [
        {"what": what, **timed(tx, params, rank, "float32", samples, 16)}
        for what, (tx, params) in cases.items()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    return parser.parse_args()


if __name__ == "__main__":
    main()
