"""Inner optimizers: rules in the coordinates of the basis, freely chained.

`adaptive` holds parts with moments of the gradient, `hessian` parts that average products of the
curvature, `spectral` and `newton` parts that read the eigenvalues or the columns of examples,
`shaping` parts that reshape an update, and `compose` the ways to put parts together.
"""

from lowrank_optax.inner.adaptive import EMA, Adam, CubicAdam, FullMatrixAdam, Lion
from lowrank_optax.inner.compose import Chain, Optax, as_inner
from lowrank_optax.inner.hessian import (
    FullMatrixBFGSAdam,
    FullMatrixHutchinsonAdam,
    HutchinsonAdam,
)
from lowrank_optax.inner.newton import CubicNewton, DampedLeastSquares, NaturalGradient, ThirdOrder
from lowrank_optax.inner.shaping import (
    Cautious,
    ClipNorm,
    ClipNormByEMA,
    ClipValue,
    CopyGradSign,
    NanToZero,
    Normalize,
    RMSProp,
    Sign,
)
from lowrank_optax.inner.spectral import LInv, LInvSqrt, LPower

__all__ = [
    "EMA",
    "Adam",
    "Cautious",
    "Chain",
    "ClipNorm",
    "ClipNormByEMA",
    "ClipValue",
    "CopyGradSign",
    "CubicAdam",
    "CubicNewton",
    "FullMatrixAdam",
    "FullMatrixBFGSAdam",
    "FullMatrixHutchinsonAdam",
    "DampedLeastSquares",
    "HutchinsonAdam",
    "LInv",
    "LInvSqrt",
    "LPower",
    "Lion",
    "NanToZero",
    "NaturalGradient",
    "Normalize",
    "Optax",
    "RMSProp",
    "Sign",
    "ThirdOrder",
    "as_inner",
]
