"""What a step costs: its time over that of two passes through the stored rows, in the same run.

Two passes over ``rank`` rows, ``W g`` and ``c W``, are the floor of any step. Each sample times the
step and the floor one after the other, whole cycles of a basis's rotations at a time; the ratio is
the median over the samples. Nothing else should run on the machine.

Beside it stands what the flop count predicts: passes over the rows that are really stored, the
products of a rotation at the rate of a matrix product measured here, and the small eigenproblem as
measured here alone.

    python benchmarks/step_cost.py [--quick] [--out DIR] [--bases GGT,Eigen] [--ranks 20,100]
"""

import argparse
import functools
import gc
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the eigenproblems are too small for more
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import lowrank_optax as lro

UNTIMED = {"FullMatrix", "SubspaceIteration", "Learned"}

BASES = {
    type(part).__name__: type(part)
    for part in (cases.BASES | cases.MORE_BASES).values()
    if type(part).__name__ not in UNTIMED
}


def main() -> None:
    args = arguments()
    rows = []
    for d in args.sizes:
        for rank in args.ranks:
            for name in args.bases:
                for dtype in (None, jnp.bfloat16) if args.bf16 else (None,):
                    if dtype is not None and name not in ("GGT", "Eigen"):
                        continue
                    rows.append(measure(name, d, rank, dtype, args.samples))
                    print("{basis} d={d:.0e} rank={rank} {dtype}: {ratio:.2f}".format(**rows[-1]))
        rows.append(adam(d, args.samples))
        if args.torch:
            rows += [torch_ggt(d, rank) for rank in args.ranks]
    report.show(
        "Step over two passes through the rows",
        rows,
        {
            "basis": "basis",
            "dtype": "rows",
            "d": "d",
            "rank": "rank",
            "step_ms": "step ms",
            "passes_ms": "two passes ms",
            "ratio": "ratio",
            "spread": "quartiles",
            "predicted": "predicted",
            "compile_s": "compile s",
            "state_mb": "state MB",
        },
    )
    report.save(f"{args.out}/step_cost.json", rows=rows)


def measure(name: str, d: int, rank: int, dtype, samples: int) -> dict:
    """Times one product on gradients of white noise, the state donated."""
    basis = BASES[name](rank)
    tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.Adam(), dtype=dtype)
    grads = [jax.random.normal(jax.random.key(i), (d,)) for i in range(4)]
    state = tx.init(grads[0])
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    step = jax.jit(lambda g, s: tx.update(g, s, g), donate_argnums=1)
    start = time.perf_counter()
    step = step.lower(grads[0], state).compile()
    compile_s = time.perf_counter() - start

    kind = dtype or jnp.float32
    w, g, c = jnp.ones((rank, d), kind), jnp.ones(d, kind), jnp.ones(rank, kind)
    passes = jax.jit(two_passes).lower(w, g, c).compile()

    cycle = max(getattr(basis, "capacity", 1), 4)
    for i in range(rank + cycle if d < 10**6 else 2 * cycle):  # until the rows are full
        _, state = step(grads[i % 4], state)
    steps, floors = [], []
    for _ in range(samples):
        start = time.perf_counter()
        for i in range(cycle):
            updates, state = step(grads[i % 4], state)
            jax.block_until_ready(updates)
        steps.append((time.perf_counter() - start) / cycle)
        start = time.perf_counter()
        for _ in range(cycle):
            jax.block_until_ready(passes(w, g, c))
        floors.append((time.perf_counter() - start) / cycle)
    del w, state
    gc.collect()
    ratios = np.array(steps) / np.array(floors)
    low, high = np.quantile(ratios, [0.25, 0.75])
    return {
        "basis": name,
        "dtype": jnp.dtype(kind).name,
        "d": d,
        "rank": rank,
        "step_ms": float(np.median(steps) * 1e3),
        "passes_ms": float(np.median(floors) * 1e3),
        "ratio": float(np.median(ratios)),
        "spread": f"{low:.2f}–{high:.2f}",
        "predicted": predicted(basis, d, rank, float(np.median(floors))),
        "compile_s": compile_s,
        "state_mb": size / 1e6,
    }


def predicted(basis: lro.basis.Basis, d: int, rank: int, floor: float) -> float | None:
    """The ratio that the flop count predicts, from rates measured here."""
    if isinstance(basis, lro.basis.Frame):
        r, m = basis.slots, basis.slots + basis.capacity
        rotation = (2 * m + 2 * r) * r * d / basis.capacity / product_rate(r, m)
        return m / rank + (rotation + eigh_seconds(r + 1)) / floor
    if hasattr(basis, "place"):  # the rings
        return 1 + eigh_seconds(rank) / floor
    return None


@functools.cache
def product_rate(r: int, m: int) -> float:
    """Flops a second of ``T W`` on a block that fits the cache."""
    t, w = jnp.ones((r, m)), jnp.ones((m, 8192))
    return 2 * r * m * 8192 / best_seconds(jax.jit(jnp.matmul), t, w)


@functools.cache
def eigh_seconds(n: int) -> float:
    """Seconds of one small eigenproblem."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    return best_seconds(jax.jit(jnp.linalg.eigh), a @ a.T)


def best_seconds(f, *args) -> float:
    """The median of ten calls after a first."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def two_passes(w, g, c):
    """The floor: ``W g`` and ``c W``."""
    dot = jax.lax.dot_general
    return (
        dot(w, g, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32),
        dot(c, w, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32),
    )


def adam(d: int, samples: int) -> dict:
    """optax's Adam on the same number of parameters."""
    tx = optax.scale_by_adam()
    g = jax.random.normal(jax.random.key(0), (d,))
    state = tx.init(g)
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1)
    times = []
    for _ in range(5 * samples):
        start = time.perf_counter()
        updates, state = step(g, state)
        jax.block_until_ready(updates)
        times.append(time.perf_counter() - start)
    return {
        "basis": "optax adam",
        "d": d,
        "step_ms": float(np.median(times) * 1e3),
        "state_mb": 8 * d / 1e6,
    }


def torch_ggt(d: int, rank: int) -> dict:
    """The GGT of torchzero, by the author of the original LRE."""
    import torch
    import torchzero as tz

    x = torch.nn.Parameter(torch.zeros(d))
    optimizer = tz.Optimizer([x], tz.m.GGT(history_size=rank), tz.m.LR(1e-3))
    grads = [torch.randn(d) for _ in range(4)]
    times = []
    for i in range(rank + 5):  # until its window is full
        x.grad = grads[i % 4].clone()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return {
        "basis": "torchzero GGT",
        "dtype": "float32",
        "d": d,
        "rank": rank,
        "step_ms": float(np.median(times[-5:]) * 1e3),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(float(x)) for x in text.split(",")]
    parser.add_argument("--sizes", type=numbers, default=[10**4, 10**5, 10**6])
    parser.add_argument("--ranks", type=numbers, default=[20, 100])
    parser.add_argument("--bases", type=lambda x: x.split(","), default=list(BASES))
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--torch", action="store_true", help="measure torchzero's GGT as well")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.ranks, args.samples, args.bf16 = [10**4], [10], 3, False
        args.bases = ["GGT", "Eigen"]
    return args


if __name__ == "__main__":
    main()
