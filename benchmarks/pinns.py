"""Physics-informed networks on seven equations: relative L2 errors against seconds, one core.

Every method starts from the same weights and has the same points: 2000 inside, of which half are
drawn anew six times in a run, towards large residuals (RAD), and 500 on the boundary where there
is one. Nothing is chosen for an equation. L-BFGS has optax's line search, self-scaled Broyden
(`broyden.py`) the same, SOAP (`peers.py`) 3e-3 with linear decay. A run ends when its seconds do,
which are the processor's, without compilation and measuring. Runs are written as they end, and
those in the file already are not repeated.

    taskset -c 0 python benchmarks/pinns.py [--seeds 1] [--only KdV] [--methods SOAP]
        [--seconds 60] [--peers 30]
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report
from broyden import self_scaled_broyden
from equations import EQUATIONS, Equation
from matplotlib.figure import Figure

import lowrank_optax as lro

INSIDE, STAGES, CANDIDATES = 2000, 6, 20000

PUBLISHED = {
    "Burgers 0.01/π": 8.3e-9,
    "Burgers 1/1000": 2.7e-7,
    "Allen-Cahn": 1.9e-6,
    "KdV": 2.2e-6,
}
"""vRBA with self-scaled Broyden, 2,011 parameters: Toscano et al., arXiv 2509.14198."""

METHODS: dict[str, Callable[[int], Any]] = {
    "lro.levenberg_marquardt": lambda steps: lro.levenberg_marquardt(),
    "L-BFGS": lambda steps: optax.lbfgs(),
    "self-scaled Broyden": lambda steps: self_scaled_broyden(),
    "SOAP": lambda steps: peers.soap(optax.linear_schedule(3e-3, 0.0, steps)),
}
OURS = "lro.levenberg_marquardt"


def residuals(equation: Equation, params: Any, points: jax.Array) -> jax.Array:
    """All residuals, every part divided by the root of its number of points."""
    parts = [jax.vmap(equation.inside, (None, 0))(params, points) / len(points) ** 0.5]
    if len(equation.edge):
        edge = jnp.asarray(equation.edge, float)
        there = lambda p: equation.u(params, p) - equation.value(p)
        parts.append(jax.vmap(there)(edge) / len(edge) ** 0.5)
    return jnp.concatenate(parts)


def jacobian(equation: Equation, params: Any, points: jax.Array) -> Any:
    """Every residual's gradient, from its own point alone."""
    own = lambda f, p, n: jax.vmap(jax.grad(lambda w, x: f(w, x) / n**0.5), (None, 0))(params, p)
    parts = [own(equation.inside, points, len(points))]
    if len(equation.edge):
        edge = jnp.asarray(equation.edge, float)
        parts.append(own(lambda w, x: equation.u(w, x) - equation.value(x), edge, len(edge)))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def stepper(equation: Equation, tx: Any, ours: bool) -> Callable:
    """``(params, state, points) -> (params, state)``."""

    def step(params, state, points):
        fn = lambda p: residuals(equation, p, points)
        loss = lambda p: jnp.sum(fn(p) ** 2) / 2
        if ours:
            grads = jax.tree.map(jnp.zeros_like, params)
            extra = {"residuals_fn": fn, "per_example_grads": jacobian(equation, params, points)}
        else:
            value, grads = jax.value_and_grad(loss)(params)
            extra = {"value": value, "grad": grads, "value_fn": loss}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def train(equation: Equation, method: str, seed: int, budget: float) -> dict[str, Any]:
    """One run: the error at some thirty points on the way."""
    ours = method == OURS
    batch = 1 if ours else 20
    params = equation.init(seed)
    rng = np.random.default_rng(seed)
    points = jnp.asarray(equation.draw(rng, INSIDE), float)
    strengths = jax.jit(
        lambda p, x: jnp.abs(jax.lax.map(lambda y: equation.inside(p, y), x, batch_size=2000))
    )
    error = jax.jit(equation.error)
    steps, seconds, curve = 0, 0.0, []
    tx = optax.with_extra_args_support(METHODS[method](guess(equation, method, budget)))
    state = tx.init(params)
    one = stepper(equation, tx, ours)

    def many(params, state, points):
        body = lambda carry, _: (one(*carry, points), None)
        return jax.lax.scan(body, (params, state), None, length=batch)[0]

    run = jax.jit(one if batch == 1 else many).lower(params, state, points).compile()
    for stage in range(STAGES):
        if stage:
            more = jnp.asarray(equation.draw(rng, CANDIDATES), float)
            size = np.asarray(strengths(params, more))
            chance = size / size.mean() + 1
            new = rng.choice(CANDIDATES, INSIDE // 2, replace=False, p=chance / chance.sum())
            kept = rng.choice(INSIDE, INSIDE - INSIDE // 2, replace=False)
            points = jnp.concatenate([points[kept], more[new]])
        while seconds < budget * (stage + 1) / STAGES:
            start = time.process_time()
            params, state = jax.block_until_ready(run(params, state, points))
            seconds += time.process_time() - start
            steps += batch
            if not curve or seconds > curve[-1]["seconds"] + budget / 30:
                found = {"step": steps, "seconds": seconds, "error": float(error(params))}
                curve.append({k: float(f"{x:.4g}") for k, x in found.items()})
    curve.append({"step": steps, "seconds": round(seconds, 2), "error": float(error(params))})
    return {"seed": seed, "budget": budget, "curve": curve}


def guess(equation: Equation, method: str, budget: float) -> int:
    """How many steps of a method with a schedule fit into its seconds."""
    if method != "SOAP":
        return 1
    params = equation.init(0)
    points = jnp.asarray(equation.draw(np.random.default_rng(0), INSIDE), float)
    tx = optax.with_extra_args_support(peers.soap(1e-3))
    one = stepper(equation, tx, False)
    body = lambda carry, _: (one(*carry, points), None)
    run = jax.jit(lambda c: jax.lax.scan(body, c, None, length=20)[0])
    carry = jax.block_until_ready(run((params, tx.init(params))))
    start = time.process_time()
    jax.block_until_ready(run(carry))
    return int(budget / (time.process_time() - start) * 20)


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds."""
    last = [run["curve"][-1] for run in runs]
    errors = [p["error"] for p in last]
    return {
        "problem": runs[0]["problem"],
        "method": runs[0]["method"],
        "seeds": len(runs),
        "steps": int(np.median([p["step"] for p in last])),
        "seconds": float(np.median([p["seconds"] for p in last])),
        "error": float(np.median(errors)),
        "low": min(errors),
        "high": max(errors),
        "published": PUBLISHED.get(runs[0]["problem"]),
    }


def early(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Puts into our rows the error that we had when the last of the others ended."""
    for ours in rows:
        others = [
            r["seconds"]
            for r in rows
            if r["problem"] == ours["problem"] and r["method"] != ours["method"]
        ]
        if ours["method"] == OURS and others:
            mine = [r for r in runs if (r["problem"], r["method"]) == (ours["problem"], OURS)]
            before = [[p for p in r["curve"] if p["seconds"] <= max(others)] for r in mine]
            seen = [points[-1]["error"] for points in before if points]
            ours["early"] = float(np.median(seen)) if seen else None


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Errors against seconds, a panel an equation; the dotted line is the best published error."""
    names = [name for name in EQUATIONS if any(r["problem"] == name for r in runs)]
    columns = 4
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.9 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for name, ax in itertools.zip_longest(names, panels):
        if name is None:
            ax.set_axis_off()
            continue
        for i, method in enumerate(METHODS):
            for r in runs:
                if (r["problem"], r["method"]) == (name, method):
                    xs = [p["seconds"] for p in r["curve"]]
                    ys = [p["error"] for p in r["curve"]]
                    ax.plot(xs, ys, color=f"C{i}", label=method if r["seed"] == 0 else None)
        if name in PUBLISHED:
            ax.axhline(PUBLISHED[name], color="0.5", ls=":", lw=1)
        ax.set(yscale="log", title=name, xlabel="seconds", ylabel="relative L2 error")
        ax.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=EQUATIONS, default=list(EQUATIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of ours")
    parser.add_argument("--peers", type=float, default=30.0, help="seconds of each of the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    path = args.out / "pinns.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    with jax.enable_x64(True):
        for seed, name, method in itertools.product(range(args.seeds), args.only, args.methods):
            key = {"problem": name, "method": method, "seed": seed}
            if any(key.items() <= run.items() for run in runs):
                continue
            budget = args.seconds if method == OURS else args.peers
            runs.append(key | train(EQUATIONS[name](), method, seed, budget))
            report.save(path, runs=runs)
            print(name, method, seed, runs[-1]["curve"][-1], flush=True)
    keys = itertools.product(EQUATIONS, METHODS)
    groups = [[r for r in runs if (r["problem"], r["method"]) == key] for key in keys]
    rows = [row(group) for group in groups if group]
    early(runs, rows)
    head = ("problem", "method", "steps", "seconds", "error", "early", "published")
    report.show("Relative L2 errors", rows, {key: key for key in head})
    report.save(path, rows=rows, runs=runs)
    draw(args.out / "pinns.png", runs)


if __name__ == "__main__":
    main()
