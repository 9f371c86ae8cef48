"""Rates and time scales of dynamics: networks against a fine grid and classical EDMD.

Generator. Overdamped Langevin dynamics in the double well ``(x² - 1)²`` at beta = 3, known through
its potential: the slowest rates, with residuals that bound their errors.

Trajectories. The same process, seen only through trajectories (Euler-Maruyama, step 0.002): time
scales ``-lag / ln lam`` of its transfer operator for several lags, with 95 % intervals from the
bootstrap over trajectories.

Logistic. ``x' = 4 x (1 - x) + noise mod 1`` with noise of density ``cos(pi xi)^6``, from one
trajectory. It is not reversible: singular values are not moduli of eigenvalues. The kernel is a
trigonometric polynomial in ``y``, so that a grid has them exactly. Functions are learned from one
trajectory, all figures are of another. The residual ``‖T phi - lam phi‖`` is taken with the
operator on the grid; VAMP-2 sums the squares of the singular values. The source's power, 20, is set
aside: with it the second eigenvalue has modulus .27 below a second singular value of .92 and
condition 25 (here 3), and both kinds of EDMD were more than 20 % off with 300 000 pairs.

EDMD on a grid has the indicators of cells as its basis (Ulam's method). Kernel EDMD has Gaussian
kernels at landmarks (Nyström), with what is below 1e-8 of the largest variance cut off.

    python benchmarks/spectral_langevin.py --seeds 3 [--quick] [--out DIR]

Sources: Prinz et al., "Markov models of molecular kinetics", J. Chem. Phys. 134 (2011), for time
scales over lags; Kostic et al., "Learning dynamical systems via Koopman operator regression in
reproducing kernel Hilbert spaces", NeurIPS 2022, for the noisy map; Meanti et al., "Estimating
Koopman operators with sketching", NeurIPS 2023, for Nyström; Wu and Noé, 2020, for the score.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from online_setup import arguments, jax, jnp, plt
from report import save, show

from lowrank_optax import spectral
from lowrank_optax.spectral import operators

BETA, SHIFT, WIDTH = 3.0, 10.0, 2.5
LAGS = (0.5, 1.0, 2.0)
POWER = 6
MODES = 6

Features = Callable[[np.ndarray], np.ndarray]


# From features to spectra ------------------------------------------------------------------------


def whitening(gram: np.ndarray, cut: float = 1e-8) -> np.ndarray:
    """``W``, ``(p, k)``, with ``W^T G W = 1``, without directions of almost no variance."""
    values, vectors = np.linalg.eigh(gram)
    live = values > cut * values[-1]
    return vectors[:, live] / np.sqrt(values[live])


def by_magnitude(values: np.ndarray) -> np.ndarray:
    """Largest first; of a complex pair the one above the real axis."""
    return values[np.lexsort((-np.imag(values), -np.abs(values).round(9)))]


def galerkin(gram: np.ndarray, cross: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``(k,)`` and coefficients ``(p, k)`` of ``C_00^{-1} C_01``: EDMD."""
    w = whitening(gram)
    values, vectors = np.linalg.eig(w.T @ cross @ w)
    order = [np.flatnonzero(values == v)[0] for v in by_magnitude(values)]
    return values[order], w @ vectors[:, order]


def canonical(gram_x: np.ndarray, gram_y: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Singular values of the operator between two spans."""
    return np.linalg.svd(whitening(gram_x).T @ cross @ whitening(gram_y), compute_uv=False)


def indicators(cells: int, low: float, high: float) -> Features:
    """The basis of EDMD on a grid."""
    edges = np.linspace(low, high, cells + 1)[1:-1]
    return lambda x: np.eye(cells)[np.searchsorted(edges, x[:, 0])]


def gaussians(landmarks: np.ndarray, scale: float) -> Features:
    """Kernels at landmarks ``(p, 1)``."""
    return lambda x: np.exp(-((x - landmarks[:, 0]) ** 2) / (2 * scale**2))


# Langevin ----------------------------------------------------------------------------------------


def double_well() -> operators.Langevin:
    proposal = operators.Box(1, WIDTH)
    return operators.Langevin(operators.DoubleWell(), proposal, beta=BETA, shift=SHIFT)


def generator(seed: int, steps: int, modes: int = 4) -> spectral.Decomposition:
    """The slowest modes of the generator, the constant one among them."""
    return spectral.fit(
        double_well(),
        spectral.networks.MLP(modes, (64, 64), jax.nn.tanh),
        method=spectral.NestedLoRA(),
        steps=steps,
        batch_size=1024,
        seed=seed,
        evaluate_every=steps,
        evaluate_batches=256,  # the slowest rate is a hundredth of the shift
    )


def trajectories(seed: int, chains: int, time: float, every: float, dt: float = 2e-3) -> np.ndarray:
    """``(chains, n)`` states every ``every`` units of time, from either well."""
    force = jax.grad(lambda x: jnp.sum((x**2 - 1) ** 2))
    inner = round(every / dt)

    @jax.jit
    def run(key):
        def step(x, key):
            noise = jax.random.normal(key, (chains,))
            return x - dt * force(x) + (2 * dt / BETA) ** 0.5 * noise, None

        def sample(x, key):
            return (x := jax.lax.scan(step, x, jax.random.split(key, inner))[0]), x

        start = jnp.where(jnp.arange(chains) % 2 == 0, 1.0, -1.0)
        return jax.lax.scan(sample, start, jax.random.split(key, round(time / every)))[1]

    settled = round(2 / every)  # within a well; between them the halves are balanced
    return np.asarray(run(jax.random.key(seed)))[settled:].T


def slowest(features: Features, chains: np.ndarray, lag: int, seed: int) -> dict[str, Any]:
    """The slowest time scale, in samples, and its interval over resampled trajectories."""
    n, length = chains.shape
    f = features(chains.reshape(-1, 1)).reshape(n, length, -1)
    x, y = f[:, :-lag], f[:, lag:]
    # A reversible process: pairs count in both directions.
    cross = np.einsum("nti,ntj->nij", x, y)
    cross = (cross + cross.transpose(0, 2, 1)) / 2
    gram = (np.einsum("nti,ntj->nij", x, x) + np.einsum("nti,ntj->nij", y, y)) / 2

    def scale(weights: np.ndarray) -> float:
        means = [np.tensordot(weights, m, 1) / weights.sum() for m in (gram, cross)]
        return float(operators.timescales(galerkin(*means)[0][1].real, lag))

    rng = np.random.default_rng(seed)
    again = [scale(rng.multinomial(n, np.full(n, 1 / n)).astype(float)) for _ in range(100)]
    return {"time": scale(np.ones(n)), "interval": np.quantile(again, [0.025, 0.975]).tolist()}


def implied(seed: int, steps: int, chains: int, every: float = 0.5) -> list[dict[str, Any]]:
    """The slowest time scale by lag, learned and by EDMD."""
    seen = trajectories(seed, chains, 100.0, every)
    rows = []
    for time in LAGS:
        lag = round(time / every)
        pairs = operators.lagged_pairs(list(seen[..., None]), lag)
        found = spectral.fit(
            operators.Koopman(*pairs, held_out_part=0.0),
            spectral.networks.MLP(2, (64, 64), jax.nn.tanh),
            steps=steps,
            batch_size=1024,
            seed=seed,
            evaluate_every=steps,
        )
        bases = {
            "learned": found,
            "grid": indicators(30, -2.0, 2.0),
            "kernel": gaussians(np.linspace(-2, 2, 12)[:, None], 0.4),
        }
        for name, features in bases.items():
            row = slowest(features, seen, lag, seed)
            row = {"time": row["time"] * every, "interval": [t * every for t in row["interval"]]}
            rows.append({"method": name, "lag": time, **row})
    return rows


# Logistic map ------------------------------------------------------------------------------------


def transfer(cells: int, power: int = POWER) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points ``(n,)``, transition matrix ``(n, n)`` and stationary weights ``(n,)``."""
    x = np.arange(cells) / cells
    p = np.cos(np.pi * (x - 4 * (x * (1 - x))[:, None])) ** power
    p = p / p.sum(1, keepdims=True)
    weights = np.full(cells, 1 / cells)
    for _ in range(200):  # the second eigenvalue is far below one
        weights = weights @ p
    return x, p, weights


def spectra(p: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and eigenvalues of a transition matrix in its stationary measure."""
    root = np.sqrt(weights)
    singular = np.linalg.svd(root[:, None] * p / root, compute_uv=False)
    return singular, by_magnitude(np.linalg.eigvals(p))


def logistic(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pairs ``(x_t, x_{t+1})`` of one trajectory, ``(n, 1)`` each."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-0.5, 0.5, 4001)
    mass = np.cumsum(np.cos(np.pi * grid) ** POWER)
    noise = np.interp(rng.random(n + 100), mass / mass[-1], grid)
    x = [rng.random()]
    for e in noise.tolist():
        x.append((4 * x[-1] * (1 - x[-1]) + e) % 1)
    return operators.lagged_pairs(np.asarray(x[100:], np.float32)[:, None], 1)


def learn_map(seed: int, steps: int, x: np.ndarray, y: np.ndarray) -> spectral.Decomposition:
    waves = spectral.networks.FourierFeatures(32, 6.0, kink=True)
    return spectral.fit(
        operators.CanonicalDependence(x, y, held_out_part=0.0),
        spectral.networks.MLP(MODES, (64, 64), jax.nn.tanh, features=waves, shared=True),
        steps=steps,
        batch_size=2048,
        seed=seed,
        evaluate_every=steps,
    )


def judge(left: Features, right: Features, pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Singular values between two sets of functions, eigenvalues and residuals in their union.

    The left functions approximate eigenfunctions, the right ones those of the adjoint. Galerkin's
    eigenvalues are off by the product of both errors if the span has both, and by the first alone,
    times the condition, if it has the left ones only.
    """
    x, y = pairs
    both = lambda z: np.hstack([left(z), right(z)]).astype(np.float64)
    hx, hy = both(x), both(y)
    half = hx.shape[1] // 2
    f, g = hx[:, :half], hy[:, half:]
    moment = lambda a, b: a.T @ b / len(a)
    singular = canonical(moment(f, f), moment(g, g), moment(f, g))
    values, vectors = galerkin(moment(hx, hx), moment(hx, hy))
    points, p, weights = transfer(400)
    phi = both(points[:, None].astype(np.float32)) @ vectors[:, 1]
    miss = weights @ np.abs(p @ phi - values[1] * phi) ** 2
    return {
        "singular": singular[1:5].tolist(),
        "eigenvalue": [values[1].real, values[1].imag],
        "residual": float(np.sqrt(miss / (weights @ np.abs(phi) ** 2))),
        "vamp": float(np.sum(singular[: MODES + 1] ** 2)),
    }


def noisy_map(seed: int, steps: int, n: int) -> dict[str, dict[str, Any]]:
    train, test = logistic(2 * seed, n), logistic(2 * seed + 1, n)
    found = learn_map(seed, steps, *train)
    grid = indicators(50, 0.0, 1.0)
    kernel = gaussians(np.linspace(0, 1, 30)[:, None], 0.06)
    return {
        "learned": judge(found, lambda y: found(y, side=1), test),
        "grid": judge(grid, grid, test),
        "kernel": judge(kernel, kernel, test),
    }


# Tables ------------------------------------------------------------------------------------------

NAMES = {"learned": "NestedLoRA", "grid": "EDMD on a grid", "kernel": "kernel EDMD"}


def middle(values: Any, digits: int = 4) -> str:
    """The median and the range over seeds."""
    return (
        f"{np.median(values):.{digits}f} [{np.min(values):.{digits}f}, {np.max(values):.{digits}f}]"
    )


def rate_table(runs: list[dict]) -> list[dict[str, Any]]:
    truth = SHIFT - double_well().truth(4, WIDTH)
    rates, residuals = (
        np.array([run["generator"][k] for run in runs]) for k in ("rates", "residuals")
    )
    errors = np.abs(rates - truth)
    return [
        {
            "rate": i,
            "truth": float(truth[i]),
            "learned": middle(rates[:, i]),
            "error": f"{100 * np.max(errors[:, i] / truth[i]):.2f} %",
            "residual": middle(residuals[:, i], 3),
            "bounded": f"{np.sum(errors[:, i] <= residuals[:, i])} of {len(runs)}",
        }
        for i in (1, 2, 3)
    ]


def time_table(runs: list[dict]) -> list[dict[str, Any]]:
    truth = 1 / (SHIFT - double_well().truth(2, WIDTH)[1])
    rows = []
    for at, first in enumerate(runs[0]["implied"]):
        each = [run["implied"][at] for run in runs]
        times = np.array([row["time"] for row in each])
        inside = sum(row["interval"][0] <= truth <= row["interval"][1] for row in each)
        widths = [np.ptp(row["interval"]) / 2 for row in each]
        rows.append(
            {
                "method": NAMES[first["method"]],
                "lag": first["lag"],
                "truth": float(truth),
                "time": middle(times, 2),
                "half": float(np.median(widths)),
                "inside": f"{inside} of {len(runs)}",
                "error": f"{100 * abs(np.median(times) / truth - 1):.1f} %",
            }
        )
    return rows


def map_table(runs: list[dict]) -> list[dict[str, Any]]:
    singular, eigen = spectra(*transfer(400)[1:])
    truth = {
        "method": "fine grid",
        "singular": " ".join(f"{s:.3f}" for s in singular[1:5]),
        "eigenvalue": f"{eigen[1].real:.4f}",
        "time": f"{-1 / np.log(np.abs(eigen[1])):.3f}",
        "vamp": float(np.sum(singular[: MODES + 1] ** 2)),
    }
    rows = [truth]
    for key, name in NAMES.items():
        each = [run["map"][key] for run in runs]
        values = np.array([row["singular"] for row in each])
        pairs = np.array([complex(*row["eigenvalue"]) for row in each])
        worst = np.abs(values / singular[1:5] - 1).max()
        rows.append(
            {
                "method": name,
                "singular": " ".join(f"{s:.3f}" for s in np.median(values, 0)),
                "s_error": f"{100 * worst:.2f} %",
                "eigenvalue": f"{np.median(np.real(pairs)):.4f}",
                "e_error": f"{100 * np.max(np.abs(pairs / eigen[1] - 1)):.2f} %",
                "time": middle(-1 / np.log(np.abs(pairs)), 3),
                "residual": float(np.median([row["residual"] for row in each])),
                "vamp": float(np.median([row["vamp"] for row in each])),
            }
        )
    return rows


def draw(runs: list[dict], modes: tuple[np.ndarray, np.ndarray], path: Any) -> None:
    figure, (left, center, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    x, values = modes
    for i in (1, 2, 3):
        left.plot(x, values[:, i] * np.sign(values[-1, i]), label=f"mode {i}")
    well = np.exp(-BETA * (x**2 - 1) ** 2)
    left.fill_between(x, well, color="black", alpha=0.1, label="Boltzmann weight")
    left.set(xlabel="x", title="Double well: learned modes of the generator")
    left.legend(fontsize=8)
    truth = 1 / (SHIFT - double_well().truth(2, WIDTH)[1])
    center.axhline(truth, color="black", ls="--", lw=1, label="fine grid")
    for i, (key, name) in enumerate(NAMES.items()):
        for j, run in enumerate(runs):
            rows = [row for row in run["implied"] if row["method"] == key]
            at = np.array([row["lag"] for row in rows]) * (1 + 0.09 * (i - 1) + 0.02 * (j - 1))
            ends = np.array([row["interval"] for row in rows]).T
            label = name if j == 0 else None
            center.vlines(at, *ends, color=f"C{i}", alpha=0.6)
            center.plot(at, [row["time"] for row in rows], "o", ms=4, color=f"C{i}", label=label)
    center.set_xscale("log", base=2)
    center.set_xticks(LAGS, [f"{lag:g}" for lag in LAGS])
    center.set(xlabel="lag", ylabel="slowest time scale", title="95 % intervals, every seed")
    center.legend(fontsize=8)
    singular = spectra(*transfer(400)[1:])[0][1:5]
    right.axhline(2, color="black", ls=":", lw=1)
    for i, (key, name) in enumerate(NAMES.items()):
        error = [100 * np.abs(np.array(r["map"][key]["singular"]) / singular - 1) for r in runs]
        at = np.arange(1, 5) + 0.12 * (i - 1)
        right.plot(np.tile(at, len(runs)), np.ravel(error), "o", color=f"C{i}", label=name)
    right.set_yscale("log")
    right.set_xticks(range(1, 5))
    right.set(xlabel="singular value", ylabel="error in %", title="Noisy logistic map, every seed")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    quick = {"steps": 100, "chains": 100, "pairs": 5000}
    args = arguments(__doc__, quick, steps=2000, chains=2000, pairs=300_000)
    runs, values = [], []
    x = np.linspace(-1.8, 1.8, 200)
    for seed in range(args.seeds):
        found = generator(seed, args.steps)
        values.append(found(x[:, None].astype(np.float32)))
        rates = (SHIFT - found.eigenvalues).tolist()
        runs.append(
            {
                "generator": {"rates": rates, "residuals": np.asarray(found.residuals).tolist()},
                "implied": implied(seed, args.steps // 2, args.chains),
                "map": noisy_map(seed, args.steps, args.pairs),
            }
        )
    publish(runs, (x, values[0]), args.out)


def publish(runs: list[dict], modes: tuple[np.ndarray, np.ndarray], out: Any) -> None:
    rates, times, maps = rate_table(runs), time_table(runs), map_table(runs)
    heads = {
        "rates": {"rate": "rate", "truth": "fine grid", "learned": "NestedLoRA", "error": "worst"},
        "times": {"method": "method", "lag": "lag", "truth": "fine grid", "time": "time scale"},
        "map": {"method": "method", "singular": "σ1 to σ4", "s_error": "worst"},
    }
    heads["rates"] |= {"residual": "residual", "bounded": "error within residual"}
    heads["times"] |= {"error": "median off", "half": "± (95 %)", "inside": "truth within"}
    heads["map"] |= {"eigenvalue": "λ1", "e_error": "worst"}
    heads["map"] |= {"time": "time scale", "residual": "residual", "vamp": "VAMP-2"}
    show(f"Double well, generator, {len(runs)} seeds", rates, heads["rates"])
    show("Double well, trajectories: slowest time scale", times, heads["times"])
    show("Noisy logistic map", maps, heads["map"])
    save(out / "spectral_langevin.json", rates=rates, times=times, map=maps, runs=runs)
    draw(runs, modes, out / "spectral_langevin.png")


if __name__ == "__main__":
    main()
