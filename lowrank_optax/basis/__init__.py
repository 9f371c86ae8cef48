"""Bases: how the curvature is kept as ``Q diag(lam) Q^T`` and updated by corrections.

`GGT` keeps the last columns themselves, `Eigen` the leading eigenpairs of their running average or
sum, `FullMatrix` the whole matrix.
"""

from lowrank_optax.basis._basis import Basis
from lowrank_optax.basis._frame import Frame
from lowrank_optax.basis.eigen import Eigen
from lowrank_optax.basis.full import FullMatrix
from lowrank_optax.basis.ggt import GGT

__all__ = ["Basis", "Eigen", "Frame", "FullMatrix", "GGT"]
