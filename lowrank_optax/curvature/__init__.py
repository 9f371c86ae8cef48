"""Curvatures: what is measured at every step and handed to the basis as a low-rank correction.

`covariance` holds curvatures that take one column from every step, and `examples` those with a
column for every example. `hessian` holds averages of Hessian products, and `quasi_newton` the
corrections that make the kept matrix agree with the last product; `probes` are the vectors of such
products, and `products` the ways to compute them. `sides` holds what is measured on matrices.
"""

from lowrank_optax.curvature._curvature import Curvature, Evidence, Observation
from lowrank_optax.curvature.covariance import (
    Covariance,
    GradientEMA,
)
from lowrank_optax.curvature.examples import EmpiricalFisher, GaussNewton
from lowrank_optax.curvature.hessian import HutchinsonHessian, SquaredHessian
from lowrank_optax.curvature.probes import (
    GradientProbe,
    MixedProbe,
    NormalProbe,
    RademacherProbe,
    StepProbe,
)
from lowrank_optax.curvature.products import (
    CentralDifference,
    ExactProduct,
    ForwardDifference,
    GradientDifference,
)
from lowrank_optax.curvature.quasi_newton import BFGS, SR1, ShorR
from lowrank_optax.curvature.sides import SideColumns, SideCovariance, SideCurvature

__all__ = [
    "BFGS",
    "CentralDifference",
    "Covariance",
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
    "RademacherProbe",
    "SR1",
    "ShorR",
    "SideColumns",
    "SideCovariance",
    "SideCurvature",
    "SquaredHessian",
    "StepProbe",
]
