"""The operators of the command ``spectrum``, with their true spectra, and pictures of modes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax import spectral
from lowrank_optax.spectral import operators
from lowrank_optax.spectral.decomposition import functions_of


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An operator and its eigenvalues.

    Nothing else is chosen for a problem: networks and, on unbounded domains, proposals are the
    library's defaults.

    Attributes:
      operator: the operator that is given to `spectral.fit`.
      truth: a function from the number of modes to the largest eigenvalues, descending.
      formula: the operator in symbols, for titles.
    """

    operator: operators.SampledOperator
    truth: Callable[[int], np.ndarray]
    formula: str


def bound(potential: operators.Potential, dimension: int, formula: str) -> Problem:
    """A particle that is free above energy 0."""
    proposal = operators.classical(potential, dimension, energy=0.0)
    operator = operators.Schrodinger(potential, proposal)
    return Problem(operator, operator.truth, formula)


def confined(potential: operators.Potential, dimension: int, top: float, formula: str) -> Problem:
    """A particle that is never free, at energies below ``top``: ``T = 1 - H / top``.

    Eigenvalues of order one keep the outputs, which grow to their roots, of order one.
    """
    proposal = operators.classical(potential, dimension, energy=top)
    operator = operators.Schrodinger(potential, proposal, shift=1.0, scale=1 / top)
    if potential.energies(1, dimension) is None:
        return Problem(operator, lambda k: 1 - energies(potential, k) / top, formula)
    return Problem(operator, operator.truth, formula)


def well(dimension: int, top: float) -> Problem:
    """A particle between walls at ±1, at energies below ``top``."""
    operator = operators.Schrodinger(
        operators.InfiniteWell(),
        operators.Box(dimension, 1.0),
        shift=1.0,
        scale=1 / top,
        mask=operators.RootMask(1.0),
    )
    return Problem(operator, operator.truth, f"1 + Δ/{top:g}, |xᵢ| < 1")


def langevin() -> Problem:
    """Diffusion in two wells; a friction of 16 makes rates below 1 of the slow ones."""
    operator = operators.Langevin(
        operators.DoubleWell(2.0), operators.geometric(1, 0.5, 2.0), friction=16.0, shift=1.0
    )
    return Problem(operator, operator.truth, "1 + (∂² - U′ ∂)/16, U = 2 (x² - 1)²")


OPERATORS: dict[str, Callable[[], Problem]] = {
    "hydrogen2d": lambda: bound(operators.Hydrogen(), 2, "Δ + 1/r"),
    "hydrogen3d": lambda: bound(operators.Hydrogen(), 3, "Δ + 1/r"),
    "oscillator1d": lambda: confined(operators.Harmonic(), 1, 16.0, "1 + (Δ - x²)/16"),
    "oscillator2d": lambda: confined(operators.Harmonic(), 2, 16.0, "1 + (Δ - r²)/16"),
    "well1d": lambda: well(1, 64.0),
    "well2d": lambda: well(2, 64.0),
    "doublewell": lambda: confined(
        operators.DoubleWell(4.0), 1, 32.0, "1 + (Δ - V)/32, V = 4 (x² - 1)²"
    ),
    "langevin": langevin,
}


Options = Callable[[operators.SampledOperator, int, int], dict[str, Any]]
"""From an operator and numbers of modes and of steps, the arguments of `spectral.fit`."""


def ordered(method: spectral.Method) -> Options:
    """The defaults with another method."""
    return lambda operator, modes, steps: {"network": modes, "method": method}


def many(operator: operators.SampledOperator, modes: int, steps: int) -> dict[str, Any]:
    """Many modes in few steps: one trunk, relative energies of its span, whitening before Adam."""
    whiten = lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(20), lro.inner.LInvSqrt())
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    return {
        "network": spectral.networks.default(operator, modes, shared=True),
        "method": spectral.VariationalEnergy(floor=0.01),
        "optimizer": optax.chain(whiten, adam),
    }


METHODS: dict[str, Options] = {
    "nested-lora": ordered(spectral.NestedLoRA()),
    "nested-lora-joint": ordered(spectral.NestedLoRA(spectral.JointNesting())),
    "orbital": ordered(spectral.OrbitalMinimization()),
    "neural-ef": ordered(spectral.NeuralEF()),
    "spin": ordered(spectral.SpIN()),
    "energy": many,
}


def energies(
    potential: Callable[[Any], Any], k: int, half_width: float = 4.0, points: int = 400
) -> np.ndarray:
    r"""The ``k`` lowest energies of ``-d²/dx² + V`` on a line, ascending.

    .. math:: T_{ii} = \frac{\pi^2}{3 h^2}, \qquad T_{ij} = \frac{2 (-1)^{i-j}}{h^2 (i-j)^2}

    on a uniform grid of step ``h``; the error falls faster than any power of it where ``V`` is
    smooth.

    Source: Colbert and Miller, "A novel discrete variable representation for quantum mechanical
    reactive scattering via the S-matrix Kohn method", J. Chem. Phys. 96 (1992).
    """
    x, step = np.linspace(-half_width, half_width, points, retstep=True)
    apart = np.subtract.outer(np.arange(points), np.arange(points))
    signs = np.where(apart % 2, -1.0, 1.0)
    kinetic = np.where(apart == 0, np.pi**2 / 3, 2 * signs / np.where(apart == 0, 1, apart) ** 2)
    values = [float(potential(np.array([at]))) for at in x]
    return np.linalg.eigvalsh(kinetic / step**2 + np.diag(values))[:k]


def rows(truth: np.ndarray, eigenvalues: Any, errors: Any = None) -> list[dict[str, float]]:
    """A row for each mode: eigenvalue, truth, relative error and, where known, standard error."""
    columns = {
        "eigenvalue": eigenvalues,
        "truth": truth,
        "relative_error": spectral.relative_error(eigenvalues, truth),
    }
    if errors is not None:
        columns["standard_error"] = errors
    values = zip(*columns.values(), strict=True)
    return [dict(zip(columns, map(float, row), strict=True)) for row in values]


def write_png(path: Path, found: spectral.Decomposition, title: str) -> None:
    """Draws every mode along the line or over the plane of the first two coordinates."""
    from matplotlib.figure import Figure

    modes = len(found.eigenvalues)
    columns = min(modes, 4)
    lines = -(-modes // columns)
    figure = Figure(figsize=(2.9 * columns, 0.5 + 2.7 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    reach, dimension = _extent(found)
    line = np.linspace(-reach, reach, 400 if dimension == 1 else 120, dtype=np.float32)
    grid = np.stack(np.meshgrid(*(line,) * min(dimension, 2)), -1)
    points = np.zeros((grid[..., 0].size, dimension), np.float32)
    points[:, :2] = grid.reshape(len(points), -1)
    values = found(points).reshape(*grid.shape[:-1], modes)
    for mode, ax in enumerate(axes):
        if mode >= modes:
            ax.axis("off")
            continue
        top = np.abs(values[..., mode]).max()
        if dimension == 1:
            ax.axhline(0, color="0.8", linewidth=0.8)
            ax.plot(line, values[:, mode])
            ax.set(xlim=(-reach, reach), ylim=(-1.1 * top, 1.1 * top), yticks=())
        else:
            extent = (-reach, reach, -reach, reach)
            image = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "interpolation": "bilinear"}
            ax.imshow(values[..., mode], origin="lower", extent=extent, **image)
        ax.set_title(f"{found.eigenvalues[mode]:.4g} ± {found.errors[mode]:.1g}", fontsize=10)
    figure.suptitle(title)
    figure.savefig(path)


def _extent(found: spectral.Decomposition) -> tuple[float, int]:
    """The distance within which 99 % of the modes' mass lies, and the dimension."""
    operator = found.operator

    @jax.jit
    def at_points(key):
        batch = operator.sample(key, 4096, operator.init())
        return operator.apply(functions_of(found.networks, found.params)[0], batch)[0], batch[0]

    f, x = map(np.asarray, at_points(jax.random.key(0)))
    mass = np.sum((f @ found.rotation[0]) ** 2, axis=1)
    far = np.abs(x).max(1)
    order = np.argsort(far)
    share = np.cumsum(mass[order]) / np.sum(mass)
    return float(far[order][np.searchsorted(share, 0.99)]), x.shape[1]
