"""Operators whose spectra are learned, and what they are made of.

`Schrodinger`, `Langevin` and `FokkerPlanck` act on functions of ``R^d`` and need a potential and a
proposal. `Koopman`, `GraphLaplacian` and `CanonicalDependence` are known through pairs of points,
`KernelIntegral` and `NeuralTangentKernel` through data, `Matrix` and `RectangularMatrix` by their
entries or products.
"""

from lowrank_optax.spectral.operators._operator import SampledOperator
from lowrank_optax.spectral.operators.differential import (
    BoxMask,
    FokkerPlanck,
    Langevin,
    RootMask,
    Schrodinger,
)
from lowrank_optax.spectral.operators.kernels import KernelIntegral, NeuralTangentKernel
from lowrank_optax.spectral.operators.matrix import Matrix, RectangularMatrix
from lowrank_optax.spectral.operators.pairs import (
    CanonicalDependence,
    GraphLaplacian,
    Koopman,
    lagged_pairs,
    timescales,
)
from lowrank_optax.spectral.operators.potentials import (
    DoubleWell,
    Harmonic,
    Hydrogen,
    InfiniteWell,
    Potential,
    Prinz,
)
from lowrank_optax.spectral.operators.proposals import (
    Box,
    MultiScale,
    Proposal,
    classical,
    gaussian,
    geometric,
)

__all__ = [
    "Box",
    "BoxMask",
    "CanonicalDependence",
    "DoubleWell",
    "FokkerPlanck",
    "GraphLaplacian",
    "Harmonic",
    "Hydrogen",
    "InfiniteWell",
    "KernelIntegral",
    "Koopman",
    "Langevin",
    "Matrix",
    "MultiScale",
    "NeuralTangentKernel",
    "SampledOperator",
    "Potential",
    "Prinz",
    "Proposal",
    "RectangularMatrix",
    "RootMask",
    "Schrodinger",
    "classical",
    "gaussian",
    "geometric",
    "lagged_pairs",
    "timescales",
]
