"""Methods that turn functions and their images under an operator into a direction of descent.

`NestedLoRA` and `LowRankProduct` approximate the operator. `OrbitalMinimization`, `TracePenalty`,
`ALLO`, `SpIN` and `SpectralNet` maximise its trace. `NeuralEF` maximises one Rayleigh quotient for
each mode. `VAMP2` and `DPNet` score a span. `VariationalEnergy` and `ExcitedStates` are Monte Carlo
energies. `Oja`, `Krasulina` and `NoisyPower` are streaming rules. Every method seeks the operator's
largest eigenvalues; where the smallest are wanted the operator's sign is changed, as `operators`
do.
"""

from lowrank_optax.spectral.methods._method import Method, SideMoments, moments, surrogate
from lowrank_optax.spectral.methods._moments import MomentLoss, MomentMethod
from lowrank_optax.spectral.methods.eigengame import (
    AlphaPenalty,
    MuPenalty,
    NeuralEF,
    Penalty,
    SquaredPenalty,
)
from lowrank_optax.spectral.methods.energy import ExcitedStates, VariationalEnergy
from lowrank_optax.spectral.methods.estimates import Estimate, Halves, UStatistic, WholeBatch
from lowrank_optax.spectral.methods.lowrank import LowRankProduct, NestedLoRA
from lowrank_optax.spectral.methods.scores import VAMP2, DPNet
from lowrank_optax.spectral.methods.streaming import Krasulina, NoisyPower, Oja
from lowrank_optax.spectral.methods.trace import (
    ALLO,
    OrbitalMinimization,
    SpectralNet,
    SpIN,
    TracePenalty,
)

__all__ = [
    "ALLO",
    "AlphaPenalty",
    "DPNet",
    "Estimate",
    "ExcitedStates",
    "Halves",
    "Krasulina",
    "LowRankProduct",
    "Method",
    "MomentLoss",
    "MomentMethod",
    "SideMoments",
    "MuPenalty",
    "NestedLoRA",
    "NeuralEF",
    "NoisyPower",
    "Oja",
    "OrbitalMinimization",
    "Penalty",
    "SpIN",
    "SpectralNet",
    "SquaredPenalty",
    "TracePenalty",
    "UStatistic",
    "VAMP2",
    "VariationalEnergy",
    "WholeBatch",
    "moments",
    "surrogate",
]
