"""Low-rank eigenbases of a network's curvature, and optimizers that run inside them.

The engine is `scale_by_lre`, a point of three axes: `curvature` (what is measured), `basis` (how it
is kept), `inner` (what runs inside). `lre` is the recipe to start from,
and the methods people know are beside it under their names.
"""

import typing

from lowrank_optax import basis, curvature, diagnose, inner
from lowrank_optax._tree import per_leaf, shardings
from lowrank_optax._types import (
    MATRIX,
    MOMENTS,
    SCALAR,
    SECOND_MOMENT,
    TENSOR,
    THIRD_MOMENT,
    VECTOR,
    Context,
    Correction,
    Eigenbasis,
    Increment,
    Law,
)
from lowrank_optax.alias import (
    adahessian,
    full_matrix_adam,
    galore,
    gauss_newton,
    ggt,
    lowrank_newton,
    lre,
    natural_gradient,
    polar_soap,
    soap,
    sophia_h,
    whiten,
    whitened_adam,
)
from lowrank_optax.least_squares import LevenbergMarquardtState, levenberg_marquardt
from lowrank_optax.matrix import (
    MatricesState,
    ScaleByMatrixLREState,
    orthogonalize,
    scale_by_matrix_lre,
    squarest,
)
from lowrank_optax.transform import Events, Metrics, ScaleByLREState, scale_by_lre

if typing.TYPE_CHECKING:
    from lowrank_optax import online, spectral

__version__ = "0.1.0"

__all__ = [
    "MATRIX",
    "MOMENTS",
    "SCALAR",
    "SECOND_MOMENT",
    "TENSOR",
    "THIRD_MOMENT",
    "VECTOR",
    "Context",
    "Correction",
    "Eigenbasis",
    "Events",
    "Increment",
    "Law",
    "LevenbergMarquardtState",
    "MatricesState",
    "Metrics",
    "ScaleByLREState",
    "ScaleByMatrixLREState",
    "adahessian",
    "basis",
    "curvature",
    "diagnose",
    "full_matrix_adam",
    "galore",
    "gauss_newton",
    "ggt",
    "inner",
    "levenberg_marquardt",
    "lowrank_newton",
    "lre",
    "natural_gradient",
    "online",
    "per_leaf",
    "shardings",
    "scale_by_lre",
    "orthogonalize",
    "polar_soap",
    "scale_by_matrix_lre",
    "soap",
    "sophia_h",
    "spectral",
    "squarest",
    "whiten",
    "whitened_adam",
]


def __getattr__(name: str):
    """Imported when first asked for: half of the package, and what needs extras."""
    if name in ("online", "spectral", "training", "plot"):
        import importlib

        return importlib.import_module(f"lowrank_optax.{name}")
    raise AttributeError(f"module 'lowrank_optax' has no attribute {name!r}")
