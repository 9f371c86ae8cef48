"""Bases: how the curvature is kept as ``Q diag(lam) Q^T`` and updated by corrections.

`GGT`, `CommonDirections` and `LowRankFactor` keep columns themselves, `Eigen` the leading eigenpairs of their running average or
sum, `FullMatrix` the whole matrix.
"""

from lowrank_optax.basis._basis import Basis
from lowrank_optax.basis._frame import Frame
from lowrank_optax.basis.eigen import Eigen
from lowrank_optax.basis.full import FullMatrix
from lowrank_optax.basis.ggt import GGT
from lowrank_optax.basis.random import Random
from lowrank_optax.basis.selection import Histogram, RandomPermutation, TopK, WeightedPermutation
from lowrank_optax.basis.window import (
    CommonDirections,
    DropOldest,
    DropSmallest,
    LowRankFactor,
    Overflow,
    Reconstruct,
)

__all__ = [
    "Basis", "CommonDirections", "DropOldest", "DropSmallest", "Eigen", "Frame", "FullMatrix",
    "GGT", "Histogram", "LowRankFactor", "Overflow", "Random", "RandomPermutation", "Reconstruct",
    "TopK", "WeightedPermutation",
]
