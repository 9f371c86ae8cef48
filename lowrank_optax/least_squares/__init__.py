"""Nonlinear least squares: fits, physics-informed networks, wavefunctions.

`levenberg_marquardt` for residuals that stay the same, `spring` for batches that change. Around
them stand functions that make residuals and their gradients (`at_points`, `energy_residuals`) and
that say what counts how much (`attention_weights`, `causal_weights`, `resample`,
`hard_constraint`).
"""

from lowrank_optax.least_squares.marquardt import LevenbergMarquardtState as LevenbergMarquardtState
from lowrank_optax.least_squares.marquardt import levenberg_marquardt as levenberg_marquardt
from lowrank_optax.least_squares.points import PointResiduals, at_points, energy_residuals
from lowrank_optax.least_squares.spring import SpringState as SpringState
from lowrank_optax.least_squares.spring import spring as spring
from lowrank_optax.least_squares.weights import (
    attention_weights,
    causal_weights,
    hard_constraint,
    resample,
)

__all__ = [
    "PointResiduals",
    "at_points",
    "attention_weights",
    "causal_weights",
    "energy_residuals",
    "hard_constraint",
    "resample",
]
