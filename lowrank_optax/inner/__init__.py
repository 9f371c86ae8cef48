"""Inner optimizers: rules in the coordinates of the basis, freely chained.

`adaptive` holds those with moments, `hessian` those that average products of the curvature,
`spectral` and `newton` those that read the eigenvalues or the examples' columns, `shaping` those
that reshape an update, `compose` the ways to put them together.
"""

from lowrank_optax.inner.adaptive import EMA, Adam, CubicAdam, FullMatrixAdam, Lion
from lowrank_optax.inner.compose import Chain, Optax, as_inner
from lowrank_optax.inner.hessian import (
    FullMatrixBFGSAdam,
    FullMatrixHutchinsonAdam,
    HutchinsonAdam,
)
from lowrank_optax.inner.newton import CubicNewton, GaussNewton, NaturalGradient, ThirdOrder
from lowrank_optax.inner.shaping import (
    Cautious,
    ClipNorm,
    ClipNormByEMA,
    ClipValue,
    CopyGradSign,
    NanToZero,
    Normalize,
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
    "GaussNewton",
    "HutchinsonAdam",
    "LInv",
    "LInvSqrt",
    "LPower",
    "Lion",
    "NanToZero",
    "NaturalGradient",
    "Normalize",
    "Optax",
    "Sign",
    "ThirdOrder",
    "as_inner",
]
