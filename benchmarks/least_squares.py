"""Nonlinear least squares: two partial differential equations by networks, and a curve.

Residuals ``r`` of a square loss ``½ ‖r‖²``, all of them in every step.
*Poisson*: ``Δu = f`` on the unit square, ``u = sin πx sin πy``; a tanh network 3 × 32, 900 points
inside and 160 on the boundary.
*Burgers*: ``u_t + u u_x = 0.01/π u_xx``, ``u(x, 0) = -sin πx``; a tanh network 3 × 20,
2500 points inside, denser towards the front, and 160 on the boundary, against the Cole-Hopf
solution by quadrature. Errors are relative, in L2, on a fine grid.
*MGH09*: NIST's rational function of four parameters from the far start; other seeds start up to a
tenth away from it. The error is the largest relative one of the certified values.

`lro.levenberg_marquardt` has no setting for any of them, nor for the precision. L-BFGS has optax's
line search and the plain Levenberg-Marquardt, on dense normal equations, Marquardt's rule; Adam and
SOAP have linear decay and their best learning rate of five by the final loss on seed 0. Seconds are
the processor's, without compilation and measuring: run it on one core. Runs are written as they
end, and those in the file already are not repeated.

    taskset -c 0 python benchmarks/least_squares.py [--seeds 3] [--only Poisson] [--methods NAME]
    python benchmarks/least_squares.py --quick --out DIR
"""

import argparse
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report
from matplotlib.figure import Figure

import lowrank_optax as lro

PRECISIONS = ("float64", "float32")


# Problems -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """Residuals in parts, each a function of the parameters and one point, and its points."""

    init: Callable[[int], Any]
    parts: list[tuple[Callable[[Any, jax.Array], jax.Array], jax.Array]]
    error: Callable[[Any], jax.Array]
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)

    def residuals(self, params: Any) -> jax.Array:
        """All residuals, every part divided by the root of its number of points."""
        parts = [jax.vmap(f, (None, 0))(params, x) / len(x) ** 0.5 for f, x in self.parts]
        return jnp.concatenate(parts)

    def loss(self, params: Any) -> jax.Array:
        return jnp.sum(self.residuals(params) ** 2) / 2

    def jacobian(self, params: Any) -> Any:
        """Every residual's gradient, from its own point alone."""
        each = [
            jax.vmap(jax.grad(lambda p, x, f=f, n=len(x): f(p, x) / n**0.5), (None, 0))(params, x)
            for f, x in self.parts
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *each)


def network(width: int, seed: int) -> Any:
    """Weights of a tanh network with three layers, normal after Glorot, and biases of zero."""
    sizes = (2, width, width, width, 1)
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / (a + b)), float), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]


def value(params: Any, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[0]


def along(params: Any, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network's value at a point and its first two derivatives along an axis."""
    e = jnp.eye(2)[axis]
    slope = lambda x: jax.jvp(partial(value, params), (x,), (e,))
    (u, first), (_, second) = jax.jvp(slope, (x,), (e,))
    return u, first, second


def grid(*axes: Any) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def relative(points: np.ndarray, truth: np.ndarray) -> Callable[[Any], jax.Array]:
    """The relative error of the network in L2."""
    x, u = jnp.asarray(points, float), jnp.asarray(truth, float)
    return lambda p: jnp.linalg.norm(jax.vmap(value, (None, 0))(p, x) - u) / jnp.linalg.norm(u)


def poisson() -> Problem:
    truth = lambda x: np.sin(np.pi * x[..., 0]) * np.sin(np.pi * x[..., 1])

    def inside(params, x):
        source = -2 * jnp.pi**2 * jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
        return along(params, x, 0)[2] + along(params, x, 1)[2] - source

    middle, side = (np.arange(30) + 0.5) / 30, (np.arange(40) + 0.5) / 40
    edge = np.concatenate([grid(side, [0.0, 1.0]), grid([0.0, 1.0], side)])
    fine = grid(*[np.linspace(0, 1, 101)] * 2)
    parts = [(inside, jnp.asarray(grid(middle, middle), float)), (value, jnp.asarray(edge, float))]
    return Problem(partial(network, 32), parts, relative(fine, truth(fine)))


def burgers() -> Problem:
    viscosity = 0.01 / np.pi

    def inside(params, x):
        u, slope, bend = along(params, x, 0)
        return along(params, x, 1)[1] + u * slope - viscosity * bend

    def initial(params, x):
        return value(params, x) + jnp.sin(jnp.pi * x[0])

    random = np.random.default_rng(0).uniform([-1, 0], [1, 1], (2500, 2))
    random[:, 0] *= np.abs(random[:, 0])  # denser towards the front
    side = (np.arange(40) + 0.5) / 40
    start = np.stack([np.linspace(-1, 1, 80), np.zeros(80)], -1)
    places, times = np.linspace(-1, 1, 201), np.linspace(0, 1, 51)
    truth = np.stack([cole_hopf(places, t, viscosity) for t in times], -1)
    parts = [
        (inside, jnp.asarray(random, float)),
        (value, jnp.asarray(grid([-1.0, 1.0], side), float)),
        (initial, jnp.asarray(start, float)),
    ]
    return Problem(partial(network, 20), parts, relative(grid(places, times), truth.ravel()))


def cole_hopf(x: np.ndarray, t: float, viscosity: float) -> np.ndarray:
    """The solution of Burgers' equation that starts as ``-sin πx``, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[:, None] - np.sqrt(4 * viscosity * t) * nodes
    heat = np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * viscosity))
    return -(np.sin(np.pi * y) * heat) @ weights / (heat @ weights)


def mgh09() -> Problem:
    y = "1957 1947 1735 1600 844 627 456 342 323 235 246"
    x = [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]
    data = np.stack([x, np.array(y.split(), float) / 1e4], -1)
    certified = jnp.array([0.19280693458, 0.19128232873, 0.12305650693, 0.13606233068])

    def residual(b, point):
        x, y = point
        return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]) - y

    def start(seed):
        away = np.random.default_rng(seed).uniform(-0.1, 0.1, 4) * (seed > 0)
        return jnp.asarray(np.array([25, 39, 41.5, 39]) * (1 + away), float)

    error = lambda b: jnp.max(jnp.abs(b / certified - 1))
    return Problem(
        start, [(residual, jnp.asarray(data, float))], error, (1e-2, 3e-2, 0.1, 0.3, 1.0)
    )


PROBLEMS = {"Poisson": poisson, "Burgers": burgers, "MGH09": mgh09}


# Methods ------------------------------------------------------------------------------------------


class PlainState(NamedTuple):
    damping: jax.Array


def plain_levenberg_marquardt() -> optax.GradientTransformationExtraArgs:
    """A reference: dense ``(J^T J + mu I) p = J^T r``, ``mu`` times or over 10 as the loss says.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963.
    """

    def update(updates, state, params, *, value, value_fn, per_example_grads, **extra):
        g, back = jax.flatten_util.ravel_pytree(updates)
        j = jnp.concatenate(
            [x.reshape(len(x), -1) for x in jax.tree.leaves(per_example_grads)], axis=1
        )
        normal = j.T @ j + state.damping * jnp.eye(len(g), dtype=g.dtype)
        step = back(-jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(normal), g))
        better = value_fn(optax.apply_updates(params, step)) < value
        step = jax.tree.map(lambda x: jnp.where(better, x, 0), step)
        mu = jnp.where(better, state.damping / 10, state.damping * 10)
        return step, PlainState(jnp.clip(mu, 1e-20, 1e20))

    init = lambda params: PlainState(jnp.asarray(1e-2, jax.tree.leaves(params)[0].dtype))
    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, its number of steps and the arguments that it needs.

    ``make`` takes a learning rate if the method is to be ``tuned``.
    """

    make: Callable[..., Any]
    steps: int
    needs: tuple[str, ...] = ()
    tuned: bool = False

    def build(self, rate: float | None) -> Any:
        if not self.tuned:
            return self.make()
        return self.make(optax.linear_schedule(rate, 0.0, self.steps))


METHODS = {
    "lro.levenberg_marquardt": Method(
        lro.levenberg_marquardt, 200, ("residuals_fn", "per_example_grads")
    ),
    "plain Levenberg-Marquardt": Method(
        plain_levenberg_marquardt, 200, ("value", "value_fn", "per_example_grads")
    ),
    "L-BFGS": Method(optax.lbfgs, 10000, ("value", "grad", "value_fn")),
    "SOAP": Method(peers.soap, 3000, tuned=True),
    "Adam": Method(optax.adam, 3000, tuned=True),
}


def train(problem: Problem, method: Method, rate: float | None, seed: int) -> dict[str, Any]:
    """One run: the error, the loss and the seconds at fifty points on the way."""
    tx = method.build(rate)
    value_and_grad = jax.value_and_grad(problem.loss)

    def step(carry, _):
        params, state = carry
        loss, grads = value_and_grad(params)
        offered = {
            "value": loss,
            "grad": grads,
            "value_fn": problem.loss,
            "residuals_fn": problem.residuals,
            "per_example_grads": problem.jacobian(params),
        }
        extra = {name: offered[name] for name in method.needs}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    stride = max(1, method.steps // 50)
    params = problem.init(seed)
    carry = (params, tx.init(params))
    advance = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=stride)[0])
    advance = advance.lower(carry).compile()
    measure = jax.jit(lambda params: (problem.error(params), problem.loss(params)))
    curve, seconds = [], 0.0
    for n in range(0, method.steps, stride):
        start = time.process_time()
        carry = jax.block_until_ready(advance(carry))
        seconds += time.process_time() - start
        error, loss = map(float, measure(carry[0]))
        point = {"seconds": seconds, "error": error, "loss": loss}
        curve.append({"step": n + stride} | {k: float(f"{x:.4g}") for k, x in point.items()})
    return {"rate": rate, "seed": seed, "curve": curve}


def runs_of(
    problem: Problem, method: Method, key: dict[str, Any], seeds: int, have: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The runs of one method that are not there yet: learning rates on seed 0, then all seeds."""
    mine = [run for run in have if key.items() <= run.items()]
    rates = problem.rates if method.tuned else (None,)
    for seed in range(seeds):
        for rate in rates:
            if not any((run["rate"], run["seed"]) == (rate, seed) for run in mine):
                mine.append(key | train(problem, method, rate, seed))
                yield mine[-1]
        rates = (best(mine),)


def best(runs: list[dict[str, Any]]) -> float | None:
    """The learning rate of the lowest final loss on seed 0."""
    first = [run for run in runs if run["seed"] == 0]
    return min(first, key=lambda run: np.nan_to_num(run["curve"][-1]["loss"], nan=np.inf))["rate"]


# Tables -------------------------------------------------------------------------------------------


def row(runs: list[dict[str, Any]], aim: float | None) -> dict[str, Any]:
    """Medians over seeds: the final error, its spread, and when the aim was reached, if it was."""
    last = [run["curve"][-1] for run in runs]
    error = [p["error"] for p in last]
    row = {k: runs[0][k] for k in ("problem", "precision", "method", "rate")} | {
        "seeds": len(runs),
        "steps": last[0]["step"],
        "error": float(np.median(error)),
        "spread": f"{min(error):.1e} – {max(error):.1e}",
        "loss": float(np.median([p["loss"] for p in last])),
        "seconds": float(np.median([p["seconds"] for p in last])),
    }
    hits = [next((p for p in r["curve"] if p["error"] <= (aim or 0)), None) for r in runs]
    if all(hits):
        row["aim"] = " in ".join(
            f"{np.median([hit[k] for hit in hits]):.0f} {unit}"
            for k, unit in (("step", "steps"), ("seconds", "s"))
        )
    return row


AIMS = {("Poisson", "float64"): 5e-7, ("Poisson", "float32"): 5e-5}
COLUMNS = {
    "method": "",
    "rate": "rate",
    "steps": "steps",
    "error": "error",
    "spread": "of the seeds",
    "seconds": "seconds",
    "aim": "aim reached after",
}


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Errors against steps and against seconds, a row of panels a problem; medians over seeds."""
    problems = list(dict.fromkeys(run["problem"] for run in runs))
    figure = Figure(figsize=(9, 3 * len(problems)), dpi=130, layout="constrained")
    panels = figure.subplots(len(problems), 2, squeeze=False)
    for (problem, pair), precision in itertools.product(
        zip(problems, panels, strict=True), PRECISIONS
    ):
        for i, method in enumerate(METHODS):
            key = (problem, precision, method)
            some = [r for r in runs if (r["problem"], r["precision"], r["method"]) == key]
            if not some:
                continue
            style = {"color": f"C{i}", "ls": "-" if precision == "float64" else "--"}
            error = np.median([[p["error"] for p in r["curve"]] for r in some], axis=0)
            for ax, x in zip(pair, ("step", "seconds"), strict=True):
                at = np.median([[p[x] for p in r["curve"]] for r in some], axis=0)
                ax.plot(at, error, label=f"{method}, {precision}", **style)
                ax.set(xscale="log", yscale="log", xlabel=x, title=problem)
                ax.grid(alpha=0.3)
        pair[0].set_ylabel("relative error")
    panels[0, 1].legend(frameon=False, fontsize=6)
    figure.savefig(path)


def chosen(runs: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The runs by problem, precision and method, at the best learning rate alone."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key in itertools.product(PROBLEMS, PRECISIONS, METHODS):
        some = [r for r in runs if (r["problem"], r["precision"], r["method"]) == key]
        if some:
            rate = best(some)
            groups[key] = [run for run in some if run["rate"] == rate]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description="Nonlinear least squares.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--quick", action="store_true", help="the curve, and a step of ours on the rest"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    path = args.out / "least_squares.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for name, precision, kind in itertools.product(args.only, args.precisions, args.methods):
        method, seeds = METHODS[kind], args.seeds
        if args.quick:
            if precision == "float64" or (name != "MGH09" and kind != next(iter(METHODS))):
                continue
            steps, seeds = method.steps if name == "MGH09" else 1, 1
            method = dataclasses.replace(method, steps=steps)
        key = {"problem": name, "precision": precision, "method": kind}
        with jax.enable_x64(precision == "float64"):
            for run in runs_of(PROBLEMS[name](), method, key, seeds, runs):
                runs.append(run)
                report.save(path, runs=runs)
                last = run["curve"][-1]
                print(f"{key} {run['rate']} {run['seed']}: {last}", flush=True)
    groups = chosen(runs)
    rows = [row(some, AIMS.get(key[:2])) for key, some in groups.items()]
    for problem, precision in itertools.product(PROBLEMS, PRECISIONS):
        some = [r for r in rows if (r["problem"], r["precision"]) == (problem, precision)]
        if some:
            aim = AIMS.get((problem, precision))
            title = f"{problem}, {precision}: medians of {some[0]['seeds']} seeds"
            report.show(title + (f"; aim {aim:.0e}" if aim else ""), some, COLUMNS)
    report.save(path, rows=rows, runs=runs)
    draw(args.out / "least_squares.png", [run for some in groups.values() for run in some])


if __name__ == "__main__":
    main()
