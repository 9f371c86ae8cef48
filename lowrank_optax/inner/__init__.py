"""Inner optimizers: rules in the coordinates of the basis, freely chained.

`adaptive` holds those with moments, `shaping` those that reshape an update, `spectral` those that
read the eigenvalues, `compose` the ways to put them together.
"""

from lowrank_optax.inner.adaptive import EMA, Adam, FullMatrixAdam, Lion
from lowrank_optax.inner.compose import Chain, Optax, as_inner
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
    "EMA", "Adam", "Cautious", "Chain", "ClipNorm", "ClipNormByEMA", "ClipValue", "CopyGradSign",
    "FullMatrixAdam", "LInv", "LInvSqrt", "LPower", "Lion", "NanToZero", "Normalize", "Optax",
    "Sign", "as_inner",
]
