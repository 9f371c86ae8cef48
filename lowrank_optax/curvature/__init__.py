"""Curvatures: what is measured at every step and handed to the basis as a low-rank correction.

`covariance` holds those that take one column from every step, `hessian` products of the Hessian
with probes, `quasi_newton` the corrections that make the kept matrix agree with such a product, and
`examples` those with a column for every example, and `sides` what is measured on matrices.
"""

from lowrank_optax.curvature._curvature import Curvature, Evidence, Observation
from lowrank_optax.curvature.covariance import (
    Covariance,
    CovarianceTimesLoss,
    GradientEMA,
    Parameters,
    Updates,
)
from lowrank_optax.curvature.examples import EmpiricalFisher, GaussNewton, UnrolledGaussNewton
from lowrank_optax.curvature.hessian import (
    CentralDifference,
    ExactProduct,
    ForwardDifference,
    GradientDifference,
    GradientProbe,
    HutchinsonHessian,
    MixedProbe,
    NormalProbe,
    RademacherProbe,
    SquaredHessian,
    StepProbe,
)
from lowrank_optax.curvature.quasi_newton import BFGS, SR1, ShorR
from lowrank_optax.curvature.sides import SideColumns, SideCovariance, SideCurvature

__all__ = [
    "BFGS",
    "CentralDifference",
    "Covariance",
    "CovarianceTimesLoss",
    "Curvature",
    "EmpiricalFisher",
    "Evidence",
    "ExactProduct",
    "ForwardDifference",
    "GaussNewton",
    "GradientDifference",
    "GradientEMA",
    "GradientProbe",
    "HutchinsonHessian",
    "MixedProbe",
    "NormalProbe",
    "Observation",
    "Parameters",
    "RademacherProbe",
    "SR1",
    "ShorR",
    "SideColumns",
    "SideCovariance",
    "SideCurvature",
    "SquaredHessian",
    "StepProbe",
    "UnrolledGaussNewton",
    "Updates",
]
