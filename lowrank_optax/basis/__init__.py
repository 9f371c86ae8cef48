"""Bases: how the curvature is kept as ``Q diag(lam) Q^T`` and updated by corrections.

`GGT`, `CommonDirections` and `LowRankFactor` keep columns themselves; `Eigen` and `RandomizedEigen`
the leading eigenpairs of their running average or sum, `FullMatrix` the whole matrix. `OPAST`,
`GROUSE` and `Hebbian` turn a subspace towards every column; `FrequentDirections` and `Nystrom` are
sketches with a guarantee, `SubspaceIteration` takes many short columns at once. `TopK`,
`WeightedPermutation`, `RandomPermutation` and `Histogram` select coordinates, `Random` knows
nothing.
"""

from lowrank_optax.basis._basis import Basis
from lowrank_optax.basis._frame import Frame
from lowrank_optax.basis.eigen import Eigen
from lowrank_optax.basis.full import FullMatrix
from lowrank_optax.basis.ggt import GGT
from lowrank_optax.basis.hebbian import CayleyAdamG, GradientRule, Hebbian, Rule, StiefelRule
from lowrank_optax.basis.random import Random
from lowrank_optax.basis.selection import Histogram, RandomPermutation, TopK, WeightedPermutation
from lowrank_optax.basis.sketches import FrequentDirections, Nystrom, RandomizedEigen
from lowrank_optax.basis.subspace import SubspaceIteration
from lowrank_optax.basis.trackers import GROUSE, OPAST
from lowrank_optax.basis.window import (
    CommonDirections,
    DropOldest,
    DropSmallest,
    LowRankFactor,
    Overflow,
    Reconstruct,
)

__all__ = [
    "Basis",
    "CayleyAdamG",
    "CommonDirections",
    "DropOldest",
    "DropSmallest",
    "Eigen",
    "Frame",
    "FrequentDirections",
    "FullMatrix",
    "GGT",
    "GradientRule",
    "GROUSE",
    "Hebbian",
    "Histogram",
    "LowRankFactor",
    "Nystrom",
    "OPAST",
    "Overflow",
    "Random",
    "RandomizedEigen",
    "RandomPermutation",
    "Reconstruct",
    "Rule",
    "StiefelRule",
    "SubspaceIteration",
    "TopK",
    "WeightedPermutation",
]
