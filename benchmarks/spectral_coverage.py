"""How often two standard errors around an eigenvalue that `fit` reports hold the true one.

Small problems with the defaults, a new one for every seed, whose truth is known:

    chain     a reversible Markov chain of 8 states: one trajectory of 3,000 steps, slow eigenvalues
    pairs     2,000 pairs of normal numbers of a random correlation rho: rho and its square
    nothing   1,000 pairs that are independent: singular values 0
    matrix    a random symmetric matrix of 40: the three largest, whose error is a bound

    python benchmarks/spectral_coverage.py --seeds 13     # 52 problems; a few minutes

An eigenvalue counts when the result calls its mode converged, except in `nothing`, where no mode is
there to be found and all count. Printed are the share of intervals that hold the truth, and of
problems of which all intervals do.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import machine

from lowrank_optax import spectral
from lowrank_optax.spectral import operators as ops

STEPS = 600
RESULTS = Path(__file__).parent / "results"


def chain(rng: np.random.Generator) -> tuple[ops.SampledOperator, int, np.ndarray]:
    weights = rng.exponential(size=(8, 8)) ** 2 + 4 * np.diag(rng.exponential(size=8))
    weights = weights + weights.T
    step = weights / weights.sum(1, keepdims=True)
    truth = np.sort(np.linalg.eigvals(step).real)[::-1]
    at, edges = [0], step.cumsum(1)
    for u in rng.random(3000):
        at.append(min(int(np.searchsorted(edges[at[-1]], u)), 7))
    states = np.asarray(at)
    states[:8] = np.arange(8)  # every state is seen, so that tables have equal shapes
    return ops.Koopman.from_trajectories(states, 1), 2, truth[:3]


def pairs(rng: np.random.Generator) -> tuple[ops.SampledOperator, int, np.ndarray]:
    rho = rng.uniform(0.4, 0.9)
    x, e = rng.normal(size=(2, 2000, 1)).astype(np.float32)
    y = rho * x + np.float32((1 - rho**2) ** 0.5) * e
    return ops.CanonicalDependence(x, y), 2, rho ** np.arange(3)


def nothing(rng: np.random.Generator) -> tuple[ops.SampledOperator, int, np.ndarray]:
    x, y = rng.normal(size=(2, 1000, 2)).astype(np.float32)
    return ops.CanonicalDependence(x, y), 2, np.eye(3)[0]


def matrix(rng: np.random.Generator) -> tuple[ops.SampledOperator, int, np.ndarray]:
    a = rng.normal(size=(40, 40)).astype(np.float32)
    operator = ops.Matrix(a + a.T)
    return operator, 3, operator.truth(3)


PROBLEMS: dict[str, Callable] = {make.__name__: make for make in (chain, pairs, nothing, matrix)}


def measure(name: str, seed: int) -> dict[str, Any]:
    operator, modes, truth = PROBLEMS[name](np.random.default_rng(seed))
    found = spectral.fit(operator, modes, steps=STEPS, seed=seed, progress=False)
    counts = np.abs(truth - 1) > 1e-9 if name != "matrix" else np.ones(len(truth), bool)
    counts &= (name == "nothing") | found.converged
    off = np.abs(found.eigenvalues - truth)
    return {
        "problem": name,
        "seed": seed,
        "eigenvalues": found.eigenvalues.tolist(),
        "errors": found.errors.tolist(),
        "truth": truth.tolist(),
        "converged": found.converged.tolist(),
        "covered": (off <= 2 * found.errors)[counts].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=13)
    parser.add_argument("--out", type=Path, default=RESULTS / "spectral_coverage.json")
    args = parser.parse_args()
    rows = []
    for name in PROBLEMS:
        rows += [measure(name, seed) for seed in range(args.seeds)]
        own = [row["covered"] for row in rows if row["problem"] == name]
        intervals = sum(own, [])
        print(f"{name:8s} {np.mean(intervals):.2f} of {len(intervals)} intervals, ", end="")
        print(f"{np.mean([all(c) for c in own]):.2f} of {len(own)} problems", flush=True)
        content = {"steps": STEPS, "runs": rows, "machine": machine()}
        args.out.write_text(json.dumps(content, indent=1))
    every = sum((row["covered"] for row in rows), [])
    print(f"all      {np.mean(every):.2f} of {len(every)} intervals")


if __name__ == "__main__":
    main()
