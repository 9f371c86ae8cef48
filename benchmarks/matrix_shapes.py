"""Matrix-shaped parameters on a character transformer: one- and two-sided bases, and the flat one.

Two layers of width 64 on Shakespeare. Every method tunes its learning rate on the same grid of
three with one seed, decaying linearly to zero, and its best runs with further seeds: held-out loss,
median and spread. Then a step of every method is timed, the methods in turn, several rounds over;
the ratio to Adam's is what to read. State is what the optimizer keeps, in bytes.

One-sided: Adam in the leading directions of the shorter side, as GaLore, anew every 50 steps.
Two-sided: Adam in the eigenbases of both sides, as SOAP, which turn every 10 steps; with a rank
only so many directions of each. `optax.contrib.galore` projects the longer side; SOAP is the
reference in `peers.py`.

    python benchmarks/matrix_shapes.py [--quick] [--steps 600] [--seeds 3] [--data DIR]
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the eigenproblems are too small for more

import jax
import matplotlib
import numpy as np
import optax
import peers
import report
import tasks

import lowrank_optax as lro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = (3e-3, 1e-2, 3e-2)


def flat(rate: optax.Schedule) -> optax.GradientTransformation:
    """Whitening in one basis for all parameters, then Adam."""
    whiten = lro.scale_by_lre(
        lro.curvature.Covariance(), lro.basis.GGT(20, beta=1.0), lro.inner.LInvSqrt()
    )
    return optax.chain(whiten, optax.adam(rate))


def one_sided(rank: int) -> Callable[[optax.Schedule], optax.GradientTransformation]:
    return lambda rate: lro.galore(rate, rank=rank, update_every=50, scale=1.0)


def one_sided_soap(rate: optax.Schedule) -> optax.GradientTransformation:
    """SOAP's shorter side alone."""
    side = lro.basis.FullMatrix(0.95, update_every=10, eig_tol=0.0)
    inside = lro.scale_by_matrix_lre(side, None, lro.inner.Adam(0.95, 0.95))
    return optax.chain(inside, optax.scale_by_learning_rate(rate))


def optax_galore(rate: optax.Schedule) -> optax.GradientTransformation:
    """optax's, with our view of leaves of three axes."""

    def dimensions(params: Any) -> Any:
        def one(axes):
            if axes is None:
                return None
            return optax.contrib.GaLoreDimensionNumbers(axes.rows, axes.columns)

        seen = [one(leaf.axes) for leaf in lro.diagnose.views(params).leaves]
        return jax.tree.structure(params).unflatten(seen)

    return optax.contrib.galore(
        rate, rank=16, update_proj_gap=50, scale=1.0, weight_dimension_numbers=dimensions
    )


METHODS = {
    "Adam": optax.adam,
    "flat: GGT(20), then Adam": flat,
    "one side, rank 8": one_sided(8),
    "one side, rank 16": one_sided(16),
    "one side, rank 32": one_sided(32),
    "optax galore, rank 16": optax_galore,
    "one side, full": one_sided_soap,
    "two sides, full": lro.soap,
    "two sides, rank 16": functools.partial(lro.soap, rank=16),
    "two sides, rank 32": functools.partial(lro.soap, rank=32),
    "SOAP (reference)": peers.soap,
}


def runner(task: tasks.Problem, make: Callable[..., Any], steps: int) -> Callable[..., jax.Array]:
    """``(rate, seed) ->`` held-out loss after ``steps``, compiled once for all of them."""

    @jax.jit
    def run(rate, seed, data):
        tx = make(lambda count: rate * (1 - count / steps))
        params = task.init(jax.random.key(seed))

        def step(carry, key):
            params, state = carry
            grads = jax.grad(task.loss)(params, task.batch(key, data))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(seed + 1000), steps)
        params = jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]
        return task.measure(params, data)

    return lambda rate, seed: run(rate, seed, task.data)


def step_times(task: tasks.Problem, rounds: int, steps: int = 50) -> dict[str, list[float]]:
    """Milliseconds a step, all methods in turn, ``rounds`` times over."""
    compiled = {}
    for name, make in METHODS.items():
        tx = make(optax.constant_schedule(1e-3))

        def many(params, state, keys, data, tx=tx):
            def step(carry, key):
                params, state = carry
                grads = jax.grad(task.loss)(params, task.batch(key, data))
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), keys)[0]

        params = task.init(jax.random.key(0))
        compiled[name] = jax.jit(many), [params, tx.init(params)]
    keys = jax.random.split(jax.random.key(1), steps)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for i in range(rounds + 1):
        for name, (run, carry) in compiled.items():
            start = time.perf_counter()
            carry[:] = jax.block_until_ready(run(*carry, keys, task.data))
            if i:  # the first compiles
                times[name].append((time.perf_counter() - start) / steps * 1e3)
    return times


def state_bytes(task: tasks.Problem, make: Callable[..., Any]) -> int:
    tx = make(optax.constant_schedule(1e-3))
    state = jax.eval_shape(lambda: tx.init(task.init(jax.random.key(0))))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def main() -> None:
    args = arguments()
    task = tasks.text(most=None)
    path = Path(args.out) / "matrix_shapes.json"
    book = {}
    if path.exists() and not args.fresh:
        old = json.loads(path.read_text())
        book = old["runs"] if old["steps"] == args.steps else {}

    results = {}
    for name, make in METHODS.items():
        runs, run = book.setdefault(name, {}), runner(task, make, args.steps)

        def loss(rate: float, seed: int, runs=runs, run=run) -> float:
            key = f"{rate:g}/{seed}"
            if key not in runs:
                runs[key] = float(run(rate, seed))
                report.save(path, steps=args.steps, runs=book)
            return runs[key] if np.isfinite(runs[key]) else np.inf

        best = min(RATES, key=lambda rate: loss(rate, 0))
        results[name] = best, [loss(best, seed) for seed in range(args.seeds)]
        print(f"{name}: {np.median(results[name][1]):.3f} at {best:g}", flush=True)

    times = step_times(task, args.rounds)
    adam = np.array(times["Adam"])
    rows = []
    for name, make in METHODS.items():
        best, done = results[name]
        rows.append(
            {
                "method": name,
                "rate": best,
                "loss": f"{np.median(done):.3f}",
                "spread": f"{min(done):.3f}–{max(done):.3f}",
                "ms": float(np.median(times[name])),
                "over_adam": float(np.median(np.array(times[name]) / adam)),
                "state_kb": state_bytes(task, make) / 1e3,
            }
        )
    report.show(
        f"Character transformer, {args.steps} steps",
        rows,
        {
            "method": "method",
            "rate": "learning rate",
            "loss": "held-out loss",
            "spread": "spread",
            "ms": "ms a step",
            "over_adam": "over Adam's",
            "state_kb": "state kB",
        },
    )
    report.save(path, steps=args.steps, runs=book, rows=rows, times=times)
    draw(path.with_suffix(".png"), rows, args.steps)


def draw(path: Path, rows: list[dict[str, Any]], steps: int) -> None:
    """Loss over state, a point for each method, its area the time of a step."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for row in rows:
        x, y = row["state_kb"], float(row["loss"])
        axis.scatter(x, y, s=60 * row["over_adam"], alpha=0.6)
        axis.annotate(row["method"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", xlabel="optimizer state, kB", ylabel=f"held-out loss, {steps} steps")
    axis.set_title("area: time of a step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--data", help="folder of the data, see datasets.py")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--fresh", action="store_true", help="forget the runs on disk")
    parser.add_argument("--quick", action="store_true", help="a few steps of some methods")
    args = parser.parse_args()
    if args.data:
        os.environ["LOWRANK_OPTAX_DATA"] = args.data
    if args.quick:
        args.steps, args.seeds, args.rounds, args.fresh = 20, 1, 1, True
        for name in list(METHODS)[2:-2]:
            if name != "one side, rank 16":
                del METHODS[name]
    return args


if __name__ == "__main__":
    main()
