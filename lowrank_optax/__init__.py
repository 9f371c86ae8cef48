"""Low-rank eigenbases of a network's curvature, and optimizers that run inside them.

The engine is `scale_by_lre`, a point of three axes: `curvature` (what is measured), `basis` (how it
is kept), `inner` (what runs inside). `lre` is a point of these axes with a
learning rate, `soap_muon` the recipe for networks, and the methods people know are beside them
under their names.
"""

import typing

from lowrank_optax import basis, curvature, diagnose, experimental, inner, least_squares
from lowrank_optax._core.devices import shardings
from lowrank_optax._core.layout import Layout, per_leaf
from lowrank_optax._core.types import (
    MATRIX,
    MOMENTS,
    SCALAR,
    SECOND_MOMENT,
    TENSOR,
    THIRD_MOMENT,
    VECTOR,
    BasisUpdate,
    Columns,
    Context,
    Correction,
    Eigenbasis,
    Inner,
    Law,
    Outside,
    SymmetricCorrection,
    Vector,
)
from lowrank_optax.engine.axes import MatrixAxes
from lowrank_optax.engine.kronecker import scale_by_kronecker
from lowrank_optax.engine.leaves import ScaleByMatrixLREState
from lowrank_optax.engine.matrices import scale_by_matrix_lre
from lowrank_optax.engine.matrix_space import Sides
from lowrank_optax.engine.orthogonal import orthogonalize, scale_by_neuron_rms
from lowrank_optax.engine.space import Events, GroupState, Metrics
from lowrank_optax.engine.vectors import ScaleByLREState, scale_by_lre
from lowrank_optax.engine.views import default_matrix_view
from lowrank_optax.least_squares import (
    LevenbergMarquardtState,
    SpringState,
    levenberg_marquardt,
    spring,
)
from lowrank_optax.recipes.kronecker import kl_shampoo, kl_soap, muon, normuon, soap_muon
from lowrank_optax.recipes.matrices import galore, shampoo, soap
from lowrank_optax.recipes.second_order import (
    adahessian,
    gauss_newton,
    lowrank_newton,
    natural_gradient,
    sophia_h,
)
from lowrank_optax.recipes.vectors import full_matrix_adam, ggt, lre, whiten, whitened_adam

if typing.TYPE_CHECKING:
    from lowrank_optax import online, spectral

__version__ = "0.2.0"

__all__ = [
    "MATRIX",
    "MOMENTS",
    "SCALAR",
    "SECOND_MOMENT",
    "TENSOR",
    "THIRD_MOMENT",
    "VECTOR",
    "BasisUpdate",
    "Columns",
    "Context",
    "Correction",
    "Eigenbasis",
    "Events",
    "GroupState",
    "Inner",
    "Law",
    "Layout",
    "LevenbergMarquardtState",
    "MatrixAxes",
    "Metrics",
    "Outside",
    "ScaleByLREState",
    "ScaleByMatrixLREState",
    "Sides",
    "SpringState",
    "SymmetricCorrection",
    "Vector",
    "adahessian",
    "basis",
    "curvature",
    "default_matrix_view",
    "diagnose",
    "experimental",
    "full_matrix_adam",
    "galore",
    "gauss_newton",
    "ggt",
    "inner",
    "least_squares",
    "levenberg_marquardt",
    "lowrank_newton",
    "lre",
    "natural_gradient",
    "online",
    "orthogonalize",
    "per_leaf",
    "scale_by_kronecker",
    "scale_by_lre",
    "scale_by_matrix_lre",
    "shardings",
    "kl_shampoo",
    "kl_soap",
    "muon",
    "normuon",
    "shampoo",
    "scale_by_neuron_rms",
    "soap",
    "soap_muon",
    "sophia_h",
    "spectral",
    "spring",
    "whiten",
    "whitened_adam",
]


def __getattr__(name: str):
    """Imported when first asked for: half of the package, and what needs extras."""
    if name in ("online", "spectral", "training", "plot"):
        import importlib

        return importlib.import_module(f"lowrank_optax.{name}")
    raise AttributeError(f"module 'lowrank_optax' has no attribute {name!r}")
