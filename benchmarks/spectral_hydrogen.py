"""The spectrum of two-dimensional hydrogen, ``-Δ - 1/r``, by networks and on a grid.

Four modes (the default): relative eigenvalue errors after few steps of the library's defaults,
where nothing is chosen for hydrogen but the potential and the energy 0 above which nothing is
bound; beside it the recipe of Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank
Approximation", ICML 2024, at the same steps (one Gaussian of 16, 16 separate networks of
128-128-128 on 1024 fixed Fourier features of 2π·0.1, sequential nesting, RMSprop 1e-4 along a
cosine, eigenvalues times 100), and the lowest eigenvalues of a finite-volume grid by `eigsh`.

With ``--modes 16`` every variant is run for ``--steps`` and the curve of errors against steps is
kept: the original recipe, the same with the proposal and then the features replaced, the defaults,
and the defaults with one part replaced. Every row has its error after Rayleigh-Ritz too. Runs are
written as they end; those of the same settings that are in the file already are not repeated. Runs
unchanged on a GPU.

    python benchmarks/spectral_hydrogen.py [--modes 4] [--steps 1600] [--seeds 5]
    python benchmarks/spectral_hydrogen.py --modes 16 --steps 50000 --seeds 3 [--only NAME ...]
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

import numpy as np
import optax
import report
from matplotlib.figure import Figure

import lowrank_optax as lro
from lowrank_optax import spectral
from lowrank_optax.spectral import networks, operators

EVALUATION = 64
"""Batches of 512 points at every evaluation."""

WIDE = operators.classical(operators.Hydrogen(), 2, energy=0.0)
NARROW = operators.gaussian(2, 16.0)


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
    "+ mixture, |x| features": lambda modes, steps: {
        "operator": problem(WIDE, 100.0),
        "optimizer": rmsprop(steps),
    },
    "U-statistic": lambda modes, steps: {
        "method": spectral.NestedLoRA(moments=spectral.UStatistic())
    },
    "joint": lambda modes, steps: {"method": spectral.NestedLoRA(spectral.JointNesting())},
    "orbital": lambda modes, steps: {"method": spectral.OrbitalMinimization()},
    "orbital, U-statistic": lambda modes, steps: {
        "method": spectral.OrbitalMinimization(moments=spectral.UStatistic())
    },
    "whitening + Adam": lambda modes, steps: {"optimizer": whitened(steps)},
}

FOUR = ("defaults", "original recipe")


def learn(name: str, modes: int, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """One fit, with the errors of its eigenvalues before and after Rayleigh-Ritz along the way."""
    options = {"operator": problem(WIDE), "network": modes} | VARIANTS[name](modes, steps)
    operator = options.pop("operator")
    truth = operator.truth(modes)
    start = time.perf_counter()
    found = spectral.fit(
        operator,
        options.pop("network"),
        steps=steps,
        batch_size=batch,
        seed=seed,
        evaluate_batches=EVALUATION,
        **options,
    )
    error = lambda values: spectral.relative_error(values, truth)
    return {
        "variant": name,
        "seed": seed,
        "errors": error(found.eigenvalues).tolist(),
        "ritz_errors": error(found.ritz().eigenvalues).tolist(),
        "standard_errors": (found.errors / np.abs(truth)).tolist(),
        "efficiency": found.history[-1]["efficiency"] if found.history else None,
        "message": found.message,
        "seconds": time.perf_counter() - start,
        "curve": [
            {
                "step": record["step"],
                "median": float(np.median(error(record["eigenvalues"]))),
                "mean": float(np.mean(error(record["eigenvalues"]))),
                "ritz median": float(np.median(error(record["ritz"]))),
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


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over modes, and over seeds of them."""
    medians = [float(np.median(run["errors"])) for run in runs]
    ritz = [float(np.median(run["ritz_errors"])) for run in runs]
    return {
        "variant": name,
        "seeds": len(runs),
        "median": float(np.median(medians)),
        "low": min(medians),
        "high": max(medians),
        "largest": float(np.median([max(run["errors"]) for run in runs])),
        "ritz": float(np.median(ritz)),
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def draw(path: Path, modes: int, runs: list[dict[str, Any]]) -> None:
    """Median errors along the steps, a line a run."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    ax = figure.subplots()
    names = list(dict.fromkeys(run["variant"] for run in runs))
    for run in runs:
        points = [(p["step"], p["median"]) for p in run["curve"]]
        i = names.index(run["variant"])
        first = run is next(r for r in runs if r["variant"] == run["variant"])
        ax.plot(*zip(*points, strict=True), color=f"C{i}", label=names[i] if first else None)
    ax.set(yscale="log", xlabel="steps", ylabel=f"median relative error of {modes} eigenvalues")
    ax.legend(frameon=False, fontsize=8)
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
    settings = {"modes": args.modes, "steps": args.steps, "batch": args.batch}
    runs = kept(path, settings)
    done = {(run["variant"], run["seed"]) for run in runs}
    for variant, seed in itertools.product(names, range(args.seeds)):
        if (variant, seed) not in done:
            runs.append(learn(variant, args.modes, args.steps, args.batch, seed))
            print(f"{variant}, seed {seed}: {np.median(runs[-1]['errors']):.2e}", flush=True)
            report.save(path, settings=settings, runs=runs)
    grids = [grid(args.modes, cells) for cells in args.cells]
    by_name = {v: [run for run in runs if run["variant"] == v] for v in VARIANTS}
    rows = [row(v, some) for v, some in by_name.items() if some]
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
        "seeds": "seeds",
        "median": "median error",
        "low": "lowest",
        "high": "highest",
        "largest": "largest mode",
        "ritz": "median, Ritz",
        "seconds": "seconds",
    }
    title = f"Hydrogen, {args.modes} modes, {args.steps} steps of {args.batch}: relative errors"
    report.show(title, rows, columns)
    report.save(path, settings=settings, rows=rows, grids=grids, runs=runs)
    draw(args.out / f"{name}.png", args.modes, [run for some in by_name.values() for run in some])


def kept(path: Path, settings: dict[str, int]) -> list[dict[str, Any]]:
    """Finished runs of a file with the same settings, which need no repeating."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return content["runs"] if content["settings"] == settings else []


if __name__ == "__main__":
    main()
