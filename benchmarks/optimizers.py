"""Which optimizer ends lowest after the same steps, and which is first to AdamW's result?

Every method has the same model, data, batches, number of steps and linear decay to zero, and tunes
its learning rate on a grid of the same size (a factor √10 apart) with seed 0; the best one runs the
other seeds. Tasks are in `tasks.py`, methods in `methods.py`, references for SOAP, KL-SOAP and PSGD
in `peers.py`. Runs are written as they end and not repeated, unless ``--again`` forgets them.

The library's methods also run at half, one and two times the rate of their guidance, and there with
every seed: the last table sets that one setting beside the best tuned peer. On the four tasks that
are kept aside they run only with ``--kept-aside``.

``--time`` measures milliseconds a step, and of a gradient alone, in turns, on a machine that should
have nothing else to do. ``--core`` keeps the program to one core.

    python benchmarks/optimizers.py [--tasks NAME ...] [--methods NAME ...] [--data DIR] [--core 1]
    python benchmarks/optimizers.py --time [--tasks NAME ...] [--methods NAME ...] [--core 1]
    python benchmarks/optimizers.py --quick          # two minutes, writes to a temporary folder
"""

import argparse
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
import report
from matplotlib.figure import Figure
from methods import CURVATURES, EVERY, METHODS, PEERS, RECIPE, Method
from tasks import EASY, KEPT_ASIDE, TASKS, UNITS, Problem

POINTS = 50
"""Evaluations of a run."""


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
            found = problem.measure(carry[0], data)
            if problem.held_out is problem.measure:
                return carry, (found, found)
            held_out = problem.held_out or (lambda params, data: jnp.nan)
            return carry, (found, held_out(carry[0], data))

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
        self.tables = {name: old[name] for name in ("rows", "verdicts") if name in old}

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run[k] == v for k, v in wanted.items())]

    def forget(self, tasks: list[str], methods: list[str]) -> None:
        """Drops stored runs, of methods that have changed."""
        gone = lambda run: run["task"] in tasks and run["method"] in methods
        self.runs = [run for run in self.runs if not gone(run)]

    def save(self, **tables: Any) -> None:
        """Writes to a file beside and renames it, so that a killed run leaves the old one whole."""
        self.tables |= tables
        beside = self.path.with_suffix(".part")
        report.save(beside, steps=self.steps, times=self.times, **self.tables, runs=self.runs)
        beside.replace(self.path)

    def best_rate(self, task: str, method: str, rates: list[float]) -> float | None:
        """The rate of the lowest final measure with seed 0."""
        tried = [r for r in self.find(task=task, method=method, seed=0) if r["rate"] in rates]
        fine = [run for run in tried if run["final"] is not None]
        return min(fine, key=lambda run: run["final"])["rate"] if fine else None


def tune(book: Book, task: str, name: str, problem: Problem, grid: int, seeds: int) -> None:
    """All runs of one method on one task that are missing; one compilation serves them all."""
    method = EVERY[name]
    unit = UNITS.get(task, 1.0)
    rates = method.rates(unit, grid)
    run = None
    for seed in range(seeds):
        if seed == 0:
            wanted = rates + (method.around(unit) if name == RECIPE and problem.network else [])
        else:
            guided = [method.around(unit)[1]] if name == RECIPE and problem.network else []
            wanted = [book.best_rate(task, name, rates), *guided]
        for rate in wanted:
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
    """Milliseconds a step, and a gradient alone, in turns, the least of five rounds."""
    runs = {}
    methods = {"gradient": Method(optax.sgd), **methods}
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
        "gradient_ms": book.times.get(task, {}).get("gradient"),
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


def verdict(book: Book, task: str, rows: list[dict[str, Any]], unit: float) -> dict | None:
    """The recipe at its guidance's rate beside the best tuned peer, at equal steps and in seconds.

    ``ratio`` is its median over the best peer's; ``best_rate`` its best rate over the guidance, of
    all that ran with seed 0; ``half`` and ``twice`` its results there over that at the guidance;
    ``lost`` whether twice the guidance ends above the best tuned AdamW.
    """
    found = {row["method"]: row for row in rows if row["task"] == task}
    peers = {name: found[name] for name in PEERS if name in found}
    half, one, two = EVERY[RECIPE].around(unit)
    runs = {run["rate"]: run["final"] for run in book.find(task=task, method=RECIPE, seed=0)}
    if not {half, one, two} <= runs.keys() or "AdamW" not in peers:
        return None
    finals = [r["final"] for r in book.find(task=task, method=RECIPE, rate=one)]
    worst = lambda x: np.inf if x is None else x
    at = {rate: worst(final) for rate, final in runs.items()}
    first = min(peers, key=lambda name: peers[name]["final"])
    mine = statistics.median(map(worst, finals))
    target = peers["AdamW"]["final"]
    out = {
        "task": task,
        "aside": "aside" if task in KEPT_ASIDE else "",
        "gradient_ms": book.times.get(task, {}).get("gradient"),
        "final": mine,
        "seeds": len(finals),
        "peer": first,
        "peer_final": peers[first]["final"],
        "ratio": mine / peers[first]["final"],
        "best_rate": min(at, key=lambda rate: at[rate]) / one,
        "half": at[half] / at[one],
        "twice": at[two] / at[one],
        "lost": "yes" if at[two] > target else "no",
    }
    curves = [r["curve"] for r in book.find(task=task, method=RECIPE, rate=one)]
    reached = [first for first in (_first(curve, target) for curve in curves) if first is not None]
    ms = book.times.get(task, {}).get(RECIPE)
    if ms is not None and len(reached) * 2 > len(curves):
        share = statistics.median((x + 1) / len(curves[0]) for x in reached)
        out["seconds"] = share * book.steps[task] * ms / 1e3
    others = {name: row["seconds"] for name, row in peers.items() if "seconds" in row}
    if others:
        out["fast_peer"] = min(others, key=lambda name: others[name])
        out["peer_seconds"] = others[out["fast_peer"]]
    return out


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


FINALS = {
    "task": "task",
    "method": "method",
    "rate": "rate",
    "seeds": "seeds",
    "final": "final",
    "low": "lowest",
    "high": "highest",
    "steps": "steps to AdamW's",
    "ms": "ms a step",
    "gradient_ms": "ms a gradient",
    "seconds": "seconds to AdamW's",
}

VERDICT = {
    "task": "task",
    "aside": "kept",
    "final": "at the guidance",
    "seeds": "seeds",
    "peer": "best peer",
    "peer_final": "its final",
    "ratio": "ratio",
}

SECONDS = {
    "task": "task",
    "gradient_ms": "ms a gradient",
    "seconds": "seconds to AdamW's",
    "fast_peer": "fastest peer",
    "peer_seconds": "its seconds",
    "best_rate": "best rate / guidance",
    "half": "at half / at one",
    "twice": "at twice / at one",
    "lost": "twice above AdamW",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = TASKS | EASY
    parser.add_argument("--tasks", nargs="+", default=list(every), choices=every, metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=EVERY, metavar="NAME"
    )
    parser.add_argument("--kept-aside", action="store_true", help="ours on the tasks kept aside")
    parser.add_argument("--again", action="store_true", help="forget stored runs of these first")
    parser.add_argument("--grid", type=int, default=6, help="learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", action="store_true", help="measure milliseconds a step")
    parser.add_argument("--core", type=int, help="the one core to run on; all of them by default")
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--data", help="folder of the data, see datasets.py")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.methods = ["digits", "rosenbrock"], ["AdamW", "whitening + AdamW"]
        args.grid, args.seeds, args.out = 2, 1, Path(tempfile.mkdtemp())
    return args


def main() -> None:
    args = arguments()
    if args.data:
        os.environ["LOWRANK_OPTAX_DATA"] = args.data
    if args.core is not None:  # before JAX starts its threads
        os.sched_setaffinity(0, {args.core})
    every = TASKS | EASY
    problems = {name: every[name]() for name in args.tasks}
    steps = {name: problem.steps for name, problem in problems.items()}
    if args.quick:
        steps = {name: 30 for name in steps}
    book = Book(args.out / "optimizers.json", steps)
    for task in args.tasks:
        mine = lambda name, task=task: EVERY[name].ours and task in KEPT_ASIDE
        methods = [name for name in args.methods if args.kept_aside or not mine(name)]
        if len(methods) < len(args.methods):
            print(f"{task} is kept aside: only peers run without --kept-aside", flush=True)
        if args.again and not args.time:
            book.forget([task], methods)
        if args.time:
            times = book.times.setdefault(task, {})
            chosen = {name: EVERY[name] for name in methods}
            times.update(step_times(problems[task], chosen, UNITS.get(task, 1.0)))
            print(task, {name: f"{ms:.3g} ms" for name, ms in times.items()}, flush=True)
            book.save()
            continue
        for name in methods:
            tune(book, task, name, problems[task], args.grid, args.seeds)
    # Everything that is on disk is summed up, not only what was asked for now.
    known = [t for t in every if book.find(task=t)]
    found = [summary(book, t, m, UNITS.get(t, 1.0), args.grid) for t in known for m in EVERY]
    rows = [row for row in found if row]
    shown = [row for row in rows if row["task"] in args.tasks and row["method"] in args.methods]
    report.show("Final results at equal steps", shown, FINALS)
    verdicts = [verdict(book, task, rows, UNITS.get(task, 1.0)) for task in known]
    verdicts = [row for row in verdicts if row]
    if verdicts:
        report.show(f"{RECIPE} at its guidance's rate, peers tuned", verdicts, VERDICT)
        report.show("Seconds to AdamW's best, and rates around the guidance", verdicts, SECONDS)
    book.save(rows=rows, verdicts=verdicts)
    draw(args.out / "optimizers.png", book, [row for row in rows if row["group"] == "methods"])
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
