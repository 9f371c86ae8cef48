"""What a step of Levenberg-Marquardt costs by the number of residuals and parameters.

Poisson's equation in three dimensions by a tanh network of three layers, with ``k`` points and the
smallest width that gives ``d`` parameters. `lro.levenberg_marquardt` chooses by the sizes: the
Jacobian as one array, from gradients of single points, or products alone. Each size runs in a
process of its own, which reports the processor's seconds of a step (the fastest of three; of one at
the largest size), the losses, and the largest memory that it ever had.

    taskset -c 0 python benchmarks/least_squares_scale.py [--sizes 20000x20000]
        [--precisions float32]
"""

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from matplotlib.figure import Figure

import lowrank_optax as lro

SIZES = [
    (500, 500),
    (1000, 1000),
    (1000, 2000),
    (2000, 1000),
    (2000, 2000),
    (5000, 5000),
    (10000, 10000),
    (20000, 20000),
]


def measure(k: int, d: int, precision: str) -> dict:
    """Steps at one size, in this process."""
    width = math.ceil(((49 + 8 * d) ** 0.5 - 7) / 4)
    sizes = (3, width, width, width, 1)
    rng = np.random.default_rng(0)
    params = [
        (
            jnp.asarray(rng.normal(size=s) * (2 / sum(s)) ** 0.5, precision),
            jnp.zeros(s[1], precision),
        )
        for s in itertools.pairwise(sizes)
    ]
    points = jnp.asarray(rng.uniform(size=(k, 3)), precision)

    def u(params, x):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = params[-1]
        return (x @ w + b)[0]

    def inside(params, x):
        second = lambda e: jax.jvp(
            lambda x: jax.jvp(lambda x: u(params, x), (x,), (e,))[1], (x,), (e,)
        )[1]
        bend = sum(second(e) for e in jnp.eye(3, dtype=x.dtype))
        return bend + 3 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))

    fit = lro.least_squares.at_points((inside, points), chunk=500)
    tx = lro.levenberg_marquardt()
    state = tx.init(params)
    count = sum(x.size for x in jax.tree.leaves(params))
    whole = min(k, count) <= 4096

    @jax.jit
    def step(params, state):
        extra = {"per_example_grads": fit.gradients(params)} if whole else {}
        updates, state = tx.update(params, state, params, residuals_fn=fit.residuals, **extra)
        return optax.apply_updates(params, updates), state

    start = float(sum(jnp.sum(r**2) for r in jax.jit(fit.residuals)(params)) / 2)
    losses, seconds = [start], []
    begin = time.process_time()
    run = step.lower(params, state).compile()
    compiling = time.process_time() - begin
    for _ in range(1 if k * count > 2**27 else 3):
        begin = time.process_time()
        params, state = jax.block_until_ready(run(params, state))
        seconds.append(time.process_time() - begin)
        losses.append(float(state.loss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "k": k,
        "d": count,
        "precision": precision,
        "seconds": round(min(seconds), 3),
        "compiling": round(compiling, 1),
        "peak_mb": round(peak),
        "products": int(state.products),
        "losses": losses,
    }


def draw(path: Path, rows: list[dict]) -> None:
    """Seconds and memory against the number of parameters."""
    figure = Figure(figsize=(8, 3.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, precision in enumerate(("float64", "float32")):
        for marker, whole in (("o", True), ("s", False)):
            some = [
                r for r in rows if r["precision"] == precision and (r["products"] == 0) == whole
            ]
            label = f"{precision}, {'one array' if whole else 'products'}"
            x = [(r["k"] * r["d"]) ** 0.5 for r in some]
            left.plot(x, [r["seconds"] for r in some], marker, color=f"C{i}", label=label)
            right.plot(x, [r["peak_mb"] for r in some], marker, color=f"C{i}")
    for ax, name in ((left, "seconds a step"), (right, "largest memory of the process, MB")):
        ax.set(xscale="log", yscale="log", xlabel="√(residuals × parameters)", ylabel=name)
        ax.grid(alpha=0.3)
    right.axhline(2048, color="0.5", ls=":")
    left.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=[f"{k}x{d}" for k, d in SIZES])
    parser.add_argument("--precisions", nargs="+", default=["float64", "float32"])
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    path = args.out / "least_squares_scale.json"
    if args.one:
        k, d = map(int, args.sizes[0].split("x"))
        with jax.enable_x64(args.precisions[0] == "float64"):
            print(json.dumps(measure(k, d, args.precisions[0])))
        return
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for size, precision in itertools.product(args.sizes, args.precisions):
        command = [sys.executable, __file__, "--one", "--sizes", size, "--precisions", precision]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = {"size": size} | json.loads(out.splitlines()[-1])
        rows = [r for r in rows if (r["size"], r["precision"]) != (size, precision)] + [row]
        report.save(path, rows=rows)
        print(row, flush=True)
    keys = ("k", "d", "precision", "products", "seconds", "peak_mb")
    report.show("A step of lro.levenberg_marquardt", rows, {key: key for key in keys})
    draw(args.out / "least_squares_scale.png", rows)


if __name__ == "__main__":
    main()
