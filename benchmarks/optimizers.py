"""Which optimizer ends lowest after the same steps, and which is first to AdamW's result?

Every method has the same model, data, batches, number of steps and linear decay to zero, and tunes
its learning rate on a grid of the same size (a factor √10 apart) with seed 0; the best one runs the
other seeds. Tasks are in `tasks.py`, the references for SOAP and PSGD in `peers.py`. Runs are
written as they end and not repeated; `--time` then measures milliseconds a step, every method
beside AdamW in turns, on a machine that should have nothing else to do.

    python benchmarks/optimizers.py [--tasks NAME ...] [--methods NAME ...] [--data DIR]
    python benchmarks/optimizers.py --time
    python benchmarks/optimizers.py --quick          # two minutes, writes to a temporary folder
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report
from matplotlib.figure import Figure
from tasks import EASY, TASKS, UNITS, Problem

import lowrank_optax as lro

POINTS = 50
"""Evaluations of a run."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer as a function of its learning-rate schedule, and the middle of its grid.

    Attributes:
      make: schedule to transformation.
      middle: of the grid, in the task's unit of learning rates.
      ours: whether it is one of the library's.
      above: the peer that whitening stands in front of.
      scaled: whether rates have that unit; those of Newton's methods have none.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    middle: float = 1e-2
    ours: bool = False
    above: str | None = None
    scaled: bool = True

    def centre(self, unit: float) -> float:
        """The middle of the grid on a task of that unit."""
        return self.middle * (unit if self.scaled else 1)

    def rates(self, unit: float, size: int) -> list[float]:
        """The grid, a factor √10 apart."""
        steps = range(-(size // 2), size - size // 2)
        return [float(f"{self.centre(unit) * 10 ** (k / 2):.3g}") for k in steps]


def muon_dimensions(params: Any) -> Any:
    """Attention's kernels of three axes as matrices; vectors, tables and heads stay with Adam."""
    spec = optax.contrib.MuonDimensionNumbers

    def of(path, x):
        name = jax.tree_util.keystr(path)
        if x.ndim == 3:
            return spec((0, 1), (2,)) if "'out'" in name else spec((0,), (1, 2))
        return spec() if x.ndim == 2 and "embedding" not in name else None

    return jax.tree_util.tree_map_with_path(of, params)


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon with updates of Adam's size (Liu et al. 2025), as one rate serves both its parts."""
    return optax.contrib.muon(
        rate, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimensions
    )


def before(make: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """Whitening with its one default setting in front of a peer."""
    return optax.chain(lro.whiten(), make(rate))


def sophia(rate: optax.Schedule) -> optax.GradientTransformation:
    """Sophia with Hutchinson's estimate, the Hessian's diagonal in the parameters' coordinates."""
    tx = optax.contrib.sophia(rate)

    def update(updates, state, params=None, *, value_fn, **extra):
        return tx.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def lbfgs(rate: optax.Schedule) -> optax.GradientTransformation:
    """L-BFGS with its line search, which has no rate and takes no arguments but its own."""
    tx = optax.lbfgs()

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        return tx.update(updates, state, params, value=value, grad=grad, value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def original(rate: optax.Schedule) -> optax.GradientTransformation:
    """The parts of the original LRE."""
    return lro.lre(rate, basis=lro.basis.GGT(100))


METHODS: dict[str, Method] = {
    "AdamW": Method(optax.adamw),
    "Muon": Method(muon),
    "SOAP": Method(peers.soap),
    "PSGD-Kron": Method(peers.kron),
    "whitening + AdamW": Method(partial(before, optax.adamw), ours=True, above="AdamW"),
    "whitening + Muon": Method(partial(before, muon), ours=True, above="Muon"),
    "whitening + SOAP": Method(partial(before, peers.soap), ours=True, above="SOAP"),
    "soap_muon": Method(lro.soap_muon, ours=True),
    "soap_muon, every 3": Method(partial(lro.soap_muon, update_every=3), ours=True),
    "original LRE": Method(original, 1.0, True),
}
"""Those that every task is run with."""

CURVATURES: dict[str, Method] = {
    "L-BFGS (optax)": Method(lbfgs, scaled=False),
    "Sophia (optax)": Method(sophia),
    "BFGS": Method(lambda rate: lro.lowrank_newton(rate, rank=20), 1.0, True, scaled=False),
    "SR1": Method(
        lambda rate: lro.lowrank_newton(rate, rank=20, curvature=lro.curvature.SR1()),
        1.0,
        True,
        scaled=False,
    ),
    "AdaHessian in a subspace": Method(lambda rate: lro.adahessian(rate, rank=20), 1e-1, True),
    "Sophia-H in a subspace": Method(
        lambda rate: lro.sophia_h(rate, rank=20, complement=optax.scale_by_adam()), ours=True
    ),
    "Hessian whitening + AdamW": Method(
        lambda rate: optax.chain(
            lro.scale_by_lre(
                lro.curvature.HutchinsonHessian(),
                lro.basis.Eigen(20),
                lro.inner.LPower(-0.25),
                update_every=10,
                complement=1.0,
            ),
            optax.adamw(rate),
        ),
        ours=True,
    ),
    "natural gradient": Method(
        lambda rate: lro.natural_gradient(rate, rank=20, damping=1.0, complement=1.0), 1.0, True
    ),
}
"""Hessian and Fisher curvatures, run where they are asked for by ``--methods``."""

EVERY = METHODS | CURVATURES


# One run ----------------------------------------------------------------------------------------


def runner(
    problem: Problem, method: Method, steps: int, points: int = POINTS
) -> Callable[..., Any]:
    """``(rate, seed) -> (measures, held-out losses)``, ``(points,)`` each, compiled once."""
    points = min(points, steps)

    def run(rate, key, data):
        schedule = lambda count: rate * (1 - count / steps)
        tx = optax.with_extra_args_support(method.make(schedule))
        first, draws = jax.random.split(key)
        params = problem.init(first)

        def step(i, carry):
            params, state = carry
            batch = problem.batch(jax.random.fold_in(draws, i), data)
            loss = partial(problem.loss, batch=batch)
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grads,
                state,
                params,
                value=value,
                grad=grads,
                value_fn=loss,
                losses_fn=partial(problem.losses, batch=batch),
            )
            return optax.apply_updates(params, updates), state

        def chunk(carry, i):
            carry = jax.lax.fori_loop(i * steps // points, (i + 1) * steps // points, step, carry)
            held_out = problem.held_out or (lambda params, data: jnp.nan)
            return carry, (problem.measure(carry[0], data), held_out(carry[0], data))

        return jax.lax.scan(chunk, (params, tx.init(params)), jnp.arange(points))[1]

    compiled = jax.jit(run)
    return lambda rate, seed: compiled(rate, jax.random.key(seed), problem.data)


def measure(task: str, name: str, run: Callable[..., Any], rate: float, seed: int) -> dict:
    """One run as it is stored; one that ends in something not finite is infinitely bad."""
    start = time.perf_counter()
    measures, held_out = (np.asarray(x, np.float64) for x in run(rate, seed))
    final = float(measures[-1]) if np.isfinite(measures[-1]) else None
    return {
        "task": task,
        "method": name,
        "rate": rate,
        "seed": seed,
        "final": final,
        "held_out": float(held_out[-1]) if np.isfinite(held_out[-1]) else None,
        "curve": [float(f"{x:.4g}") if np.isfinite(x) else None for x in measures],
        "seconds": time.perf_counter() - start,
    }


class Book:
    """Finished runs on disk, by task, method, rate and seed."""

    def __init__(self, path: Path, steps: dict[str, int]):
        self.path, self.steps = path, steps
        old = json.loads(path.read_text()) if path.exists() else {"runs": [], "steps": {}}
        same = lambda run: old["steps"].get(run["task"]) == steps.get(run["task"], 0)
        self.runs = [run for run in old["runs"] if run["task"] not in steps or same(run)]
        self.steps = old["steps"] | steps
        self.times = old.get("times", {})

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run[k] == v for k, v in wanted.items())]

    def save(self, **rest: Any) -> None:
        report.save(self.path, steps=self.steps, times=self.times, **rest, runs=self.runs)

    def best_rate(self, task: str, method: str, rates: list[float]) -> float | None:
        """The rate of the lowest final measure with seed 0."""
        tried = [r for r in self.find(task=task, method=method, seed=0) if r["rate"] in rates]
        fine = [run for run in tried if run["final"] is not None]
        return min(fine, key=lambda run: run["final"])["rate"] if fine else None


def tune(book: Book, task: str, name: str, problem: Problem, grid: int, seeds: int) -> None:
    """All runs of one method on one task that are missing."""
    method = EVERY[name]
    rates = method.rates(UNITS.get(task, 1.0), grid)
    run = None
    for seed in range(seeds):
        best = rates if seed == 0 else [book.best_rate(task, name, rates)]
        for rate in best:
            if rate is None or book.find(task=task, method=name, rate=rate, seed=seed):
                continue
            run = run or runner(problem, method, book.steps[task])
            book.runs.append(measure(task, name, run, rate, seed))
            book.save()
            last = book.runs[-1]
            final = np.inf if last["final"] is None else last["final"]
            print(
                f"{task:12s} {name:20s} rate {rate:<8g} seed {seed}: {final:.4g}"
                f" ({last['seconds']:.0f} s)",
                flush=True,
            )


# Time of a step ---------------------------------------------------------------------------------


def step_times(
    problem: Problem, methods: dict[str, Method], unit: float, steps: int = 40
) -> dict[str, float]:
    """Milliseconds a step, all methods in turns, the least of five rounds."""
    runs = {}
    for name, method in methods.items():
        # Evaluated once, at the end: that is in the figures, a fortieth of it in each step's.
        runs[name] = run = runner(problem, method, steps, 1)
        jax.block_until_ready(run(method.centre(unit), 0))
    best = dict.fromkeys(runs, np.inf)
    for _ in range(5):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(methods[name].centre(unit), 0))
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: 1e3 * seconds / steps for name, seconds in best.items()}


# Tables -----------------------------------------------------------------------------------------


def summary(book: Book, task: str, name: str, unit: float, grid: int) -> dict[str, Any] | None:
    """Median and range over seeds at the best rate; steps and seconds to AdamW's result."""
    rates = EVERY[name].rates(unit, grid)
    rate = book.best_rate(task, name, rates)
    if rate is None:
        return None
    runs = [r for r in book.find(task=task, method=name, rate=rate) if r["final"] is not None]
    finals = [run["final"] for run in runs]
    steps = book.steps[task]
    out = {
        "task": task,
        "method": name,
        "group": "curvatures" if name in CURVATURES else "methods",
        "rate": rate,
        "centre": EVERY[name].centre(unit),
        "guided": at_centre(book, task, name, EVERY[name].centre(unit)),
        "edge": rate in (rates[0], rates[-1]),
        "seeds": len(runs),
        "final": statistics.median(finals),
        "low": min(finals),
        "high": max(finals),
        "ms": book.times.get(task, {}).get(name),
    }
    goal = book.best_rate(task, "AdamW", METHODS["AdamW"].rates(unit, grid))
    adam = [r["final"] for r in book.find(task=task, method="AdamW", rate=goal)]
    if adam and None not in adam:
        target = statistics.median(adam)
        firsts = [_first(run["curve"], target) for run in runs]
        pairs = zip(firsts, runs, strict=True)
        reached = [(f + 1) / len(run["curve"]) for f, run in pairs if f is not None]
        if len(reached) * 2 > len(runs):
            out["steps"] = round(statistics.median(reached) * steps)
            if out["ms"] is not None:
                out["seconds"] = out["steps"] * out["ms"] / 1e3
    return out


def at_centre(book: Book, task: str, name: str, centre: float) -> float | None:
    """The result of seed 0 at the grid's middle, what one has who tunes nothing."""
    found = book.find(task=task, method=name, rate=float(f"{centre:.3g}"), seed=0)
    return found[0]["final"] if found else None


def _first(curve: list[float | None], target: float) -> int | None:
    return next((i for i, x in enumerate(curve) if x is not None and x <= target * 1.0001), None)


def draw(path: Path, book: Book, rows: list[dict[str, Any]]) -> None:
    """The best runs of every method, a panel a task."""
    names = [t for t in TASKS | EASY if any(row["task"] == t for row in rows)]
    across = min(3, len(names))
    figure = Figure(figsize=(4.6 * across, 3.2 * -(-len(names) // across)), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(-(-len(names) // across), across, squeeze=False).ravel()
    order = list(EVERY)
    for ax in axes[len(names) :]:
        ax.axis("off")
    for ax, task in zip(axes, names, strict=False):
        for row in (r for r in rows if r["task"] == task):
            runs = book.find(task=task, method=row["method"], rate=row["rate"])
            curves = np.array([run["curve"] for run in runs], float)
            line = np.nanmedian(curves, axis=0)
            at = np.arange(1, len(line) + 1) * book.steps[task] / len(line)
            index = order.index(row["method"])
            style = "-" if EVERY[row["method"]].ours else "--"
            ax.plot(at, line, style, color=f"C{index % 10}", label=row["method"], linewidth=1.3)
        ax.set(title=task, xlabel="steps", yscale="log")
        ax.grid(alpha=0.3)
    if len(names):
        axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = TASKS | EASY
    parser.add_argument("--tasks", nargs="+", default=list(every), choices=every, metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=EVERY, metavar="NAME"
    )
    parser.add_argument("--grid", type=int, default=6, help="learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", action="store_true", help="measure milliseconds a step")
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--data", help="folder of the data, see datasets.py")
    args = parser.parse_args()
    if args.data:
        os.environ["LOWRANK_OPTAX_DATA"] = args.data
    if args.quick:
        args.tasks, args.methods = ["digits", "rosenbrock"], ["AdamW", "whitening + AdamW"]
        args.grid, args.seeds, args.out = 2, 1, Path(tempfile.mkdtemp())
    problems = {name: every[name]() for name in args.tasks}
    steps = {name: problem.steps for name, problem in problems.items()}
    if args.quick:
        steps = {name: 30 for name in steps}
    book = Book(args.out / "optimizers.json", steps)
    for task in args.tasks:
        if args.time:
            chosen = {name: EVERY[name] for name in args.methods}
            times = book.times.setdefault(task, {})
            times.update(step_times(problems[task], chosen, UNITS.get(task, 1.0)))
            print(task, {name: f"{ms:.3g} ms" for name, ms in times.items()}, flush=True)
            book.save()
            continue
        for name in args.methods:
            tune(book, task, name, problems[task], args.grid, args.seeds)
    # Everything that is on disk is summed up, not only what was asked for now.
    known = [t for t in every if book.find(task=t)]
    found = [summary(book, t, m, UNITS.get(t, 1.0), args.grid) for t in known for m in EVERY]
    rows = [row for row in found if row]
    columns = {
        "task": "task",
        "method": "method",
        "rate": "rate",
        "seeds": "seeds",
        "final": "final",
        "low": "lowest",
        "high": "highest",
        "steps": "steps to AdamW's",
        "ms": "ms a step",
        "seconds": "seconds to AdamW's",
    }
    shown = [row for row in rows if row["task"] in args.tasks and row["method"] in args.methods]
    report.show("Final results at equal steps", shown, columns)
    book.save(rows=rows)
    draw(args.out / "optimizers.png", book, [row for row in rows if row["group"] == "methods"])
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
