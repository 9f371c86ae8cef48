"""The spectrum of two-dimensional hydrogen, ``-Δ - 1/r``, by networks and on a grid.

Four modes (the default): relative eigenvalue errors after few steps of the library's defaults,
where nothing is chosen for hydrogen but the potential and the energy 0 above which nothing is
bound; beside it the recipe of Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank
Approximation", ICML 2024, at the same steps (one Gaussian of 16, 16 separate networks of
128-128-128 on 1024 fixed Fourier features of 2π·0.1, sequential nesting, RMSprop 1e-4 along a
cosine, eigenvalues times 100), and the lowest eigenvalues of a finite-volume grid by `eigsh`.

With ``--modes 16`` every variant is run for ``--steps`` and the curve of errors against steps is
kept. What has to do with noise and with the small eigenvalues of higher modes, one at a time:

    the network      one perceptron a mode, or one trunk for all; softplus or tanh
    the method       NestedLoRA with halves or U-statistics, joint; orbital minimisation; per-mode
                     amplitudes (`MuPenalty`: normalised functions, so that a mode's rate does not
                     depend on its norm); energies of the span, whose cotangent is written in Ritz
                     vectors at every step, without and with each divided by its eigenvalue
    the samples      points of a shifted lattice in place of random ones; larger batches
    the optimizer    whitening in front of Adam

Every row has its error after Rayleigh-Ritz too. Runs are written as they end and those that are in
the file already are not repeated, so that calls with other names, seeds or lengths add up. Runs
unchanged on a GPU.

    python benchmarks/spectral_hydrogen.py [--modes 4] [--steps 1600] [--seeds 5]
    python benchmarks/spectral_hydrogen.py --modes 16 --steps 1500 --seeds 1 [--only NAME ...]
"""

import argparse
import dataclasses
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
import report
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import lowrank_optax as lro
from lowrank_optax import spectral
from lowrank_optax.spectral import networks, operators

EVALUATION = 64
"""Batches of 512 points at every evaluation."""


@dataclasses.dataclass(frozen=True)
class Lattice(operators.MultiScale):
    """The same mixture by a Kronecker lattice of its own random shift in either half of a batch.

    Every point is distributed as before and halves are independent, so that whatever was unbiased
    still is. Powers of the root of ``t^(d+2) = t + 1`` fill the ``d + 1`` dimensions evenly.
    """

    def draw(self, key: jax.Array, size: int, state: Any) -> jax.Array:
        count, root = self.dimension + 1, 1.5
        for _ in range(60):
            root = (1 + root) ** (1 / (count + 1))
        shifts = jax.random.uniform(key, (2, 1, count))
        half = -(-size // 2)
        steps = jnp.arange(half)[:, None] * root ** -jnp.arange(1.0, count + 1)
        u = ((steps + shifts) % 1).reshape(-1, count)[:size]
        which = jnp.searchsorted(jnp.cumsum(jnp.exp(state.log_weights)), u[:, 0])
        k = jnp.minimum(which, len(self.scales) - 1)
        normal = jax.scipy.special.ndtri(jnp.clip(u[:, 1:], 1e-6, 1 - 1e-6))
        return jnp.asarray(self.scales)[k][:, None] * normal


WIDE = operators.classical(operators.Hydrogen(), 2, energy=0.0)
NARROW = operators.gaussian(2, 16.0)
EVEN = Lattice(2, WIDE.scales)


def problem(proposal: operators.Proposal, scale: float = 1.0) -> operators.Schrodinger:
    return operators.Schrodinger(operators.Hydrogen(), proposal, scale=scale)


def adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(3e-3, steps))


def rmsprop(steps: int) -> optax.GradientTransformation:
    return optax.rmsprop(optax.cosine_decay_schedule(1e-4, steps))


def whitened(steps: int) -> optax.GradientTransformation:
    whiten = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(20), lro.inner.LInvSqrt())
    return optax.chain(whiten, adam(steps))


def fourier(modes: int) -> networks.MLP:
    features = networks.FourierFeatures(1024, 2 * np.pi * 0.1)
    return networks.MLP(modes, (128, 128, 128), features=features)


def default(modes: int, shared: bool = False, **changes: Any) -> networks.MLP:
    network = networks.default(problem(WIDE), modes, shared)
    assert isinstance(network, networks.MLP)  # one side, one network
    return network.clone(**changes)


def trunk(modes: int, method: spectral.Method, **rest: Any) -> dict[str, Any]:
    return {"network": default(modes, shared=True), "method": method, **rest}


def recipe(modes: int, steps: int) -> dict[str, Any]:
    """The command's ``--method energy``."""
    return trunk(modes, ENERGY(0.01), optimizer=whitened(steps))


NESTED = spectral.NestedLoRA
ENERGY = spectral.VariationalEnergy
PAIRS = spectral.UStatistic()

# Every variant: what changes of `fit`'s arguments for a number of modes and of steps.
Variant = Callable[[int, int], dict[str, Any]]

VARIANTS: dict[str, Variant] = {
    "defaults": lambda modes, steps: {},
    "original recipe": lambda modes, steps: {
        "operator": problem(NARROW, 100.0),
        "network": fourier(modes),
        "optimizer": rmsprop(steps),
    },
    "+ mixture": lambda modes, steps: {
        "operator": problem(WIDE, 100.0),
        "network": fourier(modes),
        "optimizer": rmsprop(steps),
    },
    "defaults, softplus": lambda modes, steps: {
        "network": default(modes, activation=jax.nn.softplus)
    },
    "trunk": lambda modes, steps: trunk(modes, NESTED()),
    "trunk, joint": lambda modes, steps: trunk(modes, NESTED(spectral.JointNesting())),
    "trunk, U-statistic": lambda modes, steps: trunk(modes, NESTED(moments=PAIRS)),
    "trunk, orbital, U-statistic": lambda modes, steps: trunk(
        modes, spectral.OrbitalMinimization(moments=PAIRS)
    ),
    "trunk, amplitudes": lambda modes, steps: trunk(modes, spectral.NeuralEF(spectral.MuPenalty())),
    "trunk, whitening": lambda modes, steps: trunk(modes, NESTED(), optimizer=whitened(steps)),
    "trunk, energy": lambda modes, steps: trunk(modes, ENERGY()),
    "trunk, energy, whitening": lambda modes, steps: trunk(
        modes, ENERGY(), optimizer=whitened(steps)
    ),
    "trunk, floor": lambda modes, steps: trunk(modes, ENERGY(0.01)),
    "trunk, floor, softplus": lambda modes, steps: {
        "network": default(modes, shared=True, activation=jax.nn.softplus),
        "method": ENERGY(0.01),
    },
    "trunk, floor, halves": lambda modes, steps: trunk(modes, ENERGY(0.01, spectral.Halves())),
    "trunk, floor, lattice": lambda modes, steps: trunk(
        modes, ENERGY(0.01), operator=problem(EVEN)
    ),
    "trunk, floor, batch x 4": lambda modes, steps: trunk(modes, ENERGY(0.01), larger=4),
    "trunk, floor, whitening": recipe,
}

FOUR = ("defaults", "trunk, floor, whitening", "original recipe")


def learn(name: str, modes: int, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """One fit, with the errors of its eigenvalues before and after Rayleigh-Ritz along the way."""
    options = {"operator": problem(WIDE), "network": modes, "method": spectral.NestedLoRA()}
    options |= VARIANTS[name](modes, steps)
    operator = options.pop("operator")
    truth = operator.truth(modes)
    start = time.perf_counter()
    found = spectral.fit(
        operator,
        options.pop("network"),
        steps=steps,
        batch_size=batch * options.pop("larger", 1),
        seed=seed,
        evaluate_batches=EVALUATION,
        **options,
    )
    error = lambda values: spectral.relative_error(values, truth)
    return {
        "variant": name,
        "steps": steps,
        "seed": seed,
        "errors": error(found.raw().eigenvalues).tolist(),
        "ritz_errors": error(found.eigenvalues).tolist(),
        "standard_errors": (found.errors / np.abs(truth)).tolist(),
        "efficiency": found.history[-1]["efficiency"] if found.history else None,
        "message": found.message,
        "seconds": time.perf_counter() - start,
        "curve": [
            {
                "step": record["step"],
                "median": float(np.median(error(record["raw"]))),
                "mean": float(np.mean(error(record["raw"]))),
                "ritz median": float(np.median(error(record["eigenvalues"]))),
            }
            for record in found.history
        ],
    }


def grid(modes: int, cells: int) -> dict[str, Any]:
    """The lowest eigenvalues on a square grid that is fine at the nucleus, by shift-invert Lanczos.

    Cells of the symmetric finite-volume discretisation, ``x = 50 sinh(3 s) / sinh 3`` along both
    axes with uniform ``s``, and the potential averaged over every cell.
    """
    from scipy.sparse import diags_array, eye_array, kron
    from scipy.sparse.linalg import eigsh

    start = time.perf_counter()
    edges = 50 * np.sinh(3 * np.linspace(-1, 1, cells + 1)) / np.sinh(3)
    width, center = np.diff(edges), (edges[1:] + edges[:-1]) / 2
    flow = 1 / np.diff(center)
    # The walls, where functions vanish, are half a cell away from the last centers.
    out = np.append(flow, 2 / width[-1]) + np.insert(flow, 0, 2 / width[0])
    stiff = diags_array(out) - diags_array(flow, offsets=1) - diags_array(flow, offsets=-1)
    root = diags_array(1 / np.sqrt(width))
    line = root @ stiff @ root
    # ∫∫ dx dy / r in closed form, by corners.
    x, y = np.meshgrid(edges, edges, indexing="ij")
    r = np.hypot(x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = x * np.arcsinh(y / np.abs(x)) + y * np.arcsinh(x / np.abs(y))
    whole = np.where(r > 0, np.nan_to_num(whole), 0)
    potential = np.diff(np.diff(whole, axis=0), axis=1) / np.multiply.outer(width, width)
    one = eye_array(cells)
    matrix = kron(line, one) + kron(one, line) - diags_array(potential.ravel())
    values = -np.sort(eigsh(matrix.tocsc(), modes, sigma=-1.5, return_eigenvectors=False))
    truth = problem(WIDE).truth(modes)
    errors = spectral.relative_error(values, truth)
    return {"cells": cells, "errors": errors.tolist(), "seconds": time.perf_counter() - start}


def row(name: str, steps: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over modes, and over seeds of them; all but the first after Rayleigh-Ritz."""
    ritz = [float(np.median(run["ritz_errors"])) for run in runs]
    return {
        "variant": name,
        "steps": steps,
        "seeds": len(runs),
        "outputs": float(np.median([np.median(run["errors"]) for run in runs])),
        "median": float(np.median(ritz)),
        "low": min(ritz),
        "high": max(ritz),
        "largest": float(np.median([max(run["ritz_errors"]) for run in runs])),
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def draw(path: Path, modes: int, runs: list[dict[str, Any]]) -> None:
    """Median errors after Rayleigh-Ritz along the steps, a line a run."""
    figure = Figure(figsize=(8.4, 4.8), dpi=150, layout="constrained")
    ax = figure.subplots()
    names = list(dict.fromkeys(run["variant"] for run in runs))
    labelled: set[str] = set()
    for run in runs:
        name, i = run["variant"], names.index(run["variant"])
        points = [(p["step"], p["ritz median"]) for p in run["curve"]]
        style = ("-", "--")[i // 10 % 2]
        label = None if name in labelled else name
        labelled.add(name)
        ax.plot(*zip(*points, strict=True), style, color=f"C{i % 10}", label=label)
    y = f"median relative error of {modes} Ritz values"
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel=y)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hydrogen in the plane.")
    parser.add_argument("--modes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME")
    parser.add_argument("--cells", type=int, nargs="+", default=[100, 200, 400], help="of the grid")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    name = "spectral_hydrogen" if args.modes == 4 else f"spectral_hydrogen_{args.modes}"
    names = args.only or (FOUR if args.modes == 4 else tuple(VARIANTS))
    path = args.out / f"{name}.json"
    settings = {"modes": args.modes, "batch": args.batch}
    runs = kept(path, settings)
    done = {(run["variant"], run["steps"], run["seed"]) for run in runs}
    for variant, seed in itertools.product(names, range(args.seeds)):
        if (variant, args.steps, seed) not in done:
            runs.append(learn(variant, args.modes, args.steps, args.batch, seed))
            print(f"{variant}, seed {seed}: {np.median(runs[-1]['ritz_errors']):.2e}", flush=True)
            report.save(path, settings=settings, runs=runs)
    grids = [grid(args.modes, cells) for cells in args.cells]
    groups = {
        (variant, steps): [r for r in runs if (r["variant"], r["steps"]) == (variant, steps)]
        for variant in VARIANTS
        for steps in sorted({r["steps"] for r in runs})
    }
    rows = [row(*at, some) for at, some in groups.items() if some]
    rows += [
        {
            "variant": f"eigsh, {g['cells']}² cells",
            "median": float(np.median(g["errors"])),
            "largest": max(g["errors"]),
            "seconds": g["seconds"],
        }
        for g in grids
    ]
    columns = {
        "variant": "",
        "steps": "steps",
        "seeds": "seeds",
        "outputs": "median of outputs",
        "median": "median, Ritz",
        "low": "lowest",
        "high": "highest",
        "largest": "largest mode",
        "seconds": "seconds",
    }
    title = f"Hydrogen, {args.modes} modes, batches of {args.batch}: relative errors"
    report.show(title, rows, columns)
    report.save(path, settings=settings, rows=rows, grids=grids, runs=runs)
    draw(args.out / f"{name}.png", args.modes, [run for some in groups.values() for run in some])


def kept(path: Path, settings: dict[str, int]) -> list[dict[str, Any]]:
    """Finished runs of a file with the same settings, which need no repeating."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return content["runs"] if content["settings"] == settings else []


if __name__ == "__main__":
    main()
