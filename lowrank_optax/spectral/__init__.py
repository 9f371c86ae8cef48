"""Parametric spectral decomposition: eigen- and singular functions of operators by networks.

`fit` trains a network on batches of an operator (`operators`) by a method (`NestedLoRA` and the
others) and returns a `Decomposition`. `networks` (extra: flax) holds modules to start from,
`estimator` (extra: demo) the interface of scikit-learn.

Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation", ICML
2024.
"""

from lowrank_optax.spectral import operators
from lowrank_optax.spectral.decomposition import Decomposition, Network
from lowrank_optax.spectral.fit import fit
from lowrank_optax.spectral.laplacian import Jet, laplacian
from lowrank_optax.spectral.methods import (
    ALLO,
    VAMP2,
    AlphaPenalty,
    DPNet,
    Estimate,
    ExcitedStates,
    Halves,
    Krasulina,
    LowRankProduct,
    Method,
    MomentLoss,
    MomentMethod,
    MuPenalty,
    NestedLoRA,
    NeuralEF,
    NoisyPower,
    Oja,
    OrbitalMinimization,
    Penalty,
    SideMoments,
    SpectralNet,
    SpIN,
    SquaredPenalty,
    TracePenalty,
    UStatistic,
    VariationalEnergy,
    WholeBatch,
    surrogate,
)
from lowrank_optax.spectral.metrics import (
    align,
    angles,
    blocks,
    relative_error,
    subspace_distance,
    vamp_score,
)
from lowrank_optax.spectral.nesting import JointNesting, Nesting, SequentialNesting, Unnested

__all__ = [
    "ALLO",
    "AlphaPenalty",
    "DPNet",
    "Decomposition",
    "Estimate",
    "ExcitedStates",
    "Halves",
    "Jet",
    "JointNesting",
    "Krasulina",
    "LowRankProduct",
    "Method",
    "MomentLoss",
    "MomentMethod",
    "SideMoments",
    "MuPenalty",
    "NestedLoRA",
    "Nesting",
    "Network",
    "NeuralEF",
    "NoisyPower",
    "Oja",
    "OrbitalMinimization",
    "Penalty",
    "SequentialNesting",
    "SpIN",
    "SpectralNet",
    "SquaredPenalty",
    "TracePenalty",
    "UStatistic",
    "Unnested",
    "VAMP2",
    "VariationalEnergy",
    "WholeBatch",
    "align",
    "angles",
    "blocks",
    "fit",
    "laplacian",
    "operators",
    "relative_error",
    "subspace_distance",
    "surrogate",
    "vamp_score",
]


def __getattr__(name: str):
    """Imports `networks` and `estimator`, which need extras, when they are first asked for."""
    extras = {"networks": "flax", "estimator": "demo"}
    if name in extras:
        import importlib

        try:
            return importlib.import_module(f"lowrank_optax.spectral.{name}")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"lowrank_optax.spectral.{name} needs {error.name}: install "
                f"lowrank_optax[{extras[name]}]."
            ) from error
    raise AttributeError(f"module 'lowrank_optax.spectral' has no attribute {name!r}")
