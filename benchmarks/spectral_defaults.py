"""What `lowrank_optax.spectral.fit` reaches with its defaults on problems whose answer is known.

Every fit is `fit(operator, modes)` and nothing else: no network, method, rate, or number of steps.
Only what states the problem is passed: the potential, an energy for the proposal, the data.

    python benchmarks/spectral_defaults.py                     # all, about an hour on two cores
    python benchmarks/spectral_defaults.py --problems morse svd --seeds 2

For each it prints the largest relative error of the modes that the result calls converged, how many
those are, and how many of their 95 % intervals (two standard errors) hold the truth. `blind` marks
problems that were picked before the first run and never tuned for; in them the first run counts.
JSON lies in `benchmarks/results`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from report import machine

from lowrank_optax import spectral
from lowrank_optax.spectral import operators as ops

RESULTS = Path(__file__).parent / "results"


class Problem(NamedTuple):
    """An operator of a seed, a number of modes, the eigenvalues, and the error that is allowed."""

    operator: Callable[[int], ops.SampledOperator]
    modes: int
    truth: Callable[[ops.SampledOperator, int], Any]
    allowed: float
    blind: bool = False


def bound(potential: Any, dimension: int, shift: float) -> Callable[[int], ops.SampledOperator]:
    """A Schrödinger operator at energies below its shift."""
    points = lambda: ops.classical(potential, dimension, energy=shift)
    return lambda seed: ops.Schrodinger(potential, points(), shift=shift)


def grid(potential: Any, shift: float, low: float, high: float, count: int = 1200) -> Callable:
    """Eigenvalues on a line, from a grid with the potential's own kinetic matrix."""

    def truth(_: Any, k: int) -> np.ndarray:
        x, h = np.linspace(low, high, count, retstep=True)
        apart = np.subtract.outer(np.arange(count), np.arange(count))
        some = np.where(apart == 0, 1, apart)
        kinetic = np.where(apart == 0, np.pi**2 / 3, 2 * (-1.0) ** some / some**2) / h**2
        values = np.array([float(potential(np.array([at]))) for at in x])
        return shift - np.linalg.eigvalsh(kinetic + np.diag(values))[:k]

    return truth


def morse(x: Any) -> Any:
    return 16 * jnp.square(1 - jnp.exp(-x[0]))


def quartic(x: Any) -> Any:
    return jnp.sum(x**4) / 4


def tilted(x: Any) -> Any:
    return 2 * jnp.square(x[0] ** 2 - 2) + 0.5 * x[0]


def shallow(x: Any) -> Any:
    return -6 * jnp.exp(-jnp.sum(x**2))


def coupled(x: Any) -> Any:
    return x @ jnp.array([[1.0, 0.6], [0.6, 2.5]]) @ x


def coupled_truth(_: Any, k: int) -> np.ndarray:
    w = np.sqrt(np.linalg.eigvalsh([[1.0, 0.6], [0.6, 2.5]]))
    return 12 - np.sort(np.add.outer(*(a * (2 * np.arange(12) + 1) for a in w)).ravel())[:k]


def gaussian_pairs(seed: int) -> ops.SampledOperator:
    x, e = np.random.default_rng(seed).normal(size=(2, 20000, 1)).astype(np.float32)
    return ops.CanonicalDependence(x, 0.8 * x + 0.6 * e)


def rbf(seed: int) -> ops.SampledOperator:
    x = np.random.default_rng(seed).normal(size=(5000, 1)).astype(np.float32)
    return ops.KernelIntegral(lambda a, b: jnp.exp(-jnp.sum((a - b) ** 2) / 2), x)


def rbf_truth(_: Any, k: int) -> np.ndarray:
    """Rasmussen and Williams, "Gaussian processes for machine learning", section 4.3.1."""
    a, b = 0.25, 0.5
    c = np.sqrt(a**2 + 2 * a * b)
    return np.sqrt(2 * a / (a + b + c)) * (b / (a + b + c)) ** np.arange(k)


def independent(seed: int) -> ops.SampledOperator:
    x, y = np.random.default_rng(seed).normal(size=(2, 1000, 3)).astype(np.float32)
    return ops.CanonicalDependence(x, y)


def trajectory(seed: int) -> ops.SampledOperator:
    """An Ornstein-Uhlenbeck process of 20,000 steps whose factor is .9."""
    rng = np.random.default_rng(seed)
    x = np.zeros(20000)
    for t, e in enumerate(rng.normal(size=len(x) - 1), 1):
        x[t] = 0.9 * x[t - 1] + np.sqrt(1 - 0.81) * e
    return ops.Koopman.from_trajectories(x[:, None].astype(np.float32), 1)


def prinz(_: int) -> ops.SampledOperator:
    return ops.Langevin(ops.Prinz(), ops.gaussian(1, 0.6), beta=1.0)


def well(_: int) -> ops.SampledOperator:
    return ops.Schrodinger(ops.InfiniteWell(), ops.Box(1, 1.0), shift=60.0, mask=ops.RootMask(1.0))


def rectangle(seed: int) -> ops.SampledOperator:
    return ops.RectangularMatrix(np.random.default_rng(seed).normal(size=(300, 200)))


def symmetric(seed: int) -> ops.SampledOperator:
    a = np.random.default_rng(seed).normal(size=(300, 300))
    return ops.Matrix(a + a.T)


def path(_: int) -> ops.SampledOperator:
    return ops.GraphLaplacian([[i, i + 1] for i in range(39)])


known = lambda operator, k: operator.truth(k)
svd = lambda operator, k: np.linalg.svd(np.asarray(operator.matrix))[1][:k]

PROBLEMS: dict[str, Problem] = {
    "svd": Problem(rectangle, 10, svd, 1e-3),
    "symmetric": Problem(symmetric, 10, known, 1e-3),
    "path graph": Problem(path, 5, known, 1e-3, blind=True),
    "oscillator without a shift": Problem(bound(ops.Harmonic(), 2, 0.0), 3, known, 1e-2)._replace(
        operator=lambda seed: ops.Schrodinger(ops.Harmonic(), ops.gaussian(2, 1.0))
    ),
    "coupled oscillators": Problem(bound(coupled, 2, 12.0), 4, coupled_truth, 2e-3),
    "quartic": Problem(bound(quartic, 1, 16.0), 5, grid(quartic, 16.0, -8, 8), 2e-3, blind=True),
    "tilted wells": Problem(bound(tilted, 1, 20.0), 5, grid(tilted, 20.0, -6, 6), 2e-3, blind=True),
    "morse": Problem(bound(morse, 1, 16.0), 3, grid(morse, 16.0, -3, 25, 1500), 1e-2),
    "shallow well": Problem(bound(shallow, 1, 0.0), 4, grid(shallow, 0.0, -30, 30), 1e-2),
    "infinite well": Problem(well, 4, known, 1e-3),
    "prinz generator": Problem(prinz, 4, lambda o, k: o.truth(k, half_width=1.4), 1e-2),
    "hydrogen, 4 modes": Problem(bound(ops.Hydrogen(), 2, 0.0), 4, known, 1e-3),
    "gaussian pairs": Problem(gaussian_pairs, 5, lambda _, k: 0.8 ** np.arange(k + 1), 3e-2),
    "rbf on a gaussian": Problem(rbf, 6, rbf_truth, 3e-2),
    "independent pairs": Problem(independent, 3, lambda _, k: np.eye(k + 1)[0], 0.1),
    "ornstein-uhlenbeck": Problem(trajectory, 3, lambda _, k: 0.9 ** np.arange(k + 1), 5e-2, True),
    "hydrogen in space, 14 modes": Problem(bound(ops.Hydrogen(), 3, 0.0), 14, known, 2e-3),
    "hydrogen, 16 modes": Problem(bound(ops.Hydrogen(), 2, 0.0), 16, known, 1e-3),
    "oscillator, 28 modes": Problem(bound(ops.Harmonic(), 2, 16.0), 28, known, 5e-5),
}


def measure(name: str, seed: int) -> dict[str, Any]:
    """One fit."""
    problem = PROBLEMS[name]
    operator = problem.operator(seed)
    start = time.perf_counter()
    found = spectral.fit(operator, problem.modes, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    values, errors, good = found.eigenvalues, found.errors, found.converged
    truth = np.asarray(problem.truth(operator, problem.modes))
    off = np.abs(values - truth)
    size = np.maximum(np.abs(truth), 0.05 * np.abs(truth).max())
    return {
        "problem": name,
        "blind": problem.blind,
        "seed": seed,
        "seconds": seconds,
        "steps": found.step,
        "method": found.method,
        "message": found.message,
        "allowed": problem.allowed,
        "eigenvalues": values.tolist(),
        "truth": truth.tolist(),
        "standard_errors": errors.tolist(),
        "relative_errors": (off / size).tolist(),
        "converged": good.tolist(),
        "covered": (off <= 2 * errors).tolist(),
    }


def line(row: dict[str, Any]) -> str:
    good = np.array(row["converged"])
    wrong = np.array(row["relative_errors"])
    covered = np.array(row["covered"])[good]
    worst = wrong[good].max() if good.any() else float("nan")
    return (
        f"{row['problem']:28s} {row['seed']:2d}  worst {worst:.1e} of {row['allowed']:.0e}  "
        f"converged {good.sum()}/{len(good)}  covered {covered.sum()}/{good.sum()}  "
        f"{row['steps']:6d} steps {row['seconds']:5.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "spectral_defaults.json")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for name in args.problems:
        for seed in range(args.seeds):
            row = measure(name, seed)
            same = lambda r, row=row: (r["problem"], r["seed"]) == (row["problem"], row["seed"])
            kept = [r for r in kept if not same(r)] + [row]
            print(line(row), flush=True)
            args.out.write_text(json.dumps({"runs": kept, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
