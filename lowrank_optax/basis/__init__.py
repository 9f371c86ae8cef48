"""Bases: how the curvature is kept as ``Q diag(lam) Q^T`` and updated by corrections.

`GGT`, `CommonDirections` and `LowRankFactor` keep columns themselves. `Eigen` and `RandomizedEigen`
keep the leading eigenpairs of a running average or sum, `FullMatrix` keeps the whole matrix.
`OPAST`, `GROUSE`, `HistoryPCA` and `Hebbian` turn a subspace towards every column.
`FrequentDirections` and `Nystrom` are sketches with a guarantee. `SubspaceIteration` takes many
short columns at once. `TopK`, `WeightedPermutation`, `RandomPermutation` and `Histogram` select
coordinates. `Random` ignores the corrections.
"""

from lowrank_optax.basis._basis import Basis, Regularized
from lowrank_optax.basis._frame import Frame, Seen, Turn
from lowrank_optax.basis.eigen import Eigen, RandomizedEigen, TruncatedEigen
from lowrank_optax.basis.full import FullMatrix
from lowrank_optax.basis.ggt import GGT
from lowrank_optax.basis.hebbian import (
    AdaptiveRule,
    CayleyAdamG,
    GradientRule,
    Hebbian,
    Rule,
    StiefelRule,
)
from lowrank_optax.basis.histogram import Histogram
from lowrank_optax.basis.moving import GROUSE, OPAST, HistoryPCA
from lowrank_optax.basis.random import Random
from lowrank_optax.basis.selection import RandomPermutation, TopK, WeightedPermutation
from lowrank_optax.basis.sketches import FrequentDirections, Nystrom
from lowrank_optax.basis.subspace import SubspaceIteration
from lowrank_optax.basis.window import (
    CommonDirections,
    DropOldest,
    DropSmallest,
    LowRankFactor,
    Overflow,
    Reconstruct,
)

__all__ = [
    "AdaptiveRule",
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
    "HistoryPCA",
    "LowRankFactor",
    "Nystrom",
    "OPAST",
    "Overflow",
    "Random",
    "RandomizedEigen",
    "RandomPermutation",
    "Reconstruct",
    "Regularized",
    "Rule",
    "Seen",
    "StiefelRule",
    "SubspaceIteration",
    "TopK",
    "TruncatedEigen",
    "Turn",
    "WeightedPermutation",
]
